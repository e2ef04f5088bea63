"""A clock that a test advances."""

from __future__ import annotations

import asyncio
import heapq
import math
from datetime import UTC, datetime, timedelta

from agent_state.storage.executor import threads_are_busy

_TURNS = 30
"""Turns of the event loop, while no thread works for it, before time goes on."""
_LOOK_SECONDS = 0.001


class FakeClock:
    """A ``Clock`` that does not move until ``advance`` turns it.

    What a woken task does on the event loop, what it saves to a store, and a step or a hook that
    is a plain function, is done before time goes on; so whoever is about to sleep does so first, in
    memory and on a disk. A network, and the application's own threads, are not waited for.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        if start.tzinfo is None:
            raise ValueError("a time without a zone names no instant; use an aware datetime")
        self._start = start.astimezone(UTC)
        self._passed = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._number = 0
        self._arrived: asyncio.Future[None] | None = None

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._passed)

    def monotonic(self) -> float:
        return self._passed

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waking = asyncio.get_running_loop().create_future()
        self._number += 1
        heapq.heappush(self._sleepers, (self._passed + seconds, self._number, waking))
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        await waking

    @property
    def sleepers(self) -> int:
        """How many tasks wait for this clock."""
        return sum(1 for _, _, waking in self._sleepers if not waking.done())

    async def wait_for_sleepers(self, count: int = 1) -> None:
        """Wait, in real time, until so many tasks wait for this clock."""
        while self.sleepers < count:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived

    async def advance(self, seconds: float, *, threads: bool = True) -> None:
        """Let so much time pass; every sleeper wakes at its own moment, in order.

        ``threads``: at each moment, wait for what threads do because of it. For days of a
        runtime, whose heartbeat is a commit every few seconds, that is long; False waits at the
        end alone.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(
                f"time goes on by a number of seconds, not by {seconds}; "
                "jump() moves the wall clock alone"
            )
        end = self._passed + seconds
        await self._turn()  # tasks that are about to sleep do so first
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, waking = heapq.heappop(self._sleepers)
            if waking.done():
                continue  # its task was cancelled
            self._passed = max(self._passed, due)
            waking.set_result(None)
            await self._turn(threads=threads)
        self._passed = end
        await self._turn()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back; ``monotonic`` and sleepers do not notice."""
        self._start += timedelta(seconds=seconds)

    async def _turn(self, *, threads: bool = True) -> None:
        """Let the tasks of the loop run until they wait for time, or for something outside."""
        quiet = 0
        while quiet < _TURNS:
            quiet += 1
            await asyncio.sleep(0)
            while threads and threads_are_busy():
                await asyncio.sleep(_LOOK_SECONDS)
                quiet = 0
