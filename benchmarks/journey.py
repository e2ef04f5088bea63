"""Conversations: appending however long they are, resuming, exporting, a hundred at once."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

from agent_state import StatePersistenceManager
from agent_state_integrations.journey import ConversationStateManager, ExportFormat, JourneyMessage
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting, percentile

LONG, SHORT = 10_000, 10
APPENDS = 400
RESUMES = 100
FORMS: tuple[ExportFormat, ...] = ("markdown", "json", "text")
SESSIONS, EACH = 100, 20
TEXT = "I have thought about what you said, and I see it *another* way now. " * 3
USER = "ann"


def journey(setting: Setting) -> list[Row]:
    """A conversation of 10,000 messages compared with one of 10, turn by turn."""
    rows: list[Row] = []
    for name, exclusive in (("exclusive", True), ("shared", False)):
        with setting.folder() as folder:
            rows += asyncio.run(_appending(setting, folder / "state", name, exclusive))
    with setting.folder() as folder:
        state = folder / "state"
        session_id = asyncio.run(_fill(state, LONG))
        rows += asyncio.run(_reading(setting, state, session_id))
        rows += _memory(setting, folder, state, session_id)
    runs = []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            runs.append(asyncio.run(_together(folder / "state")))
    note = f"{SESSIONS} sessions, {EACH} messages each, one process owns the directory"
    rows.append(Row("messages of all sessions", [run[0] for run in runs], "/s", None, note))
    rows.append(Row("append among them, p99", [run[1] for run in runs], "ms"))
    return rows


def _message(number: int) -> JourneyMessage:
    role = "assistant" if number % 2 else "user"
    return JourneyMessage(
        role=role,
        content=f"{number} {TEXT}",
        model_id="m1",
        tokens=40,
        message_id=str(uuid.uuid4()),  # the caller's, so that a retry would be found
    )


async def _append(sessions: ConversationStateManager, session_id: str, number: int) -> None:
    emotion = ("anxious", "exploring", "happy")[number % 3]
    await sessions.append_message(
        USER, session_id, _message(number), {"emotion": emotion} if number % 10 == 0 else None
    )


async def _begin(sessions: ConversationStateManager, messages: int) -> str:
    session_id, _ = await sessions.initialize_session(USER)
    for number in range(messages):
        await _append(sessions, session_id, number)
        if number % 100 == 99:
            await sessions.record_milestone(USER, session_id, f"milestone at {number}")
    return session_id


async def _fill(state: Path, messages: int) -> str:
    async with StatePersistenceManager(state, exclusive=True) as manager:
        return await _begin(ConversationStateManager(manager), messages)


async def _appending(setting: Setting, state: Path, name: str, exclusive: bool) -> list[Row]:
    long = await _fill(state, LONG)
    ratios, took = [], []
    async with StatePersistenceManager(state, exclusive=exclusive) as manager:
        sessions = ConversationStateManager(manager)
        first = await _took(lambda: _append(sessions, long, 0))
        for _ in range(setting.runs):
            short = await _begin(sessions, SHORT)
            times: dict[str, list[float]] = {long: [], short: []}
            for number in range(setting.scaled(APPENDS)):
                for session_id, each in times.items():
                    began = time.perf_counter()
                    await _append(sessions, session_id, number)
                    each.append((time.perf_counter() - began) * 1e3)
            ratios.append(median(times[long]) / median(times[short]))
            took.append(median(times[long]))
    what = f"append, {name}: {LONG:,} messages / {SHORT}"
    return [
        Row(what, ratios, "times", at_most(1.2)),
        Row(f"append to {LONG:,}, {name}", took, "ms"),
        Row("the first, which reads the ids once", [first], "ms"),
    ]


async def _reading(setting: Setting, state: Path, session_id: str) -> list[Row]:
    resumes, exports = [], dict[str, list[float]]()
    async with StatePersistenceManager(state, exclusive=True) as manager:
        sessions = ConversationStateManager(manager)

        async def resume() -> None:
            resumed = await sessions.resume_session(USER, session_id)
            assert len(resumed.recent_messages) == 20
            assert len(resumed.recent_milestones) == 5

        for _ in range(setting.runs):
            resumes.append(median([await _took(resume) for _ in range(RESUMES)]))
            for form in FORMS:

                async def export(form: ExportFormat = form) -> None:
                    made = await sessions.exports.create(USER, session_id, form)
                    assert sum([len(piece) async for piece in made]) > LONG * len(TEXT)

                exports.setdefault(form, []).append(await _took(export))
    return [
        Row(f"resume of {LONG:,} messages, median", resumes, "ms", at_most(10)),
        *(
            Row(f"export of {LONG:,} messages, {form}", each, "ms", at_most(500))
            for form, each in exports.items()
        ),
    ]


async def _took(work: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await work()
    return (time.perf_counter() - began) * 1e3


_PROGRAM = """
import asyncio, json, sys
from agent_state import StatePersistenceManager
from agent_state_integrations.journey import ConversationStateManager
from benchmarks.journey import USER, _begin, _peak

async def main(state, session_id, how):
    async with StatePersistenceManager(state) as manager:
        sessions = ConversationStateManager(manager)
        small = await _begin(sessions, 200)
        await sessions.exports.markdown(USER, small)
        before, size = _peak(), 0
        if how == "streamed":
            async for piece in await sessions.exports.create(USER, session_id):
                size += len(piece)
        else:
            size = len((await sessions.exports.markdown(USER, session_id))[0])
        print(json.dumps([_peak() - before, size / 2**20]))

asyncio.run(main(*sys.argv[1:]))
"""


def _peak() -> float:
    """The largest resident set this program has had, in MiB; getrusage would tell the parent's."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _memory(setting: Setting, folder: Path, state: Path, session_id: str) -> list[Row]:
    """Each in a process of its own, as the peak is a process's."""
    rows = []
    for how, most in (("streamed", at_most(4)), ("as one text", None)):
        grown, size = [], 0.0
        for _ in range(setting.runs):
            root = str(Path(__file__).resolve().parents[1])
            asked = subprocess.run(  # noqa: S603  # our own program
                [sys.executable, "-c", _PROGRAM, str(state), session_id, how],
                env={**os.environ, "PYTHONPATH": root},
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            )
            growth, size = json.loads(asked.stdout)
            grown.append(growth)
        note = f"the text is {size:.1f} MiB"
        rows.append(Row(f"memory of that export, {how}", grown, "MiB", most, note))
    return rows


async def _together(state: Path) -> tuple[float, float]:
    acks: list[float] = []
    async with StatePersistenceManager(state, exclusive=True) as manager:
        sessions = ConversationStateManager(manager)

        async def one(user: str) -> None:
            session_id, _ = await sessions.initialize_session(user)
            for number in range(EACH):
                began = time.perf_counter()
                await sessions.append_message(user, session_id, _message(number))
                acks.append((time.perf_counter() - began) * 1e3)

        began = time.perf_counter()
        await asyncio.gather(*(one(f"user-{number}") for number in range(SESSIONS)))
        seconds = time.perf_counter() - began
    return len(acks) / seconds, percentile(acks, 0.99)
