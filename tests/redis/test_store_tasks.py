"""Two runtimes on one Redis: tasks are operated, watched and awaited by the one that runs none."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from agent_state import (
    AgentRuntime,
    RateLimit,
    RetryPolicy,
    Task,
    TaskContext,
    TaskFilter,
    TaskTimeoutError,
)
from agent_state.redis import RedisStateStore
from tests.deadlines import soon, until
from tests.redis.servers import RedisServer


def make(server: RedisServer) -> AgentRuntime:
    return AgentRuntime(
        store=RedisStateStore(server.url, prefix="app:", timeout_seconds=30),
        exclusive=False,
        lease_seconds=600,
        retry=RetryPolicy(base_seconds=0.01, max_seconds=0.01),
    )


async def test_tasks_of_another_runtime_are_found_mended_and_awaited_by_their_ids_alone(
    server: RedisServer,
) -> None:
    works, asks = make(server), make(server)
    known = {"book": 3}

    @works.task("index", agent_type="reader", max_attempts=2)
    async def index(ctx: TaskContext, payload: dict[str, str]) -> int:
        return known[payload["doc"]]

    async with works, asks:
        await works.agents.create("ann", agent_type="reader")
        await until(lambda: "ann" in asks.agents.list())
        seen: list[Task] = []

        async def watch() -> None:
            async for task in asks.tasks.watch(TaskFilter(status="dead", name="index")):
                seen.append(task)  # noqa: PERF401  # it goes on until the runtime stops

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        good = await asks.tasks.submit("ann", "index", {"doc": "book"})
        bad = await asks.tasks.submit("ann", "index", {"doc": "letter"})
        late = await asks.tasks.submit("ann", "index", {"doc": "book"}, delay_seconds=3600)

        assert await soon(asks.tasks.result(good.task_id)) == 3
        await until(lambda: seen)
        assert [(task.task_id, task.error) for task in seen] == [
            (bad.task_id, "KeyError: 'letter'")
        ]

        known["letter"] = 2
        dead = TaskFilter(status="dead", error="letter")
        assert (await asks.tasks.retry_all(dead, dry_run=True)).matched == 1
        assert (await asks.tasks.retry_all(dead)).changed == 1
        assert await soon(asks.tasks.result(bad.task_id)) == 2

        with pytest.raises(TaskTimeoutError):
            await asks.tasks.result(late.task_id, timeout_seconds=0.01)
        assert await asks.tasks.cancel(late.task_id)
        assert await asks.tasks.delete(late.task_id)
        left = await asks.tasks.search()
        assert [task.task_id for task in left] == [good.task_id, bad.task_id]
    await soon(watching)  # it ends with its runtime


async def test_runtimes_on_one_server_share_a_limit_and_queue_each_run_once(
    server: RedisServer,
) -> None:
    calls: list[str] = []
    runs = Counter[str | float | None]()
    both = [make(server), make(server)]
    for runtime in both:

        @runtime.task("call", agent_type="caller", rate_limits=[RateLimit("calls", 3, 86_400)])
        async def call(ctx: TaskContext) -> None:
            calls.append(ctx.agent_id)

        @runtime.task("tick", agent_type="clerk")
        async def tick(ctx: TaskContext, task: Task) -> None:
            runs[task.scheduled_for] += 1

        runtime.schedule("tick", agent_id="carl", cron="* * * * * *")

    async with both[0], both[1]:
        await both[0].agents.create("carl", agent_type="clerk")
        for number, runtime in enumerate(both):
            await runtime.agents.create(f"caller {number}", agent_type="caller")
            for _ in range(4):
                await runtime.tasks.submit(f"caller {number}", "call")
        await until(lambda: len(calls) == 3 and len(runs) > 2)
        stored = await both[0].manager.load("system", ("limits", "calls"))
        assert stored is not None
        assert sum(stored.model_dump()["used"].values()) == 3
        completed = await both[1].tasks.search(TaskFilter(name="call", status="completed"))
        assert len(completed) <= 3
    assert len(calls) == 3
    assert set(runs.values()) == {1}
