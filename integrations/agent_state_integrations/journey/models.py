"""What is kept of a journey, and what is given back about it.

On disk: one document ``journeys/<user>/<session>.json`` (``JourneyState``), and beside it the
logs ``messages``, ``emotions``, ``milestones``, ``breakthroughs``, ``events`` and ``citations``
in the folder of the same name. Times are UTC text (``agent_state.clock.stamp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from agent_state.clock import instant, stamp
from agent_state.codec import format_validation_error
from agent_state.errors import StateValidationError
from agent_state.models import MAX_COUNT, SCHEMAS, NonEmptyStr, OpenModel

KIND = "journeys"
M = TypeVar("M", bound=BaseModel)

Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""From 0 to 1."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


def _time(text: str) -> str:
    """As ``stamp`` writes it, whatever zone it was given in; without one it is read as UTC."""
    try:
        return stamp(instant(text))
    except OverflowError as error:
        raise ValueError("the time is out of range") from error


Time = Annotated[str, AfterValidator(_time)]
CitationStatus = Literal["verified", "disputed", "revoked"]


class JourneyMessage(OpenModel):
    """One message. Without a ``message_id`` or a ``timestamp`` it is given one when stored.

    ``seq`` is its number in the conversation, told when it is read.
    """

    role: NonEmptyStr
    content: str
    model_id: str | None = None
    tokens: Count = 0
    emotion_context: str | None = None
    message_id: NonEmptyStr | None = None
    timestamp: Time | None = None
    parent_message_id: str | None = None
    is_milestone: bool = False
    is_breakthrough_trigger: bool = False
    seq: int | None = None


class EmotionUpdate(BaseModel):
    """How the client feels from a message on, and the insight that came with it, if any."""

    model_config = ConfigDict(extra="forbid")

    emotion: str
    intensity: Unit = 0.5
    confidence: Unit = 0.7
    breakthrough_insight: str | None = None
    category: str | None = None


class EmotionState(OpenModel):
    """What is felt now. ``last_change``: since when it is this emotion."""

    emotion: str
    intensity: Unit = 0.5
    confidence: Unit = 0.7
    timestamp: str | None = None
    last_change: str | None = None
    message_id: str | None = None
    tracking_id: str | None = None


class EmotionTransition(OpenModel):
    """One step of the journey. ``message_id`` is the message that caused it, when one did."""

    from_emotion: str
    to_emotion: str
    intensity: Unit
    confidence: Unit
    timestamp: str
    message_id: str | None = None
    tracking_id: str


class Milestone(OpenModel):
    """A point of the journey worth remembering, ``message_count`` messages after its start."""

    description: str
    emotion_state: str
    model_id: str | None = None
    timestamp: str
    message_count: Count = 0
    message_id: str | None = None
    tracking_id: str


class Breakthrough(OpenModel):
    """An insight, and what triggered it. ``emotion_shift``: the last one until then, from:to."""

    insight: str
    trigger_message_id: str
    trigger_excerpt: str = ""
    therapeutic_category: str
    confidence: Unit
    timestamp: str
    emotion_shift: str | None = None
    tracking_id: str


class ContextSnapshot(OpenModel):
    """The therapist's view of where the conversation stands."""

    current_theme: str = ""
    therapeutic_focus: str = ""
    client_state_summary: str = ""
    session_notes: str = ""
    working_hypotheses: list[str] = Field(default_factory=list)
    updated_at: str | None = None


class Evidence(OpenModel):
    """A message that a citation rests on, and the SHA-256 of what was stored."""

    message_id: str
    sha256: str


class Citation(OpenModel):
    """Something said about a session that can be checked later.

    ``subject`` is the log with the record of this ``citation_id``; without one, ``data`` is what
    is cited. ``content_hash``: SHA-256 of that, or of the exported text.
    """

    citation_id: NonEmptyStr
    type: str
    timestamp: str
    subject: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    evidence: list[Evidence] = Field(default_factory=list)
    content_hash: str
    status: CitationStatus = "verified"
    reason: str | None = None


class CitationCheck(NamedTuple):
    """What came of looking again. ``changed`` names what is not as it was cited, or is gone."""

    citation: Citation
    intact: bool
    status: CitationStatus
    changed: list[str]


class Counters(OpenModel):
    """True totals; the logs hold as many records."""

    messages: Count = 0
    tokens: Count = 0
    emotion_updates: Count = 0
    emotion_changes: Count = 0
    milestones: Count = 0
    breakthroughs: Count = 0
    events: Count = 0
    citations: Count = 0
    responses: Count = 0
    response_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class LastMessage(OpenModel):
    """The latest message, without what it says."""

    message_id: str
    role: str
    timestamp: Time


class JourneyState(OpenModel):
    """The document of a session: everything but what was said and how it went there."""

    user_id: NonEmptyStr
    session_id: NonEmptyStr
    conversation_id: NonEmptyStr
    status: Literal["active", "closed"] = "active"
    started_at: Time
    last_updated: Time
    expires_at: Time
    last_resumed: str | None = None
    closed_at: str | None = None
    user_timezone: str | None = None
    last_model: str | None = None
    model_switched_at: str | None = None
    models_used: list[str] = Field(default_factory=list)
    emotion: EmotionState
    context_snapshot: ContextSnapshot = Field(default_factory=ContextSnapshot)
    counters: Counters = Field(default_factory=Counters)
    last_message: LastMessage | None = None
    last_shift: str | None = None
    last_breakthrough: Breakthrough | None = None
    version: str = "1.0"


SCHEMAS.setdefault(KIND, JourneyState)


class SessionMetadata(BaseModel):
    """What a session is, with its true totals."""

    user_id: str
    session_id: str
    conversation_id: str
    status: str
    started_at: str
    last_updated: str
    expires_at: str
    last_resumed: str | None = None
    closed_at: str | None = None
    user_timezone: str | None = None
    last_model: str | None = None
    model_switched_at: str | None = None
    models_used: list[str] = Field(default_factory=list)
    message_count: int = 0
    milestone_count: int = 0
    breakthrough_count: int = 0
    off_the_record: bool = False
    version: str = "1.0"


class SessionHandle(NamedTuple):
    """What ``initialize_session`` gives back."""

    session_id: str
    conversation_id: str


class ResumedSession(BaseModel):
    """All that a page needs to go on. ``last_breakthrough`` is the latest: a list of none or one.

    The newest comes last in each list.
    """

    session_metadata: SessionMetadata
    emotional_state: EmotionState
    recent_messages: list[JourneyMessage]
    recent_milestones: list[Milestone]
    last_breakthrough: list[Breakthrough]
    context_snapshot: ContextSnapshot


class JourneySummary(BaseModel):
    """How far it went."""

    total_duration_minutes: float
    milestone_count: int
    breakthrough_count: int
    emotion_changes: int
    milestones: list[Milestone]
    breakthroughs: list[Breakthrough]


class SessionStats(BaseModel):
    """Counts and times of a session. ``ttl_seconds``: until it expires, 0 when it has."""

    session_id: str
    status: str
    started_at: str
    last_updated: str
    duration_minutes: float
    message_count: int
    milestone_count: int
    breakthrough_count: int
    emotion_updates: int
    emotion_changes: int
    tokens: int
    average_response_seconds: float | None
    models_used: list[str]
    ttl_seconds: float


class SessionExpiry(NamedTuple):
    """When a session expires. ``soon``: in less than a day."""

    expires_at: str
    ttl_seconds: float
    expired: bool
    soon: bool


def parsed(model: type[M], given: M | Mapping[str, Any], what: str) -> M:
    """The caller's object as a model of our own. Raises ``StateValidationError``."""
    if isinstance(given, BaseModel):
        given = given.model_dump(warnings=False)
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise StateValidationError(
            f"{what} is {format_validation_error(error)}", kind=KIND
        ) from error
    except (TypeError, ValueError) as error:
        raise StateValidationError(f"{what} is no mapping", kind=KIND) from error
