"""Spans and metrics of a runtime, for OpenTelemetry (extra ``otel``).

    runtime = AsyncAgentSessionManager("state", telemetry=OpenTelemetry())

A task is one trace, however often it is attempted and its process restarted: the context of its
submission is stored with it (``Task.trace``). The application chooses the exporter, with the SDK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from time import perf_counter

from agent_state.errors import MissingExtraError
from agent_state.metrics import SAVE_BUCKETS, Metric
from agent_state.protocols import AttemptEnd, Change, TracedTask

try:
    from opentelemetry import context, propagate, trace
    from opentelemetry.metrics import (
        CallbackOptions,
        MeterProvider,
        Observation,
        get_meter_provider,
    )
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
except ModuleNotFoundError as error:
    raise MissingExtraError("otel", str(error.name)) from error

_SCOPE = "agent_state"
_AGENT, _TASK = "agent_state.agent.id", "agent_state.task.id"
_task_id: ContextVar[str | None] = ContextVar("task_id", default=None)
"""The task of the attempt that runs."""
_FAILED = frozenset({"failed", "dead"})


class OpenTelemetry:
    """A ``Telemetry`` that makes spans and metrics; giving none of its providers uses the global.

    Spans: ``submit NAME``, ``attempt NAME`` for each attempt, from the claim of the task until its
    outcome is stored; inside it ``step NAME``, and ``save`` for each save; all with the task's id.
    A save outside of any span is measured only. Metrics are those of ``/metrics``
    (docs/telemetry.md has the list).
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        self._meter = (meter_provider or get_meter_provider()).get_meter(_SCOPE)
        self._saves = self._meter.create_histogram(
            "agent_state.save.duration",
            unit="s",
            description="Time until a save was durable, or refused.",
            explicit_bucket_boundaries_advisory=SAVE_BUCKETS,
        )
        self._latest: dict[str, Metric] = {}

    # -- spans -------------------------------------------------------------------------------

    def submitted(self, task: TracedTask) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        attributes = {_AGENT: task.agent_id, _TASK: task.task_id}
        span = self._tracer.start_span(
            f"submit {task.name}", kind=SpanKind.PRODUCER, attributes=attributes
        )
        propagate.inject(carrier, context=trace.set_span_in_context(span))
        span.end()
        return carrier

    @contextmanager
    def attempt(self, task: TracedTask, agent_type: str) -> Iterator[AttemptEnd]:
        submission = propagate.extract(task.trace)
        span = self._tracer.start_span(
            f"attempt {task.name}",
            context=submission,
            kind=SpanKind.CONSUMER,
            attributes={
                _AGENT: task.agent_id,
                "agent_state.agent.type": agent_type,
                _TASK: task.task_id,
                "agent_state.task.name": task.name,
                "agent_state.task.attempt": task.attempts,
            },
        )

        def ended(status: str, error: BaseException | None) -> None:
            span.set_attribute("agent_state.task.status", status)
            if status in _FAILED:
                _fail(span, error)

        inside = _task_id.set(task.task_id)
        try:
            with _Current(span):
                yield ended
        finally:
            _task_id.reset(inside)

    def step(self, task: TracedTask, name: str) -> AbstractContextManager[None]:
        attributes = {_TASK: task.task_id, "agent_state.step.name": name}
        return _Current(self._tracer.start_span(f"step {name}", attributes=attributes))

    def save(self, changes: Sequence[Change]) -> AbstractContextManager[None]:
        span = None
        if trace.get_current_span().is_recording():
            task_id = _task_id.get()
            attributes = None if task_id is None else {_TASK: task_id}
            span = self._tracer.start_span("save", attributes=attributes)
        return _Save(span, self._saves.record)

    # -- metrics -----------------------------------------------------------------------------

    def sampled(self, metrics: Sequence[Metric]) -> None:
        # An exporter asks from a thread of its own, so it is given the latest sample.
        for metric in metrics:
            is_new = metric.name not in self._latest
            self._latest[metric.name] = metric
            if is_new:
                create = (
                    self._meter.create_observable_counter
                    if metric.kind == "counter"
                    else self._meter.create_observable_gauge
                )
                create(
                    metric.name,
                    callbacks=[self._observed(metric.name)],
                    unit=metric.unit,
                    description=metric.description,
                )

    def _observed(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, labels) for labels, value in self._latest[name].values]

        return observe


class _Current:
    """Makes a span the current one, and ends it; an error that passes through is its own.

    Less work than ``use_span``, which is a generator in a generator.
    """

    __slots__ = ("_span", "_token")

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> None:
        self._token = context.attach(trace.set_span_in_context(self._span))

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        context.detach(self._token)
        if isinstance(error, Exception):
            _fail(self._span, error)
        self._span.end()


class _Save:
    """Measures a save, and ends its span if it has one."""

    __slots__ = ("_began", "_record", "_span")

    def __init__(self, span: Span | None, record: Callable[[float], None]) -> None:
        self._span = span
        self._record = record

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._span is not None:
            if isinstance(error, Exception):
                _fail(self._span, error)
            self._span.end()
        self._record(perf_counter() - self._began)


def _fail(span: Span, error: BaseException | None) -> None:
    if error is not None:
        span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, None if error is None else type(error).__name__))
