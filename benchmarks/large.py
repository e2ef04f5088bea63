"""Large documents of which little changes: what a save writes, and how long the loop waits."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import Any

from agent_state import StatePersistenceManager
from benchmarks.report import Row, at_least, at_most
from benchmarks.workload import Setting, State, agent_state, change, percentile, ticking

SAVES = 300
KIBIBYTES = 200
STEPS = 20
MEGABYTES = 20


def large(setting: Setting) -> list[Row]:
    """One field changes of 200 KiB; twenty steps over a memory of 20 MB."""
    written: list[float] = []
    late: list[float] = []
    longest: list[float] = []
    journal: list[float] = []
    waits: list[float] = []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            written.append(asyncio.run(save_one_field(folder, setting.scaled(SAVES))))
        with setting.folder() as folder:
            steps = asyncio.run(_steps(folder))
            late.append(percentile(steps["stalls_ms"], 0.99))
            longest.append(max(steps["stalls_ms"]))
            journal.append(steps["journal"])
            waits.append(median(steps["waits_ms"]))
    return [
        Row("one field of 200 KiB: bytes written a save", [each / 1e3 for each in written], "kB"),
        Row(
            "  the document / bytes written",
            [KIBIBYTES * 1024 / each for each in written],
            "times",
            at_least(15),
        ),
        Row("20 steps over 20 MB: ack, median", waits, "ms"),
        Row("  event loop busy at a stretch, p99, processor time", late, "ms", at_most(20)),
        Row("    longest", longest, "ms"),
        Row("  bytes of the journal / the memory", journal, "times", at_most(2)),
    ]


def with_memory(size: int) -> State:
    """An agent whose working memory has that many bytes, in notes of 400."""
    state = agent_state(0)
    text = "".join(chr(97 + index * 7919 % 26) for index in range(390))
    state["context"]["working_memory"]["notes"] = [
        f"{number:06d} {text}" for number in range(size // 400)
    ]
    return state


def bytes_written() -> int:
    """What this process has handed to ``write`` so far; 0 where the system does not count it."""
    try:
        counts = Path("/proc/self/io").read_text()
    except FileNotFoundError:
        return 0
    return int(counts.partition("wchar: ")[2].split()[0])


async def save_one_field(folder: Path, count: int) -> float:
    """Bytes per save, from the first change until all is in its file."""
    state = with_memory(KIBIBYTES * 1024)
    async with StatePersistenceManager(folder / "state", exclusive=True) as manager:
        await manager.save_agent_state(state["agent_id"], state)
        await manager.flush()
        before = bytes_written()
        for number in range(1, count + 1):
            change(state, number)
            await manager.save_agent_state(state["agent_id"], state)
    return (bytes_written() - before) / count


async def _steps(folder: Path) -> dict[str, Any]:
    size = MEGABYTES * 1000 * 1000
    state = with_memory(size)
    waits: list[float] = []
    stalls: list[float] = []
    largest = 0
    journal = folder / "state" / ".journal"
    async with (
        StatePersistenceManager(folder / "state", exclusive=True) as manager,
        ticking(stalls, time.thread_time),
    ):
        for number in range(STEPS):
            change(state, number)
            began = time.perf_counter()
            await manager.save_agent_state(state["agent_id"], state)
            waits.append((time.perf_counter() - began) * 1e3)
            sizes = [each.stat().st_size for each in journal.glob("[0-9]*.jsonl")]
            largest = max(largest, sum(sizes))
    return {"waits_ms": waits, "stalls_ms": stalls, "journal": largest / size}
