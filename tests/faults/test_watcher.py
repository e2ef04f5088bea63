"""Whatever the watcher misses, it is told within the interval of the rescan."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

import pytest

from agent_state import FileStateStore, WALStateStore
from agent_state.protocols import Key, Notice
from agent_state.storage import paths, watch
from agent_state.testing.contract_base import put
from tests.faults.tally import Tally

RESCAN_SECONDS = 0.15
ROW = pytest.mark.proof("T17", "the watcher converges, whatever it misses")
FAR = 20.0
"""Against hanging: what is not told by then is never told."""


class Listener:
    """Everything that was told as somebody else's doing."""

    def __init__(self, store: FileStateStore) -> None:
        self._store = store
        self.told: dict[Key, Notice] = {}
        self.times: dict[Key, int] = {}

    async def __aenter__(self) -> Self:
        self._notices = await self._store.watch()
        self._task = asyncio.create_task(self._listen())
        # Told is what changes from here on, whether the events have begun or not.
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _listen(self) -> None:
        async for notice in self._notices:
            if notice.outside:
                self.told[notice.key] = notice
                self.times[notice.key] = self.times.get(notice.key, 0) + 1

    async def missing(self, keys: Iterable[Key], *, gone: bool = False) -> list[Key]:
        """Those of the keys that are not told in time as there (or gone)."""

        def now() -> list[Key]:
            return [
                key for key in keys if key not in self.told or _is_gone(self.told[key]) is not gone
            ]

        deadline = time.monotonic() + FAR
        while now() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return now()


def _is_gone(notice: Notice) -> bool:
    return notice.revision is None


STORES = [
    pytest.param(FileStateStore, id="shared", marks=pytest.mark.full),
    pytest.param(WALStateStore, id="exclusive"),
]


@pytest.fixture(params=STORES)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FileStateStore]:
    monkeypatch.setattr(watch, "RESCAN_SECONDS", RESCAN_SECONDS)
    store: FileStateStore = request.param(tmp_path / "state")
    await store.open()
    await store.commit([put("a", {"n": 1}), put(("deep", "b"), {"n": 1})])
    await store.flush()
    yield store
    await store.close()


def write(root: Path, key: Key, text: str = '{"n": 7}') -> Key:
    """A file in its place, by rename, as an editor or git does."""
    path = root / paths.relative("notes", key, ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(".fresh")
    fresh.write_text(text)
    fresh.replace(path)
    return key


async def check(tally: Tally, listener: Listener, keys: list[Key], *, gone: bool = False) -> None:
    missing = await listener.missing(keys, gone=gone)
    tally.points += len(keys)
    tally.lost += len(missing)
    assert missing == [], f"{len(missing)} of {len(keys)} were never told"


@ROW
async def test_a_burst_while_the_listener_is_stalled_is_told_whole(
    store: FileStateStore, tally: Tally, full: bool
) -> None:
    root, count = Path(store.root), 20_000 if full else 300
    async with Listener(store) as listener:
        await check(tally, listener, [write(root, ("warm",))])
        done = threading.Event()

        def burst() -> None:
            for number in range(count):
                (root / "notes" / f"f{number}.json").write_text('{"n": 1}')
            done.set()

        writer = threading.Thread(target=burst)
        writer.start()
        while not done.is_set():
            time.sleep(0.05)  # noqa: ASYNC251  # the loop stands still: nobody takes any event
        writer.join()
        tally.faults += 1
        await check(tally, listener, [(f"f{number}",) for number in range(count)])


@ROW
async def test_files_in_folders_made_in_the_same_moment_are_told(
    store: FileStateStore, tally: Tally
) -> None:
    root = Path(store.root)
    async with Listener(store) as listener:
        await check(tally, listener, [write(root, ("warm",))])
        keys = await asyncio.to_thread(
            lambda: [write(root, (f"n{number}", "deeper", "m")) for number in range(200)]
        )
        tally.faults += 200
        await check(tally, listener, keys)


@ROW
async def test_what_no_event_tells_of_is_found_though_events_never_cease(
    store: FileStateStore, tally: Tally, tmp_path: Path
) -> None:
    root, over = Path(store.root), threading.Event()
    elsewhere = tmp_path / "elsewhere.json"
    os.link(root / "notes" / "a.json", elsewhere)  # what is written there has no event here

    def chatter() -> None:
        while not over.wait(0.02):
            (root / "notes" / "busy.json").write_text('{"n": 1}')

    talking = threading.Thread(target=chatter)
    async with Listener(store) as listener:
        await check(tally, listener, [write(root, ("warm",))])
        talking.start()
        try:
            await check(tally, listener, [("busy",)])
            elsewhere.write_text('{"n": 99}')
            tally.faults += 1
            await check(tally, listener, [("a",)])
        finally:
            over.set()
            talking.join()


@ROW
@pytest.mark.parametrize("how", ["removed", "renamed away and back", "emptied"])
async def test_a_root_that_goes_and_comes_back_is_still_watched(
    store: FileStateStore, tally: Tally, tmp_path: Path, how: str
) -> None:
    root, away = Path(store.root), tmp_path / "away"
    async with Listener(store) as listener:
        await check(tally, listener, [write(root, ("warm",))])
        known: list[Key] = [("a",), ("deep", "b"), ("warm",)]
        if how == "emptied":
            shutil.rmtree(root / "notes")
        else:
            root.rename(away)
        await check(tally, listener, known, gone=True)
        if how == "removed":
            shutil.copytree(away, root)
        elif how == "emptied":
            shutil.copytree(root / ".snapshots", root / "notes", dirs_exist_ok=True)
            for key in known:
                write(root, key)
        else:
            away.rename(root)
        await check(tally, listener, known)
        for number in range(3):
            await check(tally, listener, [write(root, ("after", str(number)))])
        tally.faults += 1


@ROW
async def test_names_that_are_not_utf8_end_nothing(store: FileStateStore, tally: Tally) -> None:
    root = os.fsencode(store.root)
    async with Listener(store) as listener:
        await check(tally, listener, [write(Path(store.root), ("warm",))])
        Path(os.fsdecode(root + b"/notes/\xfe")).mkdir()
        for name in (b"\xff.json", b"\xfe/x.json", b"\xc3\x28.json"):
            Path(os.fsdecode(root + b"/notes/" + name)).write_text("{}")
            tally.faults += 1
        for number in range(5):
            await check(tally, listener, [write(Path(store.root), (f"after {number}",))])


HIDDEN = [
    "node_modules",
    ".git",
    ".venv",
    ".hg",
    ".svn",
    "__pycache__",
    ".idea",
    ".hypothesis",
    ".pytest_cache",
    ".mypy_cache",
    "site-packages",
    ".DS_Store",
    "x~",
    "x.swp",
    "x.swx",
    "x.pyc",
    "#x#",
    ".#x",
]


@ROW
@pytest.mark.parametrize("polling", [False, True], ids=["events", "polling"])
async def test_ids_that_watchers_like_to_hide_are_told(
    store: FileStateStore, tally: Tally, monkeypatch: pytest.MonkeyPatch, polling: bool
) -> None:
    if polling:
        monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "true")
    async with Listener(store) as listener:
        keys: list[Key] = [(name,) for name in HIDDEN]
        keys += [(outer, inner) for outer in HIDDEN for inner in HIDDEN]
        await asyncio.to_thread(lambda: [write(Path(store.root), key) for key in keys])
        await check(tally, listener, keys)
        (Path(store.root) / "notes" / "a.json").unlink()
        await check(tally, listener, [("a",)], gone=True)


@contextlib.contextmanager
def no_more_inotify() -> Iterator[int]:
    """Take every inotify instance that this user may have; how many there were."""
    libc = ctypes.CDLL(None, use_errno=True)
    taken: list[int] = []
    alone = (Path(tempfile.gettempdir()) / "agent-state-inotify.lock").open("w")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX)  # a test beside this one may have taken them
        while (fd := libc.inotify_init()) >= 0:
            taken.append(fd)
        yield len(taken)
    finally:
        for fd in taken:
            os.close(fd)
        alone.close()


@ROW
@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
async def test_without_any_inotify_instance_left_all_is_found_by_rescans(
    store: FileStateStore, tally: Tally
) -> None:
    root = Path(store.root)
    with no_more_inotify() as taken:
        assert taken
        async with Listener(store) as listener:
            tally.faults += 1
            for number in range(3):
                await check(tally, listener, [write(root, (f"new {number}",), '{"n": 1}')])
                write(root, ("a",), json.dumps({"n": number + 50}))
                await check(tally, listener, [("a",)])
                listener.told.clear()
            (root / "notes" / "a.json").unlink()
            await check(tally, listener, [("a",)], gone=True)


def in_place(path: Path, text: str) -> None:
    with path.open("r+") as file:
        file.write(text)
        file.truncate()


def by_rename(path: Path, text: str) -> None:
    fresh = path.with_name("4913")  # vim's
    fresh.write_text(text)
    fresh.replace(path)


def by_backup(path: Path, text: str) -> None:
    path.replace(path.with_name("a.json~"))
    path.write_text(text)


@ROW
@pytest.mark.parametrize("edit", [in_place, by_rename, by_backup])
async def test_every_way_of_saving_a_file_is_told_and_read(
    store: FileStateStore, tally: Tally, edit: Callable[[Path, str], None]
) -> None:
    path = Path(store.root) / "notes" / "a.json"
    async with Listener(store) as listener:
        for number in range(20):
            listener.told.clear()
            edit(path, json.dumps({"n": 100 + number}))
            await check(tally, listener, [("a",)])
            document = await store.get("notes", ("a",))
            assert document is not None
            assert json.loads(document.body) == {"n": 100 + number}
            tally.acknowledged += 1


@ROW
async def test_what_git_checks_out_is_told(store: FileStateStore, tally: Tally) -> None:
    root = Path(store.root)

    def git(*words: str) -> None:
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(root)}
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "gc.auto=0")
        subprocess.run(
            ["git", *who, *words], cwd=root, check=True, capture_output=True, env=environment
        )

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "one")
    git("checkout", "-qb", "other")
    keys: list[Key] = [write(root, ("many", f"{number}")) for number in range(100)]
    write(root, ("a",), '{"n": 5}')
    (root / "notes" / "deep" / "b.json").unlink()
    git("add", "-A", ".")
    git("commit", "-qm", "two")
    git("checkout", "-q", "main")
    await store.close()
    await store.open()
    async with Listener(store) as listener:
        for turn in range(3):
            listener.told.clear()
            await asyncio.to_thread(git, "checkout", "-q", "other")
            await check(tally, listener, [*keys, ("a",)])
            await check(tally, listener, [("deep", "b")], gone=True)
            assert await _content(store, ("a",)) == {"n": 5}
            listener.told.clear()
            await asyncio.to_thread(git, "checkout", "-q", "main")
            await check(tally, listener, [("a",), ("deep", "b")])
            await check(tally, listener, keys, gone=True)
            assert await _content(store, ("a",)) == {"n": 1}
            tally.acknowledged += turn + 1


async def _content(store: FileStateStore, key: Key) -> object:
    document = await store.get("notes", key)
    return None if document is None else json.loads(document.body)
