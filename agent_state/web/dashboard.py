"""The dashboard: a page for people who operate agents, made of files of this package.

The files are served as they are: no build step, no request to another host, and a content security
policy that lets nothing else run. The page uses the HTTP API as any client does.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request, Response

from agent_state.errors import needs_extra
from agent_state.web.operations import has_etag
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
    body = entry.read_bytes()
    etag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
    return StaticFile(body, gzip.compress(body, 9, mtime=0), etag, _TYPES[_ending(entry)])


def dashboard_router() -> APIRouter:
    """The routes of the page and its files."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        return _reply(request, static_files()["index.html"])

    @router.get("/static/{path:path}")
    async def part(request: Request, path: str) -> Response:
        return _reply(request, static_files().get(path))

    return router


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
    if has_etag(request.headers.get("if-none-match", ""), found.etag):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(found.packed, headers=headers, media_type=found.media_type)
    return Response(found.body, headers=headers, media_type=found.media_type)
