"""Sessions that older versions have kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.genai import types

from agent_state_integrations.google_adk import AgentStateSessionService
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("google-adk", "google-genai")
NAMES = ("both/ü", "of 1", "of 2")
ANN: Any = {"app_name": "app", "user_id": "ann"}


async def write(directory: Path, turn: int) -> None:
    async with AgentStateSessionService(directory) as service:
        for name in ("both/ü", f"of {turn}"):
            session = await service.get_session(**ANN, session_id=name)
            if session is None:
                given = {"app:a": 1, "user:u": 2, "s": 3, "temp:t": 4}
                session = await service.create_session(**ANN, session_id=name, state=given)
            delta = {"app:a": turn, f"user:{turn}": {"n": [2**70, None]}, "s": f"ü {turn}"}
            event = Event(
                id=f"e{turn}",
                author="user",
                invocation_id=f"i{turn}",
                timestamp=float(turn),
                actions=EventActions(state_delta=delta),
            )
            part = types.Part.from_function_call(name="f", args={"n": turn})
            blob = types.Part.from_bytes(data=b"\x00\xff", mime_type="image/png")
            event.content = types.Content(role="model", parts=[part, blob])
            await service.append_event(session, event)


async def read(directory: Path) -> Any:
    found = []
    async with AgentStateSessionService(directory) as service:
        for name in NAMES:
            session = await service.get_session(**ANN, session_id=name)
            if session is not None:
                events = [
                    each.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
                    for each in session.events
                ]
                found.append([name, session.state, events, session.last_update_time])
        listed = await service.list_sessions(**ANN)
        return [found, sorted(each.id for each in listed.sessions)]


@pytest.mark.parametrize("older", older_states("google_adk"), ids=name_of)
async def test_a_session_of_an_older_version_goes_on(older: OlderState, tmp_path: Path) -> None:
    await check(older, tmp_path, write, read)
