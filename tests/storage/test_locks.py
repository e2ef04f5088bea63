"""Locks between real processes: nobody gets in twice, and the dead block nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_state import (
    FileStateStore,
    LockTimeoutError,
    StateDirectoryInUseError,
    StatePersistenceManager,
    StorageError,
    WALStateStore,
)
from agent_state.storage import locks
from agent_state.testing.contract_base import content_of, put

HOLD_LOCK = """
import sys
from agent_state.storage import locks
lock = locks.acquire(sys.argv[1], 5)
print("held", flush=True)
sys.stdin.read()
"""

HOLD_STORE = """
import asyncio, sys
import agent_state
from agent_state.testing.contract_base import put

async def main():
    store = getattr(agent_state, sys.argv[2])(sys.argv[1])
    await store.open()
    await store.commit([put("child", {"n": 1})])
    print("held", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await store.close()

asyncio.run(main())
"""

COUNT = """
import asyncio, sys
from agent_state import FileStateStore
from agent_state.testing.contract_base import content_of, put

async def main():
    store = FileStateStore(sys.argv[1])
    await store.open()
    for _ in range(int(sys.argv[2])):
        async with store.lock("notes", ("counter",)):
            content = await content_of(store, "counter")
            await store.commit([put("counter", {"n": content["n"] + 1})])
    await store.close()

asyncio.run(main())
"""


@contextmanager
def process(program: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds what the program says, until its input ends or it is killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.stdin.close()
        child.wait()
        child.stdout.close()


def test_a_held_lock_is_not_given_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with locks.holding(path, 0.0):
        assert locks.try_acquire(path) is None
        with pytest.raises(LockTimeoutError):
            locks.acquire(path, 0.0)
    with locks.holding(path, 0.0):
        pass


def test_a_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with process(HOLD_LOCK, path) as child:
        assert locks.try_acquire(path) is None
        child.send_signal(signal.SIGKILL)
        child.wait()

        with locks.holding(path, 0.0):
            assert Path(path).exists()


def test_a_symlink_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")

    with pytest.raises(StorageError):
        locks.try_acquire(str(tmp_path / "lock"))
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("second", [WALStateStore, FileStateStore])
async def test_an_owner_keeps_everybody_else_out_and_is_named(
    tmp_path: Path, second: type[FileStateStore]
) -> None:
    with process(HOLD_STORE, str(tmp_path), "WALStateStore") as child:
        for _ in range(2):
            store = second(tmp_path)
            with pytest.raises(StateDirectoryInUseError) as caught:
                await store.open()
            assert caught.value.pid == child.pid
            assert str(child.pid) in str(caught.value)
            assert "another process" in str(caught.value)
            await store.close()
    store = second(tmp_path)
    await store.open()
    assert await content_of(store, "child") == {"n": 1}
    await store.close()


async def test_a_writer_keeps_an_owner_out_but_not_other_writers(tmp_path: Path) -> None:
    with process(HOLD_STORE, str(tmp_path), "FileStateStore") as child:
        with pytest.raises(StateDirectoryInUseError) as caught:
            await WALStateStore(tmp_path).open()
        assert caught.value.pid == child.pid

        shared = FileStateStore(tmp_path)
        await shared.open()
        await shared.commit([put("mine", {"n": 2})])
        await shared.close()
    owner = WALStateStore(tmp_path)
    await owner.open()
    assert await owner.keys("notes") == [("child",), ("mine",)]
    await owner.close()


@pytest.mark.parametrize("dead", ["WALStateStore", "FileStateStore"])
@pytest.mark.parametrize("heir", [WALStateStore, FileStateStore])
async def test_the_heir_of_a_killed_process_finds_all_and_waits_for_nothing(
    tmp_path: Path, dead: str, heir: type[FileStateStore]
) -> None:
    with process(HOLD_STORE, str(tmp_path), dead) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()

        store = heir(tmp_path)
        await store.open()
        assert await content_of(store, "child") == {"n": 1}
        await store.close()


async def test_two_stores_of_one_process_are_two_writers(tmp_path: Path) -> None:
    owner = WALStateStore(tmp_path)
    await owner.open()
    for other in (WALStateStore(tmp_path), FileStateStore(tmp_path)):
        with pytest.raises(StateDirectoryInUseError) as caught:
            await other.open()
        assert caught.value.pid == os.getpid()
        assert "this process itself" in str(caught.value)
        assert "another process" not in str(caught.value)
    await owner.close()


async def test_no_update_of_several_processes_is_lost(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    await store.open()
    await store.commit([put("counter", {"n": 0})])

    children = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path), "25"]) for _ in range(3)
    ]

    assert [child.wait() for child in children] == [0, 0, 0]
    assert await content_of(store, "counter") == {"n": 75}
    await store.close()


async def test_a_kind_may_have_any_name_and_its_locks_are_its_own(tmp_path: Path) -> None:
    for kind in ("writers", "owner", "locks", "journal"):
        store = FileStateStore(tmp_path)
        await store.open()
        async with store.lock(kind, ("a",)):
            await store.commit([put("a", {"n": 1}, kind=kind)])
            other = FileStateStore(tmp_path, lock_timeout_seconds=0.05)
            await other.open()
            with pytest.raises(LockTimeoutError):
                await other.commit([put("a", {"n": 2}, kind=kind)])
            await other.close()
        await store.close()


async def test_writers_leave_nothing_behind(tmp_path: Path) -> None:
    for _ in range(3):
        for store in (FileStateStore(tmp_path), WALStateStore(tmp_path)):
            await store.open()
            await store.commit([put("a", {"n": 1})])
            await store.close()

    assert list((tmp_path / ".locks" / locks.WRITERS).iterdir()) == []
    assert list((tmp_path / ".journal").glob("[!.]*")) == []


async def test_one_who_gives_up_as_his_turn_is_passed_over_leaves_the_lock_to_the_others() -> None:
    """He is cancelled in the tick in which the holder leaves, and runs after it."""
    turns = locks.TaskLocks(timeout=5)
    asked = asyncio.Event()

    async def wait() -> None:
        asked.set()
        async with turns.hold(["one"]):
            raise AssertionError("it was cancelled before")

    async with turns.hold(["one"]):
        waiting = asyncio.create_task(wait())
        await asked.wait()
        waiting.cancel()
    assert not turns.held
    async with turns.hold(["one"]):  # another lock of that name
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert turns.taken({"one": True}) is False, "it is ours"
        assert list(turns.held) == ["one"]
    assert not turns.held


def test_many_open_a_new_directory_at_once(tmp_path: Path) -> None:
    """They tidy up as they open, and none of them may take away what another one is writing."""
    failed: list[BaseException] = []

    def open_it(directory: Path, together: threading.Barrier) -> None:
        async def save() -> None:
            together.wait(60)
            async with StatePersistenceManager(directory) as manager:
                await manager.save("system", "x", {"a": 1})

        try:
            asyncio.run(save())
        except Exception as error:  # noqa: BLE001  # for the test to show
            failed.append(error)

    for number in range(30):
        together = threading.Barrier(8)
        threads = [
            threading.Thread(target=open_it, args=(tmp_path / f"{number}", together))
            for _ in range(8)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert failed == []
