"""Messages on their way into a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from agent_state.codec import Group
from agent_state.protocols import JsonObject
from agent_state.sessions.models import CONVERSATIONS, NewMessage

_OPTIONAL = ("orchestrator_context", "idempotency_key", "metadata")


class Adding:
    """New messages, each with its id, for a place: session id and agent type."""

    def __init__(self, place: tuple[str, str], new: Sequence[tuple[str, NewMessage]]) -> None:
        self.place = place
        self.new = new
        self.records: list[JsonObject] = []
        """What was last put into a group."""

    def put_into(self, group: Group, time: str) -> None:
        """Let the group append them; a key that the log holds already adds nothing."""
        self.records = [self._record(message_id, new, time) for message_id, new in self.new]
        for record, (_, new) in zip(self.records, self.new, strict=True):
            group.append(CONVERSATIONS, self.place, record, dedupe_key=new.idempotency_key)

    def _record(self, message_id: str, new: NewMessage, time: str) -> JsonObject:
        record: JsonObject = {
            "message_id": message_id,
            "role": new.role,
            "content": new.content,
            "timestamp": time,
        }
        for name in _OPTIONAL:
            value = getattr(new, name)
            if value is not None:
                record[name] = value
        return record
