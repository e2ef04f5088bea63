"""Two ways to do the same, in turns in one run.

A speed is given by the clock, which is what was asked for, and by the processor's time of the whole
process, which does not depend on what else a machine does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks.report import Row, at_least
from benchmarks.workload import Setting


@dataclass(frozen=True, slots=True)
class Took:
    """How many calls were made, and how long they took, in seconds."""

    calls: int
    clock: float
    processor: float


Measured: TypeAlias = Callable[[Path], Awaitable[Took]]


def beside(
    setting: Setting,
    title: str,
    theirs: dict[str, Measured],
    ours: dict[str, Measured],
    times: float,
) -> list[Row]:
    """Each measured in turns; ours over theirs, by the clock and by the processor's time."""
    found: dict[str, list[Took]] = {name: [] for name in (*theirs, *ours)}
    order = [*theirs.items(), *ours.items()]
    for run in range(setting.runs):
        for name, measure in order[:: -1 if run % 2 else 1]:
            with setting.folder() as folder:
                found[name].append(asyncio.run(_awaited(measure, folder)))
    (base,) = theirs
    rows = [
        Row(f"{title}: {name}", [each.calls / each.clock for each in found[name]], "/s")
        for name in found
    ]
    for name in ours:
        pairs = [*zip(found[name], found[base], strict=True)]
        clock = [their.clock / our.clock * our.calls / their.calls for our, their in pairs]
        processor = [
            their.processor / our.processor * our.calls / their.calls for our, their in pairs
        ]
        rows.append(Row(f"  {name} / {base}", clock, "times", at_least(times)))
        rows.append(Row("    by the processor's time", processor, "times"))
    return rows


async def _awaited(measure: Measured, folder: Path) -> Took:
    return await measure(folder)


async def timed(calls: int, work: Awaitable[object]) -> Took:
    """What a piece of work took."""
    clock, processor = time.perf_counter(), time.process_time()
    await work
    return Took(calls, time.perf_counter() - clock, time.process_time() - processor)
