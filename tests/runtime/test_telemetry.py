"""Spans and metrics, as the real OpenTelemetry SDK gives them to an exporter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.telemetry import OpenTelemetry
from agent_state.testing import FakeClock
from tests.deadlines import until


class Exported:
    """A runtime's telemetry, and what an exporter was given."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = TracerProvider()
        self.tracing.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.metering = MeterProvider(metric_readers=[self._reader])
        self.telemetry = OpenTelemetry(tracer_provider=self.tracing, meter_provider=self.metering)
        self.tracer = self.tracing.get_tracer("application")

    def spans(self, name: str = "") -> list[ReadableSpan]:
        """Those whose name begins so, in the order of their starts."""
        found = [span for span in self._exporter.get_finished_spans() if span.name.startswith(name)]
        return sorted(found, key=lambda span: span.start_time or 0)

    def values(self, name: str) -> dict[tuple[str, ...], Any]:
        """The values of a metric, by those of its attributes; of a histogram its count."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            tuple(map(str, (point.attributes or {}).values())): getattr(point, "value", None)
            or getattr(point, "count", 0)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }


@pytest.fixture
def exported() -> Iterator[Exported]:
    made = Exported()
    yield made
    made.tracing.shutdown()
    made.metering.shutdown()


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    trace_id: int = span.context.trace_id
    return trace_id


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    assert parent.context is not None
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def runtime_of(exported: Exported, **settings: Any) -> AsyncAgentSessionManager:
    settings.setdefault("store", MemoryStateStore())
    retry = RetryPolicy(base_seconds=0.001, max_seconds=0.001)
    return AsyncAgentSessionManager(telemetry=exported.telemetry, retry=retry, **settings)


def count(text: str) -> int:
    return len(text)


async def test_a_task_is_one_trace_from_its_submission_to_the_save_of_its_end(
    exported: Exported,
) -> None:
    runtime = runtime_of(exported)

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> int:
        with exported.tracer.start_as_current_span("the handler's own"):
            return await ctx.step("count", count, "words")

    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        with exported.tracer.start_as_current_span("a request") as request:
            task = await runtime.tasks.submit("ann", "measure")
        assert await runtime.tasks.result(task) == 5

    [attempt], [submit] = exported.spans("attempt"), exported.spans("submit")
    [own], [step] = exported.spans("the handler's own"), exported.spans("step")
    assert {trace_of(span) for span in (attempt, submit, own, step)} == {
        request.get_span_context().trace_id
    }
    assert is_child(attempt, submit)
    assert is_child(own, attempt)
    assert is_child(step, own)
    assert attempt.name == "attempt measure"
    assert dict(attempt.attributes or {}) == {
        "agent_state.agent.id": "ann",
        "agent_state.agent.type": "worker",
        "agent_state.task.id": task.task_id,
        "agent_state.task.name": "measure",
        "agent_state.task.attempt": 1,
        "agent_state.task.status": "completed",
    }
    assert dict(step.attributes or {}) == {
        "agent_state.task.id": task.task_id,
        "agent_state.step.name": "count",
    }
    saves = [span for span in exported.spans("save") if trace_of(span) == trace_of(attempt)]
    # The submission is saved in the request; the step's start and end, and the task's end.
    assert [is_child(save, step) for save in saves].count(True) == 2
    assert is_child(saves[-1], attempt)
    submission, *others = saves
    assert dict(submission.attributes or {}) == {}  # it is another task's, or a program's
    assert [dict(save.attributes or {}) for save in others] == [
        {"agent_state.task.id": task.task_id}
    ] * 3


async def test_each_attempt_of_a_task_is_in_its_trace_and_a_failed_one_has_its_error(
    exported: Exported,
) -> None:
    runtime = runtime_of(exported)

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> None:
        raise ConnectionError("overloaded")

    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        task = await runtime.tasks.submit("ann", "call", max_attempts=2)
        with pytest.raises(TaskFailedError):
            await runtime.tasks.result(task)

    attempts = exported.spans("attempt")
    assert len({trace_of(span) for span in attempts}) == 1
    assert [dict(span.attributes or {})["agent_state.task.status"] for span in attempts] == [
        "failed", "dead",
    ]  # fmt: skip
    for span in attempts:
        assert span.status.status_code.name == "ERROR"
        assert span.status.description == "ConnectionError"
        assert [dict(event.attributes or {})["exception.message"] for event in span.events] == [
            "overloaded"
        ]


async def test_an_attempt_that_sleeps_or_is_cancelled_is_no_error(exported: Exported) -> None:
    clock = FakeClock()
    runtime = runtime_of(exported, clock=clock, store=MemoryStateStore(clock=clock))
    begun: list[str] = []

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> None:
        begun.append(task.name)
        if task.name == "sleep":
            await ctx.sleep(seconds=1000)
        await ctx._state.clock.sleep(10**6)

    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        await runtime.tasks.submit("ann", "sleep")
        await runtime.agents.create("bob", agent_type="worker")
        task = await runtime.tasks.submit("bob", "wait")
        await until(lambda: len(begun) == 2)
        await runtime.tasks.cancel(task)
        await until(lambda: len(exported.spans("attempt")) == 2)

    found = {span.name: span for span in exported.spans("attempt")}
    statuses = {
        name: dict(span.attributes or {})["agent_state.task.status"] for name, span in found.items()
    }
    assert statuses == {"attempt sleep": "pending", "attempt wait": "cancelled"}
    assert all(span.status.status_code.name == "UNSET" for span in found.values())


async def test_a_task_that_a_handler_submits_continues_the_trace(exported: Exported) -> None:
    runtime = runtime_of(exported)

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> None:
        if task.name == "parent":
            await ctx.submit("bob", "child")

    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        await runtime.agents.create("bob", agent_type="worker")
        await runtime.tasks.submit("ann", "parent")
        await runtime.wait_idle()

    [parent], [child] = exported.spans("attempt parent"), exported.spans("attempt child")
    [submit] = exported.spans("submit child")
    assert is_child(submit, parent)
    assert is_child(child, submit)


KILLED = """
import asyncio, os, signal, sys
from opentelemetry.sdk.trace import TracerProvider
from agent_state import AsyncAgentSessionManager
from agent_state.telemetry import OpenTelemetry

runtime = AsyncAgentSessionManager(
    sys.argv[1], telemetry=OpenTelemetry(tracer_provider=TracerProvider())
)


@runtime.handler("worker")
async def work(ctx, task):
    os.kill(os.getpid(), signal.SIGKILL)


async def main():
    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        await runtime.tasks.submit("ann", "work")
        await runtime.wait_idle()


asyncio.run(main())
"""


async def test_the_attempt_after_a_kill_is_in_the_trace_of_the_submission(
    exported: Exported, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(state)], check=False)
    assert killed.returncode == -signal.SIGKILL
    runtime = runtime_of(exported, store=None, state_dir=state)

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> None:
        pass

    async with runtime:
        await runtime.wait_idle()

    [file] = (state / "tasks" / "ann").glob("*.json")
    _, trace_id, parent_id, _ = json.loads(file.read_text())["trace"]["traceparent"].split("-")
    [attempt] = exported.spans("attempt")
    assert f"{trace_of(attempt):032x}" == trace_id
    assert attempt.parent is not None
    assert f"{attempt.parent.span_id:016x}" == parent_id
    assert dict(attempt.attributes or {})["agent_state.task.attempt"] == 2


async def test_without_telemetry_a_task_stores_no_trace() -> None:
    runtime = AsyncAgentSessionManager(store=MemoryStateStore())
    async with runtime:
        await runtime.agents.create("ann", agent_type="nobody")
        task = await runtime.tasks.submit("ann", "work")

    assert "trace" not in task.model_dump()


async def test_metrics_are_sampled_and_saves_measured(exported: Exported) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = runtime_of(exported, clock=clock, store=store, save_interval_seconds=10**6)

    @runtime.handler("worker")
    async def work(ctx: TaskContext, task: Task) -> None:
        if task.name == "bad":
            raise ValueError("no")

    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        await runtime.agents.create("bob", agent_type="nobody")
        await runtime.tasks.submit("ann", "good")
        await runtime.tasks.submit("ann", "bad", max_attempts=1)
        await runtime.tasks.submit("bob", "unhandled")
        await runtime.wait_idle()
        await clock.advance(60)

        assert exported.values("agent_state.tasks.waiting") == {("nobody",): 1}
        assert exported.values("agent_state.tasks.oldest.age")[("nobody",)] >= 50
        assert exported.values("agent_state.attempts") == {
            ("worker", "completed"): 1,
            ("worker", "dead"): 1,
        }
        assert exported.values("agent_state.tasks.dead") == {(): 1}
        saved = exported.values("agent_state.save.duration")[()]
        assert saved == sum(runtime.statistics.saves.counts)


async def test_a_queue_that_has_become_empty_is_no_longer_reported(exported: Exported) -> None:
    clock = FakeClock()
    runtime = runtime_of(exported, clock=clock, store=MemoryStateStore(clock=clock))
    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        await runtime.tasks.submit("ann", "work")
        await clock.advance(15)
        before = exported.values("agent_state.tasks.waiting")

        @runtime.handler("worker")
        async def work(ctx: TaskContext, task: Task) -> None:
            pass

        await runtime.wait_idle()
        await clock.advance(15)

    assert before == {("worker",): 1}
    assert exported.values("agent_state.tasks.waiting") == {}


def test_without_the_extra_the_error_names_it() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "try:\n    import agent_state.telemetry\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("MissingExtraError")
    assert "otel" in done.stdout
