"""A store with a mirror, while a damaged document is restored."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path

import pytest

from agent_state import RevisionConflictError, StatePersistenceManager
from agent_state.protocols import Change, DocumentCodec, Key, MirrorStatus, Origin, Put, StateStore
from tests.deadlines import soon


class SlowMirror:
    """Holds one document, and gives it when ``allowed`` is set."""

    def __init__(self) -> None:
        self.asked, self.allowed = asyncio.Event(), asyncio.Event()
        self.body = b'{"n":1}'

    async def open(self, store: StateStore, origin: Origin, codec: DocumentCodec) -> None:
        pass

    async def close(self) -> None:
        pass

    def changed(self, changes: Sequence[Change]) -> None:
        pass

    def erased(self, kind: str, key: Key) -> None:
        pass

    async def restore_document(self, kind: str, key: Key) -> Put | None:
        self.asked.set()
        await self.allowed.wait()
        return Put(kind, key, self.body, "notes/1", 0)

    async def restore_all(self, state_dir: str, codec: DocumentCodec) -> int:
        return 0

    def status(self) -> MirrorStatus:
        return MirrorStatus("following", "")


@pytest.fixture
def mirror() -> SlowMirror:
    return SlowMirror()


@pytest.fixture(params=["shared", "exclusive"])
async def manager(
    request: pytest.FixtureRequest, tmp_path: Path, mirror: SlowMirror
) -> AsyncIterator[StatePersistenceManager]:
    """A manager whose one note is damaged, and has no earlier version here."""
    async with StatePersistenceManager(tmp_path, mirror=mirror, mirror_restores=True) as before:
        await before.save("notes", "one", {"n": 1})
    damaged = tmp_path / "notes" / "one.json"
    damaged.write_text("{ damaged")
    os.utime(damaged, (1_000_000_000, 1_000_000_000))  # a fresh one may be half written
    async with StatePersistenceManager(
        tmp_path, exclusive=request.param == "exclusive", mirror=mirror, mirror_restores=True
    ) as manager:
        yield manager


async def load(manager: StatePersistenceManager) -> list[Key]:
    return [] if await manager.load("notes", "one") is None else [("one",)]


async def scan(manager: StatePersistenceManager) -> list[Key]:
    return [loaded.key async for loaded in manager.scan("notes")]


async def keys(manager: StatePersistenceManager) -> list[Key]:
    return await manager.keys("notes")


async def scan_below_another_key(manager: StatePersistenceManager) -> list[Key]:
    return [loaded.key async for loaded in manager.scan("notes", "elsewhere")] or [("one",)]


Read = Callable[[StatePersistenceManager], Coroutine[None, None, list[Key]]]


@pytest.mark.parametrize("second", [load, scan, keys, scan_below_another_key])
@pytest.mark.parametrize("first", [load, scan])
async def test_a_second_reader_finds_a_damaged_document_while_it_is_restored(
    manager: StatePersistenceManager, mirror: SlowMirror, first: Read, second: Read
) -> None:
    one = asyncio.create_task(first(manager))
    await soon(mirror.asked.wait())
    other = asyncio.create_task(second(manager))
    await asyncio.wait([other], timeout=0.1)  # time enough to find nothing
    mirror.allowed.set()

    assert await soon(one) == await soon(other) == [("one",)]
    loaded = await manager.load("notes", "one")
    assert loaded is not None
    assert loaded.model_dump() == {"n": 1}


async def test_readers_that_meet_a_damaged_document_at_once_all_find_it(
    manager: StatePersistenceManager, mirror: SlowMirror
) -> None:
    mirror.allowed.set()

    reads = scan(manager), load(manager), keys(manager), scan(manager)
    for found in await soon(asyncio.gather(*reads)):
        assert found == [("one",)]


async def test_a_document_that_a_save_found_damaged_is_not_restored_after_its_deletion(
    manager: StatePersistenceManager, mirror: SlowMirror
) -> None:
    mirror.allowed.set()
    await manager.save("notes", "one", {"n": 2})
    await manager.delete("notes", "one")

    assert await load(manager) == await scan(manager) == await keys(manager) == []


async def test_a_document_that_a_refused_save_found_damaged_is_restored(
    manager: StatePersistenceManager, mirror: SlowMirror
) -> None:
    mirror.allowed.set()
    with pytest.raises(RevisionConflictError):
        await manager.save("notes", "one", {"n": 2}, expected=7)

    assert await load(manager) == await scan(manager) == await keys(manager) == [("one",)]


@pytest.mark.parametrize("manager", ["exclusive"], indirect=True)
async def test_an_edit_of_a_document_that_is_being_deleted_does_not_restore_it(
    manager: StatePersistenceManager, mirror: SlowMirror, tmp_path: Path
) -> None:
    mirror.allowed.set()
    await load(manager)
    await manager.flush()
    mirror.body = b'{"n":2}'  # it lags
    await manager.delete("notes", "one")
    path = tmp_path / "notes" / "one.json"
    path.write_text(path.read_text().replace('"n": 1', '"n": 3'))
    await manager.flush()

    assert len(manager.incidents()) == 3  # the damage, what was restored, the edit
    assert await load(manager) == await scan(manager) == await keys(manager) == []
