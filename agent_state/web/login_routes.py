"""The routes of logging in: a token becomes a cookie, so that page loads and ``EventSource`` work.

The cookie is ``HttpOnly`` and ``SameSite=Strict``: no script reads it, and no other site's page
sends it. It ends with the browser's session, or when the token is no longer valid.
"""

from __future__ import annotations

from typing import Literal

from fastapi import Request, Response

from agent_state.web.auth import Caller, cookie_name, csrf_token, who_has
from agent_state.web.backend import BackendDep
from agent_state.web.models import Login, LoginState
from agent_state.web.operations import OperationRouter
from agent_state.web.problems import Problem

router = OperationRouter("/api", "login", about="A token as a cookie, for browsers.")


async def _permitted(request: Request) -> None:
    if not request.app.state.login:
        raise Problem(404, "not_found", "This server has no login.")


@router.operation("GET", "/login", access=_permitted, errors=[404, 503])
async def get_login(request: Request, backend: BackendDep) -> LoginState:
    """Who the client is, by its cookie. Needs no token; an unknown one is nobody's."""
    token = request.cookies.get(_cookie_of(request))
    found = await who_has(request, token) if token else None
    if found is None:
        return _state(None if len(request.app.state.tokens) else Caller(), backend.read_only, None)
    return _state(found, backend.read_only, token)


@router.operation("POST", "/login", access=_permitted, errors=[401, 404, 422, 503])
async def log_in(
    request: Request, response: Response, backend: BackendDep, login: Login
) -> LoginState:
    """Turn a token, of an operator or of a session, into a cookie."""
    found = await who_has(request, login.token)
    if found is None:
        raise Problem(401, "unauthorized", "The token is unknown.", {"WWW-Authenticate": "Bearer"})
    name, secure = _cookie_of(request), _is_secure(request)
    response.set_cookie(name, login.token, secure=secure, httponly=True, samesite="strict")
    return _state(found, backend.read_only, login.token)


@router.operation("DELETE", "/login", status=204, access=_permitted, errors=[404])
async def log_out(request: Request, response: Response) -> None:
    """Remove the cookie."""
    name, secure = _cookie_of(request), _is_secure(request)
    response.delete_cookie(name, secure=secure, httponly=True, samesite="strict")


def _cookie_of(request: Request) -> str:
    return cookie_name(request.headers.get("host", ""))


def _is_secure(request: Request) -> bool:
    """Whether the browser speaks TLS; a proxy says so, and a client that lies harms only itself."""
    return "https" in {request.url.scheme, request.headers.get("x-forwarded-proto", "")}


def _state(client: Caller | None, read_only: bool, token: str | None) -> LoginState:
    role: Literal["operator", "session", "nobody"] = "nobody"
    if client is not None:
        role = "operator" if client.is_operator else "session"
    return LoginState(
        role=role,
        session_id=client.session_id if client is not None else None,
        writable=not read_only,
        csrf_token=csrf_token(token) if token and client is not None else None,
    )
