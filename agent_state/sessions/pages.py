"""The log of a conversation, read page by page in bounded memory."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from agent_state.clock import check_count, instant
from agent_state.codec import format_validation_error
from agent_state.errors import StateCorruptedError, StateValidationError
from agent_state.manager import LogEntry, StatePersistenceManager
from agent_state.protocols import Incident
from agent_state.sessions.models import CONVERSATIONS, STORED_DEDUPE_KEY, SessionMessage

MAX_PAGE = 1000
"""The most messages or events of one page."""
_FIRST_WINDOW, _MAX_WINDOW = 256, 4096

LogKey = tuple[str, str]
"""Session id and agent type."""


@dataclass(frozen=True, slots=True)
class MessageFilter:
    """The messages that are wanted; None where any will do."""

    role: str | None = None
    """Messages of this role."""
    workflow_id: str | None = None
    """Messages about this workflow."""
    since: datetime | None = None
    """Messages from this time on."""
    until: datetime | None = None
    """Messages before this time."""
    text: str | None = None
    """Messages whose content contains this casefolded text, in any case."""

    def __bool__(self) -> bool:
        wanted = (self.role, self.workflow_id, self.since, self.until, self.text)
        return any(each is not None for each in wanted)

    def matches(self, message: SessionMessage) -> bool:
        about = message.orchestrator_context or {}
        return (
            (self.role is None or message.role == self.role)
            and (self.workflow_id is None or about.get("workflow_id") == self.workflow_id)
            and self._matches_time(message)
            and (self.text is None or self.text in _text_of(message.content).casefold())
        )

    def _matches_time(self, message: SessionMessage) -> bool:
        if self.since is None and self.until is None:
            return True
        try:
            at = instant(message.timestamp or "")
        except ValueError:
            return False  # written by hand, without a time
        after = self.since is None or at >= self.since
        return after and (self.until is None or at < self.until)


class ConversationLog:
    """Reads the logs of conversations.

    ``incidents``: lines that are not messages are left out and reported here, each once.
    """

    def __init__(self, manager: StatePersistenceManager) -> None:
        self._manager = manager
        self.incidents: list[Incident] = []

    async def last_seq(self, key: LogKey) -> int:
        """The number of the last message; 0 in an empty log."""
        entries = self._manager.read_log(CONVERSATIONS, key, last=1)
        return max([entry.seq async for entry in entries], default=0)

    async def message(self, key: LogKey, seq: int) -> SessionMessage:
        """The message with this number. Raises ``StateCorruptedError`` when it is unreadable."""
        async with aclosing(self._between(key, seq - 1, seq + 1)) as messages:
            async for message in messages:
                return message
        raise StateCorruptedError(f"message {seq} cannot be read", kind=CONVERSATIONS, key=key)

    async def forwards(
        self, key: LogKey, after: int, before: int | None, limit: int, wanted: MessageFilter
    ) -> tuple[list[SessionMessage], bool]:
        """The first ``limit`` messages between the two numbers, and whether there are more."""
        found: list[SessionMessage] = []
        async with aclosing(self._between(key, max(0, after), before)) as messages:
            async for message in messages:
                if wanted.matches(message):
                    if len(found) == limit:
                        return found, True
                    found.append(message)
        return found, False

    async def backwards(
        self, key: LogKey, before: int, limit: int, wanted: MessageFilter
    ) -> tuple[list[SessionMessage], bool]:
        """The last ``limit`` messages before the number, and whether there are earlier ones.

        It reads windows from the end, so that a page costs the same however long the log is.
        """
        size = _FIRST_WINDOW if wanted else limit + 1
        found: list[SessionMessage] = []
        while len(found) <= limit and before > 1:
            after = max(0, before - 1 - size)
            messages = self._between(key, after, before)
            found = [message async for message in messages if wanted.matches(message)] + found
            before, size = after + 1, max(size, min(2 * size, _MAX_WINDOW))
        return found[-limit:], len(found) > limit

    async def _between(
        self, key: LogKey, after: int, before: int | None
    ) -> AsyncGenerator[SessionMessage, None]:
        entries = self._manager.read_log(CONVERSATIONS, key, after=after)
        async with aclosing(entries):
            async for entry in entries:
                if before is not None and entry.seq >= before:
                    return
                message = self._parse(key, entry)
                if message is not None:
                    yield message

    def _parse(self, key: LogKey, entry: LogEntry) -> SessionMessage | None:
        """The message of a line; None for a line that is not a message, which is reported."""
        fields = {**entry.record, "seq": entry.seq}
        if STORED_DEDUPE_KEY in fields:
            fields["dedupe_key"] = fields.pop(STORED_DEDUPE_KEY)
        try:
            return SessionMessage.model_validate(fields)
        except ValidationError as error:
            what = f"line {entry.seq} is not a message: {format_validation_error(error)}"
            incident = Incident(what, CONVERSATIONS, key)
            if incident not in self.incidents:
                self.incidents.append(incident)
            return None


def check_page_limit(limit: int) -> None:
    """Raise ``StateValidationError`` for a limit that is not from 1 to ``MAX_PAGE``."""
    check_count("limit", limit, 1)
    if limit > MAX_PAGE:
        raise StateValidationError(f"limit is from 1 to {MAX_PAGE}, not {limit}")


def parse_time(given: datetime | str | None, name: str) -> datetime | None:
    """The argument ``name`` as a time; a text without a zone is read as UTC.

    Raises ``StateValidationError``.
    """
    if given is None:
        return None
    try:
        return instant(given if isinstance(given, str) else given.isoformat())
    except ValueError as error:
        raise StateValidationError(f"{name} is not a time: {given!r:.80}") from error


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
