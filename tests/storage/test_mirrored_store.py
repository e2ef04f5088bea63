"""A store with a mirror, while a damaged document is restored."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from agent_state import StatePersistenceManager
from agent_state.protocols import Change, DocumentCodec, Key, MirrorStatus, Origin, Put, StateStore
from tests.deadlines import soon


class SlowMirror:
    """Holds one document, and gives it when ``allowed`` is set."""

    def __init__(self) -> None:
        self.asked, self.allowed = asyncio.Event(), asyncio.Event()

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
        return Put(kind, key, b'{"n":1}', "notes/1", 0)

    async def restore_all(self, state_dir: str, codec: DocumentCodec) -> int:
        return 0

    def status(self) -> MirrorStatus:
        return MirrorStatus("following", "")


async def test_a_second_reader_waits_while_a_damaged_document_is_restored(tmp_path: Path) -> None:
    mirror = SlowMirror()
    async with StatePersistenceManager(tmp_path, mirror=mirror, mirror_restores=True) as manager:
        await manager.save("notes", "one", {"n": 1})
        await manager.flush()
        (tmp_path / "notes" / "one.json").write_text("{ broken")

        first = asyncio.create_task(manager.load("notes", "one"))
        await soon(mirror.asked.wait())
        second = asyncio.create_task(manager.load("notes", "one"))
        await asyncio.wait([second], timeout=0.1)  # time enough to find nothing
        mirror.allowed.set()

        for loaded in (await soon(first), await soon(second)):
            assert loaded is not None
            assert loaded.model_dump() == {"n": 1}
