"""Conversations with their journey, and exports, over a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.web import LiveBackend
from tests.web.client import Client, answering

PATH = "/api/journeys/a%2Fnn"
"""Of the user ``a/nn``."""


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[StatePersistenceManager]:
    async with StatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
        yield manager


@pytest.fixture
async def client(manager: StatePersistenceManager) -> AsyncIterator[Client]:
    async with answering(LiveBackend(manager=manager)) as client:
        yield client


async def _begin(client: Client, **body: Any) -> str:
    begun = await client.post(PATH, json=body)
    assert begun.status_code == 201
    return f"{PATH}/{begun.json()['session_id']}"


async def _say(client: Client, path: str, content: str, **more: Any) -> str:
    body = {"role": "user", "content": content, **more}
    answer = await client.post(f"{path}/messages", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["message_id"])


async def test_a_conversation_is_resumed_with_the_way_it_went(client: Client) -> None:
    path = await _begin(client, model_id="m-1", user_timezone="Europe/Berlin")
    for number in range(5):
        await _say(client, path, f"message {number}")
    shift = {"emotion": "breakthrough", "breakthrough_insight": "it was never the code"}
    await _say(client, path, "oh!", update_emotion=shift)

    resumed = (await client.post(f"{path}/resume", params={"recent": 2})).json()
    steps = (await client.get(f"{path}/emotions")).json()["items"]
    summary = (await client.get(f"{path}/summary")).json()

    assert [m["content"] for m in resumed["recent_messages"]] == ["message 4", "oh!"]
    assert resumed["emotional_state"]["emotion"] == "breakthrough"
    assert [step["to_emotion"] for step in steps] == ["breakthrough"]
    assert summary["breakthroughs"][0]["insight"] == "it was never the code"
    assert (await client.get(f"{path}/stats")).json()["message_count"] == 6
    assert [one["message_count"] for one in (await client.get(PATH)).json()["items"]] == [6]


async def test_a_message_sent_twice_is_stored_once(client: Client) -> None:
    path = await _begin(client)
    key = {"Idempotency-Key": "m-7"}
    said = {"role": "user", "content": "hello"}
    for _ in range(2):
        answer = await client.post(f"{path}/messages", json=said, headers=key)
        assert answer.json() == {"message_id": "m-7"}
    other = {"role": "user", "content": "something else"}
    refused = await client.post(f"{path}/messages", json=other, headers=key)

    assert refused.status_code == 422
    assert len((await client.get(f"{path}/messages")).json()["items"]) == 1


async def test_messages_come_in_pages(client: Client) -> None:
    path = await _begin(client)
    for number in range(5):
        await _say(client, path, str(number))
    latest = (await client.get(f"{path}/messages", params={"limit": 2})).json()
    before = {"limit": 2, "before": latest["next"]}
    earlier = (await client.get(f"{path}/messages", params=before)).json()
    before = {"limit": 2, "before": earlier["next"]}
    first = (await client.get(f"{path}/messages", params=before)).json()

    pages = (first, earlier, latest)
    assert [m["content"] for page in pages for m in page["items"]] == ["0", "1", "2", "3", "4"]
    assert first["next"] is None


async def test_a_users_conversations_come_in_pages(client: Client) -> None:
    begun = [(await _begin(client)).rpartition("/")[2] for _ in range(3)]

    first = (await client.get(PATH, params={"limit": 2})).json()
    rest = (await client.get(PATH, params={"limit": 2, "after": first["next"]})).json()

    assert [one["session_id"] for one in first["items"] + rest["items"]] == begun
    assert rest["next"] is None
    assert (await client.get(PATH, params={"after": "nobody"})).status_code == 422


async def test_what_is_closed_takes_nothing_more(client: Client) -> None:
    path = await _begin(client)
    assert (await client.post(f"{path}/close")).json() == {"closed": True}

    said = {"role": "user", "content": "one more thing"}
    refused = await client.post(f"{path}/messages", json=said)
    assert (refused.status_code, refused.json()["code"]) == (410, "ended")
    assert (await client.post(f"{path}/resume")).status_code == 410
    reopened = await client.post(f"{path}/resume", params={"reopen": True})
    assert reopened.status_code == 200
    assert (await client.delete(path)).status_code == 204
    assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize(
    ("form", "kind"),
    [("markdown", "text/markdown"), ("json", "application/json"), ("text", "text/plain")],
)
async def test_a_conversation_is_exported_whole(client: Client, form: str, kind: str) -> None:
    path = await _begin(client)
    for number in range(300):
        await _say(client, path, f"message number {number} with *stars* in it")

    async with client.stream("GET", f"{path}/export", params={"format": form}) as response:
        pieces = [piece async for piece in response.aiter_bytes()]

    text = b"".join(pieces).decode()
    assert response.headers["content-type"].partition(";")[0] == kind
    assert response.headers["transfer-encoding"] == "chunked"  # nobody knew how long it would be
    assert "attachment" in response.headers["content-disposition"]
    assert all(f"message number {number} " in text for number in range(300))
    if form == "json":
        assert len(json.loads(text)["messages"]) == 300


async def test_what_is_off_the_record_is_not_exported_and_not_on_disk(
    client: Client, manager: StatePersistenceManager, tmp_path: Path
) -> None:
    path = await _begin(client, off_the_record=True)
    await _say(client, path, "between us")
    refused = await client.get(f"{path}/export")

    assert (refused.status_code, refused.json()["code"]) == (409, "off_the_record")
    await manager.flush()
    for file in (tmp_path / "state").rglob("*"):
        assert not file.is_file() or b"between us" not in file.read_bytes()
