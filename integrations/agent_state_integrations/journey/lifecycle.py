"""A session's life: begun, resumed, closed, expired, erased."""

from __future__ import annotations

from typing import cast

from agent_state.clock import instant, later, stamp
from agent_state.errors import (
    AgentStateError,
    StateNotFoundError,
    StateValidationError,
)
from agent_state.models import OpenModel
from agent_state_integrations.journey.models import (
    KIND,
    JourneyMessage,
    JourneyState,
    Milestone,
    ResumedSession,
    SessionExpiry,
    SessionHandle,
    SessionMetadata,
    parsed,
)
from agent_state_integrations.journey.parts import DAY, Draft, JourneyParts, check_alive, expired


class SessionLife(JourneyParts):
    """See ``ConversationStateManager``."""

    async def initialize_session(
        self,
        user_id: str,
        *,
        model_id: str | None = None,
        user_timezone: str | None = None,
        off_the_record: bool = False,
    ) -> SessionHandle:
        """Begin a conversation; its ids. ``off_the_record``: it is never written anywhere.

        Raises ``InvalidKeyError`` for a user id that is no id, ``StateValidationError``.
        """
        session_id, conversation_id = self._new_id(), self._new_id()
        now = self.clock.now()
        time = stamp(now)
        body = {
            "user_id": user_id,
            "session_id": session_id,
            "conversation_id": conversation_id,
            "started_at": time,
            "last_updated": time,
            "expires_at": stamp(later(now, self._ttl_seconds)),
            "emotion": {"emotion": self.vocabulary.first_emotion, "last_change": time},
            "version": "1.0",
        }
        if model_id is not None:
            body.update(last_model=model_id, models_used=[model_id])
        if user_timezone is not None:
            body["user_timezone"] = user_timezone
        state = parsed(JourneyState, body, "a session")
        key = (user_id, session_id)
        files = self._unrecorded if off_the_record else self.manager
        await files.save(KIND, key, state, expected=0)
        if off_the_record:
            self._private.add(key)
        self._tell(key)
        return SessionHandle(session_id, conversation_id)

    async def resume_session(
        self, user_id: str, session_id: str, *, recent: int = 20, reopen: bool = False
    ) -> ResumedSession:
        """All that is needed to go on, and a renewed expiry.

        ``recent``: how many messages, at most the window of the manager (100). A closed session
        is resumed only with ``reopen``. Raises ``StateNotFoundError``, ``SessionExpiredError``,
        ``SessionClosedError``.
        """
        if recent < 0:
            raise StateValidationError("recent is 0 or more", kind=KIND)

        async def resume(draft: Draft) -> JourneyState:
            state = draft.state
            if state.status == "closed" and reopen:
                state.status, state.closed_at = "active", None
                self._note_event(draft, "reopened")
            check_alive(state, draft.now)
            state.last_resumed = draft.time
            return state

        key = (user_id, session_id)
        state = await self._change(user_id, session_id, resume, check=False)
        count = min(recent, self.window)
        return ResumedSession(
            session_metadata=self._metadata(state),
            emotional_state=state.emotion,
            recent_messages=[
                JourneyMessage.model_validate(entry.record)
                async for entry in self._log(key, "messages", last=count)
            ],
            recent_milestones=[
                Milestone.model_validate(entry.record)
                async for entry in self._log(key, "milestones", last=5)
            ],
            last_breakthrough=[state.last_breakthrough] if state.last_breakthrough else [],
            context_snapshot=state.context_snapshot,
        )

    async def close_session(self, user_id: str, session_id: str) -> bool:
        """Mark it as closed; whether there was one. What it holds stays until it expires.

        Closing a session that is closed is a no-op. Raises ``SessionExpiredError``.
        """

        async def close(draft: Draft) -> None:
            if draft.state.status == "closed":
                draft.nothing = True
                return
            check_alive(draft.state, draft.now)
            draft.state.status, draft.state.closed_at = "closed", draft.time
            self._note_event(draft, "closed")

        try:
            await self._change(user_id, session_id, close, check=False)
        except StateNotFoundError:
            return False
        return True

    async def erase_session(self, user_id: str, session_id: str) -> bool:
        """Remove everything there is of a session, so that nothing brings it back.

        Whether there was anything. Raises ``LockTimeoutError``, ``StorageError``.
        """
        key = (user_id, session_id)
        erased = await self._files(key).erase(KIND, key)
        self._private.discard(key)
        self._index.forget(key)
        if self.cache is not None:
            await self.cache.forget(user_id, session_id)
        return erased > 0

    async def check_session_expiry(self, user_id: str, session_id: str) -> SessionExpiry:
        """When it expires, and whether that is soon; changes nothing.

        Raises ``StateNotFoundError``.
        """
        state = await self._find(user_id, session_id)
        left = self._seconds_left(state)
        return SessionExpiry(state.expires_at, left, expired=left <= 0, soon=left < DAY)

    async def cleanup_expired_sessions(self) -> int:
        """Erase every session that has expired, closed or not; how many.

        One that cannot be read is put aside and told in ``manager.incidents()``. Raises the
        first error of an erasing, after all others were tried.
        """
        cleaned = 0
        failed: list[AgentStateError] = []
        for files in (self.manager, self._unrecorded):
            ended = [
                loaded.key
                async for loaded in files.scan(KIND)
                if len(loaded.key) == 2 and self._is_expired(loaded.state)
            ]
            for user_id, session_id in ended:
                try:
                    cleaned += await self._erase_expired(user_id, session_id)
                except AgentStateError as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return cleaned

    async def _erase_expired(self, user_id: str, session_id: str) -> bool:
        key = (user_id, session_id)
        async with self._files(key).lock(KIND, key):
            loaded = await self._files(key).load_with_revision(KIND, key)
            if loaded is None or not self._is_expired(loaded.state):
                return False  # somebody erased, or resumed it since
            return await self.erase_session(user_id, session_id)

    async def get_user_sessions(
        self, user_id: str, *, ended: bool = False
    ) -> list[SessionMetadata]:
        """A user's sessions, oldest first; with ``ended`` also the closed and the expired ones.

        Raises ``InvalidKeyError`` for an id that is none.
        """
        found = []
        for files in (self.manager, self._unrecorded):
            async for loaded in files.scan(KIND, user_id):
                state = loaded.state
                if len(loaded.key) != 2 or not isinstance(state, JourneyState):
                    continue
                if ended or (state.status == "active" and not self._is_expired(state)):
                    found.append(self._metadata(state))
        return sorted(found, key=lambda each: (each.started_at, each.session_id))

    def _is_expired(self, state: OpenModel) -> bool:
        return expired(cast("JourneyState", state), self.clock.now())

    def _seconds_left(self, state: JourneyState) -> float:
        return max(0.0, (instant(state.expires_at) - self.clock.now()).total_seconds())

    def _note_event(self, draft: Draft, event_type: str, **fields: object) -> None:
        draft.append("events", {"timestamp": draft.time, "event_type": event_type, **fields})
        draft.state.counters.events += 1

    def _metadata(self, state: JourneyState) -> SessionMetadata:
        shared = SessionMetadata.model_fields.keys() & JourneyState.model_fields.keys()
        return SessionMetadata(
            **{name: getattr(state, name) for name in shared},
            message_count=state.counters.messages,
            milestone_count=state.counters.milestones,
            breakthrough_count=state.counters.breakthroughs,
            off_the_record=(state.user_id, state.session_id) in self._private,
        )
