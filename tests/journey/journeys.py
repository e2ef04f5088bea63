"""What the tests of journeys share: managers on every store, and ids that count."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.testing import FakeClock
from agent_state_integrations.journey import ConversationStateManager, JourneyMessage

DAY = 86400.0
STORES = ("exclusive", "shared", "memory")


def counting(prefix: str = "id") -> Callable[[], str]:
    """A factory of ``id-1``, ``id-2`` and so on."""
    numbers = count(1)
    return lambda: f"{prefix}-{next(numbers)}"


def files(kind: str, folder: Path, clock: FakeClock) -> StatePersistenceManager:
    if kind == "memory":
        return StatePersistenceManager(store=MemoryStateStore(clock=clock), clock=clock)
    return StatePersistenceManager(folder, exclusive=kind == "exclusive", clock=clock)


@asynccontextmanager
async def journeys(
    kind: str, folder: Path, clock: FakeClock, **settings: Any
) -> AsyncIterator[ConversationStateManager]:
    """A manager of journeys on a store of this kind, with ids that count."""
    settings.setdefault("new_id", counting())
    async with (
        files(kind, folder, clock) as manager,
        ConversationStateManager(manager, **settings) as sessions,
    ):
        yield sessions


def said(content: str, role: str = "user", **fields: Any) -> JourneyMessage:
    return JourneyMessage(role=role, content=content, **fields)
