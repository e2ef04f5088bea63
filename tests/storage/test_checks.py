"""A check in a commit: what it costs, who hears of it, and what a crash leaves of its group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from agent_state import (
    FileStateStore,
    MemoryStateStore,
    RevisionConflictError,
    StatePersistenceManager,
    WALStateStore,
)
from agent_state.protocols import Change, Check, Put
from agent_state.storage import group_writer
from agent_state.storage.mirrored_store import MirroredStateStore
from agent_state.testing import Crash, Fault, FaultyDisk
from agent_state.testing.contract_base import check, content_of, put
from tests.storage.test_mirrored_store import SlowMirror


class _Listener:
    """An observer, or the part of a mirror that hears of changes."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.numbers: list[int] = []

    def committed(self, changes: Sequence[Change], numbers: Sequence[int]) -> None:
        self.changes += changes
        self.numbers += numbers


async def test_an_observer_hears_of_the_changes_and_not_of_the_checks() -> None:
    observer = _Listener()
    async with StatePersistenceManager(store=MemoryStateStore(), observer=observer) as manager:
        group = manager.new_group()
        group.check("notes", "owner", 0)
        group.save("notes", "a", {"n": 1})
        assert await manager.commit(group, guard=Check("notes", ("b",), 0)) == [0, 1]

        assert [change.key for change in observer.changes] == [("a",)]
        assert observer.numbers == [1]
        with pytest.raises(RevisionConflictError):
            await manager.commit(group, guard=Check("notes", ("b",), 1))


async def test_a_mirror_hears_of_the_changes_and_not_of_the_checks() -> None:
    heard: list[Change] = []

    class Mirror(SlowMirror):
        def changed(self, changes: Sequence[Change]) -> None:
            heard.extend(changes)

    manager = StatePersistenceManager(store=MemoryStateStore(), mirror=Mirror())
    async with manager:
        assert isinstance(manager.store, MirroredStateStore)
        await manager.store.commit([put("a", {"n": 1}), check("b", 0)])

    assert [(type(change), change.key) for change in heard if change.kind == "notes"] == [
        (Put, ("a",))
    ]


@pytest.mark.parametrize("store_type", [WALStateStore, FileStateStore])
async def test_a_check_costs_no_fsync(
    tmp_path: Path, store_type: type[FileStateStore | WALStateStore]
) -> None:
    async def synced(name: str, *checks: Check) -> list[str]:
        store = store_type(tmp_path / name)
        await store.open()
        await store.commit([put("owner", {"n": 1})])
        await store.commit([put("a", {"n": 1})])
        await store.flush()
        await store.close()
        store = store_type(tmp_path / name)  # it has not read the owner
        await store.open()
        try:
            with FaultyDisk() as disk:
                await store.commit([put("a", {"n": 2}), *checks])
                return [call for call, _ in disk.calls if "sync" in call]
        finally:
            await store.close()

    assert await synced("with", check("owner", 1)) == await synced("without")


async def test_who_changes_what_a_dead_writer_had_checked_completes_its_group_first(
    tmp_path: Path,
) -> None:
    """The heir of an owner finds all that the owner has made, and nothing comes after."""
    owner, heir = FileStateStore(tmp_path), FileStateStore(tmp_path)
    await owner.open()
    await owner.commit([put("owner", {"of": "first"})])
    await heir.open()
    with FaultyDisk(Fault(at=2, call="rename", action="crash before")), pytest.raises(Crash):
        await owner.commit([put("a", {"n": 1}), put("b", {"n": 1}), check("owner", 1)])
    assert await heir.keys("notes") == [("owner",)]

    assert await heir.commit([put("owner", {"of": "second"}, expected=1)]) == [2]

    assert await heir.keys("notes") == [("a",), ("b",), ("owner",)]
    assert group_writer.record_paths(heir._directory) == []
    with pytest.raises(RevisionConflictError):
        await owner.commit([put("a", {"n": 2}), check("owner", 1)])
    assert await content_of(heir, "a") == {"n": 1}
    for store in (owner, heir):
        await store.close()
