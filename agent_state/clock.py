"""Time and new ids. Both are injected, so that a test controls them."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Protocol, TypeGuard

from agent_state.errors import StateValidationError

FIRST = datetime.min.replace(tzinfo=UTC)
"""The first instant of the year 1; earlier ones are read as it."""
LAST = datetime.max.replace(tzinfo=UTC)
"""The last instant of the year 9999; later ones are read as it."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_UNITS = ((10**11, 1), (10**14, 10**3), (10**17, 10**6), (math.inf, 10**9))
"""Below each limit the parts of a second that an epoch number counts: seconds until the year
5138, then milliseconds, microseconds, nanoseconds."""
_FAR_YEAR = re.compile(r"([+-]?\d{5,}|0000)-\d\d-\d\d(?:$|[T ])", re.ASCII)
"""ISO 8601 with a year beyond 9999 or before 1, as JavaScript and Go write it."""
_END = re.compile(
    r"(.{10}[T ])(?:24:00(?::00(?:\.0+)?)?|(\d\d:\d\d):60(?:\.\d+)?)(Z|[+-].*)?", re.ASCII
)
"""ISO 8601 with the end of a day as 24:00, or with a leap second."""

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
        import asyncio  # a command that only reads files starts without it

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

    A moment that is outside of the years 1 to 9999 in UTC is the nearest one inside. Raises
    ``ValueError`` for a naive datetime, which names no instant.
    """
    if moment.tzinfo is None:
        raise ValueError("a time without a zone names no instant; use an aware datetime")
    if moment.tzinfo is not UTC:
        moment = _in_utc(moment)
    # By position: with a keyword it takes twice the time, at every save.
    return moment.isoformat("T", "microseconds")[:-6] + "Z"


def instant(time: str | float) -> datetime:
    """The aware UTC datetime that an ISO 8601 text or an epoch number names.

    A text without a zone is read as UTC. A number counts seconds, or milliseconds, microseconds
    or nanoseconds if it is too large for the unit before. A time that is outside of the years 1 to
    9999 in UTC is the nearest one inside, a leap second or 24:00 the microsecond before. Raises
    ``ValueError`` for any other text, and for NaN.
    """
    if not isinstance(time, str):
        return _since_epoch(time)
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        if far := _FAR_YEAR.match(time):
            return _in_far_year(far, time)
        if end := _END.fullmatch(time):
            day, minute, zone = end.groups("")
            return instant(f"{day}{minute or '23:59'}:59.999999{zone}")
        raise
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else _in_utc(moment)


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        return FIRST if moment.year < 5000 else LAST


def _in_far_year(far: re.Match[str], time: str) -> datetime:
    year = int(far[1])
    if 1 <= year <= 9999:  # such as +002026
        return instant(f"{year:04d}{time[far.end(1) :]}")
    return LAST if year > 0 else FIRST


def _since_epoch(number: float) -> datetime:
    if isinstance(number, bool) or number != number:  # noqa: PLR0124  # NaN alone differs from itself
        raise ValueError(f"{number} is not a time")
    parts = next(parts for limit, parts in _EPOCH_UNITS if abs(number) <= limit)
    try:
        if isinstance(number, int):
            return _EPOCH + timedelta(microseconds=number * 10**6 // parts)
        return _EPOCH + timedelta(seconds=number / parts)
    except OverflowError:
        return FIRST if number < 0 else LAST


def sort_text(time: object) -> str:
    """A text by which times sort: what is written, or the stamp of a number; else empty."""
    if isinstance(time, str):
        return time
    if isinstance(time, int | float) and not isinstance(time, bool):
        return stamp(instant(time))
    return ""


def later(moment: datetime, seconds: float) -> datetime:
    """The moment plus seconds, limited to the years 1 to 9999.

    Raises ``StateValidationError`` for NaN.
    """
    try:
        return moment + timedelta(seconds=seconds)
    except OverflowError:
        return FIRST if seconds < 0 else LAST
    except ValueError as error:
        raise StateValidationError(f"{seconds} is not a duration") from error


def is_number(given: object) -> TypeGuard[int | float]:
    """Whether it is an ``int`` or ``float``; ``True`` and ``False`` are none."""
    return isinstance(given, int | float) and not isinstance(given, bool)


def check_duration(name: str, given: object, *, unit: str = "seconds") -> None:
    """Raise ``StateValidationError`` unless ``given`` is a number, not below zero; NaN is none."""
    if not is_number(given) or not given >= 0:
        raise StateValidationError(f"{name}: {given!r:.40} is not a number of {unit}")


def check_count(name: str, given: object, least: int = 0) -> None:
    """Raise ``StateValidationError`` unless ``given`` is a whole number, ``least`` or more."""
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        text = f"{name} is a whole number, {least} or more, not {given!r:.40}"
        raise StateValidationError(text)


def new_id() -> str:
    """``<12 hex digits of milliseconds>-<10 random hex digits>``: unique, and sorts by time."""
    return f"{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(5)}"
