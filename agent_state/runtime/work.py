"""Tasks: submit, follow, cancel, wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from agent_state import tasks as task_rules
from agent_state.errors import (
    AgentStateError,
    RevisionConflictError,
    StateNotFoundError,
    TaskFailedError,
)
from agent_state.models import ARCHIVE, Task
from agent_state.runtime.live import LiveTask
from agent_state.runtime.parts import Parts
from agent_state.runtime.restore import take_in


class WorkMethods(Parts):
    """What a runtime does with tasks."""

    # -- work --------------------------------------------------------------------------------

    async def submit(
        self,
        agent_id: str,
        name: str,
        payload: Mapping[str, Any] | None = None,
        *,
        priority: str = "normal",
        delay_seconds: float = 0.0,
        max_attempts: int = 3,
        timeout_seconds: float | None = None,
        dedupe_key: str | None = None,
    ) -> Task:
        """Queue a task; it is stored when this returns.

        A ``dedupe_key`` that the agent has a task for already returns that task, in whatever
        state, until cleaning up has moved it away. Raises ``StateNotFoundError`` for an unknown
        agent.
        """
        agent = self._agent(agent_id)
        task_id = self.core.new_id() if dedupe_key is None else _dedupe_id(agent_id, dedupe_key)
        task = task_rules.new_task(
            task_id,
            agent_id,
            name,
            payload or {},
            now=self.core.now(),
            priority=priority,
            delay_seconds=delay_seconds,
            max_attempts=max_attempts,
            timeout_seconds=timeout_seconds,
            dedupe_key=dedupe_key,
        )
        try:
            revision = await self.manager.save("tasks", (agent_id, task_id), task, expected=0)
        except RevisionConflictError:
            if dedupe_key is None:
                raise  # an id factory that repeats itself
            await self._take_in_stored(task)
            return await self.task(task)
        except asyncio.CancelledError:
            await self._take_in_stored(task)  # the change was handed over, and may have been made
            raise
        if task_id not in agent.tasks:  # or else somebody has read it, and may have gone on
            agent.put(LiveTask(task, revision), task, revision)
        agent.changed.set()
        return task.model_copy(deep=True)

    async def _take_in_stored(self, task: Task) -> None:
        """Let the agent have a task that was stored while nobody waited for it."""
        agent, key = self._agent(task.agent_id), (task.agent_id, task.task_id)
        with contextlib.suppress(AgentStateError):
            stored = await self.manager.load_with_revision("tasks", key)
            if stored is not None and task.task_id not in agent.tasks:
                take_in(agent, stored)
                agent.changed.set()

    async def task(self, task: Task) -> Task:
        """The task as it is stored now, or was cleaned up. Raises ``StateNotFoundError``."""
        key = (task.agent_id, task.task_id)
        stored = await self.manager.load("tasks", key)
        if isinstance(stored, Task):
            return stored
        async for entry in self.manager.read_log("tasks", (task.agent_id, ARCHIVE)):
            if entry.record.get("task_id") == task.task_id:
                return Task.model_validate(entry.record)
        raise StateNotFoundError("no such task", kind="tasks", key=key)

    async def result(self, task: Task) -> Any:
        """What the task's handler returned, once it has.

        Raises ``TaskFailedError`` when it ended as ``dead`` or ``cancelled``, or when the
        runtime stops first; its ``status`` says which. ``StateNotFoundError`` when there is no
        such task, or it is not finished and its agent is not here.
        """
        with self._runner.results.waiting(task) as waiter:
            done = await self.task(task)
            if not task_rules.is_finished(done):
                self._agent(task.agent_id)
                done = await waiter
        if done.status != "completed":
            raise TaskFailedError(done.status, done.error, key=(task.agent_id, task.task_id))
        return done.result

    async def cancel(self, task: Task) -> bool:
        """Cancel a task, running or not; whether it was not finished yet."""
        agent = self._agent(task.agent_id)
        live = agent.tasks.get(task.task_id)
        if live is None or not await self.core.save(agent, live=live, change=self._cancelled):
            return False
        if task_rules.is_finished(live.task):
            self._runner.results.tell_finished(live.task)
            self.core.activity.set()
        elif live is agent.current:
            self._runner.stop(agent, "cancel")
        return True

    def _cancelled(self, task: Task) -> Task | None:
        """Decided once nobody else is saving: it may just have been claimed, or have ended."""
        if task_rules.is_finished(task):
            return None
        if task.status == "in_progress":
            return task.model_copy(update={"cancel_requested": True})
        return task_rules.cancel(task, self.core.now())

    async def wait_idle(self) -> None:
        """Until no task runs, is due, or waits for its next attempt.

        Tasks that start later, of sleeping or stopped agents, and of agents without a handler
        are not waited for.
        """
        while True:
            self.core.activity.clear()
            if not self._runner.busy:
                now = self.core.now()
                if all(agent.is_idle(now) for agent in self.core.agents.values()):
                    return
            await self.core.activity.wait()


def _dedupe_id(agent_id: str, dedupe_key: str) -> str:
    """The task id that an agent's dedupe key stands for: the same key is the same document.

    Two agents' tasks never share an id, because what a task sends is named after it.
    """
    name = f"{agent_id}\0{dedupe_key}".encode("utf-8", "surrogatepass")
    return f"once-{sha256(name).hexdigest()[:20]}"
