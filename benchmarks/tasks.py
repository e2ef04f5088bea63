"""Operating tasks: finding one and many among all that are stored, and changing many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from agent_state import AgentRuntime, StatePersistenceManager, TaskFilter
from benchmarks.report import Row
from benchmarks.workload import Setting

AGENTS, TASKS_EACH, ARCHIVED_EACH = 100, 200, 1000
DEAD = TaskFilter(status="dead")


def tasks(setting: Setting) -> list[Row]:
    """One process owns the directory; half of the tasks are dead, the others completed."""
    agents = setting.scaled(AGENTS)
    runs: list[dict[str, float]] = []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            runs.append(asyncio.run(_run(folder / "state", agents)))
    half = agents * TASKS_EACH // 2
    rows = {
        "search": (f"the newest 100 dead of {2 * half:,} tasks", "ms", 1e3),
        "find": (f"  one of {2 * half:,} by its id alone", "ms", 1e3),
        "archived": (f"  one of {agents * ARCHIVED_EACH:,} archived by its id alone", "ms", 1e3),
        "retry": (f"run {half:,} dead tasks again: for each", "µs", 1e6 / half),
        "cancel": (f"  cancel {half:,}", "µs", 1e6 / half),
        "delete": (f"  delete {2 * half:,}", "µs", 1e6 / half / 2),
    }
    return [
        Row(what, [run[name] * factor for run in runs], unit)
        for name, (what, unit, factor) in rows.items()
    ]


async def _run(state: Path, agents: int) -> dict[str, float]:
    """The seconds of each operation."""
    await _fill(state, agents)
    found: dict[str, float] = {}

    async def measure(name: str, work: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await work()
        found[name] = time.perf_counter() - began

    async with AgentRuntime(state) as runtime:
        operated = runtime.tasks
        await measure("search", lambda: operated.search(DEAD, newest_first=True, limit=100))
        await measure("find", lambda: operated.get(f"task-{agents // 2}-7"))
        await measure("archived", lambda: operated.get(f"old-{agents // 2}-7"))
        await measure("retry", lambda: operated.retry_all(DEAD))
        await measure("cancel", lambda: operated.cancel_all(TaskFilter(status="pending")))
        await measure("delete", lambda: operated.delete_all(TaskFilter()))
        assert await operated.search() == []
    return found


async def _fill(state: Path, agents: int) -> None:
    async with StatePersistenceManager(state, exclusive=True) as manager:
        for agent in range(agents):
            agent_id = f"agent-{agent:03d}"
            async with manager.group() as group:
                group.save("agents", agent_id, {"agent_id": agent_id, "agent_type": "none"})
                for number in range(TASKS_EACH):
                    task = _task(f"task-{agent}-{number}", agent_id)
                    task["status"] = "dead" if number % 2 else "completed"
                    group.save("tasks", (agent_id, f"task-{agent}-{number}"), task)
            async with manager.group() as group:
                for number in range(ARCHIVED_EACH):
                    task = {**_task(f"old-{agent}-{number}", agent_id), "status": "completed"}
                    key = f"old-{agent}-{number}@3"
                    group.append("tasks", (agent_id, "archive"), task, dedupe_key=key)


def _task(task_id: str, agent_id: str) -> dict[str, object]:
    return {
        "task_id": task_id,
        "agent_id": agent_id,
        "name": "index",
        "attempts": 3,
        "created_at": "2026-11-01T00:00:00.000000Z",
        "payload": {"text": "x" * 200},
        "error": "KeyError: 'doc'",
        "traceback": "y" * 600,
    }
