"""Another program waits for the files: the owner hears of it, and does not let it wait long."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.storage import barrier, checkpoint
from tests.deadlines import soon


@pytest.fixture
def _waiting_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a large document the owner would write back an hour later."""
    monkeypatch.setattr(checkpoint, "_LARGE_BYTES_PER_SECOND", 1)
    monkeypatch.setattr(checkpoint, "_LARGE_SECONDS_MAX", 3600.0)


LARGE = {"text": "x" * 100_000}


def held(root: Path) -> dict[str, int]:
    with barrier.hold(str(root)):
        return {path.stem: json.loads(path.read_text())["n"] for path in root.glob("notes/*.json")}


async def saved(manager: StatePersistenceManager, root: Path) -> None:
    await manager.save("notes", "a", {"n": 1, **LARGE})
    while not (root / "notes" / "a.json").exists():
        await asyncio.sleep(0.01)
    await manager.save("notes", "a", {"n": 2, **LARGE})
    await manager.save("notes", "b", {"n": 2})


@pytest.mark.usefixtures("_waiting_long")
async def test_who_waits_for_the_files_makes_the_owner_write_them(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await saved(manager, tmp_path)
        assert await soon(asyncio.to_thread(held, tmp_path)) == {"a": 2, "b": 2}
        await manager.save("notes", "b", {"n": 3})  # a second time as well
        assert await soon(asyncio.to_thread(held, tmp_path)) == {"a": 2, "b": 3}


@pytest.mark.usefixtures("_waiting_long")
@pytest.mark.parametrize("off", [-3600, 3600])
async def test_a_request_of_another_time_is_none(tmp_path: Path, off: int) -> None:
    """Left by a program that died, or by a clock that was wrong."""
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await saved(manager, tmp_path)
        wanted = tmp_path / ".locks" / "wanted"
        wanted.touch()
        os.utime(wanted, (time.time() + off,) * 2)
        share = barrier.Share(str(tmp_path / ".locks"))
        assert not share.is_wanted()
        os.utime(wanted)
        assert share.is_wanted()


async def test_a_request_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 300)
    assert not barrier.Share(str(folder)).is_wanted()


async def test_nothing_is_asked_of_an_owner_without_changes(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await manager.save("notes", "a", {"n": 1})
        await manager.flush()
        assert barrier.request(str(tmp_path)) == 0
        assert not (tmp_path / ".locks" / "wanted").exists()
