"""Agents that run in one process and survive its end."""

from __future__ import annotations

from agent_state.runtime.attach import AttachedSessions, SessionSource, attach
from agent_state.runtime.context import TaskContext
from agent_state.runtime.recovery import RestoreReport
from agent_state.runtime.runtime import AsyncAgentSessionManager
from agent_state.runtime.transitions import RetryPolicy

__all__ = [
    "AsyncAgentSessionManager",
    "AttachedSessions",
    "RestoreReport",
    "RetryPolicy",
    "SessionSource",
    "TaskContext",
    "attach",
]
