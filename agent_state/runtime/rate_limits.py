"""Rate limits: what may be used within a period, and what of it was used.

A period slides. It is divided into a hundred slots, and what was used in a slot counts until the
whole slot is a period ago. So no period, whenever it begins, has more than the limit, and one in
which there is always work has at least 99 % of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from agent_state.clock import instant, is_number, stamp
from agent_state.errors import StateValidationError

_SLOTS = 100


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How much of something may be used within a period, by all agents together.

    Raises ``StateValidationError`` for an amount or a period that is not positive.
    """

    name: str
    """The name under which the use is stored; limits of the same name are one."""
    amount: float
    """How much may be used within any period: calls, tokens, or what you count."""
    per_seconds: float = 60.0
    """The length of the period."""

    def __post_init__(self) -> None:
        if not self.name:
            raise StateValidationError("a rate limit has a name")
        for name in ("amount", "per_seconds"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise StateValidationError(f"{name} of {self.name!r} is positive, not {value!r}")

    @property
    def slot_seconds(self) -> float:
        """The length of a slot, within which the time of a use does not matter."""
        return self.per_seconds / _SLOTS


class UsageWindow:
    """What of a limit was used in the last period, by slot."""

    def __init__(self, limit: RateLimit, stored: Mapping[str, object] | None = None) -> None:
        self._limit = limit
        self._slot_seconds = limit.slot_seconds
        self._slots: dict[int, float] = {}
        """By the number of the slot since 1970."""
        for text, amount in (stored or {}).items():
            self._restore(text, amount)

    def _restore(self, text: str, amount: object) -> None:
        try:
            began = instant(text)
        except ValueError:
            return  # a hand edit
        if isinstance(amount, int | float) and not isinstance(amount, bool):
            slot = self._slot(began)
            self._slots[slot] = self._slots.get(slot, 0) + amount

    def to_json(self) -> dict[str, float]:
        """Return what was used, by the beginning of each slot."""
        return {stamp(self._time(slot)): used for slot, used in sorted(self._slots.items())}

    def use(self, amount: float, now: datetime) -> None:
        """Count an amount; a negative one was not used after all, of what was counted then."""
        slot = self._slot(now)
        self._slots[slot] = self._slots.get(slot, 0) + amount

    def wait_seconds(self, amount: float, now: datetime) -> float:
        """Return after how many seconds so much may be used; 0 for now."""
        self._forget(now)
        free = self._limit.amount - sum(self._slots.values())
        if amount <= free:
            return 0.0
        for slot, used in sorted(self._slots.items()):
            free += used
            if amount <= free:
                return max(0.0, (self._end(slot) - now).total_seconds()) or 1e-3
        return self._limit.per_seconds  # more than the limit

    def _forget(self, now: datetime) -> None:
        """Drop the slots that are a period ago; what the clock says is yet to come is now."""
        current = self._slot(now)
        for slot in [*self._slots]:
            if slot > current:
                used = self._slots.pop(slot)
                self._slots[current] = self._slots.get(current, 0) + used
            elif self._end(slot) <= now:
                del self._slots[slot]

    def _slot(self, moment: datetime) -> int:
        # Half a microsecond more: the beginning of a slot is rounded, and belongs to it.
        return math.floor((moment.timestamp() + 5e-7) / self._slot_seconds)

    def _time(self, slot: int) -> datetime:
        return datetime.fromtimestamp(slot * self._slot_seconds, UTC)

    def _end(self, slot: int) -> datetime:
        """Return when what was used in a slot no longer counts."""
        return self._time(slot + 1) + timedelta(seconds=self._limit.per_seconds)
