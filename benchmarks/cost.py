"""The cost of durability compared with the bare system calls: one writer, one change at a time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson

from agent_state import StatePersistenceManager
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting, agent_state, change, percentile

COUNT = 600
RECORD = {"role": "user", "content": "x" * 440}


def cost(setting: Setting) -> list[Row]:
    """The shared store: a save against the recipe for one, an append against the bare append.

    The recipe is a new file, fdatasync, rename, fsync of the directory. Turn by turn, in
    hundreds, so that both meet the same disk.
    """
    columns: dict[str, list[list[float]]] = {"save": [], "recipe": [], "append": [], "bare": []}
    for _ in range(setting.runs):
        with setting.folder() as folder:
            waits = asyncio.run(_by_turns(folder, setting.scaled(COUNT)))
            for name, column in columns.items():
                column.append(waits[name])
    rows = []
    for ours, theirs, what, bare in (
        ("save", "recipe", "shared, one save at a time", "new file, fdatasync, rename, fsync"),
        ("append", "bare", "shared, one append at a time", "append, fdatasync; 500 bytes"),
    ):
        mine, raw = columns[ours], columns[theirs]
        rows += [
            Row(f"{what}: median", [percentile(w, 0.5) for w in mine], "µs"),
            Row(f"  {bare}: median", [percentile(w, 0.5) for w in raw], "µs"),
            Row("  ours / bare, median", _ratios(mine, raw, 0.5), "times", at_most(1.5)),
            Row("  ours / bare, p99", _ratios(mine, raw, 0.99), "times", at_most(4)),
        ]
    return rows


def _ratios(ours: list[list[float]], theirs: list[list[float]], share: float) -> list[float]:
    return [
        percentile(mine, share) / percentile(raw, share)
        for mine, raw in zip(ours, theirs, strict=True)
    ]


async def _by_turns(folder: Path, count: int) -> dict[str, list[float]]:
    """How long each change took, in µs."""
    waits: dict[str, list[float]] = {"save": [], "recipe": [], "append": [], "bare": []}
    state = agent_state(0)
    bare = folder / "bare"
    bare.mkdir()
    async with StatePersistenceManager(folder / "state") as manager:

        async def save(number: int) -> None:
            change(state, number)
            await manager.save_agent_state(state["agent_id"], state)

        async def recipe(number: int) -> None:
            change(state, number)
            _replace(bare, "agent.json", orjson.dumps(state, option=orjson.OPT_INDENT_2))

        async def append(number: int) -> None:
            await manager.append("events", "log", {**RECORD, "n": number})

        async def bare_append(number: int) -> None:
            line = orjson.dumps({**RECORD, "n": number}, option=orjson.OPT_APPEND_NEWLINE)
            os.write(fd, line)
            os.fdatasync(fd)

        turns: dict[str, Callable[[int], Awaitable[None]]] = {
            "save": save,
            "recipe": recipe,
            "append": append,
            "bare": bare_append,
        }
        fd = os.open(bare / "log.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for turn in range(0, count, 100):
                for name, step in turns.items():
                    for number in range(turn + 1, turn + 101):
                        began = time.perf_counter()
                        await step(number)
                        waits[name].append((time.perf_counter() - began) * 1e6)
        finally:
            os.close(fd)
    return waits


def _replace(folder: Path, name: str, data: bytes) -> None:
    temporary = folder / f".tmp-{name}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    os.fdatasync(fd)
    os.close(fd)
    temporary.replace(folder / name)
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
