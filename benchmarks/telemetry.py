"""What telemetry costs: tasks with a step, end to end, with and without it, in turns in one run."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from agent_state import AsyncAgentSessionManager, StatePersistenceManager, Task, TaskContext
from agent_state.protocols import Change, Telemetry
from agent_state.runtime.state import RuntimeState
from agent_state.telemetry import OpenTelemetry
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting

Cost = tuple[float, float]
"""Seconds from the first submission to the last result, and of the processor."""

AGENTS = 50
TASKS = 40


def telemetry(setting: Setting) -> list[Row]:
    """Tasks that count a word in a step, of 50 agents at once; files, fsync.

    *Seams taken out*: neither spans nor the measuring that ``/metrics`` shows. *Off*: the code as
    it is, without ``telemetry=``. *On*: spans to a batch processor, and metrics. Which goes first
    changes by turns, and ratios are of neighbours; those of the processor's time count, because
    another process takes part in the other ones.
    """
    each = setting.scaled(TASKS)
    around: dict[str, Callable[[], AbstractContextManager[Telemetry | None]]] = {
        "out": _without_seams,
        "off": nullcontext,
        "on": _traced,
    }
    found: dict[str, list[Cost]] = {"out": [], "off": [], "on": []}
    with setting.folder() as folder:
        asyncio.run(_run(folder / "warm", each, None))
        for turn in range(2 * setting.runs):
            for name in found if turn % 2 else reversed(found):
                with around[name]() as spans:
                    found[name].append(asyncio.run(_run(folder / f"{name}-{turn}", each, spans)))
    tasks = AGENTS * each

    def ratios(name: str, base: str, part: int) -> list[float]:
        return [a[part] / b[part] for a, b in zip(found[name], found[base], strict=True)]

    return [
        Row("tasks with a step, telemetry off", [tasks / s for s, _ in found["off"]], "per s"),
        Row(
            "  on: spans, metrics, a batch processor", [tasks / s for s, _ in found["on"]], "per s"
        ),
        Row("  processor, off", [1e6 * c / tasks for _, c in found["off"]], "µs a task"),
        Row("  processor, off / seams taken out", ratios("off", "out", 1), "times", at_most(1.03)),
        Row("  processor, on / off", ratios("on", "off", 1), "times", at_most(1.3)),
        Row("  time, off / seams taken out", ratios("off", "out", 0), "times"),
        Row("  time, on / off", ratios("on", "off", 0), "times"),
    ]


async def _run(folder: Path, each: int, telemetry: Telemetry | None) -> Cost:
    runtime = AsyncAgentSessionManager(folder, telemetry=telemetry)

    @runtime.handler("counter")
    async def count(ctx: TaskContext, task: Task) -> int:
        return await ctx.step("count", _count, task.payload["text"])

    async def work(agent_id: str) -> None:
        for number in range(each):
            task = await runtime.tasks.submit(agent_id, "count", {"text": f"word {number}"})
            assert await runtime.tasks.result(task) == 2

    async with runtime:
        agents = [f"agent-{number}" for number in range(AGENTS)]
        for agent_id in agents:
            await runtime.agents.create(agent_id, agent_type="counter")
        gc.collect()
        began = time.perf_counter(), time.process_time()
        await asyncio.gather(*map(work, agents))
        return time.perf_counter() - began[0], time.process_time() - began[1]


async def _count(text: str) -> int:
    return len(text.split())


class _Nowhere(SpanExporter):
    """Takes spans as an exporter does, and sends them nowhere."""

    def __init__(self) -> None:
        self.spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += len(spans)
        return SpanExportResult.SUCCESS


@contextmanager
def _traced() -> Iterator[Telemetry]:
    exporter = _Nowhere()
    tracing = TracerProvider()
    tracing.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=10**6))
    metering = MeterProvider(metric_readers=[InMemoryMetricReader()])
    yield OpenTelemetry(tracer_provider=tracing, meter_provider=metering)
    tracing.shutdown()
    metering.shutdown()
    assert exporter.spans > 0


@contextmanager
def _without_seams() -> Iterator[None]:
    async def commit(self: Any, changes: Sequence[Change]) -> list[int]:
        numbers: list[int] = await self.store.commit(changes)
        return numbers

    with (
        mock.patch.object(StatePersistenceManager, "_commit", commit),
        mock.patch.object(RuntimeState, "attempting", return_value=nullcontext()),
    ):
        yield
