"""Tasks end to end: handlers by name with typed payloads and a log, beside plain ones; a quota."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from agent_state import AsyncAgentSessionManager, RateLimit, Task, TaskContext
from benchmarks.report import Row, at_least, at_most
from benchmarks.workload import Setting, percentile

AGENTS = 50
TASKS = 40
CALLS = 600
"""The calls that may be made within a minute."""


class Document(BaseModel):
    """What a typed handler takes."""

    url: str
    words: int


class Length(BaseModel):
    """What a typed handler returns."""

    words: int


@dataclass(slots=True)
class Turn:
    """What one run took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    waits_ms: list[float] = field(default_factory=list)
    """From the submission of each task to its result."""


def handlers(setting: Setting) -> list[Row]:
    """No-op tasks of 50 agents at once; files, fsync. Which way goes first changes by turns.

    Ratios are of neighbours. The processor's time counts, and the other one where nothing else
    runs.
    """
    each = setting.scaled(TASKS)
    found: dict[bool, list[Turn]] = {False: [], True: []}
    with setting.folder() as folder:
        asyncio.run(_run(folder / "warm", each, by_name=True))
        for turn in range(2 * setting.runs):
            for by_name in (False, True) if turn % 2 else (True, False):
                with _logged(folder / f"{turn}.log") if by_name else _silent():
                    place = folder / f"{by_name}-{turn}"
                    found[by_name].append(asyncio.run(_run(place, each, by_name=by_name)))
    count = AGENTS * each
    pairs = list(zip(found[True], found[False], strict=True))
    return [
        Row("by agent type, untyped, no log", [count / t.seconds for t in found[False]], "per s"),
        Row("  submit to result, p99", [percentile(t.waits_ms, 0.99) for t in found[False]], "ms"),
        Row("by name, typed, log on", [count / t.seconds for t in found[True]], "per s"),
        Row("  submit to result, p99", [percentile(t.waits_ms, 0.99) for t in found[True]], "ms"),
        Row(
            "  cost of the processor: by name / by type",
            [a.cpu_seconds / b.cpu_seconds for a, b in pairs],
            "times",
            at_most(1.15),
        ),
        Row("  time: by name / by type", [a.seconds / b.seconds for a, b in pairs], "times"),
        Row(
            "  p99: by name / by type",
            [percentile(a.waits_ms, 0.99) / percentile(b.waits_ms, 0.99) for a, b in pairs],
            "times",
        ),
    ]


async def _run(folder: Path, each: int, *, by_name: bool) -> Turn:
    runtime = AsyncAgentSessionManager(folder)
    turn = Turn()

    @runtime.handler("plain")
    async def plain(_: TaskContext, task: Task) -> dict[str, int]:
        return {"words": task.payload["words"]}

    @runtime.task("count", agent_type="typed")
    async def count(_: TaskContext, payload: Document) -> Length:
        return Length(words=payload.words)

    async def work(agent_id: str) -> None:
        for number in range(each):
            began = time.perf_counter()
            if by_name:
                document = Document(url=f"example.org/{number}", words=number)
                task = await runtime.tasks.submit(agent_id, "count", document)
                assert await runtime.tasks.result(task) == Length(words=number)
            else:
                payload = {"url": f"example.org/{number}", "words": number}
                task = await runtime.tasks.submit(agent_id, "count", payload)
                assert await runtime.tasks.result(task) == {"words": number}
            turn.waits_ms.append((time.perf_counter() - began) * 1e3)

    async with runtime:
        agents = [f"agent-{number}" for number in range(AGENTS)]
        for agent_id in agents:
            await runtime.agents.create(agent_id, agent_type="typed" if by_name else "plain")
        gc.collect()
        began = time.perf_counter(), time.process_time()
        await asyncio.gather(*map(work, agents))
        turn.seconds = time.perf_counter() - began[0]
        turn.cpu_seconds = time.process_time() - began[1]
    return turn


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Write what the library says to a file, from DEBUG on."""
    logger = logging.getLogger("agent_state")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        handler.close()


@contextmanager
def _silent() -> Iterator[None]:
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quota(setting: Setting) -> list[Row]:
    """50 agents that would make ten times the calls that they may make, for two minutes.

    Their process is killed (SIGKILL) after half a minute, and started again at once. The most of
    any minute, and what the two minutes had, as shares of the limit.
    """
    with setting.folder() as folder:
        calls = _calls_until(folder / "state", 30)
        calls += _calls_until(folder / "state", calls[0] + 120 - time.monotonic())
    calls = [at for at in calls if at < calls[0] + 120]
    most = max(sum(begin <= at < begin + 60 for at in calls) for begin in calls)
    return [
        Row("the most calls of any minute / the limit", [most / CALLS], "times", at_most(1.02)),
        Row("calls of two minutes / the limit", [len(calls) / CALLS / 2], "times", at_least(0.98)),
    ]


def _calls_until(folder: Path, seconds: float) -> list[float]:
    """When the calls of a server were made, which is killed after so long."""
    program = "import sys; from benchmarks import handlers; handlers.serve_calls(sys.argv[1])"
    with subprocess.Popen(  # noqa: S603  # its own program
        [sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True
    ) as server:
        killing = threading.Timer(seconds, server.kill)
        killing.start()
        assert server.stdout is not None
        return [float(line) for line in server.stdout if line.endswith("\n")]


def serve_calls(folder: str) -> None:
    """Make the calls that the limit permits, and print when."""
    runtime = AsyncAgentSessionManager(folder)

    @runtime.task("call", agent_type="caller", rate_limits=[RateLimit("calls", CALLS)])
    async def call(_: TaskContext) -> None:
        print(time.monotonic(), flush=True)

    async def serve() -> None:
        async with runtime:
            for number in range(AGENTS):
                await runtime.agents.create(f"agent-{number}", agent_type="caller")
                for nth in range(10 * CALLS // AGENTS):
                    key = f"call {nth}"
                    await runtime.tasks.submit(f"agent-{number}", "call", dedupe_key=key)
            await asyncio.Event().wait()

    asyncio.run(serve())
