"""One agent in memory: its state as it is stored, its open tasks, mail and sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agent_state.codec import StoredState
from agent_state.errors import Key
from agent_state.models import (
    AgentState,
    AgentStatus,
    MailMessage,
    SleepState,
    Task,
    dump_shared,
    meaning_of,
)
from agent_state.protocols import Check
from agent_state.runtime import transitions
from agent_state.runtime.attempt import WorkingCopy
from agent_state.runtime.mailbox import Mailbox
from agent_state.runtime.task_queue import LiveTask, TaskQueue

TaskChange = tuple[LiveTask, Task]
"""A task, and what it becomes."""


@dataclass(slots=True)
class UnconfirmedSave:
    """A save of a task whose outcome the store did not report."""

    live: LiveTask
    task: Task
    """The task as it is stored if the save was made."""
    applied: Callable[[Sequence[int]], None]
    """Makes the change in memory; the argument is the task's revision."""


class LiveAgent:
    """One agent in memory: its state, open tasks, mail and sleep. Only the event loop uses it."""

    def __init__(self, agent_id: str, state: AgentState, *, edited: bool = False) -> None:
        self.agent_id = agent_id
        self.state = state
        """As it is stored. A handler changes a working copy, which its commit points store."""
        self.as_written: dict[str, Any] | None = None
        """The state of a document that a person wrote, as it was read, until it is saved."""
        self.stored_status: str | None = None
        """The status that is stored with this very state; None when that is not sure."""
        self.tasks: dict[str, LiveTask] = {}
        """The tasks that are not finished."""
        self.mail = Mailbox()
        self.sleep: SleepState | None = None
        self.current: LiveTask | None = None
        """The task whose handler runs."""
        self.unconfirmed: UnconfirmedSave | None = None
        """A save that failed and may have been stored all the same."""
        self.has_handler = False
        self.handles_mail = False
        """Whether there is a handler for its mail."""
        self.reported: set[str] = set()
        """The names of tasks of which it was said that they have no handler."""
        self.leased = True
        """Whether this runtime runs it, because it owns the agent and has restored it."""
        self.owner: str | None = None
        """The other live runtime that owns it, as far as is known."""
        self.elsewhere: str | None = None
        """Where a copy of it runs, in another worktree or clone, as far as is known."""
        self.token: int | None = None
        """The fencing token of this runtime's ownership; None where the store has one owner."""
        self.fence: Check | None = None
        """That the stored owner is unchanged, which every commit for the agent requires."""
        self.touched = True
        """Whether it has changed since it was last compared with the store."""
        self.touched_tasks: dict[str, None] = {}
        """The tasks that have changed since they were last compared with the store."""
        self.lock = asyncio.Lock()
        """Held while the agent or one of its tasks is saved."""
        self.changed = asyncio.Event()
        """Set when its loop must look for work again."""
        self.loop: asyncio.Task[None] | None = None
        self.stop_request: asyncio.Future[str] | None = None
        """During an attempt, a future for the reason to stop it."""
        self._queue = TaskQueue(self.tasks)
        self.wakers: list[Callable[[], None]] = []
        """To be called once it has looked for a task, by which others may look, too."""
        self.adopt(state, edited=edited)

    def adopt(self, state: AgentState, *, edited: bool = False) -> None:
        """Replace the state, but for the id. ``edited``: a person, or another program, wrote it."""
        self.as_written = state.model_dump() if edited else None
        state.agent_id = self.agent_id
        translate(state)
        self.state, self.touched, self.stored_status = state, True, None

    def is_as_written(self, body: dict[str, Any]) -> bool:
        """Whether a person wrote the document, and at most the status, which follows, differs."""
        written = self.as_written
        return written is not None and {**written, "status": ""} == {**body, "status": ""}

    @property
    def is_stored(self) -> bool:
        """Whether its document is known to have the state and the status that it has now."""
        return self.stored_status == self.status(self.current)

    def status(self, current: LiveTask | None, *, awake: bool = False) -> AgentStatus:
        """Return the agent's status, given the running task; ``awake`` ignores its sleep."""
        if self.state.status == "stopped":
            return "stopped"
        if current is not None:
            return "active"
        if self.sleep is not None and not awake:
            return "sleeping"
        return "idle" if self.has_handler else "waiting"

    def body(
        self, *, status: AgentStatus | None = None, copy: WorkingCopy | None = None
    ) -> dict[str, Any]:
        """Return the state as it is stored, with the given status or the current one.

        Nobody changes its conversation in place. ``copy``: the attempt whose changes are stored
        with it.
        """
        body = dump_shared(self.state) if copy is None else copy.dump()
        body["status"] = status or self.status(self.current)
        return body

    def may_work(self) -> bool:
        """Whether it may begin a task."""
        return self.leased and self._can_work()

    def _can_work(self) -> bool:
        return self.has_handler and self.sleep is None and self.state.status != "stopped"

    def may_be_archived(self) -> bool:
        """Whether cleaning up, by any process, may have taken its document away."""
        if not self.leased:
            return True  # else the runtime that owns it saves it again
        return self.state.status == "stopped" and self.current is None and not self.tasks

    def request_stop(self, reason: str) -> None:
        """Cancel the running attempt, if any; ``reason`` decides what is stored of it."""
        if self.stop_request is not None and not self.stop_request.done():
            self.stop_request.set_result(reason)

    def apply_loaded(self, loaded: StoredState) -> None:
        """Add or replace a document of this agent as it was read; other kinds are ignored."""
        state = loaded.state
        self.touched = True
        if isinstance(state, Task) and len(loaded.key) == 2:
            live = self.tasks.get(loaded.key[1]) or LiveTask(state, loaded.revision)
            self.put(live, with_stored_id(state, loaded.key), loaded.revision)
        elif isinstance(state, MailMessage) and len(loaded.key) == 2:
            # As with tasks: a copy of a file is a message with its own id.
            state.to_agent, state.message_id = loaded.key
            translate(state)
            self.mail[loaded.key[1]] = state
        elif isinstance(state, SleepState):
            self.sleep = state if state.is_sleeping else None

    # -- the queue of tasks ------------------------------------------------------------------

    def put(self, live: LiveTask, task: Task, revision: int) -> LiveTask:
        """Add a task, or its newer version. A finished one is removed."""
        if task.waits_for != live.task.waits_for:
            live.held, live.awaits = False, None
        live.task, live.revision = task, revision
        self.touched = True
        if transitions.is_finished(task):
            self.tasks.pop(task.task_id, None)
            self.touched_tasks.pop(task.task_id, None)
            return live
        self.touched_tasks[task.task_id] = None
        self.tasks[task.task_id] = live
        self._queue.add(task)
        return live

    @property
    def queued(self) -> int:
        """How many entries the queue holds, outdated ones included."""
        return len(self._queue)

    def next_task(self, now: datetime) -> LiveTask | None:
        """Return the task to do next; None when none is due, or all of those are blocked."""
        return self._queue.first(now)

    def block(self, name: str, *, for_a_while: bool = False) -> None:
        """Begin no task of this name until ``unblock``.

        ``for_a_while``: that comes by itself, so that the agent is not idle meanwhile.
        """
        self._queue.block(name, for_a_while=for_a_while)

    def unblock(self, *names: str) -> None:
        """Let tasks of these names begin; without names: all."""
        self._queue.unblock(*names)
        self.changed.set()

    def hold(self, live: LiveTask) -> None:
        """Let a task not begin until it is released, or has waited until its time."""
        live.held = True
        self._queue.add(live.task)

    def release(self, live: LiveTask) -> None:
        """Let a task begin that was held."""
        live.held = False
        if self.tasks.get(live.task.task_id) is live:
            self._queue.add(live.task)
        self.changed.set()

    def next_due(self) -> datetime | None:
        """Return when its next delayed task is due; None when it may not work, or has none."""
        return self._queue.next_due() if self.may_work() else None

    def is_idle(self, now: datetime) -> bool:
        """Whether no task runs, is due, or waits for its next attempt.

        An agent that another live runtime owns, or of which a copy runs elsewhere, is idle here;
        one that is yet to be taken is not, while it has work.
        """
        if self.current is not None:
            return False
        if self.owner is not None or self.elsewhere is not None or not self._can_work():
            return True
        if self.next_task(now) is not None or (self.handles_mail and self.mail.has_arrived):
            return False
        return not self._queue.comes_again(now)


def with_stored_id(task: Task, key: Key) -> Task:
    """Return the task under the id of its document's key: a copied file is its own task."""
    if (task.agent_id, task.task_id) != key:
        task.agent_id, task.task_id = key
    translate(task)
    return task


def translate(document: AgentState | Task | MailMessage) -> None:
    """Put the word of this library in the place of one that means the same."""
    meaning = meaning_of(document.status)
    if meaning != document.status:
        document.status = meaning
