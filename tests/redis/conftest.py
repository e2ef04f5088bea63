"""Redis servers of a test's own, beside the one that ``server`` gives to every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis.servers import Guarded, RedisServer, ThreeNodes
from tests.redis.stores import ALWAYS


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that keeps on disk what it has acknowledged."""
    one = RedisServer(tmp_path / "durable", *ALWAYS)
    one.start()
    yield one
    one.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ThreeNodes]:
    """A cluster of three nodes."""
    nodes = ThreeNodes(tmp_path / "cluster")
    nodes.start()
    yield nodes
    nodes.kill()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    """A master with a replica, behind three sentinels."""
    one = Guarded(tmp_path / "guarded")
    one.start()
    yield one
    one.kill()
