"""The tasks of one runtime: submit, look up, cancel, and wait for results."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError

from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    StateNotFoundError,
    StateValidationError,
    TaskFailedError,
)
from agent_state.models import ARCHIVE, Priority, SendingTask, Task, TaskStatus, meaning_of
from agent_state.runtime import dedupe, transitions
from agent_state.runtime.dedupe import DEDUPE_SECONDS
from agent_state.runtime.handlers import HandlerRegistry
from agent_state.runtime.payloads import as_object
from agent_state.runtime.state import LiveAgent, LiveTask, RuntimeState, logger, with_stored_id

T = TypeVar("T")

TaskRef = Task | tuple[str, str]
"""A task, or its ``(agent_id, task_id)``."""


class TaskWaiters:
    """The callers that wait for a task to end. An id is unique for its agent only."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start: its futures are bound to an event loop."""
        self._waiters: dict[Key, list[asyncio.Future[Task]]] = {}

    def __len__(self) -> int:
        """Return how many tasks are waited for."""
        return len(self._waiters)

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
        """Wake the callers that wait for this task."""
        for waiter in self._waiters.pop((task.agent_id, task.task_id), ()):
            if not waiter.done():
                waiter.set_result(task)

    def notify_stopped(self) -> None:
        """Fail every wait: the runtime stops."""
        while self._waiters:
            key, waiters = self._waiters.popitem()
            agent = self._state.agents.get(key[0])
            live = agent.tasks.get(key[1]) if agent is not None else None
            status = live.task.status if live is not None else "pending"
            for waiter in waiters:
                if not waiter.done():
                    reason = "the runtime was stopped first"
                    waiter.set_exception(TaskFailedError(status, reason, key=key))

    async def refresh(self) -> None:
        """Wake the callers that wait for a task that another runtime has finished."""
        for key in list(self._waiters):
            stored = await self._state.manager.load("tasks", key)
            if isinstance(stored, Task) and transitions.is_finished(stored):
                self.notify_finished(with_stored_id(stored, key))


class TaskService:
    """``runtime.tasks``: the tasks of this runtime's agents."""

    def __init__(self, state: RuntimeState, handlers: HandlerRegistry) -> None:
        self._state = state
        self._handlers = handlers
        self.waiters = TaskWaiters(state)

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
        sent_by: SendingTask | None = None,
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
        handler by that name does not take, ``StateValidationError`` for an unknown priority,
        and ``LeaseLostError`` when another runtime has taken the sender.
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
        task = transitions.new_task(
            task_id or self._state.new_id(),
            agent_id,
            name,
            as_object(payload) if handler is None else handler.payload_to_stored(payload),
            now=self._state.clock.now(),
            priority=priority or (handler and handler.priority) or "normal",
            delay_seconds=delay_seconds,
            max_attempts=max_attempts
            or (handler and handler.max_attempts)
            or transitions.MAX_ATTEMPTS,
            timeout_seconds=timeout_seconds,
        )
        if handler is not None and handler.payload_version != 1:
            task.payload_version = handler.payload_version
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
        key = (agent_id, task.task_id)
        group = self._state.manager.new_group()
        group.save("tasks", key, task, expected=0)
        try:
            [revision, *_] = await self._state.commit(group, *filter(None, [sender]))
        except RevisionConflictError:
            if dedupe_key is None:
                raise  # an id factory that repeats itself
            await self._add_stored(task)
            stored = await self.get(task)
            dedupe.check_same(stored, task)
            return stored
        except asyncio.CancelledError:
            await self._add_stored(task)  # the change was handed over, and may have been made
            raise
        if task.task_id not in agent.tasks:  # else it was read from the store, and may have run
            agent.put(LiveTask(task, revision), task, revision)
        if agent.leased and handler is None:
            self.report_handlerless(agent, task)
        agent.changed.set()
        return task.model_copy(deep=True)

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

        Raises ``StateNotFoundError``.
        """
        agent_id, task_id = key = _key_of(task)
        stored = await self._state.manager.load("tasks", key)
        if isinstance(stored, Task):
            return stored
        async for entry in self._state.manager.read_log("tasks", (agent_id, ARCHIVE)):
            if entry.record.get("task_id") == task_id:
                return Task.model_validate(entry.record)
        raise StateNotFoundError("no such task", kind="tasks", key=key)

    async def list(self, agent_id: str, *, status: TaskStatus | None = None) -> list[Task]:
        """Return the agent's stored tasks (None: of any status), in the order of the queue.

        Cleaned-up tasks are not among them.
        """
        found = [
            with_stored_id(loaded.state, loaded.key)
            async for loaded in self._state.manager.scan("tasks", agent_id)
            if isinstance(loaded.state, Task)
            and len(loaded.key) == 2
            and status in (None, meaning_of(loaded.state.status))
        ]
        return sorted(found, key=transitions.order)

    @overload
    async def result(self, task: TaskRef) -> Any: ...
    @overload
    async def result(self, task: TaskRef, result_type: type[T]) -> T: ...
    async def result(self, task: TaskRef, result_type: type[Any] | None = None) -> Any:
        """Wait for a task and return what its handler returned.

        ``result_type``: the result is validated as this type. With None it is of the type that
        the handler of that name, if it is registered here, is annotated to return, and else the
        JSON value.

        Raises ``TaskFailedError`` (with the task's ``status``, and the handler's error as its
        ``__cause__`` if it was raised in this process) when the task ended as ``dead`` or
        ``cancelled``, or when the runtime stops first; ``StateNotFoundError`` when the task does
        not exist, or is unfinished and its agent is not in this runtime; and
        ``StateValidationError`` when the result is not of ``result_type``.
        """
        agent_id, task_id = key = _key_of(task)
        agent = self._state.agents.get(agent_id)
        live = agent.tasks.get(task_id) if agent is not None else None
        with self.waiters.waiting(key) as waiter:
            if agent is not None and agent.leased and live is not None:
                done = await waiter
            else:
                done = await self.get(key)
                if not transitions.is_finished(done):
                    self._state.agent(agent_id)
                    done = await waiter
        if meaning_of(done.status) != "completed":
            cause = live.cause if live is not None else None
            raise TaskFailedError(done.status, done.error, key=key) from cause
        if result_type is None:
            agent_type = agent.state.agent_type if agent is not None else None
            handler = self._handlers.get(agent_type, done.name)
            return done.result if handler is None else handler.result_from_json(done.result)
        try:
            return TypeAdapter(result_type).validate_python(done.result)
        except ValidationError as error:
            message = f"the result of task {task_id} is not a {result_type.__name__}: {error}"
            raise StateValidationError(message, kind="tasks", key=key) from error

    async def cancel(self, task: TaskRef) -> bool:
        """Cancel a task, running or not; return False if it was finished already."""
        agent_id, task_id = _key_of(task)
        agent = self._state.agent(agent_id)
        live = agent.tasks.get(task_id)
        if live is None or not await self._state.save(
            agent, live=live, change=self._cancelled, outside=True
        ):
            return False
        if transitions.is_finished(live.task):
            self.waiters.notify_finished(live.task)
            self._state.activity.set()
        elif live is agent.current:
            agent.request_stop("cancel")
        return True

    def _cancelled(self, task: Task) -> Task | None:
        """Decide once no other save runs: the task may just have been claimed, or have ended."""
        if transitions.is_finished(task):
            return None
        if task.status == "in_progress":
            return task.model_copy(update={"cancel_requested": True})
        return transitions.cancel(task, self._state.clock.now())


def _key_of(task: TaskRef) -> tuple[str, str]:
    return (task.agent_id, task.task_id) if isinstance(task, Task) else task


def _old_dedupe_id(agent_id: str, dedupe_key: str) -> str:
    """Return the id that a version without scopes made of a key."""
    name = f"{agent_id}\0{dedupe_key}".encode("utf-8", "surrogatepass")
    return f"once-{sha256(name).hexdigest()[:20]}"
