"""The bodies and responses of the journey routes, beside the stored documents themselves."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from agent_state.web.models import NonEmptyId, RequestModel

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class NewJourney(RequestModel):
    """A conversation to begin."""

    model_id: str | None = None
    user_timezone: str | None = None
    off_the_record: bool = False


class EmotionChange(RequestModel):
    """The user's emotion from a message on, and the insight that came with it."""

    emotion: str
    intensity: Fraction = 0.5
    confidence: Fraction = 0.7
    breakthrough_insight: str | None = None
    category: str | None = None


class NewJourneyMessage(RequestModel):
    """A message to add, with its effect on the journey."""

    role: NonEmptyId
    content: str
    model_id: str | None = None
    tokens: int = Field(default=0, ge=0, le=2**53)
    emotion_context: str | None = None
    parent_message_id: str | None = None
    update_emotion: EmotionChange | None = None
    is_breakthrough: bool = False


class JourneyIds(BaseModel):
    """The ids of a conversation."""

    session_id: str
    conversation_id: str


class StoredMessageId(BaseModel):
    """The id of a message that is stored."""

    message_id: str


class ClosedJourney(BaseModel):
    """The conversation is closed."""

    closed: bool = True
