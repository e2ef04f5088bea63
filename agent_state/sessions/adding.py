"""Messages on their way into a conversation: each idempotency key is stored once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from agent_state.manager import StatePersistenceManager
from agent_state.protocols import JsonObject
from agent_state.sessions.message_keys import MessageKeys
from agent_state.sessions.models import (
    CONVERSATIONS,
    AddedMessage,
    NewMessage,
    SessionMessage,
)
from agent_state.sessions.parts import Draft

Read = Callable[[tuple[str, str], int], Awaitable[SessionMessage]]


class Adding:
    """Messages on their way into one conversation."""

    def __init__(
        self,
        manager: StatePersistenceManager,
        keys: MessageKeys,
        place: tuple[str, str],
        new: Sequence[tuple[str, NewMessage]],
    ) -> None:
        """``place`` is session id and agent type; each new message comes with its id."""
        self._manager = manager
        self._keys = keys
        self._place = place
        self._new = new
        self._before = 0
        self._known: dict[int, int] = {}
        """Which of the new messages is stored already, and under which number."""
        self._same: dict[int, int] = {}
        """Which of them repeats an earlier one of this call."""
        self._records: dict[int, JsonObject] = {}

    async def work(self, draft: Draft) -> None:
        conversation = draft.session.conversation(self._place[1])
        self._before = conversation.message_count
        self._known, self._same, self._records = {}, {}, {}
        first: dict[str, int] = {}
        for index, (message_id, message) in enumerate(self._new):
            key = message.idempotency_key
            if key is not None:
                if key in first:
                    self._same[index] = first[key]
                    continue
                seq = await self._keys.find(self._manager, self._place, key, self._before)
                if seq is not None:
                    self._known[index] = seq
                    continue
                first[key] = index
            record: JsonObject = {
                "message_id": message_id,
                "role": message.role,
                "content": message.content,
                "timestamp": draft.time,
                "orchestrator_context": message.orchestrator_context,
                "idempotency_key": message.idempotency_key,
                "metadata": message.metadata,
            }
            for name in ("orchestrator_context", "idempotency_key", "metadata"):
                if record[name] is None:
                    del record[name]
            self._records[index] = record
            draft.group.append(CONVERSATIONS, self._place, record)
        draft.nothing = not self._records
        conversation.message_count += len(self._records)
        if self._records:
            conversation.last_message_at = draft.time

    async def outcome(self, draft: Draft, read: Read) -> list[AddedMessage]:
        """What came of each; ``read`` gives the message that is stored under a number."""
        numbers = dict(zip(self._records, draft.numbers, strict=False))
        keys = {numbers[index]: self._new[index][1].idempotency_key for index in self._records}
        self._keys.added(self._place, self._before, keys)
        session_id, agent_type = self._place
        conversation = draft.session.conversation(agent_type)
        added = []
        for index in range(len(self._new)):
            origin = self._same.get(index, index)
            if origin in numbers:
                # As it is stored, so there is nothing to validate again.
                message = SessionMessage.model_construct(
                    **self._records[origin], seq=numbers[origin]
                )
            else:
                message = await read(self._place, self._known[origin])
            added.append(
                AddedMessage(
                    session_id=session_id,
                    agent_type=agent_type,
                    conversation_id=conversation.conversation_id,
                    message_count=conversation.message_count,
                    message=message,
                    duplicate=index not in numbers,
                )
            )
        return added
