"""The state that the services of one runtime share: its agents in memory, and their saves."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from agent_state.clock import Clock, IdFactory, new_id, stamp
from agent_state.codec import Group, as_key
from agent_state.errors import (
    AgentStateError,
    Key,
    LeaseLostError,
    LockTimeoutError,
    PreconditionFailedError,
    RevisionConflictError,
    RuntimeNotStartedError,
    SerializationError,
    StateNotFoundError,
    StateValidationError,
    UnmergedStateError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import (
    Task,
    meaning_of,
)
from agent_state.protocols import DocumentId, Telemetry
from agent_state.runtime import transitions
from agent_state.runtime.attempt import WorkingCopy
from agent_state.runtime.hooks import HookRegistry
from agent_state.runtime.live_agent import (
    LiveAgent,
    TaskChange,
    UnconfirmedSave,
    with_stored_id,
)
from agent_state.runtime.task_queue import LiveTask as LiveTask
from agent_state.runtime.transitions import RetryPolicy

logger = logging.getLogger("agent_state.runtime")

REFUSALS = (
    LeaseLostError,
    LockTimeoutError,
    PreconditionFailedError,
    SerializationError,
    StateValidationError,
    UnmergedStateError,
)
"""Errors after which nothing was changed; after others the change may have been made."""
OWNERS = "owners"
"""Below ``system``: one owner per agent, where several runtimes share the store."""
DELETED = "deleted_tasks"
"""Below ``system``: by agent and id, the tasks that were deleted while a runtime that had not
noticed their cancellation might own the agent, until it has noticed."""
_MAX_CONFLICTS = 5
"""How often a save is repeated because another process changed the same document."""
_MAX_CAUSES = 32
"""How many errors of dead tasks are kept: each holds what its handler held."""
_ENDED_BY_ERROR = frozenset({"failed", "dead"})


@dataclass(slots=True)
class RuntimeState:
    """The store, the clock and the agents of one runtime."""

    manager: StatePersistenceManager
    owner: str
    """This runtime's random id in leases."""
    clock: Clock
    new_id: IdFactory = new_id
    random: random.Random = field(default_factory=random.Random)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    lease_seconds: float = 60.0
    shared: bool = False
    """Whether other runtimes may write to the same store."""
    hooks: HookRegistry = field(default_factory=HookRegistry)
    agents: dict[str, LiveAgent] = field(default_factory=dict)
    doubtful: dict[DocumentId, None] = field(default_factory=dict)
    """Documents of which memory may not have the stored version, until the next check."""
    telemetry: Telemetry | None = None
    attempts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Attempts that have ended, by the agent's type and what became of the task."""
    causes: dict[Key, BaseException] = field(default_factory=dict)
    """The errors of the tasks that died last in this process, by their keys."""
    running: bool = False
    """Whether the runtime has begun to start, and was not stopped or aborted."""
    aborted: bool = False
    """Whether it was aborted after its last start."""
    stopping: bool = False
    activity: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever an agent may have become idle."""

    def agent(self, agent_id: str) -> LiveAgent:
        """Return the live agent. Raises ``StateNotFoundError``, ``RuntimeNotStartedError``."""
        self.check_not_aborted()
        if not self.running:
            raise RuntimeNotStartedError(kind="agents", key=agent_id)
        agent = self.agents.get(agent_id)
        if agent is None:
            raise StateNotFoundError("no such agent", kind="agents", key=agent_id)
        return agent

    @contextmanager
    def attempting(self, agent: LiveAgent, live: LiveTask) -> Iterator[None]:
        """Surround an attempt with its span, and count it by what became of the task."""
        agent_type = agent.state.agent_type or ""
        follow = self.telemetry.attempt if self.telemetry is not None else None
        with follow(live.task, agent_type) if follow is not None else nullcontext() as ended:
            try:
                yield
            finally:
                status = live.task.status
                outcome = "lost" if status == "in_progress" else status
                self.attempts[agent_type, outcome] += 1
                if ended is not None:
                    ended(status, live.cause if status in _ENDED_BY_ERROR else None)

    def note_cause(self, live: LiveTask, error: BaseException) -> None:
        """Keep the error of a failed attempt for those who ask for the task's result."""
        live.cause = error
        if transitions.is_finished(live.task):
            self.causes[live.task.agent_id, live.task.task_id] = error
            while len(self.causes) > _MAX_CAUSES:
                del self.causes[next(iter(self.causes))]

    def cause_of(self, task: Task) -> BaseException | None:
        """Return the error that ended a task; None if that was not here, or is long ago."""
        cause = self.causes.get((task.agent_id, task.task_id))
        same = cause is not None and transitions.format_error(cause) == task.error
        return cause if same else None

    def check_not_aborted(self) -> None:
        """Raise ``RuntimeNotStartedError`` if the runtime was ended as by a crash."""
        if self.aborted:
            raise RuntimeNotStartedError("the runtime was aborted; start it again")

    def check_running(self) -> None:
        """Raise ``RuntimeNotStartedError`` before a start, and after a stop."""
        self.check_not_aborted()
        if not self.running:
            raise RuntimeNotStartedError

    async def save(
        self,
        agent: LiveAgent,
        *,
        live: LiveTask | None = None,
        change: Callable[[Task], Task | None] | None = None,
        add: Callable[[Group], None] | None = None,
        copy: WorkingCopy | None = None,
        claim_next: Callable[[], TaskChange | None] | None = None,
        task_only: bool = False,
        outside: bool = False,
    ) -> bool:
        """Save the agent, one of its tasks changed, and what ``add`` adds, as one group.

        The change is made on the task as it is once no other save runs, and takes effect in
        memory once it is stored; so concurrent changes do not undo one another. A change that
        returns None has nothing to do: nothing is saved, and False is returned. ``copy``: the
        working copy of the running attempt, of which this is a commit point. ``claim_next``:
        returns the task of the agent's next attempt as it is once that has begun; it is saved too,
        unless the store refuses that. ``task_only``: the agent is not saved. ``outside``: any
        runtime may make the change, such as a request to cancel. The state of an agent that
        another runtime holds is not saved. Raises ``LeaseLostError`` when another runtime has
        taken the agent.
        """
        async with agent.lock:
            await self._confirm(agent)
            return await self._save(
                agent,
                live,
                change,
                add=add,
                copy=copy,
                claim_next=claim_next,
                task_only=task_only,
                outside=outside,
            )

    async def _save(
        self,
        agent: LiveAgent,
        live: LiveTask | None,
        change: Callable[[Task], Task | None] | None,
        *,
        add: Callable[[Group], None] | None = None,
        copy: WorkingCopy | None = None,
        claim_next: Callable[[], TaskChange | None] | None = None,
        task_only: bool = False,
        outside: bool = False,
    ) -> bool:
        for _ in range(_MAX_CONFLICTS):
            if not agent.leased and not outside:
                raise agent_lost(agent)
            changed = _changed(live, change, copy)
            if change is not None and changed is None:
                return False
            tasks = [(live, changed)] if live is not None and changed is not None else []
            following = claim_next() if claim_next is not None else None
            active = agent.state.last_active
            group, applied = self._prepare(
                agent, [*tasks, *filter(None, [following])], copy, task_only=task_only
            )
            try:
                if add is not None:
                    add(group)
                revisions = await self.commit(group, *owned(agent))
            except (RevisionConflictError, *REFUSALS) as refusal:
                agent.state.last_active = active
                if following is not None and agent.leased:
                    claim_next = None  # that task may be the reason
                    continue
                conflict = isinstance(refusal, RevisionConflictError)
                if live is None or not conflict or refusal.kind != "tasks":
                    raise
                await self._rebase_on_stored(agent, live)
                continue
            except AgentStateError:
                for each, task in tasks:
                    agent.unconfirmed = UnconfirmedSave(each, task, applied)
                raise
            applied(revisions)
            return True
        raise RevisionConflictError(
            "another process keeps changing the agent's task", kind="agents", key=agent.agent_id
        )

    async def change_task(
        self, agent: LiveAgent, task_id: str, change: Callable[[Task], Task | None]
    ) -> tuple[LiveTask, bool]:
        """Change a task that need not be in memory; return it, and whether it was changed.

        A finished task is read from the store, and is in memory once it is to be done again.
        Raises ``StateNotFoundError``.
        """
        async with agent.lock:  # so that no other change makes the task live meanwhile
            await self._confirm(agent)
            live = agent.tasks.get(task_id) or await self._stored_task(agent, task_id)
            return live, await self._save(agent, live, change, task_only=True, outside=True)

    async def delete_task(
        self, agent: LiveAgent, task_id: str, may_go: Callable[[Task], bool]
    ) -> tuple[LiveTask, bool]:
        """Delete a stored task, if it may go; return it, and whether it is gone.

        Raises ``StateNotFoundError``.
        """
        async with agent.lock:
            await self._confirm(agent)
            live = await self._stored_task(agent, task_id)
            if not may_go(live.task):
                return live, False
            group = self.manager.new_group()
            group.delete("tasks", (agent.agent_id, task_id), expected=live.revision)
            await self.commit(group, *owned(agent))
            agent.tasks.pop(task_id, None)
            return live, True

    async def _stored_task(self, agent: LiveAgent, task_id: str) -> LiveTask:
        key = (agent.agent_id, task_id)
        stored = await self.manager.load_with_revision("tasks", key)
        if stored is None or not isinstance(stored.state, Task):
            raise StateNotFoundError("no such task", kind="tasks", key=key)
        return LiveTask(with_stored_id(stored.state, key), stored.revision)

    async def _confirm(self, agent: LiveAgent) -> None:
        """Find out whether the last save, whose outcome was not reported, was made."""
        save = agent.unconfirmed
        if save is None:
            return
        key = (agent.agent_id, save.task.task_id)
        stored = await self.manager.load_with_revision("tasks", key)
        agent.unconfirmed = None
        if stored is None and transitions.is_finished(save.task):
            save.applied([0])  # only a finished task is cleaned up
        elif stored is not None and stored.state.model_dump() == save.task.model_dump():
            save.applied([stored.revision])

    def _prepare(
        self,
        agent: LiveAgent,
        tasks: Sequence[TaskChange],
        copy: WorkingCopy | None,
        *,
        task_only: bool,
    ) -> tuple[Group, Callable[[Sequence[int]], None]]:
        """Return the group of a save, and the function that applies it in memory once stored."""
        group = self.manager.new_group()
        current = agent.current
        for live, changed in tasks:
            key = (agent.agent_id, changed.task_id)
            group.save("tasks", key, changed, expected=live.revision)
            if changed.status == "in_progress":
                current = live
            elif live is current:
                current = None
        after = list[Callable[[], None]]()
        if agent.leased and not task_only:
            agent.state.last_active = stamp(self.clock.now())
            agent.stored_status, status = None, agent.status(current)
            after.append(partial(setattr, agent, "stored_status", status))
            body = agent.body(status=status, copy=copy)
            group.save("agents", agent.agent_id, body, append_only=True)
            if copy is not None:
                after.append(copy.committing(body, copy.add_marks(group)))
        return group, partial(_apply_changes, agent, tasks, after)

    async def commit(self, group: Group, *agents: LiveAgent) -> list[int]:
        """Commit a group on behalf of these agents, if this runtime owns them.

        A process that stood still (SIGSTOP, a paused machine) for longer than its heartbeat is
        valid does not know yet that it lost an agent. Raises ``LeaseLostError`` for one; then
        nothing was changed. Raises ``RuntimeNotStartedError`` once the runtime was aborted.
        """
        self.check_not_aborted()
        fences: dict[tuple[str | None, Key], LiveAgent] = {}
        for agent in agents:
            agent.touched, agent.as_written = True, None
            if not agent.leased:  # it was lost while the caller waited
                raise agent_lost(agent)
            if agent.fence is not None:
                fences[agent.fence.kind, agent.fence.key] = agent
                group.check(agent.fence.kind, agent.fence.key, agent.fence.expected)
        try:
            if self.manager.is_merging:
                await self.manager.check_merged("agents", *(each.agent_id for each in agents))
            return await self.manager.commit(group)
        except RevisionConflictError as conflict:
            lost = fences.get((conflict.kind, as_key(conflict.key or ())))
            if lost is None:
                raise
            self.lose(lost, "belongs to another runtime now")
            raise agent_lost(lost) from conflict
        except UnmergedStateError as unmerged:
            for agent in agents:
                if (unmerged.key or ())[:1] == (agent.agent_id,):
                    self.lose(agent, f"waits, and is read again then: {unmerged}")
            raise
        except REFUSALS:
            raise
        except Exception:  # raised again; what is not known to be refused is in doubt
            # It may have been made all the same: memory follows the store at the next check.
            self.doubtful.update(dict.fromkeys((made.kind, made.key) for made in group.changes))
            raise

    def note_requeued(self, task: Task) -> None:
        """Report a task whose process died while it ran, if it died too often."""
        if task.status == "dead":
            where = (task.agent_id, task.task_id, task.name)
            logger.error("task %s/%s (%s) is dead: %s", *where, task.error)
            self.hooks.call("dead", task, None)

    def lose(self, agent: LiveAgent, why: str) -> None:
        """Stop running an agent that another runtime owns, or may own."""
        if agent.leased:
            logger.warning("agent %s %s", agent.agent_id, why)
        agent.leased = False
        agent.request_stop("lease")
        agent.changed.set()
        self.activity.set()

    async def _rebase_on_stored(self, agent: LiveAgent, live: LiveTask) -> None:
        """Another process changed the task: continue from its version.

        The task that runs belongs to its handler and is saved over a hand edit; a requested
        cancellation is kept.
        """
        key = (agent.agent_id, live.task.task_id)
        stored = await self.manager.load_with_revision("tasks", key)
        theirs = stored.state if stored is not None else None
        if stored is None or not isinstance(theirs, Task):
            # Who waits to change it, or runs it, keeps the old revision: it must not come back.
            if live is not agent.current:
                agent.tasks.pop(live.task.task_id, None)
                raise StateNotFoundError("the task was deleted", kind="tasks", key=key)
            if self.shared:
                agent.tasks.pop(live.task.task_id, None)
                raise lease_lost(key)  # finished and cleaned up by another runtime
            live.revision = stored.revision if stored else 0
        elif live is not agent.current:
            agent.put(live, with_stored_id(theirs, key), stored.revision)
        elif not self.shared or self.holds(theirs):
            live.revision = stored.revision
            if cancel_requested(theirs):
                live.task = live.task.model_copy(update={"cancel_requested": True})
                agent.request_stop("cancel")
        else:
            # The running attempt keeps its old revision, so that it can never be saved over theirs.
            agent.put(
                LiveTask(theirs, stored.revision), with_stored_id(theirs, key), stored.revision
            )
            raise lease_lost(key)

    def holds(self, task: Task) -> bool:
        """Whether this runtime has claimed the task."""
        lease = task.lease
        return task.status == "in_progress" and lease is not None and lease.owner == self.owner


def _changed(
    live: LiveTask | None, change: Callable[[Task], Task | None] | None, copy: WorkingCopy | None
) -> Task | None:
    changed = change(live.task) if live is not None and change is not None else None
    return changed if changed is None or copy is None else copy.without_contained(changed)


def _apply_changes(
    agent: LiveAgent,
    tasks: Iterable[TaskChange],
    after: Iterable[Callable[[], None]],
    revisions: Sequence[int],
) -> None:
    """Make stored changes of tasks in memory, as far as revisions are known; then ``after``."""
    for (live, changed), revision in zip(tasks, revisions, strict=False):
        agent.put(live, changed, revision)
    for make in after:
        make()


def cancel_requested(task: Task) -> bool:
    """Whether this version of a running task asks for its end."""
    return task.cancel_requested or meaning_of(task.status) == "cancelled"


def owned(*agents: LiveAgent | None) -> list[LiveAgent]:
    """Return those that this runtime owns: a change from outside is not refused for the others."""
    return [agent for agent in agents if agent is not None and agent.leased]


def agent_lost(agent: LiveAgent) -> LeaseLostError:
    text = "another runtime has taken the agent over"
    return LeaseLostError(text, kind="agents", key=agent.agent_id)


def lease_lost(key: Key) -> LeaseLostError:
    return LeaseLostError("another runtime has taken the task over", kind="tasks", key=key)
