"""State documents of a session: results and intermediate data, with their origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, cast

from agent_state.clock import instant, later
from agent_state.errors import StateNotFoundError
from agent_state.models import detached
from agent_state.sessions.models import STATES, Contribution, SessionState
from agent_state.sessions.repository import SessionDraft, SessionRepository


class SessionStates:
    """``sessions.states``: stores, reads and deletes the state documents of sessions.

    Every method raises ``SessionNotFoundError`` and ``SessionExpiredError``.
    """

    def __init__(self, repository: SessionRepository) -> None:
        self._repository = repository
        self._manager = repository.manager
        self._clock = repository.clock

    async def save(
        self,
        session_id: str,
        state_data: Mapping[str, Any],
        *,
        state_id: str = "session",
        orchestrator: str | None = None,
        workflow_id: str | None = None,
        delegation_chain: Iterable[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        ttl_seconds: float | None = None,
    ) -> SessionState:
        """Store a state under its id, in place of the former one.

        An argument that is None keeps the former value, as contributions and ``created_at`` are
        kept; but ``ttl_seconds`` counts from now, and None means the life of the session. Raises
        ``StateValidationError``, ``InvalidKeyError``.
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
            if metadata is not None:
                state.metadata = detached(dict(metadata))
            state.ttl = ttl_seconds

        return await self._change(session_id, state_id, change, create=True)

    async def add_contribution(
        self, session_id: str, service: str, contribution: Any, *, state_id: str = "session"
    ) -> SessionState:
        """Add a service's contribution to a state; the state as it is then.

        Raises ``StateNotFoundError`` when the state does not exist.
        """
        given = detached(contribution)

        def change(state: SessionState) -> None:
            added = Contribution(service=service, contribution=given, timestamp=state.stored_at)
            state.orchestrator_metadata.enabling_service_contributions.append(added)

        return await self._change(session_id, state_id, change, create=False)

    async def load(self, session_id: str, state_id: str = "session") -> SessionState:
        """The state. Raises ``StateNotFoundError`` when it does not exist or has expired."""
        await self._repository.live(session_id)
        found = await self._manager.load(STATES, (session_id, state_id))
        if not isinstance(found, SessionState) or has_expired(found, self._clock.now()):
            raise _no_state(session_id, state_id)
        return found

    async def load_all(self, session_id: str) -> list[SessionState]:
        """The states of the session that have not expired, by id."""
        await self._repository.live(session_id)
        now = self._clock.now()
        found = [
            loaded.state
            async for loaded in self._manager.scan(STATES, session_id)
            if isinstance(loaded.state, SessionState) and not has_expired(loaded.state, now)
        ]
        return sorted(found, key=lambda state: state.state_id)

    async def delete(self, session_id: str, state_id: str) -> bool:
        """Delete a state; whether it existed."""
        key = (session_id, state_id)

        async def delete(draft: SessionDraft) -> bool:
            exists = await self._manager.load(STATES, key) is not None
            draft.skip_commit = not exists
            draft.group.delete(STATES, key)
            draft.record_event("state_deleted", state_id=state_id)
            return exists

        return await self._repository.change(session_id, delete)

    async def _change(
        self,
        session_id: str,
        state_id: str,
        change: Callable[[SessionState], None],
        *,
        create: bool,
    ) -> SessionState:
        key = (session_id, state_id)

        async def store(draft: SessionDraft) -> SessionState:
            loaded = await self._manager.load_with_revision(STATES, key)
            state = cast("SessionState | None", loaded.state if loaded else None)
            if state is None or has_expired(state, draft.now):
                if not create:
                    raise _no_state(session_id, state_id)
                state = SessionState(
                    state_id=state_id,
                    session_id=session_id,
                    created_at=draft.time,
                    stored_at=draft.time,
                )
            state.stored_at = draft.time
            change(state)
            draft.group.save(STATES, key, state, expected=loaded.revision if loaded else 0)
            draft.record_event("state_stored", state_id=state_id)
            return state

        return await self._repository.change(session_id, store)


def has_expired(state: SessionState, now: datetime) -> bool:
    """Whether the state's own time is over."""
    return state.ttl is not None and later(instant(state.stored_at), state.ttl) <= now


def _no_state(session_id: str, state_id: str) -> StateNotFoundError:
    return StateNotFoundError("there is no such state", kind=STATES, key=(session_id, state_id))
