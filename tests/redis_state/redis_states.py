"""What the tests of redis_state share: sessions, and both transports on a server of their own."""

from __future__ import annotations

import os
import subprocess
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from agent_state.clock import Clock
from agent_state_integrations.redis_state import (
    BackendType,
    CoaiaTransport,
    DirectTransport,
    FlowStatus,
    Keys,
    RedisConfig,
    RedisExecutionCache,
    RedisSessionManager,
    Transport,
    UniversalSession,
)
from tests.redis.servers import RedisServer
from tests.redis_state.coaia import installed

BOTH = (
    "direct",
    pytest.param("coaia", marks=pytest.mark.long("starts the coaia server as a process")),
)
PREFIX = "agentic_flywheel:"


def command() -> tuple[str, ...]:
    """How the real coaia server is started."""
    try:
        return (str(installed() / "coaiapy-mcp"),)
    except subprocess.CalledProcessError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(f"coaiapy-mcp cannot be installed: {error}")


def full_session(session_id: str = "session_123") -> UniversalSession:
    """Every field set, each to something that is not its default."""
    return UniversalSession(
        id=session_id,
        backend=BackendType.LANGFLOW,
        backend_session_id="lf-9",
        status=FlowStatus.RUNNING,
        current_flow_id="csv2507",
        context={"topic": "structural tension", "n": [1, 2.5, None, True], "deep": {"a": {}}},
        history=[{"q": "What is creative orientation?", "a": "…"}, {"q": "\x00\x1f\u2028 😀"}],
        created_at=datetime(2025, 11, 18, 9, 30, 12, 123456, tzinfo=UTC),
        updated_at=datetime(2025, 11, 19, tzinfo=UTC),
        expires_at=datetime(2025, 11, 25, tzinfo=UTC),
        user_id="user-7",
        total_queries=7,
        successful_queries=6,
        total_response_time=12.75,
    )


def session(session_id: str, **fields: Any) -> UniversalSession:
    return UniversalSession(id=session_id, backend=BackendType.FLOWISE, **fields)


class Place:
    """Managers and caches on one Redis, closed with it."""

    def __init__(self, kind: str, server: RedisServer, stack: AsyncExitStack) -> None:
        self.kind = kind
        self.server = server
        self._stack = stack
        self.config = RedisConfig(url=server.url)

    def transport(self, *, prefix: str = PREFIX, clock: Clock | None = None, **more: Any) -> Any:
        """Patient, since a busy machine is none of the faults that are tested."""
        if self.kind == "direct":
            made: Transport = DirectTransport(
                self.server.url, clock=clock, **{"timeout_seconds": 10, **more}
            )
        else:
            more = {
                "command": command(),
                "timeout_seconds": 20,
                "start_timeout_seconds": 30,
                **more,
            }
            made = CoaiaTransport(self.server.url, keys=Keys(prefix), clock=clock, **more)
        self._stack.push_async_callback(made.close)
        return made

    def manager(self, **settings: Any) -> RedisSessionManager:
        return RedisSessionManager(**self._complete(settings))

    def cache(self, **settings: Any) -> RedisExecutionCache:
        return RedisExecutionCache(**self._complete(settings))

    def _complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        prefix, clock = settings.get("key_prefix", PREFIX), settings.get("clock")
        if "transport" not in settings:
            settings["transport"] = self.transport(prefix=prefix, clock=clock)
        return {"config": self.config, **settings}
