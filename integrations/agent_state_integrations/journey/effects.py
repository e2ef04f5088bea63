"""The effects of a message, an emotion, an insight on a session. Nothing here awaits or reads."""

from __future__ import annotations

from agent_state.clock import instant
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.models import (
    Breakthrough,
    EmotionState,
    EmotionTransition,
    EmotionUpdate,
    JourneyMessage,
    JourneyState,
    LastMessage,
    validated,
)
from agent_state_integrations.journey.repository import JourneyDraft

MAX_EXCERPT = 240
"""The most characters of the excerpt in a breakthrough."""
MAX_MODELS = 100
"""The most models that a session's document names."""


def time_of(draft: JourneyDraft, cause: JsonObject | None) -> str:
    """The time of what a message caused: now, or when the message was said if it was imported.

    A message that is appended by the same commit has its own time, and so has one that was said
    before the session was started here.
    """
    written = cause.get("timestamp") if cause else None
    if cause is None or not isinstance(written, str):
        return draft.time
    appended = cause["message_id"] in draft.messages
    return written if appended or written < draft.state.started_at else draft.time


def change_emotion(draft: JourneyDraft, update: EmotionUpdate, cause: JsonObject | None) -> str:
    """Record an update of the emotion, caused by a stored message if any; its citation's id."""
    state, before = draft.state, draft.state.emotion
    changed = update.emotion != before.emotion
    message_id = cause["message_id"] if cause else None
    time = time_of(draft, cause)
    transition = EmotionTransition(
        from_emotion=before.emotion,
        to_emotion=update.emotion,
        intensity=update.intensity,
        confidence=update.confidence,
        timestamp=time,
        message_id=message_id,
        tracking_id=draft.new_citation_id(),
    )
    stored = draft.append("emotions", transition)
    state.emotion = EmotionState(
        emotion=update.emotion,
        intensity=update.intensity,
        confidence=update.confidence,
        timestamp=time,
        last_change=time if changed else before.last_change,
        message_id=message_id,
        tracking_id=transition.tracking_id,
    )
    state.counters.emotion_updates += 1
    if changed:
        state.counters.emotion_changes += 1
        state.last_shift = f"{before.emotion}:{update.emotion}"
    evidence = [cause] if cause else []
    draft.cite("emotion", transition.tracking_id, stored, evidence, subject="emotions")
    return transition.tracking_id


def add_breakthrough(
    draft: JourneyDraft,
    insight: str,
    cause: JsonObject,
    category: str,
    confidence: float,
    *,
    shift: str | None,
) -> str:
    """Record an insight that a stored message triggered; its citation's id.

    ``shift``: the latest change of the emotion until that message.
    """
    body = {
        "insight": insight,
        "trigger_message_id": cause["message_id"],
        "trigger_excerpt": _excerpt(cause["content"]),
        "therapeutic_category": category,
        "confidence": confidence,
        "timestamp": time_of(draft, cause),
        "emotion_shift": shift,
        "tracking_id": draft.new_citation_id(),
    }
    breakthrough = validated(Breakthrough, body, "a breakthrough")
    stored = draft.append("breakthroughs", breakthrough)
    draft.state.counters.breakthroughs += 1
    draft.state.last_breakthrough = breakthrough
    draft.cite("breakthrough", breakthrough.tracking_id, stored, [cause], subject="breakthroughs")
    return breakthrough.tracking_id


def add_snapshot(draft: JourneyDraft) -> str:
    """Record the session's current state as an event; its citation's id."""
    state = draft.state
    tracking_id = f"if://archive/{state.session_id}/{draft.new_id()}"
    facts = {
        "tracking_id": tracking_id,
        "emotion": state.emotion.model_dump(),
        "context_snapshot": state.context_snapshot.model_dump(),
        "counters": state.counters.model_dump(),
        "last_message_id": state.last_message.message_id if state.last_message else None,
        "last_model": state.last_model,
    }
    stored = draft.record_event("snapshot", **facts)
    draft.cite("archive", tracking_id, stored, subject="events")
    return tracking_id


def add_message(draft: JourneyDraft, message: JourneyMessage) -> JsonObject:
    """Append a message that has its id and time, and count it; the record as stored."""
    body = message.model_dump(warnings=False)
    body.pop("seq", None)
    record = draft.append("messages", body)
    state, counters, before = draft.state, draft.state.counters, draft.state.last_message
    counters.messages += 1
    counters.tokens += message.tokens
    last = LastMessage(
        message_id=str(message.message_id), role=message.role, timestamp=str(message.timestamp)
    )
    state.first_message_at = min(state.first_message_at or last.timestamp, last.timestamp)
    state.last_message_at = max(state.last_message_at or last.timestamp, last.timestamp)
    if before is not None and before.role == "user" and message.role != "user":
        waited = (instant(last.timestamp) - instant(before.timestamp)).total_seconds()
        if waited >= 0:
            counters.responses += 1
            counters.response_seconds += waited
    state.last_message = last
    if message.model_id:
        use_model(state, message.model_id)
    return record


def use_model(state: JourneyState, model: str) -> None:
    """Note the model that answers from now on."""
    state.last_model = model
    if model not in state.models_used and len(state.models_used) < MAX_MODELS:
        state.models_used = [*state.models_used, model]


def _excerpt(content: str) -> str:
    return content if len(content) <= MAX_EXCERPT else content[: MAX_EXCERPT - 1] + "…"
