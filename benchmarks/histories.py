"""An agent's conversation that grows by a turn with each save: bytes written and processor time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from agent_state import AsyncAgentSessionManager, StatePersistenceManager, Task, TaskContext
from benchmarks.large import bytes_written
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting

TURNS = 1000
TEXT = "x" * 1000
Way = Callable[[Path, int], Coroutine[Any, Any, None]]


class _Cost(NamedTuple):
    """What a way took: bytes handed to ``write``, seconds of the processor, and by the clock."""

    written: int
    processor: float
    clock: float


def histories(setting: Setting) -> list[Row]:
    """1,000 turns of 1 KiB, each durable before the next."""
    ways: dict[str, Way] = {
        "bare": _bare,
        "ours": _saves,
        "shared": _shared_saves,
        "openai": _sqlite_session,
        "said": _says,
        "tasks": _no_ops,
    }
    found: dict[str, list[_Cost]] = {name: [] for name in ways}
    turns = setting.scaled(TURNS)
    for run in range(setting.runs):
        for name in ways if run % 2 else reversed(ways):
            with setting.folder() as folder:
                found[name].append(_measured(ways[name], folder, turns))
    bare, ours, openai = found["bare"], found["ours"], found["openai"]
    said = [
        _Cost(one[0] - other[0], one[1] - other[1], one[2] - other[2])
        for one, other in zip(found["said"], found["tasks"], strict=True)
    ]
    less = at_most(1)
    return [
        Row(f"{turns:,} turns, JSON lines: bytes", [each.written / 1e6 for each in bare], "MB"),
        Row("  processor time", [each.processor for each in bare], "s"),
        *_against(bare, ours, "save_agent_state, exclusive / JSON lines", at_most(3), at_most(4)),
        *_against(bare, found["shared"], "save_agent_state, shared / JSON lines"),
        *_against(bare, openai, "OpenAI SQLiteSession / JSON lines"),
        *_against(openai, ours, "save_agent_state, exclusive / SQLiteSession", less, less),
        *_against(bare, said, "add_turn less a no-op task / JSON lines", at_most(3), at_most(4)),
    ]


def _against(theirs: list[_Cost], ours: list[_Cost], what: str, *targets: Any) -> list[Row]:
    rows = []
    for number, name in enumerate(("bytes", "processor time", "clock")):
        values = [mine[number] / other[number] for mine, other in zip(ours, theirs, strict=True)]
        rows.append(Row(f"{what}: {name}", values, "times", *targets[number : number + 1]))
    return rows


def _measured(
    way: Callable[[Path, int], Coroutine[Any, Any, None]], folder: Path, turns: int
) -> _Cost:
    began = bytes_written(), time.process_time(), time.monotonic()
    asyncio.run(way(folder, turns))
    return _Cost(
        bytes_written() - began[0], time.process_time() - began[1], time.monotonic() - began[2]
    )


def _turn(number: int) -> dict[str, Any]:
    return {"role": "assistant" if number % 2 else "user", "content": f"{number} {TEXT}"}


async def _bare(folder: Path, turns: int) -> None:
    fd = os.open(folder / "turns.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for number in range(turns):
        os.write(fd, orjson.dumps(_turn(number)) + b"\n")
        os.fdatasync(fd)
    os.close(fd)


async def _saves(folder: Path, turns: int, exclusive: bool = True) -> None:
    async with StatePersistenceManager(folder, exclusive=exclusive) as manager:
        history: list[Any] = []
        state = {"agent_id": "alice", "context": {"conversation_history": history}}
        for number in range(turns):
            history.append(_turn(number))
            await manager.save_agent_state("alice", state)


async def _shared_saves(folder: Path, turns: int) -> None:
    await _saves(folder, turns, exclusive=False)


async def _sqlite_session(folder: Path, turns: int) -> None:
    from agents import SQLiteSession  # importing it takes seconds

    session = SQLiteSession("alice", folder / "session.sqlite")
    for number in range(turns):
        await session.add_items([_turn(number)])
    session.close()


async def _says(folder: Path, turns: int) -> None:
    await _run_tasks(folder, turns, says=True)


async def _no_ops(folder: Path, turns: int) -> None:
    await _run_tasks(folder, turns, says=False)


async def _run_tasks(folder: Path, turns: int, *, says: bool) -> None:
    runtime = AsyncAgentSessionManager(folder)

    @runtime.handler("speaker")
    async def speak(ctx: TaskContext, task: Task) -> None:
        if says:
            turn = _turn(task.payload["number"])
            ctx.add_turn(turn["role"], turn["content"])

    async with runtime:
        await runtime.agents.create("alice", agent_type="speaker")
        for number in range(turns):
            task = await runtime.tasks.submit("alice", "turn", {"number": number})
            await runtime.tasks.result(task)
