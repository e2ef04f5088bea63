"""The dashboard: a page for people who operate agents, made of files of this package.

The files are served as they are: no build step, no request to another host, and a content security
policy that lets nothing else run. The page uses the HTTP API as any client does. To who may see the
overview, the page is sent with its figures in it, so that they are seen before a script has run.
"""

from __future__ import annotations

import gzip
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha256
from html import escape
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request, Response

from agent_state.errors import AgentStateError, needs_extra
from agent_state.web.answers import JSONReply, takes_gzip
from agent_state.web.auth import caller
from agent_state.web.list_routes import SUMMARIZED, summarize
from agent_state.web.models import Summary
from agent_state.web.operations import is_known
from agent_state.web.problems import Problem

STATIC = "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_DIRECTIVES = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
_POLICY = "; ".join(_DIRECTIVES)
_SWAGGER = "; ".join(
    "img-src 'self' data:" if one.startswith("img-src") else one
    for one in _DIRECTIVES
    if "trusted-types" not in one
)
"""Swagger UI has icons in its styles, and sets HTML that DOMPurify has made, as text."""


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file of the page, ready to be sent."""

    body: bytes
    packed: bytes
    etag: str
    media_type: str


@cache
def static_files() -> dict[str, StaticFile]:
    """The files of the page by their relative paths; ``index.html`` is the page itself."""
    return dict(_read(files("agent_state.web") / STATIC, ""))


def _read(folder: Traversable, prefix: str) -> list[tuple[str, StaticFile]]:
    found = []
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        elif _ending(entry) in _TYPES:
            found.append((prefix + entry.name, _file(entry)))
    return found


def _ending(entry: Traversable) -> str:
    return entry.name[entry.name.rfind(".") :]


def _file(entry: Traversable) -> StaticFile:
    return _packed(entry.read_bytes(), _TYPES[_ending(entry)])


def _packed(body: bytes, media_type: str) -> StaticFile:
    etag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
    return StaticFile(body, gzip.compress(body, 9, mtime=0), etag, media_type)


def dashboard_router() -> APIRouter:
    """The routes of the page and its files."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        found = static_files()["index.html"]
        seen = await _look(request)
        if seen is None:
            return _reply(request, found)
        found = _packed(_with_overview(found.body, *seen), found.media_type)
        reply = _reply(request, found, _policy_of_style())
        reply.headers["Cache-Control"] = "no-store"
        return reply

    @router.get("/static/{path:path}")
    async def part(request: Request, path: str) -> Response:
        return _reply(request, static_files().get(path))

    return router


async def _look(request: Request) -> tuple[Summary, str] | None:
    """The summary and its event, if the client may see it, and it takes no time to make."""
    state = request.app.state
    if state.starting or not state.indexes.have_filled(SUMMARIZED):
        return None  # a page is not kept waiting; its scripts ask
    try:
        if not (await caller(request, None)).is_operator:
            return None
        return await summarize(request.app, state.backend)
    except (Problem, AgentStateError):
        return None  # the scripts ask, and show the reason


_DATA = b"<!-- data -->"
_START = b'<p class="starting">agent_state</p>'
_STYLE = b'<link rel="stylesheet" href="static/style.css">'
_SCRIPTS, _END = b"<!-- scripts -->", b"<!-- end -->"
_PAGES = (
    "agents",
    "tasks",
    "mail",
    "sessions",
    "journeys",
    "recorder",
    "changes",
    "logs",
    "access",
)
_ADDED_PAGES = frozenset({"journeys", "recorder"})


@cache
def _policy_of_style() -> str:
    """The policy of a page that has the style itself, which the policy names by its hash."""
    digest = b64encode(sha256(static_files()["style.css"].body).digest()).decode()
    return _POLICY.replace("style-src 'self'", f"style-src 'self' 'sha256-{digest}'")


def _with_overview(page: bytes, summary: Summary, event_id: str) -> bytes:
    """The page as its scripts show the overview at first, down to the figures."""
    json = escape(bytes(JSONReply(summary).body).decode())
    data = f'<meta name="summary" content="{json}" data-event="{escape(event_id)}">'
    shown = [name for name in _PAGES if name not in _ADDED_PAGES or name in summary.added_routes]
    pages = "".join(f'<li><a href="#/{name}">{name.capitalize()}</a></li>' for name in shown)
    about = f"<p>{escape(summary.directory)}</p>" if summary.directory else ""
    overview = (
        '<nav class="main first" aria-label="Main"><p class="brand">agent_state '
        '<span class="connection connecting" role="status">connecting …</span></p>'
        f'<ul><li><a href="#/" aria-current="page">Overview</a></li>{pages}</ul></nav>'
        '<main id="main" class="first"><header class="heading"><div>'
        f'<h1 tabindex="-1">Overview</h1>{about}</div><div class="actions"></div></header>'
        f'<ul class="tiles">{"".join(_tiles(summary))}</ul></main>'
    )
    for place, content in (
        (_DATA, data.encode()),
        (_START, overview.encode()),
        (_SCRIPTS, b'<template id="scripts">'),  # loaded when this is drawn
        (_END, b"</template>"),
        (_STYLE, b"<style>%b</style>" % static_files()["style.css"].body),
    ):
        page = page.replace(place, content, 1)
    return page


def _tiles(of: Summary) -> Iterator[str]:
    """What ``Tile`` of the page's ``overview.js`` makes; a test compares them."""
    for label, value, place, is_alarm in (
        ("agents", of.agents, "agents", False),
        ("tasks", of.tasks, "tasks", False),
        ("dead letters", of.dead_letters, "tasks?status=dead", True),
        ("unread mail", of.unread_mail, "mail?status=unread", False),
        ("sleepers", of.sleepers, "sleepers", False),
        ("sessions", of.sessions, "sessions", False),
        ("quarantined", of.quarantined, "quarantine", True),
    ):
        kind = "tile alarm" if is_alarm and value else "tile"
        yield (
            f'<li><a class="{kind}" href="#/{place}"><span class="value">{value:,}</span> '
            f'<span class="label">{label}</span></a></li>'
        )


def swagger_router() -> APIRouter:
    """Swagger UI at ``/docs``, with nothing of another host. Raises ``MissingExtraError``."""
    with needs_extra("swagger", "fastapi_swagger"):
        resources = files("fastapi_swagger") / "resources"
    ours = static_files()
    parts = {
        "icon.svg": ours["icon.svg"],
        "swagger.js": ours["swagger.js"],
        **{name: _file(resources / name) for name in ("swagger-ui-bundle.js", "swagger-ui.css")},
    }
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def page(request: Request) -> Response:
        return _reply(request, ours["swagger.html"], _SWAGGER)

    @router.get("/docs/{path}")
    async def part(request: Request, path: str) -> Response:
        return _reply(request, parts.get(path), _SWAGGER)

    return router


def _reply(request: Request, found: StaticFile | None, policy: str = _POLICY) -> Response:
    if found is None:
        raise Problem(404, "not_found", "There is no such file.")
    headers = {
        "Cache-Control": "no-cache",  # the ETag is asked for each time: a new version shows at once
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "ETag": found.etag,
        "Vary": "Accept-Encoding",
    }
    if is_known(request, found.etag):
        return Response(status_code=304, headers=headers)
    if takes_gzip(request):
        headers["Content-Encoding"] = "gzip"
        return Response(found.packed, headers=headers, media_type=found.media_type)
    return Response(found.body, headers=headers, media_type=found.media_type)
