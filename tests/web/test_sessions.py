"""Sessions, their conversations and tokens over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.sessions import SessionManager
from agent_state.testing import FakeClock
from agent_state.web import EventSettings, LiveBackend
from agent_state_integrations.orchestration import preset
from tests.web.client import Client, Events, answering


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def manager(tmp_path: Path, clock: FakeClock) -> AsyncIterator[StatePersistenceManager]:
    async with StatePersistenceManager(tmp_path / "state", exclusive=True, clock=clock) as manager:
        yield manager


@pytest.fixture
async def client(manager: StatePersistenceManager) -> AsyncIterator[Client]:
    sessions = SessionManager(manager)
    preset(sessions)
    async with answering(
        LiveBackend(manager=manager, sessions=sessions),
        events=EventSettings(heartbeat_seconds=0.05),
    ) as client:
        yield client


async def _session(client: Client, **body: Any) -> dict[str, Any]:
    made = await client.post("/api/global/session", json=body)
    assert made.status_code == 201
    found: dict[str, Any] = made.json()
    return found


def _path(session: dict[str, Any], rest: str = "") -> str:
    return f"/api/global/session/{session['session_id']}{rest}"


def _holder(session: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {session['session_token']}"}


GUIDE = "/conversations/guide_agent/messages"


async def test_a_new_session_has_its_orchestrators_conversations_and_token(client: Client) -> None:
    session = await _session(client, user_id="ann", session_type="mvp", context={"lang": "de"})

    assert set(session["orchestrator_states"].values()) == {"not_started"}
    assert len(session["orchestrator_states"]) == 4
    assert set(session["orchestrator_context"]) == {
        "active_orchestrators",
        "finished_orchestrators",
        "enabling_services",
        "workflow_delegation_chain",
    }
    guide = session["conversations"]["guide_agent"]
    assert guide["conversation_id"] == f"conv_guide_agent_{session['session_id']}"
    assert session["context"] == {"lang": "de", "session_type": "mvp"}
    assert len(session["session_token"]) >= 32
    assert (await client.get(_path(session))).json()["session_token"] is None


async def test_the_token_is_stored_nowhere(client: Client, tmp_path: Path) -> None:
    session = await _session(client)
    await client.app.state.backend.writable().manager.flush()
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]

    assert files
    assert not [p for p in files if session["session_token"].encode() in p.read_bytes()]


async def test_a_page_that_is_refreshed_finds_what_was_said(client: Client) -> None:
    session = await _session(client)
    for number in range(25):
        said = {"content": f"message {number}"}
        await client.post(_path(session, GUIDE), json=said, headers=_holder(session))

    page = await client.get("/api/global/session", headers=_holder(session))

    messages = page.json()["conversations"]["guide_agent"]["messages"]
    assert [message["content"] for message in messages] == [f"message {n}" for n in range(5, 25)]
    assert page.json()["conversations"]["guide_agent"]["message_count"] == 25


async def test_a_message_sent_twice_is_stored_once(client: Client) -> None:
    session = await _session(client)
    key = {"Idempotency-Key": "click-1"}
    answers = await asyncio.gather(
        *(
            client.post(_path(session, GUIDE), json={"content": "hello"}, headers=key)
            for _ in range(6)
        )
    )

    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]
    assert len({answer.json()["message"]["message_id"] for answer in answers}) == 1
    page = (await client.get(_path(session, GUIDE))).json()
    assert [message["content"] for message in page["messages"]] == ["hello"]


@pytest.mark.parametrize(
    "other",
    [
        {"content": "good bye"},
        {"role": "assistant"},
        {"metadata": {"a": 1}},
        {"orchestrator_context": {"workflow_id": "w"}},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_another_message_under_a_used_key_is_refused(
    client: Client, other: dict[str, Any]
) -> None:
    session = await _session(client)
    said, key = {"role": "user", "content": "hello"}, {"Idempotency-Key": "1"}
    first = await client.post(_path(session, GUIDE), json=said, headers=key)
    refused = await client.post(_path(session, GUIDE), json=said | other, headers=key)
    again = await client.post(_path(session, GUIDE), json=said, headers=key)

    assert (first.status_code, again.status_code) == (201, 200)
    assert (refused.status_code, refused.json()["code"]) == (422, "key_reused")
    page = (await client.get(_path(session, GUIDE))).json()
    assert [message["content"] for message in page["messages"]] == ["hello"]


async def test_the_history_comes_in_pages_and_filtered(client: Client) -> None:
    session = await _session(client)
    for number in range(7):
        role = "user" if number % 2 == 0 else "assistant"
        said = {"role": role, "content": f"message {number}"}
        await client.post(_path(session, GUIDE), json=said)

    latest = (await client.get(_path(session, GUIDE), params={"limit": 3})).json()
    before = {"limit": 3, "before": latest["next_before"]}
    earlier = (await client.get(_path(session, GUIDE), params=before)).json()
    mine = (await client.get(_path(session, GUIDE), params={"role": "assistant"})).json()
    found = (await client.get(_path(session, GUIDE), params={"text": "AGE 3"})).json()

    assert [m["content"][-1] for m in latest["messages"]] == ["4", "5", "6"]
    assert [m["content"][-1] for m in earlier["messages"]] == ["1", "2", "3"]
    assert [m["content"][-1] for m in mine["messages"]] == ["1", "3", "5"]
    assert [m["content"][-1] for m in found["messages"]] == ["3"]


async def test_a_workflow_shows_in_the_session_and_the_conversation(client: Client) -> None:
    session = await _session(client)
    workflow = _path(session, "/orchestrators/ContentAnalysisOrchestrator/workflows/w-1")
    await client.put(workflow, json={"status": "processing", "progress": {"pages": 3}})
    await client.put(workflow.replace("w-1", "w-2"), json={"status": "processing"})
    used = {"status": "busy", "workflow_id": "w-1"}
    service = await client.post(_path(session, "/services/FileParser"), json=used)
    context = {"context": {"orchestrator": "ContentAnalysisOrchestrator", "workflow_id": "w-1"}}
    await client.patch(_path(session, "/conversations/content_liaison/context"), json=context)

    seen = (await client.get(_path(session))).json()
    state = (await client.get(_path(session, "/orchestrators/ContentAnalysisOrchestrator"))).json()

    assert seen["orchestrator_states"]["ContentAnalysisOrchestrator"] == "processing"
    active = seen["orchestrator_context"]["active_orchestrators"]
    assert {one["workflow_id"] for one in active} == {"w-1", "w-2"}
    assert service.json()["invocations"] == 1
    about = seen["conversations"]["content_liaison"]["orchestrator_context"]
    assert about["active_workflows"] == ["w-1"]
    assert {one["workflow_id"] for one in state["workflows"]} == {"w-1", "w-2"}


async def test_a_session_token_opens_its_session_and_nothing_else(client: Client) -> None:
    mine, other = await _session(client), await _session(client)
    headers = _holder(mine)

    assert (await client.get(_path(mine), headers=headers)).status_code == 200
    for path in (
        _path(other),
        _path(other, GUIDE),
        _path({"session_id": "none"}),
        "/api/agents",
        "/api/events",
        "/api/restore-report",
        "/api/journeys/ann",
    ):
        assert (await client.get(path, headers=headers)).status_code == 403, path
    assert (await client.post("/api/global/session", json={}, headers=headers)).status_code == 403


async def test_who_holds_a_session_speaks_as_user_only(client: Client) -> None:
    session = await _session(client)
    said = {"role": "assistant", "content": "I am the machine"}

    refused = await client.post(_path(session, GUIDE), json=said, headers=_holder(session))

    assert refused.status_code == 403


async def test_a_token_that_was_replaced_opens_nothing(client: Client) -> None:
    session = await _session(client)
    changed = await client.post(_path(session, "/token"), headers=_holder(session))

    assert (await client.get(_path(session), headers=_holder(session))).status_code == 401
    assert (await client.get(_path(session), headers=_holder(changed.json()))).status_code == 200
    assert (await client.delete(_path(session, "/token"))).json() == {"revoked": True}
    assert (await client.get(_path(session), headers=_holder(changed.json()))).status_code == 401


async def test_a_session_that_was_destroyed_is_gone_from_the_disk(
    client: Client, tmp_path: Path
) -> None:
    session = await _session(client, user_id="ann")
    await client.post(_path(session, GUIDE), json={"content": "unforgettable"})
    assert (await client.delete(_path(session))).status_code == 204

    assert (await client.delete(_path(session))).status_code == 404
    assert (await client.get(_path(session))).status_code == 404
    again = await client.post(_path(session, GUIDE), json={"content": "hello?"})
    assert again.status_code == 404
    await client.app.state.backend.writable().manager.flush()
    for path in (tmp_path / "state").rglob("*"):
        assert not path.is_file() or b"unforgettable" not in path.read_bytes()


async def test_an_expired_session_says_so_to_everybody(client: Client, clock: FakeClock) -> None:
    session = await _session(client)
    await clock.advance(3000)
    assert (await client.post(_path(session, "/touch"))).status_code == 200
    await clock.advance(3000)
    assert (await client.get(_path(session))).status_code == 200  # renewed
    await clock.advance(1000)

    for headers in ({}, _holder(session)):
        answer = await client.get(_path(session), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (410, "ended")
    assert (await client.get("/api/agents", headers=_holder(session))).status_code == 403
    tidied = await client.post("/api/global/sessions/cleanup")
    assert tidied.json()["expired"] == [session["session_id"]]
    assert (await client.get(_path(session))).status_code == 404


async def test_a_session_is_followed_by_who_holds_its_token(client: Client) -> None:
    mine, other = await _session(client), await _session(client)
    async with client.stream("GET", _path(mine, "/events"), headers=_holder(mine)) as response:
        events = Events(response)
        await events.named("ready")
        await client.post(_path(other, GUIDE), json={"content": "not for you"})
        await client.post(_path(mine, GUIDE), json={"content": "hello"})
        told = json.loads((await events.named("change"))["data"])
        await client.delete(_path(mine))
        while await events.next():
            pass  # until it is seen that there is no session any more

    assert (told["kind"], told["key"]) == ("sessions", [mine["session_id"]])


async def test_a_stream_ends_when_its_token_opens_the_session_no_longer(client: Client) -> None:
    session = await _session(client)
    async with client.stream(
        "GET", _path(session, "/events"), headers=_holder(session)
    ) as response:
        events = Events(response)
        await events.named("ready")
        await client.post(_path(session, "/token"))
        while await events.next():
            pass

    assert (await client.get(_path(session))).status_code == 200


async def test_states_and_the_history_of_a_session(client: Client) -> None:
    session = await _session(client)
    path = _path(session, "/states/upload")
    kept = {"state_data": {"files": 3}, "orchestrator": "ContentAnalysisOrchestrator"}
    assert (await client.put(path, json=kept)).json()["state_data"] == {"files": 3}
    found = (await client.get(path)).json()
    assert found["orchestrator_metadata"]["created_by_orchestrator"] == kept["orchestrator"]
    assert (await client.get(_path(session, "/states/none"))).status_code == 404
    change = await client.patch(_path(session), json={"state": {"a": {"b": 1}}})
    assert change.json()["state"] == {"a": {"b": 1}}

    history = (await client.get(_path(session, "/history"), params={"limit": 1})).json()

    assert [event["event"] for event in history["events"]] == ["created"]
    conversation = f"conv_guide_agent_{session['session_id']}"
    belongs = await client.get(f"/api/global/conversations/{conversation}")
    assert belongs.json() == {"session_id": session["session_id"], "agent_type": "guide_agent"}


async def test_a_type_of_conversation_that_the_application_registers(
    manager: StatePersistenceManager,
) -> None:
    sessions = SessionManager(manager, agent_types=["poet"])
    async with answering(LiveBackend(manager=manager, sessions=sessions)) as client:
        session = await _session(client)
        path = _path(session, "/conversations/poet/messages")
        assert (await client.post(path, json={"content": "a rose"})).status_code == 201
        wizard = path.replace("poet", "wizard")
        assert (await client.post(wizard, json={"content": "!"})).status_code == 422
