"""Runs agents: one loop per agent, one task at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime
from heapq import heappop, heappush
from typing import Any

from agent_state.codec import Group
from agent_state.errors import (
    AgentStateError,
    StateNotFoundError,
)
from agent_state.models import MailMessage, Task, copied, trim_history
from agent_state.runtime import transitions
from agent_state.runtime.attempt import WorkingCopy
from agent_state.runtime.context import SuspendError, TaskContext
from agent_state.runtime.handlers import ON_MAIL, HandlerRegistry, RegisteredHandler
from agent_state.runtime.limiter import AttemptLimiter
from agent_state.runtime.live_agent import LiveAgent, TaskChange
from agent_state.runtime.mail import MailService, mark_read, new_mail_task
from agent_state.runtime.outcomes import AttemptFinisher, AttemptOutcome, retry_seconds
from agent_state.runtime.sleep import SleepService, ends_at
from agent_state.runtime.slow_handlers import RunningHandler, SlowHandlerMonitor
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.task_queue import LiveTask
from agent_state.runtime.tasks import TaskService

_MAX_TIMER_SECONDS = 30.0
"""How long the timers sleep at most: the wall clock may jump."""


ChosenTask = tuple[LiveTask, RegisteredHandler]
"""A task to make an attempt of, and its handler."""


class Runner:
    """The loops of all agents of one runtime."""

    def __init__(
        self,
        state: RuntimeState,
        sleep: SleepService,
        mail: MailService,
        tasks: TaskService,
        handlers: HandlerRegistry,
        *,
        cancel_timeout_seconds: float,
    ) -> None:
        self._state = state
        self._sleep = sleep
        self._mail = mail
        self._tasks = tasks
        self.handlers = handlers
        self._cancel_timeout_seconds = cancel_timeout_seconds
        self._finisher = AttemptFinisher(state, tasks.waiters)
        self.limiter = AttemptLimiter(state)
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start; what is bound to an event loop is made here."""
        self.monitor = SlowHandlerMonitor(self._state.clock, self.handlers)
        self._orphaned: set[asyncio.Task[AttemptOutcome]] = set()
        self._working: set[str] = set()
        self.timers = TimerQueue(self._state)
        self.limiter.begin()

    def can_run(self, agent_type: str | None) -> bool:
        """Whether the agent type has a handler."""
        return agent_type in self.handlers

    def start(self, agent: LiveAgent) -> None:
        """Start the agent's loop, if its type has a handler. Twice is a no-op."""
        agent.has_handler = self.can_run(agent.state.agent_type)
        agent.handles_mail = self.handlers.handles_mail(agent.state.agent_type)
        agent.unblock()  # a handler may be new, and so may the agent's type
        if agent.has_handler and (agent.loop is None or agent.loop.done()):
            agent.loop = asyncio.create_task(self._loop(agent), name=f"agent {agent.agent_id}")

    def report_handlerless(self, agent_ids: Iterable[str]) -> None:
        """Say of which types these agents are, which have no handler."""
        by_type: dict[str | None, list[str]] = {}
        for agent_id in agent_ids:
            agent = self._state.agents.get(agent_id)
            if agent is not None:
                by_type.setdefault(agent.state.agent_type, []).append(agent_id)
        for agent_type, names in by_type.items():
            why = self.handlers.missing(agent_type)
            some = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
            number = "1 agent waits" if len(names) == 1 else f"{len(names)} agents wait"
            logger.warning("%s (%s): %s", number, some, why)

    @property
    def running_handlers(self) -> int:
        """How many handlers run."""
        return len(self.monitor.running)

    async def wait_stopped(self) -> None:
        """Wait until no agent runs a handler, or stores what comes before and after."""
        while self._working:
            self._state.activity.clear()
            await self._state.activity.wait()

    def abort(self) -> list[asyncio.Task[Any]]:
        """Cancel every loop and handler without storing anything; return their asyncio tasks."""
        tasks: list[asyncio.Task[Any]] = [run.work for run in self.monitor.running.values()]
        tasks += [agent.loop for agent in self._state.agents.values() if agent.loop is not None]
        for task in tasks:
            task.cancel()
        return tasks

    # -- the loop of one agent ---------------------------------------------------------------

    async def _loop(self, agent: LiveAgent) -> None:
        failures = 0
        while not self._state.stopping:
            agent.changed.clear()
            self._working.add(agent.agent_id)
            try:
                worked = await self._work_once(agent)
                failures = 0
            except Exception as error:  # noqa: BLE001  # no error may end an agent's loop unseen
                # The store refused (for example, a full disk). Nothing is lost; try again later.
                unforeseen = None if isinstance(error, AgentStateError) else error
                logger.error("agent %s cannot work: %s", agent.agent_id, error, exc_info=unforeseen)
                self._rest(agent)
                await self._state.clock.sleep(retry_seconds(failures))
                failures += 1
                continue
            finally:
                self._rest(agent)
            if not worked:
                self.timers.set(agent)
                await agent.changed.wait()

    def _rest(self, agent: LiveAgent) -> None:
        self._working.discard(agent.agent_id)
        self._state.activity.set()

    async def _work_once(self, agent: LiveAgent) -> bool:
        """Wake if it is time, and make one attempt; return whether there was a task to do."""
        try:
            chosen = await self._choose(agent)
        finally:
            wakers, agent.wakers = agent.wakers, []
            for wake in wakers:
                wake()
        worked = chosen is not None
        while chosen is not None:
            live, handler = chosen
            try:
                chosen = await self._attempt(agent, live, handler)
            finally:
                self.limiter.end(handler)
        return worked

    async def _choose(self, agent: LiveAgent) -> ChosenTask | None:
        """Return the task to do next, of which an attempt may begin now; None if there is none."""
        if agent.sleep is not None:
            await self._sleep.wake_if_due(agent)
        while agent.may_work():
            if agent.handles_mail:
                self._queue_mail(agent)
            live = agent.next_task(self._state.clock.now())
            if live is None:
                return None
            handler = self.handlers.get(agent.state.agent_type, live.task.name)
            if handler is None:
                agent.block(live.task.name)
                self._tasks.report_handlerless(agent, live.task)
            elif not handler.knows_version(live.task):
                live.held = True
                logger.warning(
                    "task %s/%s (%s) waits: a newer deploy queued it, with payload version %s",
                    agent.agent_id, live.task.task_id, live.task.name, live.task.payload_version,
                )  # fmt: skip
            elif live.task.waits_for and await self._tasks.waiters.hold(agent, live):
                continue
            elif admitted := await self.limiter.admit(agent, live, handler):
                return live, handler
            elif admitted is None:
                return None
        return None

    def _choose_at_once(self, agent: LiveAgent) -> ChosenTask | None:
        """Return the task to do next, if nothing has to be waited for, or stored, before it."""
        if self._state.stopping or not agent.may_work():
            return None
        if agent.handles_mail:
            self._queue_mail(agent)
        live = agent.next_task(self._state.clock.now())
        if live is None or not live.revision or live.task.waits_for or live.task.cancel_requested:
            return None
        handler = self.handlers.get(agent.state.agent_type, live.task.name)
        if handler is None or handler.takes_mail or handler.is_limited:
            return None
        return (live, handler) if handler.knows_version(live.task) else None

    def _queue_mail(self, agent: LiveAgent) -> None:
        """Queue a task for each new message; its first attempt stores it."""
        handler = self.handlers.get(agent.state.agent_type, ON_MAIL)
        if handler is None:
            return
        for message in agent.mail.take_arrived():
            task = new_mail_task(agent.agent_id, message, handler)
            if task.task_id not in agent.tasks:
                agent.put(LiveTask(task, 0), task, 0)

    async def _attempt(
        self, agent: LiveAgent, live: LiveTask, handler: RegisteredHandler
    ) -> ChosenTask | None:
        """Make an attempt; return the task that was claimed in the commit which ended it."""
        # From here on it can be stopped, also while it is being claimed.
        stop = agent.stop_request = asyncio.get_running_loop().create_future()
        following = None
        try:
            if self._state.holds(live.task) or await self._claim(agent, live):
                with self._state.attempting(agent, live):
                    following = await self._make_attempt(agent, live, handler, stop)
        finally:
            agent.current = None
            agent.stop_request = None
            self._state.activity.set()
        if transitions.is_finished(live.task):
            self._tasks.waiters.notify_finished(live.task)
        return following

    async def _make_attempt(
        self,
        agent: LiveAgent,
        live: LiveTask,
        handler: RegisteredHandler,
        stop: asyncio.Future[str],
    ) -> ChosenTask | None:
        agent.current = live
        if self._state.stopping:
            agent.request_stop("shutdown")
        elif not agent.leased:
            agent.request_stop("lease")
        agent.state = trim_history(agent.state, self._state.manager.history_window)
        copy = WorkingCopy(agent)
        outcome = None if stop.done() else await self._run(agent, live, copy, handler, stop)
        if outcome is None and stop.done():
            outcome = AttemptOutcome(stopped=stop.result())
        elif outcome is None:
            error = asyncio.CancelledError("the handler cancelled itself")
            outcome = AttemptOutcome(error=error)
        following: ChosenTask | None = None

        def claim_next() -> TaskChange | None:
            nonlocal following
            following = self._choose_at_once(agent)
            return following and (following[0], self._claimed(agent, following[0].task))

        await self._finisher.finish(agent, live, copy, handler, outcome, claim_next=claim_next)
        return following if following and self._state.holds(following[0].task) else None

    def _claimed(self, agent: LiveAgent, task: Task) -> Task:
        now = self._state.clock.now()
        return transitions.claim(task, self._state.owner, now, token=agent.token)

    async def _claim(self, agent: LiveAgent, live: LiveTask) -> bool:
        """Claim the task, if it still is as it was chosen; one to be cancelled ends here."""
        state = self._state
        message = agent.mail.get(str(live.task.payload.get("message_id")))
        if live.task.name != ON_MAIL or message is None or message.status != "unread":
            message = None
        if message is None and live.task.name == ON_MAIL and not live.revision:
            del agent.tasks[live.task.task_id]  # somebody read it meanwhile
            return False
        read = mark_read(message, state.clock.now()) if message is not None else None

        def add(group: Group) -> None:
            if read is not None:
                group.save("mail", (agent.agent_id, read.message_id), read)

        def change(task: Task) -> Task | None:
            now = state.clock.now()
            due = transitions.due_at(task)
            if state.holds(task):  # from an earlier claim whose outcome was not known
                return task
            if task.status not in transitions.CLAIMABLE or (due is not None and due > now):
                return None
            if task.cancel_requested:
                return transitions.cancel(task, now)
            return self._claimed(agent, task)

        try:
            saved = await state.save(agent, live=live, change=change, add=add)
        except StateNotFoundError:
            return False  # it was deleted
        if saved and read is not None:
            agent.mail[read.message_id] = read
        return saved and live.task.status == "in_progress"

    async def _run(
        self,
        agent: LiveAgent,
        live: LiveTask,
        copy: WorkingCopy,
        handler: RegisteredHandler,
        stop: asyncio.Future[str],
    ) -> AttemptOutcome | None:
        """Run the handler; return its outcome, None when it was stopped."""
        context = TaskContext(
            self._state, self._mail, self._tasks, agent, live, copy=copy, limiter=self.limiter
        )
        work = asyncio.create_task(self._call(agent, handler, context), name=live.task.task_id)
        began = self._state.clock.monotonic()
        self.monitor.running[agent.agent_id] = RunningHandler(
            agent.agent_id, work, live, copy, began, handler.warn_after_seconds
        )
        try:
            limit = live.task.timeout_seconds or handler.timeout_seconds
            return await self._outcome(work, stop, limit)
        finally:
            context.end()
            del self.monitor.running[agent.agent_id]

    async def _call(
        self, agent: LiveAgent, handler: RegisteredHandler, context: TaskContext
    ) -> AttemptOutcome:
        """Run a handler; any error but its own cancellation is its outcome."""
        try:
            task = context.task
            if handler.takes_mail:
                message_id = str(task.payload.get("message_id"))
                arguments: tuple[Any, ...] = (await self._message(agent.agent_id, message_id),)
            else:
                arguments = handler.arguments(task)
            result = await handler.function(context, *arguments)
            return AttemptOutcome(result)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  # SystemExit in a handler must not end the server
            return AttemptOutcome(error=_without_group(error))

    async def _message(self, agent_id: str, message_id: str) -> MailMessage:
        message = await self._mail.find(agent_id, message_id)
        if message is None:
            raise StateNotFoundError("no such message", kind="mail", key=(agent_id, message_id))
        return copied(message)

    async def _outcome(
        self,
        work: asyncio.Task[AttemptOutcome],
        stop: asyncio.Future[str],
        timeout_seconds: float | None,
    ) -> AttemptOutcome | None:
        """Wait for the handler; None when it was stopped before it ended."""
        timer = None
        if timeout_seconds is not None:
            timer = asyncio.create_task(self._state.clock.sleep(timeout_seconds))
        try:
            waited: set[asyncio.Future[Any]] = {work, stop}
            if timer is not None:
                waited.add(timer)
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            timed_out = timer is not None and timer.done()
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if not work.done():
            work.cancel()
            await self._wait_cancelled(work)
            if timed_out and not stop.done():
                return AttemptOutcome(error=TimeoutError(f"not done within {timeout_seconds:g} s"))
        return work.result() if work.done() and not work.cancelled() else None

    async def _wait_cancelled(self, work: asyncio.Task[AttemptOutcome]) -> None:
        """Give a cancelled handler a moment to end; one that does not end is left running."""
        await asyncio.wait({work}, timeout=self._cancel_timeout_seconds)
        if not work.done():
            logger.error("a handler ignores its cancellation (task %s)", work.get_name())
            self._orphaned.add(work)
            work.add_done_callback(self._orphaned.discard)

    async def report_slow(self) -> None:
        """Report handlers that have run for long, with their stacks, until cancelled."""
        while True:
            await self._state.clock.sleep(self.monitor.pause_seconds)
            self.limiter.wake_all()  # an agent that was to look may have been taken away
            self.monitor.report_slow()


def _without_group(error: BaseException) -> BaseException:
    """Return the request to sleep or to wait that a task group has wrapped; else the error.

    Errors beside it are what became of the attempt.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    requests, errors = error.split(SuspendError)
    if errors is not None or requests is None:
        return errors or error
    first: BaseException = requests
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


class TimerQueue:
    """Wakes agents' loops at the times they wait for; one timer for all of them."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state
        self._times: list[tuple[datetime, str]] = []
        self._next: dict[str, datetime] = {}
        self._earlier = asyncio.Event()

    def __len__(self) -> int:
        """Return how many times are queued, outdated ones included."""
        return len(self._times)

    def set(self, agent: LiveAgent) -> None:
        """Wake the agent's loop when its next task is due, or its sleep ends."""
        when = next_time(agent)
        known = self._next.get(agent.agent_id)
        if when is None or (known is not None and known <= when):
            return
        if not self._times or when < self._times[0][0]:
            self._earlier.set()
        self._next[agent.agent_id] = when
        heappush(self._times, (when, agent.agent_id))

    async def run(self) -> None:
        """Run until cancelled. The wall clock decides; it may jump, so look twice a minute."""
        while True:
            self._wake_due(self._state.clock.now())
            self._earlier.clear()
            if not self._times:
                await self._earlier.wait()
                continue
            seconds = (self._times[0][0] - self._state.clock.now()).total_seconds()
            pause = asyncio.ensure_future(self._state.clock.sleep(min(seconds, _MAX_TIMER_SECONDS)))
            earlier = asyncio.ensure_future(self._earlier.wait())
            try:
                await asyncio.wait({pause, earlier}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                pause.cancel()
                earlier.cancel()

    def _wake_due(self, now: datetime) -> None:
        while self._times and self._times[0][0] <= now:
            when, agent_id = heappop(self._times)
            if self._next.get(agent_id) != when:
                continue  # it was woken earlier
            del self._next[agent_id]
            agent = self._state.agents.get(agent_id)
            if agent is not None:
                agent.changed.set()


def next_time(agent: LiveAgent) -> datetime | None:
    """Return when to look at the agent again if nothing else happens; None for never."""
    if not agent.leased:
        return None
    due = agent.next_due()
    end = ends_at(agent.sleep) if agent.sleep is not None else None
    return min(due, end) if due is not None and end is not None else due or end
