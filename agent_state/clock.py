"""Time and new ids. Both are injected, so that a test controls them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Protocol

IdFactory = Callable[[], str]


class Clock(Protocol):
    """Tells the time and waits. Tests use ``agent_state.testing.FakeClock``."""

    def now(self) -> datetime:
        """The wall-clock time, aware, in UTC. It may jump."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""

    async def sleep(self, seconds: float) -> None:
        """Wait that long; at once for zero or less."""


class SystemClock:
    """The operating system's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class Backoff:
    """The pauses between attempts: ``first`` seconds, then twice as long each time, to ``most``.

    ``random``: shortens each pause by up to a half, so that several clients do not retry at the
    same time; None: the pauses are exact.
    """

    def __init__(self, first: float, most: float, *, random: Random | None = None) -> None:
        self._first = first
        self._most = most
        self._random = random
        self._attempts = 0

    @property
    def attempts(self) -> int:
        """The number of pauses since the last ``reset``."""
        return self._attempts

    def reset(self) -> None:
        """Start with ``first`` again: an attempt succeeded."""
        self._attempts = 0

    def pause(self) -> float:
        """The seconds to wait before the next attempt."""
        seconds = min(self._most, self._first * 2.0 ** min(self._attempts, 64))
        self._attempts += 1
        if self._random is not None:
            seconds *= 0.5 + self._random.random() / 2
        return seconds


def stamp(moment: datetime) -> str:
    """``2026-11-21T03:11:00.000000Z``: UTC, always microseconds, so that text sorts as time does.

    Raises ``ValueError`` for a naive datetime, which names no instant.
    """
    if moment.tzinfo is None:
        raise ValueError("a time without a zone names no instant; use an aware datetime")
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:-6] + "Z"


def instant(text: str) -> datetime:
    """The aware UTC datetime that an ISO 8601 text names; a text without a zone is read as UTC.

    Raises ``ValueError`` for any other text.
    """
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def later(moment: datetime, seconds: float) -> datetime:
    """The moment plus seconds, limited to the range of ``datetime``."""
    try:
        return moment + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def new_id() -> str:
    """``<12 hex digits of milliseconds>-<10 random hex digits>``: unique, and sorts by time."""
    return f"{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(5)}"
