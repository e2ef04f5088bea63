"""What is said in a session: each conversation a log, appended to in O(1), read page by page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from agent_state.errors import StateValidationError
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
    parse_conversation_id,
)
from agent_state.sessions.pages import Filter, PageReading, moment
from agent_state.sessions.parts import Draft, merged
from agent_state.validators import say


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
        place = (session_id, agent_type)
        identified = [(self._new_id(), message) for message in new]
        adding = Adding(self.manager, self._keys, place, identified)
        draft = await self._change(session_id, adding.work)
        return await adding.outcome(draft, self._stored_message)

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
        if after is not None:
            found, more = await self._forwards(place, after, before, limit, chosen)
            earlier = bool(found) and (found[0].seq or 0) > 1
        else:
            found, earlier = await self._backwards(place, before, limit, chosen)
            more = bool(found) and before is not None
        conversation = session.conversation(agent_type)
        return ConversationPage(
            session_id=session_id,
            agent_type=agent_type,
            conversation_id=conversation.conversation_id,
            message_count=conversation.message_count,
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
        return session.public(self.agent_types), agent_type

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
            result[:] = [conversation.model_copy(deep=True)]

        await self._change(session_id, work)
        return result[0]


def _checked(message: NewMessage | Mapping[str, Any]) -> NewMessage:
    try:
        checked = NewMessage.model_validate(
            message.model_copy() if isinstance(message, NewMessage) else message
        )
    except ValidationError as error:
        raise StateValidationError(say(error).replace("state", "message")) from error
    if not isinstance(checked.content, str):
        checked.content = detached(checked.content)
    return checked
