"""The states of a message, as pure functions: unread, read, replied, archived."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from agent_state.clock import stamp
from agent_state.errors import StateValidationError
from agent_state.models import PRIORITIES, MailMessage, detached

HIGH = PRIORITIES["high"]


def new_message(
    message_id: str,
    from_agent: str,
    to_agent: str,
    *,
    subject: str,
    body: Any,
    now: datetime,
    priority: str = "normal",
    reply_to: str | None = None,
    expects_reply: bool = False,
    metadata: dict[str, Any] | None = None,
) -> MailMessage:
    """An unread message. Raises ``StateValidationError`` for a priority that is no word of ours."""
    if priority not in PRIORITIES:
        known = ", ".join(PRIORITIES)
        raise StateValidationError(f"priority {priority!r} is none of {known}", kind="mail")
    message = MailMessage(
        message_id=message_id,
        from_agent=from_agent,
        to_agent=to_agent,
        subject=subject,
        body=detached(body),
        priority=priority,
        status="unread",
        timestamp=stamp(now),
    )
    if reply_to is not None:
        message.reply_to = reply_to
    if expects_reply:
        message.expects_reply = True
    if metadata:
        message.metadata = detached(dict(metadata))
    return message


def read(message: MailMessage, now: datetime) -> MailMessage:
    """Seen by its agent; what is past unread stays as it is."""
    if message.status != "unread":
        return message
    return message.model_copy(update={"status": "read", "read_at": stamp(now)})


def replied(message: MailMessage, reply_id: str, now: datetime) -> MailMessage:
    """Answered by the message with that id."""
    changed = read(message, now)
    return changed.model_copy(update={"status": "replied", "replied_with": reply_id})


def archive(message: MailMessage, now: datetime) -> MailMessage:
    """Out of the inbox; still in the history."""
    return read(message, now).model_copy(update={"status": "archived"})


def is_high(message: MailMessage) -> bool:
    """Whether it counts as high-priority mail; urgent does too."""
    return PRIORITIES.get(message.priority, 1) >= HIGH


def order(message: MailMessage) -> tuple[str, str]:
    """Sorts the oldest first."""
    return (message.timestamp or "", message.message_id)
