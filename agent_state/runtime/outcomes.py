"""The ends of attempts: what became of a handler, and what is stored of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from agent_state.codec import Group
from agent_state.errors import (
    AgentStateError,
    LeaseLostError,
    SerializationError,
    StateValidationError,
)
from agent_state.models import Task
from agent_state.runtime import transitions
from agent_state.runtime.attempt import WorkingCopy
from agent_state.runtime.context import RequestedSleep, RequestedWait, SuspendError
from agent_state.runtime.handlers import RegisteredHandler
from agent_state.runtime.live_agent import LiveAgent, TaskChange
from agent_state.runtime.sleep import fall_asleep
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.task_queue import LiveTask
from agent_state.runtime.waiters import TaskWaiters

RETRY_SECONDS = (0.1, 0.5, 2.0, 10.0)
"""The waits while the store refuses: after the first refusal, the second, and so on."""


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """The result of a handler that ended by itself, or its error; or why it was stopped."""

    result: object = None
    error: BaseException | None = None
    stopped: str | None = None


class AttemptFinisher:
    """Stores the outcomes of attempts."""

    def __init__(self, state: RuntimeState, waiters: TaskWaiters) -> None:
        self._state = state
        self._waiters = waiters

    async def finish(
        self,
        agent: LiveAgent,
        live: LiveTask,
        copy: WorkingCopy,
        handler: RegisteredHandler,
        outcome: AttemptOutcome,
        *,
        claim_next: Callable[[], TaskChange | None],
    ) -> None:
        """Store the attempt's outcome, or why it was stopped.

        A result, or a memory, that cannot be serialised fails the task, not the agent.
        ``claim_next``: claims the task of the next attempt, in the commit of a completed one.
        """
        try:
            await self._finish(agent, live, copy, handler, outcome, claim_next=claim_next)
        except LeaseLostError:
            logger.warning("task %s belongs to another runtime now", live.task.task_id)
            await self._waiters.refresh()
        except (SerializationError, StateValidationError) as error:
            await self._fail(agent, live, error, handler, permanent=True)

    async def _finish(
        self,
        agent: LiveAgent,
        live: LiveTask,
        copy: WorkingCopy,
        handler: RegisteredHandler,
        outcome: AttemptOutcome,
        *,
        claim_next: Callable[[], TaskChange | None],
    ) -> None:
        now = self._state.clock.now()
        if isinstance(outcome.error, SuspendError):
            request = outcome.error.request
            if isinstance(request, RequestedWait):
                change = partial(
                    transitions.wait,
                    tasks=request.tasks,
                    name=request.name,
                    deadline=request.deadline,
                )
                await self._store(agent, live, change, copy=copy)
            else:
                await self._suspend(agent, live, copy, handler, request)
        elif outcome.error is not None:
            await self._fail(agent, live, outcome.error, handler)
        elif outcome.stopped is None:
            result = handler.result_to_json(outcome.result)
            change = partial(transitions.complete, result=result, now=now)
            await self._store(agent, live, change, copy=copy, claim_next=claim_next)
        elif outcome.stopped == "shutdown":
            await self._store(agent, live, transitions.release)
        elif outcome.stopped == "cancel":
            await self._store(agent, live, partial(transitions.cancel, now=now))
        else:
            logger.warning("task %s was left to another runtime", live.task.task_id)
            await self._waiters.refresh()

    async def _fail(
        self,
        agent: LiveAgent,
        live: LiveTask,
        error: BaseException,
        handler: RegisteredHandler,
        *,
        permanent: bool = False,
    ) -> None:
        """Store a failed attempt, and say so."""
        policy = handler.retry or self._state.retry
        text = transitions.format_error(error)
        change = partial(
            transitions.fail,
            error=text,
            traceback=transitions.format_traceback(error),
            now=self._state.clock.now(),
            policy=policy,
            random=self._state.random,
            permanent=permanent or policy.gives_up(error),
        )
        await self._store(agent, live, change)
        self._state.note_cause(live, error)
        task, traceback = live.task, error if transitions.is_text(error) else None
        what = f"task {agent.agent_id}/{task.task_id} ({task.name})"
        number = f"attempt {transitions.counted_failures(task)} of {task.max_attempts}"
        if transitions.is_finished(task):
            logger.error("%s is dead after %s: %s", what, number, text, exc_info=traceback)
        else:
            again = f"again at {task.not_before}"
            logger.warning("%s failed in %s: %s; %s", what, number, text, again, exc_info=traceback)
        self._state.hooks.call_failure(task, error, dead=transitions.is_finished(task))

    async def _suspend(
        self,
        agent: LiveAgent,
        live: LiveTask,
        copy: WorkingCopy,
        handler: RegisteredHandler,
        request: RequestedSleep,
    ) -> None:
        unseen = [each.message_id for each in copy.marked() if each.status != "unread"]
        if request.mail_seen is not None:
            unseen += agent.mail.unread_except(request.mail_seen)
        try:
            sleep = fall_asleep(
                agent.agent_id,
                now=self._state.clock.now(),
                seconds=request.seconds,
                until=request.until,
                wake_on=request.wake_on,
                reason=request.reason,
                seen_mail=agent.mail.seen(unseen),
            )
        except StateValidationError as error:
            await self._fail(agent, live, error, handler)
            return
        agent.mail.begin_sleep(sleep, unseen)
        before, agent.sleep = agent.sleep, sleep
        try:
            await self._store(
                agent,
                live,
                transitions.release,
                lambda group: group.save("sleep", agent.agent_id, sleep),
                copy=copy,
            )
        except BaseException:
            agent.sleep = before
            raise
        # Mail that came while the sleep was stored ends it when the loop looks next.

    async def _store(
        self,
        agent: LiveAgent,
        live: LiveTask,
        change: Callable[[Task], Task],
        add: Callable[[Group], None] | None = None,
        *,
        copy: WorkingCopy | None = None,
        claim_next: Callable[[], TaskChange | None] | None = None,
    ) -> None:
        """Store the task's new state. While the store refuses, keep trying: the work was done."""
        failures = 0

        def once(task: Task) -> Task | None:
            """Return None when an earlier try was stored without a reply."""
            return change(task) if task.status == "in_progress" else None

        while True:
            try:
                await self._state.save(
                    agent, live=live, change=once, add=add, copy=copy, claim_next=claim_next
                )
                return
            except (LeaseLostError, SerializationError, StateValidationError):
                raise
            except AgentStateError as error:
                logger.error("the end of %s is not stored yet: %s", live.task.task_id, error)
                if self._state.stopping:
                    raise
                await self._state.clock.sleep(retry_seconds(failures))
                failures += 1


def retry_seconds(failures: int) -> float:
    return RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
