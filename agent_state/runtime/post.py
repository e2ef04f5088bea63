"""Mail between agents, and what wakes a sleeper."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any

from agent_state import mail as rules
from agent_state import sleep as sleeping
from agent_state.clock import stamp
from agent_state.codec import Group
from agent_state.errors import AgentStateError, RevisionConflictError, StateNotFoundError
from agent_state.models import ARCHIVE, MailMessage, SleepState
from agent_state.runtime.core import Core
from agent_state.runtime.live import LiveAgent

EVENTS = ("system", "events")
"""The log of what ``emit`` was told."""


class Bedroom:
    """Puts agents to sleep and wakes them, each in one group with the agent itself."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def sleep(
        self,
        agent: LiveAgent,
        *,
        seconds: float | None,
        until: datetime | None,
        wake_on: Sequence[str],
        reason: str | None,
        mail_seen: Sequence[str] | None = None,
    ) -> SleepState:
        """Begin to sleep. Mail the agent has not seen yet ends it at once, if mail may."""
        if mail_seen is None:
            mail_seen = [message.message_id for message in agent.unread()]
        sleep = sleeping.fall_asleep(
            agent.agent_id,
            now=self._core.now(),
            seconds=seconds,
            until=until,
            wake_on=wake_on,
            reason=reason,
            mail_seen=mail_seen,
        )
        before, agent.sleep = agent.sleep, sleep
        try:
            await self._core.save(agent, stage=lambda group: save_sleep(group, sleep))
        except BaseException as error:
            # The change of a caller who was cancelled may have been made all the same.
            asleep = isinstance(error, asyncio.CancelledError) and await self._is_stored(sleep)
            if agent.sleep is sleep and not asleep:
                agent.sleep = before
            raise
        await self.wake_if_due(agent)  # what came while it was being stored counts
        agent.changed.set()
        return sleep

    async def _is_stored(self, sleep: SleepState) -> bool:
        try:
            stored = await self._core.manager.load_sleep_state(sleep.agent_id)
        except AgentStateError:
            return False
        return stored is not None and stored.model_dump() == sleep.model_dump()

    async def wake(self, agent: LiveAgent, reason: str) -> bool:
        """End the sleep; whether there was one."""
        async with agent.lock:
            if agent.sleep is None:
                return False
            group = self._core.manager.new_group()
            stage_wake(group, agent, reason)
            sleep = agent.sleep
            await self._core.commit(agent, group)
            self.awoke(agent, sleep, reason)
        return True

    async def wake_if_due(self, agent: LiveAgent) -> bool:
        """Wake a sleeper whose time has come, or for whom mail is there, if it is ours."""
        reason = wake_reason(agent, self._core.now()) if agent.leased else None
        return reason is not None and await self.wake(agent, reason)

    def awoke(self, agent: LiveAgent, sleep: SleepState, reason: str) -> None:
        """The end of that sleep is stored."""
        if agent.sleep is sleep:
            agent.sleep = None
        agent.state.metadata["woken_by"] = reason
        agent.changed.set()
        self._core.activity.set()

    async def emit(self, event: str, data: dict[str, Any]) -> int:
        """Record an event and wake those who wait for it, all or none; how many woke."""
        group = self._core.manager.new_group()
        record = {"at": stamp(self._core.now()), "data": data, "event": event}
        group.append(EVENTS[0], EVENTS[1], record)
        async with AsyncExitStack() as saving:
            sleepers = [agent for agent in self._core.agents.values() if _listens(agent, event)]
            for agent in sorted(sleepers, key=lambda agent: agent.agent_id):
                await saving.enter_async_context(agent.lock)
            woken = []
            for agent in sleepers:
                if agent.sleep is not None and _listens(agent, event):
                    stage_wake(group, agent, event)
                    woken.append((agent, agent.sleep))
            await self._core.manager.commit(group)
            for agent, sleep in woken:
                self.awoke(agent, sleep, event)
        return len(woken)


class PostOffice:
    """Delivers by creating one document a message; a known id is delivered already."""

    def __init__(self, core: Core, bedroom: Bedroom) -> None:
        self._core = core
        self._bedroom = bedroom

    async def send(
        self, message: MailMessage, *, answered: MailMessage | None = None
    ) -> MailMessage:
        """Deliver, and mark what it answers, as one group. Twice is once: the first one stays."""
        agent = self._core.agents.get(message.to_agent)
        if agent is None or self._event(agent, message) is None:
            sent = await self._deliver(message, answered, None)
        else:
            # Nobody else saves the sleeper while this message wakes it.
            async with agent.lock:
                sent = await self._deliver(message, answered, agent)
        if agent is not None:
            # It may have fallen asleep while the message was being stored.
            await self._bedroom.wake_if_due(agent)
        return sent

    async def _deliver(
        self, message: MailMessage, answered: MailMessage | None, sleeper: LiveAgent | None
    ) -> MailMessage:
        group = self._core.manager.new_group()
        key = (message.to_agent, message.message_id)
        group.save("mail", key, message, expected=0)
        sleep = sleeper.sleep if sleeper is not None else None
        event = self._event(sleeper, message) if sleeper is not None else None
        if sleeper is not None and event is not None:
            stage_wake(group, sleeper, event)
        if answered is not None:
            answered = rules.replied(answered, message.message_id, self._core.now())
            group.save("mail", (answered.to_agent, answered.message_id), answered)
        try:
            await self._core.manager.commit(group)
        except RevisionConflictError as conflict:
            stored = await self._core.manager.load("mail", key)
            if conflict.kind != "mail" or not isinstance(stored, MailMessage):
                raise
            # Whoever sent it may have been cancelled before it came to the mailbox.
            await self._take_in_stored(message, answered)
            return stored
        except asyncio.CancelledError:
            await self._take_in_stored(message, answered)
            raise
        if answered is not None:
            self.arrived(answered)
        self.arrived(message)
        if sleeper is not None and sleep is not None and event is not None:
            self._bedroom.awoke(sleeper, sleep, event)
        return message

    async def _take_in_stored(self, *messages: MailMessage | None) -> None:
        """Take in what is stored of these messages, unless somebody else does."""
        for message in filter(None, messages):
            agent = self._core.agents.get(message.to_agent)
            before = agent.mail.get(message.message_id) if agent is not None else None
            with contextlib.suppress(AgentStateError):
                key = (message.to_agent, message.message_id)
                stored = await self._core.manager.load("mail", key)
                known = agent.mail.get(message.message_id) if agent is not None else None
                if isinstance(stored, MailMessage) and known is before:
                    self.arrived(stored)

    def _event(self, agent: LiveAgent, message: MailMessage) -> str | None:
        """The event that the message is for a sleeper of ours."""
        if agent.sleep is None or not agent.leased:
            return None
        return sleeping.woken_by_mail(agent.sleep, message)

    def arrived(self, message: MailMessage) -> None:
        """Take a stored message into its agent's mailbox."""
        agent = self._core.agents.get(message.to_agent)
        if agent is not None:
            agent.mail[message.message_id] = message.model_copy(deep=True)
            agent.changed.set()

    def inbox(self, agent_id: str, *, status: str | None = "unread") -> list[MailMessage]:
        """The messages of that status (None: any but archived), oldest first, as copies."""
        agent = self._core.agents.get(agent_id)
        if agent is None:
            raise StateNotFoundError("no such agent", kind="agents", key=agent_id)
        found = (
            message
            for message in agent.mail.values()
            if (message.status == status if status else message.status != "archived")
        )
        return [message.model_copy(deep=True) for message in sorted(found, key=rules.order)]

    async def history(self, agent_id: str) -> list[MailMessage]:
        """Every message the agent ever got, oldest first, cleaned-up ones included."""
        found: dict[str, MailMessage] = {}
        async for entry in self._core.manager.read_log("mail", (agent_id, ARCHIVE)):
            old = MailMessage.model_validate(entry.record)
            found[old.message_id] = old
        async for loaded in self._core.manager.scan("mail", agent_id):
            if isinstance(loaded.state, MailMessage):
                found[loaded.state.message_id] = loaded.state
        return sorted(found.values(), key=rules.order)

    def pending_replies(self, agent_id: str) -> list[MailMessage]:
        """What this agent was asked and has not answered yet, oldest first."""
        return [
            message
            for message in self.inbox(agent_id, status=None)
            if message.expects_reply and message.status != "replied"
        ]

    def find(self, agent_id: str, message_id: str) -> MailMessage:
        """Raises ``StateNotFoundError``."""
        agent = self._core.agents.get(agent_id)
        message = agent.mail.get(message_id) if agent else None
        if message is None:
            raise StateNotFoundError("no such message", kind="mail", key=(agent_id, message_id))
        return message

    async def mark(self, changed: MailMessage) -> MailMessage:
        """Store a message in its new state."""
        key = (changed.to_agent, changed.message_id)
        await self._core.manager.save("mail", key, changed)
        self.arrived(changed)
        return changed.model_copy(deep=True)


def wake_reason(agent: LiveAgent, now: datetime) -> str | None:
    """Why the sleeper should wake now; None when it should not."""
    if agent.sleep is None:
        return None
    if sleeping.is_over(agent.sleep, now):
        return "time"
    for message in agent.unread():
        event = sleeping.woken_by_mail(agent.sleep, message)
        if event is not None:
            return event
    return None


def stage_wake(group: Group, agent: LiveAgent, reason: str) -> None:
    """Add to a group what is stored when the agent wakes."""
    group.delete("sleep", agent.agent_id)
    if agent.leased:
        body = agent.body(status=agent.status(agent.current, awake=True))
        body["metadata"] = {**agent.state.metadata, "woken_by": reason}
        group.save("agents", agent.agent_id, body)


def _listens(agent: LiveAgent, event: str) -> bool:
    return agent.sleep is not None and sleeping.woken_by(agent.sleep, event)


def save_sleep(group: Group, sleep: SleepState) -> None:
    group.save("sleep", sleep.agent_id, sleep)
