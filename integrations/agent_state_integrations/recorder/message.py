"""What is recorded: one message, as the object that stands on a line of the log.

A record has the keys ``Id Timestamp SpeakerName SpeakerRole Message ConversationType ContextId
Metadata``, and ``Content`` where the message was an object that says more than its text. The
pipeline works on these plain objects; ``RecordedMessage`` is the same for those who read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_state.protocols import JsonObject

UNKNOWN = "unknown"
"""The speaker or the context of a message that does not say."""
DEFAULT_ROLE = "Agent"
REDACTED = "[redacted:"
"""How what stands in the place of a secret begins."""

ENRICHED = frozenset(
    {
        "chain_type",
        "ace_tier",
        "shl_tags",
        "keywords",
        "word_count",
        "char_count",
        "content_hash",
    }
)
"""What enrichment adds to ``Metadata``. Older logs have it at the top level of a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedMessage:
    """One recorded message.

    ``timestamp`` is UTC text with microseconds (``…Z``), so that text sorts as time does;
    ``seq`` is its number in the recording, 0 for what was not read from one.
    """

    id: str
    timestamp: str
    speaker: str = UNKNOWN
    role: str = DEFAULT_ROLE
    text: str = ""
    type: int | str = 0
    context: str = UNKNOWN
    metadata: JsonObject = field(default_factory=dict)
    content: JsonObject | None = None
    seq: int = 0

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
        """The domain, as enrichment found it."""
        return self.metadata.get("chain_type")

    @property
    def ace_tier(self) -> str | None:
        """``A`` architectural, ``C`` collaborative, ``E`` execution, or ``none``."""
        return self.metadata.get("ace_tier")

    @property
    def shl_tags(self) -> list[str]:
        return self.metadata.get("shl_tags") or []

    @property
    def keywords(self) -> list[str]:
        return self.metadata.get("keywords") or []
