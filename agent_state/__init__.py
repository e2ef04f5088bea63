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
    StateDirectoryInUse,
    StateNotFoundError,
    StateValidationError,
    StorageError,
    StorageFullError,
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
from agent_state.serializers import JSONStateSerializer
from agent_state.storage import FileStateStore, JournaledStateStore, MemoryStateStore
from agent_state.validators import ModelStateValidator

__version__ = "0.1.0"

__all__ = [
    "AgentState",
    "AgentStateError",
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
    "RevisionConflictError",
    "SchemaTooNewError",
    "SerializationError",
    "SleepState",
    "StateCorruptedError",
    "StateDirectoryInUse",
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
    "TaskQueueState",
    "UnknownStepError",
]
