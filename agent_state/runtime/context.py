"""What a handler is given: its agent, its task, and the ways to act durably."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from agent_state import mail as mail_rules
from agent_state import tasks as task_rules
from agent_state.clock import stamp
from agent_state.errors import LeaseLostError, UnknownStepError
from agent_state.models import ConversationMessage, MailMessage, Step, Task, detached
from agent_state.runtime.live import LiveAgent, LiveTask

if TYPE_CHECKING:
    from agent_state.runtime.sessions import AsyncAgentSessionManager

OnUnknown = Literal["retry", "fail"]


class Suspend(BaseException):
    """The handler ends here and begins anew when its agent wakes.

    Not an ``Exception``, so that a handler's own ``except Exception`` does not stop it.
    """

    def __init__(self, **sleep: Any) -> None:
        super().__init__("the agent falls asleep")
        self.sleep = sleep


class TaskContext:
    """One attempt at one task, seen by its handler.

    What it does through the context is durable when the ``await`` returns. The agent's memory
    is saved with the next of those, and when the attempt ends. What it left running may not
    write to the task after that: ``LeaseLostError``.
    """

    def __init__(self, runtime: AsyncAgentSessionManager, agent: LiveAgent, live: LiveTask) -> None:
        self._runtime = runtime
        self._agent = agent
        self._live = live
        self._sent = 0
        self._ended = False
        self._ran: set[str] = set()
        self._seen_mail: list[str] | None = None
        self.unknown_steps: list[str] = task_rules.unknown_steps(live.task)
        """Steps that had started when an earlier attempt ended, with no known outcome."""

    def end(self) -> None:
        """The attempt has ended. What it left running writes to the task no more."""
        self._ended = True

    # -- who, what, and what was before ------------------------------------------------------

    @property
    def agent_id(self) -> str:
        return self._agent.agent_id

    @property
    def task(self) -> Task:
        """The task as it is stored now, as a copy."""
        return self._live.task.model_copy(deep=True)

    @property
    def attempt(self) -> int:
        """1 for the first."""
        return self._live.task.attempts

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
        """What the last ``checkpoint`` of this task saved, in this attempt or an earlier one."""
        return detached(self._live.task.progress)

    def now(self) -> datetime:
        """The runtime's time, in UTC."""
        return self._runtime.core.now()

    def say(self, role: str, content: Any) -> None:
        """Add a turn to the agent's conversation history."""
        turn = ConversationMessage(role=role, content=content, timestamp=stamp(self.now()))
        self._agent.state.context.conversation_history.append(turn.model_dump())

    # -- progress ----------------------------------------------------------------------------

    async def checkpoint(self, progress: Mapping[str, Any]) -> None:
        """Save how far this task is, and the agent with it."""
        saved = detached(dict(progress))
        await self._save(lambda task: task.model_copy(update={"progress": saved}))

    async def step(
        self,
        name: str,
        function: Callable[..., Any],
        *args: Any,
        on_unknown: OnUnknown = "retry",
    ) -> Any:
        """Run ``function(*args)`` once: a later attempt gets the stored result instead.

        A plain function runs in a thread. The result must be JSON. A step that had started
        when its attempt ended, and may have had its effect, runs again (``"retry"``) or raises
        ``UnknownStepError``, which ends the task as ``dead`` (``"fail"``). Each step of a task
        has a name of its own; the second use of one in an attempt raises ``ValueError``.
        """
        if name in self._ran:
            raise ValueError(f"step {name!r} has run in this attempt; give each step its own name")
        self._ran.add(name)
        known = self._live.task.steps.get(name)
        if known is not None and known.status == "done":
            return detached(known.result)
        if known is not None and known.status == "started" and on_unknown == "fail":
            raise UnknownStepError(
                f"step {name!r} started in attempt {known.attempt} and may have had its effect",
                kind="tasks",
                key=(self.agent_id, self._live.task.task_id),
            )
        await self._step(name, Step(status="started", attempt=self.attempt))
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(*args)
            else:
                result = await asyncio.to_thread(_call, function, *args)
                if inspect.isawaitable(result):
                    result = await result
        except Exception as error:
            said = task_rules.told(error)
            await self._step(name, Step(status="failed", attempt=self.attempt, error=said))
            raise
        stored = detached(result)
        await self._step(name, Step(status="done", attempt=self.attempt, result=stored))
        return result

    async def _step(self, name: str, step: Step) -> None:
        await self._save(lambda task: task.model_copy(update={"steps": {**task.steps, name: step}}))

    async def _save(self, change: Callable[[Task], Task]) -> None:
        def unless_ended(task: Task) -> Task:
            if self._ended:
                key = (task.agent_id, task.task_id)
                raise LeaseLostError("the attempt has ended", kind="tasks", key=key)
            return change(task)

        await self._runtime.core.save(self._agent, live=self._live, change=unless_ended)

    # -- mail, tasks, sleep ------------------------------------------------------------------

    async def send_mail(
        self,
        to: str,
        *,
        subject: str,
        body: Any = "",
        priority: str = "normal",
        expects_reply: bool = False,
        dedupe_key: str | None = None,
    ) -> MailMessage:
        """Send once, however often this task is attempted.

        Attempts are told apart from repetitions by the order of sending; give ``dedupe_key``
        when that order may differ from one attempt to the next.
        """
        message = mail_rules.new_message(
            self._own_id(dedupe_key),
            self.agent_id,
            to,
            subject=subject,
            body=body,
            now=self.now(),
            priority=priority,
            expects_reply=expects_reply,
        )
        return await self._runtime.post.send(message)

    async def reply(
        self, message: MailMessage, body: Any, *, priority: str = "normal"
    ) -> MailMessage:
        """Answer a message from the inbox, once; it counts as replied."""
        answer = mail_rules.new_message(
            self._own_id(f"reply-{message.message_id}"),
            self.agent_id,
            message.from_agent,
            subject=f"Re: {message.subject}",
            body=body,
            now=self.now(),
            priority=priority,
            reply_to=message.message_id,
        )
        return await self._runtime.post.send(answer, answered=message)

    async def inbox(self) -> list[MailMessage]:
        """Unread mail, oldest first. Reading marks nothing; ``read_mail`` does."""
        unread = self._runtime.post.inbox(self.agent_id)
        self._seen_mail = [message.message_id for message in unread]
        return unread

    async def read_mail(self, message_id: str) -> MailMessage:
        """The message, from now on marked as read. Raises ``StateNotFoundError``."""
        return await self._runtime.read_mail(self.agent_id, message_id)

    async def archive_mail(self, message_id: str) -> MailMessage:
        """Out of the inbox, kept in the history. Raises ``StateNotFoundError``."""
        return await self._runtime.archive_mail(self.agent_id, message_id)

    async def submit(
        self,
        agent_id: str,
        name: str,
        payload: Mapping[str, Any] | None = None,
        *,
        dedupe_key: str | None = None,
        **options: Any,
    ) -> Task:
        """Queue a task for an agent, once however often this one is attempted.

        ``options`` are those of ``AsyncAgentSessionManager.submit``.
        """
        key = dedupe_key or self._own_id(None)
        return await self._runtime.submit(agent_id, name, payload, dedupe_key=key, **options)

    async def sleep(
        self,
        *,
        seconds: float | None = None,
        until: datetime | None = None,
        wake_on: Sequence[str] = (),
        reason: str | None = None,
    ) -> NoReturn:
        """End this run and let the agent sleep; on waking the handler begins anew.

        Its steps, progress and memory are as it left them, and the attempt does not count.
        With ``mail_received``, mail that came after the last ``inbox()`` wakes it at once.
        """
        raise Suspend(
            seconds=seconds,
            until=until,
            wake_on=tuple(wake_on),
            reason=reason,
            mail_seen=self._seen_mail,
        )

    def _own_id(self, dedupe_key: str | None) -> str:
        if dedupe_key is None:
            self._sent += 1
            dedupe_key = str(self._sent)
        return f"{self._live.task.task_id}.{dedupe_key}"


def _call(function: Callable[..., Any], *args: Any) -> Any:
    """Run a step's function; what no future can hold becomes an error that it can."""
    try:
        return function(*args)
    except StopIteration as error:
        raise RuntimeError("the step raised StopIteration") from error


Handler = Callable[[TaskContext, Task], Awaitable[object]]
