"""What a message, a feeling, an insight does to a session. Nothing here awaits or reads."""

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
    parsed,
)
from agent_state_integrations.journey.parts import Draft

_EXCERPT = 240
_MODELS = 100
"""More models than that in one conversation are used, and not listed."""


def shift(draft: Draft, update: EmotionUpdate, cause: JsonObject | None) -> str:
    state, before = draft.state, draft.state.emotion
    changed = update.emotion != before.emotion
    message_id = cause["message_id"] if cause else None
    made = EmotionTransition(
        from_emotion=before.emotion,
        to_emotion=update.emotion,
        intensity=update.intensity,
        confidence=update.confidence,
        timestamp=draft.time,
        message_id=message_id,
        tracking_id=draft.citation_id(),
    )
    stored = draft.append("emotions", made)
    state.emotion = EmotionState(
        emotion=update.emotion,
        intensity=update.intensity,
        confidence=update.confidence,
        timestamp=draft.time,
        last_change=draft.time if changed else before.last_change,
        message_id=message_id,
        tracking_id=made.tracking_id,
    )
    state.counters.emotion_updates += 1
    if changed:
        state.counters.emotion_changes += 1
        state.last_shift = f"{before.emotion}:{update.emotion}"
    evidence = [cause] if cause else []
    draft.cite("emotion", made.tracking_id, stored, evidence, subject="emotions")
    return made.tracking_id


def breakthrough(
    draft: Draft, insight: str, cause: JsonObject, category: str, confidence: float
) -> str:
    body = {
        "insight": insight,
        "trigger_message_id": cause["message_id"],
        "trigger_excerpt": _excerpt(cause["content"]),
        "therapeutic_category": category,
        "confidence": confidence,
        "timestamp": draft.time,
        "emotion_shift": draft.state.last_shift,
        "tracking_id": draft.citation_id(),
    }
    made = parsed(Breakthrough, body, "a breakthrough")
    stored = draft.append("breakthroughs", made)
    draft.state.counters.breakthroughs += 1
    draft.state.last_breakthrough = made
    draft.cite("breakthrough", made.tracking_id, stored, [cause], subject="breakthroughs")
    return made.tracking_id


def archive(draft: Draft) -> str:
    state, snapshot_id = draft.state, draft.new_id()
    tracking_id = f"if://archive/{state.session_id}/{snapshot_id}"
    event: JsonObject = {
        "timestamp": draft.time,
        "event_type": "snapshot",
        "tracking_id": tracking_id,
        "emotion": state.emotion.model_dump(),
        "context_snapshot": state.context_snapshot.model_dump(),
        "counters": state.counters.model_dump(),
        "last_message_id": state.last_message.message_id if state.last_message else None,
        "last_model": state.last_model,
    }
    stored = draft.append("events", event)
    state.counters.events += 1
    draft.cite("archive", tracking_id, stored, subject="events")
    return tracking_id


def count_message(state: JourneyState, message: JourneyMessage) -> None:
    counters, before = state.counters, state.last_message
    counters.messages += 1
    counters.tokens += message.tokens
    last = LastMessage(
        message_id=str(message.message_id), role=message.role, timestamp=str(message.timestamp)
    )
    if before is not None and before.role == "user" and message.role != "user":
        waited = (instant(last.timestamp) - instant(before.timestamp)).total_seconds()
        if waited >= 0:
            counters.responses += 1
            counters.response_seconds += waited
    state.last_message = last
    if message.model_id:
        use_model(state, message.model_id)


def without_number(message: JourneyMessage) -> JsonObject:
    body = message.model_dump(warnings=False)
    body.pop("seq", None)
    return body


def use_model(state: JourneyState, model: str) -> None:
    state.last_model = model
    if model not in state.models_used and len(state.models_used) < _MODELS:
        state.models_used = [*state.models_used, model]


def _excerpt(content: str) -> str:
    return content if len(content) <= _EXCERPT else content[: _EXCERPT - 1] + "…"
