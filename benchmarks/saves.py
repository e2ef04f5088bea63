"""Saving: a hundred agents at once, and one after another, beside other ways."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import orjson

from agent_state import StatePersistenceManager
from benchmarks import contenders
from benchmarks.report import Row, at_least, at_most
from benchmarks.workload import (
    Contender,
    Load,
    Setting,
    agent_state,
    all_at_once,
    change,
    percentile,
)


def exclusive(setting: Setting) -> list[Row]:
    """100 agents at once, this process owning the directory."""
    mine, langgraph, sqlite, bare = [], [], [], []
    for _ in range(setting.runs):
        mine.append(_load(setting, contenders.ours(exclusive=True), 200))
        langgraph.append(_load(setting, contenders.langgraph, 10))
        sqlite.append(_load(setting, contenders.sqlite, 30))
        with setting.folder() as folder:
            bare.append(contenders.bare_loop(folder, setting.scaled(200)))
    speed = [load.per_second for load in mine]
    return [
        Row("exclusive, 100 agents at once", speed, "saves/s"),
        Row("  LangGraph AsyncSqliteSaver.aput", [load.per_second for load in langgraph], "/s"),
        Row("  aiosqlite upsert, WAL, FULL", [load.per_second for load in sqlite], "/s"),
        Row("  orjson + write + fdatasync per 100", bare, "/s"),
        Row("  ours / LangGraph", _ratios(speed, langgraph), "times", at_least(10)),
        Row("  ours / aiosqlite", _ratios(speed, sqlite), "times", at_least(4)),
        Row(
            "  ours / bare loop",
            [ours / theirs for ours, theirs in zip(speed, bare, strict=True)],
            "times",
            at_least(0.3),
        ),
        *_waits(mine),
    ]


def shared(setting: Setting) -> list[Row]:
    """100 agents at once, other processes free to write too."""
    mine, langgraph, bare = [], [], []
    for _ in range(setting.runs):
        setting.rest()
        mine.append(_load(setting, contenders.ours(exclusive=False), 20))
        langgraph.append(_load(setting, contenders.langgraph, 15))
        with setting.folder() as folder:
            bare.append(contenders.bare_replacing(folder, setting.scaled(20)))
    speed = [load.per_second for load in mine]
    return [
        Row("shared, 100 agents at once", speed, "saves/s"),
        Row("  LangGraph AsyncSqliteSaver.aput", [load.per_second for load in langgraph], "/s"),
        Row("  bare: new file, fdatasync, rename; one thread", bare, "/s"),
        Row("  ours / LangGraph", _ratios(speed, langgraph), "times", at_least(1.2)),
        *_waits(mine),
    ]


def single(setting: Setting) -> list[Row]:
    """One writer, one save at a time, exclusive, beside an append and fdatasync of 2 KiB."""
    mine, bare = [], []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            bare.append(_bare_appends(folder, setting.scaled(1000)))
        with setting.folder() as folder:
            mine.append(asyncio.run(_one_by_one(folder, setting.scaled(1000))))
    ratios = [ours / theirs for ours, theirs in zip(mine, bare, strict=True)]
    return [
        Row("exclusive, one save at a time: median ack", mine, "µs"),
        Row("  append + fdatasync, 2 KiB", bare, "µs"),
        Row("  ours / bare append", ratios, "times", at_most(2.5)),
    ]


def _load(setting: Setting, contender: Contender, each: int) -> Load:
    with setting.folder() as folder:
        return asyncio.run(all_at_once(contender, folder, setting.scaled(each)))


def _ratios(speed: Sequence[float], theirs: Sequence[Load]) -> list[float]:
    return [mine / load.per_second for mine, load in zip(speed, theirs, strict=True)]


def _waits(loads: Sequence[Load]) -> list[Row]:
    return [
        Row("  ack, median", [median(load.acks_ms) for load in loads], "ms"),
        Row("  ack, p99", [percentile(load.acks_ms, 0.99) for load in loads], "ms"),
        Row(
            "  event loop late, p99",
            [percentile(load.stalls_ms, 0.99) for load in loads],
            "ms",
            at_most(10),
        ),
        Row("  event loop late, longest", [max(load.stalls_ms) for load in loads], "ms"),
    ]


def _bare_appends(folder: Path, count: int) -> float:
    state = agent_state(0)
    fd = os.open(folder / "bare.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    waits = []
    try:
        for number in range(1, count + 1):
            change(state, number)
            data = orjson.dumps(state, option=orjson.OPT_APPEND_NEWLINE)
            began = time.perf_counter()
            os.write(fd, data)
            os.fdatasync(fd)
            waits.append(time.perf_counter() - began)
    finally:
        os.close(fd)
    return median(waits) * 1e6


async def _one_by_one(folder: Path, count: int) -> float:
    state = agent_state(0)
    waits = []
    async with StatePersistenceManager(folder / "state", exclusive=True) as manager:
        for number in range(1, count + 1):
            change(state, number)
            began = time.perf_counter()
            await manager.save_agent_state(state["agent_id"], state)
            waits.append(time.perf_counter() - began)
    return median(waits) * 1e6
