"""Agents: created, stopped, started, and run by the handler of their type."""

from __future__ import annotations

import asyncio

import pytest

from agent_state import (
    StateValidationError,
    StorageFullError,
    Task,
    TaskContext,
)
from agent_state.testing import FakeClock
from tests.deadlines import soon
from tests.runtime.runtimes import TroubledStore, make_runtime, puts, with_agent, working


async def test_a_session_is_created_once_and_keeps_its_type() -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("alice", agent_type="a", configuration={"model": "m"})
        again = await runtime.agents.create("alice", agent_type="a", configuration={})
        assert again.configuration == {"model": "m"}
        with pytest.raises(StateValidationError, match="with type 'a'"):
            await runtime.agents.create("alice", agent_type="b")


async def test_a_handler_must_be_async_and_the_only_one() -> None:
    runtime = make_runtime()
    with pytest.raises(TypeError, match="must be an async function"):
        runtime.handler("worker")(lambda _ctx, _task: None)  # type: ignore[type-var]

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None: ...

    with pytest.raises(ValueError, match="has a handler already"):
        runtime.handler("worker")(worker)


async def test_a_stopped_agent_keeps_its_tasks_for_later() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        return "done"

    await with_agent(runtime)
    await runtime.agents.stop("alice")
    task = await runtime.tasks.submit("alice", "later")
    await runtime.wait_idle()
    assert (await runtime.tasks.get(task)).status == "pending"
    await runtime.agents.start("alice")
    assert await runtime.tasks.result(task) == "done"
    await runtime.stop()


async def test_a_stopped_agent_with_a_task_that_is_due_keeps_nobody_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", delay_seconds=10)
        await runtime.agents.stop("alice")
        await clock.advance(20)
        agent = runtime.state.agents["alice"]
        rung = 0
        wake = agent.changed.set

        def count() -> None:
            nonlocal rung
            rung += 1
            wake()

        monkeypatch.setattr(agent.changed, "set", count)
        await clock.advance(1)
        assert rung <= 1
        await runtime.agents.start("alice")
        assert await soon(runtime.tasks.result(task)) == "alice"


async def test_an_agent_created_twice_at_once_lives_once() -> None:
    ran: list[str] = []
    runtime = make_runtime(TroubledStore())
    working(runtime, ran)
    async with runtime:
        made = await asyncio.gather(
            *(runtime.agents.create("alice", agent_type="worker") for _ in range(3))
        )
        assert {state.agent_id for state in made} == {"alice"}
        await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "x")))
        loops = [t for t in asyncio.all_tasks() if t.get_name() == "agent alice"]
        assert (len(loops), ran) == (1, ["alice/x"])


async def test_an_agent_whose_stop_cannot_be_stored_works_on() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        store.full = puts("agents")
        with pytest.raises(StorageFullError):
            await runtime.agents.stop("alice")
        store.full = lambda _: False
        assert runtime.agents.get("alice").status == "idle"
        assert await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "x"))) == "alice"
