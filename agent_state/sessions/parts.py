"""What the groups of methods share: finding a session, and changing it whole or not at all."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any, cast
from weakref import WeakValueDictionary

from pydantic import ValidationError

from agent_state.clock import IdFactory, instant, later, stamp
from agent_state.codec import format_validation_error
from agent_state.errors import (
    RevisionConflictError,
    SessionExpiredError,
    StateValidationError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Incident
from agent_state.sessions.errors import (
    SessionNotFoundError,
    UnknownAgentTypeError,
    UnknownRoleError,
)
from agent_state.sessions.models import (
    AGENT_TYPES,
    CONVERSATIONS,
    ORCHESTRATORS,
    ROLES,
    SESSIONS,
    Session,
    StoredSession,
    is_agent_type,
    is_session_id,
)
from agent_state.sessions.saving import Draft, FreshSessions

ANONYMOUS = "anonymous"
"""No user: the sessions of those we do not know have nothing to do with one another."""
_OPTIMISTIC, _ATTEMPTS = 3, 64

RandomBytes = Callable[[int], bytes]


Work = Callable[[Draft], Awaitable[None] | None]


class SessionParts:
    """See ``SessionManager``."""

    def __init__(
        self,
        manager: StatePersistenceManager,
        *,
        ttl_seconds: float = 3600.0,
        max_sessions_per_user: int | None = 5,
        renew_every: float = 0.0,
        agent_types: Iterable[str] = (),
        roles: Iterable[str] = (),
        orchestrators: Iterable[str] = ORCHESTRATORS,
        new_id: IdFactory | None = None,
        random_bytes: RandomBytes | None = None,
    ) -> None:
        if not 0 < ttl_seconds < 10**12:
            raise StateValidationError("ttl_seconds: a session lives for more than 0 seconds")
        if max_sessions_per_user is not None and max_sessions_per_user < 1:
            raise StateValidationError("max_sessions_per_user is 1 or more, or None for no limit")
        if not 0 <= renew_every < 10**12:
            raise StateValidationError("renew_every is 0 seconds or more")
        self.manager = manager
        self.clock = manager.clock
        self.orchestrators = tuple(orchestrators)
        self.agent_types: tuple[str, ...] = AGENT_TYPES
        self.roles = frozenset((*ROLES, *roles))
        for agent_type in agent_types:
            self.register_agent_type(agent_type)
        self._ttl_seconds = ttl_seconds
        self._most = max_sessions_per_user
        self._new_id = new_id or (lambda: str(uuid.uuid4()))
        self._random_bytes = random_bytes or secrets.token_bytes
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._fresh = FreshSessions(renew_every)
        self.incidents: list[Incident] = []
        """Lines of conversations, written by hand, that are no messages; they are left out."""

    def register_agent_type(self, agent_type: str) -> None:
        """Let sessions have a conversation of this type. Twice is a no-op.

        Raises ``UnknownAgentTypeError`` for a name that is not lower-case letters, digits and
        ``_``, at most 64.
        """
        if not is_agent_type(agent_type):
            raise UnknownAgentTypeError(f"{agent_type!r:.80} cannot name a type of conversation")
        if agent_type not in self.agent_types:
            self.agent_types = (*self.agent_types, agent_type)

    def _check_agent_type(self, agent_type: str) -> None:
        if agent_type not in self.agent_types:
            known = ", ".join(self.agent_types)
            raise UnknownAgentTypeError(
                f"{agent_type!r:.80} is no type of conversation here; these are: {known}"
            )

    def _check_role(self, role: str) -> None:
        if role not in self.roles:
            known = ", ".join(sorted(self.roles))
            raise UnknownRoleError(f"{role!r:.80} is no role; these are: {known}")

    async def _stored(self, session_id: str) -> tuple[StoredSession, int]:
        """The document, whatever its status, and its revision. Raises ``SessionNotFoundError``."""
        loaded = (
            await self.manager.load_with_revision(SESSIONS, session_id)
            if is_session_id(session_id)
            else None
        )
        if loaded is None:
            raise not_found(session_id)
        return cast("StoredSession", loaded.state), loaded.revision

    async def _live(self, session_id: str) -> tuple[StoredSession, int]:
        """Raises ``SessionNotFoundError`` and ``SessionExpiredError``."""
        session, revision = await self._stored(session_id)
        check_alive(session, self.clock.now())
        return session, revision

    async def _change(self, session_id: str, work: Work) -> Draft:
        """Make a change of one session, as one commit; again from the start if somebody was first.

        Each change renews the session's expiry. Raises ``SessionNotFoundError``,
        ``SessionExpiredError``, and what ``work`` and the store raise; then nothing has changed.
        """
        async with self._lock_here(session_id):
            for _ in range(_OPTIMISTIC):
                try:
                    return await self._attempt(session_id, work)
                except RevisionConflictError:
                    continue
            # Locks are taken in the order of their names, by every commit too; of all that a change
            # of a session may touch this is the first.
            async with self.manager.lock(CONVERSATIONS, (session_id,)):
                for _ in range(_ATTEMPTS):
                    try:
                        return await self._attempt(session_id, work)
                    except RevisionConflictError:
                        continue  # a writer that takes no lock
                return await self._attempt(session_id, work)

    def _lock_here(self, session_id: str) -> asyncio.Lock:
        """Between tasks: those who would only conflict, and try again, take turns."""
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        return lock

    async def _attempt(self, session_id: str, work: Work) -> Draft:
        session, revision = await self._stored(session_id)
        now = self.clock.now()
        check_alive(session, now)
        draft = Draft(session, revision, self.manager.new_group(), now, stamp(now))
        try:
            waiting = work(draft)
            if waiting is not None:
                await waiting
        except ValidationError as error:
            raise StateValidationError(
                format_validation_error(error), kind=SESSIONS, key=session_id
            ) from error
        if draft.nothing:
            return draft
        renew(session, now, draft.time)
        draft.group.save(SESSIONS, session_id, session, expected=revision)
        draft.numbers = await self.manager.commit(draft.group)
        self._fresh.renewed(session, now, self.manager.new_group())
        return draft

    async def _public(self, session: StoredSession) -> Session:
        """The session as it is given away, with how much was said."""
        public = session.public(self.agent_types)
        for agent_type in session.conversations:
            conversation, last = public.conversations[agent_type], None
            place = (session.session_id, agent_type)
            async for entry in self.manager.read_log(CONVERSATIONS, place, last=1):
                last = entry
            if last is not None:
                conversation.message_count = last.seq
                conversation.last_message_at = last.record.get("timestamp")
        return public


def not_found(session_id: str) -> SessionNotFoundError:
    key = session_id if isinstance(session_id, str) else None
    return SessionNotFoundError("there is no such session", kind=SESSIONS, key=key)


def is_expired(session: StoredSession, now: datetime) -> bool:
    return instant(session.expires_at) <= now


def check_alive(session: StoredSession, now: datetime) -> None:
    """Raises ``SessionNotFoundError`` for a destroyed one, ``SessionExpiredError``."""
    if session.status != "active":
        raise not_found(session.session_id)
    if is_expired(session, now):
        raise SessionExpiredError(
            f"the session expired at {session.expires_at}", kind=SESSIONS, key=session.session_id
        )


def renew(session: StoredSession, now: datetime, time: str) -> None:
    """It lives on from now; a clock that went back shortens nothing."""
    session.updated_at = session.last_activity = time
    session.expires_at = max(session.expires_at, stamp(later(now, session.ttl_seconds)))


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both, and where both have an object, both of those; else the new value counts."""
    result = dict(old)
    for name, value in new.items():
        before = result.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            result[name] = merged(before, value)
        else:
            result[name] = value
    return result
