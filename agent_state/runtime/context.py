"""The context of one attempt: what a handler is given to act durably."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, NoReturn, ParamSpec, TypeVar, cast, overload

from agent_state.clock import check_duration, later, stamp
from agent_state.errors import LeaseLostError, TaskTimeoutError, UnknownStepError
from agent_state.models import (
    ConversationMessage,
    MailMessage,
    Priority,
    Step,
    Task,
    TaskReference,
    WakeEvent,
    copied,
    detached,
)
from agent_state.runtime import transitions
from agent_state.runtime.attempt import Mark, StepChanges, WorkingCopy
from agent_state.runtime.dedupe import DEDUPE_SECONDS, dedupe_id
from agent_state.runtime.limiter import AttemptLimiter
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.mail import MailService, mark_archived, mark_read, mark_replied, new_reply
from agent_state.runtime.operations import TaskRef
from agent_state.runtime.rate_limits import RateLimit
from agent_state.runtime.results import ResultType, as_json
from agent_state.runtime.state import RuntimeState
from agent_state.runtime.task_queue import LiveTask
from agent_state.runtime.tasks import TaskService
from agent_state.storage.executor import shielded
from agent_state.tool_calls import UNKNOWN_OUTCOME, ToolCallRepair, repair_tool_calls

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RequestedSleep:
    """The sleep that a handler asked for."""

    seconds: float | None
    until: datetime | None
    wake_on: Sequence[WakeEvent]
    reason: str | None
    mail_seen: Sequence[str] | None
    """The ids of the last ``inbox()``; None when the handler did not look."""


@dataclass(frozen=True, slots=True)
class RequestedWait:
    """The tasks whose ends a handler waits for."""

    tasks: Sequence[TaskReference]
    name: str
    """What the wait is recognised by in a later attempt."""
    deadline: datetime | None
    """When the wait ends all the same; None for never."""


class SuspendError(BaseException):
    """Ends an attempt whose handler asked to sleep, or to wait; the runner catches it.

    Not an ``Exception``, so that a handler's own ``except Exception`` does not stop it.
    """

    def __init__(self, request: RequestedSleep | RequestedWait) -> None:
        super().__init__("the attempt ends until it may go on")
        self.request = request


class TaskContext:
    """One attempt at one task, as its handler sees it.

    Memory, data, configuration, conversation and the marks of mail are a working copy. They are
    stored together with the task at the commit points: ``checkpoint``, ``sleep``, and the end of
    an attempt that returns. An attempt that ends otherwise leaves none of it; the next one begins
    with what the last commit point stored. Steps, and what is sent, are durable when the ``await``
    returns. After its end an attempt cannot change anything: the context raises
    ``LeaseLostError``.
    """

    def __init__(
        self,
        state: RuntimeState,
        mail: MailService,
        tasks: TaskService,
        agent: LiveAgent,
        live: LiveTask,
        *,
        copy: WorkingCopy,
        limiter: AttemptLimiter,
    ) -> None:
        self._state = state
        self._mail = mail
        self._tasks = tasks
        self._agent = agent
        self._live = live
        self._copy = copy
        self._limiter = limiter
        self._sent = 0
        self._waits = Counter[str]()
        self._taken: dict[str, datetime] = {}
        self._ended = False
        self._ran: set[str] = set()
        self._seen_mail: list[str] | None = None
        self._task_before = live.task

    def end(self) -> None:
        """End the attempt: code that it left running cannot change the task any more."""
        self._ended = True

    # -- the agent and the task --------------------------------------------------------------

    @property
    def agent_id(self) -> str:
        return self._agent.agent_id

    @property
    def task(self) -> Task:
        """The task as it is stored now, as a copy."""
        return copied(self._live.task)

    @property
    def attempt(self) -> int:
        """The number of this attempt; 1 for the first."""
        return self._live.task.attempts

    @property
    def unknown_steps(self) -> list[str]:
        """Steps that had started when an earlier attempt ended, with no known outcome."""
        return transitions.unknown_steps(self._task_before)

    @property
    def memory(self) -> dict[str, Any]:
        """The agent's working memory, to be changed freely until the next commit point."""
        return cast("dict[str, Any]", self._copy.part("working_memory"))

    @property
    def data(self) -> dict[str, Any]:
        """Data of the agent's own kind; stored as ``memory`` is."""
        return cast("dict[str, Any]", self._copy.part("agent_data"))

    @property
    def configuration(self) -> dict[str, Any]:
        """The application's settings for the agent; stored as ``memory`` is."""
        return cast("dict[str, Any]", self._copy.part("configuration"))

    @property
    def history(self) -> list[Any]:
        """The agent's conversation, oldest turn first; stored as ``memory`` is."""
        return cast("list[Any]", self._copy.part("conversation_history"))

    @property
    def progress(self) -> dict[str, Any]:
        """The progress that the last ``checkpoint`` of this task saved, in any attempt."""
        return detached(self._live.task.progress)

    def now(self) -> datetime:
        """Return the runtime's time, in UTC."""
        return self._state.clock.now()

    def add_turn(self, role: str, content: Any) -> None:
        """Add a turn to the agent's conversation."""
        turn = ConversationMessage(role=role, content=content, timestamp=stamp(self.now()))
        self._copy.add_turn(turn.model_dump())

    def repair_history(self, *, outcome: str = UNKNOWN_OUTCOME) -> ToolCallRepair:
        """Give each tool call in ``history`` that has no result one: its outcome is unknown.

        For a conversation that is to be sent to a model, where an earlier attempt may have died
        between a call and its result. See ``agent_state.repair_tool_calls`` for the forms of
        messages and what else is repaired.
        """
        repair = repair_tool_calls(self.history, outcome=outcome)
        if repair:
            self.history[:] = repair.messages
        return repair

    # -- progress ----------------------------------------------------------------------------

    async def checkpoint(self, progress: Mapping[str, Any]) -> None:
        """Store the progress of this task, with all that the attempt has changed so far.

        A later attempt begins with that, and runs the handler from its top: look at ``progress``
        to see what was done.
        """
        saved = as_json(dict(progress))
        await self._save(
            lambda task: task.model_copy(update={"progress": saved}), commit_point=True
        )

    @overload
    async def step(
        self, name: str, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def step(
        self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    async def step(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``function(*args, **kwargs)`` and store its result; a later attempt gets the result.

        What the step changed in the working copy is stored with the result, and is there again
        when a later attempt gets it. A plain function runs in a thread. The result is JSON, or of
        the type that the function is annotated to return; it is given as it is stored: a tuple as
        a list, a dataclass as a dict, unless the annotation says so. A step that had started when
        an earlier attempt ended, and may have had its effect, runs again. Each step of a task
        has its own name; the second use of one in an attempt raises ``ValueError``. A
        plain function gets a copy of memory of its own where it asks the context for it, so that
        steps side by side do not disturb each other; what it changed is there when it has ended.
        Raises ``StateValidationError`` when it changed memory that was asked for outside of it
        while another one ran.
        """
        if name in self._ran:
            raise ValueError(f"step {name!r} has run in this attempt; give each step its own name")
        self._ran.add(name)
        known = self._live.task.steps.get(name)
        if known is not None and known.status == "done":
            self._check_running()
            self._copy.apply(name, known.memory)
            return ResultType(function).from_json(known.result)
        return await self._run_step(name, ResultType(function), partial(function, *args, **kwargs))

    @overload
    async def step_at_most_once(
        self, name: str, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def step_at_most_once(
        self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    async def step_at_most_once(
        self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a step as ``step`` does, but never again once it had started.

        A step that had started when an earlier attempt ended, with no known outcome, raises
        ``UnknownStepError``; unless the handler catches it, that ends the task as ``dead``.
        """
        known = self._live.task.steps.get(name)
        if known is not None and known.status == "started" and name not in self._ran:
            raise UnknownStepError(
                f"step {name!r} started in attempt {known.attempt} and may have had its effect",
                kind="tasks",
                key=(self.agent_id, self._live.task.task_id),
            )
        return await self.step(name, function, *args, **kwargs)

    async def _run_step(
        self, name: str, result_type: ResultType, function: Callable[[], Any]
    ) -> Any:
        """Run a step and store its start and its outcome."""
        telemetry = self._state.telemetry
        if telemetry is None:
            return await self._do_step(name, result_type, function)
        with telemetry.step(self._live.task, name):
            return await self._do_step(name, result_type, function)

    async def _do_step(
        self, name: str, result_type: ResultType, function: Callable[[], Any]
    ) -> Any:
        await self._save_step(name, lambda: Step(status="started", attempt=self.attempt))
        with self._copy.running(name) as changes:
            try:
                result = result_type.to_json(await self._call(function, changes))
            except Exception as error:
                text = transitions.format_error(error)
                failed = Step(status="failed", attempt=self.attempt, error=text)
                await self._save_step(name, lambda: failed)
                raise

            def done() -> Step:
                step = Step(status="done", attempt=self.attempt, result=result)
                if changes.patches:
                    step.memory = [*changes.patches]
                return step

            await self._save_step(name, done)
        return result_type.from_json(result)

    async def _call(self, function: Callable[[], Any], changes: StepChanges) -> Any:
        if inspect.iscoroutinefunction(function):
            return await self._copy.run(changes, function())
        result = await self._copy.run_in_thread(changes, partial(_call, function))
        if inspect.isawaitable(result):
            try:
                return await self._copy.run(changes, _awaited(result))
            finally:
                self._copy.take_over(changes)  # what the thread has given to the coroutine
        return result

    async def _save_step(self, name: str, step: Callable[[], Step]) -> None:
        await self._save(
            lambda task: task.model_copy(update={"steps": {**task.steps, name: step()}})
        )

    async def _save(self, change: Callable[[Task], Task], *, commit_point: bool = False) -> None:
        def unless_ended(task: Task) -> Task:
            self._check_running()
            return change(task)

        # Memory follows the store even when the handler is cancelled meanwhile.
        await shielded(
            self._state.save(
                self._agent,
                live=self._live,
                change=unless_ended,
                copy=self._copy if commit_point else None,
                task_only=not commit_point,
            )
        )

    def _check_running(self) -> None:
        """Refuse what code does that has outlived its attempt."""
        if self._ended or not self._agent.leased:
            key = (self.agent_id, self._live.task.task_id)
            raise LeaseLostError("the attempt has ended", kind="tasks", key=key)

    # -- mail, tasks, sleep ------------------------------------------------------------------

    async def send_mail(
        self,
        to: str,
        *,
        subject: str,
        body: Any = "",
        priority: Priority = "normal",
        expects_reply: bool = False,
        dedupe_key: str | None = None,
    ) -> MailMessage:
        """Send a message once, however often this task is attempted.

        A later attempt is recognised by the order of its messages and tasks; give ``dedupe_key``
        when that order may differ from one attempt to the next.
        """
        self._check_running()
        return await self._mail.send(
            self.agent_id,
            to,
            subject=subject,
            body=body,
            priority=priority,
            expects_reply=expects_reply,
            dedupe_key=self._own_id(dedupe_key),
            sender=self._agent,
            sent_by=self._sending_task,
        )

    async def reply(
        self, message: MailMessage, body: Any, *, priority: Priority = "normal"
    ) -> MailMessage:
        """Answer a message from the inbox, once; a second answer returns the first one.

        The message becomes ``replied`` at the next commit point.
        """
        self._check_running()
        known = await self._mail.find(self.agent_id, message.message_id) or message
        sent = await self._mail.first_answer(known)
        if sent is None:
            answer = new_reply(known, self.agent_id, body, now=self.now(), priority=priority)
            answer.sent_by = self._sending_task
            sent = await self._mail.deliver(answer, sender=self._agent)
        self._copy.mark(
            message.message_id, partial(mark_replied, reply_id=sent.message_id, now=self.now())
        )
        return sent

    async def inbox(self, *, limit: int | None = None) -> list[MailMessage]:
        """Return the unread mail, oldest first, at most ``limit``.

        This marks nothing as read; ``read_mail`` does.
        """
        self._check_running()
        inbox = map(self._copy.message, self._agent.mail.unread())
        found = (message for message in inbox if message.status == "unread")
        unread = [copied(message) for message in islice(found, limit)]
        self._seen_mail = [message.message_id for message in unread]
        return unread

    async def read_mail(self, message_id: str) -> MailMessage:
        """Return a message; it becomes ``read`` at the next commit point.

        Raises ``StateNotFoundError``.
        """
        return self._mark(message_id, partial(mark_read, now=self.now()))

    async def archive_mail(self, message_id: str) -> MailMessage:
        """Return a message; it leaves the inbox at the next commit point.

        Raises ``StateNotFoundError``.
        """
        return self._mark(message_id, partial(mark_archived, now=self.now()))

    def _mark(self, message_id: str, mark: Mark) -> MailMessage:
        self._check_running()
        message = self._mail.get(self.agent_id, message_id)
        self._copy.mark(message_id, mark)
        return self._copy.message(message)

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
    ) -> Task:
        """Queue a task for an agent, once however often this one is attempted.

        The options are those of ``runtime.tasks.submit``; ``dedupe_key`` is this agent's own.
        """
        self._check_running()
        return await self._tasks.submit(
            agent_id,
            name,
            payload,
            priority=priority,
            delay_seconds=delay_seconds,
            max_attempts=max_attempts,
            timeout_seconds=timeout_seconds,
            dedupe_key=dedupe_key or self._own_id(None),
            dedupe_seconds=dedupe_seconds if dedupe_key else 0,
            sender=self._agent,
            sent_by=self._sending_task,
        )

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
        """Return the result of another task, such as one that this one has submitted.

        While that task has not ended, this attempt ends, as with ``sleep``: it is a commit point,
        the attempt does not count, the agent does other tasks meanwhile, and once the other task
        has ended the handler starts from the top. ``result_type`` is as in
        ``runtime.tasks.result``. ``timeout_seconds``: how long to wait at most, from the first
        attempt that waits; each call has a time of its own, by its order among those for the same
        tasks, and each attempt after a failed one anew.

        Raises ``TaskFailedError`` when the task ended as ``dead`` or ``cancelled``,
        ``TaskTimeoutError`` when it has not ended in time, and goes on; ``StateNotFoundError``
        when it does not exist, and ``StateValidationError`` when it waits for this one. A task
        that ends after it was said to be late stays late.
        """
        [done] = await self._wait_for([task], timeout_seconds)
        return self._tasks.result_of(done, result_type)

    async def results(
        self, tasks: Iterable[TaskRef], *, timeout_seconds: float | None = None
    ) -> list[Any]:
        """Return the results of several tasks in their order, once all have ended.

        As ``result``; an error is that of the first one that failed, or is late.
        """
        found = await self._wait_for(tasks, timeout_seconds)
        return [self._tasks.result_of(done) for done in found]

    async def _wait_for(
        self, tasks: Iterable[TaskRef], timeout_seconds: float | None
    ) -> list[Task]:
        self._check_running()
        waiting = (self.agent_id, self._live.task.task_id)
        found = await self._tasks.look_up(tasks, waiting=waiting)
        unfinished = [
            TaskReference(agent_id=task.agent_id, task_id=task.task_id)
            for task in found
            if not transitions.is_finished(task)
        ]
        now, name, deadline = self.now(), "", None
        if timeout_seconds is not None:
            check_duration("timeout_seconds", timeout_seconds)
            name = dedupe_id(*(text for task in found for text in (task.agent_id, task.task_id)))
            self._waits[name] += 1
            name = f"{name} {self._waits[name]}"
            known = transitions.time_of(self._live.task.wait_deadlines.get(name))
            deadline = known or later(now, timeout_seconds)
        late = [task for task in found if not transitions.is_finished_at(task, deadline)]
        if late and deadline is not None and deadline <= now:
            message = f"not ended within {timeout_seconds:g} s"
            key = (late[0].agent_id, late[0].task_id)
            raise TaskTimeoutError(message, kind="tasks", key=key)
        if unfinished:
            raise SuspendError(RequestedWait(unfinished, name, deadline))
        return found

    async def take(self, limit: RateLimit, amount: float = 1, *, wait: bool = True) -> None:
        """Wait until so much of a rate limit may be used, and count it, over all agents.

        It is stored when this returns, and counts whatever becomes of the attempt. With
        ``wait=False`` it was used already: nothing is waited for, but those that come wait longer;
        a negative amount was not needed after all, of what this attempt took last of the limit.
        Raises ``StateValidationError`` for more than the limit.
        """
        self._check_running()
        before = self._taken.get(limit.name)
        used_at = await self._limiter.take(limit, amount, self._live, wait=wait, before=before)
        if wait:
            self._taken[limit.name] = used_at

    async def sleep(
        self,
        *,
        seconds: float | None = None,
        until: datetime | None = None,
        wake_on: Sequence[WakeEvent] = (),
        reason: str | None = None,
    ) -> NoReturn:
        """End this attempt and let the agent sleep; on waking the handler starts from the top.

        This is a commit point, and the attempt does not count. With
        ``mail_received``, mail that came after the last ``inbox()`` wakes the agent at once.
        The options are those of ``runtime.agents.sleep``.
        """
        self._check_running()
        raise SuspendError(RequestedSleep(seconds, until, tuple(wake_on), reason, self._seen_mail))

    @property
    def _sending_task(self) -> TaskReference:
        return TaskReference(agent_id=self.agent_id, task_id=self._live.task.task_id)

    def _own_id(self, dedupe_key: str | None) -> str:
        if dedupe_key is None:
            self._sent += 1
            dedupe_key = str(self._sent)
        return f"{self._live.task.task_id}.{dedupe_key}"


def _call(function: Callable[[], Any]) -> Any:
    """Run a step's function; a ``StopIteration``, which no future can hold, becomes an error."""
    try:
        return function()
    except StopIteration as error:
        raise RuntimeError("the step raised StopIteration") from error


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


Handler = Callable[[TaskContext, Task], Awaitable[object]]
"""The function that does the tasks of an agent type."""
NamedHandler = (
    Callable[[TaskContext], Awaitable[object]] | Callable[[TaskContext, Any], Awaitable[object]]
)
"""The function that does the tasks of one name: it takes its payload, the task, or neither."""

MailHandler = Callable[[TaskContext, MailMessage], Awaitable[object]]
"""The function that handles the messages of an agent type."""
