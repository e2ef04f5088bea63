"""The protocol of the two ways to Redis, and the fields that they share."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Protocol

from agent_state.clock import instant
from agent_state.errors import AgentStateError, StateCorruptedError
from agent_state.protocols import JsonObject


class TransportError(AgentStateError):
    """Redis, or the server between, is away, too slow, or refuses."""


class Transport(Protocol):
    """Keeps JSON objects by key, each for a time.

    Every method ends within a time limit of the transport's own, raises ``TransportError`` when
    Redis cannot be used, and tries again from the start at the next call: nothing is latched.
    Fields of a record that begin with ``_`` are the transport's, and the schema version.
    """

    async def put(self, key: str, record: JsonObject, seconds: float) -> None:
        """Store the record for so many seconds (``math.inf``: for ever), in place of any other.

        Raises ``SerializationError`` for a value that is not JSON, ``TooLargeError``.
        """

    async def get(self, key: str, *, sliding: bool) -> JsonObject | None:
        """The record; None if it is missing or expired.

        ``sliding``: if a tenth of its time has passed, its time begins again. Raises
        ``StateCorruptedError`` for what cannot be read.
        """

    async def drop(self, key: str) -> bool:
        """Remove the record; returns whether it existed."""

    async def keys(self, prefix: str) -> list[str]:
        """The keys with this prefix, sorted."""

    async def claim(self, key: str, owner: str) -> str:
        """The owner of the key, which becomes ``owner`` if it had none."""

    async def close(self) -> None:
        """Close connections and processes. A later call opens them again."""


class TooLargeError(AgentStateError):
    """The record is larger than the manager may store."""


def fitting(text: bytes, most: int, key: str) -> bytes:
    """The text unchanged. Raises ``TooLargeError``."""
    if len(text) > most:
        raise TooLargeError(f"{len(text):,} bytes, the limit is {most:,}", key=key)
    return text


def milliseconds(seconds: float) -> int:
    """Of a time to live; 0 for one without an end."""
    return 0 if seconds == math.inf else max(1, round(seconds * 1000))


def time_to_live(record: JsonObject) -> float | None:
    """The time to live that the record was stored with; None if it has none."""
    seconds = record.get("_ttl_seconds")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        return None
    return float(seconds)


def is_expired(record: JsonObject, now: datetime) -> bool:
    """Whether a value that was written through the coaia tools is dropped or expired.

    Raises ``StateCorruptedError`` for an invalid time.
    """
    if "_dropped_at" in record:
        return True
    until = expiry(record)
    return until is not None and until <= now


def expiry(record: JsonObject) -> datetime | None:
    """The record's expiry; None for ever. Raises ``StateCorruptedError``."""
    until = record.get("_expires_at")
    try:
        return None if until is None else instant(until)
    except (TypeError, ValueError):
        raise StateCorruptedError("_expires_at is not a time") from None
