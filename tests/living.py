"""What the runtime's tests share: a runtime on a fake clock, and a way for it to die."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import count
from typing import Any

from agent_state import AsyncAgentSessionManager, MemoryStateStore, StateStore
from agent_state.testing import FakeClock


def make_runtime(
    store: StateStore | None = None,
    clock: FakeClock | None = None,
    *,
    name: str = "id",
    **settings: Any,
) -> AsyncAgentSessionManager:
    """A runtime whose time, ids and randomness are the test's."""
    clock = clock or FakeClock()
    numbers = count(1)
    return AsyncAgentSessionManager(
        store=store or MemoryStateStore(clock=clock),
        clock=clock,
        ids=lambda: f"{name}-{next(numbers):04d}",
        random=random.Random(7),
        **settings,
    )


async def die(runtime: AsyncAgentSessionManager) -> None:
    """End every task of the runtime as a kill would: nothing is put back, nothing saved."""
    agents = list(runtime.core.agents.values())
    doomed: list[asyncio.Task[Any]] = [agent.loop for agent in agents if agent.loop is not None]
    doomed += [*runtime._services, *runtime._runner._work.values()]
    runtime._services = []
    for task in doomed:
        task.cancel()
    await asyncio.gather(*doomed, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until something holds, for ten seconds at most."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
