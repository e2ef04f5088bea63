"""Second Ctrl-C, forks, and managers that outlive their event loop: errors, and no hanging."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent_state import AgentStateError, StateDirectoryInUseError, StatePersistenceManager
from agent_state.storage import locks
from agent_state.sync import SyncStatePersistenceManager

SAVE_FOR_EVER = """
import asyncio, sys
from agent_state import StatePersistenceManager

async def main():
    async with StatePersistenceManager(sys.argv[1]) as manager:
        async def follow():
            async for _ in manager.watch():
                pass
        following = asyncio.create_task(follow())
        await asyncio.sleep(0.3)
        print("ready", flush=True)
        n = 0
        while True:
            n += 1
            await manager.save("notes", "a", {"n": n})

asyncio.run(main())
"""

FORK_AND_DIE = """
import os, sys
from agent_state.storage import locks

os.makedirs(f"{sys.argv[1]}/writers.d")
lock = locks.acquire_exclusive(sys.argv[1])
child = os.fork()
if child == 0:
    sys.stdin.read()
    os._exit(0)
print(child, flush=True)
os._exit(0)
"""


def test_two_ctrl_c_in_a_row_end_the_process(tmp_path: Path) -> None:
    def interrupt(number: int) -> int:
        root = tmp_path / str(number)
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None
        try:
            child.stdout.readline()
            child.send_signal(signal.SIGINT)
            time.sleep(number % 4 / 1000)
            child.send_signal(signal.SIGINT)
            return child.wait(60)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()

    with ThreadPoolExecutor(3) as threads:
        assert {*threads.map(interrupt, range(12))} <= {-signal.SIGINT, 1, 130}


def test_a_forked_child_holds_no_lock_of_its_dead_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK_AND_DIE, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.wait()
    try:
        os.kill(child, 0)  # it lives
        locks.acquire_exclusive(str(tmp_path)).release()
    finally:
        parent.stdin.close()
        parent.stdout.close()


def test_a_writer_that_locks_in_the_old_way_is_refused_and_refuses(tmp_path: Path) -> None:
    (tmp_path / locks.WRITERS).mkdir()
    old = locks.acquire(str(tmp_path / locks.WRITERS / "0123.lock"), 0)
    with pytest.raises(StateDirectoryInUseError, match="older version") as caught:
        locks.acquire_shared(str(tmp_path))
    assert caught.value.pid == os.getpid()
    old.release()

    member = locks.acquire_shared(str(tmp_path))
    assert locks.try_acquire(str(tmp_path / "owner.lock")) is None
    assert locks.owner_of(str(tmp_path)) is None
    member.release()


def test_a_blocking_manager_opened_before_a_fork_is_an_error_in_the_child(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path) as manager:
        manager.save("notes", "a", {"n": 1})
        child = os.fork()
        if child == 0:
            status = 1
            try:
                manager.load("notes", "a")
            except AgentStateError as error:
                status = 42 if "fork" in str(error) else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 42
        loaded = manager.load("notes", "a")
        assert loaded is not None


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_manager_left_open_in_a_dead_loop_is_an_error_and_can_be_closed(
    tmp_path: Path, exclusive: bool
) -> None:
    manager = StatePersistenceManager(tmp_path, exclusive=exclusive)

    async def begin() -> None:
        await manager.open()
        await manager.save("notes", "a", {"n": 1})

    async def go_on() -> None:
        for use in (
            manager.save("notes", "a", {"n": 2}),
            manager.load("notes", "a"),
            manager.keys("notes"),
        ):
            with pytest.raises(AgentStateError, match="another event loop"):
                await use
        await manager.close()
        await manager.close()
        async with StatePersistenceManager(tmp_path, exclusive=True) as heir:
            loaded = await heir.load("notes", "a")
            assert loaded is not None
            assert loaded.model_dump() == {"n": 1}

    asyncio.run(begin())
    asyncio.run(go_on())
