"""Reading a conversation page by page, forwards and backwards, filtered, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from pydantic import ValidationError

from agent_state.clock import instant
from agent_state.codec import format_validation_error
from agent_state.errors import StateCorruptedError, StateValidationError
from agent_state.manager import LogEntry
from agent_state.protocols import Incident
from agent_state.sessions.models import CONVERSATIONS, SessionMessage
from agent_state.sessions.parts import SessionParts

_WINDOW = 256


@dataclass(frozen=True, slots=True)
class Filter:
    """Which messages are wanted; None where any will do. ``text`` is casefolded."""

    role: str | None
    workflow_id: str | None
    since: datetime | None
    until: datetime | None
    text: str | None

    def __bool__(self) -> bool:
        wanted = (self.role, self.workflow_id, self.since, self.until, self.text)
        return any(each is not None for each in wanted)

    def passes(self, message: SessionMessage) -> bool:
        about = message.orchestrator_context or {}
        return (
            (self.role is None or message.role == self.role)
            and (self.workflow_id is None or about.get("workflow_id") == self.workflow_id)
            and self._in_time(message)
            and (self.text is None or self.text in _text_of(message.content).casefold())
        )

    def _in_time(self, message: SessionMessage) -> bool:
        if self.since is None and self.until is None:
            return True
        try:
            at = instant(message.timestamp or "")
        except ValueError:
            return False  # written by hand, and at no time
        after = self.since is None or at >= self.since
        return after and (self.until is None or at < self.until)


class PageReading(SessionParts):
    """See ``ConversationMethods``."""

    async def _forwards(
        self,
        place: tuple[str, str],
        after: int,
        before: int | None,
        limit: int,
        chosen: Filter,
    ) -> tuple[list[SessionMessage], bool]:
        found: list[SessionMessage] = []
        messages = self._between(place, max(0, after), before)
        async with aclosing(cast("Any", messages)):
            async for _, message in messages:
                if message is not None and chosen.passes(message):
                    if len(found) == limit:
                        return found, True
                    found.append(message)
        return found, False

    async def _backwards(
        self, place: tuple[str, str], before: int, limit: int, chosen: Filter
    ) -> tuple[list[SessionMessage], bool]:
        """From the end in windows, so that a page costs what it shows, however long the log is."""
        size = _WINDOW if chosen else limit + 1
        found: list[SessionMessage] = []
        while len(found) <= limit and before > 1:
            after = max(0, before - 1 - size)
            messages = self._between(place, after, before)
            window = [
                message
                async for _, message in messages
                if message is not None and chosen.passes(message)
            ]
            found = window + found
            before, size = after + 1, max(size, min(2 * size, 4096))
        return found[-limit:], len(found) > limit

    async def _last_seq(self, place: tuple[str, str]) -> int:
        entries = self.manager.read_log(CONVERSATIONS, place, last=1)
        return max([entry.seq async for entry in entries], default=0)

    async def _between(
        self, place: tuple[str, str], after: int, before: int | None
    ) -> AsyncIterator[tuple[int, SessionMessage | None]]:
        entries = self.manager.read_log(CONVERSATIONS, place, after=after)
        async with aclosing(cast("Any", entries)):
            async for entry in entries:
                if before is not None and entry.seq >= before:
                    return
                yield entry.seq, self._message(place, entry)

    def _message(self, place: tuple[str, str], entry: LogEntry) -> SessionMessage | None:
        """The message in a line; None for a line that is none, which ``incidents`` tells."""
        try:
            return SessionMessage.model_validate({**entry.record, "seq": entry.seq})
        except ValidationError as error:
            what = f"line {entry.seq} is no message: {format_validation_error(error)}"
            incident = Incident(what, CONVERSATIONS, place)
            if incident not in self.incidents:
                self.incidents.append(incident)
            return None

    async def _stored_message(self, place: tuple[str, str], seq: int) -> SessionMessage:
        async for number, message in self._between(place, seq - 1, seq + 1):
            if number == seq and message is not None:
                return message
        raise StateCorruptedError(f"message {seq} cannot be read", kind=CONVERSATIONS, key=place)


def moment(given: datetime | str | None, name: str) -> datetime | None:
    """Raises ``StateValidationError`` for what is no time. Without a zone it is read as UTC."""
    if given is None:
        return None
    try:
        return instant(given if isinstance(given, str) else given.isoformat())
    except (ValueError, OverflowError) as error:
        raise StateValidationError(f"{name} is no time: {given!r:.80}") from error


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
