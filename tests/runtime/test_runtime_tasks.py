"""What the runtime does with tasks."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    StateNotFoundError,
    StateValidationError,
    Task,
    TaskContext,
    TaskFailedError,
    UnknownStepError,
)
from agent_state.models import Priority
from agent_state.testing import FakeClock
from tests.runtime.living import die, make_runtime, until


async def with_agent(runtime: AsyncAgentSessionManager) -> None:
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")


async def test_a_task_is_done_and_its_result_stored() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        ctx.memory["seen"] = task.payload["n"]
        return {"twice": task.payload["n"] * 2}

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "double", {"n": 21})
    assert await runtime.tasks.result(task) == {"twice": 42}
    stored = await runtime.tasks.get(task)
    assert (stored.status, stored.attempts, stored.lease) == ("completed", 1, None)
    agent = await runtime.manager.load_agent_state("alice")
    assert agent is not None
    assert (agent.context.working_memory, agent.status) == ({"seen": 21}, "idle")
    await runtime.stop()


async def test_while_a_handler_runs_its_lease_is_renewed() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, lease_seconds=30)
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        await go.wait()

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "wait")
    await until(lambda: runtime.runner.running_handlers)
    first = (await runtime.tasks.get(task)).lease
    await clock.advance(25)
    second = (await runtime.tasks.get(task)).lease
    assert first is not None
    assert second is not None
    assert second.expires_at > first.expires_at
    go.set()
    await runtime.wait_idle()
    await runtime.stop()


async def test_failures_wait_longer_each_time_and_end_as_a_dead_letter() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=RetryPolicy(base_seconds=10, jitter=0))
    times = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        times.append(ctx.now())
        raise RuntimeError(f"attempt {ctx.attempt}")

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "fail")
    waiting = asyncio.create_task(runtime.tasks.result(task))
    await clock.advance(100)
    with pytest.raises(TaskFailedError, match="RuntimeError: attempt 3") as caught:
        await waiting
    assert caught.value.status == "dead"
    gaps = [(b - a).total_seconds() for a, b in pairwise(times)]
    assert gaps == [10, 20]
    await runtime.stop()


async def test_priority_first_then_age_and_nothing_before_its_time() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    done: list[str] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        done.append(task.name)

    await runtime.start()
    await runtime.agents.create("alice", agent_type="later")
    ranked: list[tuple[str, Priority]] = [
        ("a", "normal"),
        ("b", "low"),
        ("c", "urgent"),
        ("d", "normal"),
    ]
    for name, priority in ranked:
        await runtime.tasks.submit("alice", name, priority=priority)
    await runtime.tasks.submit("alice", "e", priority="urgent", delay_seconds=60)
    runtime.handler("later")(worker)
    await runtime.wait_idle()
    assert done == ["c", "a", "d", "b"]
    await clock.advance(60)
    assert done[-1] == "e"
    await runtime.stop()


async def test_a_dedupe_key_gives_one_task() -> None:
    runtime = make_runtime()
    runs = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        runs.append(task.task_id)

    await with_agent(runtime)
    first = await runtime.tasks.submit("alice", "once", dedupe_key="readme")
    await runtime.wait_idle()
    second = await runtime.tasks.submit("alice", "once", dedupe_key="readme")
    await runtime.wait_idle()
    assert first.task_id == second.task_id
    assert second.status == "completed"
    assert len(runs) == 1
    await runtime.stop()


async def test_a_task_that_takes_too_long_fails() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        await asyncio.Event().wait()

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "hang", timeout_seconds=5, max_attempts=1)
    waiting = asyncio.create_task(runtime.tasks.result(task))
    await until(lambda: runtime.runner.running_handlers)
    await clock.advance(6)
    with pytest.raises(TaskFailedError, match="not done within 5 s"):
        await waiting
    await runtime.stop()


async def test_cancelling_ends_a_waiting_and_a_running_task() -> None:
    runtime = make_runtime()
    started = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    await with_agent(runtime)
    running = await runtime.tasks.submit("alice", "run")
    queued = await runtime.tasks.submit("alice", "wait")
    await started.wait()
    assert await runtime.tasks.cancel(queued)
    assert await runtime.tasks.cancel(running)
    for task in (running, queued):
        with pytest.raises(TaskFailedError, match="cancelled"):
            await runtime.tasks.result(task)
    assert not await runtime.tasks.cancel(running)
    await runtime.stop()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
async def test_a_handler_that_raises_what_ends_a_process_ends_only_its_attempt(
    error: BaseException,
) -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        if task.name == "bad":
            raise error
        return "fine"

    await with_agent(runtime)
    bad = await runtime.tasks.submit("alice", "bad", max_attempts=1)
    good = await runtime.tasks.submit("alice", "good")
    assert await runtime.tasks.result(good) == "fine"
    assert (await runtime.tasks.get(bad)).status == "dead"
    await runtime.stop()


async def test_a_result_that_is_not_json_is_an_error_that_says_where() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        return {"found": {1, 2}}

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "set")
    with pytest.raises(TaskFailedError, match=r"result\.found.*set"):
        await runtime.tasks.result(task)
    await runtime.stop()


async def test_progress_and_finished_steps_are_there_in_the_next_attempt() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    calls: list[str] = []

    def read(name: str) -> str:
        calls.append(name)
        return name.upper()

    async def judge(text: str) -> dict[str, Any]:
        calls.append("judge")
        return {"good": text == "FILE"}

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        text = await ctx.step("read", read, "file")
        await ctx.checkpoint({"read": True})
        verdict = await ctx.step("judge", judge, text)
        if ctx.attempt == 1:
            raise RuntimeError("once")
        return [ctx.progress, verdict]

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "work")
    result = asyncio.create_task(runtime.tasks.result(task))
    await until(lambda: calls == ["file", "judge"])
    await until(lambda: not runtime.runner.running_handlers)
    await clock.advance(10)
    assert await result == [{"read": True}, {"good": True}]
    assert calls == ["file", "judge"]
    await runtime.stop()


async def test_steps_side_by_side_do_not_undo_one_another() -> None:
    runtime = make_runtime()

    async def number(n: int) -> int:
        await asyncio.sleep(0)
        return n

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        return await asyncio.gather(*(ctx.step(f"s{n}", number, n) for n in range(20)))

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "many")
    assert await runtime.tasks.result(task) == list(range(20))
    steps = (await runtime.tasks.get(task)).steps
    assert {name: step.result for name, step in steps.items()} == {f"s{n}": n for n in range(20)}
    await runtime.stop()


async def test_one_name_for_two_steps_is_refused() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        await ctx.step("same", int)
        await ctx.step("same", int)

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "twice", max_attempts=1)
    with pytest.raises(TaskFailedError, match="give each step its own name"):
        await runtime.tasks.result(task)
    await runtime.stop()


@pytest.mark.parametrize("policy", ["retry", "fail"])
async def test_a_step_whose_process_died_is_unknown_and_follows_its_policy(policy: Any) -> None:
    store, charged = MemoryStateStore(), []
    hang = asyncio.Event()

    async def charge() -> str:
        charged.append(1)
        await hang.wait()
        return "charged"

    def prepare() -> tuple[AsyncAgentSessionManager, list[list[str]]]:
        runtime, unknown = make_runtime(store), []

        @runtime.handler("worker")
        async def worker(ctx: TaskContext, task: Task) -> object:
            unknown.append(ctx.unknown_steps)
            step = ctx.step if policy == "retry" else ctx.step_at_most_once
            return await step("charge", charge)

        return runtime, unknown

    runtime, _ = prepare()
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "pay")
    await until(lambda: charged)
    await die(runtime)

    hang.set()
    runtime, unknown = prepare()
    report = await runtime.start()
    assert [requeued.unknown_steps for requeued in report.requeued] == [("charge",)]
    if policy == "retry":
        assert await runtime.tasks.result(task) == "charged"
        assert len(charged) == 2
    else:
        with pytest.raises(TaskFailedError, match="may have had its effect") as caught:
            await runtime.tasks.result(task)
        assert caught.value.status == "dead"
        assert UnknownStepError.__name__ in (caught.value.error or "")
        assert len(charged) == 1
    assert unknown == [["charge"]]
    await runtime.stop()


async def test_work_for_nobody_is_refused() -> None:
    async with make_runtime() as runtime:
        with pytest.raises(StateNotFoundError, match="no such agent"):
            await runtime.tasks.submit("nobody", "x")


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
