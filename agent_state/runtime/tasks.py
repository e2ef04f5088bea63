"""The tasks of one runtime: submit, look up, operate, and wait for results."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar, overload
from weakref import WeakSet

from pydantic import TypeAdapter, ValidationError

from agent_state.clock import check_count, check_duration, stamp
from agent_state.codec import Group
from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    StateValidationError,
    TaskFailedError,
    TaskTimeoutError,
)
from agent_state.models import Priority, Task, TaskReference, TaskStatus, copied, meaning_of
from agent_state.protocols import NoticeStream
from agent_state.runtime import dedupe, transitions
from agent_state.runtime.dedupe import DEDUPE_SECONDS
from agent_state.runtime.handlers import HandlerRegistry, RegisteredHandler
from agent_state.runtime.live_agent import LiveAgent, with_stored_id
from agent_state.runtime.operations import (
    ANY_TASK,
    Action,
    Applied,
    StoredTasks,
    TaskFilter,
    TaskOperator,
    TaskRef,
    TaskReport,
    TaskRequest,
    changed_by,
    position,
)
from agent_state.runtime.payloads import as_object
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.task_queue import LiveTask
from agent_state.runtime.waiters import TaskWaiters

T = TypeVar("T")


class TaskService:
    """``runtime.tasks``: the tasks of this runtime's agents."""

    def __init__(self, state: RuntimeState, handlers: HandlerRegistry) -> None:
        self._state = state
        self._handlers = handlers
        self.waiters = TaskWaiters(state)
        self._watches: WeakSet[NoticeStream] = WeakSet()
        self._stored = StoredTasks(state.manager, state.clock)
        self._operator = TaskOperator(state.manager, state.clock, self, self._live)

    async def submit(
        self,
        agent_id: str,
        name: str,
        payload: object = None,
        *,
        priority: Priority | None = None,
        delay_seconds: float = 0.0,
        max_attempts: int | None = None,
        timeout_seconds: float | None = None,
        dedupe_key: str | None = None,
        dedupe_seconds: float = DEDUPE_SECONDS,
        sender: LiveAgent | None = None,
        sent_by: TaskReference | None = None,
    ) -> Task:
        """Queue a task for an agent; it is stored when this returns.

        ``payload``: a JSON object, or what the handler takes, such as a model or a dataclass.
        ``priority``: None for the handler's, or ``normal``.
        ``delay_seconds``: the task starts that much later, at the earliest.
        ``max_attempts``: after so many failed attempts the task ends as ``dead``; None for the
        handler's, or 3.
        ``timeout_seconds``: how long one attempt may take; None for the handler's, or any time.
        ``dedupe_key``: if the agent has a task of this name and key, whatever its status, that
        task is returned. The key holds for ``dedupe_seconds`` at least, whatever cleaning up
        does. None for a new task.
        ``sender`` and ``sent_by``: the running agent and task that submit it. Each agent that
        submits has keys of its own.

        Raises ``StateNotFoundError`` for an unknown agent, ``DedupeKeyReusedError`` when the key
        stands for a task with other content, ``InvalidPayloadError`` for a payload that the
        handler by that name does not take, ``StateValidationError`` for what else is out of
        range, and ``LeaseLostError`` when another runtime has taken the sender.
        """
        agent = self._state.agent(agent_id)
        handler = self._handlers.get(agent.state.agent_type, name)
        task_id = None
        if dedupe_key is not None:
            dedupe.check_key(dedupe_key, dedupe_seconds)
            old = await self._submitted_by_older_version(agent_id, name, dedupe_key)
            if old is not None:
                return old
            submitter = sent_by.agent_id if sent_by is not None else ""
            task_id = dedupe.dedupe_id(agent_id, name, submitter, dedupe_key)
        task = self._new_task(
            agent,
            handler,
            name,
            payload,
            task_id=task_id,
            priority=priority,
            delay_seconds=delay_seconds,
            max_attempts=max_attempts,
            timeout_seconds=timeout_seconds,
        )
        if sent_by is not None:
            task.sent_by = sent_by
        if dedupe_key is not None:
            # What the caller gave, and no option of the handler: that may change meanwhile.
            content = {
                "payload": task.payload,
                "priority": priority or "normal",
                "max_attempts": max_attempts or transitions.MAX_ATTEMPTS,
                "timeout_seconds": task.timeout_seconds,
                "delay_seconds": float(delay_seconds),
            }
            dedupe.promise(
                task,
                dedupe_key,
                dedupe_seconds,
                content,
                now=self._state.clock.now(),
                serializer=self._state.manager.serializer,
            )
        try:
            await self._store_new(agent, task, sender=sender)
        except RevisionConflictError:
            if dedupe_key is None:
                raise  # an id factory that repeats itself
            await self._add_stored(task)
            stored = await self.get(task)
            dedupe.check_same(stored, task)
            return stored
        return copied(task)

    async def submit_run(
        self,
        agent_id: str,
        name: str,
        payload: object,
        *,
        task_id: str,
        scheduled_for: datetime,
        add: Callable[[Group], None],
    ) -> Task:
        """Queue the run of a schedule, in one commit with what ``add`` adds.

        Raises ``RevisionConflictError`` when another runtime was quicker, and as ``submit``.
        """
        agent = self._state.agent(agent_id)
        handler = self._handlers.get(agent.state.agent_type, name)
        task = self._new_task(agent, handler, name, payload, task_id=task_id)
        task.scheduled_for = stamp(scheduled_for)
        await self._store_new(agent, task, add=add)
        return task

    def _new_task(
        self,
        agent: LiveAgent,
        handler: RegisteredHandler | None,
        name: str,
        payload: object,
        *,
        task_id: str | None,
        priority: Priority | None = None,
        delay_seconds: float = 0.0,
        max_attempts: int | None = None,
        timeout_seconds: float | None = None,
    ) -> Task:
        """Return a new task with what its handler says where the caller does not."""
        task = transitions.new_task(
            task_id or self._state.new_id(),
            agent.agent_id,
            name,
            as_object(payload) if handler is None else handler.payload_to_stored(payload),
            now=self._state.clock.now(),
            priority=priority or (handler and handler.priority) or "normal",
            delay_seconds=delay_seconds,
            max_attempts=max_attempts
            if max_attempts is not None
            else (handler and handler.max_attempts) or transitions.MAX_ATTEMPTS,
            timeout_seconds=timeout_seconds,
        )
        if handler is not None and handler.payload_version != 1:
            task.payload_version = handler.payload_version
        return task

    async def _store_new(
        self,
        agent: LiveAgent,
        task: Task,
        *,
        sender: LiveAgent | None = None,
        add: Callable[[Group], None] | None = None,
    ) -> None:
        """Store a new task, and give it to its agent. Raises ``RevisionConflictError``."""
        if self._state.telemetry is not None:
            task.trace = dict(self._state.telemetry.submitted(task))
        group = self._state.manager.new_group()
        group.save("tasks", (agent.agent_id, task.task_id), task, expected=0)
        if add is not None:
            add(group)
        try:
            [revision, *_] = await self._state.commit(group, *filter(None, [sender]))
        except asyncio.CancelledError:
            await self._add_stored(task)  # the change was handed over, and may have been made
            raise
        if task.task_id not in agent.tasks:  # else it was read from the store, and may have run
            agent.put(LiveTask(task, revision), task, revision)
        if agent.leased and self._handlers.get(agent.state.agent_type, task.name) is None:
            self.report_handlerless(agent, task)
        agent.changed.set()

    def report_handlerless(self, agent: LiveAgent, task: Task) -> None:
        """Say, once for each name, that a task waits because it has no handler."""
        if task.name not in agent.reported:
            agent.reported.add(task.name)
            why = self._handlers.missing(agent.state.agent_type, task.name)
            logger.warning(
                "task %s/%s (%s) waits: %s", agent.agent_id, task.task_id, task.name, why
            )

    async def _add_stored(self, task: Task) -> None:
        """Give the agent a task that was stored while no caller waited for it."""
        agent, key = self._state.agent(task.agent_id), (task.agent_id, task.task_id)
        # Under the lock, so that what is read is not older than a concurrent save.
        with contextlib.suppress(AgentStateError):
            async with agent.lock:
                stored = await self._state.manager.load_with_revision("tasks", key)
                if stored is not None and task.task_id not in agent.tasks:
                    agent.apply_loaded(stored)
                    agent.changed.set()

    async def _submitted_by_older_version(
        self, agent_id: str, name: str, dedupe_key: str
    ) -> Task | None:
        """Return the task that was submitted when a key was the agent's only."""
        key = (agent_id, _old_dedupe_id(agent_id, dedupe_key))
        stored = await self._state.manager.load("tasks", key)
        return stored if isinstance(stored, Task) and stored.name == name else None

    async def get(self, task: TaskRef) -> Task:
        """Return the task as it is stored now, or as it was when it was cleaned up.

        ``task``: also its id alone. Raises ``StateNotFoundError``, and ``StateValidationError``
        when several agents have a task of that id.
        """
        self._state.check_running()
        return await self._operator.get(task)

    async def list(self, agent_id: str, *, status: TaskStatus | None = None) -> list[Task]:
        """Return the agent's stored tasks (None: of any status), in the order of the queue.

        Cleaned-up tasks are not among them.
        """
        self._state.check_running()
        wanted = TaskFilter(agent_id=agent_id, status=status or ())
        found = await self._operator.search(wanted, newest_first=False, limit=None, after=None)
        return sorted(found, key=transitions.order)

    @overload
    async def result(self, task: TaskRef, *, timeout_seconds: float | None = None) -> Any: ...
    @overload
    async def result(
        self, task: TaskRef, result_type: type[T], *, timeout_seconds: float | None = None
    ) -> T: ...
    async def result(
        self,
        task: TaskRef,
        result_type: type[Any] | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Any:
        """Wait for a task and return what its handler returned.

        ``task``: also its id alone. ``result_type``: the result is validated as this type; with
        None it is of the type that the handler of that name, if it is registered here, is annotated
        to return, and else the JSON value. ``timeout_seconds``: how long to wait at most; None for
        any time.

        Raises ``TaskFailedError`` (with the task's ``status``, and the handler's error as its
        ``__cause__`` if it was raised in this process, not long ago) when the task ended as
        ``dead`` or ``cancelled``, or when the runtime stops first; ``TaskTimeoutError`` when it has
        not ended in time, and goes on; ``StateNotFoundError`` when the task does not exist, or is
        unfinished and its agent is not in this runtime; and ``StateValidationError`` when the
        result is not of ``result_type``, or several agents have a task of that id.
        """
        self._state.check_running()
        if timeout_seconds is not None:
            check_duration("timeout_seconds", timeout_seconds)
        key = await self._operator.locate_any(task)
        agent = self._state.agents.get(key[0])
        live = agent.tasks.get(key[1]) if agent is not None else None
        with self.waiters.waiting(key) as waiter:
            if agent is None or not agent.leased or live is None:
                done = await self.get(key)
                if not transitions.is_finished(done):
                    self._state.agent(key[0])
                    done = await self._ended(waiter, timeout_seconds, key)
            else:
                done = await self._ended(waiter, timeout_seconds, key)
        cause = live.cause if live is not None else None
        return self.result_of(with_stored_id(done, key), result_type, cause=cause)

    def result_of(
        self,
        done: Task,
        result_type: type[Any] | None = None,
        *,
        cause: BaseException | None = None,
    ) -> Any:
        """Return the result of a finished task. Raises as ``result``."""
        key = _key_of(done)
        if meaning_of(done.status) != "completed":
            cause = cause or self._state.cause_of(done)
            raise TaskFailedError(done.status, done.error, key=key) from cause
        if result_type is None:
            agent = self._state.agents.get(key[0])
            agent_type = agent.state.agent_type if agent is not None else None
            handler = self._handlers.get(agent_type, done.name)
            return done.result if handler is None else handler.result_from_json(done.result)
        try:
            return TypeAdapter(result_type).validate_python(done.result)
        except ValidationError as error:
            message = f"the result of task {key[1]} is not a {result_type.__name__}: {error}"
            raise StateValidationError(message, kind="tasks", key=key) from error

    async def look_up(self, tasks: Iterable[TaskRef], *, waiting: Key) -> builtins.list[Task]:
        """Return the tasks that the task ``waiting`` is to wait for, in their order.

        Raises ``StateValidationError`` when one of them waits for that one, and as ``get``.
        """
        found = []
        for task in tasks:
            key = await self._operator.locate_any(task)
            found.append(with_stored_id(await self.get(key), key))
        unfinished = [_key_of(task) for task in found if not transitions.is_finished(task)]
        if await self.waiters.is_awaited_by(waiting, unfinished):
            raise StateValidationError("the task would wait for itself", kind="tasks", key=waiting)
        return found

    async def _ended(
        self, waiter: asyncio.Future[Task], seconds: float | None, key: tuple[str, str]
    ) -> Task:
        """Return the task once it has ended. Raises as ``result``."""
        timer = None if seconds is None else asyncio.ensure_future(self._state.clock.sleep(seconds))
        try:
            both: set[asyncio.Future[Any]] = {waiter} if timer is None else {waiter, timer}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if timer is not None:
                timer.cancel()
        if not waiter.done():
            raise TaskTimeoutError(f"not ended within {seconds:g} s", kind="tasks", key=key)
        try:
            return waiter.result()
        except StateNotFoundError:
            return await self.get(key)  # another runtime has finished it, and it was archived

    # -- operating -----------------------------------------------------------------------------

    async def search(
        self,
        wanted: TaskFilter = ANY_TASK,
        *,
        newest_first: bool = False,
        limit: int | None = None,
        after: Task | None = None,
    ) -> builtins.list[Task]:
        """Return the stored tasks of all agents that match, by the time of their submission.

        ``limit``: at most so many; ``after``: only those behind this one, which may have changed
        since, or be gone. Every stored task is read. Cleaned-up tasks are not among them.
        """
        if limit is not None:
            check_count("limit", limit)
        self._state.check_running()
        behind = position(after) if after is not None else None
        return await self._operator.search(
            wanted, newest_first=newest_first, limit=limit, after=behind
        )

    async def watch(self, wanted: TaskFilter = ANY_TASK) -> AsyncGenerator[Task, None]:
        """Yield each task that matches as it changes, whichever process changes it.

        From the first step of the loop on, until the runtime stops. Changes of one task that
        follow one another quickly may be given as one, the last. Raises ``RuntimeNotStartedError``
        before the start, after a stop, and when the runtime is aborted.
        """
        self._state.check_running()
        async with contextlib.aclosing(await self._state.manager.subscribe()) as notices:
            self._watches.add(notices)
            async for notice in notices:
                if notice.kind != "tasks" or len(notice.key) != 2 or notice.revision is None:
                    continue
                try:
                    stored = await self._state.manager.load("tasks", notice.key)
                except (StateCorruptedError, SchemaTooNewError):
                    continue  # the reconciler reports it
                if isinstance(stored, Task):
                    task = with_stored_id(stored, notice.key)
                    if wanted.matches(task, self._state.clock.now()):
                        yield task
        self._state.check_not_aborted()

    async def end_watches(self) -> None:
        """End every ``watch``, as the store does when it is closed."""
        for notices in [*self._watches]:
            await notices.aclose()

    async def retry(self, task: TaskRef) -> bool:
        """Run a dead, failed or cancelled task again, at once; return False for any other.

        It has all its ``max_attempts`` again, its remembered steps, and the payload that is
        stored now. Raises as ``get``.
        """
        return await self._applied("retry", task)

    async def cancel(self, task: TaskRef) -> bool:
        """Cancel a task, running or not; return False if it was finished already.

        Raises as ``get``.
        """
        return await self._applied("cancel", task)

    async def delete(self, task: TaskRef) -> bool:
        """Remove a finished task; return False if it is not finished: cancel it first.

        Its dedupe key is free again. Raises as ``get``.
        """
        return await self._applied("delete", task)

    async def retry_all(
        self, wanted: TaskFilter = ANY_TASK, *, dry_run: bool = False
    ) -> TaskReport:
        """Run all tasks again that match; dead and failed ones, unless the filter has a status.

        ``dry_run``: count them only.
        """
        return await self.perform(TaskRequest(action="retry", filter=wanted, dry_run=dry_run))

    async def cancel_all(self, wanted: TaskFilter, *, dry_run: bool = False) -> TaskReport:
        """Cancel all unfinished tasks that match. ``dry_run``: count them only."""
        return await self.perform(TaskRequest(action="cancel", filter=wanted, dry_run=dry_run))

    async def delete_all(self, wanted: TaskFilter, *, dry_run: bool = False) -> TaskReport:
        """Remove all finished tasks that match. ``dry_run``: count them only."""
        return await self.perform(TaskRequest(action="delete", filter=wanted, dry_run=dry_run))

    async def perform(self, request: TaskRequest) -> TaskReport:
        """Do what another program requests, by HTTP or by a file in the state directory."""
        self._state.check_running()
        return await self._operator.perform(request)

    async def _applied(self, action: Action, task: TaskRef) -> bool:
        self._state.check_running()
        return (await self._operator.apply(action, task)).changed

    async def apply(self, action: Action, key: Key) -> Applied:
        """Change one task, in memory and in the store. Raises ``StateNotFoundError``."""
        agent_id, task_id = key
        agent = self._state.agents.get(agent_id)
        if agent is None or (action == "delete" and not agent.leased):
            return await self._stored.apply(action, key)
        if action == "delete":
            live, changed = await self._state.delete_task(agent, task_id, transitions.is_finished)
            return Applied(changed, live.task.status)
        now = self._state.clock.now()
        live, changed = await self._state.change_task(
            agent, task_id, lambda task: changed_by(action, task, now)
        )
        if changed and transitions.is_finished(live.task):
            self.waiters.notify_finished(live.task)
            self._state.activity.set()
        elif changed and action == "cancel" and live is agent.current:
            agent.request_stop("cancel")
        elif changed:
            agent.changed.set()
        return Applied(changed, live.task.status)

    def _live(self, task_id: str) -> builtins.list[Key]:
        """Return the keys of the unfinished tasks of an id."""
        agents = self._state.agents.values()
        return [(agent.agent_id, task_id) for agent in agents if task_id in agent.tasks]


def _key_of(task: Task) -> tuple[str, str]:
    return task.agent_id, task.task_id


def _old_dedupe_id(agent_id: str, dedupe_key: str) -> str:
    """Return the id that a version without scopes made of a key."""
    name = f"{agent_id}\0{dedupe_key}".encode("utf-8", "surrogatepass")
    return f"once-{sha256(name).hexdigest()[:20]}"
