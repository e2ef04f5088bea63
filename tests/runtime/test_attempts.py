"""Attempts: steps, progress, and handlers that fail in every way."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    Task,
    TaskContext,
    TaskFailedError,
    UnknownStepError,
)
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    make_runtime,
    with_agent,
)


async def test_progress_and_finished_steps_are_there_in_the_next_attempt() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    calls: list[str] = []

    def read(name: str, *, upper: bool) -> str:
        calls.append(name)
        return name.upper() if upper else name

    async def judge(text: str) -> dict[str, Any]:
        calls.append("judge")
        return {"good": text == "FILE"}

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        text = await ctx.step("read", read, "file", upper=True)
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
    await runtime.abort()

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


async def test_what_a_handler_leaves_in_memory_and_no_file_can_hold_ends_its_task_alone() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        ctx.memory[task.name] = {"a set"} if task.name == "bad" else "good"
        return "done"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.result(await runtime.tasks.submit("alice", "first"))
        with pytest.raises(TaskFailedError, match=r"dead.*bad"):
            await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "bad")))
        assert (
            await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "last"))) == "done"
        )
        memory = runtime.agents.get("alice").context.working_memory
        assert memory == {"first": "good", "last": "good"}


@pytest.mark.parametrize(
    "wish",
    [{"until": datetime(2030, 1, 1)}, {"seconds": "5"}, {"seconds": 5, "reason": 5}],  # noqa: DTZ001
    ids=["a naive time", "text for seconds", "a number for a reason"],
)
async def test_a_sleep_that_cannot_be_stored_fails_its_task_and_nothing_else(wish: Any) -> None:
    runtime = make_runtime(retry=RetryPolicy(base_seconds=0, jitter=0))

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        if task.name == "sleep":
            await ctx.sleep(**wish)
        return "done"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        asleep = await runtime.tasks.submit("alice", "sleep", max_attempts=1)
        with pytest.raises(TaskFailedError, match="dead"):
            await soon(runtime.tasks.result(asleep))
        assert (
            await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "work"))) == "done"
        )


async def test_a_stopped_agent_stays_stopped_when_its_memory_cannot_be_stored() -> None:
    runtime = make_runtime()
    begun, go = asyncio.Event(), asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        begun.set()
        await go.wait()
        ctx.memory["bad"] = {"a set"}

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x")
    await begun.wait()
    runtime.state.agents["alice"].state.status = "stopped"  # by a caller whose save comes next
    go.set()
    with pytest.raises(TaskFailedError, match="dead"):
        await soon(runtime.tasks.result(task))
    assert runtime.agents.get("alice").status == "stopped"
    await runtime.stop()
