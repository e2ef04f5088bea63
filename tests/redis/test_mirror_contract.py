"""The mirror in Redis keeps the contract of a mirror."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state.redis import RedisMirror
from agent_state.testing import MirrorContract
from tests.redis.mirrors import mirror
from tests.redis.servers import RedisServer


class TestRedisMirror(MirrorContract):
    @pytest.fixture(autouse=True)
    def url(self, server: RedisServer) -> None:
        self._url = server.url

    def make_mirror(self, directory: Path) -> RedisMirror:
        return mirror(self._url)
