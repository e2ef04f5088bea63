"""Changes that somebody else makes are told: another process, a person, a new folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_state import FileStateStore, StorageError, WALStateStore
from agent_state.protocols import Notice, NoticeStream
from agent_state.storage import watch
from agent_state.testing import Fault, FaultyDisk
from agent_state.testing.contract_base import put

SAVE = """
import asyncio, sys
from agent_state import FileStateStore
from agent_state.testing.contract_base import put

async def main():
    store = FileStateStore(sys.argv[1])
    await store.open()
    await store.commit([put("theirs", {"n": 1})])
    await store.close()

asyncio.run(main())
"""


@pytest.fixture(params=[FileStateStore, WALStateStore])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FileStateStore]:
    monkeypatch.setattr(watch, "RESCAN_SECONDS", 0.5)  # the bound within which all is found
    store: FileStateStore = request.param(tmp_path)
    await store.open()
    await store.commit([put("a", {"n": 1}), put(("deep", "b"), {"n": 1})])
    await store.flush()
    yield store
    await store.close()


async def told(notices: NoticeStream, *key: str) -> Notice:
    async with asyncio.timeout(60):
        async for notice in notices:
            if notice.key == key:
                return notice
    raise AssertionError("the watch ended")


def write(path: Path, text: str = '{"n": 7}') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(".fresh")
    fresh.write_text(text)
    fresh.replace(path)


async def test_a_hand_edit_is_told(store: FileStateStore, tmp_path: Path) -> None:
    notices = await store.watch()
    write(tmp_path / "notes" / "a.json")

    assert await told(notices, "a") == Notice("notes", ("a",), 0, outside=True)


async def test_a_file_dropped_in_and_one_removed_are_told(
    store: FileStateStore, tmp_path: Path
) -> None:
    notices = await store.watch()
    write(tmp_path / "notes" / "new.json")
    assert (await told(notices, "new")).outside

    (tmp_path / "notes" / "a.json").unlink()
    assert await told(notices, "a") == Notice("notes", ("a",), None, outside=True)


async def test_a_file_in_new_nested_folders_is_told(store: FileStateStore, tmp_path: Path) -> None:
    notices = await store.watch()
    for number in range(5):
        write(tmp_path / "mail" / f"to{number}" / "deeper" / "m.json")

    for number in range(5):
        assert (await told(notices, f"to{number}", "deeper", "m")).outside


@pytest.mark.parametrize("ident", ["node_modules", ".git", ".venv", "x~", "Alice", "é", "a b"])
async def test_an_id_that_watchers_like_to_hide_is_told(store: FileStateStore, ident: str) -> None:
    notices = await store.watch()
    path = store._directory.tree.path("notes", (ident, ident))
    write(Path(path))

    assert (await told(notices, ident, ident)).outside


async def test_events_hide_no_id(store: FileStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.commit([put(("node_modules", "a"), {"n": 1})])
    await store.flush()
    monkeypatch.setattr(watch, "RESCAN_SECONDS", 3600.0)
    notices = await store.watch()

    for number in range(3):  # the first may be found by the look when events begin
        write(Path(store.root) / "notes" / "node_modules" / "a.json", f'{{"n": {number}}}')

        assert (await told(notices, "node_modules", "a")).outside


async def test_a_long_id_is_told_by_what_its_file_says(store: FileStateStore) -> None:
    ident = "long " * 100
    notices = await store.watch()
    write(Path(store._directory.tree.path("notes", (ident,))), f'{{"_id": "{ident}", "n": 1}}')

    assert (await told(notices, ident)).outside


async def test_what_another_process_saves_is_told(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    await store.open()
    notices = await store.watch()
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", SAVE, str(tmp_path)], check=True
    )
    assert child.returncode == 0

    assert (await told(notices, "theirs")).outside
    await store.close()


async def test_our_own_saves_are_never_told_as_somebody_elses(store: FileStateStore) -> None:
    notices = await store.watch()
    seen: list[Notice] = []

    async def listen() -> None:
        async for notice in notices:
            seen.append(notice)
            if notice.key == ("end",):
                return

    listening = asyncio.create_task(listen())
    for n in range(60):
        await store.commit([put("a", {"n": n}), put(f"{n}", {"n": n})])
        if n % 20 == 0:
            await store.flush()
    write(Path(store._directory.tree.path("notes", ("end",))))
    await listening

    assert [notice for notice in seen if notice.outside and notice.key != ("end",)] == []
    assert {notice.key for notice in seen} >= {(str(n),) for n in range(60)}


async def test_what_git_does_elsewhere_and_temporary_files_are_not_told(
    store: FileStateStore, tmp_path: Path
) -> None:
    notices = await store.watch()
    write(tmp_path / ".git" / "index.json")
    write(tmp_path / "notes" / ".hidden.json")
    (tmp_path / "notes" / "README.md").write_text("mine")
    write(tmp_path / "notes" / "end.json")
    first = await told(notices, "end")

    assert first.key == ("end",)


async def test_a_name_that_is_not_utf8_ends_nothing(store: FileStateStore, tmp_path: Path) -> None:
    notices = await store.watch()
    Path(os.fsdecode(os.fsencode(tmp_path / "notes") + b"/\xff.json")).write_text("{}")
    write(tmp_path / "notes" / "after.json")

    assert (await told(notices, "after")).outside


async def test_a_directory_that_cannot_be_listed_is_an_error_and_no_wait(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    await store.open()
    with FaultyDisk(Fault(at=1, call="scandir")), pytest.raises(StorageError):
        async with asyncio.timeout(60):
            await store.watch()

    notices = await store.watch()
    write(tmp_path / "notes" / "a.json")
    assert (await told(notices, "a")).outside
    await store.close()


async def test_a_store_opened_again_is_watched_again(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    for number in range(2):
        await store.open()
        notices = await store.watch()
        write(tmp_path / "notes" / f"{number}.json")
        assert (await told(notices, str(number))).outside
        await store.close()


def kernel_watches() -> int:
    """How many files and folders the kernel watches for this process."""
    found = 0
    for path in Path("/proc/self/fdinfo").iterdir():
        try:
            found += path.read_text().count("inotify wd:")
        except FileNotFoundError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fdinfo").exists(), reason="counted as Linux counts them")
async def test_our_own_folders_are_not_watched(tmp_path: Path) -> None:
    """The kernel allows so many watches: one for each agent's folder, and no second one."""
    before = kernel_watches()
    store = WALStateStore(tmp_path)
    await store.open()
    for number in range(2):
        await store.commit([put((f"a{each}", "t"), {"n": number}) for each in range(50)])
        await store.flush()
    snapshots = [path for path in (tmp_path / ".snapshots").rglob("*") if path.is_dir()]
    assert len(snapshots) > 50
    notices = await store.watch()
    waiting = asyncio.create_task(told(notices, "a7", "t"))
    async with asyncio.timeout(60):
        while not kernel_watches() - before:
            await asyncio.sleep(0.01)
    [kind] = [each for each in tmp_path.iterdir() if not each.name.startswith(".")]
    write(kind / "a7" / "t.json")
    await waiting
    assert kernel_watches() - before <= 50 + 5
    await store.close()


async def test_a_kind_that_is_new_or_was_made_anew_is_watched(
    store: FileStateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "RESCAN_SECONDS", 3600)  # so that events alone tell
    notices = await store.watch()
    write(tmp_path / "brandnew" / "one.json")
    assert (await told(notices, "one")).outside
    write(tmp_path / "brandnew" / "below" / "two.json")
    assert (await told(notices, "below", "two")).outside
    shutil.rmtree(tmp_path / "brandnew")
    write(tmp_path / "brandnew" / "three.json")
    assert (await told(notices, "three")).outside
    write(tmp_path / "brandnew" / "below" / "four.json")
    assert (await told(notices, "below", "four")).outside
