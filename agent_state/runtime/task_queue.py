"""The queue of one agent: which of its tasks to do next.

Tasks wait in heaps, by priority and age, those that are not due by their time. An entry stays when
its task is claimed, finished or postponed, and is dropped when it comes to the front. Tasks of a
name that was blocked once are in a heap of their own, so that they are stepped over at no cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from agent_state.errors import Key
from agent_state.models import Task
from agent_state.runtime import transitions

_COMES_AGAIN = frozenset({"failed", "in_progress"})
_MAX_STALE_ENTRIES = 16
"""How many outdated entries a queue may hold before it is rebuilt."""

ReadyTask = tuple[tuple[int, str, str], str]
"""A task in a heap: its place, and its id."""


@dataclass(slots=True)
class LiveTask:
    """A task with the revision it is stored at (0: not stored yet)."""

    task: Task
    revision: int
    cause: BaseException | None = None
    """The error of its latest failed attempt, if that was in this process."""
    held: bool = False
    """Whether it may not begin until it is released."""
    awaits: set[Key] | None = None
    """Those of the tasks in ``waits_for`` that have not ended; None if they were not looked at."""

    def waited_until(self, now: datetime) -> bool:
        """Whether the time is over for which it waits for other tasks."""
        end = transitions.time_of(self.task.waits_until)
        return end is not None and end <= now


class TaskQueue:
    """The queue of an agent. ``tasks``: its unfinished tasks, by id."""

    def __init__(self, tasks: Mapping[str, LiveTask]) -> None:
        self._tasks = tasks
        self._ready: list[ReadyTask] = []
        self._delayed: list[tuple[datetime, str]] = []
        self._apart: dict[str, list[ReadyTask]] = {}
        """The ready tasks of the names that were blocked at some time, by name."""
        self._open: set[str] = set()
        """The names of those that are not blocked now."""
        self._soon: set[str] = set()
        """The names of those that are blocked for a while."""

    def __len__(self) -> int:
        """Return how many entries it holds, outdated ones included."""
        return len(self._ready) + len(self._delayed) + sum(map(len, self._apart.values()))

    def add(self, task: Task) -> None:
        """Add a task, or its newer version."""
        self._add(task)
        if len(self) > 2 * len(self._tasks) + _MAX_STALE_ENTRIES:
            # Most entries are of tasks that were finished or postponed since.
            self._ready, self._delayed = [], []
            self._apart = {name: [] for name in self._apart}
            for known in self._tasks.values():
                self._add(known.task)

    def _add(self, task: Task) -> None:
        if task.status not in transitions.CLAIMABLE:
            return
        live = self._tasks.get(task.task_id)
        held = live is not None and live.held
        due = transitions.time_of(task.waits_until) if held else transitions.due_at(task)
        if due is not None:
            heapq.heappush(self._delayed, (due, task.task_id))
        elif not held:
            self._add_ready(task)

    def _add_ready(self, task: Task) -> None:
        heap = self._apart.get(task.name, self._ready)
        heapq.heappush(heap, (transitions.order(task), task.task_id))

    def first(self, now: datetime) -> LiveTask | None:
        """Return the task to do next; None when none is due, or all of those are blocked."""
        while self._delayed and self._delayed[0][0] <= now:
            _, task_id = heapq.heappop(self._delayed)
            live = self._tasks.get(task_id)
            if live is not None and live.task.status in transitions.CLAIMABLE:
                if live.held and live.waited_until(now):
                    live.held = False
                self._add_ready(live.task)
        first = self._first_of(self._ready, now)
        for name in self._open:
            other = self._first_of(self._apart[name], now)
            if other is not None and (
                first is None or transitions.order(other.task) < transitions.order(first.task)
            ):
                first = other
        return first

    def _first_of(self, heap: list[ReadyTask], now: datetime) -> LiveTask | None:
        """Return the first task of a heap; drop entries before it that are outdated."""
        while heap:
            live = self._tasks.get(heap[0][1])
            if live is not None and live.task.status in transitions.CLAIMABLE and not live.held:
                due = transitions.due_at(live.task)
                if due is None or due <= now:
                    apart = self._apart.get(live.task.name, heap)
                    if apart is heap:
                        return live
                    heapq.heappush(apart, heap[0])
            heapq.heappop(heap)  # claimed, finished, postponed or put apart since it was queued
        return None

    def next_due(self) -> datetime | None:
        """Return when its next delayed task is due; None when it has none."""
        return self._delayed[0][0] if self._delayed else None

    def comes_again(self, now: datetime) -> bool:
        """Whether a task waits for its next attempt, or is blocked for a while."""
        if any(self._first_of(self._apart[name], now) for name in self._soon):
            return True
        # One that is in progress, though no handler runs, is queued again by its next owner.
        return any(
            live.task.status in _COMES_AGAIN and not live.held and not self._is_blocked(live)
            for live in self._tasks.values()
        )

    def _is_blocked(self, live: LiveTask) -> bool:
        name = live.task.name
        return name in self._apart and name not in self._open and name not in self._soon

    def block(self, name: str, *, for_a_while: bool = False) -> None:
        """Give no task of this name until ``unblock``; ``for_a_while``: that comes by itself."""
        self._apart.setdefault(name, [])
        self._open.discard(name)
        if for_a_while:
            self._soon.add(name)

    def unblock(self, *names: str) -> None:
        """Give tasks of these names again; without names: of all."""
        self._open.update(self._apart if not names else self._apart.keys() & {*names})
        self._soon -= self._open
