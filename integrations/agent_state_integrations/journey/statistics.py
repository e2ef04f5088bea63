"""Figures over journeys: how many there are, how far they came, how they feel now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime

from agent_state.manager import StatePersistenceManager
from agent_state.metrics import Metric
from agent_state_integrations.journey.fields import KIND
from agent_state_integrations.journey.models import JourneyState
from agent_state_integrations.journey.repository import is_expired

Values = Sequence[tuple[Mapping[str, str], float]]


@dataclass(slots=True)
class JourneyStatistics:
    """Totals over the stored sessions, those off the record included."""

    sessions: Counter[str] = field(default_factory=Counter)
    """The sessions that are ``active``, ``closed`` and ``expired``."""
    emotions: Counter[str] = field(default_factory=Counter)
    """The current emotion of the active sessions."""
    totals: Counter[str] = field(default_factory=Counter)
    """``messages``, ``tokens``, ``emotion_changes``, ``milestones``, ``breakthroughs``."""
    minutes: float = 0.0
    """The duration of all talks together."""
    responses: int = 0
    """The user's messages that were answered."""
    response_seconds: float = 0.0
    """The time until these answers together."""

    @property
    def average_minutes(self) -> float | None:
        """The minutes of a talk; None without one."""
        count = self.sessions.total()
        return self.minutes / count if count else None

    @property
    def average_response_seconds(self) -> float | None:
        """The seconds until an answer; None without one."""
        return self.response_seconds / self.responses if self.responses else None

    def add(self, state: JourneyState, now: datetime) -> None:
        """Count one session."""
        status = "expired" if is_expired(state, now) else state.status
        self.sessions[status] += 1
        if status == "active":
            self.emotions[state.emotion.emotion] += 1
        for name in _TOTALS:
            self.totals[name] += getattr(state.counters, name)
        self.minutes += state.duration_minutes
        self.responses += state.counters.responses
        self.response_seconds += state.counters.response_seconds

    def metrics(self) -> list[Metric]:
        """The figures for ``agent_state.metrics.to_prometheus``."""
        found = [
            Metric(
                "agent_state.journeys", "Conversations by status.", _by("status", self.sessions)
            ),
            Metric(
                "agent_state.journeys.emotions",
                "Active conversations by the client's emotion.",
                _by("emotion", self.emotions),
            ),
        ]
        for name, text in _TOTALS.items():
            found.append(Metric(f"agent_state.journeys.{name}", text, [({}, self.totals[name])]))
        if self.average_response_seconds is not None:
            text = "Time from a user's message to its answer, on average."
            values: Values = [({}, self.average_response_seconds)]
            found.append(Metric("agent_state.journeys.response", text, values, unit="s"))
        return found


_TOTALS = {
    "messages": "Messages of the stored conversations.",
    "tokens": "Tokens of these messages.",
    "emotion_changes": "Changes of the client's emotion.",
    "milestones": "Milestones that were recorded.",
    "breakthroughs": "Breakthroughs that were recorded.",
}


def _by(label: str, counts: Counter[str]) -> Values:
    return [({label: word}, float(count)) for word, count in sorted(counts.items())]


async def collect(
    managers: Iterable[StatePersistenceManager], user_id: str | None, now: datetime
) -> JourneyStatistics:
    """Count every session, or those of one user; in bounded memory, no log is read."""
    found = JourneyStatistics()
    for manager in managers:
        async with aclosing(manager.scan(KIND, () if user_id is None else user_id)) as sessions:
            async for loaded in sessions:
                if len(loaded.key) == 2 and isinstance(loaded.state, JourneyState):
                    found.add(loaded.state, now)
    return found
