"""Durable state for async agents, as plain JSON files that survive kill -9."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_state.clock import Clock, SystemClock
    from agent_state.codec import ModelStateValidator
    from agent_state.errors import (
        AgentStateError,
        DedupeKeyReusedError,
        DurabilityUnknownError,
        InvalidKeyError,
        InvalidPayloadError,
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
        UnmergedStateError,
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
        AgentRuntime,
        AsyncAgentSessionManager,
        AttachedSessions,
        RateLimit,
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
    from agent_state.tool_calls import UNKNOWN_OUTCOME, ToolCall, ToolCallRepair, repair_tool_calls

__version__ = "0.2.0"

__all__ = [
    "UNKNOWN_OUTCOME",
    "AgentRuntime",
    "AgentState",
    "AgentStateError",
    "AsyncAgentSessionManager",
    "AttachedSessions",
    "Clock",
    "DedupeKeyReusedError",
    "DurabilityUnknownError",
    "FileStateStore",
    "InvalidKeyError",
    "InvalidPayloadError",
    "JSONStateSerializer",
    "LeaseLostError",
    "LockTimeoutError",
    "MailMessage",
    "MailboxState",
    "MemoryStateStore",
    "MirrorError",
    "MissingExtraError",
    "ModelStateValidator",
    "RateLimit",
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
    "ToolCall",
    "ToolCallRepair",
    "UnknownStepError",
    "UnmergedStateError",
    "WALStateStore",
    "attach",
    "repair_tool_calls",
]

_HOMES = {
    "clock": ("Clock", "SystemClock"),
    "codec": ("ModelStateValidator",),
    "errors": (
        "AgentStateError",
        "DedupeKeyReusedError",
        "DurabilityUnknownError",
        "InvalidKeyError",
        "InvalidPayloadError",
        "LeaseLostError",
        "LockTimeoutError",
        "MirrorError",
        "MissingExtraError",
        "RevisionConflictError",
        "RuntimeNotStartedError",
        "SchemaTooNewError",
        "SerializationError",
        "StateCorruptedError",
        "StateDirectoryInUseError",
        "StateNotFoundError",
        "StateValidationError",
        "StorageError",
        "StorageFullError",
        "TaskFailedError",
        "TaskTimeoutError",
        "UnknownStepError",
        "UnmergedStateError",
    ),
    "manager": ("StatePersistenceManager",),
    "models": (
        "AgentState",
        "MailboxState",
        "MailMessage",
        "SleepState",
        "SystemState",
        "Task",
        "TaskQueueState",
    ),
    "protocols": ("StateSerializer", "StateStore", "StateValidator"),
    "runtime": (
        "AgentRuntime",
        "AsyncAgentSessionManager",
        "AttachedSessions",
        "RateLimit",
        "RestoreReport",
        "RetryPolicy",
        "SessionSource",
        "TaskContext",
        "TaskFilter",
        "TaskReport",
        "TaskRequest",
        "attach",
    ),
    "serializers": ("JSONStateSerializer",),
    "storage": ("FileStateStore", "MemoryStateStore", "WALStateStore"),
    "tool_calls": ("UNKNOWN_OUTCOME", "ToolCall", "ToolCallRepair", "repair_tool_calls"),
}
"""Where each name is defined. Its module is imported when the name is asked for."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # to a type checker an unknown name stays unknown

    def __getattr__(name: str) -> Any:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
        return value

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
