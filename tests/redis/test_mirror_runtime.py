"""A server of agents with a mirror: the machine is lost, and another one goes on from the copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from agent_state import AsyncAgentSessionManager, Task, TaskContext
from tests.redis.mirrors import compare, mirror
from tests.redis.servers import RedisServer


async def count(context: TaskContext, task: Task) -> dict[str, int]:
    return {"number": task.payload["number"]}


def server_of(folder: Path, url: str) -> AsyncAgentSessionManager:
    runtime = AsyncAgentSessionManager(folder, mirror=mirror(url), mirror_restores=True)
    runtime.handler("counter")(count)
    return runtime


async def test_agents_go_on_from_the_copy_when_the_directory_is_lost(
    server: RedisServer, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    async with server_of(folder, server.url) as runtime:
        await runtime.agents.create("alice", agent_type="counter")
        done = [
            await runtime.tasks.submit("alice", "count", {"number": number}) for number in range(5)
        ]
        for number, task in enumerate(done):
            assert await runtime.tasks.result(task) == {"number": number}
        await runtime.agents.create("bob", agent_type="somebody else's")
        await runtime.tasks.submit("bob", "later")
    assert (await compare(server.url, folder)).ok
    shutil.rmtree(folder)

    async with server_of(folder, server.url) as runtime:
        assert runtime.report is not None
        assert sorted(runtime.report.agents) == ["alice", "bob"]
        assert runtime.report.tasks_pending == 1
        for number, task in enumerate(done):
            assert await runtime.tasks.result(task) == {"number": number}
        another = await runtime.tasks.submit("alice", "count", {"number": 5})
        assert await runtime.tasks.result(another) == {"number": 5}
    assert (await compare(server.url, folder)).ok
