"""What the tests of sessions share: a manager on a fake clock, with ids that can be told apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.sessions import SessionManager
from agent_state.testing import FakeClock

STORES = ("memory", "shared", "exclusive")
AGENT_TYPES = ("guide_agent", "content_liaison", "insights_liaison")


def counted(name: str) -> Iterator[str]:
    return (f"{name}{number}" for number in count(1))


def session_manager(files: StatePersistenceManager, **settings: Any) -> SessionManager:
    """Its ids are s1, s2, … (messages have ids too); its tokens are the real ones."""
    ids = counted("s")
    defaults = {"new_id": lambda: next(ids), "agent_types": AGENT_TYPES}
    return SessionManager(files, **{**defaults, **settings})


@asynccontextmanager
async def opened(
    store: str, directory: Path, clock: FakeClock
) -> AsyncIterator[StatePersistenceManager]:
    if store == "memory":
        made = StatePersistenceManager(store=MemoryStateStore(clock=clock), clock=clock)
    else:
        made = StatePersistenceManager(directory, exclusive=store == "exclusive", clock=clock)
    async with made:
        yield made
