"""Sleep: when an agent sleeps and what wakes it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import Any, get_args

from agent_state.clock import FIRST, instant, is_number, later, stamp
from agent_state.codec import Group
from agent_state.errors import AgentStateError, LeaseLostError, StateValidationError
from agent_state.models import PRIORITIES, MailMessage, SeenMail, SleepState, WakeEvent
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.state import RuntimeState, owned

WAKE_EVENTS: tuple[str, ...] = get_args(WakeEvent)
EVENTS = ("system", "events")
"""The log of the events that ``emit`` records."""

# -- the rules, as pure functions ------------------------------------------------------------


def fall_asleep(
    agent_id: str,
    *,
    now: datetime,
    seconds: float | None = None,
    until: datetime | None = None,
    wake_on: Sequence[WakeEvent] = (),
    reason: str | None = None,
    seen_mail: SeenMail | None = None,
) -> SleepState:
    """Return a sleep that begins now. Without a time it lasts until an event or ``wake`` ends it.

    ``seen_mail``: the unread mail that does not wake the agent.
    Raises ``StateValidationError`` for an unknown event, a negative time, a time without a
    zone, or both times.
    """
    for event in wake_on:
        if event not in WAKE_EVENTS:
            known = ", ".join(WAKE_EVENTS)
            raise StateValidationError(f"wake event {event!r} is not one of {known}", kind="sleep")
    if seconds is not None and until is not None:
        raise StateValidationError("give seconds or until, not both", kind="sleep")
    if until is not None and (not isinstance(until, datetime) or until.tzinfo is None):
        raise StateValidationError(f"{until!r} is not an instant; give its zone", kind="sleep")
    if seconds is not None and not (is_number(seconds) and seconds >= 0):
        raise StateValidationError(f"{seconds} is not a duration in seconds", kind="sleep")
    sleep = SleepState(
        agent_id=agent_id, is_sleeping=True, sleep_started=stamp(now), wake_events=list(wake_on)
    )
    if seconds is not None:
        sleep.sleep_until = stamp(later(now, seconds))
    elif until is not None:
        sleep.sleep_until = stamp(until)
    if reason is not None:
        sleep.reason = reason
    if seen_mail is not None:
        sleep.seen_mail = seen_mail
    return sleep


def ends_at(sleep: SleepState) -> datetime | None:
    """Return when it ends by itself; None for never. An unreadable time ends it now."""
    if sleep.sleep_until is None:
        return None
    try:
        return instant(sleep.sleep_until)
    except ValueError:
        return FIRST


def woken_by_mail(sleep: SleepState, message: MailMessage) -> WakeEvent | None:
    """Return the wake event that a new message is for the sleeper; None when it sleeps on."""
    if message.status != "unread":
        return None
    if "mail_received" in sleep.wake_events:
        return "mail_received"
    is_high = PRIORITIES.get(message.priority, 1) >= PRIORITIES["high"]
    if "high_priority_mail" in sleep.wake_events and is_high:
        return "high_priority_mail"
    return None


def wake_reason(agent: LiveAgent, now: datetime) -> str | None:
    """Return why the agent should wake now (``time`` or a wake event); None if it should not."""
    if agent.sleep is None:
        return None
    end = ends_at(agent.sleep)
    if end is not None and end <= now:
        return "time"
    for message in agent.mail.new(agent.sleep):
        event = woken_by_mail(agent.sleep, message)
        if event is not None:
            return event
    return None


def add_wake(group: Group, agent: LiveAgent, reason: str) -> None:
    """Add to a group what is stored when the agent wakes."""
    group.delete("sleep", agent.agent_id)
    if agent.leased:
        body = agent.body(status=agent.status(agent.current, awake=True))
        body["metadata"] = {**agent.state.metadata, "woken_by": reason}
        group.save("agents", agent.agent_id, body, append_only=True)


# -- the service -----------------------------------------------------------------------------


class SleepService:
    """Starts and ends the sleep of agents, each in one group with the agent itself."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state

    async def sleep(
        self,
        agent: LiveAgent,
        *,
        seconds: float | None = None,
        until: datetime | None = None,
        wake_on: Sequence[WakeEvent] = (),
        reason: str | None = None,
    ) -> SleepState:
        """Begin to sleep. Mail that is unread now does not wake it; later mail may, at once."""
        sleep = fall_asleep(
            agent.agent_id,
            now=self._state.clock.now(),
            seconds=seconds,
            until=until,
            wake_on=wake_on,
            reason=reason,
            seen_mail=agent.mail.seen(),
        )
        agent.mail.begin_sleep(sleep)
        before, agent.sleep = agent.sleep, sleep
        try:
            await self._state.save(
                agent, add=lambda group: group.save("sleep", agent.agent_id, sleep), outside=True
            )
        except BaseException as error:
            # The change of a cancelled caller may have been made all the same.
            asleep = isinstance(error, asyncio.CancelledError) and await self._is_stored(sleep)
            if agent.sleep is sleep and not asleep:
                agent.sleep = before
            raise
        await self.wake_if_due(agent)  # mail that came while it was stored counts
        agent.changed.set()
        return sleep

    async def _is_stored(self, sleep: SleepState) -> bool:
        try:
            stored = await self._state.manager.load_sleep_state(sleep.agent_id)
        except AgentStateError:
            return False
        return stored is not None and stored.model_dump() == sleep.model_dump()

    async def wake(self, agent: LiveAgent, reason: str, *, if_leased: bool = False) -> bool:
        """End the sleep; return whether the agent slept. ``if_leased``: and runs here."""
        async with agent.lock:
            if agent.sleep is None or (if_leased and not agent.leased):
                return False
            group = self._state.manager.new_group()
            add_wake(group, agent, reason)
            sleep = agent.sleep
            await self._state.commit(group, *owned(agent))
            self.apply_wake(agent, sleep, reason)
        return True

    async def wake_if_due(self, agent: LiveAgent) -> bool:
        """Wake an agent of this runtime whose wake time or awaited mail has arrived."""
        reason = wake_reason(agent, self._state.clock.now()) if agent.leased else None
        return reason is not None and await self.wake(agent, reason, if_leased=True)

    def apply_wake(self, agent: LiveAgent, sleep: SleepState, reason: str) -> None:
        """Change the agent in memory, once the end of that sleep is stored."""
        if agent.sleep is sleep:
            agent.sleep = None
        agent.state.metadata["woken_by"] = reason
        agent.stored_status = None
        agent.changed.set()
        self._state.activity.set()

    async def emit(self, event: str, data: Mapping[str, Any]) -> int:
        """Record an event and wake the agents that wait for it, all or none; return how many."""
        record = {"at": stamp(self._state.clock.now()), "data": dict(data), "event": event}
        while True:
            with suppress(LeaseLostError):  # without the agent that another runtime has taken
                return await self._emit(event, record)

    async def _emit(self, event: str, record: Mapping[str, Any]) -> int:
        group = self._state.manager.new_group()
        group.append(*EVENTS, record)
        async with AsyncExitStack() as locks:
            sleepers = [agent for agent in self._state.agents.values() if _waits_for(agent, event)]
            for agent in sorted(sleepers, key=lambda agent: agent.agent_id):
                await locks.enter_async_context(agent.lock)
            woken = []
            for agent in sleepers:
                if agent.sleep is not None and _waits_for(agent, event):
                    add_wake(group, agent, event)
                    woken.append((agent, agent.sleep))
            await self._state.commit(group, *owned(*(agent for agent, _ in woken)))
            for agent, sleep in woken:
                self.apply_wake(agent, sleep, event)
        return len(woken)


def _waits_for(agent: LiveAgent, event: str) -> bool:
    return agent.sleep is not None and event in agent.sleep.wake_events
