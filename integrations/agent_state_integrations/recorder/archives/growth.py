"""How a recording may grow: when segments become archives, when archives go, and what was done."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from agent_state.errors import QueryError
from agent_state.protocols import JsonObject

MB = 1_000_000
PARQUET_PAST = 50 * MB
COMPRESS_PAST = timedelta(days=30)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_AGE = re.compile(r"(\d{1,6})\s*d?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When a segment becomes an archive, and when an archive goes.

    ``parquet_past``: while the plain segments have more bytes than this together, the oldest
    becomes Parquet. ``compress_past``: one that is older, and plain still, is compressed.
    ``keep_for`` and ``keep_bytes``: older archives, and the oldest of more bytes than this, are
    removed; None keeps them all. A segment's age is counted from the day in its name.
    """

    parquet_past: int = PARQUET_PAST
    compress_past: timedelta = COMPRESS_PAST
    keep_for: timedelta | None = None
    keep_bytes: int | None = None


@dataclass(slots=True)
class Archived:
    """What a run did, or with ``dry_run`` would do. The names are those of segments."""

    dry_run: bool = False
    parquet: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    """Archives that an earlier run had written when it died; now in the index."""
    removed: list[str] = field(default_factory=list)
    """Archives that retention removed, with what is in them."""
    plain_bytes: int = 0
    """Plain segments before the run."""
    freed_bytes: int = 0
    """Plain segments that went, less the archives that came; and archives removed."""

    def to_dict(self) -> JsonObject:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verified:
    """What reading all archives found."""

    archives: int
    messages: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> JsonObject:
        return {**asdict(self), "ok": self.ok}


def size_of(text: str) -> int:
    """``50MB``, ``1.5GiB`` or ``1000`` as bytes. Raises ``QueryError``."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise QueryError(f"{text!r:.40} is no size; write 50MB or 2GiB")
    power = " kmgt".index(found[2].lower()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def age_of(text: str) -> timedelta:
    """``30d``, or ``30``, as days. Raises ``QueryError``."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise QueryError(f"{text!r:.40} is no age; write 30d")
    return timedelta(days=int(found[1]))
