"""The mirror in Redis keeps the contract that any author's mirror is held to."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state.redis import RedisMirror
from agent_state.testing import MirrorContract
from tests.redis.servers import RedisServer


class TestRedisMirror(MirrorContract):
    @pytest.fixture(autouse=True)
    def with_server(self, durable: RedisServer) -> None:
        self.url = durable.url

    def make_mirror(self, directory: Path) -> RedisMirror:
        return RedisMirror(
            self.url,
            prefix=directory.name,
            interval_seconds=0.01,
            timeout_seconds=30,
            drain_seconds=60,
        )
