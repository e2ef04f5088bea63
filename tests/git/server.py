"""A server in a process of its own: it runs the agents of a directory, and tells what it does.

Each agent does a task named ``work`` by printing its id, and one named ``hang`` by saying so and
waiting. Lines on stdin are answered: ``submit AGENT`` queues a task ``work``, ``hang AGENT`` the
other one, ``show AGENT`` prints what is in memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from agent_state import AsyncAgentSessionManager, Task, TaskContext
from tests.deadlines import soon
from tests.git.repositories import CLEAN


class Server:
    """``tests.git.server`` on a directory, in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.start: dict[str, Any] = {}

    @classmethod
    async def begin(cls, directory: Path, *args: str, **env: str) -> Server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.git.server", str(directory), *args),
            env={**CLEAN, "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"], **env},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        server = cls(process)
        server.start = await server.said()
        return server

    async def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(await soon(self.process.stdout.readline())))

    async def submit(self, agent: str, command: str = "submit") -> None:
        self.send(command, agent)
        while await self.said() != {"submitted": agent}:
            pass

    def send(self, command: str, agent: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command} {agent}\n".encode())

    async def memory_of(self, agent: str) -> dict[str, Any]:
        """The agent as it is in memory."""
        self.send("show", agent)
        while (said := await self.said()).get("agent_id") != agent:
            pass
        return said

    async def worked(self, agent: str) -> None:
        while await self.said() != {"worked": agent}:
            pass

    async def end(self, number: int = signal.SIGKILL) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()  # a thread reads it
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        await soon(self.process.wait())


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main(directory: str, *, exclusive: bool) -> None:
    runtime = AsyncAgentSessionManager(directory, save_interval_seconds=0.1, exclusive=exclusive)

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> None:
        if task.name == "hang":
            ctx.memory["attempts"] = task.attempts
            tell(hangs=task.agent_id, attempts=task.attempts)
            await asyncio.Event().wait()
        tell(worked=task.agent_id)

    async with runtime:
        assert runtime.report is not None
        tell(
            pid=os.getpid(),
            agents=runtime.report.agents,
            elsewhere=runtime.report.running_elsewhere,
            lines=[*runtime.report.lines()],
        )
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, agent = line.split()
            if command == "show":
                tell(**runtime.agents.get(agent).model_dump())
            else:
                await runtime.tasks.submit(agent, "work" if command == "submit" else command)
                tell(submitted=agent)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], exclusive="shared" not in sys.argv))
