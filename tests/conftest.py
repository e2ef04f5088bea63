"""Fixtures and settings that all tests share.

``manager`` runs a test three times: with a store in memory, with shared files and with exclusive
ones. A test that needs fewer says so::

    @pytest.mark.parametrize("manager", ["shared", "exclusive"], indirect=True)

``tests.deadlines`` has ``until`` and ``soon``, which wait for a condition.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.testing import FakeClock
from tests.alice import GOOD
from tests.redis.servers import RedisServer

STORES = ("memory", "shared", "exclusive")

# Tests that run beside each other must not see the width of a terminal.
os.environ.pop("COLUMNS", None)

# A deadline per example measures the machine's disk, not our laws; pytest-timeout guards the rest.
# `make test` takes the fast profile, and `make test-rest` runs the same tests with the full one.
settings.register_profile("full", deadline=None, print_blob=True)
settings.register_profile("fast", settings.get_profile("full"), max_examples=20)
settings.load_profile("full")


@pytest.fixture
def fake_clock() -> FakeClock:
    """A clock that stands at 2026-01-01 until the test advances it."""
    return FakeClock()


@pytest.fixture(params=STORES)
async def manager(
    request: pytest.FixtureRequest, tmp_path: Path, fake_clock: FakeClock
) -> AsyncIterator[StatePersistenceManager]:
    """An open manager over each kind of store, on the fake clock; its files are in ``tmp_path``."""
    if request.param == "memory":
        made = StatePersistenceManager(store=MemoryStateStore(clock=fake_clock), clock=fake_clock)
    else:
        exclusive = request.param == "exclusive"
        made = StatePersistenceManager(tmp_path, exclusive=exclusive, clock=fake_clock)
    async with made as manager:
        yield manager


@pytest.fixture(params=["shared", "exclusive"])
async def alices(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[StatePersistenceManager]:
    """An open manager over files in ``tmp_path/state``, with the agent of ``tests.alice``."""
    exclusive = request.param == "exclusive"
    async with StatePersistenceManager(tmp_path / "state", exclusive=exclusive) as manager:
        await manager.save_agent_state("alice", GOOD)
        await manager.flush()
        yield manager


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis server of the test's own, which it may kill."""
    one = RedisServer(tmp_path / "redis")
    one.start()
    yield one
    one.kill()
