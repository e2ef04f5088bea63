"""The backends that the tests of the TypeScript packages serve."""

from __future__ import annotations

from pathlib import Path

from agent_state import AsyncAgentSessionManager, Task, TaskContext
from agent_state.sessions import SessionManager
from agent_state.web import LiveBackend


def impatient(state: Path) -> LiveBackend:
    """Sessions that end two seconds after the last write."""
    runtime = AsyncAgentSessionManager(state)
    return LiveBackend(runtime=runtime, sessions=SessionManager(runtime.manager, ttl_seconds=2))


def busy(state: Path) -> LiveBackend:
    """Agents of type ``worker`` count the words of a text."""
    runtime = AsyncAgentSessionManager(state)

    @runtime.handler("worker")
    async def count_words(_: TaskContext, task: Task) -> int:
        return len(str(task.payload["text"]).split())

    return LiveBackend(runtime=runtime)
