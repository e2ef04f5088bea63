"""Routes of a session's orchestrators and enabling services."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Response
from pydantic import Field

from agent_state.web.auth import for_session, operator
from agent_state.web.backend import BackendDep, SessionsDep
from agent_state.web.models import NonEmptyId, PathId, RequestModel
from agent_state.web.problems import documented
from agent_state.web.replies import reply
from agent_state_integrations.orchestration.models import (
    EnablingService,
    OrchestratorState,
    OrchestratorWorkflow,
)
from agent_state_integrations.orchestration.orchestration import Orchestration

router = APIRouter(prefix="/api/global/session/{session_id:id}", tags=["orchestrators"])

_READ = documented([401, 403, 404, 410, 422, 503])
_WRITE = documented([401, 403, 404, 409, 410, 422, 503])


class WorkflowChange(RequestModel):
    """A report of a workflow's status. ``progress`` and ``data`` are merged."""

    status: NonEmptyId = "active"
    progress: dict[str, Any] | None = None
    enabling_services: list[NonEmptyId] = Field(default_factory=list, max_length=100)
    data: dict[str, Any] | None = None


class ServiceUse(RequestModel):
    """A report of a service's use and status."""

    status: str | dict[str, Any] | None = None
    workflow_id: NonEmptyId | None = None
    invocations: int = Field(default=1, ge=0, le=1_000_000)


@router.get(
    "/orchestrators/{orchestrator:id}",
    operation_id="get_orchestrator",
    response_model=OrchestratorState,
    dependencies=[Depends(for_session)],
    responses=_READ,
)
async def get_orchestrator(
    backend: BackendDep, session_id: PathId, orchestrator: PathId
) -> Response:
    """The workflows of an orchestrator; `not_started` without a workflow."""
    async with backend.view() as view:
        orchestration = Orchestration.of(view.sessions)
        return reply(await orchestration.state(session_id, orchestrator))


@router.put(
    "/orchestrators/{orchestrator:id}/workflows/{workflow_id:id}",
    operation_id="track_workflow",
    response_model=OrchestratorWorkflow,
    dependencies=[Depends(operator)],
    responses=_WRITE,
)
async def track_workflow(
    *,
    sessions: SessionsDep,
    session_id: PathId,
    orchestrator: PathId,
    workflow_id: PathId,
    change: WorkflowChange,
) -> Response:
    """Report a workflow's status; the first report starts it."""
    workflow = await Orchestration.of(sessions).track(
        session_id,
        orchestrator,
        workflow_id,
        status=change.status,
        progress=change.progress,
        enabling_services=change.enabling_services,
        data=change.data,
    )
    return reply(workflow)


@router.post(
    "/services/{service:id}",
    operation_id="report_service",
    response_model=EnablingService,
    dependencies=[Depends(operator)],
    responses=_WRITE,
)
async def report_service(
    sessions: SessionsDep, session_id: PathId, service: PathId, use: ServiceUse
) -> Response:
    """Report that a service was used, and its status."""
    found = await Orchestration.of(sessions).report_service(
        session_id,
        service,
        use.status,
        workflow_id=use.workflow_id,
        invocations=use.invocations,
    )
    return reply(found)
