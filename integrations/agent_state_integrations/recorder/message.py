"""One recorded message, and the record that a line of the log holds for it.

A record has the keys ``Id Timestamp SpeakerName SpeakerRole Message ConversationType ContextId
Metadata``, and ``Content`` where the message was an object with more than its text. Writers and
readers work on these plain objects; ``RecordedMessage`` is the typed form for callers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_state.protocols import JsonObject

UNKNOWN = "unknown"
"""The speaker or context of a message that names none."""
DEFAULT_ROLE = "Agent"
REDACTED = "[redacted:"
"""The start of the text that replaces a secret."""

ENRICHED = (
    "chain_type",
    "ace_tier",
    "shl_tags",
    "keywords",
    "word_count",
    "char_count",
    "content_hash",
)
"""The fields that enrichment adds to ``Metadata``. Older logs have them at the top level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedMessage:
    """One recorded message."""

    id: str
    """The sender's id of the message, or a new one; unique in a recording."""
    timestamp: str
    """UTC with microseconds, ``2026-11-21T03:11:00.000000Z``; sorts as text."""
    speaker: str = UNKNOWN
    """The name of the sender."""
    role: str = DEFAULT_ROLE
    """The sender's role, such as ``Agent``, ``User`` or ``Tool``."""
    text: str = ""
    """The text of the message, without secrets."""
    type: int | str = 0
    """``ConversationType``, a number or name of the sender's."""
    context: str = UNKNOWN
    """The conversation that the message belongs to."""
    metadata: JsonObject = field(default_factory=dict)
    """The sender's metadata, and the fields of enrichment."""
    content: JsonObject | None = None
    """The object that was sent, where it holds more than the text."""
    seq: int = 0
    """The sequence number in the recording; 0 if it was read from another log."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any], seq: int = 0) -> RecordedMessage:
        """The message in a record that this library wrote or imported."""
        return cls(
            id=record["Id"],
            timestamp=record["Timestamp"],
            speaker=record["SpeakerName"],
            role=record["SpeakerRole"],
            text=record["Message"],
            type=record["ConversationType"],
            context=record["ContextId"],
            metadata=record["Metadata"],
            content=record.get("Content"),
            seq=seq,
        )

    def to_record(self) -> JsonObject:
        """The object that is stored."""
        record: JsonObject = {
            "Id": self.id,
            "Timestamp": self.timestamp,
            "SpeakerName": self.speaker,
            "SpeakerRole": self.role,
            "Message": self.text,
            "ConversationType": self.type,
            "ContextId": self.context,
            "Metadata": self.metadata,
        }
        if self.content is not None:
            record["Content"] = self.content
        return record

    @property
    def chain_type(self) -> str | None:
        """The domain that enrichment found."""
        return self.metadata.get("chain_type")

    @property
    def ace_tier(self) -> str | None:
        """``A`` architectural, ``C`` collaborative, ``E`` execution, or ``none``."""
        return self.metadata.get("ace_tier")

    @property
    def shl_tags(self) -> list[str]:
        """The tags that enrichment found, each with its ``@``."""
        return self.metadata.get("shl_tags") or []

    @property
    def keywords(self) -> list[str]:
        """The keywords that enrichment found."""
        return self.metadata.get("keywords") or []
