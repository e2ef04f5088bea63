"""Times as other programs write them, as the one text that is stored."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

from agent_state.clock import instant, stamp

_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")
_CALENDAR = re.compile(r"(?:19|20)[0-9]{6}(?:[0-9]{6})?")
_ZONE_NAME = re.compile(r"\s*(?:z|UTC|GMT)$", re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST = 64
"""Characters. No time is longer, and nobody's essay is parsed as one."""
_UNITS = ((10**11, 1), (10**14, 10**3), (10**17, 10**6), (10**20, 10**9))
"""Below which size a number since 1970 counts in which part of a second."""


def to_stamp(value: object, *, fallback: datetime | None = None) -> str:
    """The time as ``2026-11-21T03:11:00.000000Z``.

    Understood are ISO 8601 with ``T`` or a space, with ``Z``, an offset or nothing (which is
    UTC), a date alone (its first moment), more digits of a second than six (the rest is cut off,
    .NET writes seven), seconds, milli-, micro- or nanoseconds since 1970 as a number or as text
    (told apart by size), and ``datetime`` and ``date``.

    Raises ``ValueError`` for anything else, or gives the ``fallback`` where there is one.
    """
    try:
        if type(value) is str and _is_ours(value):
            datetime.fromisoformat(value)  # the 31st of February has this form too
            return value
        return stamp(_moment(value))
    except (ValueError, OverflowError) as error:
        if fallback is not None:
            return stamp(fallback)
        raise ValueError(f"{value!r:.80} is no time") from error


def _is_ours(text: str) -> bool:
    """Whether only one form of ISO 8601 is left that it can be: a month after the year, no week."""
    return (
        len(text) == 27
        and text[26] == "Z"
        and text[19] == "."
        and text[10] == "T"
        and text[5] in "01"
    )


def _moment(value: object) -> datetime:
    if isinstance(value, str):
        return _written(value.strip())
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _since_1970(value)
    raise ValueError(f"a value of type {type(value).__name__} is no time")


def _written(text: str) -> datetime:
    if len(text) > _LONGEST:
        raise ValueError("too long for a time")
    if text[4:5] == "-":
        return instant(text if text[-1].isdigit() else _ZONE_NAME.sub("Z", text))
    if _CALENDAR.fullmatch(text):
        return instant(f"{text[:8]}T{text[8:] or '000000'}")
    if _NUMBER.fullmatch(text):
        if len(text.partition(".")[0].lstrip("+-")) < 9:
            raise ValueError("a short number names no instant")
        return _since_1970(float(text) if "." in text else int(text))
    return instant(_ZONE_NAME.sub("Z", text))


def _since_1970(number: float) -> datetime:
    for limit, parts in _UNITS:
        if abs(number) < limit:
            if isinstance(number, int):
                return _EPOCH + timedelta(microseconds=number * 10**6 // parts)
            return _EPOCH + timedelta(seconds=number / parts)
    raise ValueError(f"{number} is too large for a time")
