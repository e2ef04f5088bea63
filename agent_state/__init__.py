"""Durable state for async agents, as plain JSON files that survive kill -9."""

from __future__ import annotations

from agent_state.clock import Clock, SystemClock
from agent_state.codec import ModelStateValidator
from agent_state.errors import (
    AgentStateError,
    DedupeKeyReusedError,
    DurabilityUnknownError,
    InvalidKeyError,
    LeaseLostError,
    LockTimeoutError,
    MirrorError,
    MissingExtraError,
    RevisionConflictError,
    RuntimeNotStartedError,
    SchemaTooNewError,
    SerializationError,
    StateCorruptedError,
    StateDirectoryInUseError,
    StateNotFoundError,
    StateValidationError,
    StorageError,
    StorageFullError,
    TaskFailedError,
    TaskTimeoutError,
    UnknownStepError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import (
    AgentState,
    MailboxState,
    MailMessage,
    SleepState,
    SystemState,
    Task,
    TaskQueueState,
)
from agent_state.protocols import StateSerializer, StateStore, StateValidator
from agent_state.runtime import (
    AsyncAgentSessionManager,
    AttachedSessions,
    RestoreReport,
    RetryPolicy,
    SessionSource,
    TaskContext,
    TaskFilter,
    TaskReport,
    TaskRequest,
    attach,
)
from agent_state.serializers import JSONStateSerializer
from agent_state.storage import FileStateStore, MemoryStateStore, WALStateStore

__version__ = "0.2.0"

__all__ = [
    "AgentState",
    "AgentStateError",
    "AsyncAgentSessionManager",
    "AttachedSessions",
    "Clock",
    "DedupeKeyReusedError",
    "DurabilityUnknownError",
    "FileStateStore",
    "InvalidKeyError",
    "JSONStateSerializer",
    "LeaseLostError",
    "LockTimeoutError",
    "MailMessage",
    "MailboxState",
    "MemoryStateStore",
    "MirrorError",
    "MissingExtraError",
    "ModelStateValidator",
    "RestoreReport",
    "RetryPolicy",
    "RevisionConflictError",
    "RuntimeNotStartedError",
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
    "TaskContext",
    "TaskFailedError",
    "TaskFilter",
    "TaskQueueState",
    "TaskReport",
    "TaskRequest",
    "TaskTimeoutError",
    "UnknownStepError",
    "WALStateStore",
    "attach",
]
