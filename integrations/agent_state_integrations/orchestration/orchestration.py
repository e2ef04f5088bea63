"""The orchestrators behind a session: their workflows, enabling services and delegation chains."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from agent_state.errors import StateCorruptedError, StateValidationError
from agent_state.models import detached
from agent_state.sessions import (
    FINISHED,
    SESSIONS,
    NameRegistry,
    Session,
    SessionDraft,
    SessionManager,
    deep_merge,
)
from agent_state_integrations.orchestration.models import (
    CONTEXT_FIELD,
    NOT_STARTED,
    Delegation,
    EnablingService,
    OrchestratorContext,
    OrchestratorState,
    OrchestratorWorkflow,
    UnknownOrchestratorError,
)

T = TypeVar("T")

MAX_FINISHED_WORKFLOWS = 20
MAX_DELEGATIONS = 100
"""The session's document is written with each message, so what it holds must be bounded."""


class Orchestration:
    """Keeps the orchestrator context of sessions.

    It adds the fields ``orchestrator_context`` and ``orchestrator_states`` to every session that
    ``sessions`` returns. ``orchestrators``: the names that the application uses; none registered
    accepts any. Every method that takes a session id raises ``SessionNotFoundError``,
    ``SessionExpiredError`` and ``StateValidationError``.
    """

    orchestrators: NameRegistry
    """The registered orchestrators."""

    def __init__(self, sessions: SessionManager, *, orchestrators: Iterable[str] = ()) -> None:
        self._sessions = sessions
        self.orchestrators = NameRegistry(
            "orchestrator", UnknownOrchestratorError, orchestrators, is_valid=_is_name
        )
        sessions.extend(self)

    @classmethod
    def of(cls, sessions: SessionManager) -> Self:
        """The orchestration that extends these sessions already; otherwise a new one."""
        for extension in sessions.extensions:
            if isinstance(extension, cls):
                return extension
        return cls(sessions)

    def session_fields(self, session: Session) -> Mapping[str, Any]:
        """The orchestrator context and the orchestrators' states."""
        return {CONTEXT_FIELD: context_of(session), "orchestrator_states": self.states(session)}

    async def context(self, session_id: str) -> OrchestratorContext:
        """The orchestrator context of a session."""
        return context_of(await self._sessions.get(session_id))

    async def track(
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
        """Report a workflow's status; the workflow as it is then. The first report starts it.

        An orchestrator may have any number of workflows at once. ``progress`` and ``data`` are
        deep-merged into what was reported before. The status ``completed``, ``failed`` or
        ``cancelled`` finishes the workflow. Raises ``UnknownOrchestratorError``.
        """
        self.orchestrators.check(orchestrator_name)
        services = list(enabling_services)

        async def report(draft: SessionDraft, context: OrchestratorContext) -> OrchestratorWorkflow:
            workflow = _remove(context, orchestrator_name, workflow_id) or OrchestratorWorkflow(
                orchestrator_name=orchestrator_name,
                workflow_id=workflow_id,
                started_at=draft.time,
                delegation_chain=[orchestrator_name],
            )
            workflow.status = status
            workflow.updated_at = draft.time
            workflow.finished_at = draft.time if status in FINISHED else None
            workflow.progress = deep_merge(workflow.progress, detached(dict(progress or {})))
            workflow.data = deep_merge(workflow.data, detached(dict(data or {})))
            workflow.enabling_services = _union(workflow.enabling_services, services)
            _insert(context, workflow)
            draft.record_event(
                "workflow",
                orchestrator_name=orchestrator_name,
                workflow_id=workflow_id,
                status=status,
                progress=dict(progress) if progress else None,
            )
            return workflow

        return await self._change(session_id, report)

    async def state(self, session_id: str, orchestrator_name: str) -> OrchestratorState:
        """The workflows of an orchestrator and its status; ``not_started`` without a workflow."""
        own = [
            workflow
            for workflow in _by_report(await self.context(session_id))
            if workflow.orchestrator_name == orchestrator_name
        ]
        status = own[-1].status if own else NOT_STARTED
        return OrchestratorState(orchestrator_name=orchestrator_name, status=status, workflows=own)

    def states(self, session: Session) -> dict[str, str]:
        """The status of each orchestrator: that of its workflow that was reported last.

        It contains every registered orchestrator; one without a workflow is ``not_started``.
        """
        states = dict.fromkeys(self.orchestrators, NOT_STARTED)
        for workflow in _by_report(context_of(session)):
            states[workflow.orchestrator_name] = workflow.status
        return states

    async def report_service(
        self,
        session_id: str,
        service_name: str,
        status: str | Mapping[str, Any] | None = None,
        *,
        workflow_id: str | None = None,
        invocations: int = 1,
    ) -> EnablingService:
        """Report that a service was used, and its status; the service as it is then.

        ``status`` is a word, or an object that is deep-merged into the service's ``details``
        (its ``status`` is the word). ``invocations`` is the number of uses that this reports; 0
        reports the status alone. If the workflow ``workflow_id`` is active, the service joins its
        services and its delegation chain.
        """
        if invocations < 0:
            raise StateValidationError(f"invocations are 0 or more, not {invocations}")
        given = {"status": status} if isinstance(status, str) else detached(dict(status or {}))

        async def report(draft: SessionDraft, context: OrchestratorContext) -> EnablingService:
            service = context.enabling_services.get(service_name)
            if service is None:
                service = EnablingService(service_name=service_name)
                context.enabling_services[service_name] = service
            details = dict(given)
            word = details.pop("status", None)
            if word is not None:
                service.status = str(word)
            service.details = deep_merge(service.details, details)
            service.invocations += invocations
            if invocations > 0:
                service.last_used = draft.time
            for workflow in context.active_orchestrators:
                if workflow.workflow_id == workflow_id:
                    _add_service(draft, context, workflow, service_name)
            draft.record_event(
                "service",
                service_name=service_name,
                workflow_id=workflow_id,
                status=service.status,
                invocations=invocations,
            )
            return service

        return await self._change(session_id, report)

    async def delegate(
        self, session_id: str, source: str, target: str, *, workflow_id: str | None = None
    ) -> list[Delegation]:
        """Record that work was handed over; the latest hand-overs, oldest first."""

        async def record(draft: SessionDraft, context: OrchestratorContext) -> list[Delegation]:
            for workflow in context.active_orchestrators:
                if workflow.workflow_id == workflow_id:
                    workflow.delegation_chain = _union(workflow.delegation_chain, [source, target])
            _record_delegation(draft, context, source, target, workflow_id)
            return list(context.workflow_delegation_chain)

        return await self._change(session_id, record)

    async def _change(
        self,
        session_id: str,
        work: Callable[[SessionDraft, OrchestratorContext], Awaitable[T]],
    ) -> T:
        async def change(draft: SessionDraft) -> T:
            context = context_of(draft.session)
            result = await work(draft, context)
            extra = draft.session.model_extra
            assert extra is not None  # noqa: S101  # sessions keep unknown fields
            extra[CONTEXT_FIELD] = context.model_dump(warnings=False)
            return result

        return await self._sessions.change(session_id, change)


def context_of(session: Session) -> OrchestratorContext:
    """The orchestrator context in a session's document, empty when it has none.

    Raises ``StateCorruptedError`` when it is unreadable.
    """
    try:
        return OrchestratorContext.model_validate(
            (session.model_extra or {}).get(CONTEXT_FIELD, {})
        )
    except ValidationError as error:
        raise StateCorruptedError(
            "the orchestrator context is unreadable", kind=SESSIONS, key=session.session_id
        ) from error


def _remove(
    context: OrchestratorContext, orchestrator_name: str, workflow_id: str
) -> OrchestratorWorkflow | None:
    wanted = (orchestrator_name, workflow_id)
    for workflows in (context.active_orchestrators, context.finished_orchestrators):
        for workflow in workflows:
            if (workflow.orchestrator_name, workflow.workflow_id) == wanted:
                workflows.remove(workflow)
                return workflow
    return None


def _insert(context: OrchestratorContext, workflow: OrchestratorWorkflow) -> None:
    if workflow.status in FINISHED:
        context.finished_orchestrators.append(workflow)
        del context.finished_orchestrators[:-MAX_FINISHED_WORKFLOWS]
    else:
        context.active_orchestrators.append(workflow)


def _add_service(
    draft: SessionDraft,
    context: OrchestratorContext,
    workflow: OrchestratorWorkflow,
    service_name: str,
) -> None:
    workflow.enabling_services = _union(workflow.enabling_services, [service_name])
    chain = workflow.delegation_chain
    if service_name not in chain:
        source = chain[-1] if chain else workflow.orchestrator_name
        workflow.delegation_chain = [*chain, service_name]
        _record_delegation(draft, context, source, service_name, workflow.workflow_id)


def _record_delegation(
    draft: SessionDraft,
    context: OrchestratorContext,
    source: str,
    target: str,
    workflow_id: str | None,
) -> None:
    chain = context.workflow_delegation_chain
    chain.append(Delegation(source=source, target=target, workflow_id=workflow_id, at=draft.time))
    del chain[:-MAX_DELEGATIONS]
    draft.record_event("delegation", source=source, target=target, workflow_id=workflow_id)


def _union(names: list[str], more: Iterable[str]) -> list[str]:
    """The names, then those of ``more`` that are not among them, in order."""
    return list(dict.fromkeys((*names, *more)))


def _by_report(context: OrchestratorContext) -> list[OrchestratorWorkflow]:
    return sorted(
        (*context.finished_orchestrators, *context.active_orchestrators),
        key=lambda workflow: workflow.updated_at or "",
    )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name)
