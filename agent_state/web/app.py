"""The application: every route, behind the guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from agent_state import __version__
from agent_state.web import problems
from agent_state.web.auth import Tokens
from agent_state.web.backend import Backend
from agent_state.web.events import EventFeed
from agent_state.web.guard import LOOPBACK, Guard
from agent_state.web.routes import agents, conversations, mail, sessions, system, tasks

_PARTS = (system, sessions, conversations, agents, tasks, mail)
ROUTES = "agent_state.routes"
"""The entry points by which other packages add routes: an ``APIRouter`` each."""

MAX_BODY = 1024 * 1024
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def create_app(
    backend: Backend,
    *,
    tokens: Iterable[str] = (),
    hosts: Collection[str] | None = LOOPBACK,
    cors_origins: Iterable[str] = (),
    max_body: int = MAX_BODY,
    **events: Any,
) -> FastAPI:
    """An ASGI application that serves a backend, which whoever calls starts before and ends after.

    ``tokens``: of operators, or their hashes; with none, everybody who reaches the server is one.
    ``hosts``: the names it answers to; None for any. ``cors_origins``: web pages that may use it
    from a browser. ``max_body``: bytes of a request. Further arguments are ``EventFeed``'s. Raises
    ``AgentStateError`` for a token that is none.
    """
    origins = list(cors_origins)
    app = FastAPI(
        title="agent_state",
        summary="Durable state of async agents.",
        version=__version__,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
        lifespan=_lifespan,
    )
    app.state.backend = backend
    app.state.tokens = Tokens(tokens)
    app.state.feed = EventFeed(backend.watch, **events)
    app.state.closing = asyncio.Event()
    for part in _PARTS:
        app.include_router(part.router)
    for added in sorted(entry_points(group=ROUTES), key=lambda each: each.name):
        app.include_router(added.load())
    problems.install(app)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            max_age=600,
        )
    app.add_middleware(Guard, hosts=hosts, origins=origins, max_body=max_body)
    app.openapi = _described(app)  # type: ignore[method-assign]  # FastAPI's way to extend it
    return app


async def close(app: FastAPI) -> None:
    """End what would never end by itself: event streams, and those who wait for a task."""
    app.state.closing.set()
    await app.state.feed.aclose()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await close(app)


def _described(app: FastAPI) -> Any:
    """The OpenAPI document, with what the guard may answer to every operation."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = plain()
        document["components"]["schemas"]["Problem"] = problems.schema()
        for operations in document["paths"].values():
            for operation in operations.values():
                for status, response in problems.documented([413, 421]).items():
                    operation["responses"][str(status)] = response
        return document

    return openapi
