"""Hooks are called when a task fails or dies and after a restore, and can disturb nothing."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from agent_state import (
    MemoryStateStore,
    RestoreReport,
    RetryPolicy,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import hanging, make_runtime, with_agent, working

AT_ONCE = RetryPolicy(base_seconds=0.0, jitter=0.0)


async def test_a_failure_and_a_death_are_told_with_the_task_and_its_error() -> None:
    runtime = make_runtime(retry=AT_ONCE)
    told: list[tuple[str, str, int, str]] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        raise KeyError(ctx.attempt)

    @runtime.on_failure
    async def failed(task: Task, error: BaseException | None) -> None:
        told.append(("failed", task.status, task.attempts, repr(error)))

    @runtime.on_dead
    def died(task: Task, error: BaseException | None) -> None:
        assert threading.current_thread() is not threading.main_thread()
        told.append(("died", task.status, task.attempts, repr(error)))

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x", max_attempts=2)
    with pytest.raises(TaskFailedError):
        await soon(runtime.tasks.result(task))
    await until(lambda: len(told) == 3)
    assert sorted(told) == [
        ("died", "dead", 2, "KeyError(2)"),
        ("failed", "dead", 2, "KeyError(2)"),
        ("failed", "failed", 1, "KeyError(1)"),
    ]
    await runtime.stop()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
async def test_an_error_of_a_hook_is_logged_and_changes_nothing(
    caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    runtime = make_runtime(retry=AT_ONCE)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        if ctx.attempt == 1:
            raise KeyError("first")
        return ctx.attempt

    @runtime.on_failure
    async def meddle(task: Task, _: BaseException | None) -> None:
        task.status, task.payload["n"] = "completed", "changed"
        raise error

    await with_agent(runtime)
    with caplog.at_level(logging.ERROR, logger="agent_state.runtime"):
        task = await runtime.tasks.submit("alice", "x", {"n": 1})
        assert await soon(runtime.tasks.result(task)) == 2
        await until(lambda: caplog.records)
    [record] = caplog.records
    assert "on_failure" in record.getMessage()
    assert "meddle" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert (await runtime.tasks.get(task)).payload == {"n": 1}
    await runtime.stop()


async def test_a_hook_that_hangs_delays_no_agent_and_ends_with_the_runtime() -> None:
    runtime = make_runtime(retry=AT_ONCE, cancel_timeout_seconds=0.01)
    ended: list[str] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        if ctx.attempt == 1:
            raise KeyError("first")
        return 1

    @runtime.on_failure
    async def hang(task: Task, _: BaseException | None) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x")
    assert await soon(runtime.tasks.result(task)) == 1
    await runtime.wait_idle()
    await soon(runtime.stop())
    assert ended == ["cancelled"]


async def test_a_restore_is_told_and_so_is_a_task_whose_process_died_too_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    first = make_runtime(store, clock)
    started = hanging(first)
    await with_agent(first)
    task = await first.tasks.submit("alice", "x")
    await started.wait()
    await first.abort()

    second = make_runtime(store, clock, name="b", retry=RetryPolicy(max_interruptions=0))
    working(second)
    reports: list[RestoreReport] = []
    dead: list[tuple[str, BaseException | None]] = []

    @second.on_restore
    async def restored(report: RestoreReport) -> None:
        reports.append(report)

    @second.on_dead
    async def died(task: Task, error: BaseException | None) -> None:
        dead.append((task.task_id, error))

    with caplog.at_level(logging.ERROR, logger="agent_state.runtime"):
        await second.start()
        await until(lambda: reports and dead)
    assert reports == [second.report]
    assert dead == [(task.task_id, None)]
    assert f"task alice/{task.task_id} (x) is dead: its process died" in caplog.text
    await second.stop()


def test_what_cannot_be_called_is_no_hook() -> None:
    runtime = make_runtime()
    with pytest.raises(TypeError, match="a hook is a function"):
        runtime.on_dead("nothing")  # type: ignore[type-var]
