"""What the tests of the command line share: a directory to look at, and ways to call."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent_state import StatePersistenceManager

OWNER = """
import asyncio, sys
from agent_state import StatePersistenceManager

async def own(state_dir):
    async with StatePersistenceManager(state_dir, exclusive=True) as manager:
        await manager.save_agent_state("carol", {"agent_id": "carol", "status": "active"})
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(own(sys.argv[1]))
"""


async def fill(root: Path) -> Path:
    """Two agents; alice has three tasks, two messages, a log, and sleeps."""
    async with StatePersistenceManager(root) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "agent_type": "researcher"})
        await manager.save_agent_state("Bob", {"agent_id": "Bob", "status": "stopped"})
        for name, status in (("t1", "completed"), ("t2", "in_progress"), ("a/b", "pending")):
            task = {"task_id": name, "agent_id": "alice", "status": status, "attempts": 1}
            await manager.save("tasks", ("alice", name), task)
        for name, status in (("m1", "unread"), ("m2", "archived")):
            mail = {"message_id": name, "subject": "hi", "from_agent": "Bob", "status": status}
            await manager.save("mail", ("alice", name), mail)
        sleep = {"agent_id": "alice", "sleep_until": "2999-01-01T00:00:00.000000Z"}
        await manager.save_sleep_state("alice", sleep)
        for number in range(30):
            await manager.append("system", "events", {"number": number})
    return root


class Called:
    """What a command printed and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Called]


@contextmanager
def owned_by_another_process(state: Path) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.communicate(timeout=60)


def assert_one_line_of_error(called: Called, *said: str) -> None:
    assert called.out == ""
    assert called.err.startswith("agent-state: ")
    assert called.err.count("\n") == 1
    for words in said:
        assert words in called.err
