"""What the tests of sessions begin with: a clock that stands, and each kind of store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.testing import FakeClock
from tests.sessions.managing import STORES, opened


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=STORES)
async def files(
    request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[StatePersistenceManager]:
    async with opened(request.param, tmp_path, clock) as made:
        yield made
