"""The documents of sessions: find one, change one as a single commit, return it to a caller."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

from pydantic import ValidationError

from agent_state.clock import instant, later, stamp
from agent_state.codec import Group, format_validation_error
from agent_state.errors import (
    RevisionConflictError,
    SessionExpiredError,
    SessionNotFoundError,
    StateValidationError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Change
from agent_state.sessions.models import (
    CONVERSATIONS,
    HISTORY,
    LIVES,
    SESSIONS,
    LivenessMarker,
    Session,
    StoredSession,
    is_expired,
)
from agent_state.sessions.names import NameRegistry, is_session_id

T = TypeVar("T")

MAX_TRACKED_RENEWALS = 4096
OPTIMISTIC_ATTEMPTS = 3
"""A change takes a lock after this many conflicts, so that no writer starves."""
MAX_ATTEMPTS = 64


class SessionExtension(Protocol):
    """A package that keeps fields of its own in session documents."""

    def session_fields(self, session: Session) -> Mapping[str, Any]:
        """The fields to add to a session that is returned, computed from its document alone."""


@dataclass(slots=True)
class SessionDraft:
    """A change of one session while it is made: its document, and what is committed with it."""

    session: StoredSession
    """The document; change it in place."""
    group: Group
    """Further changes of the same commit."""
    now: datetime
    """The time of the change."""
    time: str
    """``now`` as it is stored."""
    revision: int
    """The revision of the document before the change."""
    skip_commit: bool = False
    """Set it to commit nothing after all."""
    numbers: list[int] = field(default_factory=list)
    """After the commit: a revision or sequence number for each change of the group."""

    def record_event(self, event: str, **facts: Any) -> None:
        """Append an event to the session's history; facts that are None are left out."""
        given = {name: fact for name, fact in facts.items() if fact is not None}
        record = {"event": event, "at": self.time, **given}
        self.group.append(SESSIONS, (self.session.session_id, HISTORY), record)


@dataclass(frozen=True, slots=True)
class Renewal:
    """A session that was renewed by this process."""

    until: datetime
    """Until then the session neither expires nor needs another renewal."""
    agent_types: frozenset[str]
    """The conversations that have begun."""
    liveness_guard: Change
    """A change that changes nothing, and that fails when the session is destroyed."""


class RenewalCache:
    """The sessions that this process renewed last, so that a message need not renew them again.

    ``interval_seconds``: how long a renewal lasts, at most a hundredth of the session's
    ``ttl_seconds``; with 0 nothing is cached, and every message renews its session.
    """

    def __init__(self, interval_seconds: float) -> None:
        self._interval_seconds = interval_seconds
        self._renewals: OrderedDict[str, Renewal] = OrderedDict()

    def add(self, session: StoredSession, now: datetime, group: Group) -> None:
        """Note that the session was renewed just now. ``group`` is an empty one."""
        if not self._interval_seconds:
            return
        marker = LivenessMarker(session_id=session.session_id)
        group.save(LIVES, session.session_id, marker, expected=1)
        until = later(now, min(self._interval_seconds, session.ttl_seconds / 100))
        until = min(until, instant(session.expires_at))
        self._renewals[session.session_id] = Renewal(
            until, frozenset(session.conversations), group.changes[0]
        )
        if len(self._renewals) > MAX_TRACKED_RENEWALS:
            self._renewals.popitem(last=False)

    def find(self, session_id: str, agent_type: str, now: datetime) -> Renewal | None:
        """The renewal, if a message to this conversation may leave the document as it is."""
        renewal = self._renewals.get(session_id)
        if renewal is None or now >= renewal.until or agent_type not in renewal.agent_types:
            return None
        return renewal

    def discard(self, session_id: str) -> None:
        """Forget the session, which may be destroyed."""
        self._renewals.pop(session_id, None)


class SessionRepository:
    """Finds and changes the documents of sessions for ``SessionManager`` and its parts."""

    def __init__(
        self, manager: StatePersistenceManager, agent_types: NameRegistry, renewals: RenewalCache
    ) -> None:
        self.manager = manager
        self.clock = manager.clock
        self.agent_types = agent_types
        self.renewals = renewals
        self.extensions: list[SessionExtension] = []
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def stored(self, session_id: str) -> tuple[StoredSession, int]:
        """The document in any status, and its revision. Raises ``SessionNotFoundError``."""
        loaded = (
            await self.manager.load_with_revision(SESSIONS, session_id)
            if is_session_id(session_id)
            else None
        )
        if loaded is None:
            raise not_found(session_id)
        return cast("StoredSession", loaded.state), loaded.revision

    async def live(self, session_id: str) -> StoredSession:
        """The document of a session that has not ended.

        Raises ``SessionNotFoundError``, ``SessionExpiredError``.
        """
        session, _ = await self.stored(session_id)
        check_alive(session, self.clock.now())
        return session

    async def public(self, session: StoredSession) -> Session:
        """The session as it is returned: with the counts of its conversations."""
        public = self.without_counts(session)
        for agent_type in session.conversations:
            conversation, last = public.conversations[agent_type], None
            log_key = (session.session_id, agent_type)
            async for entry in self.manager.read_log(CONVERSATIONS, log_key, last=1):
                last = entry
            if last is not None:
                conversation.message_count = last.seq
                conversation.last_message_at = last.record.get("timestamp")
        return public

    def without_counts(self, session: StoredSession) -> Session:
        """The session as it is returned, for one without messages."""
        public = session.public(self.agent_types)
        for extension in self.extensions:
            for name, value in extension.session_fields(public).items():
                setattr(public, name, value)
        return public

    async def change(self, session_id: str, work: Callable[[SessionDraft], Awaitable[T]]) -> T:
        """Change one session as one commit, and renew its expiry; the value that ``work`` returns.

        ``work`` changes the draft; it runs again from the start if another writer committed
        first. Raises ``SessionNotFoundError``, ``SessionExpiredError``, ``StateValidationError``
        for a field that the model refuses, and what ``work`` and the store raise; then nothing
        has changed.
        """

        async def attempt() -> T:
            return await self._attempt(session_id, work)

        async with self.task_lock(session_id):
            try:
                return await retry_on_conflict(attempt, attempts=OPTIMISTIC_ATTEMPTS)
            except RevisionConflictError:
                pass
            # Commits take their locks in the order of names; of all the names that a change of a
            # session may contain, this one is the first. Writers without the lock still conflict.
            async with self.manager.lock(CONVERSATIONS, (session_id,)):
                return await retry_on_conflict(attempt)

    def task_lock(self, session_id: str) -> asyncio.Lock:
        """A lock between this process's changes of a session, which would only conflict."""
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        return lock

    async def _attempt(self, session_id: str, work: Callable[[SessionDraft], Awaitable[T]]) -> T:
        session, revision = await self.stored(session_id)
        now = self.clock.now()
        check_alive(session, now)
        draft = SessionDraft(session, self.manager.new_group(), now, stamp(now), revision)
        try:
            result = await work(draft)
        except ValidationError as error:
            raise StateValidationError(
                format_validation_error(error), kind=SESSIONS, key=session_id
            ) from error
        if draft.skip_commit:
            return result
        _renew(session, now, draft.time)
        draft.group.save(SESSIONS, session_id, session, expected=revision)
        draft.numbers = await self.manager.commit(draft.group)
        self.renewals.add(session, now, self.manager.new_group())
        return result


async def retry_on_conflict(
    attempt: Callable[[], Awaitable[T]], *, attempts: int = MAX_ATTEMPTS
) -> T:
    """The value of ``attempt``, which is called again when another writer committed first.

    Raises ``RevisionConflictError`` when the last attempt conflicts too.
    """
    for _ in range(attempts - 1):
        try:
            return await attempt()
        except RevisionConflictError:
            continue
    return await attempt()


def not_found(session_id: str) -> SessionNotFoundError:
    key = session_id if isinstance(session_id, str) else None
    return SessionNotFoundError("there is no such session", kind=SESSIONS, key=key)


def check_alive(session: StoredSession, now: datetime) -> None:
    """Raise ``SessionNotFoundError`` for a destroyed session, ``SessionExpiredError``."""
    if session.status != "active":
        raise not_found(session.session_id)
    if is_expired(session, now):
        raise SessionExpiredError(
            f"the session expired at {session.expires_at}", kind=SESSIONS, key=session.session_id
        )


def _renew(session: StoredSession, now: datetime, time: str) -> None:
    """Let the expiry count from now on; a clock that went back does not shorten it."""
    session.updated_at = session.last_activity = time
    session.expires_at = max(session.expires_at, stamp(later(now, session.ttl_seconds)))
