"""Recorded logs: the flat, the wrapped and the stored form, of this library and of older recorders.

``normalize`` describes the forms, and reads them; a line is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers.transcript import (
    Outcome,
    TranscriptFile,
    TranscriptFormat,
)
from agent_state_integrations.recorder.normalize import CONTENT_NAMES, NAMES

_OWN = frozenset(name for meaning in ("id", "speaker", "context") for name in NAMES[meaning]) - {
    "id",
    "uuid",
    "session_id",
    "sessionId",
    "context",
    "author",
}
"""Names that messages have in these forms; the others are in transcripts of many tools."""
_WRAPPERS = frozenset({"event_type", "sender_role", "SpeakerRole", "ConversationType"})


_UNDERSTOOD = frozenset(name for names in NAMES.values() for name in names) - {
    *NAMES["role"],
    *NAMES["type"],
}
"""A line of these names alone says who, when, where and what, and nothing else."""


def _mark(line: JsonObject) -> str | None:
    content = CONTENT_NAMES & line.keys()
    if not content or not {"parentUuid", "parentId", "payload"}.isdisjoint(line):
        return None
    if own := (_OWN | _WRAPPERS) & line.keys():
        return f"{min(own)} and {min(content)}"
    if line.keys() <= _UNDERSTOOD and all(type(line[name]) is str for name in content):
        return f"nothing but {', '.join(sorted(line))}"
    return None


class RecordedLog:
    """A log in any of the recorder's own forms."""

    def __init__(self, file: TranscriptFile) -> None:
        pass

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        yield number, line

    def rest(self) -> Iterator[Outcome]:
        return iter(())


FORMAT = TranscriptFormat(name="recorded", title="a recorder", mark=_mark, reader=RecordedLog)
