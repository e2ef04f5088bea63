"""The application: the routes of the core and of installed packages, behind the request guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from agent_state import __version__
from agent_state.errors import AgentStateError
from agent_state.web import (
    agent_routes,
    document_routes,
    list_routes,
    login_routes,
    problems,
    session_routes,
    system_routes,
)
from agent_state.web.answers import describe_answers
from agent_state.web.auth import OperatorTokens, VisitorLimits
from agent_state.web.backend import Backend, load_installed
from agent_state.web.dashboard import dashboard_router, swagger_router
from agent_state.web.events import EVENT_SCHEMAS, EventFeed, EventSettings
from agent_state.web.guard import LOOPBACK, CrossOriginAccess, RequestGuard
from agent_state.web.index import StateIndexes
from agent_state.web.operations import OperationRouter, with_validator

ROUTES = "agent_state.routes"
"""The group of entry points by which installed packages add routes; each is an ``APIRouter``."""

MAX_BODY = 1024 * 1024
_CORE = (
    system_routes.router,
    *list_routes.routers,
    document_routes.router,
    login_routes.router,
    session_routes.router,
    session_routes.conversations,
    agent_routes.agents,
    agent_routes.tasks,
    agent_routes.all_tasks,
    agent_routes.mail,
)
_ALLOWED_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
)
_EXPOSED_HEADERS = ("Allow", "Content-Disposition", "ETag", "Last-Event-ID", "Retry-After")
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
    login: bool = False,
    visitors: VisitorLimits | None = None,
    visitor_tasks: Iterable[str] = (),
    dashboard: bool = False,
    swagger_ui: bool = False,
) -> FastAPI:
    """An ASGI application that serves a backend. The caller opens the backend before serving.

    ``tokens``: the operators' tokens, or their hashes; without any, each client is an operator.
    ``hosts``: the host names that are answered; None for any. ``cors_origins``: the origins of
    web pages that may use the server from a browser. ``max_body``: bytes of a request at most.
    ``events``: limits of the event streams. ``routers``: routes besides those of the core; None
    for those of all installed packages (``installed_routers``). ``login``: a token can be turned
    into a cookie, for event streams and page loads of a browser. ``visitors``: clients without a
    token may create so many sessions; None: only operators create sessions. ``visitor_tasks``: the
    tasks, as ``agent_id/name``, that the owner of a session may queue with a message.
    ``dashboard``: serve a page at ``/`` for people who operate agents, with ``login``.
    ``swagger_ui``: serve Swagger UI at ``/docs``; needs the extra ``swagger``. Raises
    ``AgentStateError`` for an invalid token, and ``MissingExtraError``.
    """
    origins = list(cors_origins)
    added = installed_routers() if routers is None else list(routers)
    served = (*_CORE, *added)
    app = FastAPI(
        title="agent_state",
        summary="Durable state of async agents.",
        version=__version__,
        openapi_url=None,  # it is served below, with an ETag
        docs_url=None,  # FastAPI's own pages load scripts from other servers
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,  # a stored model is serialised as it was set
        openapi_tags=_tags(served),
        lifespan=_lifespan,
    )
    app.state.backend = backend
    app.state.tokens = OperatorTokens(tokens)
    app.state.added_routes = sorted({str(tag) for router in added for tag in router.tags})
    app.state.login = login or dashboard
    app.state.visitors = visitors
    app.state.visitor_tasks = frozenset(visitor_tasks)
    app.state.feed = EventFeed(backend.watch, events or EventSettings())
    app.state.indexes = StateIndexes(backend.watch)
    if dashboard and backend.runtime is not None:
        backend.runtime.restore_readers.append(app.state.indexes)
    app.state.closing = asyncio.Event()
    app.state.starting = False
    if dashboard:
        app.include_router(dashboard_router())  # routes are tried in turn; a page has many files
    for router in served:
        app.include_router(router)
    app.add_api_route("/openapi.json", _openapi, include_in_schema=False)
    if swagger_ui:
        app.include_router(swagger_router())
    problems.install(app)
    app.add_middleware(RequestGuard, hosts=hosts, origins=origins, max_body=max_body)
    if origins:  # around the guard, so that a page can read what it is refused with
        app.add_middleware(
            CrossOriginAccess,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_ALLOWED_HEADERS,
            expose_headers=_EXPOSED_HEADERS,
            max_age=600,
        )
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
    await app.state.indexes.aclose()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await close(app)


async def _openapi(request: Request) -> Response:
    return with_validator(request, JSONResponse(request.app.openapi()))


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
