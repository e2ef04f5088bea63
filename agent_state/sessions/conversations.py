"""What is said in a session: each conversation a log, appended to in O(1), read page by page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from agent_state.clock import stamp
from agent_state.codec import format_validation_error
from agent_state.errors import RevisionConflictError, StateValidationError
from agent_state.models import detached
from agent_state.sessions.adding import Adding
from agent_state.sessions.lifecycle import check_limit, check_mode
from agent_state.sessions.models import (
    FINISHED,
    AddedMessage,
    Conversation,
    ConversationPage,
    Mode,
    NewMessage,
    Session,
    SessionMessage,
    conversation_id_of,
    parse_conversation_id,
)
from agent_state.sessions.pages import Filter, PageReading, moment
from agent_state.sessions.parts import merged
from agent_state.sessions.saving import Draft


class ConversationMethods(PageReading):
    """What a session manager does with conversations."""

    async def add_conversation_message(
        self,
        session_id: str,
        agent_type: str,
        role: str,
        content: Any,
        *,
        orchestrator_context: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AddedMessage:
        """Add what was said; the log is appended to and not read.

        ``content`` is text, or any JSON. With an ``idempotency_key`` that the conversation has a
        message for already nothing is added, and that message is given back. Raises
        ``UnknownAgentTypeError``, ``UnknownRoleError``, ``StateValidationError``.
        """
        message = {"role": role, "content": content, "idempotency_key": idempotency_key}
        if orchestrator_context is not None:
            message["orchestrator_context"] = dict(orchestrator_context)
        if metadata is not None:
            message["metadata"] = dict(metadata)
        return (await self.add_conversation_messages(session_id, agent_type, [message]))[0]

    async def add_conversation_messages(
        self, session_id: str, agent_type: str, messages: Sequence[NewMessage | Mapping[str, Any]]
    ) -> list[AddedMessage]:
        """Add several messages, all or none, in one commit. Else as ``add_conversation_message``.

        A mapping has the fields of ``NewMessage``.
        """
        self._check_agent_type(agent_type)
        new = [_checked(message) for message in messages]
        for message in new:
            self._check_role(message.role)
        if not new:
            return []
        adding = Adding((session_id, agent_type), [(self._new_id(), each) for each in new])
        numbers = await self._append(adding) or await self._begin(adding)
        return await self._outcome(adding, numbers)

    async def _append(self, adding: Adding) -> list[int] | None:
        """Add to a session that was renewed just now; None when it was not, or is destroyed.

        Its document is neither read nor written. That it lives is asked by the commit itself.
        """
        session_id, agent_type = adding.place
        now = self.clock.now()
        fresh = self._fresh.find(session_id, agent_type, now)
        if fresh is None:
            return None
        group = self.manager.new_group()
        adding.put_into(group, stamp(now))
        group.changes.append(fresh.alive)
        try:
            return (await self.manager.commit(group))[:-1]
        except RevisionConflictError:
            self._fresh.forget(session_id)
            return None

    async def _begin(self, adding: Adding) -> list[int]:
        """Add, and renew the session."""
        session_id, agent_type = adding.place

        def work(draft: Draft) -> None:
            draft.session.conversation(agent_type)
            adding.put_into(draft.group, draft.time)

        return (await self._change(session_id, work)).numbers[:-1]

    async def _outcome(self, adding: Adding, numbers: list[int]) -> list[AddedMessage]:
        session_id, agent_type = adding.place
        added = []
        for seq, (message_id, new), record in zip(numbers, adding.new, adding.records, strict=True):
            # As it is stored, so there is nothing to validate again.
            message = SessionMessage.model_construct(**record, seq=seq)
            last = max(numbers)
            if new.idempotency_key is not None:
                message = await self._stored_message(adding.place, seq)
            if message.message_id != message_id:
                last = await self._last_seq(adding.place)
            added.append(
                AddedMessage(
                    session_id=session_id,
                    agent_type=agent_type,
                    conversation_id=conversation_id_of(session_id, agent_type),
                    message_count=last,
                    message=message,
                    duplicate=message.message_id != message_id,
                )
            )
        return added

    async def get_conversation_history(
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
        """A page of what was said, oldest first: by default the latest ``limit`` messages.

        ``after``: the first ones with a higher number. ``before``: the last ones with a lower
        number; with both, the first ones between. ``limit`` is from 1 to 1000. The rest filters:
        by role, by the workflow a message is about, by time (from ``since`` on, before
        ``until``), by text in the content, whatever its case. Memory holds one page.
        """
        self._check_agent_type(agent_type)
        check_limit(limit)
        chosen = Filter(
            role,
            workflow_id,
            moment(since, "since"),
            moment(until, "until"),
            None if text is None else text.casefold(),
        )
        session, _ = await self._live(session_id)
        place = (session_id, agent_type)
        last = await self._last_seq(place)
        if after is not None:
            found, more = await self._forwards(place, after, before, limit, chosen)
            earlier = bool(found) and (found[0].seq or 0) > 1
        else:
            end = last + 1 if before is None else min(before, last + 1)
            found, earlier = await self._backwards(place, end, limit, chosen)
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

    async def find_conversation(self, conversation_id: str) -> tuple[Session, str]:
        """The session and the agent type of a conversation.

        Raises ``InvalidConversationIdError``, ``UnknownAgentTypeError``. It never makes a session.
        """
        session_id, agent_type = parse_conversation_id(conversation_id)
        self._check_agent_type(agent_type)
        session, _ = await self._live(session_id)
        return await self._public(session), agent_type

    async def update_conversation_orchestrator_context(
        self,
        session_id: str,
        agent_type: str,
        context: Mapping[str, Any],
        *,
        mode: Mode = "merge",
    ) -> Conversation:
        """Say which workflow a conversation is about.

        ``last_workflow_update`` is set to now. A ``workflow_id`` in ``context`` is added to
        ``active_workflows``, or taken out when ``status`` says that it has finished.
        """
        self._check_agent_type(agent_type)
        check_mode(mode)
        given = detached(dict(context))
        result: list[Conversation] = []

        def work(draft: Draft) -> None:
            conversation = draft.session.conversation(agent_type)
            old = conversation.orchestrator_context if mode == "merge" else {}
            new = merged(old, given)
            workflow = given.get("workflow_id")
            if isinstance(workflow, str):
                active = [each for each in new.get("active_workflows") or [] if each != workflow]
                done = given.get("status") in FINISHED
                new["active_workflows"] = active if done else [*active, workflow]
            new["last_workflow_update"] = draft.time
            conversation.orchestrator_context = new
            result[:] = [conversation]

        await self._change(session_id, work)
        return result[0]


def _checked(message: NewMessage | Mapping[str, Any]) -> NewMessage:
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
