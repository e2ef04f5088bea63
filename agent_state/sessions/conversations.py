"""The conversations of a session: each is a log, appended to in O(1), read page by page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from agent_state.clock import IdFactory, stamp
from agent_state.codec import Group, format_validation_error
from agent_state.errors import RevisionConflictError, StateCorruptedError, StateValidationError
from agent_state.models import detached
from agent_state.protocols import JsonObject
from agent_state.sessions.models import (
    CONVERSATIONS,
    FINISHED,
    STORED_DEDUPE_KEY,
    AddedMessage,
    Conversation,
    ConversationPage,
    MergeMode,
    NewMessage,
    Session,
    SessionMessage,
    check_merge_mode,
    deep_merge,
)
from agent_state.sessions.names import NameRegistry, conversation_id_of, parse_conversation_id
from agent_state.sessions.pages import (
    ConversationLog,
    LogKey,
    MessageFilter,
    check_page_limit,
    parse_time,
)
from agent_state.sessions.repository import SessionDraft, SessionRepository

_STORED_NAMES = {
    "orchestrator_context": "orchestrator_context",
    "dedupe_key": STORED_DEDUPE_KEY,
    "metadata": "metadata",
}
"""The names in the log of a message's optional fields."""


@dataclass(slots=True)
class MessageBatch:
    """New messages of one conversation, each with its id, to be added all or none."""

    key: LogKey
    messages: list[tuple[str, NewMessage]]
    records: list[JsonObject] = field(default_factory=list)
    """The records that were last put into a group."""

    def put_into(self, group: Group, time: str) -> None:
        """Append the messages to the log; one whose dedupe key is stored adds nothing."""
        self.records = [_record(message_id, new, time) for message_id, new in self.messages]
        for record, (_, new) in zip(self.records, self.messages, strict=True):
            group.append(CONVERSATIONS, self.key, record, dedupe_key=new.dedupe_key)


class Conversations:
    """``sessions.conversations``: adds messages and reads them.

    Every method raises ``SessionNotFoundError``, ``SessionExpiredError`` and, for an agent type
    that is malformed or not registered, ``UnknownAgentTypeError``.
    """

    def __init__(
        self, repository: SessionRepository, roles: NameRegistry, new_id: IdFactory
    ) -> None:
        self._repository = repository
        self._roles = roles
        self._new_id = new_id
        self.log = ConversationLog(repository.manager)

    async def add(
        self,
        session_id: str,
        agent_type: str,
        role: str,
        content: Any,
        *,
        orchestrator_context: Mapping[str, Any] | None = None,
        dedupe_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AddedMessage:
        """Append a message; the log is not read.

        ``content`` is text or any JSON value. A conversation stores one message for each
        ``dedupe_key``: a repeated one adds nothing, and the stored message is returned. Raises
        ``UnknownRoleError``, ``StateValidationError``, ``SerializationError``.
        """
        message = {"role": role, "content": content, "dedupe_key": dedupe_key}
        if orchestrator_context is not None:
            message["orchestrator_context"] = dict(orchestrator_context)
        if metadata is not None:
            message["metadata"] = dict(metadata)
        return (await self.add_many(session_id, agent_type, [message]))[0]

    async def add_many(
        self, session_id: str, agent_type: str, messages: Sequence[NewMessage | Mapping[str, Any]]
    ) -> list[AddedMessage]:
        """Append several messages, all or none, in one commit. Otherwise as ``add``.

        A mapping has the fields of ``NewMessage``.
        """
        self._repository.agent_types.check(agent_type)
        new = [_validated(message) for message in messages]
        for message in new:
            self._roles.check(message.role)
        if not new:
            return []
        batch = MessageBatch((session_id, agent_type), [(self._new_id(), each) for each in new])
        numbers = await self._append(batch) or await self._append_and_renew(batch)
        return await self._added(batch, numbers)

    async def page(
        self,
        session_id: str,
        agent_type: str,
        *,
        after: int | None = None,
        before: int | None = None,
        limit: int = 50,
        role: str | None = None,
        workflow_id: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        text: str | None = None,
    ) -> ConversationPage:
        """A page of messages, oldest first: by default the latest ``limit`` messages.

        ``after``: the first messages with a higher number. ``before``: the last messages with a
        lower number; with both, the first ones between. ``limit`` is from 1 to 1000. The other
        arguments filter: by role, by the workflow a message is about, by time (``since``
        inclusive, ``until`` exclusive), by text in the content, ignoring case. Memory holds one
        page. Raises ``StateValidationError``.
        """
        self._repository.agent_types.check(agent_type)
        check_page_limit(limit)
        wanted = MessageFilter(
            role,
            workflow_id,
            parse_time(since, "since"),
            parse_time(until, "until"),
            None if text is None else text.casefold(),
        )
        session = await self._repository.live(session_id)
        key = (session_id, agent_type)
        last = await self.log.last_seq(key)
        if after is not None:
            found, more = await self.log.forwards(key, after, before, limit, wanted)
            earlier = bool(found) and (found[0].seq or 0) > 1
        else:
            end = last + 1 if before is None else min(before, last + 1)
            found, earlier = await self.log.backwards(key, end, limit, wanted)
            more = bool(found) and before is not None
        conversation = session.conversation(agent_type)
        return ConversationPage(
            session_id=session_id,
            agent_type=agent_type,
            conversation_id=conversation.conversation_id,
            message_count=last,
            orchestrator_context=conversation.orchestrator_context,
            messages=found,
            next_after=found[-1].seq if more else None,
            next_before=found[0].seq if earlier else None,
        )

    async def find(self, conversation_id: str) -> tuple[Session, str]:
        """The session and the agent type of a conversation. It never creates a session.

        Raises ``InvalidConversationIdError``.
        """
        session_id, agent_type = parse_conversation_id(conversation_id)
        self._repository.agent_types.check(agent_type)
        session = await self._repository.live(session_id)
        return await self._repository.public(session), agent_type

    async def update_context(
        self,
        session_id: str,
        agent_type: str,
        context: Mapping[str, Any],
        *,
        mode: MergeMode = "merge",
    ) -> Conversation:
        """Set which workflow a conversation is about; the conversation as it is then.

        ``last_workflow_update`` is set to now. A ``workflow_id`` in ``context`` is added to
        ``active_workflows``, or removed from it when ``status`` is that of a finished workflow.
        Raises ``StateValidationError``.
        """
        self._repository.agent_types.check(agent_type)
        check_merge_mode(mode)
        given = detached(dict(context))

        async def update(draft: SessionDraft) -> Conversation:
            conversation = draft.session.conversation(agent_type)
            old = conversation.orchestrator_context if mode == "merge" else {}
            new = deep_merge(old, given)
            workflow = given.get("workflow_id")
            if isinstance(workflow, str):
                others = [each for each in new.get("active_workflows") or [] if each != workflow]
                finished = given.get("status") in FINISHED
                new["active_workflows"] = others if finished else [*others, workflow]
            new["last_workflow_update"] = draft.time
            conversation.orchestrator_context = new
            return conversation

        return await self._repository.change(session_id, update)

    async def _append(self, batch: MessageBatch) -> list[int] | None:
        """Append to a session that was renewed recently; None when it was not, or is destroyed.

        Its document is neither read nor written. The commit itself checks that it is alive.
        """
        session_id, agent_type = batch.key
        now, renewals = self._repository.clock.now(), self._repository.renewals
        renewal = renewals.find(session_id, agent_type, now)
        if renewal is None:
            return None
        group = self._repository.manager.new_group()
        batch.put_into(group, stamp(now))
        group.changes.append(renewal.liveness_guard)
        try:
            return (await self._repository.manager.commit(group))[:-1]
        except RevisionConflictError:
            renewals.discard(session_id)
            return None

    async def _append_and_renew(self, batch: MessageBatch) -> list[int]:
        session_id, agent_type = batch.key

        async def append(draft: SessionDraft) -> SessionDraft:
            draft.session.conversation(agent_type)
            batch.put_into(draft.group, draft.time)
            return draft

        draft = await self._repository.change(session_id, append)
        return draft.numbers[: len(batch.messages)]

    async def _stored_message(self, key: LogKey, seq: int) -> SessionMessage:
        try:
            return await self.log.message(key, seq)
        except StateCorruptedError:
            await self._repository.live(key[0])  # raises if the session was destroyed since
            raise

    async def _added(self, batch: MessageBatch, numbers: list[int]) -> list[AddedMessage]:
        session_id, agent_type = batch.key
        added, newest = [], max(numbers)
        for seq, (message_id, new), record in zip(
            numbers, batch.messages, batch.records, strict=True
        ):
            if new.dedupe_key is None:  # it is stored as it was given: nothing to validate again
                message = SessionMessage.model_construct(**record, seq=seq)
            else:
                message = await self._stored_message(batch.key, seq)
            duplicate = message.message_id != message_id
            last = await self.log.last_seq(batch.key) if duplicate else newest
            added.append(
                AddedMessage(
                    session_id=session_id,
                    agent_type=agent_type,
                    conversation_id=conversation_id_of(session_id, agent_type),
                    message_count=last,
                    message=message,
                    duplicate=duplicate,
                )
            )
        return added


def _record(message_id: str, new: NewMessage, time: str) -> JsonObject:
    record: JsonObject = {
        "message_id": message_id,
        "role": new.role,
        "content": new.content,
        "timestamp": time,
    }
    for name, stored_name in _STORED_NAMES.items():
        value = getattr(new, name)
        if value is not None:
            record[stored_name] = value
    return record


def _validated(message: NewMessage | Mapping[str, Any]) -> NewMessage:
    try:
        checked = NewMessage.model_validate(
            message.model_copy() if isinstance(message, NewMessage) else message
        )
    except ValidationError as error:
        raise StateValidationError(
            format_validation_error(error).replace("state", "message")
        ) from error
    if not isinstance(checked.content, str):
        checked.content = detached(checked.content)
    return checked
