"""What a session holds: pages and streams of what was said, and its figures."""

from __future__ import annotations

from collections.abc import AsyncIterator

from agent_state.clock import instant
from agent_state.errors import StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.citations import SessionCitations
from agent_state_integrations.journey.models import (
    KIND,
    Breakthrough,
    ContextSnapshot,
    EmotionState,
    EmotionTransition,
    JourneyMessage,
    JourneyState,
    JourneySummary,
    Milestone,
    SessionMetadata,
    SessionStats,
)


class SessionReading(SessionCitations):
    """See ``ConversationStateManager``. Reading renews nothing, and goes on after the end."""

    async def get_session(self, user_id: str, session_id: str) -> SessionMetadata:
        """What the session is, even when it has ended. Raises ``StateNotFoundError``."""
        return self._metadata(await self._find(user_id, session_id))

    async def get_message_history(
        self, user_id: str, session_id: str, limit: int = 50, *, before: int | None = None
    ) -> list[JourneyMessage]:
        """The latest messages, oldest first; ``before``: those before the one of this number.

        Each has its number as ``seq``. Raises ``StateNotFoundError``.
        """
        if limit < 0 or (before is not None and before < 1):
            raise StateValidationError("limit is 0 or more, before 1 or more", kind=KIND)
        await self._find(user_id, session_id)
        if before is None:
            return [each async for each in self._messages(user_id, session_id, last=limit)]
        page = []
        after = max(0, before - 1 - limit)
        async for message in self._messages(user_id, session_id, after=after):
            if message.seq is not None and message.seq >= before:
                break
            page.append(message)
        return page

    async def stream_messages(
        self, user_id: str, session_id: str, *, after: int = 0
    ) -> AsyncIterator[JourneyMessage]:
        """All messages with a number above ``after``, in bounded memory."""
        await self._find(user_id, session_id)
        async for message in self._messages(user_id, session_id, after=after):
            yield message

    async def _messages(
        self, user_id: str, session_id: str, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[JourneyMessage]:
        async for entry in self._log((user_id, session_id), "messages", after=after, last=last):
            yield JourneyMessage.model_validate({**entry.record, "seq": entry.seq})

    async def get_emotion_state(self, user_id: str, session_id: str) -> EmotionState:
        """What is felt now."""
        return (await self._find(user_id, session_id)).emotion

    async def get_emotion_journey(
        self, user_id: str, session_id: str, *, limit: int | None = None
    ) -> list[EmotionTransition]:
        """Every step of the emotional journey, oldest first; or only the latest ``limit``."""
        await self._find(user_id, session_id)
        entries = self._log((user_id, session_id), "emotions", last=limit)
        return [EmotionTransition.model_validate(entry.record) async for entry in entries]

    async def get_events(self, user_id: str, session_id: str) -> list[JsonObject]:
        """Switches of the model, snapshots, closing and reopening, oldest first."""
        await self._find(user_id, session_id)
        return [entry.record async for entry in self._log((user_id, session_id), "events")]

    async def get_context_snapshot(self, user_id: str, session_id: str) -> ContextSnapshot:
        """Where the conversation stands, as it was last said."""
        return (await self._find(user_id, session_id)).context_snapshot

    async def get_journey_summary(self, user_id: str, session_id: str) -> JourneySummary:
        """All milestones and breakthroughs, oldest first, and how long it has taken."""
        key = (user_id, session_id)
        state = await self._find(user_id, session_id)
        return JourneySummary(
            total_duration_minutes=minutes(state),
            milestone_count=state.counters.milestones,
            breakthrough_count=state.counters.breakthroughs,
            emotion_changes=state.counters.emotion_changes,
            milestones=[
                Milestone.model_validate(entry.record)
                async for entry in self._log(key, "milestones")
            ],
            breakthroughs=[
                Breakthrough.model_validate(entry.record)
                async for entry in self._log(key, "breakthroughs")
            ],
        )

    async def get_session_stats(self, user_id: str, session_id: str) -> SessionStats:
        """Counts and times. Raises ``StateNotFoundError``."""
        state = await self._find(user_id, session_id)
        counters = state.counters
        return SessionStats(
            session_id=state.session_id,
            status=state.status,
            started_at=state.started_at,
            last_updated=state.last_updated,
            duration_minutes=minutes(state),
            message_count=counters.messages,
            milestone_count=counters.milestones,
            breakthrough_count=counters.breakthroughs,
            emotion_updates=counters.emotion_updates,
            emotion_changes=counters.emotion_changes,
            tokens=counters.tokens,
            average_response_seconds=average_response(state),
            models_used=state.models_used,
            ttl_seconds=self._seconds_left(state),
        )


def minutes(state: JourneyState) -> float:
    """From the start of a session to its last change."""
    taken = instant(state.last_updated) - instant(state.started_at)
    return max(0.0, taken.total_seconds() / 60)


def average_response(state: JourneyState) -> float | None:
    """Seconds from a user's message to the answer; None when nothing was answered."""
    counters = state.counters
    return counters.response_seconds / counters.responses if counters.responses else None
