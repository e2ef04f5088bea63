"""The emotional journey of a conversation: begun, recorded, resumed, ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar, cast

from agent_state.clock import IdFactory, check_count, instant, is_number, later, stamp
from agent_state.errors import AgentStateError, Key, StateNotFoundError, StateValidationError
from agent_state.manager import StatePersistenceManager
from agent_state.models import OpenModel
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.citations import Citations
from agent_state_integrations.journey.effects import (
    add_breakthrough,
    add_message,
    add_snapshot,
    change_emotion,
    time_of,
    use_model,
)
from agent_state_integrations.journey.export import Exports
from agent_state_integrations.journey.export_formats import zone_named
from agent_state_integrations.journey.fields import check_arguments
from agent_state_integrations.journey.models import (
    KIND,
    Breakthrough,
    ContextSnapshot,
    EmotionState,
    EmotionTransition,
    EmotionUpdate,
    JourneyMessage,
    JourneyState,
    JourneySummary,
    Milestone,
    ResumedSession,
    SessionExpiry,
    SessionHandle,
    SessionMetadata,
    SessionStats,
    Vocabulary,
    validated,
)
from agent_state_integrations.journey.repository import (
    ConversationCache,
    JourneyDraft,
    JourneyRepository,
    check_alive,
    is_expired,
)
from agent_state_integrations.journey.statistics import JourneyStatistics, collect

M = TypeVar("M", bound=OpenModel)

DAY = 86400.0
"""Seconds."""
RECENT_MILESTONES = 5
"""The most milestones that a resume returns."""


class ConversationStateManager:
    """Keeps conversations with their emotional journey, milestones and breakthroughs.

    ``manager``: an open ``StatePersistenceManager``, whose directory, clock and durability it
    uses; the caller closes it. Without one, this object opens and closes one of its own, in
    ``state``. ``ttl_seconds``: a session expires this long after its last write
    or resume. ``vocabulary``: the application's own words for emotions and categories.
    ``window``: the most messages that a resume returns. ``snapshot_every``: the number of messages
    from one snapshot to the next; 0 for none. ``assistant_name``: the assistant's name in
    exports. ``cache``: a copy of live sessions elsewhere, such as ``RedisConversationCache``.
    ``new_id`` makes the ids, random UUIDs by default.

    A message with all its effects is one commit, durable when the method returns. Use it with
    ``async with``, or between ``open`` and ``close``. Methods that write raise
    ``StateNotFoundError``, ``SessionExpiredError``, ``SessionClosedError`` and
    ``StateValidationError``; methods that read raise ``StateNotFoundError``, and read ended
    sessions too.
    """

    citations: Citations
    """Makes, reads and verifies citations."""
    exports: Exports
    """Exports sessions as Markdown, JSON or plain text."""

    def __init__(
        self,
        manager: StatePersistenceManager | None = None,
        *,
        ttl_seconds: float = 7 * DAY,
        vocabulary: Vocabulary | None = None,
        window: int = 100,
        snapshot_every: int = 0,
        assistant_name: str = "Assistant",
        cache: ConversationCache | None = None,
        new_id: IdFactory | None = None,
        **former: object,
    ) -> None:
        check_arguments(manager, former)
        self._owns_manager = manager is None
        manager = manager or StatePersistenceManager()
        if not (is_number(ttl_seconds) and 0 < ttl_seconds < 10**14):
            raise StateValidationError("ttl_seconds: a session lives for more than 0 seconds")
        check_count("window", window, 1)
        check_count("snapshot_every", snapshot_every)
        self.manager = manager
        self.clock = manager.clock
        self.vocabulary = vocabulary or Vocabulary()
        self.window = window
        self.cache = cache
        self._snapshot_every = snapshot_every
        self._repository = JourneyRepository(
            manager, ttl_seconds=ttl_seconds, cache=cache, new_id=new_id
        )
        self.citations = Citations(self._repository)
        self.exports = Exports(self._repository, self.citations, assistant_name)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Let the cache follow the sessions, and open a manager of one's own."""
        if self._owns_manager:
            await self.manager.open()
        if self.cache is not None:
            await self.cache.open(self)

    async def close(self) -> None:
        """Let the cache write what is pending, and close a manager of one's own.

        Sessions off the record live as long as this object.
        """
        try:
            if self.cache is not None:
                await self.cache.close()
        finally:
            if self._owns_manager:
                await self.manager.close()

    # -- the life of a session ---------------------------------------------------------------

    async def initialize_session(
        self,
        user_id: str,
        *,
        model_id: str | None = None,
        user_timezone: str | None = None,
        off_the_record: bool = False,
    ) -> SessionHandle:
        """A new session; its ids. ``off_the_record``: it is kept in memory only.

        ``user_timezone``: such as ``Europe/Berlin``; None for UTC. Raises ``InvalidKeyError`` for
        an invalid user id, ``StateValidationError`` for an unknown time zone.
        """
        now = self.clock.now()
        time = stamp(now)
        body = {
            "user_id": user_id,
            "session_id": self._repository.new_id(),
            "conversation_id": self._repository.new_id(),
            "started_at": time,
            "last_updated": time,
            "expires_at": stamp(later(now, self._repository.ttl_seconds)),
            "emotion": {"emotion": self.vocabulary.first_emotion, "last_change": time},
            "version": "1.0",
        }
        if model_id is not None:
            body.update(last_model=model_id, models_used=[model_id])
        if user_timezone is not None:
            zone_named(user_timezone)
            body["user_timezone"] = user_timezone
        state = validated(JourneyState, body, "a session")
        await self._repository.create(state, off_the_record=off_the_record)
        return SessionHandle(state.session_id, state.conversation_id)

    async def resume_session(
        self, user_id: str, session_id: str, *, recent: int = 20, reopen: bool = False
    ) -> ResumedSession:
        """Everything that is needed to go on; the session's expiry is renewed.

        ``recent``: the number of messages, at most ``window``. ``reopen`` resumes a closed
        session too.
        """
        check_count("recent", recent)

        async def resume(draft: JourneyDraft) -> JourneyState:
            state = draft.state
            if state.status == "closed" and reopen:
                state.status, state.closed_at = "active", None
                draft.record_event("reopened")
            check_alive(state, draft.now)
            state.last_resumed = draft.time
            return state

        key = (user_id, session_id)
        state = await self._repository.change(user_id, session_id, resume, check=False)
        last = min(recent, self.window)
        return ResumedSession(
            session_metadata=self._metadata(state),
            emotional_state=state.emotion,
            recent_messages=await self._records(JourneyMessage, key, "messages", last=last),
            recent_milestones=await self._records(
                Milestone, key, "milestones", last=RECENT_MILESTONES
            ),
            last_breakthrough=[state.last_breakthrough] if state.last_breakthrough else [],
            context_snapshot=state.context_snapshot,
        )

    async def close_session(self, user_id: str, session_id: str) -> bool:
        """Mark the session as closed; whether it exists. Its content stays until it expires.

        Closing a closed session is a no-op.
        """

        async def close(draft: JourneyDraft) -> None:
            if draft.state.status == "closed":
                draft.skip_commit = True
                return
            check_alive(draft.state, draft.now)
            draft.state.status, draft.state.closed_at = "closed", draft.time
            draft.record_event("closed")

        try:
            await self._repository.change(user_id, session_id, close, check=False)
        except StateNotFoundError:
            return False
        return True

    async def erase_session(self, user_id: str, session_id: str) -> bool:
        """Erase everything that is stored of the session; whether there was anything.

        Raises ``LockTimeoutError``, ``StorageError``.
        """
        return await self._repository.erase((user_id, session_id)) > 0

    async def check_session_expiry(self, user_id: str, session_id: str) -> SessionExpiry:
        """The time of the expiry, and whether it is near. It changes nothing."""
        state = await self._repository.find(user_id, session_id)
        left = self._seconds_left(state)
        return SessionExpiry(state.expires_at, left, expired=left <= 0, soon=left < DAY)

    async def cleanup_expired_sessions(self) -> int:
        """Erase every expired session, closed or not; the number of erased sessions.

        An unreadable one is quarantined and reported in ``manager.incidents()``. Raises the first
        error of an erasing after all others were tried.
        """
        erased = 0
        failed: list[AgentStateError] = []
        for files in self._repository.managers:
            expired = [
                loaded.key
                async for loaded in files.scan(KIND)
                if len(loaded.key) == 2 and self._is_expired(loaded.state)
            ]
            for key in expired:
                try:
                    erased += await self._erase_expired(key)
                except AgentStateError as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return erased

    async def _erase_expired(self, key: Key) -> bool:
        files = self._repository.files(key)
        async with files.lock(KIND, key):
            loaded = await files.load_with_revision(KIND, key)
            if loaded is None or not self._is_expired(loaded.state):
                return False  # another process erased or resumed it
            return await self._repository.erase(key) > 0

    # -- recording ---------------------------------------------------------------------------

    async def append_message(
        self,
        user_id: str,
        session_id: str,
        message: JourneyMessage | Mapping[str, object],
        update_emotion: EmotionUpdate | Mapping[str, object] | None = None,
        is_breakthrough: bool = False,
        *,
        dedupe_key: str | None = None,
    ) -> str:
        """Append a message with all its effects in one commit; its id.

        ``update_emotion``: the client's emotion from here on; with a ``breakthrough_insight`` a
        breakthrough is recorded too. ``is_breakthrough`` records one in any case; without an
        insight the message itself is the insight. ``dedupe_key``: the id of the message. A message
        whose id is stored already changes nothing; ``StateValidationError`` is raised if its role
        or content differs from the stored one, or if ``dedupe_key`` contradicts ``message_id``.
        """
        given = self._validated_message(message, dedupe_key)
        update = None if update_emotion is None else self._validated_update(update_emotion)

        async def append(draft: JourneyDraft) -> str:
            if given.message_id is not None and await self._is_stored(draft, given):
                draft.skip_commit = True
                return given.message_id
            insight = update.breakthrough_insight if update else None
            stored = given.model_copy()
            stored.message_id = given.message_id or draft.new_id()
            stored.timestamp = given.timestamp or draft.time
            if is_breakthrough or insight is not None:
                stored.is_breakthrough_trigger = True
            record = add_message(draft, stored)
            if update is not None:
                change_emotion(draft, update, record)
            if is_breakthrough or insight is not None:
                category = update.category if update else None
                add_breakthrough(
                    draft,
                    insight if insight is not None else stored.content,
                    record,
                    category or self.vocabulary.first_category,
                    update.confidence if update else 0.85,
                    shift=draft.state.last_shift,
                )
            every = self._snapshot_every
            if every and draft.state.counters.messages % every == 0:
                add_snapshot(draft)
            return stored.message_id

        return await self._repository.change(user_id, session_id, append)

    async def update_emotion(
        self,
        user_id: str,
        session_id: str,
        emotion: str,
        intensity: float = 0.5,
        confidence: float = 0.7,
        *,
        message_id: str | None = None,
    ) -> str:
        """Record the client's emotion from now on; the id of its citation.

        ``message_id``: the stored message that caused it.
        """
        body = {"emotion": emotion, "intensity": intensity, "confidence": confidence}
        update = self._validated_update(body)

        async def record(draft: JourneyDraft) -> str:
            return change_emotion(draft, update, await self._cause(draft, message_id))

        return await self._repository.change(user_id, session_id, record)

    async def record_milestone(
        self,
        user_id: str,
        session_id: str,
        description: str,
        emotion_state: str | None = None,
        model_id: str | None = None,
        *,
        message_id: str | None = None,
    ) -> str:
        """Record a milestone; the id of its citation.

        None stands for the current emotion and the model that answered last. ``message_id``: the
        stored message that caused it.
        """
        word = None if emotion_state is None else self.vocabulary.emotion(emotion_state)

        async def record(draft: JourneyDraft) -> str:
            state = draft.state
            cause = await self._cause(draft, message_id)
            last = state.last_message.message_id if state.last_message else None
            count = state.counters.messages
            if message_id:
                count = await self._repository.message_number(draft.key, state, message_id) or count
            body = {
                "description": description,
                "emotion_state": word or state.emotion.emotion,
                "model_id": model_id or state.last_model,
                "timestamp": time_of(draft, cause),
                "message_count": count,
                "message_id": message_id or last,
                "tracking_id": draft.new_citation_id(),
            }
            milestone = validated(Milestone, body, "a milestone")
            stored = draft.append("milestones", milestone)
            state.counters.milestones += 1
            evidence = [cause] if cause else []
            draft.cite("milestone", milestone.tracking_id, stored, evidence, subject="milestones")
            return milestone.tracking_id

        return await self._repository.change(user_id, session_id, record)

    async def record_breakthrough(  # noqa: PLR0917  # the order of the first design
        self,
        user_id: str,
        session_id: str,
        insight: str,
        trigger_message_id: str,
        category: str | None = None,
        confidence: float = 0.85,
    ) -> str:
        """Record an insight and the stored message that triggered it; the id of its citation.

        Its shift of the emotion is the latest one until that message.
        """
        word = self.vocabulary.first_category if category is None else category
        word = self.vocabulary.category(word)

        async def record(draft: JourneyDraft) -> str:
            cause = await self._repository.stored_message(draft, trigger_message_id)
            shift = await self._repository.shift_until(draft, cause)
            return add_breakthrough(draft, insight, cause, word, confidence, shift=shift)

        return await self._repository.change(user_id, session_id, record)

    async def switch_model_context(
        self, user_id: str, session_id: str, to_model: str, *, from_model: str | None = None
    ) -> str:
        """Record that another model goes on; the id of the event's citation."""
        if not isinstance(to_model, str) or not to_model:
            raise StateValidationError("to_model is the name of a model", kind=KIND)

        async def switch(draft: JourneyDraft) -> str:
            state, tracking_id = draft.state, draft.new_citation_id()
            stored = draft.record_event(
                "model_switch",
                from_model=from_model or state.last_model,
                to_model=to_model,
                tracking_id=tracking_id,
            )
            use_model(state, to_model)
            state.model_switched_at = draft.time
            draft.cite("model_switch", tracking_id, stored, subject="events")
            return tracking_id

        return await self._repository.change(user_id, session_id, switch)

    async def update_context_snapshot(  # noqa: PLR0917  # the order of the first design
        self,
        user_id: str,
        session_id: str,
        current_theme: str | None = None,
        therapeutic_focus: str | None = None,
        client_state_summary: str | None = None,
        session_notes: str | None = None,
        working_hypotheses: Sequence[str] | None = None,
    ) -> ContextSnapshot:
        """Set the given fields and keep the others; the snapshot as it is then."""
        given = {
            "current_theme": current_theme,
            "therapeutic_focus": therapeutic_focus,
            "client_state_summary": client_state_summary,
            "session_notes": session_notes,
            "working_hypotheses": working_hypotheses,
        }
        given = {name: value for name, value in given.items() if value is not None}

        async def update(draft: JourneyDraft) -> ContextSnapshot:
            body = {**draft.state.context_snapshot.model_dump(), **given, "updated_at": draft.time}
            draft.state.context_snapshot = validated(ContextSnapshot, body, "a context snapshot")
            return draft.state.context_snapshot

        return await self._repository.change(user_id, session_id, update)

    async def snapshot_session_state(self, user_id: str, session_id: str) -> str:
        """Record the session's current state as an event; ``if://archive/<session>/<id>``.

        With ``snapshot_every`` this happens by itself.
        """

        async def snapshot(draft: JourneyDraft) -> str:
            return add_snapshot(draft)

        return await self._repository.change(user_id, session_id, snapshot)

    def _validated_message(
        self, message: JourneyMessage | Mapping[str, object], dedupe_key: str | None
    ) -> JourneyMessage:
        given = validated(JourneyMessage, message, "a message")
        if dedupe_key is not None:
            if given.message_id not in {None, dedupe_key}:
                raise StateValidationError(
                    "message_id and dedupe_key are the same id; give one of them", kind=KIND
                )
            given.message_id = dedupe_key
        if given.emotion_context is not None:
            given.emotion_context = self.vocabulary.emotion(given.emotion_context)
        return given

    def _validated_update(self, given: EmotionUpdate | Mapping[str, object]) -> EmotionUpdate:
        update = validated(EmotionUpdate, given, "an emotion update")
        update.emotion = self.vocabulary.emotion(update.emotion)
        if update.category is not None:
            update.category = self.vocabulary.category(update.category)
        return update

    async def _cause(self, draft: JourneyDraft, message_id: str | None) -> JsonObject | None:
        if not message_id:
            return None
        return await self._repository.stored_message(draft, message_id)

    async def _is_stored(self, draft: JourneyDraft, message: JourneyMessage) -> bool:
        found = await self._repository.find_message(draft.key, draft.state, str(message.message_id))
        if found is None:
            return False
        if (found["role"], found["content"]) != (message.role, message.content):
            raise StateValidationError(
                f"message {message.message_id!r:.80} is stored with another role or content",
                kind=KIND,
                key=draft.key,
            )
        return True

    # -- reading -----------------------------------------------------------------------------

    async def get_session(self, user_id: str, session_id: str) -> SessionMetadata:
        """The session with its totals."""
        return self._metadata(await self._repository.find(user_id, session_id))

    async def get_user_sessions(
        self, user_id: str, *, ended: bool = False
    ) -> list[SessionMetadata]:
        """A user's sessions, oldest first; ``ended`` includes the closed and the expired ones.

        Raises ``InvalidKeyError`` for an invalid user id.
        """
        found = []
        for files in self._repository.managers:
            async for loaded in files.scan(KIND, user_id):
                state = loaded.state
                if len(loaded.key) != 2 or not isinstance(state, JourneyState):
                    continue
                if ended or (state.status == "active" and not self._is_expired(state)):
                    found.append(self._metadata(state))
        return sorted(found, key=lambda each: (each.started_at, each.session_id))

    async def get_message_history(
        self, user_id: str, session_id: str, limit: int = 50, *, before: int | None = None
    ) -> list[JourneyMessage]:
        """The latest messages, oldest first; ``before``: only those with a lower number.

        Raises ``StateValidationError``.
        """
        check_count("limit", limit)
        if before is not None:
            check_count("before", before, 1)
        await self._repository.find(user_id, session_id)
        key = (user_id, session_id)
        if before is None:
            return [each async for each in self._messages(key, last=limit)]
        page = []
        after = max(0, before - 1 - limit)
        async with aclosing(self._messages(key, after=after)) as messages:
            async for message in messages:
                if (message.seq or 0) >= before:
                    break
                page.append(message)
        return page

    async def stream_messages(
        self, user_id: str, session_id: str, *, after: int = 0
    ) -> AsyncGenerator[JourneyMessage, None]:
        """All messages with a number above ``after``, in bounded memory."""
        await self._repository.find(user_id, session_id)
        async for message in self._messages((user_id, session_id), after=after):
            yield message

    async def _messages(
        self, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncGenerator[JourneyMessage, None]:
        async for entry in self._repository.log(key, "messages", after=after, last=last):
            yield JourneyMessage.model_validate({**entry.record, "seq": entry.seq})

    async def get_emotion_state(self, user_id: str, session_id: str) -> EmotionState:
        """The client's current emotion."""
        return (await self._repository.find(user_id, session_id)).emotion

    async def get_emotion_journey(
        self, user_id: str, session_id: str, *, limit: int | None = None
    ) -> list[EmotionTransition]:
        """The steps of the emotional journey, oldest first, or only the latest ``limit``."""
        await self._repository.find(user_id, session_id)
        return await self._records(EmotionTransition, (user_id, session_id), "emotions", last=limit)

    async def get_events(self, user_id: str, session_id: str) -> list[JsonObject]:
        """The switches of the model, snapshots, closings and reopenings, oldest first."""
        await self._repository.find(user_id, session_id)
        entries = self._repository.log((user_id, session_id), "events")
        return [entry.record async for entry in entries]

    async def get_context_snapshot(self, user_id: str, session_id: str) -> ContextSnapshot:
        """The therapist's view as it was last updated."""
        return (await self._repository.find(user_id, session_id)).context_snapshot

    async def get_journey_summary(self, user_id: str, session_id: str) -> JourneySummary:
        """All milestones and breakthroughs, oldest first, and the duration."""
        key = (user_id, session_id)
        state = await self._repository.find(user_id, session_id)
        return JourneySummary(
            total_duration_minutes=state.duration_minutes,
            milestone_count=state.counters.milestones,
            breakthrough_count=state.counters.breakthroughs,
            emotion_changes=state.counters.emotion_changes,
            milestones=await self._records(Milestone, key, "milestones"),
            breakthroughs=await self._records(Breakthrough, key, "breakthroughs"),
        )

    async def export_markdown(
        self, user_id: str, session_id: str, include_transcript: bool = True
    ) -> tuple[str, str]:
        """The export for a therapist: its text and its id; ``exports.markdown``."""
        return await self.exports.markdown(
            user_id, session_id, include_transcript=include_transcript
        )

    async def export_json(self, user_id: str, session_id: str) -> tuple[JsonObject, str]:
        """The export as one object, and its id; ``exports.json``."""
        return await self.exports.json(user_id, session_id)

    async def statistics(self, user_id: str | None = None) -> JourneyStatistics:
        """Figures over all sessions, or over those of a user."""
        return await collect(self._repository.managers, user_id, self.clock.now())

    async def get_session_stats(self, user_id: str, session_id: str) -> SessionStats:
        """Counts and times."""
        state = await self._repository.find(user_id, session_id)
        return SessionStats.of(state, ttl_seconds=self._seconds_left(state))

    async def _records(
        self, model: type[M], key: Key, log: str, *, last: int | None = None
    ) -> list[M]:
        entries = self._repository.log(key, log, last=last)
        return [model.model_validate(entry.record) async for entry in entries]

    def _metadata(self, state: JourneyState) -> SessionMetadata:
        off_the_record = self._repository.is_off_the_record((state.user_id, state.session_id))
        return SessionMetadata.of(state, off_the_record=off_the_record)

    def _is_expired(self, state: OpenModel) -> bool:
        return is_expired(cast("JourneyState", state), self.clock.now())

    def _seconds_left(self, state: JourneyState) -> float:
        return max(0.0, (instant(state.expires_at) - self.clock.now()).total_seconds())
