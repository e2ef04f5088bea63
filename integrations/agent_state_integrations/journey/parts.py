"""What the groups of methods share: finding a session, and changing it whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar, cast

from agent_state.clock import Clock, IdFactory, instant, later, stamp
from agent_state.codec import Group
from agent_state.errors import (
    Key,
    RevisionConflictError,
    SessionClosedError,
    SessionExpiredError,
    StateNotFoundError,
    StateValidationError,
)
from agent_state.manager import LogEntry, StatePersistenceManager
from agent_state.models import OpenModel
from agent_state.protocols import JsonObject
from agent_state.storage import MemoryStateStore
from agent_state_integrations.journey.evidence import fingerprint
from agent_state_integrations.journey.message_index import MessageIndex
from agent_state_integrations.journey.models import KIND, JourneyState
from agent_state_integrations.journey.vocabulary import Vocabulary

T = TypeVar("T")
DAY = 86400.0
_ATTEMPTS = 32


class ConversationCache(Protocol):
    """A copy of the live sessions somewhere else, which delays and fails nobody."""

    async def open(self, sessions: SessionReader) -> None:
        """Begin to follow; somewhere else being away is no error."""

    async def close(self) -> None:
        """Bring over what waits, for a limited time."""

    def changed(self, user_id: str, session_id: str) -> None:
        """This session is not what it was. Returns at once and raises nothing."""

    async def forget(self, user_id: str, session_id: str) -> None:
        """This session is gone; returns when its copy is too, or after a limited time."""


class SessionReader(Protocol):
    """What a cache reads: the files, which are the truth."""

    @property
    def manager(self) -> StatePersistenceManager: ...
    @property
    def clock(self) -> Clock: ...


@dataclass(slots=True)
class Draft:
    """A change of one session while it is made: its document, and what goes with it."""

    key: Key
    state: JourneyState
    group: Group
    now: datetime
    new_id: IdFactory
    messages: dict[str, int] = field(default_factory=dict)
    """Which of the group's changes stores the message of this id."""
    nothing: bool = False
    """Nothing is to be written after all."""

    @property
    def time(self) -> str:
        return stamp(self.now)

    def append(self, log: str, record: OpenModel | Mapping[str, Any]) -> JsonObject:
        """Add a record to one of the session's logs; the record as it will be stored."""
        body = record.model_dump(warnings=False) if isinstance(record, OpenModel) else dict(record)
        self.group.append(KIND, (*self.key, log), body)
        if log == "messages":
            self.messages[body["message_id"]] = len(self.group.changes) - 1
        return body

    def citation_id(self) -> str:
        return f"if://citation/{self.new_id()}"

    def cite(
        self,
        kind: str,
        citation_id: str,
        record: Mapping[str, Any],
        evidence: Sequence[Mapping[str, Any]] = (),
        *,
        subject: str | None = None,
        content_hash: str | None = None,
    ) -> None:
        """Keep a citation of a record of the log ``subject``, or of the record itself.

        ``content_hash``: where it is a text that is cited.
        """
        body: JsonObject = {
            "citation_id": citation_id,
            "type": kind,
            "timestamp": self.time,
            "content_hash": content_hash or fingerprint(record),
            "status": "verified",
        }
        if subject is not None:
            body["subject"] = subject
        else:
            body["data"] = dict(record)
        if evidence:
            body["evidence"] = [
                {"message_id": message["message_id"], "sha256": fingerprint(message)}
                for message in evidence
            ]
        self.append("citations", body)
        self.state.counters.citations += 1


class JourneyParts:
    """See ``ConversationStateManager``."""

    def __init__(
        self,
        manager: StatePersistenceManager,
        *,
        ttl_days: float = 7,
        vocabulary: Vocabulary | None = None,
        window: int = 100,
        snapshot_every: int = 0,
        assistant_name: str = "Assistant",
        cache: ConversationCache | None = None,
        new_id: IdFactory | None = None,
    ) -> None:
        if not 0 < ttl_days < 10**9:
            raise StateValidationError("ttl_days: a session lives for more than 0 days")
        if window < 1 or snapshot_every < 0:
            raise StateValidationError("window is 1 or more, snapshot_every 0 or more")
        self.manager = manager
        self.clock = manager.clock
        self.vocabulary = vocabulary or Vocabulary()
        self.window = window
        self.cache = cache
        self._ttl_seconds = ttl_days * DAY
        self._snapshot_every = snapshot_every
        self.assistant_name = assistant_name
        self._new_id = new_id or (lambda: str(uuid.uuid4()))
        self._index = MessageIndex()
        self._unrecorded = StatePersistenceManager(
            store=MemoryStateStore(clock=self.clock), clock=self.clock
        )
        self._private: set[Key] = set()
        """Sessions off the record: they are in ``_unrecorded`` alone."""

    def _files(self, key: Key) -> StatePersistenceManager:
        return self._unrecorded if key in self._private else self.manager

    async def _find(self, user_id: str, session_id: str) -> JourneyState:
        """The session's document, even when it has ended. Raises ``StateNotFoundError``."""
        return (await self._read((user_id, session_id)))[0]

    async def _read(self, key: Key) -> tuple[JourneyState, int]:
        loaded = await self._files(key).load_with_revision(KIND, key)
        if loaded is None:
            raise StateNotFoundError("there is no such session", kind=KIND, key=key)
        return cast("JourneyState", loaded.state), loaded.revision

    async def _log(
        self, key: Key, log: str, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogEntry]:
        entries = self._files(key).read_log(KIND, (*key, log), after=after, last=last)
        async with aclosing(cast("Any", entries)):
            async for entry in entries:
                yield entry

    async def _change(
        self,
        user_id: str,
        session_id: str,
        work: Callable[[Draft], Awaitable[T]],
        *,
        check: bool = True,
        renews: bool = True,
    ) -> T:
        """Make a change of one session, as one commit; again from the start if somebody was first.

        ``check``: not if it has ended. ``renews``: its expiry counts from now on.
        Raises ``StateNotFoundError``, ``SessionExpiredError``, ``SessionClosedError``, and what
        ``work`` and the store raise; then nothing has changed.
        """
        key = (user_id, session_id)
        try:
            return await self._attempt(key, work, check, renews)
        except RevisionConflictError:
            pass
        async with self._files(key).lock(KIND, key):
            for _ in range(_ATTEMPTS):
                try:
                    return await self._attempt(key, work, check, renews)
                except RevisionConflictError:
                    continue  # a writer that takes no lock
            return await self._attempt(key, work, check, renews)

    async def _attempt(
        self, key: Key, work: Callable[[Draft], Awaitable[T]], check: bool, renews: bool
    ) -> T:
        files = self._files(key)
        state, revision = await self._read(key)
        now = self.clock.now()
        if check:
            check_alive(state, now)
        draft = Draft(key, state, files.new_group(), now, self._new_id)
        result = await work(draft)
        if draft.nothing:
            return result
        if renews:
            renew(state, now, self._ttl_seconds)
        draft.group.save(KIND, key, state, expected=revision)
        numbers = await files.commit(draft.group)
        for message_id, place in draft.messages.items():
            self._index.note(key, message_id, numbers[place])
        self._tell(key)
        return result

    def _tell(self, key: Key) -> None:
        if self.cache is not None and key not in self._private:
            self.cache.changed(*key)


def check_alive(state: JourneyState, now: datetime) -> None:
    """Raises ``SessionClosedError`` or ``SessionExpiredError``."""
    key = (state.user_id, state.session_id)
    if expired(state, now):
        raise SessionExpiredError(f"the session expired at {state.expires_at}", kind=KIND, key=key)
    if state.status == "closed":
        raise SessionClosedError(f"the session was closed at {state.closed_at}", kind=KIND, key=key)


def expired(state: JourneyState, now: datetime) -> bool:
    return instant(state.expires_at) <= now


def renew(state: JourneyState, now: datetime, seconds: float) -> None:
    """One expiry for the whole session, from now on; a clock that went back shortens nothing."""
    state.last_updated = max(state.last_updated, stamp(now))
    state.expires_at = max(state.expires_at, stamp(later(now, seconds)))
