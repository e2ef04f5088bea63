"""The earlier version of a large document is kept compressed, and brought back as any other."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from agent_state import StateCorruptedError, StatePersistenceManager
from agent_state.storage import fileio, syscalls
from tests.storage.test_leftovers import snapshots

LARGE = "a line that is like the other ones\n" * 4000


async def saved_twice(root: Path, *, exclusive: bool, text: str) -> bytes:
    """The bytes of the first version in its file."""
    async with StatePersistenceManager(root, exclusive=exclusive) as manager:
        await manager.save("notes", "a", {"text": text, "n": 1})
        await manager.flush()
        first = (root / "notes/a.json").read_bytes()
        await manager.save("notes", "a", {"text": text, "n": 2})
    return first


@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
@pytest.mark.parametrize("text", [LARGE, "short", os.urandom(60_000).hex()])
async def test_a_damaged_document_is_brought_back(
    tmp_path: Path, exclusive: bool, text: str
) -> None:
    first = await saved_twice(tmp_path, exclusive=exclusive, text=text)
    kept, file = tmp_path / ".snapshots/notes/a.json", tmp_path / "notes/a.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    if text == "short":
        assert kept.read_bytes() == first
    else:
        assert gzip.decompress(kept.read_bytes()) == first
        assert kept.stat().st_size < len(first) / (10 if text == LARGE else 1.5)
    file.write_bytes(b"{")

    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        found = await manager.load("notes", "a")
        assert found is not None
        assert (found.model_dump()["n"], found.model_dump()["text"]) == (1, text)
        await manager.delete("notes", "a")
    assert snapshots(tmp_path) == set()


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x1f\x8b",
        gzip.compress(b"{}")[:-4],
        gzip.compress(b"{"),
        gzip.compress(b"{}") + b"more",
        gzip.compress(b" " * (fileio.MAX_BYTES + 1)),
    ],
    ids=["nothing", "cut off", "no document", "more behind it", "too large"],
)
async def test_a_damaged_compressed_version_is_none(tmp_path: Path, damaged: bytes) -> None:
    await saved_twice(tmp_path, exclusive=False, text=LARGE)
    (tmp_path / ".snapshots/notes/a.json").write_bytes(damaged)
    (tmp_path / "notes/a.json").write_bytes(b"{")

    async with StatePersistenceManager(tmp_path) as manager:
        with pytest.raises(StateCorruptedError):
            await manager.load("notes", "a")
        assert await manager.load("notes", "a") is None
        [incident] = manager.incidents()
        assert incident.kept is not None


async def test_a_full_disk_keeps_the_earlier_version_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link needs no room."""

    def full(fd: int, data: bytes) -> int:
        if data[:2] == b"\x1f\x8b":
            raise OSError(28, "No space left on device")
        return os.write(fd, data)

    monkeypatch.setattr(syscalls, "write", full)
    first = await saved_twice(tmp_path, exclusive=False, text=LARGE)
    assert (tmp_path / ".snapshots/notes/a.json").read_bytes() == first
    assert not list(tmp_path.rglob(".tmp-*"))
