"""The manager on each of the three stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(datetime(2026, 1, 1, tzinfo=UTC))


@pytest.fixture(params=["memory", "shared", "exclusive"])
async def manager(
    request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[StatePersistenceManager]:
    if request.param == "memory":
        made = StatePersistenceManager(store=MemoryStateStore(clock=clock), clock=clock)
    else:
        made = StatePersistenceManager(
            tmp_path, exclusive=request.param == "exclusive", clock=clock
        )
    async with made as manager:
        yield manager
