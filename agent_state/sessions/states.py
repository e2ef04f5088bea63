"""State documents linked to a session: what was worked out in it, by whom, with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from agent_state.errors import StateNotFoundError
from agent_state.models import detached
from agent_state.sessions.lifecycle import is_over
from agent_state.sessions.models import STATES, Contribution, OrchestratorMetadata, SessionState
from agent_state.sessions.parts import SessionParts
from agent_state.sessions.saving import Draft


class StateMethods(SessionParts):
    """What a session manager does with state documents."""

    async def persist_session_state(
        self,
        session_id: str,
        state_data: Mapping[str, Any],
        *,
        state_id: str = "session",
        orchestrator: str | None = None,
        workflow_id: str | None = None,
        delegation_chain: Iterable[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        ttl: float | None = None,
    ) -> SessionState:
        """Store a state of the session, in the place of the one with this id.

        What is None is kept from the one before, as contributions and ``created_at`` are; but
        ``ttl``, seconds, counts from now: None is for as long as the session lives.
        """
        data = detached(dict(state_data))
        chain = None if delegation_chain is None else list(delegation_chain)

        def change(state: SessionState) -> None:
            state.state_data = data
            origin = state.orchestrator_metadata
            if orchestrator is not None:
                origin.created_by_orchestrator = orchestrator
            if workflow_id is not None:
                origin.workflow_id = workflow_id
            if chain is not None:
                origin.delegation_chain = chain
            state.orchestrator_metadata = origin
            if metadata is not None:
                state.metadata = detached(dict(metadata))
            state.ttl = ttl

        return await self._save_state(session_id, state_id, change, new=True)

    async def add_state_contribution(
        self, session_id: str, service: str, contribution: Any, *, state_id: str = "session"
    ) -> SessionState:
        """Add what a service gave to a state. Raises ``StateNotFoundError`` without the state."""
        given = detached(contribution)

        def change(state: SessionState) -> None:
            added = Contribution(service=service, contribution=given, timestamp=state.stored_at)
            state.orchestrator_metadata.enabling_service_contributions.append(added)

        return await self._save_state(session_id, state_id, change, new=False)

    async def restore_session_state(
        self, session_id: str, state_id: str = "session"
    ) -> SessionState:
        """The state as it was persisted. Raises ``StateNotFoundError``, also when it is over."""
        await self._live(session_id)
        found = await self.manager.load(STATES, (session_id, state_id))
        if not isinstance(found, SessionState) or is_over(found, self.clock.now()):
            raise _no_state(session_id, state_id)
        return found

    async def list_session_states(self, session_id: str) -> list[SessionState]:
        """All states of the session that are not over, by id."""
        await self._live(session_id)
        now = self.clock.now()
        found = [
            loaded.state
            async for loaded in self.manager.scan(STATES, session_id)
            if isinstance(loaded.state, SessionState) and not is_over(loaded.state, now)
        ]
        return sorted(found, key=lambda state: state.state_id)

    async def delete_session_state(self, session_id: str, state_id: str) -> bool:
        """Remove a state; whether there was one."""
        there: list[bool] = []

        async def work(draft: Draft) -> None:
            there[:] = [await self.manager.load(STATES, (session_id, state_id)) is not None]
            draft.nothing = not there[0]
            draft.group.delete(STATES, (session_id, state_id))
            draft.tell("state_deleted", state_id=state_id)

        await self._change(session_id, work)
        return there[0]

    async def _save_state(
        self, session_id: str, state_id: str, change: Any, *, new: bool
    ) -> SessionState:
        result: list[SessionState] = []
        key = (session_id, state_id)

        async def work(draft: Draft) -> None:
            loaded = await self.manager.load_with_revision(STATES, key)
            state = cast("SessionState | None", loaded.state if loaded else None)
            if state is not None and is_over(state, draft.now):
                state = None
            if state is None:
                if not new:
                    raise _no_state(session_id, state_id)
                state = SessionState(
                    state_id=state_id,
                    session_id=session_id,
                    orchestrator_metadata=OrchestratorMetadata(),
                    created_at=draft.time,
                    stored_at=draft.time,
                )
            state.stored_at = draft.time
            change(state)
            expected = loaded.revision if loaded else 0
            draft.group.save(STATES, key, state, expected=expected)
            draft.tell("state_stored", state_id=state_id)
            result[:] = [state]

        await self._change(session_id, work)
        return result[0]


def _no_state(session_id: str, state_id: str) -> StateNotFoundError:
    return StateNotFoundError("there is no such state", kind=STATES, key=(session_id, state_id))
