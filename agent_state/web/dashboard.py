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
        ending = entry.name[entry.name.rfind(".") :]
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        elif ending in _TYPES:
            body = entry.read_bytes()
            etag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
            packed = gzip.compress(body, 9, mtime=0)
            found.append((prefix + entry.name, StaticFile(body, packed, etag, _TYPES[ending])))
    return found


def dashboard_router() -> APIRouter:
    """The routes of the page and its files."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        return _reply(request, "index.html")

    @router.get("/static/{path:path}")
    async def part(request: Request, path: str) -> Response:
        return _reply(request, path)

    return router


def _reply(request: Request, path: str) -> Response:
    found = static_files().get(path)
    if found is None:
        raise Problem(404, "not_found", "There is no such file.")
    headers = {
        "Cache-Control": "no-cache",  # the ETag is asked for each time: a new version shows at once
        "Content-Security-Policy": _POLICY,
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
