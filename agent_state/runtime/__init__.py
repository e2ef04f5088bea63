"""Agents that run in one process and survive its end."""

from __future__ import annotations

from agent_state.runtime.agents import AgentService
from agent_state.runtime.attached_sessions import AttachedSessions, SessionSource, attach
from agent_state.runtime.context import TaskContext
from agent_state.runtime.mail import MailService
from agent_state.runtime.operations import TaskFilter, TaskReport, TaskRequest
from agent_state.runtime.rate_limits import RateLimit
from agent_state.runtime.recovery import RestoreReport
from agent_state.runtime.runtime import AgentRuntime, AsyncAgentSessionManager
from agent_state.runtime.statistics import RuntimeStatistics, stored_metrics
from agent_state.runtime.tasks import TaskService
from agent_state.runtime.transitions import RetryPolicy

__all__ = [
    "AgentRuntime",
    "AgentService",
    "AsyncAgentSessionManager",
    "AttachedSessions",
    "MailService",
    "RateLimit",
    "RestoreReport",
    "RetryPolicy",
    "RuntimeStatistics",
    "SessionSource",
    "TaskContext",
    "TaskFilter",
    "TaskReport",
    "TaskRequest",
    "TaskService",
    "attach",
    "stored_metrics",
]
