"""What the tests of the command line share: a directory to look at, and ways to call."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import typer

from agent_state import StatePersistenceManager
from tests.deadlines import SECONDS
from tests.frameworks import ABSENT

OWNER = """
import asyncio, sys
from agent_state import StatePersistenceManager
from tests.deadlines import SECONDS

async def own(state_dir):
    async with StatePersistenceManager(state_dir, exclusive=True) as manager:
        await manager.save_agent_state("carol", {"agent_id": "carol", "status": "active"})
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(own(sys.argv[1]))
"""

SERVER = """
import asyncio, sys
from agent_state import AgentRuntime, RetryPolicy, Task, TaskContext

runtime = AgentRuntime(
    "state", exclusive="--shared" not in sys.argv,
    retry=RetryPolicy(base_seconds=0.01, max_seconds=0.01),
)


@runtime.handler("reader")
async def read(ctx: TaskContext, task: Task) -> int:
    if "--slow" in sys.argv:
        await asyncio.sleep(3600)
    return len(task.payload["FIELD"].split())


async def main() -> None:
    async with runtime:
        for name in ("ann", "bob"):
            await runtime.agents.create(name, agent_type="reader")
        fields = [word for word in sys.argv[1:] if not word.startswith("-")]
        for number, field in enumerate(fields):
            await runtime.tasks.submit(
                ("ann", "bob")[number % 2], "index", {field: "two words"}, dedupe_key=str(number)
            )
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main())
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


@asynccontextmanager
async def running(
    folder: Path, *args: str, reads: str = "doc"
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The server in a process of its own, with a task for each field; killed in the end."""
    (folder / "server.py").write_text(SERVER.replace("FIELD", reads))
    command = [sys.executable, "server.py", *args]
    with (folder / "server.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=-1, stderr=log)
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), SECONDS)
        assert line == b"ready\n", (folder / "server.log").read_text()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def agent_state(folder: Path, *args: str, code: int = 0) -> str:
    """Call the command as a person does, in the folder of the server."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent_state", *args, cwd=folder, stdout=-1, stderr=-1
    )
    out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return out.decode()


APART = frozenset({"import adk", "import pydantic-ai"})
"""Commands that need what cannot be installed here; tests/integrations calls them."""


def commands_of(
    command: Any, path: tuple[str, ...] = (), *, absent: bool = False
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands that do something, each with the words that call it.

    Without those of frameworks that are in environments of their own (``APART``). ``absent``: those
    that only say which framework they need, where no framework is installed (``make release``).
    """
    command = typer.main.get_command(command) if isinstance(command, typer.Typer) else command
    if not hasattr(command, "list_commands"):
        is_absent = "mcp" in ABSENT and (command.help or "").startswith("Not available")
        if " ".join(path) not in APART and is_absent == absent:
            yield path, command
        return
    context = typer.Context(command)
    for name in command.list_commands(context):
        yield from commands_of(command.get_command(context, name), (*path, name), absent=absent)
