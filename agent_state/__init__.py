"""Durable state for async agents, as plain JSON files that survive kill -9."""

from __future__ import annotations

from agent_state.clock import Clock, SystemClock
from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    InvalidKeyError,
    LeaseLostError,
    LockTimeoutError,
    MirrorError,
    MissingExtraError,
    RevisionConflictError,
    SchemaTooNewError,
    SerializationError,
    StateCorruptedError,
    StateDirectoryInUseError,
    StateNotFoundError,
    StateValidationError,
    StorageError,
    StorageFullError,
    TaskFailedError,
    UnknownStepError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import (
    AgentState,
    MailboxState,
    Message,
    SleepState,
    SystemState,
    Task,
    TaskQueueState,
)
from agent_state.protocols import StateSerializer, StateStore, StateValidator
from agent_state.runtime import (
    AgentContext,
    AsyncAgentSessionManager,
    AttachedSessions,
    RestoreReport,
    SessionSource,
    attach,
)
from agent_state.serializers import JSONStateSerializer
from agent_state.storage import FileStateStore, JournaledStateStore, MemoryStateStore
from agent_state.tasks import RetryPolicy
from agent_state.validators import ModelStateValidator

__version__ = "0.1.0"

__all__ = [
    "AgentContext",
    "AgentState",
    "AgentStateError",
    "AsyncAgentSessionManager",
    "AttachedSessions",
    "Clock",
    "DurabilityUnknownError",
    "FileStateStore",
    "InvalidKeyError",
    "JSONStateSerializer",
    "JournaledStateStore",
    "LeaseLostError",
    "LockTimeoutError",
    "MailboxState",
    "MemoryStateStore",
    "Message",
    "MirrorError",
    "MissingExtraError",
    "ModelStateValidator",
    "RestoreReport",
    "RetryPolicy",
    "RevisionConflictError",
    "SchemaTooNewError",
    "SerializationError",
    "SessionSource",
    "SleepState",
    "StateCorruptedError",
    "StateDirectoryInUseError",
    "StateNotFoundError",
    "StatePersistenceManager",
    "StateSerializer",
    "StateStore",
    "StateValidationError",
    "StateValidator",
    "StorageError",
    "StorageFullError",
    "SystemClock",
    "SystemState",
    "Task",
    "TaskFailedError",
    "TaskQueueState",
    "UnknownStepError",
    "attach",
]
