"""ADK's sessions beside its ``SqliteSessionService``, in the environment that ADK needs.

``python -m benchmarks.google_adk DIRECTORY [--quick]`` prints the rows as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions.base_session_service import BaseSessionService
from google.adk.sessions.session import Session
from google.adk.sessions.sqlite_session_service import SqliteSessionService
from google.genai import types

from agent_state import StatePersistenceManager
from agent_state_integrations.google_adk import AgentStateSessionService
from benchmarks.comparison import Measured, Took, beside, timed
from benchmarks.report import Row
from benchmarks.workload import Setting

Service = Callable[[Path], AbstractAsyncContextManager[BaseSessionService]]


def google_adk(setting: Setting) -> list[Row]:
    """``append_event`` with a change of the state: by one session, and by ten at once."""
    rows = []
    for sessions, title in ((1, "one session"), (10, "10 sessions at once")):
        each = setting.scaled(200 // sessions)
        rows += beside(
            setting,
            f"ADK append_event, {title}",
            {"SqliteSessionService": _load(_sqlite, sessions, each)},
            {
                "AgentStateSessionService": _load(_directory(False), sessions, each),
                "AgentStateSessionService, exclusive": _load(_directory(True), sessions, each),
                "AgentStateSessionService of an open manager": _load(_managed, sessions, each),
            },
            3,
        )
    return rows


@asynccontextmanager
async def _sqlite(folder: Path) -> AsyncIterator[BaseSessionService]:
    yield SqliteSessionService(str(folder / "sessions.db"))


def _directory(exclusive: bool) -> Service:
    return lambda folder: AgentStateSessionService(folder / "state", exclusive=exclusive)


@asynccontextmanager
async def _managed(folder: Path) -> AsyncIterator[BaseSessionService]:
    """Exclusive, on the caller's own loop."""
    async with StatePersistenceManager(folder / "state", exclusive=True) as manager:
        yield AgentStateSessionService(manager)


def _load(make: Service, count: int, each: int) -> Measured:
    async def measure(folder: Path) -> Took:
        async with make(folder) as service:
            sessions = [
                await service.create_session(app_name="app", user_id=f"user-{n}", session_id="s")
                for n in range(count)
            ]
            await asyncio.gather(*(_talk(service, session, 1) for session in sessions))
            work = asyncio.gather(*(_talk(service, session, each) for session in sessions))
            took = await timed(count * each, work)
            for session in sessions:
                found = await service.get_session(
                    app_name="app", user_id=session.user_id, session_id="s"
                )
                assert found is not None
                assert len(found.events) == each + 1
                assert found.state["turn"] == each - 1
            return took

    return measure


async def _talk(service: BaseSessionService, session: Session, turns: int) -> None:
    for turn in range(turns):
        text = f"turn {turn}: " + "what was said, in a sentence of some length. " * 3
        event = Event(
            author="user",
            content=types.Content(role="user", parts=[types.Part(text=text)]),
            actions=EventActions(state_delta={"turn": turn}),
        )
        await service.append_event(session, event)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    rows = google_adk(Setting(asked.directory, 3 if asked.quick else 5, asked.quick))
    print(json.dumps([row.as_object() | {"values": [*row.values]} for row in rows]))


if __name__ == "__main__":
    main()
