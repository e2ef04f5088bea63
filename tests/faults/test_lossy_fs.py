"""A file system that forgets whatever was not synced, that lies, fills up, folds names, or is slow.

It is a real one, mounted by FUSE, and keeps the strictest reading of what is promised: a cut at
any moment loses everything, or only data, or some of it in any order, but what was synced.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_state.errors import AgentStateError, StorageError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Append, Put
from agent_state.testing import Fault
from agent_state.testing.faults import CHANGING
from tests.faults.attempts import (
    Scene,
    alike,
    attempt,
    attempt_and_die,
    attempt_with,
    cases,
    cases_with_encryption,
    judge,
    scene_name,
    scene_of,
)
from tests.faults.ledger import STORES, Held, Ledger, put_aside
from tests.faults.lossymount import WAYS, Lossy, mounted
from tests.faults.mounting import seen
from tests.faults.operations import OPERATIONS
from tests.faults.tally import Tally

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
ROW = ("T4", "a file system that forgets what was not synced (FUSE)")


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory, scenes: dict[str, Scene]) -> Iterator[Lossy]:
    with mounted(tmp_path_factory.mktemp("lossy") / "mount") as lossy:
        for name, scene in scenes.items():
            lossy.template(name, scene.origin)
        yield lossy


@pytest.fixture
def lossy(mount: Lossy) -> Iterator[Lossy]:
    """The file system, honest at the beginning of each test."""
    mount.heal()
    yield mount
    mount.heal()


# -- the power is cut --------------------------------------------------------------------------


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize(("kind", "name"), cases_with_encryption())
def test_a_cut_at_any_call_loses_nothing_acknowledged(
    kind: str, name: str, lossy: Lossy, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    scene, ledger, told = (
        scene_of(scenes, kind, OPERATIONS[name].scene),
        tmp_path / "ledger",
        tmp_path / "told",
    )
    number, fired = 1, True
    while fired:
        root = lossy.tree(scene_name(kind, OPERATIONS[name].scene))
        left: list[Path] = []

        def cut(root: Path = root, left: list[Path] = left, number: int = number) -> None:
            # Another thread may be in a call, and its caller be told after the end.
            told.write_bytes(ledger.read_bytes() if ledger.exists() else b"")
            left.extend(lossy.cut(root, how, number) for how in ways(number))

        fault = Fault(number, CHANGING, "crash before")
        if OPERATIONS[name].runtime:  # whose tasks would wait for a call that never ends
            fired = attempt_and_die(kind, name, root, ledger, fault)
        else:
            fired = attempt_with(kind, name, root, ledger, fault, at_crash=cut)[1].fired
        if not left:
            cut()
        for how, tree in zip(ways(number), left, strict=True):
            judge(kind, name, tree, told, scene, tally, f"{fault}, {how} lost")
            tally.points += 1
        lossy.remove(root, *left)
        ledger.unlink(missing_ok=True)
        tally.faults += fired
        number += 30 if OPERATIONS[name].runtime else 8


def ways(number: int) -> tuple[str, str]:
    """Everything is lost at each chosen call, and by turns only data and some of everything."""
    return WAYS[0], WAYS[1 + number % 2]


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize(("kind", "name"), cases_with_encryption())
def test_what_a_recovery_brought_back_survives_a_cut(
    kind: str, name: str, lossy: Lossy, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    """The process is killed, the next one recovers and closes, and only then the power is cut."""
    scene, ledger = scene_of(scenes, kind, OPERATIONS[name].scene), tmp_path / "ledger"
    number, fired = 1, True
    while fired:
        root = lossy.tree(scene_name(kind, OPERATIONS[name].scene))
        fault = Fault(number, CHANGING, "crash before")
        if OPERATIONS[name].runtime:
            fired = attempt_and_die(kind, name, root, ledger, fault)
        else:
            fired = attempt_with(kind, name, root, ledger, fault)[1].fired
        about = f"{fault}, recovered, and cut"
        next_kind = kind if number % 4 < 2 else other(kind)
        judge(next_kind, name, root, ledger, scene, Tally(), about)
        tree = lossy.cut(root, "all" if number % 3 else "some", number)
        found = without_the_last(asyncio.run(seen(kind, tree)), about)
        Ledger(ledger).judge(scene.before, found, tally, f"{kind}: {name}: {about}")
        lossy.remove(root, tree)
        ledger.unlink(missing_ok=True)
        tally.points += 1
        tally.faults += fired
        number += 40 if OPERATIONS[name].runtime else 12


def other(kind: str) -> str:
    return next(one for one in alike(kind) if one != kind)


def without_the_last(found: Held, about: str) -> Held:
    """Without what ``judge`` has saved to show that the directory works; it must be there."""
    place = ("notes", ("after",))
    documents, logs = dict(found.documents), dict(found.logs)
    assert documents.pop(place, None) is not None, f"{about}: the last change is lost"
    assert logs.pop(place, None) is not None, f"{about}: the last record is lost"
    return Held(documents, logs, found.unreadable)


# -- it lies ---------------------------------------------------------------------------------


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize(("kind", "name"), cases())
def test_after_a_failed_sync_a_later_yes_is_not_believed(
    kind: str, name: str, lossy: Lossy, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    """The n-th sync fails and the kernel drops what it was to write; from then on it says yes."""
    scene, ledger = scenes[OPERATIONS[name].scene], tmp_path / "ledger"
    number, failed = 0, True
    while failed:
        number += 12 if OPERATIONS[name].runtime else 3
        root = lossy.tree(OPERATIONS[name].scene)
        lossy.counts()
        lossy.set(lies="once", fail_call="fsync", fail_at=number)
        wrong = attempt(kind, name, root, ledger)
        failed = bool(lossy.counts().get("failed"))
        lossy.heal()
        assert wrong is None or failed
        assert not isinstance(wrong, TimeoutError)
        tree = lossy.cut(root, "all")
        judge(kind, name, tree, ledger, scene, tally, f"sync {number} failed: {wrong!r}")
        lossy.remove(root, tree)
        ledger.unlink(missing_ok=True)
        tally.points += 1
        tally.faults += failed


PLAIN = [name for name, operation in OPERATIONS.items() if not operation.runtime]


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("name", PLAIN)
def test_what_is_acknowledged_when_it_is_tried_again_is_there_after_a_cut(
    kind: str, name: str, lossy: Lossy, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    """A sync fails as above, the caller does the same once more, and the power is cut."""
    scene, ledger = scenes[OPERATIONS[name].scene], tmp_path / "ledger"
    number, failed = 0, True
    while failed:
        number += 12 if OPERATIONS[name].runtime else 3
        root = lossy.tree(OPERATIONS[name].scene)
        lossy.counts()
        tree = asyncio.run(twice(kind, name, lossy, root, ledger, number))
        failed = bool(lossy.counts().get("failed"))
        lossy.heal()
        judge(kind, name, tree, ledger, scene, tally, f"sync {number} failed, tried again")
        lossy.remove(root, tree)
        ledger.unlink(missing_ok=True)
        tally.points += 1
        tally.faults += failed


async def twice(kind: str, name: str, lossy: Lossy, root: Path, ledger: Path, number: int) -> Path:
    """Do it with a sync that fails, do it again, and cut while the store is open."""
    store = STORES[kind](root)
    async with StatePersistenceManager(store=store) as manager:
        with ledger.open("ab", buffering=0) as file:
            store.ledger = file.fileno()
            lossy.set(lies="once", fail_call="fsync", fail_at=number)
            for _ in range(2):
                try:
                    await OPERATIONS[name].run(manager)
                except StorageError:
                    continue
                except AgentStateError:
                    break  # done the first time, so that it does not fit the second time
            tree = lossy.cut(root, "all")
            store.ledger = -1
        lossy.set(fail_at=0)
    return tree


@pytest.mark.proof("T4", "a disk that never syncs: not promised, but nothing but typed errors")
@pytest.mark.parametrize(("kind", "name"), cases())
def test_a_disk_that_never_syncs_leaves_a_directory_that_opens_or_says_why_not(
    kind: str, name: str, lossy: Lossy, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    lossy.set(lies="always")
    for seed, how in enumerate(WAYS):
        root = lossy.tree(OPERATIONS[name].scene)
        assert attempt(kind, name, root, tmp_path / "ledger") is None
        tree = lossy.cut(root, how, seed)
        with contextlib.suppress(AgentStateError):
            asyncio.run(seen(kind, tree))
        lossy.remove(root, tree)
        tally.points += 1


# -- it fills up, writes little at a time, has no links, is slow -------------------------------


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize(("kind", "name"), cases())
def test_a_disk_that_fills_up_is_told_and_loses_nothing(
    kind: str, name: str, lossy: Lossy, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    scene, ledger = scenes[OPERATIONS[name].scene], tmp_path / "ledger"
    room, failed = 0, True
    while failed:
        root = lossy.tree(OPERATIONS[name].scene)
        lossy.counts()
        lossy.set(room=room)
        wrong = attempt(kind, name, root, ledger)
        failed = bool(lossy.counts().get("failed"))
        lossy.heal()
        about = f"room for {room}: {wrong!r}"
        assert wrong is None or failed, about
        assert not isinstance(wrong, TimeoutError), about
        tree = lossy.cut(root, "all")
        judge(kind, name, tree, ledger, scene, tally, about)
        lossy.remove(root, tree)
        ledger.unlink(missing_ok=True)
        tally.points += 1
        tally.faults += failed
        room = 1 + room * (6 if OPERATIONS[name].runtime else 2)


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize(("kind", "name"), cases())
def test_short_writes_and_missing_links_hinder_nothing(
    kind: str, name: str, lossy: Lossy, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    scene, ledger = scenes[OPERATIONS[name].scene], tmp_path / "ledger"
    lossy.set(short=100, links=False)
    root = lossy.tree(OPERATIONS[name].scene)

    assert attempt(kind, name, root, ledger) is None

    tree = lossy.cut(root, "all")
    judge(kind, name, tree, ledger, scene, tally, "short writes, no links")
    assert name == "quarantine" or put_aside(tree) == []
    lossy.remove(root, tree)
    tally.points += 1


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", STORES)
async def test_while_a_sync_takes_300_ms_the_loop_goes_on(
    kind: str, lossy: Lossy, tally: Tally
) -> None:
    store = STORES[kind](lossy.tree("nothing"))
    await store.open()
    lossy.set(slow=0.3)
    longest, running = 0.0, True

    async def tick() -> None:
        nonlocal longest
        while running:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)

    ticking = asyncio.create_task(tick())
    began = time.monotonic()
    await store.commit([Put("notes", ("slow",), b"{}", "notes/1")])
    await store.commit([Append("notes", ("slow",), b"{}")])
    took = time.monotonic() - began
    running = False
    await ticking
    lossy.heal()
    await store.close()
    assert took >= 0.6, "the syncs were not slow"
    assert longest < 0.25, "the loop stood still"
    tally.points += 1


@pytest.mark.proof(*ROW)
async def test_many_files_at_once_are_durable_after_a_flush(lossy: Lossy, tally: Tally) -> None:
    """Many files are synced by one call for the whole file system, where that can be relied on."""
    root = lossy.tree("nothing")
    store = STORES["exclusive"](root)
    await store.open()
    places = [(f"{number}",) for number in range(300)]
    await store.commit([Put("notes", key, b"{}", "notes/1") for key in places])
    await store.flush()
    tree = lossy.cut(root, "all")
    await store.close()
    found = await seen("exclusive", tree)
    lost = len(places) - len(found.documents)
    tally.add(Tally(points=1, acknowledged=len(places), lost=lost))
    assert lost == 0


# -- it folds names ----------------------------------------------------------------------------

IDS = [
    *("Alice", "alice", "ALICE", "caf\u00e9", "cafe\u0301", "CAF\u00c9"),
    *("stra\u00dfe", "strasse", "\u0130", "i"),
]


@pytest.mark.proof("T18", "ids on a file system that folds case and normal forms (FUSE)")
@pytest.mark.parametrize("kind", STORES)
async def test_ids_that_a_folding_file_system_would_confuse_stay_distinct(
    kind: str, tmp_path: Path, tally: Tally
) -> None:
    with mounted(tmp_path / "folding", folds=True) as lossy:
        (lossy.root / "Name").mkdir()
        assert (lossy.root / "nAME").is_dir(), "it does not fold"
        root = lossy.tree("nothing")
        store = STORES[kind](root)
        await store.open()
        keys = [*((one,) for one in IDS), *((one, "below") for one in IDS)]
        for number, key in enumerate(keys):
            body = b'{"n":%d}' % number
            await store.commit([Put("notes", key, body, "notes/1"), Append("notes", key, body)])
        await store.close()

        found = await seen(kind, lossy.cut(root, "all"))

    tally.add(Tally(points=len(keys), acknowledged=2 * len(keys)))
    for number, key in enumerate(keys):
        assert found.documents["notes", key].body == f'{{"n":{number}}}'
        assert [body for body, _ in found.logs["notes", key]] == [f'{{"n":{number}}}']
    assert len(found.documents) == len(keys)
    assert not found.unreadable
