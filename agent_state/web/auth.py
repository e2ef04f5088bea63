"""Authentication: operators have tokens of the server, people have the token of their session.

An operator may call every operation. A session's token permits the operations of that session
alone. If the server has no token (only on the loopback interface), a client without a token is an
operator. Where logging in is permitted, a token may also come as a cookie, which no script can read
and no other site's page can send.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from agent_state.errors import AgentStateError, SessionExpiredError
from agent_state.web.backend import Backend
from agent_state.web.problems import Problem

HASH_PREFIX = "sha256:"
MIN_TOKEN_LENGTH = 16
_HEX_DIGITS = 64


class OperatorTokens:
    """The operators' tokens; only their SHA-256 hashes are kept.

    Each text is a token, or ``sha256:`` and the 64 hex digits of its hash. Raises
    ``AgentStateError`` for a token of fewer than 16 characters, or an invalid hash.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._hashes = [_hash(text) for text in texts]

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, token: str) -> bool:
        """Whether the token is one of them, compared in constant time."""
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(known, digest)
        return found


def read_tokens(path: str | os.PathLike[str]) -> list[str]:
    """The tokens in a file, one a line, without blank lines and lines that start with ``#``.

    Raises ``AgentStateError`` if the file cannot be read, or has no token.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AgentStateError(f"the file of tokens cannot be read: {error}") from error
    found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not found:
        raise AgentStateError("the file of tokens has none", path=path)
    return found


def _hash(text: str) -> bytes:
    if text.startswith(HASH_PREFIX):
        digits = text.removeprefix(HASH_PREFIX)
        try:
            digest = bytes.fromhex(digits)
        except ValueError:
            digest = b""
        if len(digits) != _HEX_DIGITS or len(digest) * 2 != _HEX_DIGITS:
            raise AgentStateError(f"after {HASH_PREFIX} come 64 hex digits")
        return digest
    if len(text) < MIN_TOKEN_LENGTH:
        raise AgentStateError(f"a token has at least {MIN_TOKEN_LENGTH} characters")
    return sha256(text.encode()).digest()


@dataclass(frozen=True, slots=True)
class Caller:
    """The client: an operator, or the owner of a session's ``token``.

    ``session_id`` is None for an operator, and once the session has expired.
    """

    session_id: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def is_operator(self) -> bool:
        return self.token is None

    def check_not_ended(self) -> None:
        """Raises ``Problem`` (410) if the session of the token has expired."""
        if self.token is not None and self.session_id is None:
            raise Problem(410, "ended", "The session of this token has expired.")


_COOKIE = "agent_state_token"
CSRF_HEADER = "X-CSRF-Token"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
WRITING = frozenset({"PATCH", "POST", "PUT"})
"""The methods by which something is added."""


@dataclass(slots=True)
class VisitorLimits:
    """What people without an operator's token may do within an hour, counted in memory.

    Visitors create so many sessions; the owners of sessions write so many bytes into them.
    """

    per_address: int = 30
    """Sessions from one network address; behind a proxy all visitors have the proxy's."""
    in_all: int = 3000
    bytes_per_address: int = 10 * 1024 * 1024
    bytes_in_all: int = 1024 * 1024 * 1024
    _hour: int = field(default=-1, repr=False)
    _sessions: Counter[str] = field(default_factory=Counter, repr=False)
    _bytes: Counter[str] = field(default_factory=Counter, repr=False)

    def claim(self, address: str, now: float, size: int = 0) -> None:
        """Count one more session, and its bytes. Raises ``Problem`` (429) for too many."""
        self._begin_hour(now)
        visitor = _visitor_of(address)
        if self._sessions.total() >= self.in_all or self._sessions[visitor] >= self.per_address:
            raise self._too_many("sessions were created", now)
        self.claim_bytes(address, now, size)
        self._sessions[visitor] += 1

    def claim_bytes(self, address: str, now: float, size: int) -> None:
        """Count a change with so many bytes, 1 KiB at least. Raises ``Problem`` (429)."""
        self._begin_hour(now)
        visitor, size = _visitor_of(address), max(size, _LEAST_BYTES)
        if (
            self._bytes.total() + size > self.bytes_in_all
            or self._bytes[visitor] + size > self.bytes_per_address
        ):
            raise self._too_many("bytes were written", now)
        self._bytes[visitor] += size

    def _begin_hour(self, now: float) -> None:
        hour = int(now // 3600)
        if hour != self._hour:
            self._hour = hour
            self._sessions.clear()
            self._bytes.clear()

    def _too_many(self, what: str, now: float) -> Problem:
        wait = str(int((self._hour + 1) * 3600 - now) + 1)
        detail = f"Too many {what} within this hour."
        return Problem(429, "rate_limited", detail, {"Retry-After": wait})


_LEAST_BYTES = 1024
"""What a change of a visitor counts at least: it has a record and a name, too."""


def _visitor_of(address: str) -> str:
    """The address that stands for all of one visitor: of IPv6, a visitor has a whole /64."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


def cookie_name(host: str) -> str:
    """The name of the login's cookie, with the port in the ``Host`` header.

    A browser sends the cookies of a host to all its ports, and each may be another server.
    """
    port = re.search(r":(\d+)$", host)
    return f"{_COOKIE}_{port[1]}" if port else _COOKIE


def csrf_token(token: str) -> str:
    """What a request with this token in its cookie repeats, if it changes something."""
    return hmac.new(token.encode("utf-8", "surrogateescape"), b"csrf", sha256).hexdigest()[:32]


_bearer = HTTPBearer(
    auto_error=False, description="A token of the server, or the token of one session."
)


async def caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Caller:
    """The client. Raises ``Problem`` (401) for an unknown token, or without a required one.

    An ``Authorization`` header without a bearer token counts as an unknown token.
    """
    if credentials is None and "authorization" not in request.headers:
        token, found = _token_of_cookie(request), None
        if token is not None:
            found = await who_has(request, token)
        return found or _without_token(request)
    found = None if credentials is None else await who_has(request, credentials.credentials)
    if found is None:
        raise _unknown()
    return found


def _without_token(request: Request) -> Caller:
    if len(request.app.state.tokens):
        raise _unknown()
    return Caller()


def _token_of_cookie(request: Request) -> str | None:
    """The token in the cookie, where logging in is permitted; None if there is none.

    A browser names the origin of a page that changes something, and the guard has compared it. A
    request without an origin has to repeat the token for forms. Raises ``Problem`` (403).
    """
    token: str | None = None
    if request.app.state.login:
        token = request.cookies.get(cookie_name(request.headers.get("host", "")))
    if token and request.method not in _SAFE and "origin" not in request.headers:
        repeated = request.headers.get(CSRF_HEADER, "")
        if not hmac.compare_digest(repeated.encode(), csrf_token(token).encode()):
            detail = f"A change with a cookie needs the header {CSRF_HEADER}."
            raise Problem(403, "wrong_origin", detail)
    return token or None


async def who_has(request: Request, token: str) -> Caller | None:
    """The client that has this token; None for an unknown one."""
    if token in request.app.state.tokens:
        return Caller()
    backend: Backend = request.app.state.backend
    try:
        session_id = await backend.resolve(token)
    except SessionExpiredError:
        return Caller(None, token)
    return None if session_id is None else Caller(session_id, token)


async def operator_or_visitor(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Caller | None:
    """Permit an operator, and where visitors may create sessions anybody without a token: None.

    Raises ``Problem`` (403, 429).
    """
    visitors: VisitorLimits | None = request.app.state.visitors
    no_header = credentials is None and "authorization" not in request.headers
    if (
        visitors is not None
        and no_header
        and (_token_of_cookie(request) or "") not in request.app.state.tokens
    ):
        visitors.claim(_address(request), time.time(), len(await request.body()))
        return None
    return await operator(await caller(request, credentials))


async def operator(client: Annotated[Caller, Depends(caller)]) -> Caller:
    """Permit an operator. Raises ``Problem`` (403) for another client."""
    if not client.is_operator:
        raise Problem(403, "forbidden", "The token of a session opens that session only.")
    return client


async def for_session(
    request: Request, session_id: str, client: Annotated[Caller, Depends(caller)]
) -> Caller:
    """Permit an operator, and the owner of the session in the path.

    Raises ``Problem`` (403) for another client, even if the session does not exist, and 429 for an
    owner who writes too much, where visitors may create sessions.
    """
    client.check_not_ended()
    if client.is_operator:
        return client
    if client.session_id != session_id:
        raise Problem(403, "forbidden", "The token of a session opens that session only.")
    visitors: VisitorLimits | None = request.app.state.visitors
    if visitors is not None and request.method in WRITING:
        visitors.claim_bytes(_address(request), time.time(), len(await request.body()))
    return client


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _unknown() -> Problem:
    return Problem(
        401, "unauthorized", "A bearer token is required.", {"WWW-Authenticate": "Bearer"}
    )


Operator = Annotated[Caller, Depends(operator)]
