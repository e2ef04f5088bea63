"""People's sessions: their tokens, conversations, workflows and states."""

from agent_state.errors import (
    InvalidConversationIdError,
    SessionNotFoundError,
    UnknownAgentTypeError,
    UnknownRoleError,
    UnknownTokenError,
)
from agent_state.sessions.manager import SessionManager
from agent_state.sessions.models import (
    EXTENSION_FIELDS,
    FINISHED,
    SESSIONS,
    AddedMessage,
    CleanupResult,
    Conversation,
    ConversationPage,
    CreatedSession,
    MergeMode,
    NewMessage,
    Session,
    SessionHistory,
    SessionMessage,
    SessionState,
    SessionValidity,
    WorkflowState,
    deep_merge,
)
from agent_state.sessions.names import NameRegistry
from agent_state.sessions.repository import SessionDraft, SessionExtension

__all__ = [
    "EXTENSION_FIELDS",
    "FINISHED",
    "SESSIONS",
    "AddedMessage",
    "CleanupResult",
    "Conversation",
    "ConversationPage",
    "CreatedSession",
    "InvalidConversationIdError",
    "MergeMode",
    "NameRegistry",
    "NewMessage",
    "Session",
    "SessionDraft",
    "SessionExtension",
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
    "deep_merge",
]
