"""What people do with tasks: find them, run them again, cancel and delete them, one or many.

An operation is made by whoever may write: the runtime that owns the agents (``runtime.tasks``), or
``StoredTasks``, on a directory that no process owns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field

from agent_state.clock import Clock, instant, sort_text, stamp
from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    StateNotFoundError,
    StateValidationError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.migrations import VERSIONS
from agent_state.models import ARCHIVE, Task, TaskStatus, meaning_of
from agent_state.protocols import Document, StateSerializer
from agent_state.runtime import transitions
from agent_state.runtime.live_agent import with_stored_id
from agent_state.runtime.state import DELETED, OWNERS

Action = Literal["retry", "cancel", "delete"]
TaskRef = Task | tuple[str, str] | str
"""A task; its ``(agent_id, task_id)``; or its id alone, if only one agent has a task of that id."""

_SCHEMA = f"tasks/{VERSIONS.get('tasks', 1)}"
_STATUS_WORDS = (*get_args(TaskStatus), "started", "done")
"""The words that the library writes as a status, those of steps included."""
_MAX_CONFLICTS = 5
_AT_ONCE = 256
"""How many tasks are changed at the same time; the store commits them in batches."""
_MAX_REFUSED = 100
"""How many tasks a report names, with the reason why they were left."""
_AGAIN: tuple[TaskStatus, ...] = ("dead", "failed")
"""What many tasks are chosen by for another run, unless the filter names other states."""


class TaskFacts(Protocol):
    """What a task is chosen by."""

    @property
    def agent_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    @property
    def created_at(self) -> str | float | None: ...


class TaskFilter(BaseModel):
    """Which tasks are meant: those to which everything applies that is given here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: TaskStatus | tuple[TaskStatus, ...] = ()
    """One or several states; none for any."""
    name: str | None = None
    """The name of the task."""
    agent_id: str | None = None
    """The agent that does the work."""
    error: str | None = None
    """Text that the error of the latest failed attempt contains."""
    older_than_seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Submitted at least so long ago."""
    newer_than_seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Submitted less than so long ago."""

    @property
    def statuses(self) -> tuple[str, ...]:
        """The states that are meant; none for any."""
        return (self.status,) if isinstance(self.status, str) else self.status

    def matches(self, task: TaskFacts, now: datetime) -> bool:
        """Whether the task is meant. One without a readable time has no age."""
        if self.statuses and meaning_of(task.status) not in self.statuses:
            return False
        if self.name not in (None, task.name) or self.agent_id not in (None, task.agent_id):
            return False
        if self.error is not None and self.error not in (task.error or ""):
            return False
        if self.older_than_seconds is None and self.newer_than_seconds is None:
            return True
        try:
            age = (
                now - instant("" if task.created_at is None else task.created_at)
            ).total_seconds()
        except ValueError:
            return False
        youngest, oldest = self.older_than_seconds, self.newer_than_seconds
        return (youngest is None or age >= youngest) and (oldest is None or age < oldest)


ANY_TASK = TaskFilter()


class TaskRequest(BaseModel):
    """An operation on tasks: on those that are named, or on all that a filter matches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Action
    tasks: list[str] = Field(default_factory=list)
    """Ids of tasks, or ``agent_id/task_id``."""
    filter: TaskFilter | None = None
    dry_run: bool = False
    """Count the tasks, and change nothing."""

    @property
    def chosen(self) -> TaskFilter:
        """The filter; without a state in it, only tasks that failed are run again."""
        wanted = self.filter or ANY_TASK
        if self.action == "retry" and not wanted.status:
            return wanted.model_copy(update={"status": _AGAIN})
        return wanted


@dataclass(slots=True)
class TaskReport:
    """What an operation has done."""

    matched: int = 0
    """The number of tasks that the operation applies to."""
    changed: int = 0
    """The number of tasks that were changed; 0 in a dry run."""
    refused: dict[str, str] = field(default_factory=dict)
    """Tasks that could not be changed, as ``agent_id/task_id``, with the reason; at most 100."""
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)

    def refuse(self, name: str, why: str) -> None:
        """Note a task that was left as it is."""
        if len(self.refused) < _MAX_REFUSED:
            self.refused[name] = why


class Applied(NamedTuple):
    """Whether an action changed a task, and the task's status now."""

    changed: bool
    status: str


class TaskWriter(Protocol):
    """Whoever may change the stored tasks."""

    async def apply(self, action: Action, key: Key) -> Applied:
        """Change one task. Raises ``StateNotFoundError``."""


def changed_by(action: Action, task: Task, now: datetime) -> Task | None:
    """Return the task after an action; None if its state does not permit it.

    A task that may be deleted is returned as it is: only finished ones may.
    """
    if action == "retry":
        return transitions.retry(task)
    if action == "cancel":
        return transitions.request_cancel(task, now)
    return task if transitions.is_finished(task) else None


class TaskOperator:
    """Finds stored tasks, and applies actions to one or many of them."""

    def __init__(
        self,
        manager: StatePersistenceManager,
        clock: Clock,
        writer: TaskWriter,
        live: Callable[[str], Iterable[Key]] = lambda _: (),
    ) -> None:
        self._manager = manager
        self._clock = clock
        self._writer = writer
        self._live = live

    # -- finding -----------------------------------------------------------------------------

    async def locate(self, task: TaskRef) -> tuple[str, str]:
        """Return ``(agent_id, task_id)``.

        An id alone is looked for in memory, then among the names of the stored tasks; no document
        is read. Raises ``StateNotFoundError``, and ``StateValidationError`` when several agents
        have a task of that id.
        """
        if isinstance(task, Task):
            return task.agent_id, task.task_id
        if not isinstance(task, str):
            return task
        found = list(self._live(task))
        if not found:
            keys = await self._manager.keys("tasks")
            found = [key for key in keys if len(key) == 2 and key[1] == task]
        if not found:
            raise StateNotFoundError("no such task", kind="tasks", key=task)
        if len(found) > 1:
            agents = ", ".join(sorted(key[0] for key in found))
            message = f"several agents have a task {task!r:.80} ({agents}): name the agent, too"
            raise StateValidationError(message, kind="tasks", key=task)
        [(agent_id, task_id)] = found
        return agent_id, task_id

    async def get(self, task: TaskRef) -> Task:
        """Return the task as it is stored now, or as it was when it was cleaned up.

        Raises ``StateNotFoundError``, and ``StateValidationError`` as ``locate``.
        """
        key: Key | None = None
        with suppress(StateNotFoundError):
            key = await self.locate(task)
            stored = await self._manager.load("tasks", key)
            if isinstance(stored, Task):
                return with_stored_id(stored, key)
        archived = await self._archived(*key) if key else await self._archived(None, str(task))
        if archived is None:
            raise StateNotFoundError("no such task", kind="tasks", key=key or str(task))
        return archived

    async def locate_named(self, name: str) -> tuple[str, str]:
        """Return the key of ``task_id``, or of ``agent_id/task_id``; both may contain a slash.

        Raises as ``locate``.
        """
        try:
            return await self.locate(name)
        except StateNotFoundError:
            parts = name.split("/")
            for place in range(1, len(parts)):
                key = ("/".join(parts[:place]), "/".join(parts[place:]))
                if all(key) and await self._manager.load("tasks", key) is not None:
                    return key
            raise

    async def locate_any(self, task: TaskRef) -> tuple[str, str]:
        """As ``locate``; of an id alone it finds cleaned-up tasks, too."""
        try:
            return await self.locate(task)
        except StateNotFoundError:
            return await self.locate(await self.get(task))

    async def _archived(self, agent_id: str | None, task_id: str) -> Task | None:
        """Return a task that was cleaned up. Only lines that may be it are decoded."""
        store = self._manager.store
        logs = [(agent_id, ARCHIVE)] if agent_id else await store.logs("tasks")
        for key in logs:
            if len(key) != 2 or key[1] != ARCHIVE:
                continue
            # Cleanup gives the record of a task its id and its revision as dedupe key.
            async for entry in self._manager.read_keyed("tasks", key, f"{task_id}@"):
                if entry.record.get("task_id") == task_id:
                    return Task.model_validate(entry.record)
        return None

    async def search(
        self,
        wanted: TaskFilter,
        *,
        newest_first: bool,
        limit: int | None,
        after: tuple[str, str, str] | None,
    ) -> list[Task]:
        """Return the tasks that match, by the time of their submission.

        ``after``: only those behind this ``position``. Every stored task is read; those are parsed
        that may match, and only as many as are asked for are kept in memory.
        """
        now, found = self._clock.now(), []
        scan = self._manager.scan(
            "tasks", wanted.agent_id or (), where=_may_match(wanted, self._manager.serializer)
        )
        async for loaded in scan:
            if not isinstance(loaded.state, Task) or len(loaded.key) != 2:
                continue
            task = with_stored_id(loaded.state, loaded.key)
            if not wanted.matches(task, now):
                continue
            if after is not None and (
                position(task) >= after if newest_first else position(task) <= after
            ):
                continue
            found.append(task)
            if limit is not None and len(found) >= 2 * limit + 100:
                _cut(found, limit, newest_first=newest_first)
        _cut(found, limit, newest_first=newest_first)
        return found

    # -- changing ----------------------------------------------------------------------------

    async def apply(self, action: Action, task: TaskRef) -> Applied:
        """Apply an action to one task; one that is archived stays as it is.

        Raises ``StateNotFoundError``, and ``StateValidationError`` as ``locate``.
        """
        with suppress(StateNotFoundError):
            return await self._writer.apply(action, await self.locate(task))
        archived = await self.get(task)
        return Applied(changed=False, status=f"{archived.status}, and archived")

    async def perform(self, request: TaskRequest) -> TaskReport:
        """Apply an action to the named tasks, or to all that the filter matches.

        A task that cannot be changed does not prevent changing the others.
        """
        report = TaskReport(dry_run=request.dry_run)
        if request.tasks:
            for name in request.tasks:
                await self._perform_named(request, name, report)
            return report
        wanted, now, keys = request.chosen, self._clock.now(), []
        scan = self._manager.scan(
            "tasks", wanted.agent_id or (), where=_may_match(wanted, self._manager.serializer)
        )
        async for loaded in scan:
            if not isinstance(loaded.state, Task) or len(loaded.key) != 2:
                continue
            task = with_stored_id(loaded.state, loaded.key)
            if wanted.matches(task, now) and changed_by(request.action, task, now) is not None:
                report.matched += 1
                keys.append((position(task), (task.agent_id, task.task_id)))
        if request.dry_run:
            return report
        keys.sort()
        for start in range(0, len(keys), _AT_ONCE):
            some = (key for _, key in keys[start : start + _AT_ONCE])
            await asyncio.gather(
                *(self._perform_found(request.action, key, report) for key in some)
            )
        return report

    async def _perform_found(
        self, action: Action, key: tuple[str, str], report: TaskReport
    ) -> None:
        with suppress(StateNotFoundError):  # it was deleted since
            await self._perform(action, key, "/".join(key), report)

    async def _perform_named(self, request: TaskRequest, name: str, report: TaskReport) -> None:
        task: TaskRef = name
        with suppress(StateNotFoundError):
            task = await self.locate_named(name)
        try:
            if not request.dry_run:
                report.matched += await self._perform(request.action, task, name, report)
                return
            found = await self.get(task)
        except (StateNotFoundError, StateValidationError) as error:
            report.refuse(name, error.message)
            return
        if changed_by(request.action, found, self._clock.now()) is None:
            report.refuse(name, f"it is {found.status}")
        else:
            report.matched += 1

    async def _perform(self, action: Action, task: TaskRef, name: str, report: TaskReport) -> bool:
        try:
            applied = await self.apply(action, task)
        except (StateNotFoundError, StateValidationError):
            raise
        except AgentStateError as error:
            report.refuse(name, str(error))
            return False
        if not applied.changed:
            report.refuse(name, f"it is {applied.status}")
        report.changed += applied.changed
        return applied.changed


class StoredTasks:
    """Changes tasks in the store alone: no process owns it, or several share it.

    A runtime that shares the store notices the changes.
    """

    def __init__(self, manager: StatePersistenceManager, clock: Clock) -> None:
        self._manager = manager
        self._clock = clock

    async def apply(self, action: Action, key: Key) -> Applied:
        for _ in range(_MAX_CONFLICTS):
            stored = await self._manager.load_with_revision("tasks", key)
            if stored is None or not isinstance(stored.state, Task):
                break
            task = with_stored_id(stored.state, key)
            changed = changed_by(action, task, self._clock.now())
            if changed is None:
                return Applied(changed=False, status=task.status)
            with suppress(RevisionConflictError):  # another process was first: look again
                group = self._manager.new_group()
                if action != "delete":
                    group.save("tasks", key, changed, expected=stored.revision)
                else:
                    group.delete("tasks", key, expected=stored.revision)
                    if task.status == "cancelled" and await self._is_owned(task.agent_id):
                        # The owner may not have noticed that yet: it learns what this was.
                        note = {"deleted_at": stamp(self._clock.now())}
                        group.save("system", (DELETED, *key), note)
                await self._manager.commit(group)
                return Applied(changed=True, status=changed.status)
        else:
            raise RevisionConflictError("another process keeps changing it", kind="tasks", key=key)
        raise StateNotFoundError("no such task", kind="tasks", key=key)

    async def _is_owned(self, agent_id: str) -> bool:
        """Whether one of several runtimes that share the store may run the agent."""
        record = await self._manager.load("system", (OWNERS, agent_id))
        return record is not None and bool(record.model_dump().get("owner"))


def _may_match(wanted: TaskFilter, serializer: StateSerializer) -> Callable[[Document], bool]:
    """Return whether the task in a document may be meant, by its bytes, without parsing them.

    That is so for each that a person wrote, or an older version of this library.
    """

    def field(name: str, value: str) -> bytes:
        return serializer.dumps({name: value}).strip()[1:-1].strip()

    needed = [] if wanted.name is None else [field("name", wanted.name)]
    if wanted.error is not None:
        needed.append(field("error", wanted.error)[len(field("error", "")) - 1 : -1])
    words = {word: field("status", word) for word in _STATUS_WORDS}
    any_word = field("status", "")[:-2]
    chosen = [words[word] for word in wanted.statuses]

    def may_match(document: Document) -> bool:
        body = document.body
        if document.edited or document.schema != _SCHEMA:
            return True
        if not all(part in body for part in needed):
            return False
        # A pending task need not say so, and there may be words of another program.
        if not chosen or "pending" in wanted.statuses or any(part in body for part in chosen):
            return True
        known = sum(body.count(part) for part in words.values())
        return known == 0 or known != body.count(any_word)

    return may_match


def position(task: Task) -> tuple[str, str, str]:
    """Return the place of a task in the order of submission; it never changes."""
    return sort_text(task.created_at), task.agent_id, task.task_id


def _cut(tasks: list[Task], limit: int | None, *, newest_first: bool) -> None:
    tasks.sort(key=position, reverse=newest_first)
    if limit is not None:
        del tasks[limit:]
