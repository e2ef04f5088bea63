"""The checks before every route: the host, the origin, the size of the body, the headers.

Pure ASGI, so that an event stream is not buffered and a body is counted as it arrives.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Iterable
from urllib.parse import quote, unquote, urlsplit

from fastapi import Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_state.web import problems
from agent_state.web.problems import Problem

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{0,5})?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/]*)(/.*)?")
_ALIVE = re.compile(r"/|/health|/api/global/health|/openapi\.json|/(static|docs)(/.*)?")
"""What a server answers that has not opened its state yet."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_logger = logging.getLogger("agent_state.web")


class RequestGuard:
    """Refuses requests by their host, origin and size; adds headers to every response.

    ``hosts``: the host names that are answered, without a port; None for any. ``origins``:
    the other origins whose pages may change something. ``max_body``: bytes of a request at most.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str] | None, origins: Iterable[str], max_body: int
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else {host.lower().strip("[]") for host in hosts}
        self._origins = frozenset(origins)
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["method"] == "HEAD":
            # The server looks at its own scope to leave out the body.
            scope, head = {**scope, "method": "GET"}, _HeadExchange(receive, send)
            receive, send = head.receive, head.send
        scope = _with_origin_form(scope)
        headers = Headers(scope=scope)
        refused = self._refused(scope["method"], headers)
        if refused is not None:
            await refused(scope, receive, sending)
            return
        if scope["app"].state.starting and not _ALIVE.fullmatch(scope["path"]):
            detail = "The server is starting: the state is being read."
            starting = problems.problem_response(503, "starting", detail, {"Retry-After": "1"})
            await starting(scope, receive, sending)
            return
        raw_path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        scope["path"] = raw_path.decode("ascii", "replace")
        try:
            await self._app(scope, self._counting(receive), sending)
        except Exception as error:
            if started:
                raise  # too late for a response; the server logs it and cuts the connection
            await problems.problem_for(error)(scope, receive, sending)

    def _refused(self, method: str, headers: Headers) -> Response | None:
        """The response to a request that is refused before any route; None for another one."""
        hosts = headers.getlist("host")
        if self._hosts is not None and (len(hosts) != 1 or _name(hosts[0]) not in self._hosts):
            return problems.problem_response(
                421, "wrong_host", "This server does not answer for that host."
            )
        origin = headers.get("origin")
        if (
            origin is not None
            and method not in _SAFE
            and origin not in self._origins
            and _netloc(origin) != (hosts[0].lower() if hosts else None)
        ):
            return problems.problem_response(
                403, "wrong_origin", "A page of another origin may not change anything here."
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:19]) > self._max_body:
            return self._too_large()
        return None

    def _counting(self, receive: Receive) -> Receive:
        """Receive a body of at most ``max_body`` bytes, whatever its Content-Length claims."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                raise Problem(413, "too_large", self._limit())
            return message

        return counted

    def _too_large(self) -> Response:
        return problems.problem_response(413, "too_large", self._limit(), {"Connection": "close"})

    def _limit(self) -> str:
        return f"A body may have {self._max_body} bytes here."


class CrossOriginAccess(CORSMiddleware):
    """CORS, whose refusals of a pre-flight request are problems, as every other error is."""

    def preflight_response(self, request_headers: Headers) -> Response:
        reply = super().preflight_response(request_headers)
        if reply.status_code < 400:
            return reply
        kept = {name: text for name, text in reply.headers.items() if name[:8] != "content-"}
        reason = bytes(reply.body).decode()
        if self.is_allowed_origin(request_headers["origin"]):
            return problems.problem_response(422, "invalid", f"{reason}.", kept)
        detail = "A page of another origin may not use this server."
        return problems.problem_response(403, "wrong_origin", detail, kept)


def _with_origin_form(scope: Scope) -> Scope:
    """Take the host out of an absolute-form target (RFC 9112, 3.2.2); ``Host`` is then ignored."""
    raw: bytes = scope.get("raw_path") or b""
    found = _ABSOLUTE.fullmatch(raw)
    if found is None:
        return scope
    others = [(name, value) for name, value in scope["headers"] if name != b"host"]
    path = found[2] or b"/"
    headers = [(b"host", found[1]), *others]
    return {**scope, "raw_path": path, "path": unquote(path.decode("ascii")), "headers": headers}


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None for ``null`` and for text that is not a URL."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _name(host: str) -> str:
    """The host without its port and brackets; empty for what is no ``Host`` (RFC 9112, 3.2)."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""


class _HeadExchange:
    """Answers a HEAD request with what GET would answer, without its body."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._answered = asyncio.Event()

    async def receive(self) -> Message:
        """The request; once it is answered, the client needs no more of an event stream."""
        if self._answered.is_set():
            return {"type": "http.disconnect"}
        receiving = asyncio.ensure_future(self._receive())
        answered = asyncio.ensure_future(self._answered.wait())
        try:
            await asyncio.wait({receiving, answered}, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
            answered.cancel()

    async def send(self, message: Message) -> None:
        """Send the status and the headers, and nothing of the body."""
        if message["type"] == "http.response.start":
            await self._send(message)
            await self._send({"type": "http.response.body", "body": b""})
            self._answered.set()
