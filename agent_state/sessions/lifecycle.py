"""The life of a session: created, read, updated, destroyed, cleaned up when its time is over."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, cast

from agent_state.clock import instant, later, stamp
from agent_state.codec import Group
from agent_state.errors import (
    RevisionConflictError,
    SessionExpiredError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.models import detached
from agent_state.sessions.errors import SessionNotFoundError
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
    Mode,
    OrchestratorContext,
    Session,
    SessionEvent,
    SessionHistory,
    SessionLife,
    SessionState,
    SessionValidity,
    StoredSession,
    TokenEntry,
    UserSessions,
    is_session_id,
)
from agent_state.sessions.parts import (
    ANONYMOUS,
    is_expired,
    merged,
)
from agent_state.sessions.saving import Draft
from agent_state.sessions.tokens import TokenMethods, digest_of

LONGEST_PAGE = 1000
_ATTEMPTS = 64


class LifecycleMethods(TokenMethods):
    """What a session manager does with sessions as a whole."""

    async def create_session(
        self, user_id: str | None = None, *, context: Mapping[str, Any] | None = None
    ) -> CreatedSession:
        """A new session with its token. Without a user, or with ``"anonymous"``, for nobody known.

        A known user who has as many sessions as there may be loses the oldest, for ever.
        """
        if not isinstance(user_id, str | None):
            raise StateValidationError(f"a user id is text, not {type(user_id).__name__}")
        user = None if user_id in (None, "", ANONYMOUS) else user_id
        token = self._new_token()
        session = self._new_session(user, context or {}, digest_of(token))
        evicted: list[StoredSession] = []
        async with self._user_lock(user):
            for attempt in range(_ATTEMPTS):
                group = self.manager.new_group()
                evicted = [] if user is None else await self._enter(group, user, session)
                group.save(SESSIONS, session.session_id, session, expected=0)
                entry = TokenEntry(session_id=session.session_id)
                group.save(TOKENS, str(session.token_sha256), entry, expected=0)
                life = SessionLife(session_id=session.session_id)
                group.save(LIVES, session.session_id, life, expected=0)
                event = {"event": "created", "at": session.created_at}
                group.append(SESSIONS, (session.session_id, HISTORY), event)
                try:
                    await self.manager.commit(group)
                    break
                except RevisionConflictError:  # a session to be evicted was written to
                    if not evicted or attempt == _ATTEMPTS - 1:
                        raise
        for each in evicted:
            await self._erase(each)
        return CreatedSession(
            session=session.public(self.agent_types),
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

    def _user_lock(self, user: str | None) -> AbstractAsyncContextManager[None]:
        """Whoever changes which sessions a user has takes this first, before any other lock."""
        return nullcontext() if user is None else self.manager.lock(USERS, (user,))

    async def _enter(self, group: Group, user: str, new: StoredSession) -> list[StoredSession]:
        """Enter a session in its user's index, and end those that give way to it."""
        index = await self._index(user)
        live: list[tuple[StoredSession, int]] = []
        ended: list[tuple[StoredSession, int]] = []
        for session_id in index.session_ids:
            try:
                session, revision = await self._stored(session_id)
            except (SessionNotFoundError, StateCorruptedError):
                continue  # the store has told of what it put aside
            if session.status != "active":
                continue
            old = is_expired(session, self.clock.now())
            (ended if old else live).append((session, revision))
        if self._most is not None:
            room = max(0, len(live) - self._most + 1)
            ended, live = ended + live[:room], live[room:]
        for session, revision in ended:
            _end(group, session, revision)
        index.session_ids = [*(each.session_id for each, _ in live), new.session_id]
        group.save(USERS, user, index)
        return [session for session, _ in ended]

    async def _index(self, user: str) -> UserSessions:
        found = cast("UserSessions | None", await self.manager.load(USERS, user))
        return found or UserSessions(user_id=user)

    async def get_session(self, session_id: str) -> Session:
        """The session as it is now. Reading does not renew its expiry."""
        session, _ = await self._live(session_id)
        return await self._public(session)

    async def update_session(
        self,
        session_id: str,
        state: Mapping[str, Any] | None = None,
        *,
        context: Mapping[str, Any] | None = None,
        mode: Mode = "merge",
    ) -> Session:
        """Change the session's general state, its context, or both; as it is then.

        ``merge`` goes into nested objects and replaces anything else; ``replace`` puts what is
        given in the place of all that was there.
        """

        def changed(old: dict[str, Any], new: Mapping[str, Any] | None) -> dict[str, Any]:
            if new is None:
                return old
            given = detached(dict(new))
            return merged(old, given) if mode == "merge" else given

        def work(draft: Draft) -> None:
            session = draft.session
            session.state = changed(session.state, state)
            session.context = changed(session.context, context)
            fields = [
                name for name, new in (("state", state), ("context", context)) if new is not None
            ]
            draft.tell("updated", fields=fields, mode=mode)

        check_mode(mode)
        return await self._public((await self._change(session_id, work)).session)

    async def touch_session(self, session_id: str) -> Session:
        """Renew the session's expiry and change nothing else."""
        return await self._public((await self._change(session_id, lambda _: None)).session)

    async def validate_session(self, session_id: str) -> SessionValidity:
        """Whether the session can be used. Raises nothing of the session's, only the store's."""
        try:
            session, _ = await self._live(session_id)
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

    async def list_user_sessions(self, user_id: str) -> list[Session]:
        """The sessions of a known user that have not ended, oldest first."""
        found = []
        for session_id in (await self._index(user_id)).session_ids:
            try:
                session, _ = await self._live(session_id)
            except (SessionNotFoundError, SessionExpiredError, StateCorruptedError):
                continue  # the store has told of what it put aside
            found.append(await self._public(session))
        return found

    async def get_session_history(
        self, session_id: str, *, after: int = 0, limit: int = 100
    ) -> SessionHistory:
        """What happened to the session, after that number: not what was said, only how much.

        ``limit`` is from 1 to 1000.
        """
        check_limit(limit)
        session, _ = await self._live(session_id)
        events: list[SessionEvent] = []
        more = False
        log = self.manager.read_log(SESSIONS, (session_id, HISTORY), after=max(0, after))
        async with aclosing(cast("Any", log)):
            async for entry in log:
                if more := len(events) == limit:
                    break
                events.append(SessionEvent.model_validate({**entry.record, "seq": entry.seq}))
        return SessionHistory(
            session_id=session_id,
            events=events,
            conversations=(await self._public(session)).conversations,
            next_after=events[-1].seq if more and events else None,
        )

    # -- the end -----------------------------------------------------------------------------

    async def destroy_session(self, session_id: str) -> bool:
        """End the session and erase all that is kept of it; whether there was one.

        Its conversations, states, token and history go too, with every earlier version. As soon
        as it has ended nothing is written to it. Cut short by a crash, the rest is erased by the
        next ``destroy_session`` or ``cleanup_expired_sessions``.
        """
        return await self._destroy(session_id) is not None

    async def cleanup_expired_sessions(self) -> CleanupResult:
        """Destroy the sessions whose time is over, and complete what a crash left half destroyed.

        State documents whose own time is over are removed too.
        """
        result, now = CleanupResult(), self.clock.now()
        over = [
            key[0]
            async for key, state, *_ in self.manager.scan(SESSIONS)
            if isinstance(state, StoredSession)
            and (state.status != "active" or is_expired(state, now))
        ]
        for session_id in over:
            ended = await self._destroy(session_id, only_expired=True)
            if ended is not None:
                (result.expired if ended else result.completed).append(session_id)
        async for key, state, revision, *_ in self.manager.scan(STATES):
            if isinstance(state, SessionState) and is_over(state, self.clock.now()):
                try:
                    await self.manager.delete(STATES, key, expected=revision)
                except RevisionConflictError:
                    continue  # stored anew since
        return result

    async def _destroy(self, session_id: str, *, only_expired: bool = False) -> bool | None:
        """Whether it was ended now, or before; None when there is none, or it lives on."""
        try:
            session, _ = await self._stored(session_id)
        except SessionNotFoundError:
            return None
        user, ended = session.user_id, False
        async with self._user_lock(user), self._lock_here(session_id):
            for attempt in range(_ATTEMPTS):
                try:
                    session, revision = await self._stored(session_id)
                except SessionNotFoundError:
                    return None
                ended = session.status == "active"
                if ended and only_expired and not is_expired(session, self.clock.now()):
                    return None  # somebody has renewed it
                group = self.manager.new_group()
                if ended:
                    _end(group, session, revision)
                if user is not None:
                    await self._leave(group, user, session_id)
                try:
                    await self.manager.commit(group)
                    break
                except RevisionConflictError:
                    if attempt == _ATTEMPTS - 1:
                        raise
            if user is not None and not (await self._index(user)).session_ids:
                await self.manager.erase(USERS, user)
        await self._erase(session)
        return ended

    async def _leave(self, group: Group, user: str, session_id: str) -> None:
        index = await self._index(user)
        if session_id in index.session_ids:
            index.session_ids.remove(session_id)
            group.save(USERS, user, index)

    async def _erase(self, session: StoredSession) -> None:
        """All that is kept of a session that has ended, itself last: until then it can go on."""
        session_id = session.session_id
        await self.manager.erase(CONVERSATIONS, session_id)
        await self.manager.erase(STATES, session_id)
        if session.token_sha256:
            await self.manager.erase(TOKENS, session.token_sha256)
        await self.manager.erase(LIVES, session_id)
        await self.manager.erase(SESSIONS, session_id)
        self._fresh.forget(session_id)


def _end(group: Group, session: StoredSession, revision: int) -> None:
    """From now on it is destroyed; what is left says only what is still to be erased."""
    session.status = "destroyed"
    session.context, session.state, session.workflow_states = {}, {}, {}
    session.orchestrator_context, session.conversations = OrchestratorContext(), {}
    group.save(SESSIONS, session.session_id, session, expected=revision)
    group.delete(LIVES, session.session_id)
    if session.token_sha256:
        group.delete(TOKENS, session.token_sha256)


def is_over(state: SessionState, now: Any) -> bool:
    """Whether a state document's own time is over."""
    return state.ttl is not None and later(instant(state.stored_at), state.ttl) <= now


def check_limit(limit: int) -> None:
    if not 1 <= limit <= LONGEST_PAGE:
        raise StateValidationError(f"limit is from 1 to {LONGEST_PAGE}, not {limit}")


def check_mode(mode: str) -> None:
    if mode not in ("merge", "replace"):
        raise StateValidationError(f"mode is merge or replace, not {mode!r:.80}")
