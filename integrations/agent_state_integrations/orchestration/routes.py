"""Routes of a session's orchestrators and enabling services."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from agent_state.web.auth import for_session, operator
from agent_state.web.backend import BackendDep, SessionsDep
from agent_state.web.models import NonEmptyId, PathId, RequestModel, example
from agent_state.web.operations import OperationRouter, Versioned, document
from agent_state_integrations.orchestration.models import (
    EnablingService,
    OrchestratorState,
    OrchestratorWorkflow,
)
from agent_state_integrations.orchestration.orchestration import Orchestration

router = OperationRouter(
    "/api/global/session/{session_id:id}",
    "orchestrators",
    access=for_session,
    ends=True,
    about="The workflows behind a session, and the services that they use.",
)

_SESSION = document("sessions", "session_id")


class WorkflowChange(RequestModel):
    """A report of a workflow's status. ``progress`` and ``data`` are merged."""

    model_config = example({"status": "active", "progress": {"done": 2, "of": 5}})

    status: NonEmptyId = "active"
    progress: dict[str, Any] | None = None
    enabling_services: list[NonEmptyId] = Field(default_factory=list, max_length=100)
    data: dict[str, Any] | None = None


class ServiceUse(RequestModel):
    """A report of a service's use and status."""

    model_config = example({"status": "ready", "invocations": 1})

    status: str | dict[str, Any] | None = None
    workflow_id: NonEmptyId | None = None
    invocations: int = Field(default=1, ge=0, le=1_000_000)


@router.operation("GET", "/orchestrators/{orchestrator:id}")
async def get_orchestrator(
    backend: BackendDep, session_id: PathId, orchestrator: PathId
) -> Versioned[OrchestratorState]:
    """The workflows of an orchestrator; `not_started` without a workflow."""
    async with backend.view() as view:
        stored = await view.manager.load_with_revision("sessions", session_id)
        found = await Orchestration.of(view.sessions).state(session_id, orchestrator)
    return Versioned(found, None if stored is None else stored.revision)


@router.operation(
    "PUT",
    "/orchestrators/{orchestrator:id}/workflows/{workflow_id:id}",
    access=operator,
    changes=_SESSION,
)
async def track_workflow(
    *,
    sessions: SessionsDep,
    session_id: PathId,
    orchestrator: PathId,
    workflow_id: PathId,
    change: WorkflowChange,
) -> OrchestratorWorkflow:
    """Report a workflow's status; the first report starts it."""
    return await Orchestration.of(sessions).track(
        session_id,
        orchestrator,
        workflow_id,
        status=change.status,
        progress=change.progress,
        enabling_services=change.enabling_services,
        data=change.data,
    )


@router.operation("POST", "/services/{service:id}", access=operator, changes=_SESSION)
async def report_service(
    sessions: SessionsDep, session_id: PathId, service: PathId, use: ServiceUse
) -> EnablingService:
    """Report that a service was used, and its status."""
    return await Orchestration.of(sessions).report_service(
        session_id,
        service,
        use.status,
        workflow_id=use.workflow_id,
        invocations=use.invocations,
    )
