"""The workflows that a session follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_state.errors import StateNotFoundError
from agent_state.models import detached
from agent_state.sessions.models import FINISHED, SESSIONS, WorkflowState, deep_merge
from agent_state.sessions.repository import SessionDraft, SessionRepository


class Workflows:
    """``sessions.workflows``: the status of each workflow behind a session, by its id.

    Any id and any status are accepted; ``orchestration`` of the integrations adds orchestrators,
    enabling services and delegation chains.
    """

    def __init__(self, repository: SessionRepository) -> None:
        self._repository = repository

    async def track(
        self,
        session_id: str,
        workflow_id: str,
        *,
        status: str = "active",
        data: Mapping[str, Any] | None = None,
    ) -> WorkflowState:
        """Report a workflow's status; the workflow as it is then. The first report adds it.

        ``data`` is deep-merged into what was reported before. Raises ``SessionNotFoundError``,
        ``SessionExpiredError``, ``StateValidationError``.
        """
        given = detached(dict(data or {}))

        async def report(draft: SessionDraft) -> WorkflowState:
            workflows = draft.session.workflow_states
            workflow = workflows.get(workflow_id) or WorkflowState(
                workflow_id=workflow_id, tracked_at=draft.time, updated_at=draft.time
            )
            workflow.status = status
            workflow.updated_at = draft.time
            workflow.data = deep_merge(workflow.data, given)
            workflows[workflow_id] = workflow
            draft.record_event("workflow_state", workflow_id=workflow_id, status=status)
            return workflow

        return await self._repository.change(session_id, report)

    async def get(self, session_id: str, workflow_id: str) -> WorkflowState:
        """The workflow as it was last reported.

        Raises ``StateNotFoundError`` when it was never reported, and as ``track`` does.
        """
        session = await self._repository.live(session_id)
        found = session.workflow_states.get(workflow_id)
        if found is None:
            raise StateNotFoundError(
                f"the session follows no workflow {workflow_id!r:.80}",
                kind=SESSIONS,
                key=session_id,
            )
        return found

    async def unfinished(self, session_id: str) -> list[WorkflowState]:
        """The workflows that have not finished, in the order of their first report."""
        session = await self._repository.live(session_id)
        return [each for each in session.workflow_states.values() if each.status not in FINISHED]
