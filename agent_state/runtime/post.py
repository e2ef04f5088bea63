"""Mail between agents, and what wakes a sleeper."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from agent_state import mail as rules
from agent_state import sleep as sleeping
from agent_state.cleanup import ARCHIVE
from agent_state.clock import stamp
from agent_state.errors import RevisionConflictError, StateNotFoundError
from agent_state.manager import Group
from agent_state.models import Message, SleepState
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
        except BaseException:
            agent.sleep = before
            raise
        await self.fell_asleep(agent, sleep)
        agent.changed.set()
        return sleep

    async def fell_asleep(self, agent: LiveAgent, sleep: SleepState) -> None:
        """The sleep is stored; what came while it was being stored counts."""
        if agent.sleep is not sleep:  # mail or a person has ended it already
            await self._core.save(agent, stage=lambda group: group.delete("sleep", agent.agent_id))
        await self.wake_if_due(agent)

    async def wake(self, agent: LiveAgent, reason: str) -> bool:
        """End the sleep; whether there was one."""
        if agent.sleep is None:
            return False
        sleep, agent.sleep = agent.sleep, None
        try:
            await self._core.save(agent, stage=lambda group: group.delete("sleep", agent.agent_id))
        except BaseException:
            agent.sleep = sleep
            raise
        self.awoke(agent, reason)
        return True

    async def wake_if_due(self, agent: LiveAgent) -> bool:
        """Wake a sleeper whose time has come, or for whom mail is there."""
        reason = wake_reason(agent, self._core.now())
        return reason is not None and await self.wake(agent, reason)

    def awoke(self, agent: LiveAgent, reason: str) -> None:
        agent.sleep = None
        agent.state.metadata["woken_by"] = reason
        agent.changed.set()
        self._core.activity.set()

    async def emit(self, event: str, data: dict[str, Any]) -> int:
        """Record an event and wake those who wait for it, all or none; how many woke."""
        listeners = [
            agent
            for agent in self._core.agents.values()
            if agent.sleep is not None and sleeping.woken_by(agent.sleep, event)
        ]
        group = self._core.manager.new_group()
        record = {"at": stamp(self._core.now()), "data": data, "event": event}
        group.append(EVENTS[0], EVENTS[1], record)
        for agent in listeners:
            stage_wake(group, agent)
        await self._core.manager.commit(group)
        for agent in listeners:
            self.awoke(agent, event)
        return len(listeners)


class PostOffice:
    """Delivers by creating one document a message; a known id is delivered already."""

    def __init__(self, core: Core, bedroom: Bedroom) -> None:
        self._core = core
        self._bedroom = bedroom

    async def send(self, message: Message, *, answered: Message | None = None) -> Message:
        """Deliver, and mark what it answers, as one group. Twice is once: the first one stays."""
        agent = self._core.agents.get(message.to_agent)
        group = self._core.manager.new_group()
        key = (message.to_agent, message.message_id)
        group.save("mail", key, message, expected=0)
        event = None
        if agent is not None and agent.sleep is not None:
            event = sleeping.woken_by_mail(agent.sleep, message)
            if event is not None:
                stage_wake(group, agent)
        if answered is not None:
            answered = rules.replied(answered, message.message_id, self._core.now())
            group.save("mail", (answered.to_agent, answered.message_id), answered)
        try:
            await self._core.manager.commit(group)
        except RevisionConflictError as conflict:
            stored = await self._core.manager.load("mail", key)
            if conflict.kind != "mail" or not isinstance(stored, Message):
                raise
            return stored
        if answered is not None:
            self.arrived(answered)
        self.arrived(message)
        if agent is not None and event is not None:
            self._bedroom.awoke(agent, event)
        elif agent is not None:
            # It may have fallen asleep while the message was being stored.
            await self._bedroom.wake_if_due(agent)
        return message

    def arrived(self, message: Message) -> None:
        """Take a stored message into its agent's mailbox."""
        agent = self._core.agents.get(message.to_agent)
        if agent is not None:
            agent.mail[message.message_id] = message
            agent.changed.set()

    def inbox(self, agent_id: str, *, status: str | None = "unread") -> list[Message]:
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

    async def history(self, agent_id: str) -> list[Message]:
        """Every message the agent ever got, oldest first, cleaned-up ones included."""
        found: dict[str, Message] = {}
        async for entry in self._core.manager.read_log("mail", (agent_id, ARCHIVE)):
            old = Message.model_validate(entry.record)
            found[old.message_id] = old
        async for loaded in self._core.manager.scan("mail", agent_id):
            if isinstance(loaded.state, Message):
                found[loaded.state.message_id] = loaded.state
        return sorted(found.values(), key=rules.order)

    def pending_replies(self, agent_id: str) -> list[Message]:
        """What this agent was asked and has not answered yet, oldest first."""
        return [
            message
            for message in self.inbox(agent_id, status=None)
            if message.expects_reply and message.status != "replied"
        ]

    def find(self, agent_id: str, message_id: str) -> Message:
        """Raises ``StateNotFoundError``."""
        agent = self._core.agents.get(agent_id)
        message = agent.mail.get(message_id) if agent else None
        if message is None:
            raise StateNotFoundError("no such message", kind="mail", key=(agent_id, message_id))
        return message

    async def mark(self, changed: Message) -> Message:
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


def stage_wake(group: Group, agent: LiveAgent) -> None:
    """Add to a group what is stored when the agent wakes."""
    status = "active" if agent.current is not None else "idle" if agent.has_handler else "waiting"
    group.delete("sleep", agent.agent_id)
    group.save("agents", agent.agent_id, agent.body(status=status))


def save_sleep(group: Group, sleep: SleepState) -> None:
    group.save("sleep", sleep.agent_id, sleep)
