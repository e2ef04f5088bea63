"""Sessions of people: who, for how long, what was said to which agent, which workflows behind it.

What ``SessionManager`` can do (all ``async`` but the first group), by the module it is in:

    parts          register_agent_type(agent_type)
    orchestration  orchestrator_states(session) -> dict[str, str]

    lifecycle      create_session(user_id=None, *, context=None) -> CreatedSession
                   get_session(session_id) -> Session
                   update_session(session_id, state=None, *, context=None, mode="merge") -> Session
                   touch_session(session_id) -> Session
                   destroy_session(session_id) -> bool
                   validate_session(session_id) -> SessionValidity
                   list_user_sessions(user_id) -> list[Session]
                   get_session_history(session_id, *, after=0, limit=100) -> SessionHistory
                   cleanup_expired_sessions() -> CleanupResult
    tokens         resolve_token(token) -> Session
                   authorize(token, session_id) -> Session
                   rotate_token(session_id) -> str
                   revoke_token(session_id) -> bool
    conversations  add_conversation_message(session_id, agent_type, role, content, *,
                       orchestrator_context=None, idempotency_key=None, metadata=None)
                       -> AddedMessage
                   add_conversation_messages(session_id, agent_type, messages)
                       -> list[AddedMessage]
                   get_conversation_history(session_id, agent_type, *, after=None, before=None,
                       limit=50, role=None, workflow_id=None, since=None, until=None, text=None)
                       -> ConversationPage
                   find_conversation(conversation_id) -> tuple[Session, str]
                   update_conversation_orchestrator_context(session_id, agent_type, context, *,
                       mode="merge") -> Conversation
    orchestration  track_orchestrator_workflow(session_id, orchestrator_name, workflow_id, *,
                       status="active", progress=None, enabling_services=(), data=None)
                       -> OrchestratorWorkflow
                   get_orchestrator_state(session_id, orchestrator_name) -> OrchestratorState
                   update_enabling_service_status(session_id, service_name, status=None, *,
                       workflow_id=None, invocations=1) -> EnablingService
                   record_delegation(session_id, source, target, *, workflow_id=None)
                       -> list[Delegation]
                   track_workflow_state(session_id, workflow_id, *, status="active", data=None)
                       -> WorkflowState
    states         persist_session_state(session_id, state_data, *, state_id="session",
                       orchestrator=None, workflow_id=None, delegation_chain=None, metadata=None,
                       ttl=None) -> SessionState
                   restore_session_state(session_id, state_id="session") -> SessionState
                   add_state_contribution(session_id, service, contribution, *,
                       state_id="session") -> SessionState
                   list_session_states(session_id) -> list[SessionState]
                   delete_session_state(session_id, state_id) -> bool
"""

from __future__ import annotations

from agent_state.sessions.conversations import ConversationMethods
from agent_state.sessions.lifecycle import LifecycleMethods
from agent_state.sessions.orchestration import OrchestrationMethods
from agent_state.sessions.states import StateMethods
from agent_state.sessions.tokens import TokenMethods


class SessionManager(
    LifecycleMethods, TokenMethods, ConversationMethods, OrchestrationMethods, StateMethods
):
    """Keeps sessions with their conversations and the workflows behind them.

    ``manager``: an open ``StatePersistenceManager``, whose directory, clock and durability it
    uses; it stays the caller's. ``ttl_seconds``: a session expires so long after its last write.
    ``renew_every``: with more than 0 seconds, messages renew the session only that often (or each
    hundredth of ``ttl_seconds``), which costs much less, and watchers hear of no message between.
    ``max_sessions_per_user``: a user's oldest session gives way to one more; None for no limit;
    anonymous sessions are not counted. ``agent_types`` and ``roles`` are added to the usual ones,
    ``orchestrators`` are those that ``orchestrator_states`` always names. ``new_id`` makes ids
    (random UUIDs by default; no ``_`` in them), ``random_bytes`` the tokens.

    Each change of a session is one commit, and what has returned is durable. Every method that
    takes a session raises ``SessionNotFoundError`` when there is none, or it was destroyed, and
    ``SessionExpiredError`` when its time is over; and what the store raises.
    """
