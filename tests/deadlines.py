"""Waiting for a condition, with a deadline that a busy machine does not miss."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 60.0
"""A deadline that only a hang reaches: a test that misses it under load is a wrong test."""

_TURNS = 1_000


async def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Run the event loop until ``condition()`` is true; raises ``TimeoutError``.

    The first turns take no time, so work that stays on the loop finishes at once. After them
    the wait leaves the processor to threads and other processes.
    """
    turns = 0
    async with asyncio.timeout(seconds):
        while not condition():
            turns += 1
            await asyncio.sleep(0 if turns < _TURNS else 0.002)


def until_in_thread(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """As ``until``, without an event loop."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            raise TimeoutError("the condition did not become true")
        time.sleep(0.002)


async def soon(awaitable: Awaitable[T]) -> T:
    """The result of ``awaitable``; raises ``TimeoutError`` when it hangs."""
    return await asyncio.wait_for(awaitable, SECONDS)
