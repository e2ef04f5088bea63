"""The store in Redis keeps the contract of every store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_state.protocols import StateStore
from agent_state.redis.store import RedisStateStore
from agent_state.testing import StateStoreContract
from tests.redis.servers import RedisServer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    one.start()
    yield one
    one.kill()


class TestRedisStore(StateStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, running: RedisServer) -> None:
        self.url = running.url

    def make_store(self, directory: Path) -> StateStore:
        """Each test has a directory, and so a prefix, of its own."""
        return RedisStateStore(
            self.url,
            prefix=f"{directory}:",
            timeout_seconds=10.0,
            lock_timeout_seconds=self.lock_timeout_seconds,
        )


def test_it_is_a_store() -> None:
    assert isinstance(RedisStateStore("redis://localhost"), StateStore)
