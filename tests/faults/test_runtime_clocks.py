"""Clocks that jump, and clocks that stand still: schedules, retries, sleeps and leases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent_state import MemoryStateStore, StateStore, Task, TaskContext
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.faults.tally import Tally
from tests.runtime.runtimes import make_runtime

pytestmark = pytest.mark.proof("R", "a clock that jumps, and one that stands still")

HOUR, YEAR = 3600.0, 365 * 86400.0


class Watched:
    """A runtime whose tasks tell when two of one name run at once, and how often each did."""

    def __init__(self, store: StateStore, clock: FakeClock, name: str, **settings: Any) -> None:
        self.runs: list[str] = []
        self.twice: list[str] = []
        self.inside: set[str] = set()
        self.clock = clock
        self.runtime = make_runtime(store, clock, name=name, grace_seconds=0.05, **settings)

        @self.runtime.handler("worker")
        async def worker(ctx: TaskContext, task: Task) -> str:
            self.runs.append(task.name)
            if task.name in self.inside:
                self.twice.append(task.name)
            self.inside.add(task.name)
            try:
                if task.name == "long":
                    await clock.sleep(100)
                if task.name == "retried" and ctx.attempt < 3:
                    raise RuntimeError("not yet")
                if task.name == "sleeps" and not ctx.progress:
                    await ctx.checkpoint({"slept": True})
                    await ctx.sleep(seconds=50)
            finally:
                self.inside.discard(task.name)
            return task.name

    async def begin(self) -> list[Task]:
        """One agent for each sort of waiting: for a time, a retry, a sleep, a handler."""
        await self.runtime.start()
        tasks = []
        for name in ("long", "delayed", "retried", "sleeps"):
            await self.runtime.agents.create(name, agent_type="worker")
            delay = 60 if name == "delayed" else 0
            submitted = await self.runtime.tasks.submit(
                name, name, delay_seconds=delay, timeout_seconds=200
            )
            tasks.append(submitted)
        await until(lambda: len(self.runs) == 3 and not self.inside - {"long"})
        return tasks


@pytest.mark.parametrize("jump", [-HOUR, HOUR, YEAR, 0.0])
async def test_whatever_the_clock_does_each_task_is_done_and_none_twice_at_once(
    jump: float, tally: Tally
) -> None:
    """A schedule, a retry, a sleep and a lease, over a jump of the wall clock."""
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    watched = Watched(store, clock, "only", lease_seconds=30)
    tasks = await watched.begin()
    clock.jump(jump)
    await clock.advance(45)
    assert ("delayed" in watched.runs) == (jump > 0), "it runs when the wall clock says so"
    for _ in range(8):
        await clock.advance(max(0.0, -jump) / 4 + 31)
    done = [await watched.runtime.tasks.get(task) for task in tasks]
    tally.points, tally.faults = len(done), jump != 0
    tally.lost = sum(task.status != "completed" for task in done)
    assert [task.status for task in done] == ["completed"] * 4
    assert sorted(watched.runs) == ["delayed", "long", *["retried"] * 3, *["sleeps"] * 2]
    assert watched.twice == []
    assert [task.interruptions for task in done] == [0] * 4
    await watched.runtime.stop()


async def test_where_the_clock_stands_still_work_is_done_and_survives_a_death(
    tally: Tally,
) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    first = Watched(store, clock, "first")
    await first.begin()
    for number in range(20):
        task = await first.runtime.tasks.submit("retried", f"quick {number}")
        assert await soon(first.runtime.tasks.result(task)) == f"quick {number}"
    await first.runtime.abort()
    second = Watched(store, clock, "second")
    report = await second.runtime.start()
    assert [task.name for task in report.requeued] == ["long"]
    await until(lambda: "long" in second.runs)
    assert {task.status async for task in stored_tasks(store, "retried")} == {"failed", "completed"}
    tally.points, tally.faults = 24, 1
    await second.runtime.stop()


async def stored_tasks(store: StateStore, agent_id: str) -> AsyncIterator[Task]:
    async for document in store.scan("tasks", (agent_id,)):
        yield Task.model_validate_json(document.body)


@pytest.mark.parametrize("jump", [-HOUR, HOUR, YEAR])
async def test_two_runtimes_and_a_jump_store_every_result_once(jump: float, tally: Tally) -> None:
    """Leases are wall-clock times: a jump may move an agent, and loses and doubles nothing."""
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    first = Watched(store, clock, "first", exclusive=False, lease_seconds=30)
    second = Watched(store, clock, "second", exclusive=False, lease_seconds=30)
    tasks = await first.begin()
    await clock.advance(5)
    await second.runtime.start()
    await clock.advance(7)  # from here on the second is the next to look at the leases
    clock.jump(jump)
    for _ in range(30):
        await clock.advance(max(0.0, -jump) / 20 + 31)
    done = [await second.runtime.tasks.get(task) for task in tasks]
    tally.points, tally.faults = len(done), 1
    tally.lost = sum(task.status != "completed" for task in done)
    assert [task.status for task in done] == ["completed"] * 4
    assert (first.twice, second.twice) == ([], [])
    assert bool(second.runs) == (jump > 0), "after a jump ahead every lease has expired"
    [long] = [task for task in done if task.name == "long"]
    assert long.result == "long"
    assert long.interruptions == (1 if jump > 0 else 0)
    for runtime in (first.runtime, second.runtime):
        await runtime.stop()
