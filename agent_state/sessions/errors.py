"""What can go wrong with sessions, beside ``SessionExpiredError`` of ``agent_state.errors``.

StateNotFoundError
├── SessionNotFoundError          no such session, or it was destroyed
└── UnknownTokenError             the token opens no session
StateValidationError
├── UnknownAgentTypeError         no conversation is of this type
├── UnknownRoleError              nobody speaks in this role
└── InvalidConversationIdError    not of the one form that conversation ids have
"""

from __future__ import annotations

from agent_state.errors import StateNotFoundError, StateValidationError


class SessionNotFoundError(StateNotFoundError):
    """There is no such session; if there was, it is destroyed."""


class UnknownTokenError(StateNotFoundError):
    """The token opens no session, or not this one."""


class UnknownAgentTypeError(StateValidationError):
    """No conversation is of this type; the application registers its types."""


class UnknownRoleError(StateValidationError):
    """Nobody speaks in this role."""


class InvalidConversationIdError(StateValidationError):
    """A conversation id is ``conv_<agent type>_<session id>``."""
