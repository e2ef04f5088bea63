"""What the routes take and give, beside the documents themselves."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from fastapi import Header, Path, Query
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from agent_state.models import Priority, WakeEvent

T = TypeVar("T")

LONGEST_ID = 4096
MOST_ITEMS = 1000
LONGEST_WAIT = 60.0
_TEN_YEARS = 10 * 366 * 86_400.0

Ident = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
PathId = Annotated[str, Path(min_length=1, max_length=LONGEST_ID)]
After = Annotated[
    str | None,
    Query(max_length=LONGEST_ID, description="Go on after this one: `next` of the page before."),
]
Limit = Annotated[int, Query(ge=1, le=MOST_ITEMS, description="At most so many.")]
Wait = Annotated[
    float,
    Query(ge=0, le=LONGEST_WAIT, description="Seconds to wait for the task to end."),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        max_length=255,
        description="The same request sent twice under one key is done once.",
    ),
]
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=_TEN_YEARS, allow_inf_nan=False)]


class Strict(BaseModel):
    """What a client sends. A field that is not known is a mistake, and 0 is not false."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Page(BaseModel, Generic[T]):
    """Some of many, in the order of their ids. ``next`` is None on the last page."""

    items: list[T]
    next: str | None = None
    unusable: list[str] = Field(
        default_factory=list, description="Ids of documents that cannot be read."
    )


class NewAgent(Strict):
    """An agent to create."""

    agent_id: Ident
    agent_type: Ident
    name: str | None = None
    configuration: dict[str, Any] = Field(default_factory=dict)
    system_prompt: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class NewTask(Strict):
    """A task to queue."""

    name: Ident
    payload: dict[str, Any] = Field(default_factory=dict)
    priority: Priority = "normal"
    delay_seconds: Seconds = 0.0
    max_attempts: int = Field(default=3, ge=1, le=1000)
    timeout_seconds: Annotated[float, Field(gt=0, le=_TEN_YEARS, allow_inf_nan=False)] | None = None


class NewMail(Strict):
    """A message to deliver."""

    from_agent: Ident
    subject: str = ""
    body: Any = ""
    priority: Priority = "normal"
    expects_reply: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)


class Answer(Strict):
    """The answer to a message."""

    body: Any = ""
    priority: Priority = "normal"


class Nap(Strict):
    """How long an agent is to sleep: for ``seconds``, or ``until``, or until something wakes it."""

    seconds: Seconds | None = None
    until: Annotated[AwareDatetime, Field(strict=False)] | None = None
    wake_on: list[WakeEvent] = Field(default_factory=list, max_length=16)
    reason: str | None = None


class Woken(BaseModel):
    """Whether the agent slept."""

    woken: bool


class Cancelled(BaseModel):
    """Whether the task was not finished yet."""

    cancelled: bool


class Health(BaseModel):
    """That the server is there, and what it does."""

    status: str = "ok"
    service: str = "agent_state"
    version: str
    mode: str = Field(description="`runtime`, `manager` or `read-only`.")
    session_manager_available: bool = True


class Ready(BaseModel):
    """That the state can be read, and whether it can be changed."""

    status: str = "ready"
    agents_here: int = Field(description="How many agents run in this server.")
    writable: bool


class Report(BaseModel):
    """What the last start restored; see ``RestoreReport``."""

    model_config = ConfigDict(extra="allow")

    after_crash: bool
    agents: list[str]
    requeued: list[dict[str, Any]]
    contained: list[dict[str, Any]]
    seconds: float


class NewJourney(Strict):
    """A conversation to begin."""

    model_id: str | None = None
    user_timezone: str | None = None
    off_the_record: bool = False


class Shift(Strict):
    """How the client feels from a message on, and the insight that came with it."""

    emotion: str
    intensity: Unit = 0.5
    confidence: Unit = 0.7
    breakthrough_insight: str | None = None
    category: str | None = None


class NewJourneyMessage(Strict):
    """A message to add, with what it brings about."""

    role: Ident
    content: str
    model_id: str | None = None
    tokens: int = Field(default=0, ge=0, le=2**53)
    emotion_context: str | None = None
    parent_message_id: str | None = None
    update_emotion: Shift | None = None
    is_breakthrough: bool = False


class Begun(BaseModel):
    """The ids of a conversation."""

    session_id: str
    conversation_id: str


class Appended(BaseModel):
    """The id of a message that is stored."""

    message_id: str


class Closed(BaseModel):
    """The conversation is closed now."""

    closed: bool = True
