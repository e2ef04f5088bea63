"""What an export is made of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from agent_state.protocols import JsonObject
from agent_state_integrations.journey.models import Citation, JourneyState


class ExportSource(Protocol):
    """A session at one moment; each stream can be read again, from the beginning, oldest first."""

    state: JourneyState
    export_id: str
    citation: str
    exported_at: str
    include_transcript: bool
    assistant_name: str

    def messages(self) -> AsyncIterator[JsonObject]: ...
    def emotions(self) -> AsyncIterator[JsonObject]: ...
    def milestones(self) -> AsyncIterator[JsonObject]: ...
    def breakthroughs(self) -> AsyncIterator[JsonObject]: ...
    def events(self) -> AsyncIterator[JsonObject]: ...
    def citations(self) -> AsyncIterator[Citation]: ...


async def by_confidence(source: ExportSource) -> list[JsonObject]:
    """The breakthroughs, the most confident first, the older first among equals."""
    found = [record async for record in source.breakthroughs()]
    return sorted(found, key=lambda record: -number(record.get("confidence")))


def number(value: object) -> float:
    """A number that a person may have edited into something else."""
    return float(value) if isinstance(value, (int, float)) else 0.0


def percent(value: object) -> str:
    return f"{number(value):.0%}"


def speaker(source: ExportSource, message: JsonObject) -> str:
    """Who spoke, and for what is no user's message with which model."""
    role = str(message.get("role", ""))
    if role == "user":
        return "User"
    name = source.assistant_name if role == "assistant" else role.capitalize()
    model = message.get("model_id")
    return f"{name} ({model})" if model else name


def moment(text: object) -> str:
    """``2026-01-01 00:00:00 UTC`` of a time as it is stored."""
    if not isinstance(text, str) or len(text) < 19:
        return "—"
    return f"{text[:10]} {text[11:19]} UTC"


def seconds(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f} s"
