"""``agent-state import adk``: what ADK's own services have stored, in a state directory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions.base_session_service import BaseSessionService
from google.adk.sessions.sqlite_session_service import SqliteSessionService
from google.genai import types

from agent_state.cli.app import run as main
from agent_state_integrations.google_adk import AgentStateSessionService

SESSIONS = ("one", "a/b", "con", "é" * 90)
LONG = "con"


def event(n: int, at: float | None = None, delta: Any = None) -> Event:
    part = types.Part.from_function_call(name="f", args={"n": n, "odd": [2**40, None, "é"]})
    return Event(
        author="user",
        timestamp=float(n) if at is None else at,
        content=types.Content(role="user", parts=[part]),
        actions=EventActions(state_delta=delta or {}),
    )


async def fill(service: BaseSessionService) -> None:
    for session_id in SESSIONS:
        state = {"app:a": 1, "user:u": [1.5, None], "s": session_id}
        session = await service.create_session(
            app_name="app", user_id="ann", session_id=session_id, state=state
        )
        session.last_update_time = 1e12  # else events of long ago are stale
        for n in range(1, 511 if session_id == LONG else 4):
            await service.append_event(session, event(n, delta={"n": n, "app:last": session_id}))


async def read(service: BaseSessionService, session_id: str) -> Any:
    return await service.get_session(app_name="app", user_id="ann", session_id=session_id)


async def read_here(state: Path, session_id: str) -> Any:
    async with AgentStateSessionService(state) as service:
        return await read(service, session_id)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "old.db"
    asyncio.run(fill(SqliteSessionService(str(path))))
    return path


def test_every_session_is_brought_over_once(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    content = database.read_bytes()
    command = ["import", "adk", str(database), "--state", str(state)]

    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said == f"{len(SESSIONS)} sessions with 519 events would be brought over\n"
    assert not state.exists()
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {
            "sessions": len(SESSIONS),
            "events": 519,
            "shared_states": 2,
            "refused": {},
        }
    assert database.read_bytes() == content
    for session_id in SESSIONS:
        theirs = asyncio.run(read(SqliteSessionService(str(database)), session_id))
        ours = asyncio.run(read_here(state, session_id))
        assert ours.model_dump() == theirs.model_dump()

    async def go_on() -> None:
        async with AgentStateSessionService(state) as service:
            session = await read(service, "one")
            await service.append_event(session, event(9, delta={"s": "new"}))
            again = await read(service, "one")
            assert (len(again.events), again.state["s"]) == (4, "new")

    asyncio.run(go_on())
    assert main(command) == 1  # it has gone on here
    assert "not brought over: app/ann/one: it is stored with another" in capsys.readouterr().err


def test_events_keep_the_order_in_which_they_were_appended(tmp_path: Path) -> None:
    database, state = tmp_path / "old.db", tmp_path / "state"
    appended = [event(1, at=100.0), event(2, at=50.0), event(3, at=75.0)]

    async def fill_out_of_order() -> None:
        service = SqliteSessionService(str(database))
        session = await service.create_session(app_name="app", user_id="ann", session_id="s")
        for each in appended:
            session.last_update_time = 1e12
            await service.append_event(session, each)

    asyncio.run(fill_out_of_order())
    assert main(["import", "adk", str(database), "--state", str(state)]) == 0
    assert asyncio.run(read_here(state, "s")).events == appended


def test_what_differs_is_refused(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"

    async def begin() -> None:
        async with AgentStateSessionService(state) as service:
            await service.create_session(
                app_name="app", user_id="ann", session_id="one", state={"user:u": "of this side"}
            )
        async with AgentStateSessionService(state) as service:
            await service.create_session(app_name="app", user_id="bob", session_id="one")

    asyncio.run(begin())
    assert main(["import", "adk", str(database), "--state", str(state), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report["refused"]) == {"app/ann", "app/ann/one"}
    assert asyncio.run(read_here(state, "one")).state["user:u"] == "of this side"
    assert len(asyncio.run(read_here(state, LONG)).events) == 510


def test_a_file_without_the_tables_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no database")
    for name in ("text", "missing"):
        assert main(["import", "adk", str(tmp_path / name), "--state", str(tmp_path / "s")]) == 2
        assert "no sessions can be read" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def test_its_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "adk", "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example: agent-state import adk " in said
    assert all(option in said for option in ("--state", "--dry-run", "--json"))
