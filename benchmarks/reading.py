"""Reading: restoring everything at a start, and the memory that reading takes."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.protocols import LogRecord
from agent_state.storage.logs import encode_lines
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting, agent_state

AGENTS = 10_000
TASKS_EACH = 2
RECORDS = 1_000_000
BULK = 64 * 1024 * 1024
_MIB = 1024 * 1024


def restore(setting: Setting) -> list[Row]:
    """All agents with their tasks, beside os.scandir + orjson.loads of the same files."""
    agents = setting.scaled(AGENTS)
    bare, scanned, restored = [], [], []
    with setting.folder() as folder:
        state = folder / "state"
        asyncio.run(_fill(state, agents))
        for _ in range(setting.runs):
            bare.append(_timed(lambda: _scan_bare(state)))
            scanned.append(_timed(lambda: asyncio.run(_scan(state, agents))))
            restored.append(asyncio.run(_restore(state, agents)))
    what = f"{agents:,} agents, {agents * TASKS_EACH:,} tasks"
    return [
        Row(f"{what}: os.scandir + orjson.loads", bare, "s"),
        Row("  manager.scan, validated", scanned, "s"),
        Row("  ours / bare", _quotients(scanned, bare), "times", at_most(3)),
        Row("  the runtime's restore", restored, "s"),
        Row("  ours / bare", _quotients(restored, bare), "times", at_most(3)),
    ]


def memory(setting: Setting) -> list[Row]:
    """Growth of the resident set, each in a fresh process."""
    records, agents = setting.scaled(RECORDS), setting.scaled(AGENTS // 5)
    with setting.folder() as folder:
        state = folder / "state"
        _write_log(state / "events" / "all.jsonl", ("all",), records)
        log = _in_a_process("log", state, records)
    with setting.folder() as folder:
        state = folder / "state"
        asyncio.run(_fill(state, agents))
        lean = _in_a_process("restore", state, agents)
        assert lean > 0
        for index in range(8):  # what agents finished long ago
            path = state / "tasks" / f"agent-{index:05d}" / "archive.jsonl"
            _write_log(path, (f"agent-{index:05d}", "archive"), setting.scaled(BULK) // 8 // 160)
        laden = _in_a_process("restore", state, agents)
    return [
        Row(f"a log of {records:,} records, streamed: growth", [log], "MiB", at_most(100)),
        Row(f"restore of {agents:,} agents: growth", [lean], "MiB"),
        Row("  the same beside 64 MiB of archives", [laden], "MiB"),
        Row("  laden / lean", [laden / lean], "times", at_most(1.1)),
    ]


def _quotients(mine: Iterable[float], theirs: Iterable[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def _timed(work: Callable[[], object]) -> float:
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


async def _fill(state: Path, agents: int) -> None:
    async with StatePersistenceManager(state, exclusive=True) as manager:

        async def save(index: int) -> None:
            body = agent_state(index)
            async with manager.group() as group:
                group.save("agents", body["agent_id"], body)
                for number in range(TASKS_EACH):
                    task = {
                        "task_id": f"task-{number}",
                        "agent_id": body["agent_id"],
                        "name": "read",
                        "payload": {"file": f"notes/{index}/{number}.md"},
                        "created_at": "2026-01-01T00:00:00.000000Z",
                    }
                    group.save("tasks", (body["agent_id"], task["task_id"]), task)

        for start in range(0, agents, 500):
            await asyncio.gather(*map(save, range(start, min(agents, start + 500))))


def _scan_bare(state: Path) -> list[Any]:
    found = []

    def scan(folder: str) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    scan(entry.path)
                elif entry.name.endswith(".json"):
                    with open(entry.path, "rb") as file:  # noqa: PTH123  # the bare way
                        found.append(orjson.loads(file.read()))

    for kind in ("agents", "tasks"):
        scan(f"{state}/{kind}")
    return found


async def _scan(state: Path, agents: int) -> None:
    async with StatePersistenceManager(state, exclusive=True) as manager:
        found = [
            loaded.state for kind in ("agents", "tasks") async for loaded in manager.scan(kind)
        ]
        assert len(found) == agents * (1 + TASKS_EACH)


async def _restore(state: Path, agents: int) -> float:
    gc.collect()
    runtime = AsyncAgentSessionManager(state)
    async with runtime:
        assert runtime.report is not None
        assert len(runtime.report.agents) == agents
        assert runtime.report.tasks_pending == agents * TASKS_EACH
        return runtime.report.seconds


def _write_log(path: Path, key: tuple[str, ...], records: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for seq in range(1, records + 1):
            body = b'{"event":"something happened","note":"and was noted here","number":%d}' % seq
            file.write(encode_lines(key, [LogRecord(seq, body)]))


def _in_a_process(what: str, state: Path, count: int) -> float:
    answer = subprocess.run(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", "benchmarks.reading", what, str(state), str(count)],
        capture_output=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
        text=True,
    )
    return float(json.loads(answer.stdout)) / _MIB


async def _stream(state: Path, records: int) -> None:
    async with StatePersistenceManager(state) as manager:
        count = 0
        async for entry in manager.read_log("events", "all"):
            count += 1
            assert entry.seq == count
        assert count == records


def _peak() -> int:
    """The largest resident set this program has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell of the parent, too, from which it was forked
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measure(what: str, state: Path, count: int) -> None:
    before = _peak()
    asyncio.run(_stream(state, count) if what == "log" else _restore(state, count))
    print(json.dumps(_peak() - before))


if __name__ == "__main__":
    _measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
