"""Sessions of people: created, found, renewed, ended, erased."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from functools import partial
from itertools import starmap
from typing import Any, NoReturn, TypeVar, cast

from agent_state.clock import IdFactory, check_count, check_duration, later, stamp
from agent_state.codec import Group
from agent_state.errors import (
    RevisionConflictError,
    SessionExpiredError,
    SessionNotFoundError,
    StateCorruptedError,
    StateValidationError,
    UnknownAgentTypeError,
    UnknownRoleError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import detached
from agent_state.protocols import Incident
from agent_state.sessions.conversations import Conversations
from agent_state.sessions.models import (
    CONVERSATIONS,
    HISTORY,
    LIVES,
    SESSIONS,
    STATES,
    TOKENS,
    USERS,
    CleanupResult,
    CreatedSession,
    LivenessMarker,
    MergeMode,
    Session,
    SessionEvent,
    SessionHistory,
    SessionState,
    SessionValidity,
    StoredSession,
    TokenEntry,
    UserSessions,
    check_merge_mode,
    deep_merge,
    is_expired,
)
from agent_state.sessions.names import (
    FORMER_CALLS,
    ROLES,
    NameRegistry,
    is_agent_type,
    is_name,
    is_session_id,
)
from agent_state.sessions.pages import check_page_limit
from agent_state.sessions.repository import (
    RenewalCache,
    SessionDraft,
    SessionExtension,
    SessionRepository,
    retry_on_conflict,
)
from agent_state.sessions.states import SessionStates, has_expired
from agent_state.sessions.tokens import RandomBytes, SessionTokens, digest_of
from agent_state.sessions.workflows import Workflows

T = TypeVar("T")

ANONYMOUS = "anonymous"
"""The user id of anonymous visitors: anonymous sessions are independent of one another."""


_DESTROYED_AT_ONCE = 64


class SessionManager:
    """Keeps people's sessions, with their conversations and the status of their workflows.

    ``manager``: an open ``StatePersistenceManager``, whose directory, clock and durability it
    uses; the caller closes it. ``ttl_seconds``: a session expires this long after its last write.
    ``renew_interval_seconds``: 0 lets every message renew its session; with more, messages renew
    it only that often (at most every hundredth of ``ttl_seconds``), which costs much less, and a
    watcher of the session does not hear of the messages between. ``max_sessions_per_user``: one
    session more ends the user's oldest one; None for no limit; anonymous sessions do not count.
    ``agent_types``: the agents that conversations may be with; none registered accepts any.
    ``roles``: roles in addition to the usual four. ``new_id`` makes session and message ids
    (random UUIDs by default; without ``_``), ``random_bytes`` the tokens.

    Each change of a session is one commit, durable when the method returns. Methods that take a
    session id raise ``SessionNotFoundError`` for a session that does not exist or was destroyed,
    ``SessionExpiredError`` for an expired one, and what the store raises.
    """

    tokens: SessionTokens
    """Opens sessions by token, replaces and revokes tokens."""
    conversations: Conversations
    """Adds messages and reads them."""
    workflows: Workflows
    """Follows the status of workflows."""
    states: SessionStates
    """Stores state documents of sessions."""
    agent_types: NameRegistry
    """The registered agent types; ``agent_types.register("poet")`` adds one."""
    roles: NameRegistry
    """The registered roles."""

    def __init__(
        self,
        manager: StatePersistenceManager,
        *,
        ttl_seconds: float = 3600.0,
        max_sessions_per_user: int | None = 5,
        renew_interval_seconds: float = 0.0,
        agent_types: Iterable[str] = (),
        roles: Iterable[str] = (),
        new_id: IdFactory | None = None,
        random_bytes: RandomBytes | None = None,
    ) -> None:
        check_duration("ttl_seconds", ttl_seconds)
        if not 0 < ttl_seconds < 10**12:
            raise StateValidationError("ttl_seconds: a session lives for more than 0 seconds")
        if max_sessions_per_user is not None:
            check_count("max_sessions_per_user", max_sessions_per_user, 1)
        check_duration("renew_interval_seconds", renew_interval_seconds)
        if renew_interval_seconds >= 10**12:
            raise StateValidationError("renew_interval_seconds is too long")
        self.manager = manager
        self.clock = manager.clock
        self.agent_types = NameRegistry(
            "agent type", UnknownAgentTypeError, agent_types, is_valid=is_agent_type
        )
        self.roles = NameRegistry("role", UnknownRoleError, (*ROLES, *roles), is_valid=is_name)
        self._ttl_seconds = ttl_seconds
        self._max_per_user = max_sessions_per_user
        self._new_id = new_id or (lambda: str(uuid.uuid4()))
        self.renew_interval_seconds = renew_interval_seconds
        renewals = RenewalCache(renew_interval_seconds)
        self._repository = SessionRepository(manager, self.agent_types, renewals)
        self.tokens = SessionTokens(self._repository, random_bytes or secrets.token_bytes)
        self.conversations = Conversations(self._repository, self.roles, self._new_id)
        self.workflows = Workflows(self._repository)
        self.states = SessionStates(self._repository)

    def __getattr__(self, name: str) -> NoReturn:
        """Raise ``AttributeError``; for a call of the first design with what to write instead."""
        instead = FORMER_CALLS.get(name)
        more = f"; write sessions.{instead}" if instead else ""
        raise AttributeError(f"a SessionManager has no {name!r}{more}", name=name, obj=self)

    @property
    def incidents(self) -> list[Incident]:
        """The lines of conversations, written by hand, that are not messages; they are left out."""
        return self.conversations.log.incidents

    @property
    def extensions(self) -> tuple[SessionExtension, ...]:
        """The extensions that were added with ``extend``."""
        return tuple(self._repository.extensions)

    def extend(self, extension: SessionExtension) -> None:
        """Add the extension's fields to every session that is returned from now on."""
        self._repository.extensions.append(extension)

    # -- creating ----------------------------------------------------------------------------

    async def create(
        self, user_id: str | None = None, *, context: Mapping[str, Any] | None = None
    ) -> CreatedSession:
        """A new session with its token; anonymous without a user or with ``"anonymous"``.

        A user who has ``max_sessions_per_user`` sessions loses the oldest, which is erased.
        Raises ``StateValidationError``.
        """
        if not isinstance(user_id, str | None):
            raise StateValidationError(f"a user id is text, not {type(user_id).__name__}")
        user = None if user_id in {None, "", ANONYMOUS} else user_id
        token = self.tokens.new_token()
        session = self._new_session(user, context or {}, digest_of(token))
        evicted = await self._commit_new(session, user)
        await _all_of(map(self._erase, evicted))
        return CreatedSession(
            session=self._repository.without_counts(session),
            session_token=token,
            evicted=[each.session_id for each in evicted],
        )

    def _new_session(
        self, user: str | None, context: Mapping[str, Any], digest: str
    ) -> StoredSession:
        session_id = self._new_id()
        if not is_session_id(session_id):
            raise StateValidationError(
                f"the id factory made {session_id!r:.80}; a session id has letters, digits, - and ."
            )
        now = self.clock.now()
        time = stamp(now)
        return StoredSession(
            session_id=session_id,
            user_id=user,
            status="active",
            created_at=time,
            updated_at=time,
            last_activity=time,
            expires_at=stamp(later(now, self._ttl_seconds)),
            ttl_seconds=self._ttl_seconds,
            context=detached(dict(context)),
            token_sha256=digest,
        )

    async def _commit_new(self, session: StoredSession, user: str | None) -> list[StoredSession]:
        """Store a new session; the sessions that it ended, which are still to be erased."""
        session_id = session.session_id

        async def attempt() -> list[StoredSession]:
            group = self.manager.new_group()
            evicted = [] if user is None else await self._enter(group, user, session)
            group.save(SESSIONS, session_id, session, expected=0)
            entry = TokenEntry(session_id=session_id)
            group.save(TOKENS, str(session.token_sha256), entry, expected=0)
            group.save(LIVES, session_id, LivenessMarker(session_id=session_id), expected=0)
            event = {"event": "created", "at": session.created_at}
            group.append(SESSIONS, (session_id, HISTORY), event)
            await self.manager.commit(group)
            return evicted

        async with self._user_lock(user):
            return await retry_on_conflict(attempt)  # an evicted session may be written to

    def _user_lock(self, user: str | None) -> AbstractAsyncContextManager[None]:
        """The lock of a user's index, which is taken before any other lock."""
        return nullcontext() if user is None else self.manager.lock(USERS, user)

    async def _enter(self, group: Group, user: str, new: StoredSession) -> list[StoredSession]:
        """Enter a session in its user's index; the sessions that this ends."""
        index = await self._index(user)
        live: list[tuple[StoredSession, int]] = []
        ended: list[tuple[StoredSession, int]] = []
        for session_id in index.session_ids:
            try:
                session, revision = await self._repository.stored(session_id)
            except (SessionNotFoundError, StateCorruptedError):
                continue  # the store has reported what it quarantined
            if session.status == "active":
                expired = is_expired(session, self.clock.now())
                (ended if expired else live).append((session, revision))
        if self._max_per_user is not None:
            excess = max(0, len(live) - self._max_per_user + 1)
            ended, live = ended + live[:excess], live[excess:]
        for session, revision in ended:
            _end(group, session, revision)
        index.session_ids = [*(each.session_id for each, _ in live), new.session_id]
        group.save(USERS, user, index)
        return [session for session, _ in ended]

    async def _index(self, user: str) -> UserSessions:
        found = cast("UserSessions | None", await self.manager.load(USERS, user))
        return found or UserSessions(user_id=user)

    # -- reading -----------------------------------------------------------------------------

    async def get(self, session_id: str) -> Session:
        """The session as it is now. Reading does not renew it."""
        return await self._repository.public(await self._repository.live(session_id))

    async def validate(self, session_id: str) -> SessionValidity:
        """Whether the session can be used. It raises only what the store raises."""
        try:
            session = await self._repository.live(session_id)
        except SessionNotFoundError:
            return SessionValidity(valid=False, session_id=session_id, reason="not_found")
        except SessionExpiredError:
            return SessionValidity(valid=False, session_id=session_id, reason="expired")
        return SessionValidity(
            valid=True,
            session_id=session_id,
            authenticated=session.user_id is not None,
            expires_at=session.expires_at,
        )

    async def of_user(self, user_id: str) -> list[Session]:
        """The sessions of a user that have not ended, oldest first."""
        found = []
        for session_id in (await self._index(user_id)).session_ids:
            try:
                session = await self._repository.live(session_id)
            except (SessionNotFoundError, SessionExpiredError, StateCorruptedError):
                continue  # the store has reported what it quarantined
            found.append(await self._repository.public(session))
        return found

    async def history(self, session_id: str, *, after: int = 0, limit: int = 100) -> SessionHistory:
        """The events of the session with a higher number than ``after``, oldest first.

        Messages are not events; the history has their counts. ``limit`` is from 1 to 1000.
        Raises ``StateValidationError``.
        """
        check_page_limit(limit)
        session = await self._repository.live(session_id)
        events: list[SessionEvent] = []
        more = False
        async with aclosing(self._events(session_id, max(0, after))) as found:
            async for event in found:
                if more := len(events) == limit:
                    break
                events.append(event)
        return SessionHistory(
            session_id=session_id,
            events=events,
            conversations=(await self._repository.public(session)).conversations,
            next_after=events[-1].seq if more and events else None,
        )

    async def _events(self, session_id: str, after: int) -> AsyncGenerator[SessionEvent, None]:
        log = self.manager.read_log(SESSIONS, (session_id, HISTORY), after=after)
        async with aclosing(log):
            async for entry in log:
                yield SessionEvent.model_validate({**entry.record, "seq": entry.seq})

    # -- changing ----------------------------------------------------------------------------

    async def change(self, session_id: str, work: Callable[[SessionDraft], Awaitable[T]]) -> T:
        """Change a session as one commit, and renew it; the value that ``work`` returns.

        ``work`` changes the draft's document and adds changes to its group. It runs again from
        the start when another writer commits first. When it raises, nothing has changed.
        """
        return await self._repository.change(session_id, work)

    async def update(
        self,
        session_id: str,
        state: Mapping[str, Any] | None = None,
        *,
        context: Mapping[str, Any] | None = None,
        mode: MergeMode = "merge",
    ) -> Session:
        """Change the session's state, its context, or both; the session as it is then.

        ``merge`` deep-merges the given objects into the stored ones, ``replace`` replaces them.
        None changes nothing. Raises ``StateValidationError``.
        """
        check_merge_mode(mode)
        given = {
            name: detached(dict(value))
            for name, value in (("state", state), ("context", context))
            if value is not None
        }

        async def update(draft: SessionDraft) -> StoredSession:
            for name, value in given.items():
                old = getattr(draft.session, name)
                setattr(draft.session, name, deep_merge(old, value) if mode == "merge" else value)
            draft.record_event("updated", fields=list(given), mode=mode)
            return draft.session

        return await self._repository.public(await self.change(session_id, update))

    async def renew(self, session_id: str) -> Session:
        """Renew the session's expiry and change nothing else; the session as it is then."""

        async def renew(draft: SessionDraft) -> StoredSession:
            return draft.session

        return await self._repository.public(await self.change(session_id, renew))

    # -- the end -----------------------------------------------------------------------------

    async def destroy(self, session_id: str) -> bool:
        """End the session and erase everything that is stored of it; whether it existed.

        Its conversations, states, token and history are erased with every earlier version. From
        the first commit on nothing can be written to it. If a crash interrupts the erasing, the
        next ``destroy`` or ``cleanup`` completes it.
        """
        return await self._destroy(session_id) is not None

    async def cleanup(self) -> CleanupResult:
        """Destroy the expired sessions, and complete what a crash left half destroyed.

        It also deletes the state documents that have expired by themselves.
        """
        result, now = CleanupResult(), self.clock.now()
        ended = [
            key[0]
            async for key, state, *_ in self.manager.scan(SESSIONS)
            if isinstance(state, StoredSession)
            and (state.status != "active" or is_expired(state, now))
        ]
        for start in range(0, len(ended), _DESTROYED_AT_ONCE):
            some = ended[start : start + _DESTROYED_AT_ONCE]
            # Together, so that the store erases them in one pass.
            destroyed = await _all_of(self._destroy(each, only_expired=True) for each in some)
            for session_id, alive in zip(some, destroyed, strict=True):
                if alive is not None:
                    (result.expired if alive else result.completed).append(session_id)
        async for key, state, revision, *_ in self.manager.scan(STATES):
            if isinstance(state, SessionState) and has_expired(state, self.clock.now()):
                try:
                    await self.manager.delete(STATES, key, expected=revision)
                except RevisionConflictError:
                    continue  # it was stored again
        return result

    async def _destroy(self, session_id: str, *, only_expired: bool = False) -> bool | None:
        """Whether it was alive until now; None when it does not exist, or lives on."""
        try:
            session, _ = await self._repository.stored(session_id)
        except SessionNotFoundError:
            return None
        user = session.user_id
        async with self._user_lock(user), self._repository.task_lock(session_id):
            ended = await retry_on_conflict(
                partial(self._commit_end, session_id, user, only_expired=only_expired)
            )
            if ended is None:
                return None
            if user is not None and not (await self._index(user)).session_ids:
                await self.manager.erase(USERS, user)
        await self._erase(session)
        return ended

    async def _commit_end(
        self, session_id: str, user: str | None, *, only_expired: bool
    ) -> bool | None:
        try:
            session, revision = await self._repository.stored(session_id)
        except SessionNotFoundError:
            return None
        alive = session.status == "active"
        if alive and only_expired and not is_expired(session, self.clock.now()):
            return None  # it was renewed
        group = self.manager.new_group()
        if alive:
            _end(group, session, revision)
        if user is not None:
            await self._leave(group, user, session_id)
        await self.manager.commit(group)
        return alive

    async def _leave(self, group: Group, user: str, session_id: str) -> None:
        index = await self._index(user)
        if session_id in index.session_ids:
            index.session_ids.remove(session_id)
            group.save(USERS, user, index)

    async def _erase(self, session: StoredSession) -> None:
        """Erase an ended session; its own document last, so that a crash can be completed."""
        session_id = session.session_id
        erased = [(kind, session_id) for kind in (CONVERSATIONS, STATES, LIVES)]
        if session.token_sha256:
            erased.append((TOKENS, session.token_sha256))
        await _all_of(starmap(self.manager.erase, erased))
        await self.manager.erase(SESSIONS, session_id)
        self._repository.renewals.discard(session_id)


async def _all_of(work: Iterable[Awaitable[T]]) -> list[T]:
    """Do all at once; their results. Raises the first error, when all have ended."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[T]", outcomes)


def _end(group: Group, session: StoredSession, revision: int) -> None:
    """Mark it destroyed and empty it; what remains names what is still to be erased."""
    remains = StoredSession(
        session_id=session.session_id,
        user_id=session.user_id,
        status="destroyed",
        created_at=session.created_at,
        updated_at=session.updated_at,
        last_activity=session.last_activity,
        expires_at=session.expires_at,
        ttl_seconds=session.ttl_seconds,
        token_sha256=session.token_sha256,
    )
    group.save(SESSIONS, session.session_id, remains, expected=revision)
    group.delete(LIVES, session.session_id)
    if session.token_sha256:
        group.delete(TOKENS, session.token_sha256)
