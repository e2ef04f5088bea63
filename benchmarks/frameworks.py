"""Adapters for other people's frameworks, beside the store that each framework brings."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from agents import SQLiteSession
from key_value.aio.stores.filetree import (
    FileTreeStore,
    FileTreeV1CollectionSanitizationStrategy,
    FileTreeV1KeySanitizationStrategy,
)
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from strands.session.file_session_manager import FileSessionManager
from strands.session.session_repository import SessionRepository
from strands.types.session import Session, SessionAgent, SessionMessage

from agent_state import StatePersistenceManager
from agent_state_integrations.key_value import AgentStateKeyValueStore
from agent_state_integrations.langgraph import AgentStateSaver
from agent_state_integrations.openai_agents import AgentStateSession
from agent_state_integrations.strands import AgentStateSessionRepository
from benchmarks import contenders
from benchmarks.comparison import Measured, Took, beside, timed
from benchmarks.report import Row, Target, at_least, at_most
from benchmarks.workload import AGENTS, Contender, Save, Setting, State, all_at_once
from tests.frameworks import ROOT
from tests.integrations.__main__ import environment_of

T = TypeVar("T")

STEPS = 1000
LISTED = 500
MESSAGES = 1000


def langgraph(setting: Setting) -> list[Row]:
    """``aput`` by 100 threads at once, and a thread of 1,000 steps whose messages grow."""
    each = setting.scaled(20)
    rows = beside(
        setting,
        "LangGraph aput, 100 threads at once",
        {"AsyncSqliteSaver": _load(contenders.langgraph, each)},
        {
            "AgentStateSaver": _load(_saver(exclusive=False), each),
            "AgentStateSaver, exclusive": _load(_saver(exclusive=True), each),
            "AgentStateSaver of an open manager, exclusive": _load(_managed_saver, each),
        },
        5,
    )
    return rows + _growing_thread(setting)


def openai_agents(setting: Setting) -> list[Row]:
    """``add_items`` by 100 sessions at once: a question and an answer each time."""
    each = setting.scaled(20)
    return beside(
        setting,
        "OpenAI add_items, 100 sessions at once",
        {"SQLiteSession": lambda folder: _add_items(_sqlite_session(folder), each)},
        {
            "AgentStateSession": lambda folder: _add_items(_session(folder, False), each),
            "AgentStateSession, exclusive": lambda folder: _add_items(_session(folder, True), each),
            "AgentStateSession of an open manager": lambda folder: _add_managed(folder, each),
        },
        5,
    )


def strands(setting: Setting) -> list[Row]:
    """1,000 messages of one agent listed, the files in the system's cache."""
    return beside(
        setting,
        "Strands, 1,000 messages listed",
        {"FileSessionManager": _list_by_files},
        {"AgentStateSessionRepository": _list_by_repository},
        10,
    )


def key_value(setting: Setting) -> list[Row]:
    """``put`` of 2 KiB by 100 tasks at once, each to a key of its own."""
    each = setting.scaled(20)
    return beside(
        setting,
        "py-key-value put, 100 tasks at once",
        {"FileTreeStore": _load(_tree, each)},
        {
            "AgentStateKeyValueStore": _load(_key_values(exclusive=False), each),
            "AgentStateKeyValueStore, exclusive": _load(_key_values(exclusive=True), each),
        },
        5,
    )


# -- side by side ----------------------------------------------------------------------------------


def google_adk(setting: Setting) -> list[Row]:
    """``append_event``, in the environment that ADK needs; see ``benchmarks.google_adk``."""
    python = environment_of("google-adk", ["google_adk"])
    command = [str(python), "-m", "benchmarks.google_adk", str(setting.directory)]
    if setting.quick:
        command.append("--quick")
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)  # noqa: S603  # ours
    return [
        Row(
            each["what"],
            each["values"],
            each["unit"],
            Target(**each["target"]) if each["target"] else None,
            each["note"],
        )
        for each in json.loads(done.stdout)
    ]


def _load(contender: Contender, each: int) -> Measured:
    async def measure(folder: Path) -> Took:
        load = await all_at_once(contender, folder, each)
        return Took(load.saves, load.seconds, load.processor)

    return measure


# -- LangGraph -------------------------------------------------------------------------------------


def _saver(*, exclusive: bool) -> Contender:
    @asynccontextmanager
    async def contender(folder: Path) -> AsyncIterator[Save]:
        async with AgentStateSaver(folder / "state", exclusive=exclusive) as saver:
            yield contenders.puts(saver)

    return contender


@asynccontextmanager
async def _managed_saver(folder: Path) -> AsyncIterator[Save]:
    """On the caller's own loop, without a change of threads."""
    async with StatePersistenceManager(folder / "state", exclusive=True) as manager:
        yield contenders.puts(AgentStateSaver(manager))


def _growing_thread(setting: Setting) -> list[Row]:
    listed: list[list[float]] = [[], []]
    with setting.folder() as mine, setting.folder() as theirs:
        asyncio.run(_with(_ours_in(mine), _grow))
        asyncio.run(_with(_theirs_in(theirs), _grow))
        size, their_size = _size(mine) / 1e6, _size(theirs) / 1e6
        for run in range(setting.runs):
            for side in (0, 1)[:: -1 if run % 2 else 1]:
                saver = _theirs_in(theirs) if side else _ours_in(mine)
                listed[side].append(asyncio.run(_with(saver, _listing)) * 1e3)
    ratios = [mine / theirs for mine, theirs in zip(*listed, strict=True)]
    return [
        Row(f"LangGraph, a thread of {STEPS:,} steps: AgentStateSaver", [size], "MB"),
        Row("  AsyncSqliteSaver", [their_size], "MB"),
        Row("  AsyncSqliteSaver / AgentStateSaver", [their_size / size], "times", at_least(20)),
        Row(f"  alist({LISTED}), AgentStateSaver", listed[0], "ms", None, "processor"),
        Row(f"  alist({LISTED}), AsyncSqliteSaver", listed[1], "ms", None, "processor"),
        Row("  alist, AgentStateSaver / AsyncSqliteSaver", ratios, "times", at_most(1)),
    ]


def _ours_in(folder: Path) -> AbstractAsyncContextManager[Any]:
    return AgentStateSaver(folder / "state")


@asynccontextmanager
async def _theirs_in(folder: Path) -> AsyncIterator[Any]:
    async with AsyncSqliteSaver.from_conn_string(str(folder / "checkpoints.sqlite")) as saver:
        await saver.setup()
        await saver.conn.execute("PRAGMA synchronous=OFF")  # its writing is not timed here
        yield saver


async def _with(opened: AbstractAsyncContextManager[Any], work: Callable[[Any], Awaitable[T]]) -> T:
    async with opened as saver:
        return await work(saver)


async def _grow(saver: BaseCheckpointSaver[Any]) -> None:
    """A conversation of which each step is one more message."""
    config: Any = {"configurable": {"thread_id": "thread", "checkpoint_ns": ""}}
    messages: list[AnyMessage] = []
    for step in range(STEPS):
        text = f"message {step}: " + "what was said, in a sentence of some length. " * 3
        messages.append((AIMessage if step % 2 else HumanMessage)(text, id=f"m{step}"))
        checkpoint = empty_checkpoint()
        checkpoint["channel_values"] = {"messages": [*messages]}
        checkpoint["channel_versions"] = {"messages": f"{step:032}"}
        config = await saver.aput(
            config,
            checkpoint,
            {"source": "loop", "step": step, "parents": {}},
            checkpoint["channel_versions"],
        )


async def _listing(saver: BaseCheckpointSaver[Any]) -> float:
    """The seconds of the processor for the newest checkpoints, of a saver that was just opened."""
    began = time.process_time()
    found = 0
    async for each in saver.alist({"configurable": {"thread_id": "thread"}}, limit=LISTED):
        assert len(each.checkpoint["channel_values"]["messages"]) == STEPS - found
        found += 1
    assert found == LISTED
    return time.process_time() - began


def _size(folder: Path) -> int:
    """The bytes that the files below a folder take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


# -- OpenAI Agents ---------------------------------------------------------------------------------


def _sqlite_session(folder: Path) -> Callable[[int], Any]:
    return lambda index: SQLiteSession(f"session-{index}", folder / "sessions.sqlite")


def _session(folder: Path, exclusive: bool) -> Callable[[int], Any]:
    return lambda index: AgentStateSession(
        folder / "state", f"session-{index}", exclusive=exclusive
    )


async def _add_managed(folder: Path, each: int) -> Took:
    """Exclusive, on the caller's own loop."""
    async with StatePersistenceManager(folder / "state", exclusive=True) as manager:
        return await _add_items(lambda index: AgentStateSession(manager, f"session-{index}"), each)


async def _add_items(make: Callable[[int], Any], each: int) -> Took:
    sessions = [make(index) for index in range(AGENTS)]

    async def talk(session: Any, turns: int) -> None:
        for turn in range(turns):
            question = {"role": "user", "content": f"question {turn} " * 20}
            answer = {"role": "assistant", "content": f"answer {turn} " * 20}
            await session.add_items([question, answer])

    await asyncio.gather(*(talk(session, 1) for session in sessions))
    took = await timed(
        AGENTS * each, asyncio.gather(*(talk(session, each) for session in sessions))
    )
    for session in sessions:
        assert len(await session.get_items()) == 2 * each + 2
        closing = session.close()
        if asyncio.iscoroutine(closing):
            await closing
    return took


# -- Strands ---------------------------------------------------------------------------------------


async def _list_by_files(folder: Path) -> Took:
    return await asyncio.to_thread(
        _list_messages, FileSessionManager("session", storage_dir=str(folder))
    )


async def _list_by_repository(folder: Path) -> Took:
    with AgentStateSessionRepository(folder / "state", durability="os") as repository:
        repository.create_session(Session(session_id="session", session_type="AGENT"))
        return await asyncio.to_thread(_list_messages, repository)


def _list_messages(repository: SessionRepository) -> Took:
    agent = SessionAgent(agent_id="agent", state={}, conversation_manager_state={})
    repository.create_agent("session", agent)
    for number in range(MESSAGES):
        text = f"message {number}: " + "what was said, in a sentence of some length. " * 3
        repository.create_message(
            "session",
            "agent",
            SessionMessage({"role": "user", "content": [{"text": text}]}, number),
        )
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(10):
        assert len(repository.list_messages("session", "agent")) == MESSAGES
    return Took(10, time.perf_counter() - clock, time.process_time() - processor)


# -- py-key-value ----------------------------------------------------------------------------------


def _key_values(*, exclusive: bool) -> Contender:
    @asynccontextmanager
    async def contender(folder: Path) -> AsyncIterator[Save]:
        async with AgentStateKeyValueStore(folder / "state", exclusive=exclusive) as store:
            yield _puts(store)

    return contender


@asynccontextmanager
async def _tree(folder: Path) -> AsyncIterator[Save]:
    """As its documentation makes one: names are made safe, and every file is synced."""
    store = FileTreeStore(
        data_directory=folder,
        key_sanitization_strategy=FileTreeV1KeySanitizationStrategy(folder),
        collection_sanitization_strategy=FileTreeV1CollectionSanitizationStrategy(folder),
    )
    yield _puts(store)


def _puts(store: Any) -> Save:
    async def save(_: int, state: State) -> None:
        await store.put(state["agent_id"], state, collection="agents")

    return save
