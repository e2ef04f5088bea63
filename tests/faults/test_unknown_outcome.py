"""The disk does not say whether it has a change: that is told as what it is, and can be mended."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from agent_state import FileStateStore, StorageError, WALStateStore
from agent_state.errors import DurabilityUnknownError
from agent_state.protocols import Append, Change, Delete, Put, StateStore
from agent_state.testing import Fault, FaultyDisk
from tests.faults.tally import Tally

SYNCS = frozenset({"fsync", "fdatasync", "fsync_directory", "syncfs"})
KINDS: dict[str, Callable[[Path], FileStateStore | WALStateStore]] = {
    "shared": FileStateStore,
    "exclusive": WALStateStore,
}


def put(name: str, n: int, expected: int | None = None) -> Put:
    return Put("notes", ("a", name), orjson.dumps({"n": n}), "notes/1", expected)


def append(name: str, n: int) -> Append:
    return Append("notes", ("a", name), orjson.dumps({"n": n}), f"id {n}")


@dataclass(frozen=True)
class Case:
    """Changes, made with the stored revision as what they build on, and what they lead to."""

    changes: Callable[[int], Sequence[Change]]
    after: dict[str, Any]


BEFORE: dict[str, Any] = {"one": 1, "two": 2, "log": [0]}
CASES = {
    "put": Case(lambda base: [put("one", 10, base)], {"one": 10}),
    "create": Case(lambda _: [put("three", 3)], {"three": 3}),
    "create in a new folder": Case(
        lambda _: [Put("notes", ("b", "x"), b'{"n":4}', "notes/1")], {"x": 4}
    ),
    "delete": Case(lambda _: [Delete("notes", ("a", "one"))], {"one": None}),
    "append": Case(lambda _: [append("log", 1)], {"log": [0, 1]}),
    "first append": Case(lambda _: [append("new log", 1)], {"new log": [1]}),
    "group": Case(
        lambda base: [
            put("one", 10, base),
            Delete("notes", ("a", "two")),
            put("three", 3),
            append("log", 1),
        ],
        {"one": 10, "two": None, "three": 3, "log": [0, 1]},
    ),
}


async def everything(store: StateStore) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    await store.get("notes", ("a", "one"))  # a group that is recorded is completed
    for key in await store.keys("notes"):
        document = await store.get("notes", key)
        assert document is not None
        seen[key[-1]] = orjson.loads(document.body)["n"]
    for key in await store.logs("notes"):
        seen[key[-1]] = [orjson.loads(r.body)["n"] async for r in store.read_log("notes", key)]
    return {name: value for name, value in seen.items() if value != []}


async def revision(store: StateStore, name: str = "one") -> int:
    document = await store.get("notes", ("a", name))
    return document.revision if document is not None else 0


async def prepare(root: Path) -> None:
    store = FileStateStore(root)
    await store.open()
    await store.commit([put("one", 1), put("two", 2), append("log", 0)])
    await store.close()


def expected_after(case: Case) -> dict[str, Any]:
    return {name: n for name, n in {**BEFORE, **case.after}.items() if n is not None}


def says_where(error: StorageError, root: Path) -> bool:
    return error.kind == "notes" and bool(error.key) and str(error.path).startswith(str(root))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "persistent", [False, pytest.param(True, marks=pytest.mark.full)], ids=["once", "for good"]
)
@pytest.mark.proof("T12", "the outcome cannot be known: fsync fails after the change is visible")
async def test_a_change_that_may_have_happened_is_told_as_such_and_may_be_tried_again(
    tmp_path: Path, tally: Tally, kind: str, name: str, persistent: bool
) -> None:
    case, unknown = CASES[name], 0
    after = expected_after(case)
    await prepare(tmp_path / "origin")
    for number in range(1, 100):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "origin", root)
        store = KINDS[kind](root)
        await store.open()
        base = await revision(store)
        fault = Fault(at=number, call=SYNCS, error=errno.EIO, persistent=persistent)
        with FaultyDisk(fault) as disk:
            told = await _told(store.commit(case.changes(base)))
            during = disk.fired
        tally.points, tally.faults = tally.points + 1, tally.faults + during
        seen = await everything(store)
        assert seen in (BEFORE, after), fault
        if told is None:
            tally.acknowledged += 1
            assert seen == after, fault
        else:
            assert says_where(told, root), repr(told)
            if not isinstance(told, DurabilityUnknownError):
                assert seen == BEFORE, (fault, told)  # an error that says "no" means it
            unknown += isinstance(told, DurabilityUnknownError)
        if told is not None:
            await _try_again(store, case, seen == after, after)
        await store.commit([put("later", 9)])
        await _restart(store, KINDS[kind](root), {**after, "later": 9})
        shutil.rmtree(root)
        if not during:
            break
    assert tally.clean()
    if name != "append" and kind == "shared":
        assert unknown, "no outcome was unknown"


async def _told(change: Awaitable[object]) -> StorageError | None:
    try:
        await change
    except StorageError as error:
        return error
    return None


async def _try_again(store: StateStore, case: Case, happened: bool, after: dict[str, Any]) -> None:
    """What a caller does: read the revision, and do again what has not happened."""
    if not happened:
        await store.commit(case.changes(await revision(store)))
    assert await everything(store) == after
    # A known dedupe id adds nothing, so an append may be tried again in any case.
    appends = [change for change in case.changes(0) if isinstance(change, Append)]
    if appends:
        await store.commit(appends)
        assert await everything(store) == after


async def _restart(store: StateStore, fresh: StateStore, expected: dict[str, Any]) -> None:
    """What the next process finds, with revisions that go on."""
    number = await revision(store)
    await store.close()
    await fresh.open()
    assert await everything(fresh) == expected
    assert await revision(fresh) == number
    if number:
        assert await fresh.commit([put("one", 77, number)]) == [number + 1]
    await fresh.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.proof("T12", "the outcome cannot be known: fsync fails after the change is visible")
async def test_a_document_that_may_be_in_quarantine_is_in_one_place_only(
    tmp_path: Path, tally: Tally, kind: str
) -> None:
    unknown = 0
    for number in range(1, 100):
        root = tmp_path / str(number)
        await prepare(root)
        store = KINDS[kind](root)
        await store.open()
        with FaultyDisk(Fault(at=number, call=SYNCS)) as disk:
            told = await _told(store.quarantine("notes", ("a", "one"), "no good"))
        tally.points, tally.faults = tally.points + 1, tally.faults + disk.fired
        if told is not None:
            assert says_where(told, root), repr(told)
            unknown += isinstance(told, DurabilityUnknownError)
        kept = [p for p in root.glob(".quarantine/notes/a/one.json.*") if p.suffix != ".json"]
        there = (root / "notes/a/one.json").exists()
        assert len(kept) + there == 1, (number, kept, there)
        await store.quarantine("notes", ("a", "one"), "no good, again")
        assert await store.get("notes", ("a", "one")) is None
        assert await everything(store) == {"two": 2, "log": [0]}
        await store.commit([put("one", 5)])
        await store.close()
        if not disk.fired:
            break
    assert unknown


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.proof("T12", "the outcome cannot be known: fsync fails after the change is visible")
async def test_a_journal_that_is_not_confirmed_twice_leaves_old_or_new_and_goes_on(
    tmp_path: Path, tally: Tally, failures: int
) -> None:
    root = tmp_path / "state"
    await prepare(root)
    store = WALStateStore(root)
    await store.open()
    faults = [Fault(at=number, call="fdatasync") for number in range(1, failures + 1)]
    with FaultyDisk(*faults):
        told = await asyncio.gather(
            *(_told(store.commit([put(f"d{n}", n), append("log", n)])) for n in range(1, 6))
        )
        tally.faults += failures
        errors = [error for error in told if error is not None]
        assert len({id(error) for error in errors}) == len(errors), "one error for two callers"
        for n, error in enumerate(told, 1):
            assert error is None or isinstance(error, DurabilityUnknownError)
            if error is not None:
                assert (error.kind, error.key) == ("notes", ("a", f"d{n}"))
        if failures == 1:
            assert errors == []  # the new segment was confirmed
        retried = [
            await _told(store.commit([put(f"d{n}", n), append("log", n)])) for n in range(1, 6)
        ]
        while any(retried):
            retried = [
                await _told(store.commit([put(f"d{n}", n), append("log", n)])) for n in range(1, 6)
            ]
    tally.points += 1
    tally.acknowledged += 5
    await store.close()
    again = WALStateStore(root)
    await again.open()
    seen = await everything(again)
    await again.close()
    assert sorted(seen.pop("log")) == [0, 1, 2, 3, 4, 5]
    assert seen == {"one": 1, "two": 2, **{f"d{n}": n for n in range(1, 6)}}
