"""Ways to keep an agent's state durably, each opened in a folder and used by a hundred agents."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import orjson
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from agent_state import StatePersistenceManager
from benchmarks.workload import AGENTS, Contender, Save, State, agent_state, change


def ours(*, exclusive: bool) -> Contender:
    """This library, validation on, durability fsync."""

    @asynccontextmanager
    async def contender(folder: Path) -> AsyncIterator[Save]:
        async with StatePersistenceManager(folder / "state", exclusive=exclusive) as manager:

            async def save(_: int, state: State) -> None:
                revisions[state["agent_id"]] = await manager.save_agent_state(
                    state["agent_id"], state
                )

            revisions: dict[str, int] = {}
            yield save
            for agent_id, revision in revisions.items():
                loaded = await manager.load_with_revision("agents", agent_id)
                assert loaded is not None
                assert loaded.revision == revision
                saves = loaded.state.model_dump()["counters"]["saves"]
                assert loaded.revision == saves + 1, "each save must have made a new version"

    return contender


@asynccontextmanager
async def langgraph(folder: Path) -> AsyncIterator[Save]:
    """LangGraph's checkpointer on SQLite (WAL, synchronous=FULL, its defaults)."""
    async with AsyncSqliteSaver.from_conn_string(str(folder / "langgraph.sqlite")) as saver:
        yield puts(saver)


def puts(saver: BaseCheckpointSaver[Any]) -> Save:
    """Saves by ``aput``: each agent is a thread, and its state the value of one channel."""
    configs: list[Any] = [
        {"configurable": {"thread_id": f"agent-{index:05d}", "checkpoint_ns": ""}}
        for index in range(AGENTS)
    ]

    async def save(index: int, state: State) -> None:
        checkpoint = empty_checkpoint()
        checkpoint["channel_values"] = {"state": state}
        checkpoint["channel_versions"] = {"state": state["counters"]["saves"]}
        configs[index] = await saver.aput(
            configs[index],
            checkpoint,
            {"source": "loop", "step": state["counters"]["saves"], "parents": {}},
            checkpoint["channel_versions"],
        )

    return save


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Save]:
    """A bare upsert of the same JSON by aiosqlite, WAL, synchronous=FULL."""
    async with aiosqlite.connect(folder / "bare.sqlite", isolation_level=None) as database:
        await database.execute("PRAGMA journal_mode=WAL")
        await database.execute("PRAGMA synchronous=FULL")
        await database.execute("CREATE TABLE states (id TEXT PRIMARY KEY, body BLOB)")

        async def save(_: int, state: State) -> None:
            await database.execute(
                "INSERT INTO states VALUES (?, ?)"
                " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                (state["agent_id"], orjson.dumps(state)),
            )

        yield save


def bare_loop(folder: Path, rounds: int) -> float:
    """States made durable in a second by nothing but orjson, one write and fdatasync per 100."""
    states = [agent_state(index) for index in range(AGENTS)]
    fd = os.open(folder / "bare.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        began = time.perf_counter()
        for number in range(1, rounds + 1):
            lines = []
            for state in states:
                change(state, number)
                lines.append(orjson.dumps(state, option=orjson.OPT_APPEND_NEWLINE))
            data = b"".join(lines)
            assert os.write(fd, data) == len(data)
            os.fdatasync(fd)
        return AGENTS * rounds / (time.perf_counter() - began)
    finally:
        os.close(fd)


def bare_replacing(folder: Path, rounds: int) -> float:
    """Files replaced in a second by one thread: 100 written and synced, renamed, one fsync."""
    states = [agent_state(index) for index in range(AGENTS)]
    began = time.perf_counter()
    for number in range(1, rounds + 1):
        files = []
        for index, state in enumerate(states):
            change(state, number)
            temporary = folder / f".tmp-{index}-{number}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(fd, orjson.dumps(state, option=orjson.OPT_INDENT_2))
            files.append((fd, temporary, folder / f"{index}.json"))
        for fd, _, _ in files:
            os.fdatasync(fd)
            os.close(fd)
        for _, temporary, path in files:
            temporary.replace(path)
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return AGENTS * rounds / (time.perf_counter() - began)
