"""What happens in a session: messages, emotions, milestones, breakthroughs, models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent_state.errors import StateNotFoundError, StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.lifecycle import SessionLife
from agent_state_integrations.journey.models import (
    KIND,
    ContextSnapshot,
    EmotionUpdate,
    JourneyMessage,
    JourneyState,
    Milestone,
    parsed,
)
from agent_state_integrations.journey.parts import Draft
from agent_state_integrations.journey.steps import (
    archive,
    breakthrough,
    count_message,
    shift,
    use_model,
    without_number,
)


class SessionRecording(SessionLife):
    """See ``ConversationStateManager``."""

    async def append_message(
        self,
        user_id: str,
        session_id: str,
        message: JourneyMessage | Mapping[str, object],
        update_emotion: EmotionUpdate | Mapping[str, object] | None = None,
        is_breakthrough: bool = False,
    ) -> str:
        """Add a message with all that it brings about, in one commit; its id.

        ``update_emotion``: how the client feels from here on; with a ``breakthrough_insight`` it
        is a breakthrough too. ``is_breakthrough`` records one in any case; without an insight the
        message itself is it. A ``message_id`` of the caller's that is stored already changes
        nothing. Raises ``StateValidationError``, also when the stored message of that id says
        something else; ``StateNotFoundError``, ``SessionExpiredError``, ``SessionClosedError``.
        """
        given = parsed(JourneyMessage, message, "a message")
        if given.emotion_context is not None:
            given.emotion_context = self.vocabulary.emotion(given.emotion_context)
        update = self._checked_update(update_emotion)

        async def append(draft: Draft) -> str:
            if given.message_id is not None and await self._is_stored(draft, given):
                draft.nothing = True
                return given.message_id
            insight = update.breakthrough_insight if update else None
            stored = given.model_copy()
            stored.message_id = given.message_id or draft.new_id()
            stored.timestamp = given.timestamp or draft.time
            if is_breakthrough or insight is not None:
                stored.is_breakthrough_trigger = True
            record = draft.append("messages", without_number(stored))
            count_message(draft.state, stored)
            if update is not None:
                shift(draft, update, record)
            if stored.is_breakthrough_trigger and (is_breakthrough or insight is not None):
                category = update.category if update else None
                breakthrough(
                    draft,
                    insight if insight is not None else stored.content,
                    record,
                    category or self.vocabulary.first_category,
                    update.confidence if update else 0.85,
                )
            every = self._snapshot_every
            if every and draft.state.counters.messages % every == 0:
                archive(draft)
            return stored.message_id

        return await self._change(user_id, session_id, append)

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
        """The client feels this from now on; the id of its citation.

        ``message_id``: the stored message that caused it. Raises ``StateValidationError`` for a
        word that is none, or a number outside 0 to 1.
        """
        body = {"emotion": emotion, "intensity": intensity, "confidence": confidence}
        update = self._checked_update(body)
        assert update is not None  # noqa: S101  # for mypy: there was one

        async def feel(draft: Draft) -> str:
            cause = await self._stored_message(draft, message_id) if message_id else None
            return shift(draft, update, cause)

        return await self._change(user_id, session_id, feel)

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
        """Remember a point of the journey; the id of its citation.

        The emotion is the current one if none is given. Raises as ``update_emotion`` does.
        """
        word = None if emotion_state is None else self.vocabulary.emotion(emotion_state)

        async def record(draft: Draft) -> str:
            state = draft.state
            cause = await self._stored_message(draft, message_id) if message_id else None
            last = state.last_message.message_id if state.last_message else None
            body = {
                "description": description,
                "emotion_state": word or state.emotion.emotion,
                "model_id": model_id or state.last_model,
                "timestamp": draft.time,
                "message_count": state.counters.messages,
                "message_id": message_id or last,
                "tracking_id": draft.citation_id(),
            }
            made = parsed(Milestone, body, "a milestone")
            stored = draft.append("milestones", made)
            state.counters.milestones += 1
            evidence = [cause] if cause else []
            draft.cite("milestone", made.tracking_id, stored, evidence, subject="milestones")
            return made.tracking_id

        return await self._change(user_id, session_id, record)

    async def record_breakthrough(
        self,
        user_id: str,
        session_id: str,
        insight: str,
        trigger_message_id: str,
        *,
        category: str | None = None,
        confidence: float = 0.85,
    ) -> str:
        """Remember an insight and the stored message that triggered it; its citation's id.

        Raises ``StateNotFoundError`` for a message that there is not, and as ``update_emotion``.
        """
        word = self.vocabulary.first_category if category is None else category
        word = self.vocabulary.category(word)

        async def record(draft: Draft) -> str:
            cause = await self._stored_message(draft, trigger_message_id)
            return breakthrough(draft, insight, cause, word, confidence)

        return await self._change(user_id, session_id, record)

    async def switch_model_context(
        self, user_id: str, session_id: str, to_model: str, *, from_model: str | None = None
    ) -> str:
        """Another model goes on with the conversation; the id of the event's citation."""
        if not isinstance(to_model, str) or not to_model:
            raise StateValidationError("to_model is the name of a model", kind=KIND)

        async def switch(draft: Draft) -> str:
            state, tracking_id = draft.state, draft.citation_id()
            event: JsonObject = {
                "timestamp": draft.time,
                "event_type": "model_switch",
                "from_model": from_model or state.last_model,
                "to_model": to_model,
                "tracking_id": tracking_id,
            }
            stored = draft.append("events", event)
            state.counters.events += 1
            use_model(state, to_model)
            state.model_switched_at = draft.time
            draft.cite("model_switch", tracking_id, stored, subject="events")
            return tracking_id

        return await self._change(user_id, session_id, switch)

    async def update_context_snapshot(
        self,
        user_id: str,
        session_id: str,
        *,
        current_theme: str | None = None,
        therapeutic_focus: str | None = None,
        client_state_summary: str | None = None,
        session_notes: str | None = None,
        working_hypotheses: Sequence[str] | None = None,
    ) -> ContextSnapshot:
        """Set what is given and keep the rest; the whole as it is now."""
        given = {
            "current_theme": current_theme,
            "therapeutic_focus": therapeutic_focus,
            "client_state_summary": client_state_summary,
            "session_notes": session_notes,
            "working_hypotheses": working_hypotheses,
        }
        given = {name: value for name, value in given.items() if value is not None}

        async def update(draft: Draft) -> ContextSnapshot:
            body = {**draft.state.context_snapshot.model_dump(), **given, "updated_at": draft.time}
            draft.state.context_snapshot = parsed(ContextSnapshot, body, "a context snapshot")
            return draft.state.context_snapshot

        return await self._change(user_id, session_id, update)

    async def snapshot_session_state(self, user_id: str, session_id: str) -> str:
        """Keep where the session stands now among its events; ``if://archive/<session>/<id>``.

        With the manager's ``snapshot_every`` it happens by itself, every so many messages.
        """

        async def snapshot(draft: Draft) -> str:
            return archive(draft)

        return await self._change(user_id, session_id, snapshot)

    # -- the parts of a change ---------------------------------------------------------------

    def _checked_update(
        self, given: EmotionUpdate | Mapping[str, object] | None
    ) -> EmotionUpdate | None:
        if given is None:
            return None
        update = parsed(EmotionUpdate, given, "an emotion update")
        update.emotion = self.vocabulary.emotion(update.emotion)
        if update.category is not None:
            update.category = self.vocabulary.category(update.category)
        return update

    async def _is_stored(self, draft: Draft, message: JourneyMessage) -> bool:
        found = await self._find_message(draft.key, draft.state, str(message.message_id))
        if found is None:
            return False
        if (found["role"], found["content"]) != (message.role, message.content):
            raise StateValidationError(
                f"message {message.message_id!r:.80} is stored, and says something else",
                kind=KIND,
                key=draft.key,
            )
        return True

    async def _stored_message(self, draft: Draft, message_id: str) -> JsonObject:
        found = await self._find_message(draft.key, draft.state, message_id)
        if found is None:
            raise StateNotFoundError(
                f"there is no message {message_id!r:.80}", kind=KIND, key=draft.key
            )
        return found

    async def _find_message(
        self, key: tuple[str, ...], state: JourneyState, message_id: str
    ) -> JsonObject | None:
        """The stored message with this id, wherever in the log it is."""
        count = state.counters.messages
        seq = await self._index.find(self._files(key), key, message_id, count)
        if seq is None:
            return None
        async for entry in self._log(key, "messages", after=seq - 1):
            return entry.record
        return None
