"""Agents that live in one process and outlive it."""

from __future__ import annotations

from agent_state.runtime.attach import AttachedSessions, SessionSource, attach
from agent_state.runtime.context import TaskContext
from agent_state.runtime.report import RestoreReport
from agent_state.runtime.sessions import AsyncAgentSessionManager

__all__ = [
    "AsyncAgentSessionManager",
    "AttachedSessions",
    "RestoreReport",
    "SessionSource",
    "TaskContext",
    "attach",
]
