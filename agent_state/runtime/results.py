"""Who waits for a task to end, and is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from agent_state.errors import Key, TaskFailedError
from agent_state.models import Task
from agent_state.runtime.core import Core
from agent_state.runtime.live import own
from agent_state.tasks import is_finished


class Results:
    """The waiters of one runtime, by agent and task: an id is its agent's own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._waiters: dict[Key, list[asyncio.Future[Task]]] = {}

    def __len__(self) -> int:
        """How many tasks are waited for."""
        return len(self._waiters)

    @contextlib.contextmanager
    def waiting(self, task: Task) -> Iterator[asyncio.Future[Task]]:
        """A future for the task in its final state."""
        key = (task.agent_id, task.task_id)
        waiter: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, []).append(waiter)
        try:
            yield waiter
        finally:
            waiter.cancel()
            others = [other for other in self._waiters.pop(key, ()) if not other.done()]
            if others:
                self._waiters[key] = others

    def tell_finished(self, task: Task) -> None:
        """Wake those who wait for this task."""
        for waiter in self._waiters.pop((task.agent_id, task.task_id), ()):
            if not waiter.done():
                waiter.set_result(task)

    def tell_stopped(self) -> None:
        """Wake all who wait: nothing is done here any more."""
        while self._waiters:
            key, waiters = self._waiters.popitem()
            agent = self._core.agents.get(key[0])
            live = agent.tasks.get(key[1]) if agent is not None else None
            status = live.task.status if live is not None else "pending"
            for waiter in waiters:
                if not waiter.done():
                    said = "the runtime was stopped first"
                    waiter.set_exception(TaskFailedError(status, said, key=key))

    async def catch_up(self) -> None:
        """Tell those who wait for a task that has ended without our being told."""
        for key in list(self._waiters):
            stored = await self._core.manager.load("tasks", key)
            if isinstance(stored, Task) and is_finished(stored):
                self.tell_finished(own(stored, key))
