"""The workflows behind a session: who works on what, how far it is, and with whose help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agent_state.errors import StateValidationError
from agent_state.models import detached
from agent_state.sessions.models import (
    FINISHED,
    NOT_STARTED,
    Delegation,
    EnablingService,
    OrchestratorContext,
    OrchestratorState,
    OrchestratorWorkflow,
    Session,
    WorkflowState,
)
from agent_state.sessions.parts import SessionParts, merged
from agent_state.sessions.saving import Draft

KEPT_FINISHED = 20
KEPT_DELEGATIONS = 100
"""So many finished workflows, and steps of the chain, stay in the document, which each message
writes again; the history keeps all."""


class OrchestrationMethods(SessionParts):
    """What a session manager does with orchestrators, services and workflows."""

    async def track_orchestrator_workflow(
        self,
        session_id: str,
        orchestrator_name: str,
        workflow_id: str,
        *,
        status: str = "active",
        progress: Mapping[str, Any] | None = None,
        enabling_services: Iterable[str] = (),
        data: Mapping[str, Any] | None = None,
    ) -> OrchestratorWorkflow:
        """Say how a workflow stands, as it is then; the first time, it starts.

        One orchestrator may have any number side by side. ``progress`` and ``data`` are merged.
        With the status ``completed``, ``failed`` or ``cancelled`` it is finished; the latest 20
        that are finished stay in the session, and its history tells of all.
        """
        services = list(enabling_services)
        result: list[OrchestratorWorkflow] = []

        def work(draft: Draft) -> None:
            context = draft.session.orchestrator_context
            workflow = _take(context, orchestrator_name, workflow_id) or OrchestratorWorkflow(
                orchestrator_name=orchestrator_name,
                workflow_id=workflow_id,
                started_at=draft.time,
                delegation_chain=[orchestrator_name],
            )
            workflow.status = status
            workflow.updated_at = draft.time
            workflow.finished_at = draft.time if status in FINISHED else None
            workflow.progress = merged(workflow.progress, detached(dict(progress or {})))
            workflow.data = merged(workflow.data, detached(dict(data or {})))
            workflow.enabling_services = _with(workflow.enabling_services, services)
            _put(context, workflow)
            draft.tell(
                "workflow",
                orchestrator_name=orchestrator_name,
                workflow_id=workflow_id,
                status=status,
                progress=dict(progress) if progress else None,
            )
            result[:] = [workflow]

        await self._change(session_id, work)
        return result[0]

    async def get_orchestrator_state(
        self, session_id: str, orchestrator_name: str
    ) -> OrchestratorState:
        """All workflows of an orchestrator that are kept; ``not_started`` when there is none."""
        session, _ = await self._live(session_id)
        own = [
            workflow
            for workflow in _by_change(session)
            if workflow.orchestrator_name == orchestrator_name
        ]
        status = own[-1].status if own else NOT_STARTED
        return OrchestratorState(orchestrator_name=orchestrator_name, status=status, workflows=own)

    def orchestrator_states(self, session: Session) -> dict[str, str]:
        """The status of each orchestrator: that of its workflow that changed last.

        The usual orchestrators are always named; one without a workflow is ``not_started``.
        """
        states = dict.fromkeys(self.orchestrators, NOT_STARTED)
        for workflow in _by_change(session):
            states[workflow.orchestrator_name] = workflow.status
        return states

    async def update_enabling_service_status(
        self,
        session_id: str,
        service_name: str,
        status: str | Mapping[str, Any] | None = None,
        *,
        workflow_id: str | None = None,
        invocations: int = 1,
    ) -> EnablingService:
        """Say that a service was used, and how it is; as it is then.

        ``status`` is a word, or an object that is merged into the service's ``details`` (its
        ``status`` is the word). ``invocations`` are the uses this tells of; 0 only reports the
        status. With a ``workflow_id`` that goes on, the service joins its services and its chain.
        """
        if invocations < 0:
            raise StateValidationError(f"invocations are 0 or more, not {invocations}")
        given = {"status": status} if isinstance(status, str) else detached(dict(status or {}))
        result: list[EnablingService] = []

        def work(draft: Draft) -> None:
            context = draft.session.orchestrator_context
            service = context.enabling_services.get(service_name)
            if service is None:
                service = EnablingService(service_name=service_name)
                context.enabling_services[service_name] = service
            details = dict(given)
            word = details.pop("status", None)
            if word is not None:
                service.status = str(word)
            service.details = merged(service.details, details)
            service.invocations += invocations
            if invocations > 0:
                service.last_used = draft.time
            for workflow in context.active_orchestrators:
                if workflow.workflow_id == workflow_id:
                    workflow.enabling_services = _with(workflow.enabling_services, [service_name])
                    _delegate(draft, workflow, service_name)
            draft.tell(
                "service",
                service_name=service_name,
                workflow_id=workflow_id,
                status=service.status,
                invocations=invocations,
            )
            result[:] = [service]

        await self._change(session_id, work)
        return result[0]

    async def record_delegation(
        self, session_id: str, source: str, target: str, *, workflow_id: str | None = None
    ) -> list[Delegation]:
        """Say that work was handed on; the chain as it is then, latest last."""
        result: list[Delegation] = []

        def work(draft: Draft) -> None:
            for workflow in draft.session.orchestrator_context.active_orchestrators:
                if workflow.workflow_id == workflow_id:
                    workflow.delegation_chain = _with(workflow.delegation_chain, [source, target])
            _chain(draft, source, target, workflow_id)
            chain = draft.session.orchestrator_context.workflow_delegation_chain
            result[:] = list(chain)

        await self._change(session_id, work)
        return result

    async def track_workflow_state(
        self,
        session_id: str,
        workflow_id: str,
        *,
        status: str = "active",
        data: Mapping[str, Any] | None = None,
    ) -> WorkflowState:
        """Follow a workflow by its id alone, whoever does it; as it is then. ``data`` is merged."""
        result: list[WorkflowState] = []

        def work(draft: Draft) -> None:
            states = draft.session.workflow_states
            tracked = states.get(workflow_id) or WorkflowState(
                workflow_id=workflow_id, tracked_at=draft.time, updated_at=draft.time
            )
            tracked.status = status
            tracked.updated_at = draft.time
            tracked.data = merged(tracked.data, detached(dict(data or {})))
            states[workflow_id] = tracked
            draft.tell("workflow_state", workflow_id=workflow_id, status=status)
            result[:] = [tracked]

        await self._change(session_id, work)
        return result[0]


def _take(
    context: OrchestratorContext, orchestrator_name: str, workflow_id: str
) -> OrchestratorWorkflow | None:
    for workflows in (context.active_orchestrators, context.finished_orchestrators):
        for workflow in workflows:
            if (workflow.orchestrator_name, workflow.workflow_id) == (
                orchestrator_name,
                workflow_id,
            ):
                workflows.remove(workflow)
                return workflow
    return None


def _put(context: OrchestratorContext, workflow: OrchestratorWorkflow) -> None:
    if workflow.status in FINISHED:
        context.finished_orchestrators.append(workflow)
        del context.finished_orchestrators[:-KEPT_FINISHED]
    else:
        context.active_orchestrators.append(workflow)


def _delegate(draft: Draft, workflow: OrchestratorWorkflow, service_name: str) -> None:
    chain = workflow.delegation_chain
    if service_name not in chain:
        source = chain[-1] if chain else workflow.orchestrator_name
        workflow.delegation_chain = [*chain, service_name]
        _chain(draft, source, service_name, workflow.workflow_id)


def _chain(draft: Draft, source: str, target: str, workflow_id: str | None) -> None:
    chain = draft.session.orchestrator_context.workflow_delegation_chain
    chain.append(Delegation(source=source, target=target, workflow_id=workflow_id, at=draft.time))
    del chain[:-KEPT_DELEGATIONS]
    draft.tell("delegation", source=source, target=target, workflow_id=workflow_id)


def _with(names: list[str], more: Iterable[str]) -> list[str]:
    """The names and those of the others that are not among them, in order."""
    return list(dict.fromkeys((*names, *more)))


def _by_change(session: Session) -> list[OrchestratorWorkflow]:
    context = session.orchestrator_context
    return sorted(
        (*context.finished_orchestrators, *context.active_orchestrators),
        key=lambda workflow: workflow.updated_at or "",
    )
