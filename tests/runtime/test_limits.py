"""Limits: how many attempts run at once, and how much is used within a period."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RateLimit,
    StateValidationError,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.runtime.rate_limits import UsageWindow
from agent_state.testing import FakeClock
from tests.deadlines import until
from tests.runtime.runtimes import TroubledStore, make_runtime, puts, with_agent

START = datetime(2026, 1, 1, tzinfo=UTC)
CALLS = RateLimit("calls", 100)

Use = tuple[float, float]
"""When, and how much."""


def most_in_a_period(used: Sequence[Use], seconds: float) -> float:
    """The most that was used in any period of that length."""
    return max(
        sum(amount for at, amount in used if begin <= at < begin + seconds) for begin, _ in used
    )


async def with_agents(runtime: AsyncAgentSessionManager, count: int) -> list[str]:
    names = [f"agent-{number}" for number in range(count)]
    for name in names:
        await runtime.agents.create(name, agent_type="worker")
    return names


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(2000):
        await asyncio.sleep(0)


# -- the window ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), min_size=1, max_size=60),
    st.sampled_from([1.0, 7.0, 60.0, 0.3]),
    st.booleans(),
)
def test_no_period_has_more_than_the_limit_whoever_asks_when(
    asked: list[tuple[float, int]], seconds: float, stored: bool
) -> None:
    limit = RateLimit("x", 100, per_seconds=seconds)
    window, now, used = UsageWindow(limit), 0.0, list[Use]()
    for pause, amount in asked:
        now += pause
        while wait := window.wait_seconds(amount, START + timedelta(seconds=now)):
            assert wait <= seconds * 1.01 + 1e-3
            now += wait
        window.use(amount, START + timedelta(seconds=now))
        used.append((now, amount))
        if stored:  # as after a restart
            window = UsageWindow(limit, window.to_json())
    assert most_in_a_period(used, seconds - 1e-5) <= 100


def test_what_waits_all_the_time_gets_99_percent() -> None:
    limit = RateLimit("x", 50, per_seconds=10)
    window, now, count = UsageWindow(limit), 0.0, 0
    while now < 1000:
        wait = window.wait_seconds(1, START + timedelta(seconds=now))
        if wait:
            now += wait
        else:
            window.use(1, START + timedelta(seconds=now))
            count += 1
    assert 0.98 * 5000 <= count <= 5050


def test_what_was_used_by_a_clock_that_went_back_counts_from_now() -> None:
    limit = RateLimit("x", 10)
    window = UsageWindow(limit)
    window.use(10, START + timedelta(hours=1))
    assert 0 < window.wait_seconds(1, START) <= 61
    assert window.wait_seconds(1, START + timedelta(seconds=61)) == 0


def test_a_hand_edit_of_what_was_used_is_no_error() -> None:
    window = UsageWindow(RateLimit("x", 10), {"yesterday": 5, "2026-01-01T00:00:00Z": "much"})
    assert window.wait_seconds(10, START) == 0


@pytest.mark.parametrize("number", [0, -1, math.nan, math.inf, "9"])
def test_a_limit_is_positive(number: Any) -> None:
    with pytest.raises(StateValidationError, match="amount of 'x' is positive"):
        RateLimit("x", number)
    with pytest.raises(StateValidationError, match="per_seconds of 'x' is positive"):
        RateLimit("x", 1, per_seconds=number)


# -- rate limits of handlers ---------------------------------------------------------------------


async def test_fifty_agents_keep_to_the_limit_over_minutes() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    used: list[Use] = []

    @runtime.task("call", agent_type="worker", rate_limits=[CALLS])
    async def call(ctx: TaskContext) -> None:
        used.append((clock.monotonic(), 1))

    await runtime.start()
    for name in await with_agents(runtime, 50):
        for _ in range(20):
            await runtime.tasks.submit(name, "call")
    for minute in range(1, 6):
        await clock.advance(60)
        assert 98 * minute <= len(used) <= 100 * minute
    assert most_in_a_period(used, 60) <= 100
    await runtime.stop()


async def test_tokens_are_taken_in_the_handler_and_corrected_by_what_was_used() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    tokens = RateLimit("tokens", 10_000)
    used: list[Use] = []

    @runtime.task("call", agent_type="worker")
    async def call(ctx: TaskContext, task: Task) -> None:
        await ctx.take(tokens, 500)
        real = task.payload["real"]
        used.append((clock.monotonic(), real))
        await ctx.take(tokens, real - 500, wait=False)

    await runtime.start()
    names = await with_agents(runtime, 50)
    for number in range(600):
        await runtime.tasks.submit(names[number % 50], "call", {"real": 300 if number % 3 else 600})
    await clock.advance(300)
    total = sum(amount for _, amount in used)
    assert 0.93 * 50_000 <= total <= 1.02 * 50_000
    assert most_in_a_period(used, 60) <= 10_000 + 50 * 100  # those that were in flight at once
    await runtime.stop()


async def test_what_an_estimate_was_too_much_is_given_back_to_the_time_of_the_estimate() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    tokens = RateLimit("tokens", 10_000)
    used: list[Use] = []

    @runtime.task("call", agent_type="worker")
    async def call(ctx: TaskContext, task: Task) -> None:
        await ctx.take(tokens, 500)
        used.append((clock.monotonic(), 100))
        await clock.sleep(task.payload["seconds"])
        await ctx.take(tokens, -400, wait=False)

    await runtime.start()
    names = await with_agents(runtime, 50)
    for number in range(2000):
        await runtime.tasks.submit(names[number % 50], "call", {"seconds": 5 + number % 50})
    await clock.advance(300)
    assert most_in_a_period(used, 60) <= 10_000
    stored = await runtime.manager.load("system", ("limits", "tokens"))
    assert stored is not None
    assert min(stored.model_dump()["used"].values()) >= 0
    await runtime.stop()


@pytest.mark.parametrize("busy_seconds", [30, 300])
async def test_what_was_granted_to_agents_that_were_busy_makes_no_burst(busy_seconds: int) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    used: list[Use] = []
    quota = RateLimit("calls", 10)

    @runtime.task("call", agent_type="worker", rate_limits=[quota])
    async def call(ctx: TaskContext) -> None:
        used.append((clock.monotonic(), 1))

    @runtime.task("long", agent_type="worker")
    async def long(ctx: TaskContext) -> None:
        await clock.sleep(busy_seconds)

    await runtime.start()
    names = await with_agents(runtime, 40)
    for name in names:
        await runtime.tasks.submit(name, "call")
        await settle()
    for name in names[10:]:
        await runtime.tasks.submit(name, "long")  # it begins at once: the call waits for its limit
    for name in names:
        await runtime.tasks.submit(name, "call")
    await clock.advance(900)
    assert most_in_a_period(used, 60) <= 10
    assert len(used) == 80
    await runtime.stop()


async def test_a_limit_of_calls_and_one_of_attempts_at_once_hold_both() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    used: list[Use] = []
    slow, running, most = True, 0, 0

    @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("calls", 10)], concurrency=2)
    async def call(ctx: TaskContext) -> None:
        nonlocal running, most
        used.append((clock.monotonic(), 1))
        running += 1
        most = max(most, running)
        await clock.sleep(100 if slow else 0.01)
        running -= 1

    await runtime.start()
    for name in await with_agents(runtime, 40):
        await runtime.tasks.submit(name, "call")
    await clock.advance(350)  # two at a time, while all 40 are granted a call
    assert len(used) == 8
    slow = False
    await clock.advance(250)
    assert most_in_a_period(used, 60) <= 10
    assert most == 2
    assert len(used) == 40
    await runtime.stop()


async def test_a_call_that_waited_for_a_busy_agent_is_its_next_task() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    ran: list[str] = []

    @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("calls", 1)])
    async def call(ctx: TaskContext) -> None:
        ran.append(ctx.agent_id)

    @runtime.task("long", agent_type="worker")
    async def long(ctx: TaskContext) -> None:
        await clock.sleep(200)

    await runtime.start()
    names = await with_agents(runtime, 4)
    await runtime.tasks.submit(names[1], "call")
    await clock.advance(1)
    await runtime.tasks.submit(names[0], "call")
    for _ in range(20):
        await runtime.tasks.submit(names[0], "long")  # always something else to do
    for _ in range(20):
        for name in names[1:]:
            await runtime.tasks.submit(name, "call")  # the limit is always used up
    await clock.advance(300)
    assert ran[0] == names[1]
    assert names[0] in ran
    await runtime.stop()


async def test_a_grant_of_a_cancelled_task_is_used_by_the_next_and_an_urgent_task_goes_first() -> (
    None
):
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)
    ran: list[str] = []

    @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("calls", 1)])
    async def call(ctx: TaskContext) -> None:
        ran.append("call")

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        ran.append(task.name)

    await with_agent(runtime)
    await runtime.tasks.submit("alice", "call")
    await clock.advance(1)
    waits = await runtime.tasks.submit("alice", "call")
    await clock.advance(10)
    await runtime.tasks.cancel(waits)
    await clock.advance(100)  # it was granted at 60 s, and nobody wanted it
    assert ran == ["call"]
    await runtime.tasks.submit("alice", "call")
    await clock.advance(1)
    assert ran == ["call", "call"]
    await runtime.tasks.submit("alice", "call")
    await clock.advance(1)
    assert ran == ["call", "call"]  # the one before counts from when it was made
    await runtime.tasks.submit("alice", "soon", priority="urgent")
    await clock.advance(1)
    assert ran == ["call", "call", "soon"]
    await clock.advance(60)
    assert ran[3:] == ["call"]
    await runtime.stop()


async def test_other_tasks_of_an_agent_go_on_while_one_waits_for_its_limit() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    ran: list[str] = []

    @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("rare", 1)])
    async def call(ctx: TaskContext) -> None:
        ran.append("call")

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        ran.append(task.name)

    await with_agent(runtime)
    for name in ("call", "call", "other", "third"):
        await runtime.tasks.submit("alice", name)
    idle = asyncio.ensure_future(runtime.wait_idle())
    await clock.advance(1)
    assert sorted(ran) == ["call", "other", "third"]
    assert not idle.done()  # one waits, and comes by itself
    await clock.advance(60)
    assert ran[-1] == "call"
    await idle
    await runtime.stop()


async def test_the_limit_of_a_handler_of_all_tasks_is_used_once_by_each() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    ran: list[float] = []

    @runtime.handler("worker", rate_limits=[RateLimit("rare", 2), RateLimit("rarer", 3, 600)])
    async def worker(ctx: TaskContext, task: Task) -> None:
        ran.append(clock.monotonic())

    await with_agent(runtime)
    for number in range(4):
        await runtime.tasks.submit("alice", f"name {number}")
    await clock.advance(599)
    assert len(ran) == 3
    await clock.advance(60)
    assert len(ran) == 4
    await runtime.stop()


async def test_urgent_tasks_of_all_agents_are_served_first() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    ran: list[str] = []

    @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("one", 1, 10)])
    async def call(ctx: TaskContext, task: Task) -> None:
        ran.append(f"{ctx.agent_id} {task.priority}")

    await runtime.start()
    names = await with_agents(runtime, 4)
    await runtime.tasks.submit(names[0], "call")
    await clock.advance(1)
    for name, priority in zip(names[1:], ("low", "urgent", "normal"), strict=True):
        await runtime.tasks.submit(name, "call", priority=priority)  # type: ignore[arg-type]
        await clock.advance(0)
    await clock.advance(35)
    assert ran == ["agent-0 normal", "agent-2 urgent", "agent-3 normal", "agent-1 low"]
    await runtime.stop()


async def test_two_runtimes_share_a_limit() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    used: list[Use] = []
    runtimes = []
    for number in range(2):
        runtime = make_runtime(store, clock, name=f"r{number}", exclusive=False)

        @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("calls", 10)])
        async def call(ctx: TaskContext) -> None:
            used.append((clock.monotonic(), 1))

        await runtime.start()
        name = f"agent of {number}"
        await runtime.agents.create(name, agent_type="worker")
        for _ in range(30):
            await runtime.tasks.submit(name, "call")
        runtimes.append(runtime)
    for _ in range(119):
        await settle()
        await clock.advance(1)
    assert len(used) == 20
    assert most_in_a_period(used, 60) <= 10
    for runtime in runtimes:
        await runtime.stop()


async def test_what_was_used_before_a_crash_counts_after_it() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    used: list[Use] = []
    for number in range(4):
        runtime = make_runtime(store, clock, name=f"r{number}")

        @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("calls", 10)])
        async def call(ctx: TaskContext) -> None:
            used.append((clock.monotonic(), 1))

        await with_agent(runtime)
        for _ in range(20):
            await runtime.tasks.submit("alice", "call")
        for _ in range(20):
            await settle()
            await clock.advance(1)
        await runtime.abort()
    assert most_in_a_period(used, 60) <= 10
    assert len(used) == 20  # at 0 s and at 61 s
    stored = await store.get("system", ("limits", "calls"))
    assert stored is not None
    assert list(json.loads(stored.body)["used"].values()) == [10]


@pytest.mark.parametrize("fault", ["full", "unknown"])
async def test_nothing_is_granted_that_could_not_be_stored(fault: str) -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)
    used: list[Use] = []

    @runtime.task("call", agent_type="worker", rate_limits=[RateLimit("calls", 4)])
    async def call(ctx: TaskContext) -> None:
        used.append((clock.monotonic(), 1))

    await with_agent(runtime)
    setattr(store, fault, puts("system", '"used"'))
    for _ in range(4):
        await runtime.tasks.submit("alice", "call")
    await clock.advance(0.5)
    assert used == []
    store.full = lambda _: False
    await clock.advance(30)
    assert len(used) == (4 if fault == "full" else 3)  # one may have been used
    await clock.advance(61)
    assert len(used) == 4
    await runtime.stop()


async def test_more_than_the_limit_and_what_is_no_amount_are_refused() -> None:
    runtime = make_runtime()
    wrong: list[Any] = [101, 0, -1, math.nan, "5"]

    @runtime.task("call", agent_type="worker", max_attempts=1)
    async def call(ctx: TaskContext) -> int:
        refused = 0
        for amount in wrong:
            try:
                await ctx.take(CALLS, amount)
            except StateValidationError:
                refused += 1
        return refused

    @runtime.task("twice", agent_type="worker", max_attempts=1)
    async def twice(ctx: TaskContext) -> None:
        await ctx.take(CALLS)
        await ctx.take(RateLimit("calls", 7))

    await with_agent(runtime)
    assert await runtime.tasks.result(await runtime.tasks.submit("alice", "call")) == len(wrong)
    with pytest.raises(TaskFailedError, match="two rate limits named 'calls'"):
        await runtime.tasks.result(await runtime.tasks.submit("alice", "twice"))
    await runtime.stop()


async def test_an_attempt_that_is_cancelled_while_it_waits_for_tokens_takes_none() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    tokens = RateLimit("tokens", 100)
    used: list[str] = []

    @runtime.task("call", agent_type="worker")
    async def call(ctx: TaskContext) -> None:
        await ctx.take(tokens, 60)
        used.append(ctx.agent_id)

    await runtime.start()
    names = await with_agents(runtime, 3)
    tasks = []
    for name in names:
        tasks.append(await runtime.tasks.submit(name, "call"))
        await clock.advance(0)
    await runtime.tasks.cancel(tasks[1])
    await clock.advance(61)
    assert used == [names[0], names[2]]
    await runtime.stop()


# -- concurrency ---------------------------------------------------------------------------------


class Busy:
    """A handler that runs until it is let go, and counts."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.most = 0
        self.done: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def __call__(self, ctx: TaskContext) -> None:
        self.running.append(ctx.agent_id)
        self.most = max(self.most, len(self.running))
        gate = self.gates[ctx.agent_id] = asyncio.Event()
        await gate.wait()
        self.running.remove(ctx.agent_id)
        self.done.append(ctx.agent_id)


@pytest.fixture
def busy() -> Busy:
    return Busy()


async def test_no_more_attempts_of_a_handler_run_at_once_than_it_says(busy: Busy) -> None:
    runtime = make_runtime()

    @runtime.task("call", agent_type="worker", concurrency=3)
    async def call(ctx: TaskContext) -> None:
        await busy(ctx)

    await runtime.start()
    names = await with_agents(runtime, 20)
    for name in names:
        await runtime.tasks.submit(name, "call")
    while len(busy.done) < 20:
        await settle()
        assert len(busy.running) == min(3, 20 - len(busy.done))
        busy.gates[busy.running[0]].set()
        await settle()
    assert busy.most == 3
    await runtime.wait_idle()
    await runtime.stop()


async def test_an_agent_that_has_something_better_to_do_leaves_the_place_to_others(
    busy: Busy,
) -> None:
    runtime = make_runtime()
    long = asyncio.Event()

    @runtime.task("call", agent_type="worker", concurrency=1)
    async def call(ctx: TaskContext) -> None:
        await busy(ctx)

    @runtime.task("long", agent_type="worker")
    async def other(ctx: TaskContext) -> None:
        await long.wait()

    await runtime.start()
    names = await with_agents(runtime, 4)
    for name in names:
        await runtime.tasks.submit(name, "call")
        await settle()
    assert busy.running == [names[0]]
    await runtime.tasks.submit(names[1], "long")  # it begins at once: its call waits
    await runtime.agents.sleep(names[2])
    await settle()
    await runtime.tasks.submit(names[3], "long", delay_seconds=1000)
    busy.gates[names[0]].set()
    await settle()
    assert busy.running == [names[3]]
    long.set()
    busy.gates[names[3]].set()
    await settle()
    assert busy.running == [names[1]]
    busy.gates[names[1]].set()
    await runtime.agents.wake(names[2])
    await settle()
    assert busy.running == [names[2]]
    busy.gates[names[2]].set()
    await runtime.stop()


async def test_a_parent_that_waits_for_its_children_takes_no_place_of_theirs() -> None:
    runtime = make_runtime()

    @runtime.task("work", agent_type="worker", concurrency=1)
    async def work(ctx: TaskContext, task: Task) -> int:
        depth = task.payload["depth"]
        if depth == 0:
            return 1
        other = "bob" if ctx.agent_id == "alice" else "alice"
        child = await ctx.submit(other, "work", {"depth": depth - 1})
        return 1 + int(await ctx.result(child))

    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="worker")
    task = await runtime.tasks.submit("alice", "work", {"depth": 6})
    assert await runtime.tasks.result(task) == 7
    await runtime.stop()


@pytest.mark.parametrize("ends", ["fails", "times out", "is cancelled"])
async def test_an_attempt_that_does_not_return_gives_its_place_back(ends: str) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    ran: list[str] = []

    @runtime.task("call", agent_type="worker", concurrency=1, max_attempts=1, timeout_seconds=5)
    async def call(ctx: TaskContext) -> None:
        ran.append(ctx.agent_id)
        if len(ran) == 1:
            if ends == "fails":
                raise ConnectionError
            await asyncio.Event().wait()

    await runtime.start()
    names = await with_agents(runtime, 2)
    first = await runtime.tasks.submit(names[0], "call")
    await until(lambda: ran)
    await runtime.tasks.submit(names[1], "call")
    if ends == "is cancelled":
        await runtime.tasks.cancel(first)
    await clock.advance(6)
    await until(lambda: ran == names)
    await runtime.stop()


# -- real processes ------------------------------------------------------------------------------

SERVER = """
import asyncio, sys, time
from agent_state import AsyncAgentSessionManager, RateLimit, TaskContext

runtime = AsyncAgentSessionManager(sys.argv[1])

@runtime.task("call", agent_type="worker", rate_limits=[RateLimit("calls", 20, per_seconds=3)])
async def call(ctx: TaskContext) -> None:
    print(time.time(), flush=True)

async def main():
    async with runtime:
        for number in range(50):
            await runtime.agents.create(f"agent-{number}", agent_type="worker")
            for _ in range(20):
                await runtime.tasks.submit(f"agent-{number}", "call")
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.long("real seconds pass")
def test_a_server_that_is_killed_again_and_again_keeps_to_the_limit(tmp_path: Path) -> None:
    used: list[Use] = []
    for calls in (20, 5, 21):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, tmp_path / "state"], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(calls)]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        used += [(float(line), 1) for line in lines if line.endswith("\n")]
    # A call is granted before it is printed: by a moment, which may be longer at its end.
    assert most_in_a_period(used, 2.5) <= 20
    assert len(used) >= 46
