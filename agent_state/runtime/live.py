"""One agent as it lives in this process: its state, its open tasks, its mail, its sleep."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agent_state import sleep as sleeping
from agent_state import tasks as rules
from agent_state.errors import Key
from agent_state.models import AgentState, MailMessage, SleepState, Task
from agent_state.protocols import Change

_STALE = 16
"""How many entries of an agent's queues may be out of date before they are made anew."""


@dataclass(slots=True)
class LiveTask:
    """A task with the revision it is stored at (0: not stored yet)."""

    task: Task
    revision: int


def own(task: Task, key: Key) -> Task:
    """The task, named as it is filed: a copied file is a task of its own."""
    if (task.agent_id, task.task_id) != key:
        task.agent_id, task.task_id = key
    return task


class LiveAgent:
    """What the runtime knows of an agent. Only the event loop touches it."""

    def __init__(self, state: AgentState) -> None:
        self.state = state
        self.tasks: dict[str, LiveTask] = {}
        """Those that are not finished."""
        self.mail: dict[str, MailMessage] = {}
        self.sleep: SleepState | None = None
        self.current: LiveTask | None = None
        """The task whose handler runs."""
        self.has_handler = False
        self.leased = True
        """Whether this runtime may run it; never False where the store has one owner."""
        self.fence: Change | None = None
        """The lease as it is stored, where every save is to find it unchanged."""
        self.lock = asyncio.Lock()
        """Held while the agent or one of its tasks is being saved."""
        self.changed = asyncio.Event()
        """Set when its loop should look again."""
        self.loop: asyncio.Task[None] | None = None
        self._ready: list[tuple[tuple[int, str, str], str]] = []
        self._delayed: list[tuple[datetime, str]] = []

    @property
    def agent_id(self) -> str:
        return self.state.agent_id

    def status(self, current: LiveTask | None, *, awake: bool = False) -> str:
        """The word for what it does, with that task running, and once its sleep has ended."""
        if self.state.status == "stopped":
            return "stopped"
        if current is not None:
            return "active"
        if self.sleep is not None and not awake:
            return "sleeping"
        return "idle" if self.has_handler else "waiting"

    def body(self, *, status: str | None = None) -> dict[str, Any]:
        """The state as it is stored, with that status or the one of this moment."""
        body = self.state.model_dump()
        body["status"] = status or self.status(self.current)
        return body

    def may_work(self) -> bool:
        """Whether it may begin a task."""
        return (
            self.has_handler
            and self.leased
            and self.sleep is None
            and self.state.status != "stopped"
        )

    def put(self, live: LiveTask, task: Task, revision: int) -> LiveTask:
        """Take a task in, or its newer version. A finished one is let go of."""
        live.task, live.revision = task, revision
        if rules.is_finished(task):
            self.tasks.pop(task.task_id, None)
            return live
        self.tasks[task.task_id] = live
        self._queue(task)
        if len(self._ready) + len(self._delayed) > 2 * len(self.tasks) + _STALE:
            # Most of what is queued was done, cancelled or put off since.
            self._ready, self._delayed = [], []
            for known in self.tasks.values():
                self._queue(known.task)
        return live

    def _queue(self, task: Task) -> None:
        if task.status not in rules.CLAIMABLE:
            return
        due = rules.due_at(task)
        if due is None:
            heapq.heappush(self._ready, (rules.order(task), task.task_id))
        else:
            heapq.heappush(self._delayed, (due, task.task_id))

    def next_task(self, now: datetime) -> LiveTask | None:
        """What to do next; None when nothing is due."""
        while self._delayed and self._delayed[0][0] <= now:
            _, task_id = heapq.heappop(self._delayed)
            live = self.tasks.get(task_id)
            if live is not None and live.task.status in rules.CLAIMABLE:
                heapq.heappush(self._ready, (rules.order(live.task), task_id))
        while self._ready:
            live = self.tasks.get(self._ready[0][1])
            if live is not None and live.task.status in rules.CLAIMABLE:
                due = rules.due_at(live.task)
                if due is None or due <= now:
                    return live
            heapq.heappop(self._ready)  # claimed, finished or put off since it was queued
        return None

    def next_time(self) -> datetime | None:
        """When to look again if nothing else happens; None for never."""
        if not self.leased:
            return None
        times = [self._delayed[0][0]] if self._delayed and self.may_work() else []
        if self.sleep is not None and (end := sleeping.ends_at(self.sleep)) is not None:
            times.append(end)
        return min(times, default=None)

    def is_idle(self, now: datetime) -> bool:
        """Whether it has nothing to do: no task runs, is due, or waits for its next attempt."""
        if self.current is not None:
            return False
        if not self.may_work():
            return True
        return self.next_task(now) is None and not any(
            live.task.status == "failed" for live in self.tasks.values()
        )

    def unread(self) -> Iterable[MailMessage]:
        return (message for message in self.mail.values() if message.status == "unread")
