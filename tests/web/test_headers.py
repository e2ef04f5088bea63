"""Headers of every answer: validators, compression, methods, and what a page may read."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from agent_state import AsyncAgentSessionManager, MemoryStateStore, StatePersistenceManager
from agent_state.sessions import SessionManager
from agent_state.web import LiveBackend
from agent_state.web.operations import has_etag
from tests.web.client import Client, Events, answering

PAGE = "https://app.example"


@pytest.fixture
async def manager() -> AsyncIterator[StatePersistenceManager]:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        yield manager


@pytest.fixture
async def client(manager: StatePersistenceManager) -> AsyncIterator[Client]:
    async with answering(LiveBackend(manager=manager), cors_origins=[PAGE]) as client:
        yield client


async def test_what_has_not_changed_is_not_sent_again(
    client: Client, manager: StatePersistenceManager
) -> None:
    await manager.save_agent_state("alice", {"agent_id": "alice"})
    for path in ("/api/agents", "/api/agents/alice", "/openapi.json"):
        known = (await client.get(path)).headers["etag"]
        again = await client.get(path, headers={"If-None-Match": f'"x", {known}'})
        assert (again.status_code, again.content) == (304, b""), path
        assert again.headers["etag"] == known
    before = {"If-None-Match": (await client.get("/api/agents/alice")).headers["etag"]}
    await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "good"})

    assert (await client.get("/api/agents/alice", headers=before)).status_code == 200


async def test_the_etag_of_a_document_is_its_revision(
    client: Client, manager: StatePersistenceManager
) -> None:
    for mood in ("good", "better"):
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": mood})

    assert (await client.get("/api/agents/alice")).headers["etag"] == '"2"'


async def test_a_session_is_changed_only_as_it_was_read(
    client: Client, manager: StatePersistenceManager
) -> None:
    session_id = (await client.post("/api/global/session", json={})).json()["session_id"]
    path = f"/api/global/session/{session_id}"
    read = (await client.get(path)).headers["etag"]

    async def change(if_match: str) -> int:
        body = {"state": {"n": 1}}
        answer = await client.patch(path, json=body, headers={"If-Match": if_match})
        return answer.status_code

    assert await change('"999"') == 412
    assert await change("nonsense") == 412
    assert await change(read) == 200
    assert await change(read) == 412
    assert await change("*") == 200


@pytest.mark.parametrize(
    ("header", "found"),
    [("*", True), ('"7"', True), ('W/"7"', True), ('"6", "7"', True), ('"6"', False), ("", False)],
)
def test_a_list_of_etags_is_read(header: str, found: bool) -> None:
    assert has_etag(header, '"7"') is found


async def test_a_long_answer_is_compressed_for_whom_that_suits(
    client: Client, manager: StatePersistenceManager
) -> None:
    await manager.save_agent_state("alice", {"agent_id": "alice", "text": "word " * 1000})

    async def raw(accepted: str) -> tuple[str | None, bytes]:
        headers = {"Accept-Encoding": accepted}
        async with client.stream("GET", "/api/agents/alice", headers=headers) as answer:
            body = b"".join([part async for part in answer.aiter_raw()])
            assert int(answer.headers["content-length"]) == len(body)
            assert "Accept-Encoding" in answer.headers["vary"]
            return answer.headers.get("content-encoding"), body

    plain, packed = await raw("identity"), await raw("gzip, br")

    assert plain[0] is None
    assert packed[0] == "gzip"
    assert json.loads(gzip.decompress(packed[1])) == json.loads(plain[1])
    assert len(packed[1]) * 5 < len(plain[1])
    for refused in ("gzip;q=0", "gzip; q=0.000", "identity;q=1, gzip;q=0.0", "br", ""):
        assert (await raw(refused))[0] is None, refused
    for accepted in ("br;q=1.0, gzip;q=0.8", "GZIP", "*", "*;q=0, gzip"):
        assert (await raw(accepted))[0] == "gzip", accepted


@pytest.fixture
async def operated() -> AsyncIterator[Client]:
    async with (
        AsyncAgentSessionManager(store=MemoryStateStore()) as runtime,
        answering(LiveBackend(runtime=runtime)) as client,
    ):
        yield client


async def test_every_long_answer_but_events_is_compressed_for_whom_that_suits(
    operated: Client,
) -> None:
    client = operated
    made = (await client.post("/api/journeys/ann", json={})).json()
    journey = f"/api/journeys/ann/{made['session_id']}"
    for number in range(40):
        said = {"role": "user", "content": f"{number}: {'so it is ' * 20}"}
        await client.post(f"{journey}/messages", json=said)
    wrong = "&".join("status=nonsense" for _ in range(40))
    for path in (
        "/metrics",
        f"{journey}/export?format=json",
        f"{journey}/export?format=markdown",
        f"{journey}/export?format=pdf",
        f"/api/tasks?{wrong}",
    ):
        plain = await client.get(path, headers={"Accept-Encoding": "identity"})
        async with client.stream("GET", path, headers={"Accept-Encoding": "gzip"}) as packed:
            body = b"".join([part async for part in packed.aiter_raw()])
        assert "content-encoding" not in plain.headers, path
        assert packed.headers.get("content-encoding") == "gzip", (path, plain.text[:500])
        assert packed.headers.get("content-length", str(len(body))) == str(len(body)), path
        assert "Accept-Encoding" in packed.headers["vary"], path
        assert len(body) < len(plain.content), path
        if "export" not in path:  # each export is another one
            assert gzip.decompress(body) == plain.content, path
        head = await client.head(path, headers={"Accept-Encoding": "gzip"})
        assert head.headers.get("content-encoding") == "gzip", path
        assert head.content == b"", path
    headers = {"Accept-Encoding": "gzip"}
    async with client.stream("GET", "/api/events", headers=headers) as events:
        assert "content-encoding" not in events.headers
        assert (await Events(events).next())["event"] == "ready"


async def test_figures_that_have_not_changed_are_not_sent_again(client: Client) -> None:
    known = (await client.get("/metrics")).headers["etag"]

    assert (await client.get("/metrics", headers={"If-None-Match": known})).status_code == 304


async def test_a_list_of_etags_may_be_in_several_lines(
    client: Client, manager: StatePersistenceManager
) -> None:
    await manager.save_agent_state("alice", {"agent_id": "alice"})
    etag = (await client.get("/api/agents/alice")).headers["etag"]

    answer = await client.get(
        "/api/agents/alice", headers=[("If-None-Match", '"x"'), ("If-None-Match", etag)]
    )

    assert answer.status_code == 304


async def test_a_new_message_is_sent_though_the_document_has_not_changed(
    manager: StatePersistenceManager,
) -> None:
    sessions = SessionManager(manager, renew_interval_seconds=60)
    made = await sessions.create(None)
    session_id = made.session.session_id
    await sessions.conversations.add(session_id, "guide_agent", "user", "one")
    async with answering(LiveBackend(manager=manager, sessions=sessions)) as client:
        path = f"/api/global/session/{session_id}"
        before = await client.get(path)
        await sessions.conversations.add(session_id, "guide_agent", "user", "two")

        after = await client.get(path, headers={"If-None-Match": before.headers["etag"]})

        assert after.status_code == 200
        said = after.json()["conversations"]["guide_agent"]["messages"]
        assert [one["content"] for one in said] == ["one", "two"]


async def test_an_event_stream_is_not_compressed(client: Client) -> None:
    headers = {"Accept-Encoding": "gzip"}
    async with client.stream("GET", "/api/events", headers=headers) as answer:
        assert "content-encoding" not in answer.headers


async def test_all_methods_of_a_path_are_named(client: Client) -> None:
    answers = [await client.delete("/api/agents"), await client.put("/api/agents/a/tasks/t/cancel")]

    assert [answer.status_code for answer in answers] == [405, 405]
    assert [answer.headers["allow"] for answer in answers] == ["GET, HEAD, POST", "POST"]


async def test_a_page_of_a_permitted_origin_can_read_what_it_is_refused_with(
    manager: StatePersistenceManager,
) -> None:
    async with answering(LiveBackend(manager=manager), cors_origins=[PAGE], max_body=10) as client:
        client.headers["Origin"] = PAGE
        large = await client.post("/api/global/session", json={"context": {"a": "long"}})
        unknown = await client.get("/health", headers={"Host": "evil.example"})
        nobody = await client.get("/api/agents", headers={"Authorization": "Bearer nonsense"})

    assert [answer.status_code for answer in (large, unknown, nobody)] == [413, 421, 401]
    for answer in (large, unknown, nobody):
        assert answer.headers["access-control-allow-origin"] == PAGE


async def test_a_page_of_a_permitted_origin_may_use_the_headers_that_it_needs(
    client: Client,
) -> None:
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "PATCH",
        "Access-Control-Request-Headers": "If-Match, Last-Event-ID, Idempotency-Key, Authorization",
    }
    preflight = await client.options("/api/agents", headers=asked)
    answer = await client.get("/health", headers={"Origin": PAGE})
    exposed = {one.strip() for one in answer.headers["access-control-expose-headers"].split(",")}

    assert preflight.status_code == 200
    assert {"ETag", "Retry-After"} <= exposed


async def test_a_change_has_its_document_for_whom_asks(
    client: Client, manager: StatePersistenceManager
) -> None:
    async def first(path: str, change: Any) -> dict[str, Any]:
        async with client.stream("GET", path) as answer:
            events = Events(answer)
            await events.named("ready")
            await change()
            found: dict[str, Any] = json.loads((await events.named("change"))["data"])
            return found

    async def save(mood: str) -> None:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": mood})

    plain = await first("/api/events", lambda: save("bad"))
    full = await first("/api/events?include=body", lambda: save("good"))

    assert "document" not in plain
    assert full["document"]["mood"] == "good"


async def test_a_session_s_event_has_the_session_with_its_messages(
    client: Client, manager: StatePersistenceManager
) -> None:
    sessions = SessionManager(manager)
    made = await sessions.create()
    path = f"/api/global/session/{made.session.session_id}/events?include=body"
    async with client.stream("GET", path) as answer:
        events = Events(answer)
        await events.named("ready")
        await sessions.conversations.add(made.session.session_id, "guide_agent", "user", "hello")
        event = json.loads((await events.named("change"))["data"])

    conversation = event["document"]["conversations"]["guide_agent"]
    assert [message["content"] for message in conversation["messages"]] == ["hello"]
    assert "session_token" not in event["document"] or event["document"]["session_token"] is None


async def test_the_openapi_document_is_compressed(client: Client) -> None:
    answer: httpx.Response = await client.get("/openapi.json")

    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json()["openapi"].startswith("3.")


async def test_a_summary_that_differs_by_the_time_alone_is_not_sent_again(
    operated: Client,
) -> None:
    await operated.post("/api/agents", json={"agent_id": "alice", "agent_type": "poet"})
    await operated.post("/api/agents/alice/tasks", json={"name": "draft"})
    before = await operated.get("/api/summary")
    known = {"If-None-Match": before.headers["etag"]}
    again = await operated.get("/api/summary", headers=known)
    await operated.post("/api/agents/alice/tasks", json={"name": "draft"})
    changed = await operated.get("/api/summary", headers=known)

    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["last-event-id"] == before.headers["last-event-id"]
    assert changed.status_code == 200
    assert changed.json()["tasks"] == 2


async def test_a_refused_preflight_is_a_problem_like_every_other_error(client: Client) -> None:
    def asked(origin: str, method: str = "PATCH", header: str = "If-Match") -> dict[str, str]:
        return {
            "Origin": origin,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": header,
        }

    origin, method, header = [
        await client.options("/api/agents", headers=headers)
        for headers in (
            asked("https://evil.example"),
            asked(PAGE, method="TRACE"),
            asked(PAGE, header="X-Other"),
        )
    ]

    for answer in (origin, method, header):
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code
    assert (origin.status_code, origin.json()["code"]) == (403, "wrong_origin")
    assert "access-control-allow-origin" not in origin.headers
    for answer in (method, header):
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
        assert answer.headers["access-control-allow-origin"] == PAGE
