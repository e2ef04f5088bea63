"""The calls of the first design of sessions, made on today's ``SessionManager``.

A program that was written for that design keeps its calls: arguments by position, plain dicts
and lists as results. New programs use ``SessionManager`` and ``Orchestration``, whose results are
models, and which read conversations page by page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_state.errors import StateValidationError
from agent_state.sessions import SessionManager
from agent_state_integrations.orchestration.orchestration import Orchestration

_PAGE = 1000
_KNOWN = frozenset({"workflow_id", "status", "progress", "enabling_services"})


class SessionManagerService:
    """``SessionManager`` and ``Orchestration`` by the names of the first design.

    Every method raises what the method that it calls raises.
    """

    def __init__(
        self, sessions: SessionManager, orchestration: Orchestration | None = None
    ) -> None:
        self.sessions = sessions
        self.orchestration = orchestration or Orchestration.of(sessions)

    # -- sessions ----------------------------------------------------------------------------

    async def create_session(
        self, user_id: str | None = None, context: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A new session with its ``session_token``, which is only given here."""
        created = await self.sessions.create(user_id, context=dict(context or {}))
        return {**created.session.model_dump(), "session_token": created.session_token}

    async def get_session(self, session_id: str) -> dict[str, Any]:
        """The session."""
        return (await self.sessions.get(session_id)).model_dump()

    async def update_session(
        self, session_id: str, state_data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Merge into the session's state; the session as it is then."""
        return (await self.sessions.update(session_id, state=dict(state_data))).model_dump()

    async def destroy_session(self, session_id: str) -> bool:
        """Erase the session; whether it existed."""
        return await self.sessions.destroy(session_id)

    # -- conversations -----------------------------------------------------------------------

    async def add_conversation_message(
        self,
        session_id: str,
        agent_type: str,
        role: str,
        content: Any,
        orchestrator_context: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Append a message; ``message_count`` is its number."""
        added = await self.sessions.conversations.add(
            session_id, agent_type, role, content, orchestrator_context=orchestrator_context
        )
        return {
            "success": True,
            "session_id": session_id,
            "agent_type": agent_type,
            "message_id": added.message.message_id,
            "message_count": added.message_count,
        }

    async def get_conversation_history(
        self, session_id: str, agent_type: str
    ) -> list[dict[str, Any]]:
        """All messages of a conversation, oldest first."""
        found: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            page = await self.sessions.conversations.page(
                session_id, agent_type, after=after, limit=_PAGE
            )
            found += (message.model_dump() for message in page.messages)
            after = page.next_after
        return found

    async def update_conversation_orchestrator_context(
        self, session_id: str, agent_type: str, orchestrator_context: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Merge into the workflow context of a conversation; the context as it is then."""
        conversation = await self.sessions.conversations.update_context(
            session_id, agent_type, dict(orchestrator_context)
        )
        return conversation.orchestrator_context

    # -- orchestrators -----------------------------------------------------------------------

    async def track_orchestrator_workflow(
        self, session_id: str, orchestrator_name: str, workflow_data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Report a workflow by its ``workflow_id``, ``status`` and ``enabling_services``.

        Further fields of ``workflow_data`` are kept in the workflow's ``data``. Raises
        ``StateValidationError`` without a ``workflow_id``.
        """
        workflow_id = workflow_data.get("workflow_id")
        if not isinstance(workflow_id, str) or not workflow_id:
            raise StateValidationError('workflow_data needs a "workflow_id", which is text')
        workflow = await self.orchestration.track(
            session_id,
            orchestrator_name,
            workflow_id,
            status=str(workflow_data.get("status", "active")),
            progress=workflow_data.get("progress"),
            enabling_services=workflow_data.get("enabling_services", ()),
            data={name: each for name, each in workflow_data.items() if name not in _KNOWN},
        )
        return workflow.model_dump()

    async def get_orchestrator_state(
        self, session_id: str, orchestrator_name: str
    ) -> dict[str, Any]:
        """The workflows of an orchestrator and its status."""
        return (await self.orchestration.state(session_id, orchestrator_name)).model_dump()

    async def update_enabling_service_status(
        self, session_id: str, service_name: str, status: str | Mapping[str, Any]
    ) -> dict[str, Any]:
        """Report that a service was used, and its status; the service as it is then."""
        service = await self.orchestration.report_service(session_id, service_name, status)
        return service.model_dump()
