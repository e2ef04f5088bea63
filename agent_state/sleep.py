"""When an agent sleeps and what wakes it, as pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import get_args

from agent_state.clock import instant, later, stamp
from agent_state.errors import StateValidationError
from agent_state.mail import is_high
from agent_state.models import MailMessage, SleepState, WakeEvent

WAKE_EVENTS: tuple[str, ...] = get_args(WakeEvent)


def fall_asleep(
    agent_id: str,
    *,
    now: datetime,
    seconds: float | None = None,
    until: datetime | None = None,
    wake_on: Sequence[str] = (),
    reason: str | None = None,
    mail_seen: Iterable[str] = (),
) -> SleepState:
    """The sleep that begins now. Without a time it lasts until an event, or a person, ends it.

    Raises ``StateValidationError`` for an event that is none, a negative time, a time without
    a zone, or both times.
    """
    for event in wake_on:
        if event not in WAKE_EVENTS:
            known = ", ".join(WAKE_EVENTS)
            raise StateValidationError(f"wake event {event!r} is none of {known}", kind="sleep")
    if seconds is not None and until is not None:
        raise StateValidationError("give seconds or until, not both", kind="sleep")
    if until is not None and (not isinstance(until, datetime) or until.tzinfo is None):
        raise StateValidationError(f"{until!r} names no instant; give its zone", kind="sleep")
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds >= 0):
        raise StateValidationError(f"{seconds} is no time to sleep", kind="sleep")
    sleep = SleepState(
        agent_id=agent_id, is_sleeping=True, sleep_started=stamp(now), wake_events=list(wake_on)
    )
    if seconds is not None:
        sleep.sleep_until = stamp(later(now, seconds))
    elif until is not None:
        sleep.sleep_until = stamp(until)
    if reason is not None:
        sleep.reason = reason
    seen = sorted(mail_seen)
    if seen:
        sleep.mail_seen = seen
    return sleep


def ends_at(sleep: SleepState) -> datetime | None:
    """When it ends by itself; None for never. An unreadable time ends it now, not never."""
    if sleep.sleep_until is None:
        return None
    try:
        return instant(sleep.sleep_until)
    except ValueError:
        return instant("0001-01-01T00:00:00+00:00")


def is_over(sleep: SleepState, now: datetime) -> bool:
    """Whether its time has come."""
    end = ends_at(sleep)
    return end is not None and end <= now


def woken_by_mail(sleep: SleepState, message: MailMessage) -> str | None:
    """The wake event that this message is for the sleeper; None when it sleeps on."""
    if message.message_id in sleep.mail_seen or message.status != "unread":
        return None
    if "mail_received" in sleep.wake_events:
        return "mail_received"
    if "high_priority_mail" in sleep.wake_events and is_high(message):
        return "high_priority_mail"
    return None


def woken_by(sleep: SleepState, event: str) -> bool:
    """Whether the sleeper asked to be woken by this event."""
    return event in sleep.wake_events
