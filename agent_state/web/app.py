"""The application: the routes of the core and of installed packages, behind the request guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from agent_state import __version__
from agent_state.errors import AgentStateError
from agent_state.web import agent_routes, problems, session_routes, system_routes
from agent_state.web.answers import describe_answers
from agent_state.web.auth import OperatorTokens
from agent_state.web.backend import Backend, load_installed
from agent_state.web.events import EVENT_SCHEMAS, EventFeed, EventSettings
from agent_state.web.guard import LOOPBACK, RequestGuard
from agent_state.web.operations import OperationRouter

ROUTES = "agent_state.routes"
"""The group of entry points by which installed packages add routes; each is an ``APIRouter``."""

MAX_BODY = 1024 * 1024
_CORE = (
    system_routes.router,
    session_routes.router,
    session_routes.conversations,
    agent_routes.agents,
    agent_routes.tasks,
    agent_routes.all_tasks,
    agent_routes.mail,
)
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def create_app(
    backend: Backend,
    *,
    tokens: Iterable[str] = (),
    hosts: Collection[str] | None = LOOPBACK,
    cors_origins: Iterable[str] = (),
    max_body: int = MAX_BODY,
    events: EventSettings | None = None,
    routers: Iterable[APIRouter] | None = None,
) -> FastAPI:
    """An ASGI application that serves a backend. The caller opens the backend before serving.

    ``tokens``: the operators' tokens, or their hashes; without any, each client is an operator.
    ``hosts``: the host names that are answered; None for any. ``cors_origins``: the origins of
    web pages that may use the server from a browser. ``max_body``: bytes of a request at most.
    ``events``: limits of the event streams. ``routers``: routes besides those of the core; None
    for those of all installed packages (``installed_routers``). Raises ``AgentStateError`` for an
    invalid token.
    """
    origins = list(cors_origins)
    served = (*_CORE, *(installed_routers() if routers is None else routers))
    app = FastAPI(
        title="agent_state",
        summary="Durable state of async agents.",
        version=__version__,
        docs_url=None,  # the pages load scripts from other servers
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,  # a stored model is serialised as it was set
        openapi_tags=_tags(served),
        lifespan=_lifespan,
    )
    app.state.backend = backend
    app.state.tokens = OperatorTokens(tokens)
    app.state.feed = EventFeed(backend.watch, events or EventSettings())
    app.state.closing = asyncio.Event()
    for router in served:
        app.include_router(router)
    problems.install(app)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            max_age=600,
        )
    app.add_middleware(RequestGuard, hosts=hosts, origins=origins, max_body=max_body)
    app.openapi = _with_guard_responses(app)  # type: ignore[method-assign]  # FastAPI's way
    return app


def installed_routers() -> list[APIRouter]:
    """The routers of installed packages, by the name of their entry points.

    A router whose extra is not installed is left out, with a warning in the log. Raises
    ``AgentStateError`` for an entry point that cannot be loaded for another reason.
    """
    found = []
    for name, router in load_installed(ROUTES):
        if not isinstance(router, APIRouter):
            raise AgentStateError(f"the entry point {name!r} of {ROUTES} is not an APIRouter")
        found.append(router)
    return found


async def close(app: FastAPI) -> None:
    """End the requests that would not end by themselves: event streams, and waits for a task."""
    app.state.closing.set()
    await app.state.feed.aclose()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await close(app)


def _tags(routers: Iterable[APIRouter]) -> list[dict[str, str]]:
    """The described tags of routers, each once."""
    found = {
        router.described_tag["name"]: router.described_tag
        for router in routers
        if isinstance(router, OperationRouter) and router.described_tag["description"]
    }
    return [*found.values()]


def _with_guard_responses(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document, with the responses of the request guard at every operation."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = plain()
        for operations in document["paths"].values():
            for operation in operations.values():
                for status, response in problems.documented([413, 421]).items():
                    operation["responses"][str(status)] = response
        describe_answers(document)
        document["components"]["schemas"] |= problems.SCHEMAS | EVENT_SCHEMAS
        return document

    return openapi
