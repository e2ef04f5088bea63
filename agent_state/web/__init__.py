"""State over HTTP: the extra ``agent-state[server]``.

``create_app`` makes an ASGI application of a backend: a ``LiveBackend`` of this process's managers,
or a ``ReadOnlyBackend`` of a directory that another process may own. ``serve`` runs it with
uvicorn.
"""

from __future__ import annotations

from agent_state.errors import needs_extra

with needs_extra("server", "fastapi", "starlette", "uvicorn"):
    from agent_state.web.app import create_app, installed_routers
    from agent_state.web.auth import OperatorTokens, VisitorLimits, read_tokens
    from agent_state.web.backend import Backend, LiveBackend, ReadOnlyBackend, StateView
    from agent_state.web.events import EventSettings
    from agent_state.web.guard import LOOPBACK
    from agent_state.web.server import check_exposure, is_loopback, serve

__all__ = [
    "LOOPBACK",
    "Backend",
    "EventSettings",
    "LiveBackend",
    "OperatorTokens",
    "ReadOnlyBackend",
    "StateView",
    "VisitorLimits",
    "check_exposure",
    "create_app",
    "installed_routers",
    "is_loopback",
    "read_tokens",
    "serve",
]
