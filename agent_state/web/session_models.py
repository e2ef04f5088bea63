"""What the routes of sessions take and give, beside what ``agent_state.sessions`` gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, Field

from agent_state.sessions import (
    Conversation,
    OrchestratorContext,
    Session,
    SessionMessage,
    WorkflowState,
)
from agent_state.web.models import Ident, Strict

Mode = Literal["merge", "replace"]


class NewSession(Strict):
    """A session to create. Without a user it is nobody's we know."""

    user_id: Annotated[str, Field(max_length=4096)] | None = None
    session_type: str | None = Field(default=None, description="Kept in the context.")
    context: dict[str, Any] = Field(default_factory=dict)


class SessionChange(Strict):
    """What is to change: the state, the context, or both."""

    state: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    mode: Mode = "merge"


class ConversationView(Conversation):
    """One conversation with the latest of what was said, oldest first."""

    messages: list[SessionMessage] = Field(default_factory=list)


class SessionView(BaseModel):
    """A session with everything that a page needs to go on."""

    session_id: str
    session_token: str | None = Field(
        default=None, description="Told once, when the session is created."
    )
    user_id: str | None
    status: str
    created_at: str
    updated_at: str
    last_activity: str
    expires_at: str
    context: dict[str, Any]
    state: dict[str, Any]
    workflow_states: dict[str, WorkflowState]
    orchestrator_states: dict[str, str]
    orchestrator_context: OrchestratorContext
    conversations: dict[str, ConversationView]


class Token(BaseModel):
    """A token, told this once."""

    session_token: str


class Revoked(BaseModel):
    """Whether a token opened the session."""

    revoked: bool


class Said(Strict):
    """Something that was said. ``content``: text, or any JSON."""

    role: Ident = "user"
    content: Any
    orchestrator_context: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class ContextChange(Strict):
    """Which workflow a conversation is about."""

    context: dict[str, Any]
    mode: Mode = "merge"


class WorkflowChange(Strict):
    """How a workflow stands. ``progress`` and ``data`` are merged."""

    status: Ident = "active"
    progress: dict[str, Any] | None = None
    enabling_services: list[Ident] = Field(default_factory=list, max_length=100)
    data: dict[str, Any] | None = None


class ServiceUse(Strict):
    """That a service was used, and how it is."""

    status: str | dict[str, Any] | None = None
    workflow_id: Ident | None = None
    invocations: int = Field(default=1, ge=0, le=1_000_000)


class StateChange(Strict):
    """A state to store in the place of the one before."""

    state_data: dict[str, Any]
    orchestrator: Ident | None = None
    workflow_id: Ident | None = None
    delegation_chain: list[Ident] | None = Field(default=None, max_length=100)
    metadata: dict[str, Any] | None = None
    ttl: Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)] | None = None


class Found(BaseModel):
    """Which session and which agent a conversation belongs to."""

    session_id: str
    agent_type: str


Moment = Annotated[AwareDatetime | None, Field(description="With its zone.")]


def view_of(
    session: Session, states: dict[str, str], conversations: dict[str, ConversationView]
) -> SessionView:
    shared = SessionView.model_fields.keys() & Session.model_fields.keys() - {"conversations"}
    return SessionView(
        **{name: getattr(session, name) for name in shared},
        orchestrator_states=states,
        conversations=conversations,
    )
