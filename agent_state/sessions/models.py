"""The stored documents of a session, and the values that ``SessionManager`` returns.

On disk: ``sessions/<session>.json`` (``StoredSession``) with its log
``sessions/<session>/history.jsonl``, one log ``conversations/<session>/<agent type>.jsonl`` for
each conversation, ``session_states/<session>/<state>.json``, the liveness marker
``session_lives/<session>.json``, and two indexes: ``session_tokens/<sha256>.json`` and
``session_users/<user>.json``. Times are UTC text (``agent_state.clock.stamp``); a person may
write the expiry in any zone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent_state.clock import instant, stamp
from agent_state.errors import StateValidationError
from agent_state.models import MAX_COUNT, SCHEMAS, NonEmptyStr, OpenModel
from agent_state.sessions.names import conversation_id_of

SESSIONS = "sessions"
CONVERSATIONS = "conversations"
STATES = "session_states"
LIVES = "session_lives"
TOKENS = "session_tokens"
USERS = "session_users"
HISTORY = "history"
STORED_DEDUPE_KEY = "idempotency_key"
"""The name of a message's ``dedupe_key`` in the log."""

FINISHED = frozenset({"completed", "failed", "cancelled"})
"""The statuses of a workflow that has ended. Any other word means that it is unfinished."""

MergeMode = Literal["merge", "replace"]
"""``merge``: objects are merged at every depth, any other value is replaced."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


def _as_stamp(text: str) -> str:
    """Return the time as ``stamp`` writes it; a text without a zone is read as UTC."""
    moment = instant(text)
    return text if _STAMP.fullmatch(text) else stamp(moment)


Time = Annotated[str, AfterValidator(_as_stamp)]


class Conversation(OpenModel):
    """One conversation of a session, without its messages.

    The counts come from the conversation's log when a session is returned; the document does not
    store them.
    """

    conversation_id: NonEmptyStr
    """``conv_<agent type>_<session id>``."""
    message_count: Count = 0
    """The number of the last message."""
    last_message_at: str | None = None
    """The time of the last message; None before the first one."""
    orchestrator_context: dict[str, Any] = Field(default_factory=dict)
    """Which workflow the conversation is about; see ``Conversations.update_context``."""


class WorkflowState(OpenModel):
    """The status of a workflow that the session follows."""

    workflow_id: NonEmptyStr
    """The id that its runner gave to the workflow."""
    status: str = "active"
    """A word of the application's; ``completed``, ``failed`` and ``cancelled`` mean finished."""
    tracked_at: str
    """The time of the first report."""
    updated_at: str
    """The time of the latest report."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Anything else that was reported; reports are merged."""


class Session(OpenModel):
    """A session as it is returned. Unknown fields of its document are kept and returned too."""

    session_id: NonEmptyStr
    """Letters, digits, ``-`` and ``.``; random by default."""
    user_id: str | None = None
    """The user; None for an anonymous visitor."""
    status: Literal["active", "destroyed"] = "active"
    """``destroyed`` only while a destroyed session is being erased; it is never returned."""
    created_at: str
    """The time of creation."""
    updated_at: str
    """The time of the latest write."""
    last_activity: str
    """The time of the latest write; an application may show it."""
    expires_at: Time
    """The time at which the session ends unless it is written to before."""
    ttl_seconds: Seconds
    """The seconds from a write to the expiry."""
    context: dict[str, Any] = Field(default_factory=dict)
    """Facts about the visit, such as its page or language."""
    state: dict[str, Any] = Field(default_factory=dict)
    """The application's own state; keep large values in ``sessions.states``."""
    workflow_states: dict[str, WorkflowState] = Field(default_factory=dict)
    """The workflows that the session follows, by id."""
    conversations: dict[str, Conversation] = Field(default_factory=dict)
    """The conversations that have begun, and one for each registered agent type."""

    def conversation(self, agent_type: str) -> Conversation:
        """Return the conversation with an agent; it is added if it has not begun."""
        known = self.conversations.get(agent_type)
        if known is None:
            known = Conversation(conversation_id=conversation_id_of(self.session_id, agent_type))
            self.conversations[agent_type] = known
        return known


EXTENSION_FIELDS: dict[str, type[OpenModel]] = {}
"""The models of the fields that extensions keep in session documents, by the field's name.

An extension adds its model when it is imported; from then on a document, and so a hand edit, whose
field does not fit is refused as any other invalid document is.
"""


class StoredSession(Session):
    """The document of a session."""

    token_sha256: str | None = None
    """SHA-256 of the token, in hex; the token itself is stored nowhere. None: no token."""

    @model_validator(mode="after")
    def _check_extension_fields(self) -> Self:
        extra = self.model_extra or {}
        for name in EXTENSION_FIELDS.keys() & extra.keys():
            try:
                EXTENSION_FIELDS[name].model_validate(extra[name])
            except ValidationError as error:
                fault = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in (name, *fault["loc"]))
                raise ValueError(f"{where:.80}: {fault['msg']}") from None
        return self

    def public(self, agent_types: Iterable[str]) -> Session:
        """Return a copy without the token's hash, with a conversation for each agent type."""
        body = self.model_dump()
        body.pop("token_sha256", None)
        session = Session.model_validate(body)
        for agent_type in agent_types:
            session.conversation(agent_type)
        return session


class LivenessMarker(OpenModel):
    """Exists while the session is alive.

    Appends commit with ``expected=1`` on it, so that a destroyed session refuses them.
    """

    session_id: NonEmptyStr
    """The session that is alive."""


class TokenEntry(OpenModel):
    """Index entry: SHA-256 of a token, which is the document's name, to session id."""

    session_id: NonEmptyStr
    """The session that the token opens."""


class UserSessions(OpenModel):
    """Index entry: a user's sessions."""

    user_id: NonEmptyStr
    """The user."""
    session_ids: list[str] = Field(default_factory=list)
    """The ids of the user's sessions, oldest first."""


class NewMessage(BaseModel):
    """A message to be added to a conversation. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    role: str
    """The speaker: a usual role, or one that the application registered."""
    content: Any
    """Text, or any JSON value."""
    orchestrator_context: dict[str, Any] | None = None
    """Which workflow the message is about."""
    dedupe_key: str | None = Field(default=None, min_length=1, max_length=512)
    """A conversation stores one message for each key; None: the message is always added."""
    metadata: dict[str, Any] | None = None
    """Anything else."""


class SessionMessage(OpenModel):
    """One stored message. Lines that a person wrote may lack an id and a time."""

    message_id: str | None = None
    """The message's own id; None only for a line written by hand."""
    role: NonEmptyStr
    """The speaker."""
    content: Any = None
    """Text, or any JSON value."""
    timestamp: str | None = None
    """The time at which it was added; None only for a line written by hand."""
    orchestrator_context: dict[str, Any] | None = None
    """Which workflow the message is about."""
    dedupe_key: str | None = None
    """The key under which it was added."""
    metadata: dict[str, Any] | None = None
    """Anything else."""
    seq: Count | None = None
    """The message's number in its conversation, from 1; set when it is read."""


class AddedMessage(BaseModel):
    """The result of adding a message."""

    session_id: str
    """The session."""
    agent_type: str
    """The agent of the conversation."""
    conversation_id: str
    """The conversation."""
    message_count: int
    """The number of the conversation's last message."""
    message: SessionMessage
    """The stored message: for a duplicate the one that was stored before."""
    duplicate: bool = False
    """The conversation already had a message with this dedupe key, and nothing was added."""

    @property
    def seq(self) -> int:
        """The message's number in its conversation."""
        return self.message.seq or 0


class ConversationPage(BaseModel):
    """Some messages of a conversation, oldest first."""

    session_id: str
    """The session."""
    agent_type: str
    """The agent of the conversation."""
    conversation_id: str
    """The conversation."""
    message_count: int
    """The number of the conversation's last message."""
    orchestrator_context: dict[str, Any]
    """Which workflow the conversation is about."""
    messages: list[SessionMessage]
    """The messages, oldest first."""
    next_after: int | None = None
    """``after`` of the following page; None when there are no more messages now."""
    next_before: int | None = None
    """``before`` of the preceding page; None when there are no earlier messages."""


class CreatedSession(BaseModel):
    """A new session with its token."""

    session: Session
    """The session."""
    session_token: str = Field(repr=False)
    """The token, which is returned this once: only its hash is stored."""
    evicted: list[str] = Field(default_factory=list)
    """The ids of the user's older sessions that were ended for it."""


class SessionValidity(BaseModel):
    """Whether a session can be used."""

    valid: bool
    """It exists and has not expired."""
    session_id: str
    """The id that was asked about."""
    authenticated: bool = False
    """It belongs to a known user."""
    reason: Literal["not_found", "expired"] | None = None
    """The reason why it is not valid; None when it is."""
    expires_at: str | None = None
    """The time of its expiry; None when it is not valid."""


class SessionEvent(OpenModel):
    """One event of a session's history; its facts are further fields."""

    event: NonEmptyStr
    """The sort of event, such as ``created`` or ``workflow_state``."""
    at: str
    """The time."""
    seq: Count | None = None
    """Its number in the history, from 1."""


class SessionHistory(BaseModel):
    """Events of a session, oldest first, and the number of messages in each conversation."""

    session_id: str
    """The session."""
    events: list[SessionEvent]
    """The events."""
    conversations: dict[str, Conversation]
    """The conversations with their counts."""
    next_after: int | None = None
    """``after`` of the following page; None when there are no more events now."""


class Contribution(OpenModel):
    """The contribution of one service to a state."""

    service: NonEmptyStr
    """The service."""
    contribution: Any = None
    """Any JSON value."""
    timestamp: str
    """The time."""


class StateOrigin(OpenModel):
    """The origin of a state document."""

    created_by_orchestrator: str | None = None
    """The orchestrator that made it."""
    workflow_id: str | None = None
    """The workflow it was made in."""
    enabling_service_contributions: list[Contribution] = Field(default_factory=list)
    """The contributions, oldest first."""
    delegation_chain: list[str] = Field(default_factory=list)
    """The agents that handed the work on, first to last."""


class SessionState(OpenModel):
    """A state document that belongs to a session."""

    state_id: NonEmptyStr
    """Its id within the session."""
    session_id: NonEmptyStr
    """The session."""
    state_data: dict[str, Any] = Field(default_factory=dict)
    """The state."""
    orchestrator_metadata: StateOrigin = Field(default_factory=StateOrigin)
    """The origin of the state."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Anything else."""
    ttl: Seconds | None = None
    """The seconds from ``stored_at`` to its own expiry; None: it lives as long as the session."""
    created_at: Time
    """The time at which it was first stored."""
    stored_at: Time
    """The time at which it was last stored."""


class CleanupResult(BaseModel):
    """The sessions that a cleanup erased."""

    expired: list[str] = Field(default_factory=list)
    """The ids of those that had expired, destroyed by this cleanup."""
    completed: list[str] = Field(default_factory=list)
    """The ids of those destroyed before a crash, whose erasing this cleanup completed."""


def deep_merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Deep-merge ``new`` into a copy of ``old``; non-dict values in ``new`` win."""
    result = dict(old)
    for name, value in new.items():
        before = result.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            result[name] = deep_merge(before, value)
        else:
            result[name] = value
    return result


def check_merge_mode(mode: str) -> None:
    """Raise ``StateValidationError`` for a mode that is not a ``MergeMode``."""
    if mode not in ("merge", "replace"):
        raise StateValidationError(f"mode is merge or replace, not {mode!r:.80}")


def is_expired(session: StoredSession, now: datetime) -> bool:
    """Whether the session's time is over."""
    return instant(session.expires_at) <= now


for _kind, _model in (
    (SESSIONS, StoredSession),
    (STATES, SessionState),
    (LIVES, LivenessMarker),
    (TOKENS, TokenEntry),
    (USERS, UserSessions),
):
    SCHEMAS.setdefault(_kind, _model)
