"""A server in a process of its own: it runs the agents of a directory, and tells what it does.

Each agent does a task named ``work`` by printing its id. Lines on stdin are answered: ``submit
AGENT`` queues such a task.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from agent_state import AsyncAgentSessionManager, Task, TaskContext


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main(directory: str) -> None:
    runtime = AsyncAgentSessionManager(directory, save_interval_seconds=0.1)

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> None:
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
            agent = line.split()[-1]
            await runtime.tasks.submit(agent, "work")
            tell(submitted=agent)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
