"""Failures are reported: attempts, dead tasks, missing handlers and recipients, hung handlers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_state import (
    AgentRuntime,
    MemoryStateStore,
    RetryPolicy,
    StateValidationError,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.testing import FakeClock
from tests.deadlines import until
from tests.runtime.runtimes import make_runtime, with_agent, working

ROOT = Path(__file__).parents[2]
AT_ONCE = RetryPolicy(base_seconds=0.0, jitter=0.0)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="agent_state.runtime"):
        yield caplog


def said(log: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    return [record for record in log.records if record.levelno == level]


def look_up(payload: dict[str, object]) -> object:
    return payload["doc"]


async def test_each_failed_attempt_is_logged_with_its_traceback_and_the_last_as_an_error(
    log: pytest.LogCaptureFixture,
) -> None:
    runtime = make_runtime(retry=AT_ONCE)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        look_up(task.payload)

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "index", {"text": "x"}, max_attempts=2)
    with pytest.raises(TaskFailedError) as raised:
        await runtime.tasks.result(task)
    cause = raised.value.__cause__
    assert isinstance(cause, KeyError)
    [warning] = said(log, logging.WARNING)
    [error] = said(log, logging.ERROR)
    for record in (warning, error):
        assert "alice" in record.getMessage()
        assert task.task_id in record.getMessage()
        assert "index" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[0] is KeyError
    assert "attempt 1 of 2" in warning.getMessage()
    assert "dead" in error.getMessage()
    stored = await runtime.tasks.get(task)
    assert stored.error == "KeyError: 'doc'"
    assert stored.traceback is not None
    assert "look_up" in stored.traceback
    assert f'File "{Path(__file__).relative_to(ROOT)}", line' in stored.traceback
    assert str(ROOT) not in stored.traceback
    assert "runner.py" not in stored.traceback
    assert 'return payload["doc"]' in stored.traceback
    await runtime.stop()


async def test_the_cause_of_a_death_is_known_to_who_asks_later_and_to_the_parent() -> None:
    store = MemoryStateStore(clock=FakeClock())
    runtime = make_runtime(store, retry=AT_ONCE)
    causes: list[BaseException | None] = []

    @runtime.task("child", agent_type="worker", max_attempts=1)
    async def child(ctx: TaskContext, task: Task) -> None:
        look_up(task.payload)

    @runtime.task("parent", agent_type="worker")
    async def parent(ctx: TaskContext) -> None:
        try:
            await ctx.result(await ctx.submit("alice", "child"))
        except TaskFailedError as error:
            causes.append(error.__cause__)

    await with_agent(runtime)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "parent"))
    assert [type(cause) for cause in causes] == [KeyError]

    task = await runtime.tasks.submit("alice", "child")
    await runtime.wait_idle()
    for asked in (task, task.task_id):
        with pytest.raises(TaskFailedError) as raised:
            await runtime.tasks.result(asked)
        assert isinstance(raised.value.__cause__, KeyError)

    # It died elsewhere since, of another cause, which is not known here.
    async with runtime.manager.edit("tasks", ("alice", task.task_id)) as stored:
        stored.error = "OSError: the disk"
    with pytest.raises(TaskFailedError, match="the disk") as raised:
        await runtime.tasks.result(task)
    assert raised.value.__cause__ is None

    for _ in range(100):
        await runtime.tasks.submit("alice", "child")
    await runtime.wait_idle()
    assert len(runtime.state.causes) < 100  # they hold what their handlers held
    await runtime.stop()


async def test_the_causes_of_an_error_and_the_errors_of_a_group_name_no_path_either() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        errors: list[Exception] = []
        for number in (1, 2):
            try:
                try:
                    look_up({})
                except KeyError as error:
                    raise ValueError(number) from error
            except ValueError as error:
                errors.append(error)
        raise ExceptionGroup("several", errors)

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x", max_attempts=1)
    with pytest.raises(TaskFailedError):
        await runtime.tasks.result(task)
    traceback = (await runtime.tasks.get(task)).traceback
    assert traceback is not None
    assert traceback.count("look_up") >= 2
    assert "direct cause" in traceback
    assert str(ROOT) not in traceback
    await runtime.stop()


async def test_a_task_that_succeeds_in_the_end_keeps_no_traceback() -> None:
    runtime = make_runtime(retry=AT_ONCE)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        return 1 // (ctx.attempt - 1)

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x")
    assert await runtime.tasks.result(task) == 1
    assert (await runtime.tasks.get(task)).traceback is None
    await runtime.stop()


async def test_a_timeout_and_an_error_without_a_text_are_said_too(
    log: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    started = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        if task.name == "silent":
            raise AssertionError
        started.set()
        await asyncio.Event().wait()

    await with_agent(runtime)
    late = await runtime.tasks.submit("alice", "late", timeout_seconds=5, max_attempts=1)
    await started.wait()
    await clock.advance(6)
    silent = await runtime.tasks.submit("alice", "silent", max_attempts=1)
    for task, error in ((late, TimeoutError), (silent, AssertionError)):
        with pytest.raises(TaskFailedError) as raised:
            await runtime.tasks.result(task)
        del raised, error
    assert ["late" in r.getMessage() for r in said(log, logging.ERROR)] == [True, False]
    await runtime.stop()


async def test_an_agent_type_without_a_handler_is_said_when_it_is_created_and_given_a_task(
    log: pytest.LogCaptureFixture,
) -> None:
    runtime = make_runtime()
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.agents.create("bob", agent_type="wroker")
    await runtime.tasks.submit("alice", "x")
    messages = [record.getMessage() for record in said(log, logging.WARNING)]
    assert len(messages) == 1
    assert "bob" in messages[0]
    assert "'wroker'" in messages[0]
    assert "'worker'" in messages[0]  # the one that is registered
    await runtime.tasks.submit("bob", "errand")
    messages = [record.getMessage() for record in said(log, logging.WARNING)]
    assert len(messages) == 2
    assert "errand" in messages[1]
    await runtime.stop()


@pytest.mark.parametrize("created", ["before the start", "in an earlier run"])
async def test_agents_that_wait_for_a_handler_are_said_at_the_start_by_type(
    log: pytest.LogCaptureFixture, created: str
) -> None:
    store = MemoryStateStore(clock=FakeClock())
    runtime = make_runtime(store)
    working(runtime)
    await runtime.agents.create("alice", agent_type="worker")
    for name in ("bob", "carl", "dora"):
        await runtime.agents.create(name, agent_type="wroker")
    if created == "in an earlier run":
        await runtime.start()
        await runtime.stop()
        log.clear()
    await runtime.start()
    [warning] = said(log, logging.WARNING)
    assert "3 agents" in warning.getMessage()
    assert "'wroker'" in warning.getMessage()
    assert "'worker'" in warning.getMessage()
    assert "bob" in warning.getMessage()
    await runtime.stop()


async def test_mail_to_an_agent_that_does_not_exist_is_kept_and_said(
    log: pytest.LogCaptureFixture,
) -> None:
    runtime = make_runtime()
    working(runtime)
    await with_agent(runtime)
    await runtime.mail.send("carol", "alise", subject="hello")
    [warning] = said(log, logging.WARNING)
    assert "alise" in warning.getMessage()
    assert "alice" in warning.getMessage()
    await runtime.agents.create("alise", agent_type="worker")
    assert [mail.subject for mail in runtime.mail.inbox("alise")] == ["hello"]
    await runtime.mail.send("carol", "alise", subject="again")
    assert len(said(log, logging.WARNING)) == 1
    await runtime.stop()


async def test_a_handler_that_runs_for_long_is_said_with_its_stack(
    log: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    go = asyncio.Event()

    async def wait_for_a_model_that_never_answers() -> None:
        await go.wait()

    @runtime.handler("worker", warn_after_seconds=60)
    async def worker(ctx: TaskContext, task: Task) -> None:
        await wait_for_a_model_that_never_answers()

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "hang")
    await until(lambda: runtime.runner.running_handlers)
    await clock.advance(50)
    assert said(log, logging.WARNING) == []
    await clock.advance(60)
    [warning] = said(log, logging.WARNING)
    assert "alice" in warning.getMessage()
    assert task.task_id in warning.getMessage()
    assert "wait_for_a_model_that_never_answers" in warning.getMessage()
    await clock.advance(60)
    assert len(said(log, logging.WARNING)) == 2  # again after twice the time
    await clock.advance(60)
    assert len(said(log, logging.WARNING)) == 2
    go.set()
    await runtime.tasks.result(task)
    await runtime.stop()


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
async def test_a_time_to_warn_after_is_positive(seconds: float) -> None:
    runtime = make_runtime()
    with pytest.raises(StateValidationError, match="warn_after_seconds"):
        runtime.handler("worker", warn_after_seconds=seconds)


async def test_a_step_that_hangs_in_a_thread_is_said_with_the_stack_of_the_thread(
    log: pytest.LogCaptureFixture,
) -> None:
    runtime = AgentRuntime(store=MemoryStateStore())
    go = threading.Event()

    def ask_a_server_that_never_answers() -> None:
        go.wait()

    @runtime.handler("worker", warn_after_seconds=0.05)
    async def worker(ctx: TaskContext, task: Task) -> None:
        await ctx.step("ask", ask_a_server_that_never_answers)

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "hang")
    try:
        await until(lambda: any("go.wait()" in r.getMessage() for r in said(log, logging.WARNING)))
        assert "in ask_a_server_that_never_answers" in said(log, logging.WARNING)[-1].getMessage()
    finally:
        go.set()
    await runtime.tasks.result(task)
    await runtime.stop()


async def test_a_handler_that_blocks_the_event_loop_is_said_with_its_stack(
    log: pytest.LogCaptureFixture,
) -> None:
    runtime = make_runtime()
    go = threading.Event()

    def sees(record: logging.LogRecord) -> bool:
        if "event loop" in record.getMessage():
            go.set()
        return True

    def compute_for_hours() -> None:
        go.wait()

    @runtime.handler("worker", warn_after_seconds=0.05)
    async def worker(ctx: TaskContext, task: Task) -> None:
        compute_for_hours()

    await with_agent(runtime)
    log.handler.addFilter(sees)
    try:
        task = await runtime.tasks.submit("alice", "block")
        await runtime.tasks.result(task)  # nothing else on this loop runs until it was said
    finally:
        log.handler.removeFilter(sees)
    [said_first, *_] = said(log, logging.ERROR)
    assert "compute_for_hours" in said_first.getMessage()
    assert f"alice/{task.task_id}" in said_first.getMessage()
    await runtime.stop()
    assert not [each for each in threading.enumerate() if "blocked loop" in each.name]
