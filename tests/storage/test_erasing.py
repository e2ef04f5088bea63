"""Erasing on the disk: no file anywhere below the state directory says it any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state import FileStateStore, StatePersistenceManager, StorageError
from agent_state.storage import document_files

SECRET = "she said it in confidence"
exclusively = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])


def saying(root: Path) -> list[str]:
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if SECRET in path.name or (path.is_file() and SECRET.encode() in path.read_bytes())
    ]


@exclusively
async def test_no_earlier_version_and_nothing_put_aside_is_left(
    exclusive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_files, "SNAPSHOT_SECONDS", 0)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        for number in range(3):
            await manager.save("notes", "a", {"text": SECRET, "n": number})
            await manager.save("notes", ("a", SECRET), {"text": SECRET, "n": number})
            await manager.append("notes", ("a", "log"), {"text": SECRET})
            await manager.flush()
        await manager.store.quarantine("notes", ("a",), "for the test")
        with (tmp_path / "notes" / "a" / "log.jsonl").open("ab") as log:
            log.write(SECRET.encode())
        await manager.append("notes", ("a", "log"), {"text": SECRET})
        await manager.flush()
        assert {path.split("/")[0] for path in saying(tmp_path)} == {
            *("notes", ".quarantine", ".snapshots")
        }

        await manager.erase("notes", "a")

        assert saying(tmp_path) == []
        assert not [path for path in tmp_path.rglob("a*") if "/.locks/" not in str(path)]
    assert saying(tmp_path) == []


@exclusively
async def test_what_is_only_in_the_journal_is_erased_too(exclusive: bool, tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.save("notes", "a", {"text": SECRET})
        await manager.append("notes", "a", {"text": SECRET})
        await manager.erase("notes", "a")
        assert saying(tmp_path) == []


async def test_another_process_finds_nothing_either(tmp_path: Path) -> None:
    """Two stores, as two processes have: one knows the log, the other one erases it."""
    one, other = StatePersistenceManager(tmp_path), StatePersistenceManager(tmp_path)
    async with one, other:
        assert await one.append("notes", "a", {"n": 1}, dedupe_key="x") == 1
        await one.save("notes", "a", {"n": 1})
        await other.erase("notes", "a")
        assert await one.load("notes", "a") is None
        assert await one.append("notes", "a", {"n": 1}, dedupe_key="x") == 1
        assert [entry.seq async for entry in one.read_log("notes", "a")] == [1]


@exclusively
async def test_a_symlink_is_removed_and_what_it_points_to_is_not(
    exclusive: bool, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("not ours")
    root = tmp_path / "state"
    async with StatePersistenceManager(root, exclusive=exclusive) as manager:
        await manager.save("notes", ("a", "b"), {"n": 1})
        await manager.flush()
        (root / "notes" / "a" / "link").symlink_to(outside)
        await manager.erase("notes", "a")
        (root / "notes" / "a").symlink_to(outside)
        with pytest.raises(StorageError, match="symlink"):
            await manager.erase("notes", ("a", "b"))
    assert (outside / "precious").read_text() == "not ours"


async def test_strangers_below_an_erased_key_go_with_it(tmp_path: Path) -> None:
    """A file that no key has, a temporary: whoever erases a person's folder means all of it."""
    store = FileStateStore(tmp_path)
    await store.open()
    folder = tmp_path / "notes" / "a" / "deep"
    folder.mkdir(parents=True)
    (folder / ".tmp-left").write_text(SECRET)
    (folder / "export.md").write_text(SECRET)
    assert await store.erase("notes", ("a",)) == 0
    assert not (tmp_path / "notes" / "a").exists()
    await store.close()
