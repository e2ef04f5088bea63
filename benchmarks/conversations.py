"""Conversations: what one more message costs, beside how many there are and another way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from agent_state import StatePersistenceManager
from agent_state.sessions import SessionManager
from benchmarks.report import Row, at_least, at_most
from benchmarks.workload import Setting, agent_state

AGENT = "guide_agent"
SHORT, LONG, SESSIONS, BLOCK = 10, 10_000, 100, 20
Add = Callable[[str], Awaitable[object]]


@dataclass(slots=True)
class _Run:
    """What one run measured: µs for each message, ms for each page, messages a second."""

    appends: dict[str, list[float]] = field(default_factory=dict)
    resume_ms: list[float] = field(default_factory=list)
    first_key_ms: float = 0.0
    next_key_us: list[float] = field(default_factory=list)
    at_once: float = 0.0
    their_at_once: float = 0.0

    def append(self, name: str) -> float:
        return median(self.appends[name])


def conversations(setting: Setting) -> list[Row]:
    """One process owns the directory; each message is durable before the next is sent."""
    runs = []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            runs.append(asyncio.run(_run(folder, setting)))
    long, short = [run.append("long") for run in runs], [run.append("short") for run in runs]
    theirs = [run.append("sqlite") for run in runs]
    at_once = [run.at_once for run in runs]
    return [
        Row(f"a message to a conversation of {LONG:,}: median ack", long, "µs"),
        Row(f"  … to one of {SHORT}", short, "µs"),
        Row(f"  … {LONG:,} / {SHORT}", _ratios(long, short), "times", at_most(1.2)),
        Row(f"  OpenAI Agents SQLiteSession.add_items, {LONG:,}", theirs, "µs"),
        Row("  ours / SQLiteSession", _ratios(long, theirs), "times", at_most(1)),
        Row("  with renew_interval_seconds=1", [run.append("lately") for run in runs], "µs"),
        Row(
            "  ours with renew_interval_seconds=1 / SQLiteSession",
            _ratios([run.append("lately") for run in runs], theirs),
            "times",
        ),
        Row("  several processes may write", [run.append("shared") for run in runs], "µs"),
        Row("  with a dedupe key", [median(run.next_key_us) for run in runs], "µs"),
        Row(
            f"  … the first one after a start, {LONG:,}",
            [run.first_key_ms for run in runs],
            "ms",
            note="reads the log once",
        ),
        Row(
            f"the session and the last 20 messages of {LONG:,}",
            [median(run.resume_ms) for run in runs],
            "ms",
            at_most(10),
        ),
        Row(f"{SESSIONS} sessions at once", at_once, "messages/s"),
        Row("  SQLiteSession.add_items", [run.their_at_once for run in runs], "/s"),
        Row(
            "  ours / SQLiteSession",
            _ratios(at_once, [run.their_at_once for run in runs]),
            "times",
            at_least(1),
        ),
    ]


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _said(number: int) -> str:
    return f"{number}: {agent_state(0)['context']['system_prompt']}"


async def _run(folder: Path, setting: Setting) -> _Run:
    run = _Run()
    await _appends(folder, setting, run)
    await _resume(folder, setting, run)
    run.at_once = await _at_once(_ours(folder / "crowd"), setting)
    run.their_at_once = await _at_once(_theirs(folder / "crowd.sqlite"), setting)
    return run


@asynccontextmanager
async def _filled(
    directory: Path,
    *,
    exclusive: bool,
    messages: tuple[int, ...],
    renew_interval_seconds: float = 0,
) -> AsyncIterator[list[Add]]:
    """Conversations with so many messages, each as a way to add one more."""
    async with StatePersistenceManager(directory, exclusive=exclusive) as manager:
        sessions = SessionManager(manager, renew_interval_seconds=renew_interval_seconds)

        async def one(sessions: SessionManager, number: int) -> Add:
            session_id = (await sessions.create()).session.session_id
            new = [{"role": "user", "content": _said(n)} for n in range(number)]
            for start in range(0, number, 500):
                await sessions.conversations.add_many(session_id, AGENT, new[start : start + 500])
            return lambda text: sessions.conversations.add(session_id, AGENT, "user", text)

        adds = [await one(sessions, number) for number in messages]
        await manager.flush()
        yield adds


@asynccontextmanager
async def _their_filled(path: Path, messages: int) -> AsyncIterator[Add]:
    # Importing it takes seconds, which other benchmarks need not wait for.
    from agents import SQLiteSession

    session = SQLiteSession("long", path)
    await session.add_items([{"role": "user", "content": _said(n)} for n in range(messages)])
    yield lambda text: session.add_items([{"role": "user", "content": text}])
    assert len(await session.get_items()) > messages
    session.close()


async def _appends(folder: Path, setting: Setting, run: _Run) -> None:
    """Block by block in turns, so that whatever else the machine does befalls all alike."""
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(
            _filled(folder / "state", exclusive=True, messages=(SHORT, LONG))
        )
        shared = await stack.enter_async_context(
            _filled(folder / "shared", exclusive=False, messages=(LONG,))
        )
        lately = await stack.enter_async_context(
            _filled(folder / "lately", exclusive=True, messages=(LONG,), renew_interval_seconds=1)
        )
        sqlite = await stack.enter_async_context(_their_filled(folder / "long.sqlite", LONG))
        ways = dict(
            zip(
                ("short", "long", "shared", "lately", "sqlite"),
                (*opened, *shared, *lately, sqlite),
                strict=True,
            )
        )
        for block in range(setting.scaled(15)):
            names = list(ways) if block % 2 else list(reversed(ways))
            for name in names:
                waits = run.appends.setdefault(name, [])
                for number in range(BLOCK):
                    text = _said(number)
                    began = time.perf_counter()
                    await ways[name](text)
                    waits.append((time.perf_counter() - began) * 1e6)


async def _resume(folder: Path, setting: Setting, run: _Run) -> None:
    """What a page needs after a restart; and a message with a key, whose log must be read."""
    async with StatePersistenceManager(folder / "state", exclusive=True) as manager:
        sessions = SessionManager(manager)
        kept = [await sessions.get(key[0]) for key in await manager.keys("sessions")]
        [session_id] = [
            session.session_id
            for session in kept
            if session.conversations[AGENT].message_count >= LONG
        ]
        for _ in range(setting.scaled(50)):
            began = time.perf_counter()
            await sessions.get(session_id)
            page = await sessions.conversations.page(session_id, AGENT, limit=20)
            run.resume_ms.append((time.perf_counter() - began) * 1e3)
            assert len(page.messages) == 20
        for number in range(setting.scaled(50)):
            began = time.perf_counter()
            await sessions.conversations.add(
                session_id, AGENT, "user", _said(number), dedupe_key=f"key {number}"
            )
            run.next_key_us.append((time.perf_counter() - began) * 1e6)
        run.first_key_ms = run.next_key_us.pop(0) / 1e3


@asynccontextmanager
async def _ours(directory: Path) -> AsyncIterator[list[Add]]:
    async with _filled(directory, exclusive=True, messages=(SHORT,) * SESSIONS) as adds:
        yield adds


@asynccontextmanager
async def _theirs(path: Path) -> AsyncIterator[list[Add]]:
    from agents import SQLiteSession

    sessions = [SQLiteSession(f"session-{n}", path) for n in range(SESSIONS)]

    def adding(session: Any) -> Add:
        return lambda text: session.add_items([{"role": "user", "content": text}])

    yield [adding(session) for session in sessions]
    for session in sessions:
        session.close()


async def _at_once(opened: Any, setting: Setting) -> float:
    """Messages a second, each session sending its next when the last is acknowledged."""
    each = setting.scaled(20)
    async with opened as adds:
        numbers = count()

        async def converse(add: Add) -> None:
            for _ in range(each):
                await add(_said(next(numbers)))

        began = time.perf_counter()
        await asyncio.gather(*(converse(add) for add in adds))
        return len(adds) * each / (time.perf_counter() - began)
