"""Every system call of every operation fails, tears, or is the last one of the process.

After each: old or new and never a mixture, what was acknowledged is there, groups are whole,
nothing is left lying about, and the directory opens without help.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from agent_state import AgentStateError, FileStateStore, JournaledStateStore
from agent_state.errors import DurabilityUnknownError
from agent_state.protocols import Append, Delete, Put, StateStore
from agent_state.testing import Crash, Fault, FaultyDisk
from agent_state.testing.faults import CALLS, CHANGING

Seen = dict[str, Any]
Store = type[FileStateStore]


def body(content: object) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


def put(name: str, n: int, expected: int | None = None) -> Put:
    return Put("notes", ("a", name), body({"n": n}), "notes/1", expected)


def append(n: int, dedupe_id: str | None = None) -> Append:
    return Append("notes", ("a", "log"), body({"n": n}), dedupe_id)


async def everything(store: StateStore) -> Seen:
    """All documents and all records, as what a person would see."""
    seen: Seen = {}
    for key in await store.keys("notes"):
        document = await store.get("notes", key)
        assert document is not None
        seen["/".join(key)] = orjson.loads(document.body)["n"]
    for key in await store.logs("notes"):
        records = [record async for record in store.read_log("notes", key)]
        if records:
            seen["/".join(key)] = [orjson.loads(record.body)["n"] for record in records]
    return seen


@dataclass
class Operation:
    """One thing to do, with all states it may pass through, each one whole."""

    run: Callable[[StateStore], Coroutine[Any, Any, object]]
    states: list[Seen] = field(default_factory=list)


BEFORE: Seen = {"a/1": 1, "a/2": 2, "a/log": [1]}


async def two_commits(store: StateStore) -> None:
    await store.commit([put("1", 10)])
    await store.commit([append(2)])


OPERATIONS = {
    "change": Operation(
        lambda store: store.commit([put("1", 10, expected=1)]), [{**BEFORE, "a/1": 10}]
    ),
    "create": Operation(
        lambda store: store.commit([put("3", 3, expected=0)]), [{**BEFORE, "a/3": 3}]
    ),
    "delete": Operation(
        lambda store: store.commit([Delete("notes", ("a", "1"))]), [{"a/2": 2, "a/log": [1]}]
    ),
    "append": Operation(
        lambda store: store.commit([append(2, "two")]), [{**BEFORE, "a/log": [1, 2]}]
    ),
    "group": Operation(
        lambda store: store.commit(
            [put("1", 10), Delete("notes", ("a", "2")), put("3", 3), append(2), append(3)]
        ),
        [{"a/1": 10, "a/3": 3, "a/log": [1, 2, 3]}],
    ),
    "two commits": Operation(
        two_commits, [{**BEFORE, "a/1": 10}, {**BEFORE, "a/1": 10, "a/log": [1, 2]}]
    ),
    "quarantine": Operation(
        lambda store: store.quarantine("notes", ("a", "1"), "no good"),
        [{"a/2": 2, "a/log": [1]}],
    ),
}

STORES = [FileStateStore, JournaledStateStore]


@pytest.fixture(scope="module", params=STORES, ids=["file", "journaled"])
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Path]:
    """A directory with two documents and a log, to be copied for each attempt."""
    root = tmp_path_factory.mktemp("prepared") / "state"
    kind: Store = request.param

    async def prepare() -> None:
        store = kind(root)
        await store.open()
        await store.commit([put("1", 1), put("2", 2), append(1)])
        await store.close()

    asyncio.run(prepare())
    return kind, root


def descriptors() -> set[str]:
    folder = Path("/proc/self/fd")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob(".tmp-*"))


async def attempt(store: StateStore, operation: Operation) -> BaseException | None:
    """Open, do it, and close; what went wrong while doing it."""
    wrong: BaseException | None = None
    try:
        await store.open()
    except (AgentStateError, Crash) as error:
        return error
    try:
        await operation.run(store)
    except (AgentStateError, Crash) as error:
        wrong = error
    try:
        await store.close()
    except (AgentStateError, Crash) as error:
        wrong = wrong or (error if isinstance(error, Crash) else None)
    return wrong


async def reopened(kind: Store, root: Path) -> Seen:
    store = kind(root)
    await store.open()
    seen = await everything(store)
    # It works again: one more change, one more record.
    await store.commit([put("after", 0), append(99)])
    await store.close()
    return seen


def check(operation: Operation, wrong: BaseException | None, seen: Seen, fault: Fault) -> None:
    if wrong is None:
        assert seen == operation.states[-1], fault
    else:
        assert seen in [BEFORE, *operation.states], (fault, wrong)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("action", ["crash before", "crash torn"])
def test_a_crash_at_any_call_loses_nothing_acknowledged(
    prepared: tuple[Store, Path], tmp_path: Path, name: str, action: Any
) -> None:
    kind, origin = prepared
    operation = OPERATIONS[name]
    before, n = descriptors(), 0
    call = "write" if action == "crash torn" else CHANGING
    while True:
        n += 1
        root = tmp_path / str(n)
        shutil.copytree(origin, root)
        fault = Fault(at=n, call=call, action=action)
        with FaultyDisk(fault) as disk:
            wrong = asyncio.run(attempt(kind(root), operation))
        for path in temporaries(root):
            os.utime(path, (0, 0))  # the shared store spares those that may be a live writer's

        check(operation, wrong, asyncio.run(reopened(kind, root)), fault)

        assert temporaries(root) == [], fault
        shutil.rmtree(root)
        if not disk.fired:
            break
    assert n > 1
    assert descriptors() <= before


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("error", "persistent"),
    [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False)],
    ids=["EIO once", "EIO for good", "ENOSPC once"],
)
def test_a_failure_of_any_call_is_told_and_changes_nothing(
    prepared: tuple[Store, Path], tmp_path: Path, name: str, persistent: bool, error: int
) -> None:
    kind, origin = prepared
    operation = OPERATIONS[name]
    before, n = descriptors(), 0
    while True:
        n += 1
        root = tmp_path / str(n)
        shutil.copytree(origin, root)
        fault = Fault(at=n, call=CHANGING, error=error, persistent=persistent)
        with FaultyDisk(fault) as disk:
            wrong = asyncio.run(attempt(kind(root), operation))
        if not persistent:
            assert kind is JournaledStateStore or temporaries(root) == [], fault
        for path in temporaries(root):
            os.utime(path, (0, 0))

        seen = asyncio.run(reopened(kind, root))

        check(operation, wrong, seen, fault)
        # Nothing changed, unless it is said not to be known, or an earlier commit had gone through.
        if wrong is not None and not isinstance(wrong, DurabilityUnknownError):
            assert seen in [BEFORE, *operation.states[:-1]], (fault, wrong)
        assert temporaries(root) == [], fault
        shutil.rmtree(root)
        if not disk.fired:
            break
    assert n > 1
    assert descriptors() <= before


@pytest.mark.parametrize("name", ["group", "two commits", "quarantine"])
def test_a_failure_to_look_is_told_too(
    prepared: tuple[Store, Path], tmp_path: Path, name: str
) -> None:
    kind, origin = prepared
    operation = OPERATIONS[name]
    n = 0
    while True:
        n += 1
        root = tmp_path / str(n)
        shutil.copytree(origin, root)
        fault = Fault(at=n, call=frozenset(CALLS) - CHANGING - {"close"})
        with FaultyDisk(fault) as disk:
            wrong = asyncio.run(attempt(kind(root), operation))

        check(operation, wrong, asyncio.run(reopened(kind, root)), fault)
        shutil.rmtree(root)
        if not disk.fired:
            break


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_short_write_at_any_call_is_continued(
    prepared: tuple[Store, Path], tmp_path: Path, name: str
) -> None:
    kind, origin = prepared
    root = tmp_path / "state"
    shutil.copytree(origin, root)
    with FaultyDisk(Fault(at=1, call="write", action="short", persistent=True)):
        assert asyncio.run(attempt(kind(root), OPERATIONS[name])) is None

    assert asyncio.run(reopened(kind, root)) == OPERATIONS[name].states[-1]


@pytest.mark.parametrize("kind", STORES)
def test_the_first_opening_of_a_directory_may_be_cut_anywhere(kind: Store, tmp_path: Path) -> None:
    n = 0
    while True:
        n += 1
        root = tmp_path / str(n) / "deeper"
        with FaultyDisk(Fault(at=n, call=CHANGING, action="crash before")) as disk:
            asyncio.run(attempt(kind(root), Operation(lambda store: store.commit([put("1", 1)]))))

        seen = asyncio.run(reopened(kind, root))

        assert seen in ({}, {"a/1": 1})
        if not disk.fired:
            assert seen == {"a/1": 1}
            break
