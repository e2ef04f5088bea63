"""People's sessions: their conversations, the workflows behind them, the way they went."""

from agent_state.sessions.errors import (
    InvalidConversationIdError,
    SessionNotFoundError,
    UnknownAgentTypeError,
    UnknownRoleError,
    UnknownTokenError,
)
from agent_state.sessions.manager import (
    SessionManager,
)
from agent_state.sessions.models import (
    AddedMessage,
    CleanupResult,
    Conversation,
    ConversationPage,
    CreatedSession,
    Delegation,
    EnablingService,
    NewMessage,
    OrchestratorContext,
    OrchestratorState,
    OrchestratorWorkflow,
    Session,
    SessionHistory,
    SessionMessage,
    SessionState,
    SessionValidity,
    WorkflowState,
)

__all__ = [
    "AddedMessage",
    "CleanupResult",
    "Conversation",
    "ConversationPage",
    "CreatedSession",
    "Delegation",
    "EnablingService",
    "InvalidConversationIdError",
    "NewMessage",
    "OrchestratorContext",
    "OrchestratorState",
    "OrchestratorWorkflow",
    "Session",
    "SessionHistory",
    "SessionManager",
    "SessionMessage",
    "SessionNotFoundError",
    "SessionState",
    "SessionValidity",
    "UnknownAgentTypeError",
    "UnknownRoleError",
    "UnknownTokenError",
    "WorkflowState",
]
