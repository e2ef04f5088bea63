"""The shared fixtures under the names that the tests of sessions use."""

from __future__ import annotations

import pytest

from agent_state import StatePersistenceManager
from agent_state.testing import FakeClock


@pytest.fixture
def clock(fake_clock: FakeClock) -> FakeClock:
    return fake_clock


@pytest.fixture
def files(manager: StatePersistenceManager) -> StatePersistenceManager:
    return manager
