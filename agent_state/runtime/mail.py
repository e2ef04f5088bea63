"""Mail between agents: the states of a message, and the mailboxes of one runtime."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from difflib import get_close_matches
from itertools import islice
from typing import Any

from agent_state.clock import check_count, stamp
from agent_state.errors import (
    AgentStateError,
    LeaseLostError,
    RevisionConflictError,
    StateNotFoundError,
    StateValidationError,
)
from agent_state.models import (
    ARCHIVE,
    PRIORITIES,
    MailMessage,
    MailStatus,
    OpenModel,
    Priority,
    Task,
    TaskReference,
    copied,
    plain_copy,
)
from agent_state.runtime import dedupe
from agent_state.runtime.dedupe import DEDUPE_SECONDS
from agent_state.runtime.handlers import ON_MAIL, RegisteredHandler
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.mailbox import order
from agent_state.runtime.sleep import SleepService, add_wake, woken_by_mail
from agent_state.runtime.state import RuntimeState, logger, owned
from agent_state.runtime.transitions import MAX_ATTEMPTS

_CONTENT = ("subject", "body", "priority", "expects_reply", "metadata")
"""The fields of a message that its dedupe key stands for."""

# -- the states of a message (unread, read, replied, archived), as pure functions ------------


def new_message(
    message_id: str,
    from_agent: str,
    to_agent: str,
    *,
    subject: str,
    body: Any,
    now: datetime,
    priority: Priority = "normal",
    reply_to: str | None = None,
    expects_reply: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> MailMessage:
    """Return an unread message. Raises ``StateValidationError`` for an unknown priority."""
    if priority not in PRIORITIES:
        known = ", ".join(PRIORITIES)
        raise StateValidationError(f"priority {priority!r} is not one of {known}", kind="mail")
    message = MailMessage(
        message_id=message_id,
        from_agent=from_agent,
        to_agent=to_agent,
        subject=subject,
        body=plain_copy(body),
        priority=priority,
        status="unread",
        timestamp=stamp(now),
    )
    if reply_to is not None:
        message.reply_to = reply_to
    if expects_reply:
        message.expects_reply = True
    if metadata:
        message.metadata = plain_copy(dict(metadata))
    return message


def new_reply(
    message: MailMessage, replier: str, body: Any, *, now: datetime, priority: Priority = "normal"
) -> MailMessage:
    """Return the answer of an agent to a message. Its id is made of the two: there is one."""
    return new_message(
        dedupe.dedupe_id("reply", message.from_agent, replier, message.message_id),
        replier,
        message.from_agent,
        subject=f"Re: {message.subject}",
        body=body,
        now=now,
        priority=priority,
        reply_to=message.message_id,
    )


def mark_read(message: MailMessage, now: datetime) -> MailMessage:
    """Return the message as read; one that was read, replied or archived stays as it is."""
    if message.status != "unread":
        return message
    return message.model_copy(update={"status": "read", "read_at": stamp(now)})


def mark_replied(message: MailMessage, reply_id: str, now: datetime) -> MailMessage:
    """Return the message as answered by the message with that id."""
    read = mark_read(message, now)
    return read.model_copy(update={"status": "replied", "replied_with": reply_id})


def mark_archived(message: MailMessage, now: datetime) -> MailMessage:
    """Return the message as archived: out of the inbox, still in the history."""
    return mark_read(message, now).model_copy(update={"status": "archived"})


def new_mail_task(agent_id: str, message: MailMessage, handler: RegisteredHandler) -> Task:
    """Return the task that handles a message. Its id is made of the message's: there is one."""
    task_id = f"{ON_MAIL}-{message.message_id}"
    task = Task(
        task_id=task_id if len(task_id) < 100 else dedupe.dedupe_id(ON_MAIL, message.message_id),
        agent_id=agent_id,
        name=ON_MAIL,
        payload={"message_id": message.message_id},
        status="pending",
        priority=handler.priority or message.priority,
        attempts=0,
        max_attempts=handler.max_attempts or MAX_ATTEMPTS,
    )
    if message.timestamp is not None:
        task.created_at = message.timestamp
    return task


# -- the mailboxes ---------------------------------------------------------------------------


class MailService:
    """``runtime.mail``: sends messages between agents and keeps their mailboxes.

    A message is one document, created by the delivery; so a key that was delivered already is
    found by its id, also after a crash.
    """

    def __init__(self, state: RuntimeState, sleep: SleepService) -> None:
        self._state = state
        self._sleep = sleep

    async def send(
        self,
        from_agent: str,
        to_agent: str,
        *,
        subject: str,
        body: Any = "",
        priority: Priority = "normal",
        expects_reply: bool = False,
        dedupe_key: str | None = None,
        dedupe_seconds: float = DEDUPE_SECONDS,
        metadata: Mapping[str, Any] | None = None,
        sender: LiveAgent | None = None,
        sent_by: TaskReference | None = None,
    ) -> MailMessage:
        """Deliver a message; it is stored when this returns.

        ``dedupe_key``: a second message of this sender to this agent with the same key is not
        delivered, and the first one is returned. The key holds for ``dedupe_seconds`` at least,
        whatever cleaning up does. ``sender`` and ``sent_by``: the running agent and task that
        send it.

        Raises ``DedupeKeyReusedError`` when the first one has other content,
        ``StateValidationError`` for an unknown priority, and ``LeaseLostError`` when another
        runtime has taken the sender.
        """
        self._state.check_running()
        if dedupe_key is not None:
            dedupe.check_key(dedupe_key, dedupe_seconds)
            old = await self._sent_by_older_version(from_agent, to_agent, dedupe_key)
            if old is not None:
                return old
        message = new_message(
            self._state.new_id()
            if dedupe_key is None
            else dedupe.dedupe_id(to_agent, from_agent, dedupe_key),
            from_agent,
            to_agent,
            subject=subject,
            body=body,
            now=self._state.clock.now(),
            priority=priority,
            expects_reply=expects_reply,
            metadata=metadata,
        )
        if sent_by is not None:
            message.sent_by = sent_by  # the key is the task's own, and holds as long as the task
        elif dedupe_key is not None:
            content = {name: getattr(message, name) for name in _CONTENT}
            dedupe.promise(
                message,
                dedupe_key,
                dedupe_seconds,
                content,
                now=self._state.clock.now(),
                serializer=self._state.manager.serializer,
            )
        sent = await self.deliver(message, sender=sender)
        if sent is not message and dedupe_key is None:  # an id factory that repeats itself
            place = (to_agent, message.message_id)
            raise RevisionConflictError("the new id is taken", actual=1, kind="mail", key=place)
        dedupe.check_same(sent, message)
        return sent

    def inbox(
        self, agent_id: str, *, status: MailStatus | None = "unread", limit: int | None = None
    ) -> list[MailMessage]:
        """Return copies of the agent's mail of that status, oldest first, at most ``limit``.

        With None: of any status but archived. Raises ``StateNotFoundError`` for an unknown agent.
        """
        if limit is not None:
            check_count("limit", limit)
        mailbox = self._state.agent(agent_id).mail
        if status == "unread":
            return [copied(message) for message in islice(mailbox.unread(), limit)]
        found = [
            message
            for message in mailbox.values()
            if (message.status == status if status else message.status != "archived")
        ]
        return [copied(message) for message in sorted(found, key=order)[:limit]]

    async def read(self, agent_id: str, message_id: str) -> MailMessage:
        """Mark the message as read and return it. Raises ``StateNotFoundError``."""
        message = self._message(agent_id, message_id)
        return await self._store(mark_read(message, self._state.clock.now()))

    async def archive(self, agent_id: str, message_id: str) -> MailMessage:
        """Take the message out of the inbox and return it. Raises ``StateNotFoundError``."""
        message = self._message(agent_id, message_id)
        return await self._store(mark_archived(message, self._state.clock.now()))

    async def reply(
        self, agent_id: str, message_id: str, body: Any, *, priority: Priority = "normal"
    ) -> MailMessage:
        """Answer a message, which becomes ``replied``; a second answer returns the first one.

        Raises ``StateNotFoundError`` when the agent has no such message.
        """
        first = await self.first_answer(await self.find(agent_id, message_id))
        if first is not None:
            return first
        message = self._message(agent_id, message_id)
        now = self._state.clock.now()
        answer = new_reply(message, agent_id, body, now=now, priority=priority)
        return await self.deliver(answer, answered=message)

    async def history(self, agent_id: str) -> list[MailMessage]:
        """Return every message the agent ever got, oldest first, cleaned-up ones included."""
        self._state.check_running()
        found = {message.message_id: message async for message in self._archived(agent_id)}
        async for loaded in self._state.manager.scan("mail", agent_id):
            if isinstance(loaded.state, MailMessage):
                found[loaded.state.message_id] = loaded.state
        return sorted(found.values(), key=order)

    def pending_replies(self, agent_id: str) -> list[MailMessage]:
        """Return the messages that expect a reply and have none yet, oldest first."""
        found = [
            message
            for message in self._state.agent(agent_id).mail.values()
            if message.expects_reply and message.status not in ("replied", "archived")
        ]
        return [copied(message) for message in sorted(found, key=order)]

    def get(self, agent_id: str, message_id: str) -> MailMessage:
        """Return a copy of a message. Raises ``StateNotFoundError``."""
        return copied(self._message(agent_id, message_id))

    # -- for the runtime's other parts -------------------------------------------------------

    async def find(self, agent_id: str, message_id: str) -> MailMessage | None:
        """Return a message, cleaned up or not; None if the agent never had it."""
        agent = self._state.agents.get(agent_id)
        message = agent.mail.get(message_id) if agent is not None else None
        return message or await self._find_archived(agent_id, message_id)

    async def first_answer(self, message: MailMessage | None) -> MailMessage | None:
        """Return the answer that was given to a message, cleaned up or not; None without one."""
        if message is None or message.replied_with is None:
            return None
        key = (message.from_agent, message.replied_with)
        answer = await self._state.manager.load("mail", key)
        if isinstance(answer, MailMessage):
            return answer
        return await self._find_archived(*key)

    async def deliver(
        self,
        message: MailMessage,
        *,
        answered: MailMessage | None = None,
        sender: LiveAgent | None = None,
    ) -> MailMessage:
        """Store a message, and mark the one it answers, as one group.

        Returns the message that is stored under this id: this one, or the first one. A sleeper
        that waits for it wakes in the same group.
        """
        agent = self._state.agents.get(message.to_agent)
        if agent is None or self._wake_event(agent, message) is None:
            sent = await self._deliver(message, answered, None, sender)
        else:
            # Under the lock, so that no other save of the sleeper runs while this one wakes it.
            async with agent.lock:
                try:
                    sent = await self._deliver(message, answered, agent, sender)
                except LeaseLostError:
                    if agent.leased:
                        raise
                    # The runtime that owns the sleeper now wakes it.
                    sent = await self._deliver(message, answered, None, sender)
        if agent is not None:
            # It may have fallen asleep while the message was stored.
            await self._sleep.wake_if_due(agent)
        elif sent is message:
            self._report_parked(message)
        return sent

    def _report_parked(self, message: MailMessage) -> None:
        """Say that mail waits for an agent that does not exist."""
        similar = get_close_matches(message.to_agent, self._state.agents, n=3)
        hint = f" (did you mean {' or '.join(map(repr, similar))}?)" if similar else ""
        logger.warning(
            "message %s from %s is kept for %r, an agent that does not exist%s",
            message.message_id, message.from_agent, message.to_agent, hint,
        )  # fmt: skip

    async def _deliver(
        self,
        message: MailMessage,
        answered: MailMessage | None,
        sleeper: LiveAgent | None,
        sender: LiveAgent | None,
    ) -> MailMessage:
        group = self._state.manager.new_group()
        key = (message.to_agent, message.message_id)
        group.save("mail", key, message, expected=0)
        sleep = sleeper.sleep if sleeper is not None else None
        event = self._wake_event(sleeper, message) if sleeper is not None else None
        if sleeper is not None and event is not None:
            add_wake(group, sleeper, event)
        if answered is not None:
            answered = mark_replied(answered, message.message_id, self._state.clock.now())
            group.save("mail", (answered.to_agent, answered.message_id), answered)
        agents = [*filter(None, [sender, sleeper if event is not None else None])]
        if answered is not None:
            agents += owned(self._state.agents.get(answered.to_agent))
        try:
            await self._state.commit(group, *agents)
        except RevisionConflictError as conflict:
            stored = await self._state.manager.load("mail", key)
            if conflict.kind != "mail" or not isinstance(stored, MailMessage):
                raise
            # Its first sender may have been cancelled before the mailbox in memory had it.
            await self._add_stored(message, answered)
            return stored
        except asyncio.CancelledError:
            await self._add_stored(message, answered)
            raise
        if answered is not None:
            self._add(answered)
        self._add(message)
        if sleeper is not None and sleep is not None and event is not None:
            self._sleep.apply_wake(sleeper, sleep, event)
        return message

    def _wake_event(self, agent: LiveAgent, message: MailMessage) -> str | None:
        """Return the event that the message is for a sleeper of this runtime."""
        if agent.sleep is None or not agent.leased:
            return None
        return woken_by_mail(agent.sleep, message)

    def _add(self, message: MailMessage) -> None:
        """Add a stored message to its agent's mailbox in memory."""
        agent = self._state.agents.get(message.to_agent)
        if agent is not None:
            agent.mail[message.message_id] = copied(message)
            agent.changed.set()

    async def _add_stored(self, *messages: MailMessage | None) -> None:
        """Add what is stored of these messages, unless another task did so first."""
        for message in filter(None, messages):
            agent = self._state.agents.get(message.to_agent)
            before = agent.mail.get(message.message_id) if agent is not None else None
            with contextlib.suppress(AgentStateError):
                key = (message.to_agent, message.message_id)
                stored = await self._state.manager.load("mail", key)
                known = agent.mail.get(message.message_id) if agent is not None else None
                if isinstance(stored, MailMessage) and known is before:
                    self._add(stored)

    async def _archived(self, agent_id: str) -> AsyncIterator[MailMessage]:
        async for entry in self._state.manager.read_log("mail", (agent_id, ARCHIVE)):
            yield MailMessage.model_validate(entry.record)

    async def _find_archived(self, agent_id: str, message_id: str) -> MailMessage | None:
        """Return the latest message of that id that was cleaned up."""
        found = None
        key, prefix = (agent_id, ARCHIVE), f"{message_id}@"
        async for entry in self._state.manager.read_keyed("mail", key, prefix):
            if entry.record.get("message_id") == message_id:
                found = MailMessage.model_validate(entry.record)
        return found

    async def _sent_by_older_version(
        self, from_agent: str, to_agent: str, dedupe_key: str
    ) -> MailMessage | None:
        """Return the message that was sent when the key itself was the message's id."""
        agent = self._state.agents.get(to_agent)
        if agent is not None:
            stored: OpenModel | None = agent.mail.get(dedupe_key)
        else:
            stored = await self._state.manager.load("mail", (to_agent, dedupe_key))
        if not isinstance(stored, MailMessage) or stored.from_agent != from_agent:
            return None
        return copied(stored)

    def _message(self, agent_id: str, message_id: str) -> MailMessage:
        agent = self._state.agents.get(agent_id)
        message = agent.mail.get(message_id) if agent else None
        if message is None:
            raise StateNotFoundError("no such message", kind="mail", key=(agent_id, message_id))
        return message

    async def _store(self, changed: MailMessage) -> MailMessage:
        group = self._state.manager.new_group()
        group.save("mail", (changed.to_agent, changed.message_id), changed)
        await self._state.commit(group, *owned(self._state.agent(changed.to_agent)))
        self._add(changed)
        return copied(changed)
