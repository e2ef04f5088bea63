"""What stands before every route: host, origin, size, tokens, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_state import AgentStateError, MemoryStateStore, StatePersistenceManager
from agent_state.web import LiveBackend, OperatorTokens, create_app, read_tokens, serve
from agent_state.web.events import EventSettings
from agent_state.web.problems import MAPPINGS, problem_for
from tests.web.client import TOKEN, Client, answering


@pytest.fixture
async def backend() -> AsyncIterator[LiveBackend]:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        yield LiveBackend(manager=manager)


@pytest.fixture
async def client(backend: LiveBackend) -> AsyncIterator[Client]:
    async with answering(backend, max_body=1000) as client:
        yield client


@pytest.mark.parametrize(
    "wrong",
    ["", "Bearer", "Bearer nonsense", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "ä"],
)
async def test_without_a_token_that_is_known_nothing_opens(client: Client, wrong: str) -> None:
    headers = {b"Authorization": wrong.encode("latin-1")}
    answer = await client.get("/api/agents", headers=headers)

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"


async def test_health_and_readiness_need_no_token(client: Client) -> None:
    client.headers.pop("Authorization")
    for path in ("/health", "/api/global/health", "/ready", "/openapi.json"):
        assert (await client.get(path)).status_code == 200
    assert (await client.get("/api/agents")).status_code == 401


async def test_a_token_may_be_given_as_its_hash(backend: LiveBackend) -> None:
    hashed = "sha256:" + sha256(TOKEN.encode()).hexdigest()
    async with answering(backend, token=hashed) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await client.get("/api/agents")).status_code == 200
        client.headers["Authorization"] = f"Bearer {hashed}"  # who reads the file opens nothing
        assert (await client.get("/api/agents")).status_code == 401


@pytest.mark.parametrize(
    "wrong", ["short", "sha256:12", "sha256:" + "g" * 64, "sha256:" + "ab " * 22]
)
def test_a_token_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(AgentStateError):
        OperatorTokens([wrong])


def test_each_of_several_tokens_is_known_and_the_shortest_has_16_characters() -> None:
    tokens = OperatorTokens([TOKEN, "another-token-0123456789", "x" * 16])

    assert all(token in tokens for token in (TOKEN, "another-token-0123456789", "x" * 16))
    assert "x" * 17 not in tokens
    with pytest.raises(AgentStateError, match="16 characters"):
        OperatorTokens(["x" * 15])


@pytest.mark.parametrize("wrong", ["Basic abc", "Bearer", "Bearer nonsense"])
async def test_a_wrong_token_is_refused_even_where_none_is_needed(
    backend: LiveBackend, wrong: str
) -> None:
    async with answering(backend, token=None) as client:
        assert (await client.get("/api/agents")).status_code == 200
        answer = await client.get("/api/agents", headers={"Authorization": wrong})

    assert answer.status_code == 401


def test_tokens_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# of the night shift\n\n{TOKEN}\n")
    assert TOKEN in OperatorTokens(read_tokens(file))

    file.write_text("# none\n")
    for missing in (file, tmp_path / "none"):
        with pytest.raises(AgentStateError):
            read_tokens(missing)


async def test_a_host_that_is_not_ours_is_refused(client: Client) -> None:
    pretended = (
        "evil.example@127.0.0.1",
        "a:b@localhost",
        "127.0.0.1/x",
        "localhost?x",
        "localhost#",
    )
    broken = ("127.0.0.1:80:80", "localhost:8a", "[::1", "::1", "[localhost]", "[", "")
    for host in ("evil.example", "evil.example:80", "[::2]", *pretended, *broken):
        answer = await client.get("/health", headers={"Host": host})
        assert answer.status_code in ({421, 400} if host == "" else {421}), host
    for host in ("localhost", "LOCALHOST:9", "[::1]:80", "127.0.0.1"):
        assert (await client.get("/health", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    ("hosts", "answered", "refused"),
    [
        (None, ["evil.example", "[::2]:80"], []),
        (["[::2]", "Example.ORG"], ["[::2]:80", "example.org"], ["localhost", "127.0.0.1"]),
    ],
)
async def test_the_hosts_that_are_answered_are_chosen(
    backend: LiveBackend, hosts: list[str] | None, answered: list[str], refused: list[str]
) -> None:
    async with answering(backend, hosts=hosts) as client:
        for host, status in (*((one, 200) for one in answered), *((one, 421) for one in refused)):
            answer = await client.get("/health", headers={"Host": host})
            assert answer.status_code == status, host


@pytest.mark.parametrize("path", ["/health", "/api/agents", "/openapi.json", "/api/agents/nobody"])
async def test_head_is_answered_as_get_without_a_body(client: Client, path: str) -> None:
    got, head = await client.get(path), await client.head(path)

    assert (head.status_code, head.content) == (got.status_code, b"")
    for name in ("content-type", "content-length", "cache-control"):
        assert head.headers.get(name) == got.headers.get(name)
    assert (await client.head("/api/agents", headers={"Authorization": ""})).status_code == 401


async def test_head_of_an_event_stream_ends(backend: LiveBackend) -> None:
    async with answering(backend, events=EventSettings(max_streams=1)) as client:
        for _ in range(3):  # each gives its stream back
            head = await client.head("/api/events")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"], ["localhost", "evil.example"]])
async def test_a_request_with_none_or_two_hosts_is_refused(
    backend: LiveBackend, hosts: list[str]
) -> None:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health",
        "raw_path": b"/health",
        "query_string": b"",
        "headers": [(b"host", host.encode()) for host in hosts],
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    await create_app(backend)(scope, receive, send)  # servers differ in what they let through

    assert sent[0]["status"] == 421


async def test_a_page_of_another_origin_may_not_change_anything(client: Client) -> None:
    address = str(client.base_url).rstrip("/")
    for origin, status in (("https://evil.example", 403), ("null", 403), (address, 201)):
        answer = await client.post("/api/global/session", json={}, headers={"Origin": origin})
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers


async def test_a_page_of_this_server_may_change_something_however_its_host_is_spelt(
    client: Client,
) -> None:
    port = client.base_url.port
    for host, origin in (("localhost", "LocalHost"), ("LOCALHOST", "localhost")):
        headers = {"Host": f"{host}:{port}", "Origin": f"http://{origin}:{port}"}
        answer = await client.post("/api/global/session", json={}, headers=headers)
        assert answer.status_code == 201
    headers = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}0"}
    assert (await client.post("/api/global/session", json={}, headers=headers)).status_code == 403


async def test_a_page_that_is_let_in_may_use_it_from_a_browser(backend: LiveBackend) -> None:
    page = "https://app.example"
    async with answering(backend, cors_origins=[page]) as client:
        asked = {"Origin": page, "Access-Control-Request-Method": "POST"}
        preflight = await client.options("/api/global/session", headers=asked)
        made = await client.post("/api/global/session", json={}, headers={"Origin": page})
        other = await client.get("/health", headers={"Origin": "https://evil.example"})

    assert preflight.headers["access-control-allow-origin"] == page
    assert (made.status_code, made.headers["access-control-allow-origin"]) == (201, page)
    assert "access-control-allow-origin" not in other.headers


async def test_a_body_that_is_too_large_is_refused_whatever_was_announced(client: Client) -> None:
    large = json.dumps({"context": {"x": "y" * 2000}}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    headers = {"Content-Type": "application/json"}
    for content in (large, chunks()):
        answer = await client.post("/api/global/session", content=content, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert "1000 bytes" in answer.json()["detail"]
        announced = content is large  # its body is not read, so the connection cannot go on
        assert (answer.headers.get("connection") == "close") is announced
    assert (await client.post("/api/global/session", json={})).status_code == 201


@pytest.mark.parametrize(("length", "status"), [(1000, 201), (1001, 413)])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_has_at_most_so_many_bytes(
    client: Client, length: int, status: int, chunked: bool
) -> None:
    body = b'{"context": {}}'.ljust(length)

    async def chunks() -> AsyncIterator[bytes]:
        yield body

    headers = {"Content-Type": "application/json"}
    content = chunks() if chunked else body
    answer = await client.post("/api/global/session", content=content, headers=headers)

    assert answer.status_code == status


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[" * 900, b'{"context": NaN}', b'{"user_id": "\\ud800"}', b"[]", b"1"],
)
async def test_a_body_that_is_no_session_is_refused(client: Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await client.post("/api/global/session", content=body, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"\\udc00"', "1" * 400])
async def test_what_is_not_quite_json_is_refused(client: Client, value: str) -> None:
    body = f'{{"context": {{"x": {value}}}}}'.encode()
    headers = {"Content-Type": "application/json"}

    answer = await client.post("/api/global/session", content=body, headers=headers)

    assert answer.status_code == 422


async def test_every_answer_has_the_headers_that_keep_browsers_careful(client: Client) -> None:
    for path in ("/health", "/nope", "/api/agents/none", "/openapi.json"):
        headers = (await client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in headers


@pytest.mark.parametrize(
    "path", ["/", "/api", "/api/", "/docs", "/static", "/..%2F..%2Fetc/passwd"]
)
async def test_nothing_is_listed(client: Client, path: str) -> None:
    answer = await client.get(path)

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_an_error_of_the_server_tells_nothing_of_its_inside(
    backend: LiveBackend, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(backend)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the secret is 42")

    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(app, port=0, on_start=address.set_result))
    async with httpx.AsyncClient(base_url=await address) as client:
        answer = await client.get("/broken")
    server.cancel()
    await asyncio.wait([server])

    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "42" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "the secret is 42" in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [(kind("/srv/secret"), mapping.status, mapping.detail) for kind, mapping in MAPPINGS.items()],
)
def test_the_message_of_an_error_is_shown_to_clients_only_for_their_own_mistakes(
    error: AgentStateError, status: int, shown: str | None
) -> None:
    answer = problem_for(error)
    detail = json.loads(bytes(answer.body))["detail"]

    assert answer.status_code == status
    assert detail == ("/srv/secret" if status < 500 else shown)
    assert (status == 503) == ("retry-after" in answer.headers)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
async def test_others_reach_it_only_with_a_token(backend: LiveBackend, host: str) -> None:
    with pytest.raises(AgentStateError, match="needs a token"):
        await serve(create_app(backend), host=host, port=0)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/health", 200),
        ("HTTP://LOCALHOST:8000/health?x=http://y/z", 200),
        ("http://localhost/api/agents/caf%C3%A9", 404),
        ("http://localhost/nowhere", 404),
        ("http://localhost", 404),
        ("http://elsewhere.example/health", 421),
        ("http://someone@localhost/health", 421),
        ("http:///health", 421),
    ],
)
async def test_a_target_may_name_its_host_which_then_counts(
    client: Client, target: str, status: int
) -> None:
    for host in ("localhost", "elsewhere.example"):
        path = "/health" if status == 200 else "/elsewhere"
        answer = await client.get(
            path, headers={"Host": host}, extensions={"target": target.encode()}
        )
        assert answer.status_code == status
