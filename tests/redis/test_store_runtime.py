"""Two servers of agents on one Redis: one is killed or stands still, the other takes over."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.errors import LeaseLostError
from agent_state.models import Task
from agent_state.redis import RedisStateStore
from agent_state.redis.client import connect
from agent_state.redis.commit import ServerClock
from agent_state.testing import FakeClock
from tests.redis.servers import RedisServer

SERVER = """
import asyncio, signal, sys
from agent_state import AsyncAgentSessionManager, RetryPolicy
from agent_state.redis import RedisStateStore
from agent_state.redis.client import connect

url, life, half, agents, tasks = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
runtime = AsyncAgentSessionManager(
    store=RedisStateStore(url, prefix="app:", timeout_seconds=5),
    exclusive=False,
    lease_seconds=10.0,
    retry=RetryPolicy(base_seconds=0.01, max_interruptions=1000),
)
witness = connect(url, timeout_seconds=5)

@runtime.handler("worker")
async def worker(ctx, task):
    n = task.payload["n"]
    for word in ("begin", *["beat"] * 4):
        await witness.rpush(f"witness:{ctx.agent_id}", f"{life} {word} {n}")
        await asyncio.sleep(0.003)
    doubled = await ctx.step("double", lambda: n * 2)
    await ctx.send_mail(f"w{n * 7 % agents}", subject=task.name, body=doubled)
    ctx.memory["done"] = ctx.memory.get("done", 0) + 1
    return doubled

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with runtime:
        for n in range(half, agents, 2):
            await runtime.agents.create(f"w{n}", agent_type="worker")
        for n in range(tasks):
            if n % agents % 2 == half:
                name = f"task {n}"
                await runtime.tasks.submit(f"w{n % agents}", name, {"n": n}, dedupe_key=name)
        print("submitted", flush=True)
        await stop.wait()
    await witness.aclose()

asyncio.run(main())
"""
AGENTS, TASKS = 10, 400

logger = logging.getLogger(__name__)


class Team:
    """The servers, each a process with a name of its own for each of its lives."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lives: dict[str, Process] = {}
        self._numbers = count()

    async def start(self, half: int) -> str:
        """A new server, which has submitted its half of the tasks."""
        life = f"life-{next(self._numbers)}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SERVER, self.url, life),
            *(str(half), str(AGENTS), str(TASKS)),
            stdout=PIPE,
        )
        self.lives[life] = process
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"submitted\n"
        return life

    async def start_both(self) -> tuple[str, str]:
        """One for each half, at once, so that neither is done before the other begins."""
        first = asyncio.create_task(self.start(0))
        second = asyncio.create_task(self.start(1))
        return await first, await second

    async def kill(self, life: str) -> None:
        self.lives[life].kill()
        await self.lives[life].wait()

    async def end(self, life: str) -> None:
        """Stop it in good order."""
        self.lives[life].send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await self.lives[life].wait() == 0

    def kill_all(self) -> None:
        for process in self.lives.values():
            if process.returncode is None:
                process.kill()


@asynccontextmanager
async def team_on(server: RedisServer) -> AsyncIterator[tuple[Team, StatePersistenceManager]]:
    team = Team(server.url)
    async with StatePersistenceManager(
        store=RedisStateStore(server.url, prefix="app:", timeout_seconds=5)
    ) as manager:
        try:
            yield team, manager
        finally:
            team.kill_all()


async def statuses(manager: StatePersistenceManager) -> Counter[str]:
    found = [loaded.state async for loaded in manager.scan("tasks")]
    return Counter(task.status for task in found if isinstance(task, Task))


async def until_completed(manager: StatePersistenceManager, number: int = TASKS) -> None:
    async with asyncio.timeout(120):
        while (await statuses(manager))["completed"] < number:
            await asyncio.sleep(0.05)


async def witnessed(url: str) -> dict[str, list[tuple[str, str, int]]]:
    """What ran, in the server's order: for each agent the life, the word and the task."""
    async with connect(url, timeout_seconds=5) as client:
        seen = {}
        for n in range(AGENTS):
            found: list[Any] = await client.lrange(f"witness:w{n}", 0, -1)
            lines = [line.decode() for line in found]
            words = [line.split() for line in lines]
            seen[f"w{n}"] = [(life, word, int(task)) for life, word, task in words]
    return seen


async def verify(team: Team, manager: StatePersistenceManager) -> None:
    """Every task done, every message there once, nothing in two places at once."""
    tasks = [loaded.state async for loaded in manager.scan("tasks")]
    done = {task.payload["n"]: task.result for task in tasks if isinstance(task, Task)}
    assert done == {n: n * 2 for n in range(TASKS)}
    assert await statuses(manager) == {"completed": TASKS}
    mail = [loaded async for loaded in manager.scan("mail")]
    got = Counter((loaded.key[0], loaded.state.model_dump()["subject"]) for loaded in mail)
    assert got == Counter((f"w{n * 7 % AGENTS}", f"task {n}") for n in range(TASKS))
    for agent_id, seen in (await witnessed(team.url)).items():
        lives = [life for life, _ in groupby(seen, key=lambda entry: entry[0])]
        assert len(lives) == len(set(lives)), f"{agent_id} ran here and there: {lives}"
        for _, entries in groupby(seen, key=lambda entry: entry[0]):
            tasks_run = [task for task, _ in groupby(entries, key=lambda entry: entry[2])]
            assert len(tasks_run) == len(set(tasks_run)), f"{agent_id} did two tasks at once"
        agent = await manager.load_agent_state(agent_id)
        assert agent is not None
        assert agent.context.working_memory["done"] == TASKS // AGENTS


@pytest.mark.long("kills one of two servers")
async def test_the_agents_of_a_killed_server_move_to_the_other(server: RedisServer) -> None:
    async with team_on(server) as (team, manager):
        first, second = await team.start_both()
        await until_completed(manager, TASKS // 10)
        loop = asyncio.get_running_loop()
        await team.kill(first)
        killed = loop.time()
        moved = None
        async with asyncio.timeout(120):
            completed = 0
            while completed < TASKS:
                # Counted first: the heir may do all that is left between two looks.
                completed = (await statuses(manager))["completed"]
                if moved is None:
                    seen = await witnessed(server.url)
                    lives = {entry[0] for n in range(0, AGENTS, 2) for entry in seen[f"w{n}"]}
                    moved = loop.time() - killed if second in lives else None
                await asyncio.sleep(0.02)
        logger.info("the first agent of the dead ran elsewhere after %s s", moved)
        await team.end(second)
        await verify(team, manager)
        assert moved is not None, "the dead server had done all its work"


@pytest.mark.long("kills one of two servers, five times")
async def test_servers_killed_again_and_again_lose_nothing_and_do_nothing_twice(
    server: RedisServer,
) -> None:
    chance = random.Random(11)
    async with team_on(server) as (team, manager):
        running = dict(enumerate(await team.start_both()))
        for n in range(5):
            half = n % 2
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            await team.kill(running[half])
            running[half] = await team.start(half)
        await until_completed(manager)
        for life in running.values():
            await team.end(life)
        await verify(team, manager)
        seen = (await witnessed(server.url)).values()
        assert any(len({entry[0] for entry in entries}) > 1 for entries in seen), "none moved"
        assert manager.incidents() == []


@pytest.mark.long("stops one of two servers")
async def test_a_server_that_stood_still_writes_nothing_over_the_one_that_took_over(
    server: RedisServer,
) -> None:
    async with team_on(server) as (team, manager):
        still, other = await team.start_both()
        await until_completed(manager, TASKS // 10)
        os.kill(team.lives[still].pid, signal.SIGSTOP)
        await until_completed(manager)
        before = {
            loaded.key: loaded.revision
            for kind in ("tasks", "agents")
            async for loaded in manager.scan(kind)
        }
        os.kill(team.lives[still].pid, signal.SIGCONT)
        await team.end(still)
        after = {
            loaded.key: loaded.revision
            for kind in ("tasks", "agents")
            async for loaded in manager.scan(kind)
        }
        assert after == before
        assert other in {life for life, _, _ in (await witnessed(server.url))["w0"]}
        await team.end(other)
        for n in range(AGENTS):
            agent = await manager.load_agent_state(f"w{n}")
            assert agent is not None
            assert agent.context.working_memory["done"] == TASKS // AGENTS


async def test_no_save_of_an_agent_is_made_once_its_lease_is_anothers(server: RedisServer) -> None:
    runtime = AsyncAgentSessionManager(
        store=RedisStateStore(server.url, prefix="app:", timeout_seconds=10),
        exclusive=False,
        lease_seconds=600,
    )
    await runtime.start()
    try:
        await lose_the_lease_of_alice(runtime)
    finally:
        await runtime.stop()


async def lose_the_lease_of_alice(runtime: AsyncAgentSessionManager) -> None:
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.save_session_state("alice")
    stored = await runtime.manager.load_with_revision("agents", "alice")
    assert stored is not None

    theirs = {"agent_id": "alice", "owner": "somebody else", "token": 99}
    await runtime.manager.save("system", ("owners", "alice"), theirs)
    runtime.state.agents["alice"].state.context.working_memory["late"] = True
    with pytest.raises(LeaseLostError):
        await runtime.save_session_state("alice")
    await runtime.save_all_session_states()  # as a stop does: left to whoever has it
    assert await runtime.manager.load_with_revision("agents", "alice") == stored


async def test_hosts_whose_clocks_differ_share_the_servers_time(server: RedisServer) -> None:
    store = RedisStateStore(server.url, prefix="app:")
    wrong = FakeClock()  # in January
    clock = ServerClock(wrong)
    store._server_clock = store.clock = clock
    await store.open()
    async with connect(server.url, timeout_seconds=10) as client:
        seconds, _ = await client.time()
    assert abs(clock.now().timestamp() - seconds) < 60
    await wrong.advance(3600)  # a jump is found at the next commit
    async with StatePersistenceManager(store=store) as manager:
        await manager.save("system", "x", {})
        loaded = await manager.load_with_revision("system", "x")
    assert abs(clock.now().timestamp() - seconds) < 60
    assert loaded is not None
    assert json.loads(loaded.state.model_dump_json()) is not None


def test_the_runtime_uses_the_stores_clock(tmp_path: Path) -> None:
    store = RedisStateStore("redis://localhost")
    assert AsyncAgentSessionManager(store=store, exclusive=False).state.clock is store.clock
    assert AsyncAgentSessionManager(tmp_path).state.clock is not store.clock
