"""A real server on a free port, and a client that fails on an answer which is not documented."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any

import httpx
from fastapi import FastAPI

from agent_state import AsyncAgentSessionManager, MemoryStateStore, StatePersistenceManager
from agent_state.web import Backend, LiveBackend, create_app, serve

TOKEN = "operators-only-0123456789"


class Client(httpx.AsyncClient):
    """Talks to the server as an operator, and fails on an answer that is not documented."""

    def __init__(self, app: FastAPI, address: str, token: str | None) -> None:
        self.app = app
        self.seen: set[tuple[str, int]] = set()
        """Operation and status of every answer."""
        self._operations = _operations()
        super().__init__(
            base_url=address,
            timeout=60,
            limits=httpx.Limits(max_keepalive_connections=0),  # an idle one is closed after 5 s
            headers={"Authorization": f"Bearer {token}"} if token else {},
            event_hooks={"response": [self._look]},
        )

    async def _look(self, response: httpx.Response) -> None:
        path = response.request.url.path
        found = self.operation(response.request.method, response.request.url)
        if found is None:
            page = path in {"/", "/docs", "/openapi.json"} or path.startswith(
                ("/static/", "/docs/")
            )
            beside = page or response.request.method == "OPTIONS"
            refused = response.status_code in {403, 404, 405, 413, 421}
            known = beside or refused or path in openapi()["paths"]
            assert known or path in self.app.openapi()["paths"]  # an added route
            return
        name, documented = found
        self.seen.add((name, response.status_code))
        assert str(response.status_code) in documented, f"{name}: {response.status_code}"
        kinds = documented[str(response.status_code)].get("content", {})
        kind = response.headers.get("content-type", "").partition(";")[0]
        assert kind in kinds if kinds else not kind, f"{name}: {kind}"

    def operation(self, method: str, url: httpx.URL) -> tuple[str, dict[str, Any]] | None:
        path = url.raw_path.decode().partition("?")[0]
        for pattern, known, name, documented in self._operations:
            if known == ("GET" if method == "HEAD" else method) and pattern.fullmatch(path):
                return name, documented
        return None


@cache
def openapi() -> dict[str, Any]:
    """The OpenAPI document, which is the same whatever is served."""
    manager = StatePersistenceManager(store=MemoryStateStore())
    return create_app(LiveBackend(manager=manager)).openapi()


@cache
def _operations() -> list[tuple[re.Pattern[str], str, str, dict[str, Any]]]:
    found = []
    for template, operations in openapi()["paths"].items():
        pattern = re.compile(re.sub(r"\{\w+\}", "[^/]+", template))
        for method, operation in operations.items():
            name = operation["operationId"]
            found.append((pattern, method.upper(), name, operation["responses"]))
    # What has fewer places for an id is the more exact one.
    return sorted(found, key=lambda one: one[0].pattern.count("[^/]+"))


@asynccontextmanager
async def following(
    backend: Backend, *, headers: Mapping[str, str] | None = None, **settings: Any
) -> AsyncIterator[Events]:
    """The events of a server that does nothing else."""
    async with (
        answering(backend, **settings) as client,
        client.stream("GET", "/api/events", headers=dict(headers or {})) as response,
    ):
        yield Events(response)


@asynccontextmanager
async def answering(
    backend: Backend, *, token: str | None = TOKEN, **settings: Any
) -> AsyncIterator[Client]:
    """A server of the backend, in this loop and on a real socket."""
    app = create_app(backend, tokens=[token] if token else [], **settings)
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(app, port=0, on_start=address.set_result))
    waiting: list[asyncio.Future[Any]] = [server, address]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    try:
        async with Client(app, address.result(), token) as client:
            yield client
    finally:
        server.cancel()
        with suppress(asyncio.CancelledError):
            await server


def working(runtime: AsyncAgentSessionManager) -> AsyncAgentSessionManager:
    """Agents of type ``worker`` count the words of a text."""

    @runtime.handler("worker")
    async def worker(ctx: Any, task: Any) -> int:
        return len(str(task.payload.get("text", "")).split())

    return runtime


class Events:
    """The events of a stream, one after another."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def next(self) -> dict[str, Any]:
        """The next event; a sign of life has no ``event``. Empty at the end of the stream."""
        found: dict[str, Any] = {}
        async with asyncio.timeout(60):
            async for line in self._lines:
                if not line:
                    return found
                name, _, value = line.partition(": ")
                found[name] = value
        return found

    async def named(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            found = await self.next()
            assert found, f"the stream ended before a {name}"
            if found.get("event") == name:
                return found
