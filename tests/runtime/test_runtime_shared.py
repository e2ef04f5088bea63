"""Two runtimes on one directory: each agent runs in one of them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

from agent_state import AsyncAgentSessionManager, MemoryStateStore, Task, TaskContext
from agent_state.testing import FakeClock
from tests.runtime.living import die, make_runtime, until


def sharing(store: MemoryStateStore, clock: FakeClock, name: str) -> AsyncAgentSessionManager:
    runtime = make_runtime(store, clock, name=name, exclusive=False, lease_seconds=30)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        return name

    return runtime


async def test_an_agent_belongs_to_the_runtime_that_holds_its_lease() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first = sharing(store, clock, "first")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    second = sharing(store, clock, "second")
    report = await second.start()
    assert report.held_elsewhere == ["alice"]
    await second.tasks.submit("alice", "from the second")
    task = await first.tasks.submit("alice", "from the first")
    assert await first.tasks.result(task) == "first"
    await second.stop()
    await first.stop()


async def test_the_agents_of_a_dead_runtime_move_when_their_leases_expire() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    started = asyncio.Event()

    @first.handler("worker")
    async def hang(ctx: TaskContext, task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    await first.start()
    await first.agents.create("alice", agent_type="worker")
    task = await first.tasks.submit("alice", "move me")
    await started.wait()
    second = sharing(store, clock, "second")
    await second.start()
    await die(first)
    await clock.advance(15)
    assert (await second.tasks.get(task)).status == "in_progress"
    await clock.advance(30)
    await until(lambda: second.state.agents["alice"].leased)
    await second.wait_idle()
    done = await second.tasks.get(task)
    assert (done.status, done.result, done.attempts, done.interruptions) == (
        "completed",
        "second",
        2,
        1,
    )
    await second.stop()


async def test_a_stop_in_good_order_gives_the_agents_away_at_once() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first = sharing(store, clock, "first")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    await first.stop()
    second = sharing(store, clock, "second")
    report = await second.start()
    assert report.held_elsewhere == []
    task = await second.tasks.submit("alice", "x")
    assert await second.tasks.result(task) == "second"
    await second.stop()


async def test_a_runtime_that_could_not_renew_stops_its_handlers() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    stopped = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.tasks.submit("alice", "x")
    await until(lambda: runtime.runner.running_handlers)
    lease = {"agent_id": "alice", "owner": "somebody else", "token": 99}
    lease["expires_at"] = (clock.now() + timedelta(hours=1)).isoformat()
    await runtime.manager.save("system", ("leases", "alice"), lease)
    await clock.advance(11)
    async with asyncio.timeout(60):
        await stopped.wait()
    assert not runtime.state.agents["alice"].leased
    await runtime.stop()


async def test_two_runtimes_share_real_files(tmp_path: Path) -> None:
    def make(name: str) -> AsyncAgentSessionManager:
        runtime = AsyncAgentSessionManager(tmp_path / "state", exclusive=False)

        @runtime.handler("worker")
        async def worker(ctx: TaskContext, task: Task) -> str:
            return name

        return runtime

    async with make("first") as first, make("second") as second:
        await first.agents.create("alice", agent_type="worker")
        await second.agents.create("bob", agent_type="worker")
        mine = await first.tasks.submit("alice", "x")
        assert await first.tasks.result(mine) == "first"
        async with asyncio.timeout(60):
            while "bob" not in first.agents.list():
                await asyncio.sleep(0.01)
        theirs = await first.tasks.submit("bob", "from the first runtime")
        assert await asyncio.wait_for(first.tasks.result(theirs), 60) == "second"
