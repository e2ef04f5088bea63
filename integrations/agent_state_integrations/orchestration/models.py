"""The orchestrator context of a session, which is kept in the session's own document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from agent_state.errors import StateValidationError
from agent_state.models import MAX_COUNT, NonEmptyStr, OpenModel
from agent_state.sessions import EXTENSION_FIELDS

CONTEXT_FIELD = "orchestrator_context"
"""The field of the session's document."""
NOT_STARTED = "not_started"
"""The status of an orchestrator without a workflow."""


class UnknownOrchestratorError(StateValidationError):
    """The orchestrator is not among those that the application registered."""


class OrchestratorWorkflow(OpenModel):
    """One workflow of one orchestrator."""

    orchestrator_name: NonEmptyStr
    """The orchestrator that runs it."""
    workflow_id: NonEmptyStr
    """Its id among the workflows of this orchestrator."""
    status: str = "active"
    """A word of the application's; ``completed``, ``failed`` and ``cancelled`` mean finished."""
    started_at: str | None = None
    """The time of the first report."""
    updated_at: str | None = None
    """The time of the latest report."""
    finished_at: str | None = None
    """The time of the report that finished it; None while it goes on."""
    progress: dict[str, Any] = Field(default_factory=dict)
    """The progress so far; reports are merged."""
    enabling_services: list[str] = Field(default_factory=list)
    """The services that it uses, in the order of first use."""
    delegation_chain: list[str] = Field(default_factory=list)
    """The participants in order; the orchestrator is first."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Anything else that was reported; reports are merged."""


class EnablingService(OpenModel):
    """The use of one service in a session."""

    service_name: NonEmptyStr
    """The service."""
    invocations: int = Field(default=0, ge=0, le=MAX_COUNT)
    """The number of reported uses."""
    last_used: str | None = None
    """The time of the latest use; None when only its status was reported."""
    status: str | None = None
    """The status that was reported last."""
    details: dict[str, Any] = Field(default_factory=dict)
    """Anything else that was reported; reports are merged."""


class Delegation(OpenModel):
    """One hand-over of work."""

    source: NonEmptyStr
    """The participant that handed it over."""
    target: NonEmptyStr
    """The participant that took it."""
    workflow_id: str | None = None
    """The workflow it belongs to."""
    at: str
    """The time."""


class OrchestratorContext(OpenModel):
    """The workflows, services and hand-overs behind a session.

    It is bounded: it holds the latest finished workflows and hand-overs, the session's history
    has all of them.
    """

    active_orchestrators: list[OrchestratorWorkflow] = Field(default_factory=list)
    """The workflows that have not finished, by their latest report."""
    finished_orchestrators: list[OrchestratorWorkflow] = Field(default_factory=list)
    """The workflows that finished last, at most ``MAX_FINISHED_WORKFLOWS``."""
    enabling_services: dict[str, EnablingService] = Field(default_factory=dict)
    """The services, by name."""
    workflow_delegation_chain: list[Delegation] = Field(default_factory=list)
    """The latest hand-overs, at most ``MAX_DELEGATIONS``, oldest first."""


EXTENSION_FIELDS[CONTEXT_FIELD] = OrchestratorContext


class OrchestratorState(BaseModel):
    """One orchestrator in a session."""

    orchestrator_name: str
    """The orchestrator."""
    status: str
    """The status of the workflow that was reported last; ``not_started`` without a workflow."""
    workflows: list[OrchestratorWorkflow]
    """Its workflows, by their latest report."""
