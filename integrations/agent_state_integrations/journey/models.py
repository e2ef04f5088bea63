"""The stored documents and records of a journey, its vocabulary, and the values returned about it.

On disk: one document ``journeys/<user>/<session>.json`` (``JourneyState``), and in the folder of
the same name the logs ``messages``, ``emotions``, ``milestones``, ``breakthroughs``, ``events``
and ``citations``. Times are UTC text (``agent_state.clock.stamp``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from agent_state.clock import instant, stamp
from agent_state.errors import StateValidationError
from agent_state.models import MAX_COUNT, SCHEMAS, NonEmptyStr, OpenModel
from agent_state.serializers import canonical_json
from agent_state_integrations.journey.fields import KIND as KIND
from agent_state_integrations.journey.fields import MappingModel
from agent_state_integrations.journey.fields import validated as validated

Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


def _as_stamp(time: object) -> object:
    """Return the time as ``stamp`` writes it; ``instant`` says what is a time."""
    if isinstance(time, str | int | float):
        return stamp(instant(time))
    return time  # the model refuses it


Time = Annotated[str, BeforeValidator(_as_stamp)]
CitationStatus = Literal["verified", "disputed", "revoked"]


# -- the vocabulary ----------------------------------------------------------------------------


class EmotionalState(StrEnum):
    """The default emotions."""

    NEUTRAL = "neutral"
    HAPPY = "happy"
    FRUSTRATED = "frustrated"
    ANXIOUS = "anxious"
    BREAKTHROUGH = "breakthrough"
    INTEGRATED = "integrated"
    EXPLORING = "exploring"
    RESISTANT = "resistant"


class TherapeuticCategory(StrEnum):
    """The default categories of a breakthrough."""

    REFRAME = "reframe"
    INTEGRATION = "integration"
    INSIGHT = "insight"
    ACCEPTANCE = "acceptance"
    PATTERN_RECOGNITION = "pattern_recognition"
    RESOLUTION = "resolution"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that an application accepts. Stored records with other words can still be read.

    Raises ``StateValidationError`` for a list without words, a word that occurs twice, and a
    default that is not in its list.
    """

    emotions: tuple[str, ...] = tuple(str(word) for word in EmotionalState)
    """The emotions."""
    categories: tuple[str, ...] = tuple(str(word) for word in TherapeuticCategory)
    """The categories of a breakthrough."""
    first_emotion: str = "neutral"
    """The emotion at the start of a journey."""
    first_category: str = "insight"
    """The category of a breakthrough that is recorded without one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "emotions", _words("emotions", self.emotions))
        object.__setattr__(self, "categories", _words("categories", self.categories))
        object.__setattr__(self, "first_emotion", self.emotion(self.first_emotion))
        object.__setattr__(self, "first_category", self.category(self.first_category))

    def emotion(self, word: object) -> str:
        """The emotion as plain text. Raises ``StateValidationError`` for an unknown word."""
        return _known(word, self.emotions, "emotion")

    def category(self, word: object) -> str:
        """The category as plain text. Raises ``StateValidationError`` for an unknown word."""
        return _known(word, self.categories, "category")


def _words(name: str, given: Iterable[object]) -> tuple[str, ...]:
    words = () if isinstance(given, str) else tuple(given)
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise StateValidationError(f"{name}: a vocabulary is one or more words")
    plain = tuple(str(word) for word in words)
    if len(set(plain)) < len(plain):
        raise StateValidationError(f"{name}: a word is there twice")
    return plain


def _known(word: object, words: tuple[str, ...], what: str) -> str:
    if isinstance(word, str) and word in words:
        return str(word)
    raise StateValidationError(f"{what} {word!r:.80} is not one of {', '.join(words)}")


# -- records -----------------------------------------------------------------------------------


class JourneyMessage(OpenModel, MappingModel):
    """One message."""

    role: NonEmptyStr
    """The speaker: ``user``, ``assistant`` or another word."""
    content: str
    """The text."""
    model_id: str | None = None
    """The model that wrote it."""
    tokens: Count = 0
    """The number of its tokens."""
    emotion_context: str | None = None
    """The emotion that it expresses."""
    message_id: NonEmptyStr | None = None
    """Its id in the conversation; None: it is given one when it is stored."""
    timestamp: Time | None = None
    """Its time; None: the time at which it is stored."""
    parent_message_id: str | None = None
    """The message that it answers."""
    is_milestone: bool = False
    """The caller marks it as a milestone."""
    is_breakthrough_trigger: bool = False
    """A breakthrough was recorded with it."""
    seq: int | None = None
    """Its number in the conversation, from 1; set when it is read."""


class EmotionUpdate(BaseModel):
    """The client's emotion from a message on, and the insight that came with it."""

    model_config = ConfigDict(extra="forbid")

    emotion: str
    """A word of the vocabulary."""
    intensity: Unit = 0.5
    """Its strength, from 0 to 1."""
    confidence: Unit = 0.7
    """The confidence in this reading, from 0 to 1."""
    breakthrough_insight: str | None = None
    """The insight, which is recorded as a breakthrough; None without one."""
    category: str | None = None
    """The category of the breakthrough; None: the vocabulary's first one."""


class EmotionState(OpenModel, MappingModel):
    """The client's current emotion."""

    former_names: ClassVar[Mapping[str, str]] = {
        "current_emotion": "emotion",
        "emotion_intensity": "intensity",
        "emotion_confidence": "confidence",
        "last_emotion_change": "last_change",
        "emotion_tracking_id": "tracking_id",
    }

    emotion: str
    """A word of the vocabulary."""
    intensity: Unit = 0.5
    """Its strength, from 0 to 1."""
    confidence: Unit = 0.7
    """The confidence in this reading, from 0 to 1."""
    timestamp: str | None = None
    """The time of the latest update; None before the first one."""
    last_change: str | None = None
    """The time since which it is this emotion."""
    message_id: str | None = None
    """The message that caused the latest update."""
    tracking_id: str | None = None
    """The citation of the latest update."""


class EmotionTransition(OpenModel, MappingModel):
    """One step of the emotional journey."""

    from_emotion: str
    """The emotion before."""
    to_emotion: str
    """The emotion from then on, which may be the same."""
    intensity: Unit
    """Its strength, from 0 to 1."""
    confidence: Unit
    """The confidence in this reading, from 0 to 1."""
    timestamp: str
    """The time."""
    message_id: str | None = None
    """The message that caused it."""
    tracking_id: str
    """Its citation."""


class Milestone(OpenModel, MappingModel):
    """A point of the journey that is worth remembering."""

    description: str
    """The description."""
    emotion_state: str
    """The emotion at that point."""
    model_id: str | None = None
    """The model that was answering."""
    timestamp: str
    """The time."""
    message_count: Count = 0
    """The number of messages until then."""
    message_id: str | None = None
    """The message that caused it, or the latest one."""
    tracking_id: str
    """Its citation."""


class Breakthrough(OpenModel, MappingModel):
    """An insight, and the message that triggered it."""

    insight: str
    """The insight."""
    trigger_message_id: str
    """The message that triggered it."""
    trigger_excerpt: str = ""
    """The beginning of that message."""
    therapeutic_category: str
    """A category of the vocabulary."""
    confidence: Unit
    """The confidence in it, from 0 to 1."""
    timestamp: str
    """The time."""
    emotion_shift: str | None = None
    """The latest change of the emotion until then, as ``from:to``."""
    tracking_id: str
    """Its citation."""


class ContextSnapshot(OpenModel, MappingModel):
    """The therapist's view of the state of the conversation."""

    current_theme: str = ""
    """The theme."""
    therapeutic_focus: str = ""
    """The focus of the work."""
    client_state_summary: str = ""
    """The client's state."""
    session_notes: str = ""
    """Notes."""
    working_hypotheses: list[str] = Field(default_factory=list)
    """The hypotheses."""
    updated_at: str | None = None
    """The time of the latest update; None before the first one."""


class CitedMessage(OpenModel):
    """A message that a citation rests on."""

    message_id: str
    """The message."""
    sha256: str
    """``fingerprint`` of the stored record."""


class Citation(OpenModel):
    """A statement about a session that can be verified later."""

    citation_id: NonEmptyStr
    """``if://citation/…``, ``if://archive/…`` or ``if://export/…``."""
    type: str
    """The sort of statement, such as ``emotion``, ``milestone`` or ``export``."""
    timestamp: str
    """The time."""
    subject: str | None = None
    """The log that contains the cited record; None if ``data`` is cited."""
    data: dict[str, Any] = Field(default_factory=dict)
    """The cited statement itself, if it is in no log."""
    evidence: list[CitedMessage] = Field(default_factory=list)
    """The messages that it rests on."""
    content_hash: str
    """SHA-256, in hex, of the cited record or of the exported text."""
    status: CitationStatus = "verified"
    """The status that was set last."""
    reason: str | None = None
    """The reason for the status."""


class CitationCheck(NamedTuple):
    """The result of verifying a citation."""

    citation: Citation
    """The citation as it is stored."""
    intact: bool
    """Everything is as it was when it was cited."""
    status: CitationStatus
    """The citation's status; ``disputed`` when it is not intact and not revoked."""
    changed: list[str]
    """The ids of the citation and of the messages that have changed or do not exist."""


def fingerprint(record: Mapping[str, Any]) -> str:
    """SHA-256 of the record's canonical JSON (compact, sorted keys), in hex."""
    return sha256(canonical_json(dict(record))).hexdigest()


# -- the document ------------------------------------------------------------------------------


class Counters(OpenModel):
    """Exact totals; each log holds as many records."""

    messages: Count = 0
    """The messages."""
    tokens: Count = 0
    """The tokens of all messages."""
    emotion_updates: Count = 0
    """The updates of the emotion."""
    emotion_changes: Count = 0
    """The updates to another emotion."""
    milestones: Count = 0
    """The milestones."""
    breakthroughs: Count = 0
    """The breakthroughs."""
    events: Count = 0
    """The events."""
    citations: Count = 0
    """The citations."""
    responses: Count = 0
    """The user's messages that were answered."""
    response_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The seconds between those messages and their answers, in total."""


class LastMessage(OpenModel):
    """The latest message, without its content."""

    message_id: str
    """Its id."""
    role: str
    """The speaker."""
    timestamp: Time
    """Its time."""


class JourneyState(OpenModel):
    """The document of a session: everything except the records of its logs."""

    user_id: NonEmptyStr
    """The user."""
    session_id: NonEmptyStr
    """The session."""
    conversation_id: NonEmptyStr
    """The conversation."""
    status: Literal["active", "closed"] = "active"
    """``closed`` sessions take no writes until they are reopened."""
    started_at: Time
    """The time of the start."""
    last_updated: Time
    """The time of the latest write."""
    expires_at: Time
    """The time at which the session ends unless it is written to or resumed before."""
    last_resumed: str | None = None
    """The time of the latest resume."""
    closed_at: str | None = None
    """The time at which it was closed; None while it is active."""
    user_timezone: str | None = None
    """The user's time zone, as the application names it."""
    last_model: str | None = None
    """The model that answered last."""
    model_switched_at: str | None = None
    """The time of the latest switch to another model."""
    models_used: list[str] = Field(default_factory=list)
    """The models that have answered, in order, at most 100."""
    emotion: EmotionState
    """The current emotion."""
    context_snapshot: ContextSnapshot = Field(default_factory=ContextSnapshot)
    """The therapist's view."""
    counters: Counters = Field(default_factory=Counters)
    """The totals."""
    last_message: LastMessage | None = None
    """The latest message."""
    first_message_at: Time | None = None
    """The earliest time of a message; None before the first one, and in older documents."""
    last_message_at: Time | None = None
    """The latest time of a message."""
    last_shift: str | None = None
    """The latest change of the emotion, as ``from:to``."""
    last_breakthrough: Breakthrough | None = None
    """The latest breakthrough."""
    version: str = "1.0"
    """The version of the layout, for other programs."""

    @property
    def talk_began_at(self) -> str:
        """The time of the first message, if it was imported; else the time of the start."""
        return min(self.started_at, self.first_message_at or self.started_at)

    @property
    def talk_ended_at(self) -> str:
        """The time of the last message, if the messages were imported; else of the latest write."""
        imported = self.first_message_at is not None and self.first_message_at < self.started_at
        return (imported and self.last_message_at) or self.last_updated

    @property
    def duration_minutes(self) -> float:
        """The minutes that the talk took."""
        taken = instant(self.talk_ended_at) - instant(self.talk_began_at)
        return max(0.0, taken.total_seconds() / 60)

    @property
    def average_response_seconds(self) -> float | None:
        """The seconds from a user's message to its answer; None when none was answered."""
        counters = self.counters
        return counters.response_seconds / counters.responses if counters.responses else None


SCHEMAS.setdefault(KIND, JourneyState)


# -- returned values ---------------------------------------------------------------------------


class SessionMetadata(MappingModel):
    """A session with its exact totals; ``JourneyState`` describes the fields of the same name."""

    model_config = ConfigDict(json_schema_extra={"title": "Journey"})

    user_id: str
    """The user."""
    session_id: str
    """The session."""
    conversation_id: str
    """The conversation."""
    status: str
    """``active`` or ``closed``."""
    started_at: str
    """The time of the start."""
    last_updated: str
    """The time of the latest write."""
    expires_at: str
    """The time of the expiry."""
    last_resumed: str | None = None
    """The time of the latest resume."""
    closed_at: str | None = None
    """The time at which it was closed."""
    user_timezone: str | None = None
    """The user's time zone."""
    last_model: str | None = None
    """The model that answered last."""
    model_switched_at: str | None = None
    """The time of the latest switch to another model."""
    models_used: list[str] = Field(default_factory=list)
    """The models that have answered."""
    message_count: int = 0
    """The number of messages."""
    milestone_count: int = 0
    """The number of milestones."""
    breakthrough_count: int = 0
    """The number of breakthroughs."""
    off_the_record: bool = False
    """It is kept in memory only."""
    version: str = "1.0"
    """The version of the layout."""

    @classmethod
    def of(cls, state: JourneyState, *, off_the_record: bool) -> Self:
        shared = cls.model_fields.keys() & JourneyState.model_fields.keys()
        return cls(
            **{name: getattr(state, name) for name in shared},
            message_count=state.counters.messages,
            milestone_count=state.counters.milestones,
            breakthrough_count=state.counters.breakthroughs,
            off_the_record=off_the_record,
        )


class SessionHandle(NamedTuple):
    """The ids of a new session."""

    session_id: str
    """The session."""
    conversation_id: str
    """The conversation."""


class ResumedSession(MappingModel):
    """Everything that a page needs to go on; in each list the newest comes last."""

    model_config = ConfigDict(json_schema_extra={"title": "ResumedJourney"})

    session_metadata: SessionMetadata
    """The session."""
    emotional_state: EmotionState
    """The current emotion."""
    recent_messages: list[JourneyMessage]
    """The latest messages."""
    recent_milestones: list[Milestone]
    """The latest milestones."""
    last_breakthrough: list[Breakthrough]
    """The latest breakthrough, in a list of one; empty without one."""
    context_snapshot: ContextSnapshot
    """The therapist's view."""


class JourneySummary(MappingModel):
    """All milestones and breakthroughs of a session, oldest first."""

    total_duration_minutes: float
    """The minutes that the talk took."""
    milestone_count: int
    """The number of milestones."""
    breakthrough_count: int
    """The number of breakthroughs."""
    emotion_changes: int
    """The number of changes of the emotion."""
    milestones: list[Milestone]
    """The milestones."""
    breakthroughs: list[Breakthrough]
    """The breakthroughs."""


class SessionStats(MappingModel):
    """Counts and times of a session."""

    model_config = ConfigDict(json_schema_extra={"title": "JourneyStats"})

    session_id: str
    """The session."""
    status: str
    """``active`` or ``closed``."""
    started_at: str
    """The time of the start."""
    last_updated: str
    """The time of the latest write."""
    duration_minutes: float
    """The minutes that the talk took, by the times of imported messages if there are any."""
    message_count: int
    """The number of messages."""
    milestone_count: int
    """The number of milestones."""
    breakthrough_count: int
    """The number of breakthroughs."""
    emotion_updates: int
    """The number of updates of the emotion."""
    emotion_changes: int
    """The number of updates to another emotion."""
    tokens: int
    """The tokens of all messages."""
    average_response_seconds: float | None
    """The seconds from a user's message to its answer; None when none was answered."""
    models_used: list[str]
    """The models that have answered."""
    ttl_seconds: float
    """The seconds until the expiry; 0 when it has expired."""

    @classmethod
    def of(cls, state: JourneyState, *, ttl_seconds: float) -> Self:
        counters = state.counters
        return cls(
            session_id=state.session_id,
            status=state.status,
            started_at=state.started_at,
            last_updated=state.last_updated,
            duration_minutes=state.duration_minutes,
            message_count=counters.messages,
            milestone_count=counters.milestones,
            breakthrough_count=counters.breakthroughs,
            emotion_updates=counters.emotion_updates,
            emotion_changes=counters.emotion_changes,
            tokens=counters.tokens,
            average_response_seconds=state.average_response_seconds,
            models_used=state.models_used,
            ttl_seconds=ttl_seconds,
        )


class SessionExpiry(NamedTuple):
    """The expiry of a session."""

    expires_at: str
    """The time."""
    ttl_seconds: float
    """The seconds until then; 0 when it has expired."""
    expired: bool
    """It has expired."""
    soon: bool
    """It expires in less than a day."""
