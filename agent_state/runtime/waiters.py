"""What waits for the end of tasks: callers in this process, and tasks whose handlers wait.

A handler that waits has ended its attempt: its task names, in ``waits_for``, what it waits for,
and is held in memory until that has ended. So it occupies no agent, and after a restart it is
held again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

from agent_state.errors import Key, StateNotFoundError, TaskFailedError
from agent_state.models import Task
from agent_state.runtime import transitions
from agent_state.runtime.live_agent import LiveAgent, with_stored_id
from agent_state.runtime.state import RuntimeState
from agent_state.runtime.task_queue import LiveTask


class TaskWaiters:
    """The callers and tasks that wait for a task to end. An id is unique for its agent only."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start: its futures are bound to an event loop."""
        self._waiters: dict[Key, list[asyncio.Future[Task]]] = {}
        self._held: dict[Key, dict[Key, tuple[LiveAgent, LiveTask]]] = {}
        """The tasks that are held, by their keys, below the key of each that they wait for."""

    def __len__(self) -> int:
        """Return how many tasks are waited for."""
        return len(self._waiters.keys() | self._held.keys())

    # -- callers -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def waiting(self, key: Key) -> Iterator[asyncio.Future[Task]]:
        """Give a future for the task in its final state."""
        waiter: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, []).append(waiter)
        try:
            yield waiter
        finally:
            waiters = self._waiters.get(key, [])
            if waiter in waiters:  # it was not notified
                waiters.remove(waiter)
                if not waiters:
                    del self._waiters[key]

    def notify_finished(self, task: Task) -> None:
        """Wake the callers that wait for this task, and let tasks go on that do."""
        key = (task.agent_id, task.task_id)
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(task)
        self._release(key)

    def notify_deleted(self, key: Key) -> None:
        """Fail the waits of callers for this task, and let tasks go on that wait for it."""
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                error = StateNotFoundError("the task was deleted", kind="tasks", key=key)
                waiter.set_exception(error)
        self._release(key)

    def notify_stopped(self) -> None:
        """Fail every wait of a caller: the runtime stops."""
        self._held = {}
        while self._waiters:
            key, waiters = self._waiters.popitem()
            agent = self._state.agents.get(key[0])
            live = agent.tasks.get(key[1]) if agent is not None else None
            status = live.task.status if live is not None else "pending"
            for waiter in waiters:
                if not waiter.done():
                    how = "aborted" if self._state.aborted else "stopped"
                    reason = f"the runtime was {how} first"
                    waiter.set_exception(TaskFailedError(status, reason, key=key))

    async def refresh(self) -> None:
        """Notify those that wait for a task that another runtime has finished."""
        for key in [*self._waiters]:
            stored = await self._state.manager.load("tasks", key)
            if isinstance(stored, Task) and transitions.is_finished(stored):
                self.notify_finished(with_stored_id(stored, key))
            elif stored is None and not await self.is_unfinished(key):
                self.notify_deleted(key)  # or archived
        for key in [*self._held]:
            if not await self.is_unfinished(key):
                self._release(key)

    # -- tasks -------------------------------------------------------------------------------

    async def hold(self, agent: LiveAgent, live: LiveTask) -> bool:
        """Hold a task until all have ended that it waits for; return False if they have.

        Also if its time is over.
        """
        if live.waited_until(self._state.clock.now()):
            return False
        if live.awaits is None:
            agent.hold(live)
            # They are noted before they are looked at, so that no end is missed.
            live.awaits = {(task.agent_id, task.task_id) for task in live.task.waits_for}
            for key in live.awaits:
                parents = self._held.setdefault(key, {})
                parents[agent.agent_id, live.task.task_id] = (agent, live)
            try:
                for key in [*live.awaits]:
                    if not await self.is_unfinished(key):
                        self._release(key)
                own = (agent.agent_id, live.task.task_id)
                if live.awaits and await self.is_awaited_by(own, live.awaits):
                    live.awaits = set()  # the handler is told
                    agent.release(live)
            except BaseException:
                live.awaits = None  # it is looked at again
                agent.release(live)
                raise
        return bool(live.awaits)

    def _release(self, key: Key) -> None:
        """Let the tasks go on that waited for this one alone."""
        for agent, live in self._held.pop(key, {}).values():
            if live.awaits is not None:
                live.awaits.discard(key)
                if not live.awaits and live.held:
                    agent.release(live)

    async def is_unfinished(self, key: Key) -> bool:
        """Whether there is such a task, and it has not ended."""
        agent = self._state.agents.get(key[0])
        if agent is not None and agent.leased and key[1] in agent.tasks:
            return True
        stored = await self._state.manager.load("tasks", key)
        return isinstance(stored, Task) and not transitions.is_finished(stored)

    async def is_awaited_by(self, key: Key, tasks: Iterable[Key]) -> bool:
        """Whether one of these tasks is the task with that key, or waits for it."""
        seen, left = set[Key](), [*tasks]
        while left:
            other = left.pop()
            if other == key:
                return True
            if other not in seen:
                seen.add(other)
                stored = await self._state.manager.load("tasks", other)
                if isinstance(stored, Task):
                    left += [(task.agent_id, task.task_id) for task in stored.waits_for]
        return False
