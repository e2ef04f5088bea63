"""ADK's sessions in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.adk.agents import LlmAgent
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_response import LlmResponse
from google.adk.runners import Runner
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types

from agent_state_integrations.google_adk import AgentStateSessionService
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
)


@pytest.fixture(params=STATES)
async def service(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateSessionService]:
    async with state_of(request.param, tmp_path) as state, AgentStateSessionService(state) as made:
        yield made


def event(n: int = 1, /, **delta: Any) -> Event:
    return Event(author="user", timestamp=float(n), actions=EventActions(state_delta=delta))


async def create(service: AgentStateSessionService, **fields: Any) -> Any:
    return await service.create_session(**{"app_name": "app", "user_id": "ann", **fields})


async def get(service: AgentStateSessionService, session_id: str, **fields: Any) -> Any:
    where = {"app_name": "app", "user_id": "ann", "session_id": session_id}
    return await service.get_session(**{**where, **fields})


async def test_states_have_their_scopes(service: AgentStateSessionService) -> None:
    state = {"app:a": 1, "user:u": 2, "s": 3, "temp:t": 4}
    one = await create(service, session_id=" one ", state=state)
    assert one.id == "one"
    assert one.state == {"app:a": 1, "user:u": 2, "s": 3}
    delta = {"app:a": {"x": [2**70, None]}, "user:u": None, "s": float("inf"), "temp:t": 5}
    returned = await service.append_event(one, event(1, **delta))
    assert "temp:t" not in returned.actions.state_delta
    assert one.state["temp:t"] == 5

    other = await create(service)
    assert other.id
    assert other.state == {"app:a": {"x": [2**70, None]}, "user:u": None}
    stranger = await create(service, user_id="bob")
    assert stranger.state == {"app:a": {"x": [2**70, None]}}
    again = await get(service, "one")
    assert again.state["s"] == float("inf")
    assert "temp:t" not in again.state
    assert await service.get_user_state(app_name="app", user_id="ann") == {"u": None}
    assert await service.get_user_state(app_name="app", user_id="nobody") == {}


async def test_events_come_back_as_they_were(service: AgentStateSessionService) -> None:
    session = await create(service, session_id="s")
    appended = []
    for n in range(1, 6):
        part = types.Part.from_function_call(name="f", args={"n": n, "big": 2**65})
        made = event(n, n=n)
        made.content = types.Content(role="model", parts=[part])
        appended.append(await service.append_event(session, made))
    partial = event(9)
    partial.partial = True
    await service.append_event(session, partial)

    async def times(**config: Any) -> list[float]:
        found = await get(service, "s", config=GetSessionConfig(**config))
        return [each.timestamp for each in found.events]

    assert (await get(service, " s ")).events == appended
    assert await times(num_recent_events=2) == [4.0, 5.0]
    assert await times(num_recent_events=0) == []
    assert await times(after_timestamp=3.0) == [3.0, 4.0, 5.0]
    assert await times(after_timestamp=2.0, num_recent_events=2) == [4.0, 5.0]
    assert (await get(service, "s")).last_update_time == 5.0


async def test_a_stale_session_is_refused_by_its_revision(
    service: AgentStateSessionService,
) -> None:
    await create(service, session_id="s")
    one, other = await get(service, "s"), await get(service, "s")
    await service.append_event(one, event(5, n=1))
    await service.append_event(one, event(1, n=2))  # a clock that went back is not stale

    with pytest.raises(ValueError, match="has changed since it was read"):
        await service.append_event(other, event(9, n=3))

    found = await get(service, "s")
    assert [each.timestamp for each in found.events] == [5.0, 1.0]
    assert found.state["n"] == 2
    await service.append_event(await get(service, "s"), event(9, n=3))


async def test_the_same_event_again_changes_nothing(service: AgentStateSessionService) -> None:
    session = await create(service, session_id="s")
    stale = await get(service, "s")
    made = event(1, n=1)
    await service.append_event(session, made)
    await service.append_event(session, event(2, n=2))
    await service.append_event(session, made)
    await service.append_event(stale, made)

    found = await get(service, "s")
    assert len(found.events) == 2
    assert found.state["n"] == 2


async def test_parallel_branches_share_a_session(service: AgentStateSessionService) -> None:
    session = await create(service, session_id="s")
    many = [event(n, **{f"n{n}": n, "user:last": n}) for n in range(1, 9)]
    await asyncio.gather(*(service.append_event(session, each) for each in many))

    found = await get(service, "s")
    assert len(found.events) == 8
    assert {name for name in found.state if name.startswith("n")} == {f"n{n}" for n in range(1, 9)}


async def test_creating_listing_and_deleting(service: AgentStateSessionService) -> None:
    for n, name in enumerate(["c", "a", "b"]):
        session = await create(service, session_id=name, user_id="bob" if name == "a" else "ann")
        await service.append_event(session, event(n + 1))
    with pytest.raises(AlreadyExistsError):
        await create(service, session_id=" c ")
    listed = await service.list_sessions(app_name="app")
    assert [each.id for each in listed.sessions] == ["c", "a", "b"]
    assert all(each.events == [] for each in listed.sessions)
    listed = await service.list_sessions(app_name="app", user_id="ann")
    assert [each.id for each in listed.sessions] == ["c", "b"]
    gone = await get(service, "c")
    for _ in range(2):
        await service.delete_session(app_name="app", user_id="ann", session_id="c")
    assert await get(service, "c") is None
    with pytest.raises(SessionNotFoundError):
        await service.append_event(gone, event(9))


async def test_every_id_is_its_own(service: AgentStateSessionService) -> None:
    for name in HOSTILE[1:]:
        await create(service, session_id="s", app_name=name, state={"n": name})
        await create(service, session_id="s", user_id=name, state={"n": name})
        await create(service, session_id=f"s{name}", state={"n": name})

    for name in HOSTILE[1:]:
        for where in ({"app_name": name}, {"user_id": name}):
            assert (await get(service, "s", **where)).state == {"n": name}
        assert (await get(service, f"s{name}")).state == {"n": name}


class Counter(BaseLlm):
    """Says how many contents it was shown."""

    async def generate_content_async(
        self, llm_request: Any, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        part = types.Part(text=str(len(llm_request.contents)))
        yield LlmResponse(content=types.Content(role="model", parts=[part]))


async def test_a_runner_goes_on_in_another_process(tmp_path: Path) -> None:
    answers = []
    for n in range(2):
        async with AgentStateSessionService(tmp_path) as service:
            agent = LlmAgent(name="clerk", model=Counter(model="counter"), output_key="user:last")
            runner = Runner(app_name="app", agent=agent, session_service=service)
            if n == 0:
                await create(service, session_id="s")
            message = types.Content(role="user", parts=[types.Part(text="hello")])
            async for made in runner.run_async(user_id="ann", session_id="s", new_message=message):
                answers += [part.text for part in (made.content.parts if made.content else [])]
    assert answers == ["1", "3"]
    async with AgentStateSessionService(tmp_path) as service:
        assert await service.get_user_state(app_name="app", user_id="ann") == {"last": "3"}


PROGRAM = """
import asyncio, itertools, sys
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from agent_state_integrations.google_adk import AgentStateSessionService
async def main():
    name = (sys.argv + ["killed"])[1]
    async with AgentStateSessionService({directory!r}) as service:
        where = dict(app_name="app", user_id="ann", session_id=name)
        session = await service.create_session(**where)
        for n in range(10) if name != "killed" else itertools.count():
            delta = {{"n": n, f"user:{{name}}": n}}
            event = Event(author="user", actions=EventActions(state_delta=delta))
            await service.append_event(session, event)
            print(n, flush=True)
asyncio.run(main())
"""


def test_eight_processes_append_and_nothing_is_lost_by_kill_9(tmp_path: Path) -> None:
    program = PROGRAM.format(directory=str(tmp_path))
    run_at_once(program, 8)
    lines = kill_after_lines(program, 10)

    async def check() -> None:
        async with AgentStateSessionService(tmp_path) as service:
            killed = await get(service, "killed")
            assert len(killed.events) in (len(lines), len(lines) + 1)
            assert killed.state["n"] == killed.state["user:killed"] == len(killed.events) - 1
            assert {killed.state[f"user:{n}"] for n in range(8)} == {9}

    asyncio.run(check())


async def test_a_cancelled_append_is_whole(tmp_path: Path) -> None:
    async with AgentStateSessionService(tmp_path) as service:
        session = await create(service, session_id="s")
        await cancel_soon(service.append_event(session, event(1, n=1)))
        found = await get(service, "s")

        assert (len(found.events), found.state.get("n")) in ((0, None), (1, 1))


@pytest.mark.long("10,000 events")
async def test_ten_thousand_events(tmp_path: Path) -> None:
    async with state_of("exclusive", tmp_path) as state:
        service = AgentStateSessionService(state)
        session = await create(service, session_id="s")
        for n in range(10_000):
            await service.append_event(session, event(n, n=n))

        found = await get(service, "s", config=GetSessionConfig(num_recent_events=2))
        assert [each.timestamp for each in found.events] == [9_998.0, 9_999.0]
