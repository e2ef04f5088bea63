"""What is kept of a session, and what is given back about it.

On disk: ``sessions/<session>.json`` (``StoredSession``) with ``sessions/<session>/history.jsonl``,
a log ``conversations/<session>/<agent type>.jsonl`` for each conversation, ``session_states/
<session>/<state>.json``, ``session_lives/<session>.json``, and two indexes:
``session_tokens/<sha256>.json`` and ``session_users/<user>.json``. Times are UTC text
(``agent_state.clock.stamp``); a person may write the expiry in any zone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agent_state.clock import instant, stamp
from agent_state.models import MAX_COUNT, SCHEMAS, NonEmptyStr, OpenModel
from agent_state.sessions.errors import InvalidConversationIdError

SESSIONS = "sessions"
CONVERSATIONS = "conversations"
STATES = "session_states"
LIVES = "session_lives"
TOKENS = "session_tokens"
USERS = "session_users"
HISTORY = "history"

AGENT_TYPES = (
    "guide_agent",
    "content_liaison",
    "insights_liaison",
    "operations_liaison",
    "business_outcomes_liaison",
)
ORCHESTRATORS = (
    "ContentAnalysisOrchestrator",
    "InsightsOrchestrator",
    "OperationsOrchestrator",
    "BusinessOutcomesOrchestrator",
)
ROLES = ("user", "assistant", "system", "tool")
NOT_STARTED = "not_started"
FINISHED = frozenset({"completed", "failed", "cancelled"})
"""What the status of a workflow is when it goes no further. Any other word means it is active."""

Mode = Literal["merge", "replace"]
"""``merge``: objects are merged, however deep, anything else is replaced."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]

_AGENT_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
_SESSION_ID = re.compile(r"[A-Za-z0-9.-]{1,128}")


def _time(text: str) -> str:
    """As ``stamp`` writes it, whatever zone it was given in; without one it is read as UTC."""
    try:
        moment = instant(text)
        return text if _STAMP.fullmatch(text) else stamp(moment)
    except OverflowError as error:
        raise ValueError("the time is out of range") from error


Time = Annotated[str, AfterValidator(_time)]


class OrchestratorWorkflow(OpenModel):
    """One workflow of one orchestrator. The chain begins with the orchestrator."""

    orchestrator_name: NonEmptyStr
    workflow_id: NonEmptyStr
    status: str = "active"
    started_at: str | None = None
    updated_at: str | None = None
    finished_at: str | None = None
    progress: dict[str, Any] = Field(default_factory=dict)
    enabling_services: list[str] = Field(default_factory=list)
    delegation_chain: list[str] = Field(default_factory=list)
    data: dict[str, Any] = Field(default_factory=dict)


class EnablingService(OpenModel):
    """How often a service was used in this session, when last, and what it last said of itself."""

    service_name: NonEmptyStr
    invocations: Count = 0
    last_used: str | None = None
    status: str | None = None
    details: dict[str, Any] = Field(default_factory=dict)


class Delegation(OpenModel):
    """One step of the work's way: who handed it to whom."""

    source: NonEmptyStr
    target: NonEmptyStr
    workflow_id: str | None = None
    at: str


class OrchestratorContext(OpenModel):
    """The workflows behind a session: those that go on, and the latest that have finished.

    The delegation chain holds the latest steps; ``get_session_history`` has all.
    """

    active_orchestrators: list[OrchestratorWorkflow] = Field(default_factory=list)
    finished_orchestrators: list[OrchestratorWorkflow] = Field(default_factory=list)
    enabling_services: dict[str, EnablingService] = Field(default_factory=dict)
    workflow_delegation_chain: list[Delegation] = Field(default_factory=list)


class Conversation(OpenModel):
    """One conversation of a session, without what was said.

    How much was said, and when last, is told by its log; the document does not say it.
    """

    conversation_id: NonEmptyStr
    message_count: Count = 0
    last_message_at: str | None = None
    orchestrator_context: dict[str, Any] = Field(default_factory=dict)


class WorkflowState(OpenModel):
    """A workflow that the session follows by its id alone."""

    workflow_id: NonEmptyStr
    status: str = "active"
    tracked_at: str
    updated_at: str
    data: dict[str, Any] = Field(default_factory=dict)


class Session(OpenModel):
    """A session as it is given back. ``user_id`` is None for an anonymous one."""

    session_id: NonEmptyStr
    user_id: str | None = None
    status: Literal["active", "destroyed"] = "active"
    created_at: str
    updated_at: str
    last_activity: str
    expires_at: Time
    ttl_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    context: dict[str, Any] = Field(default_factory=dict)
    state: dict[str, Any] = Field(default_factory=dict)
    workflow_states: dict[str, WorkflowState] = Field(default_factory=dict)
    orchestrator_context: OrchestratorContext = Field(default_factory=OrchestratorContext)
    conversations: dict[str, Conversation] = Field(default_factory=dict)

    def conversation(self, agent_type: str) -> Conversation:
        """The conversation with an agent, which begins when it is first asked for."""
        known = self.conversations.get(agent_type)
        if known is None:
            known = Conversation(conversation_id=conversation_id_of(self.session_id, agent_type))
            self.conversations[agent_type] = known
        return known


class StoredSession(Session):
    """The document of a session. Of the token only the SHA-256, in hex, is kept."""

    token_sha256: str | None = None

    def public(self, agent_types: Iterable[str]) -> Session:
        """What may be given away: all but the hash of the token. It belongs to the caller.

        A conversation that nothing was said in yet is in no document, but it has its id.
        """
        body = self.model_dump()
        body.pop("token_sha256", None)
        session = Session.model_validate(body)
        for agent_type in agent_types:
            session.conversation(agent_type)
        return session


class SessionLife(OpenModel):
    """Is there as long as the session is: a message is added only together with asking for it."""

    session_id: NonEmptyStr


class TokenEntry(OpenModel):
    """Which session the token with this document's name as its hash opens."""

    session_id: NonEmptyStr


class UserSessions(OpenModel):
    """The sessions of a user, oldest first."""

    user_id: NonEmptyStr
    session_ids: list[str] = Field(default_factory=list)


class NewMessage(BaseModel):
    """A message to be added. ``content``: text, or any JSON."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: Any
    orchestrator_context: dict[str, Any] | None = None
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=512)
    metadata: dict[str, Any] | None = None


class SessionMessage(OpenModel):
    """One message as it is stored. ``seq`` is its number in the conversation, told on reading.

    Ours always have an id and a time; a line that a person wrote may not.
    """

    message_id: str | None = None
    role: NonEmptyStr
    content: Any = None
    timestamp: str | None = None
    orchestrator_context: dict[str, Any] | None = None
    idempotency_key: str | None = None
    metadata: dict[str, Any] | None = None
    seq: Count | None = None


class AddedMessage(BaseModel):
    """What came of adding a message.

    ``duplicate``: its idempotency key was known; ``message`` is the one stored then.
    """

    session_id: str
    agent_type: str
    conversation_id: str
    message_count: int
    message: SessionMessage
    duplicate: bool = False

    @property
    def seq(self) -> int:
        """The message's number in its conversation."""
        return self.message.seq or 0


class ConversationPage(BaseModel):
    """Messages in the order they were said, oldest first.

    ``next_after`` and ``next_before`` are what to ask with for the page after and the page
    before; None where there is nothing more (a later message may still come).
    """

    session_id: str
    agent_type: str
    conversation_id: str
    message_count: int
    orchestrator_context: dict[str, Any]
    messages: list[SessionMessage]
    next_after: int | None = None
    next_before: int | None = None


class CreatedSession(BaseModel):
    """A new session, its token (told this once), and the ids of those evicted for it."""

    session: Session
    session_token: str = Field(repr=False)
    evicted: list[str] = Field(default_factory=list)


class SessionValidity(BaseModel):
    """Whether a session can be used. ``reason``: ``not_found``, ``expired`` or None."""

    valid: bool
    session_id: str
    authenticated: bool = False
    reason: str | None = None
    expires_at: str | None = None


class SessionEvent(OpenModel):
    """One thing that happened to a session; ``seq`` is its number."""

    event: NonEmptyStr
    at: str
    seq: Count | None = None


class SessionHistory(BaseModel):
    """What happened to a session, oldest first, and how much was said in each conversation."""

    session_id: str
    events: list[SessionEvent]
    conversations: dict[str, Conversation]
    next_after: int | None = None


class OrchestratorState(BaseModel):
    """All workflows of one orchestrator that are kept, latest change last, and the last's status.

    ``status`` is ``not_started`` when there is none.
    """

    orchestrator_name: str
    status: str
    workflows: list[OrchestratorWorkflow]


class Contribution(OpenModel):
    """What a service gave to a state."""

    service: NonEmptyStr
    contribution: Any = None
    timestamp: str


class OrchestratorMetadata(OpenModel):
    """Where a state comes from."""

    created_by_orchestrator: str | None = None
    workflow_id: str | None = None
    enabling_service_contributions: list[Contribution] = Field(default_factory=list)
    delegation_chain: list[str] = Field(default_factory=list)


class SessionState(OpenModel):
    """A state document linked to a session. ``ttl``: seconds from ``stored_at``; None for ever."""

    state_id: NonEmptyStr
    session_id: NonEmptyStr
    state_data: dict[str, Any] = Field(default_factory=dict)
    orchestrator_metadata: OrchestratorMetadata = Field(default_factory=OrchestratorMetadata)
    metadata: dict[str, Any] = Field(default_factory=dict)
    ttl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    created_at: Time
    stored_at: Time


class CleanupResult(BaseModel):
    """``expired``: sessions destroyed now; ``completed``: destroyed before, and now wholly gone."""

    expired: list[str] = Field(default_factory=list)
    completed: list[str] = Field(default_factory=list)


def conversation_id_of(session_id: str, agent_type: str) -> str:
    """``conv_<agent type>_<session id>``, the one form; a session id holds no ``_``."""
    return f"conv_{agent_type}_{session_id}"


def parse_conversation_id(conversation_id: str) -> tuple[str, str]:
    """Session id and agent type. Raises ``InvalidConversationIdError``."""
    head, _, session_id = conversation_id.rpartition("_")
    agent_type = head.removeprefix("conv_")
    if head == agent_type or not is_agent_type(agent_type) or not is_session_id(session_id):
        raise InvalidConversationIdError(f"{conversation_id!r:.200} is no conversation id")
    return session_id, agent_type


def is_agent_type(name: object) -> bool:
    """Lower-case letters, digits and ``_``, at most 64, the first a letter."""
    return isinstance(name, str) and _AGENT_TYPE.fullmatch(name) is not None


def is_session_id(text: object) -> bool:
    """Letters, digits, ``-`` and ``.``, at most 128."""
    return isinstance(text, str) and _SESSION_ID.fullmatch(text) is not None


for _kind, _model in (
    (SESSIONS, StoredSession),
    (STATES, SessionState),
    (LIVES, SessionLife),
    (TOKENS, TokenEntry),
    (USERS, UserSessions),
):
    SCHEMAS.setdefault(_kind, _model)
