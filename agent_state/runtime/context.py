"""The context of one attempt: what a handler is given to act durably."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, ParamSpec, TypeVar, overload

from agent_state.clock import stamp
from agent_state.errors import LeaseLostError, UnknownStepError
from agent_state.models import (
    ConversationMessage,
    MailMessage,
    Priority,
    SendingTask,
    Step,
    Task,
    WakeEvent,
    detached,
)
from agent_state.runtime import transitions
from agent_state.runtime.dedupe import DEDUPE_SECONDS
from agent_state.runtime.mail import MailService
from agent_state.runtime.state import LiveAgent, LiveTask, RuntimeState
from agent_state.runtime.tasks import TaskService

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


class SuspendError(BaseException):
    """Ends an attempt whose handler asked to sleep; the runner catches it.

    Not an ``Exception``, so that a handler's own ``except Exception`` does not stop it.
    """

    def __init__(self, request: RequestedSleep) -> None:
        super().__init__("the agent falls asleep")
        self.request = request


class TaskContext:
    """One attempt at one task, as its handler sees it.

    A change made through the context is durable when the ``await`` returns. The agent's memory
    is saved with the next of them, and when the attempt ends. After its end an attempt cannot
    change the task any more: the context raises ``LeaseLostError``.
    """

    def __init__(
        self,
        state: RuntimeState,
        mail: MailService,
        tasks: TaskService,
        agent: LiveAgent,
        live: LiveTask,
    ) -> None:
        self._state = state
        self._mail = mail
        self._tasks = tasks
        self._agent = agent
        self._live = live
        self._sent = 0
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
        return self._live.task.model_copy(deep=True)

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
        """The agent's working memory; change it freely, it is saved with the agent."""
        return self._agent.state.context.working_memory

    @property
    def data(self) -> dict[str, Any]:
        """Data of the agent's own kind, saved with the agent."""
        return self._agent.state.context.agent_data

    @property
    def configuration(self) -> dict[str, Any]:
        return self._agent.state.configuration

    @property
    def progress(self) -> dict[str, Any]:
        """The progress that the last ``checkpoint`` of this task saved, in any attempt."""
        return detached(self._live.task.progress)

    def now(self) -> datetime:
        """Return the runtime's time, in UTC."""
        return self._state.clock.now()

    def add_turn(self, role: str, content: Any) -> None:
        """Add a turn to the agent's conversation history."""
        turn = ConversationMessage(role=role, content=content, timestamp=stamp(self.now()))
        self._agent.state.context.conversation_history.append(turn.model_dump())

    # -- progress ----------------------------------------------------------------------------

    async def checkpoint(self, progress: Mapping[str, Any]) -> None:
        """Save the progress of this task, and the agent with it."""
        saved = detached(dict(progress))
        await self._save(lambda task: task.model_copy(update={"progress": saved}))

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

        A plain function runs in a thread. The result must be JSON. A step that had started when
        an earlier attempt ended, and may have had its effect, runs again. Each step of a task
        has its own name; the second use of one in an attempt raises ``ValueError``.
        """
        if name in self._ran:
            raise ValueError(f"step {name!r} has run in this attempt; give each step its own name")
        self._ran.add(name)
        known = self._live.task.steps.get(name)
        if known is not None and known.status == "done":
            return detached(known.result)
        return await self._run_step(name, partial(function, *args, **kwargs))

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

    async def _run_step(self, name: str, function: Callable[[], Any]) -> Any:
        """Run a step and store its start and its outcome."""
        await self._save_step(name, Step(status="started", attempt=self.attempt))
        try:
            if inspect.iscoroutinefunction(function):
                result = await function()
            else:
                result = await asyncio.to_thread(_call, function)
                if inspect.isawaitable(result):
                    result = await result
        except Exception as error:
            text = transitions.format_error(error)
            await self._save_step(name, Step(status="failed", attempt=self.attempt, error=text))
            raise
        stored = detached(result)
        await self._save_step(name, Step(status="done", attempt=self.attempt, result=stored))
        return result

    async def _save_step(self, name: str, step: Step) -> None:
        await self._save(lambda task: task.model_copy(update={"steps": {**task.steps, name: step}}))

    async def _save(self, change: Callable[[Task], Task]) -> None:
        def unless_ended(task: Task) -> Task:
            if self._ended:
                key = (task.agent_id, task.task_id)
                raise LeaseLostError("the attempt has ended", kind="tasks", key=key)
            return change(task)

        await self._state.save(self._agent, live=self._live, change=unless_ended)

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
        return await self._mail.send(
            self.agent_id,
            to,
            subject=subject,
            body=body,
            priority=priority,
            expects_reply=expects_reply,
            dedupe_key=self._own_id(dedupe_key),
            sent_by=self._sending_task,
        )

    async def reply(
        self, message: MailMessage, body: Any, *, priority: Priority = "normal"
    ) -> MailMessage:
        """Answer a message from the inbox, once; it becomes ``replied``."""
        reply_id = self._own_id(f"reply-{message.message_id}")
        return await self._mail.answer(message, reply_id, body, priority=priority)

    async def inbox(self) -> list[MailMessage]:
        """Return the unread mail, oldest first. This marks nothing as read; ``read_mail`` does."""
        unread = self._mail.inbox(self.agent_id)
        self._seen_mail = [message.message_id for message in unread]
        return unread

    async def read_mail(self, message_id: str) -> MailMessage:
        """Mark a message as read and return it. Raises ``StateNotFoundError``."""
        return await self._mail.read(self.agent_id, message_id)

    async def archive_mail(self, message_id: str) -> MailMessage:
        """Take a message out of the inbox and return it. Raises ``StateNotFoundError``."""
        return await self._mail.archive(self.agent_id, message_id)

    async def submit(
        self,
        agent_id: str,
        name: str,
        payload: Mapping[str, Any] | None = None,
        *,
        priority: Priority = "normal",
        delay_seconds: float = 0.0,
        max_attempts: int = 3,
        timeout_seconds: float | None = None,
        dedupe_key: str | None = None,
        dedupe_seconds: float = DEDUPE_SECONDS,
    ) -> Task:
        """Queue a task for an agent, once however often this one is attempted.

        The options are those of ``runtime.tasks.submit``; ``dedupe_key`` is this agent's own.
        """
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
            sent_by=self._sending_task,
        )

    async def sleep(
        self,
        *,
        seconds: float | None = None,
        until: datetime | None = None,
        wake_on: Sequence[WakeEvent] = (),
        reason: str | None = None,
    ) -> NoReturn:
        """End this attempt and let the agent sleep; on waking the handler starts from the top.

        Its steps, progress and memory are kept, and the attempt does not count. With
        ``mail_received``, mail that came after the last ``inbox()`` wakes the agent at once.
        The options are those of ``runtime.agents.sleep``.
        """
        raise SuspendError(RequestedSleep(seconds, until, tuple(wake_on), reason, self._seen_mail))

    @property
    def _sending_task(self) -> SendingTask:
        return SendingTask(agent_id=self.agent_id, task_id=self._live.task.task_id)

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


Handler = Callable[[TaskContext, Task], Awaitable[object]]
"""The function that does the tasks of an agent type."""
