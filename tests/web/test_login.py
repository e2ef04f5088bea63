"""Logging in with a cookie, and sessions of visitors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, MemoryStateStore, StatePersistenceManager
from agent_state.web import LiveBackend, VisitorLimits
from agent_state.web.auth import CSRF_HEADER, cookie_name, csrf_token
from agent_state.web.problems import Problem
from tests.web.client import TOKEN, Client, answering


@pytest.fixture
async def backend() -> AsyncIterator[LiveBackend]:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        yield LiveBackend(manager=manager)


@pytest.fixture
async def browser(backend: LiveBackend) -> AsyncIterator[Client]:
    """A client with no token of its own."""
    async with answering(backend, login=True) as client:
        client.headers.pop("Authorization")
        yield client


def _origin(client: Client) -> dict[str, str]:
    return {"Origin": str(client.base_url).rstrip("/")}


async def test_a_token_becomes_a_cookie_that_no_script_reads(browser: Client) -> None:
    assert (await browser.get("/api/login")).json()["role"] == "nobody"
    answer = await browser.post("/api/login", json={"token": TOKEN})
    cookie = answer.headers["set-cookie"]

    assert answer.json()["role"] == "operator"
    assert cookie.startswith(f"{cookie_name(browser.base_url.netloc.decode())}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert (await browser.get("/api/agents")).status_code == 200
    assert (await browser.get("/api/login")).json()["role"] == "operator"


async def test_the_cookie_is_for_tls_only_where_the_browser_speaks_it(browser: Client) -> None:
    proxied = {"X-Forwarded-Proto": "https"}
    plain = await browser.post("/api/login", json={"token": TOKEN})
    behind = await browser.post("/api/login", json={"token": TOKEN}, headers=proxied)

    assert "Secure" not in plain.headers["set-cookie"]
    assert "Secure" in behind.headers["set-cookie"]


async def test_an_unknown_token_is_refused_and_sets_no_cookie(browser: Client) -> None:
    answer = await browser.post("/api/login", json={"token": "nonsense"})

    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


async def test_after_logging_out_nothing_opens(browser: Client) -> None:
    await browser.post("/api/login", json={"token": TOKEN})
    assert (await browser.delete("/api/login", headers=_origin(browser))).status_code == 204

    assert not browser.cookies
    assert (await browser.get("/api/agents")).status_code == 401


async def test_a_change_with_a_cookie_needs_an_origin_or_the_token_for_forms(
    browser: Client,
) -> None:
    await browser.post("/api/login", json={"token": TOKEN})
    repeated = (await browser.get("/api/login")).json()["csrf_token"]

    async def change(**headers: str) -> int:
        answer = await browser.post("/api/global/session", json={}, headers=headers)
        return answer.status_code

    assert repeated == csrf_token(TOKEN)
    assert await change() == 403
    assert await change(**{CSRF_HEADER: "wrong"}) == 403
    assert await change(Origin="https://evil.example") == 403
    assert await change(**{CSRF_HEADER: repeated}) == 201
    assert await change(**_origin(browser)) == 201


async def test_a_session_s_cookie_opens_that_session_and_its_events(browser: Client) -> None:
    operator = {"Authorization": f"Bearer {TOKEN}"}
    made = (await browser.post("/api/global/session", json={}, headers=operator)).json()
    answer = await browser.post("/api/login", json={"token": made["session_token"]})
    path = f"/api/global/session/{made['session_id']}"

    assert answer.json()["role"] == "session"
    assert answer.json()["session_id"] == made["session_id"]
    assert (await browser.get(path)).status_code == 200
    async with browser.stream("GET", f"{path}/events") as events:
        assert events.status_code == 200
    assert (await browser.get("/api/agents")).status_code == 403


async def test_without_a_login_a_cookie_opens_nothing(backend: LiveBackend) -> None:
    async with answering(backend) as client:
        client.headers.pop("Authorization")
        assert (await client.post("/api/login", json={"token": TOKEN})).status_code == 404
        client.cookies.set(cookie_name(client.base_url.netloc.decode()), TOKEN)
        assert (await client.get("/api/agents")).status_code == 401


async def test_the_cookie_of_another_port_opens_and_closes_nothing(backend: LiveBackend) -> None:
    other = "another-server-0123456789"
    async with (
        answering(backend, login=True) as first,
        answering(backend, token=other, login=True) as second,
        answering(backend, token=None, login=True) as without,
    ):
        first.headers.pop("Authorization")
        second.headers.pop("Authorization")
        await first.post("/api/login", json={"token": TOKEN})
        # A browser sends the cookies of a host to each of its ports.
        second.cookies, without.cookies = first.cookies, first.cookies
        await second.post("/api/login", json={"token": other})
        statuses = [(await one.get("/api/agents")).status_code for one in (first, second, without)]

    assert statuses == [200, 200, 200]


async def test_a_cookie_that_is_no_longer_valid_is_none_where_nobody_needs_one(
    backend: LiveBackend,
) -> None:
    async with answering(backend, token=None, login=True) as client:
        made = (await client.post("/api/global/session", json={})).json()
        await client.post("/api/login", json={"token": made["session_token"]})
        assert (await client.get("/api/login")).json()["role"] == "session"
        path = f"/api/global/session/{made['session_id']}"
        await client.delete(path, headers=_origin(client))

        assert (await client.get("/api/agents")).status_code == 200
        assert (await client.get("/api/login")).json()["role"] == "operator"


# -- visitors ----------------------------------------------------------------------------------


async def test_a_visitor_creates_a_session_where_that_is_permitted(backend: LiveBackend) -> None:
    async with answering(backend, visitors=VisitorLimits()) as client:
        client.headers.pop("Authorization")
        made = await client.post("/api/global/session", json={"context": {"page": "upload"}})
        named = await client.post("/api/global/session", json={"user_id": "ann"})
        wrong = {"Authorization": "Bearer nonsense"}
        unknown = await client.post("/api/global/session", json={}, headers=wrong)

    assert (made.status_code, made.json()["user_id"]) == (201, None)
    assert made.json()["session_token"]
    assert named.status_code == 403
    assert unknown.status_code == 401


async def test_an_operator_is_no_visitor_by_logging_in(backend: LiveBackend) -> None:
    async with answering(backend, visitors=VisitorLimits(in_all=1), login=True) as client:
        client.headers.pop("Authorization")
        await client.post("/api/login", json={"token": TOKEN})
        origin = _origin(client)
        named = [
            await client.post("/api/global/session", json={"user_id": "ann"}, headers=origin)
            for _ in range(2)
        ]
        await client.post("/api/login", json={"token": named[0].json()["session_token"]})
        visits = [
            await client.post("/api/global/session", json={}, headers=origin) for _ in range(2)
        ]

    assert [one.status_code for one in named] == [201, 201]
    assert [one.status_code for one in visits] == [201, 429]


async def test_without_the_option_a_visitor_creates_nothing(browser: Client) -> None:
    assert (await browser.post("/api/global/session", json={})).status_code == 401


@pytest.mark.parametrize("limits", [VisitorLimits(2, 100), VisitorLimits(100, 2)])
async def test_visitors_create_so_many_sessions_in_an_hour(
    backend: LiveBackend, limits: VisitorLimits
) -> None:
    async with answering(backend, visitors=limits) as client:
        operator = {"Authorization": client.headers.pop("Authorization")}
        statuses = [
            (await client.post("/api/global/session", json={})).status_code for _ in range(3)
        ]
        refused = await client.post("/api/global/session", json={})
        permitted = await client.post("/api/global/session", json={}, headers=operator)

    assert statuses == [201, 201, 429]
    assert 0 < int(refused.headers["retry-after"]) <= 3600
    assert permitted.status_code == 201


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),  # one customer has 2**64 of them
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "", True),  # a socket of this machine has no address
    ],
)
def test_the_addresses_of_one_visitor_are_one(one: str, other: str, are_one: bool) -> None:
    limits = VisitorLimits(per_address=1)
    limits.claim(one, 0)
    with pytest.raises(Problem) if are_one else nullcontext():
        limits.claim(other, 0)


def test_the_next_hour_counts_anew() -> None:
    limits = VisitorLimits(per_address=1)
    limits.claim("a", 3599.0)
    limits.claim("b", 3599.5)
    limits.claim("a", 3600.0)


@pytest.mark.parametrize(
    "limits",
    [VisitorLimits(bytes_per_address=20_000), VisitorLimits(bytes_in_all=20_000)],
    ids=["one address", "all"],
)
async def test_visitors_write_so_many_bytes_in_an_hour(
    backend: LiveBackend, limits: VisitorLimits
) -> None:
    async with answering(backend, visitors=limits) as client:
        operator = {"Authorization": client.headers.pop("Authorization")}
        made = (await client.post("/api/global/session", json={})).json()
        path = f"/api/global/session/{made['session_id']}"
        said = f"{path}/conversations/guide_agent/messages"
        owner = {"Authorization": f"Bearer {made['session_token']}"}
        text = {"content": "x" * 5_000}

        async def chunks() -> AsyncIterator[bytes]:
            yield json.dumps({"content": "y" * 5_000}).encode()

        kind = {"Content-Type": "application/json"}
        statuses = [
            (await client.patch(path, json={"state": text}, headers=owner)).status_code,
            (await client.post(said, json=text, headers=owner)).status_code,
            (await client.post(said, content=chunks(), headers=owner | kind)).status_code,
            (await client.post(said, json=text, headers=owner)).status_code,
            (await client.post(said, json=text, headers=owner)).status_code,
        ]
        refused = await client.patch(path, json={"state": text}, headers=owner)
        another = await client.post("/api/global/session", json={"context": text})
        read = await client.get(path, headers=owner)
        by_operator = await client.post(said, json=text, headers=operator)
        erased = await client.delete(path, headers=owner)

    assert statuses == [200, 201, 201, 429, 429]
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 0 < int(refused.headers["retry-after"]) <= 3600
    assert another.status_code == 429
    assert read.status_code == 200
    assert by_operator.status_code == 201
    assert erased.status_code == 204


async def test_many_small_changes_of_a_visitor_are_too_many_at_last(backend: LiveBackend) -> None:
    async with answering(backend, visitors=VisitorLimits(bytes_per_address=4096)) as client:
        client.headers.pop("Authorization")
        made = (await client.post("/api/global/session", json={})).json()
        path = f"/api/global/session/{made['session_id']}/touch"
        owner = {"Authorization": f"Bearer {made['session_token']}"}
        statuses = [(await client.post(path, headers=owner)).status_code for _ in range(8)]

    assert set(statuses) == {200, 429}
    assert statuses == sorted(statuses)


# -- a message with a task ---------------------------------------------------------------------


async def test_a_message_queues_its_task_once(tmp_path: Path) -> None:
    async with AsyncAgentSessionManager(tmp_path / "state") as runtime:
        await runtime.agents.create("guide", agent_type="nobody")
        backend = LiveBackend(runtime=runtime)
        async with answering(backend, visitor_tasks=["guide/answer"]) as client:
            made = (await client.post("/api/global/session", json={})).json()
            client.headers["Authorization"] = f"Bearer {made['session_token']}"
            path = f"/api/global/session/{made['session_id']}/conversations/guide_agent/messages"

            async def say(name: str, agent_id: str = "guide", **headers: str) -> Any:
                task = {"agent_id": agent_id, "name": name, "payload": {"lang": "en"}}
                body = {"content": "hello", "task": task}
                return await client.post(path, json=body, headers=headers)

            first = await say("answer", **{"Idempotency-Key": "k"})
            again = await say("answer", **{"Idempotency-Key": "k"})
            forbidden = await say("delete everything")
            client.headers["Authorization"] = f"Bearer {TOKEN}"
            nobody = await say("answer", "nobody")
            stored = (await client.get("/api/tasks")).json()["items"]
            said = (await client.get(path)).json()["messages"]

    task = first.json()["task"]
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["task"]["task_id"] == task["task_id"]
    assert [one["task_id"] for one in stored] == [task["task_id"]]
    message = first.json()["message"]
    assert task["payload"] == {
        "lang": "en",
        "session_id": made["session_id"],
        "agent_type": "guide_agent",
        "message_id": message["message_id"],
        "seq": message["seq"],
    }
    assert forbidden.status_code == 403
    assert nobody.status_code == 404
    assert len(said) == 1  # what is refused stores no message
