"""Runs agents: one loop each, one task at a time, each attempt under a lease."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from agent_state import sleep as sleeping
from agent_state import tasks as rules
from agent_state.errors import (
    AgentStateError,
    SerializationError,
    StateValidationError,
    UnknownStepError,
)
from agent_state.manager import Group
from agent_state.models import Task
from agent_state.runtime.context import AgentContext, Handler, Suspend
from agent_state.runtime.core import Alarm, Core, logger
from agent_state.runtime.live import LiveAgent, LiveTask
from agent_state.runtime.post import Bedroom, save_sleep

STUBBORN_SECONDS = 5.0
"""How long a handler may take to end after it was cancelled, before it is left behind."""
_PAUSES = (0.1, 0.5, 2.0, 10.0)

MakeContext = Callable[[LiveAgent, LiveTask], AgentContext]


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a handler ended, when it ended by itself."""

    result: object = None
    error: BaseException | None = None


class Runner:
    """The loops of all agents of one runtime."""

    def __init__(
        self,
        core: Core,
        alarm: Alarm,
        bedroom: Bedroom,
        handlers: Mapping[str, Handler],
        context: MakeContext,
    ) -> None:
        self._core = core
        self._alarm = alarm
        self._bedroom = bedroom
        self._handlers = handlers
        self._context = context
        self._work: dict[str, asyncio.Task[_Ended]] = {}
        self._stops: dict[str, asyncio.Future[str]] = {}
        self._left_behind: set[asyncio.Task[_Ended]] = set()
        self._waiters: dict[str, list[asyncio.Future[Task]]] = {}

    # -- from outside ------------------------------------------------------------------------

    def start(self, agent: LiveAgent) -> None:
        """Give the agent its loop, if it has a handler. Twice is a no-op."""
        agent.has_handler = agent.state.agent_type in self._handlers
        if agent.has_handler and (agent.loop is None or agent.loop.done()):
            agent.loop = asyncio.create_task(self._live(agent), name=f"agent {agent.agent_id}")
        agent.changed.set()

    def stop(self, agent: LiveAgent, reason: str) -> None:
        """Cancel what the agent is doing; ``reason`` decides what becomes of its task."""
        stop = self._stops.get(agent.agent_id)
        if stop is not None and not stop.done():
            stop.set_result(reason)

    @property
    def busy(self) -> int:
        """How many handlers run."""
        return len(self._work)

    async def finished(self, task: Task) -> Task:
        """The task in its final state, once it has one."""
        waiter: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(task.task_id, []).append(waiter)
        return await waiter

    def tell_finished(self, task: Task) -> None:
        """Wake those who wait for this task."""
        for waiter in self._waiters.pop(task.task_id, ()):
            if not waiter.done():
                waiter.set_result(task)

    # -- the loop of one agent ---------------------------------------------------------------

    async def _live(self, agent: LiveAgent) -> None:
        failures = 0
        while not self._core.stopping:
            agent.changed.clear()
            live = agent.next_task(self._core.now()) if agent.may_work() else None
            if live is None:
                self._alarm.set(agent)
                self._core.activity.set()
                await agent.changed.wait()
                continue
            try:
                await self._attempt(agent, live)
                failures = 0
            except AgentStateError as error:
                # The store refused (a full disk, say). Nothing is lost; try again in a while.
                logger.error("agent %s cannot work: %s", agent.agent_id, error)
                await self._core.clock.sleep(_PAUSES[min(failures, len(_PAUSES) - 1)])
                failures += 1

    async def _attempt(self, agent: LiveAgent, live: LiveTask) -> None:
        core = self._core
        if live.task.cancel_requested:
            await core.save(agent, live=live, change=lambda t: rules.cancel(t, core.now()))
            self.tell_finished(live.task)
            return
        await core.save(
            agent,
            live=live,
            change=lambda t: rules.claim(t, core.owner, core.now(), core.lease_seconds),
        )
        agent.current = live
        handler = self._handlers[agent.state.agent_type or ""]
        context = self._context(agent, live)
        work = asyncio.create_task(_call(handler, context, live.task), name=live.task.task_id)
        self._work[agent.agent_id] = work
        stop = self._stops[agent.agent_id] = asyncio.get_running_loop().create_future()
        beating = asyncio.create_task(self._beat(agent, live))
        try:
            ended = await self._until_ended(work, stop, live.task.timeout_seconds)
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating
            del self._work[agent.agent_id], self._stops[agent.agent_id]
        try:
            await self._conclude(agent, live, ended, stop.result() if stop.done() else None)
        finally:
            agent.current = None
            core.activity.set()
        if rules.is_finished(live.task):
            self.tell_finished(live.task)

    async def _until_ended(
        self, work: asyncio.Task[_Ended], stop: asyncio.Future[str], seconds: float | None
    ) -> _Ended | None:
        """How the handler ended; None when it was stopped before it did."""
        timer = None
        if seconds is not None:
            timer = asyncio.create_task(self._core.clock.sleep(seconds))
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
            await self._let_end(work)
            if timed_out and not stop.done():
                return _Ended(error=TimeoutError(f"not done within {seconds:g} s"))
        return work.result() if work.done() and not work.cancelled() else None

    async def _let_end(self, work: asyncio.Task[_Ended]) -> None:
        """Give a cancelled handler a moment; one that will not end is left behind."""
        await asyncio.wait({work}, timeout=STUBBORN_SECONDS)
        if not work.done():
            logger.error("a handler ignores its cancellation (task %s)", work.get_name())
            self._left_behind.add(work)
            work.add_done_callback(self._left_behind.discard)

    async def _beat(self, agent: LiveAgent, live: LiveTask) -> None:
        """Renew the lease while the handler runs."""
        core = self._core
        while True:
            await core.clock.sleep(core.lease_seconds / 3)
            try:
                await core.save(
                    agent,
                    live=live,
                    change=lambda t: rules.renew(t, core.now(), core.lease_seconds),
                )
            except AgentStateError as error:
                logger.warning("the lease of %s was not renewed: %s", live.task.task_id, error)
            if live.task.cancel_requested:
                self.stop(agent, "cancel")

    # -- how an attempt ends -----------------------------------------------------------------

    async def _conclude(
        self, agent: LiveAgent, live: LiveTask, ended: _Ended | None, reason: str | None
    ) -> None:
        core = self._core
        if ended is not None and ended.error is None:
            await self._complete(agent, live, ended.result)
        elif ended is not None and isinstance(ended.error, Suspend):
            await self._fall_asleep(agent, live, ended.error)
        elif ended is not None:
            error = ended.error
            permanent = isinstance(error, UnknownStepError)
            said = f"{type(error).__name__}: {error}"
            await self._fail(agent, live, said, permanent=permanent)
        elif reason == "shutdown":
            await self._store(agent, live, rules.put_back)
        elif reason == "cancel":
            await self._store(agent, live, lambda t: rules.cancel(t, core.now()))
        elif reason == "lease":
            logger.warning("task %s was left to another runtime", live.task.task_id)
        else:
            await self._fail(agent, live, "CancelledError: the handler cancelled itself")

    async def _complete(self, agent: LiveAgent, live: LiveTask, result: object) -> None:
        core = self._core
        try:
            await self._store(agent, live, lambda t: rules.complete(t, result, core.now()))
        except (SerializationError, StateValidationError) as error:
            await self._fail(agent, live, f"{type(error).__name__}: {error}", permanent=True)

    async def _fail(
        self, agent: LiveAgent, live: LiveTask, error: str, *, permanent: bool = False
    ) -> None:
        core = self._core
        # A lone surrogate in a message must not keep the failure itself from being stored.
        said = error.encode("utf-8", "backslashreplace").decode()[:4000]
        change = partial(
            rules.fail,
            error=said,
            now=core.now(),
            policy=core.retry,
            random=core.random,
            permanent=permanent,
        )
        await self._store(agent, live, change)

    async def _fall_asleep(self, agent: LiveAgent, live: LiveTask, wish: Suspend) -> None:
        seen = wish.sleep.pop("mail_seen")
        try:
            sleep = sleeping.fall_asleep(
                agent.agent_id,
                now=self._core.now(),
                mail_seen=[m.message_id for m in agent.unread()] if seen is None else seen,
                **wish.sleep,
            )
        except StateValidationError as error:
            await self._fail(agent, live, f"{type(error).__name__}: {error}")
            return
        agent.sleep = sleep
        await self._store(agent, live, rules.suspend, lambda group: save_sleep(group, sleep))
        agent.current = None
        await self._bedroom.fell_asleep(agent, sleep)

    async def _store(
        self,
        agent: LiveAgent,
        live: LiveTask,
        change: Callable[[Task], Task],
        stage: Callable[[Group], None] | None = None,
    ) -> None:
        """Store how it ended. While the disk refuses, keep trying: the work was done."""
        failures = 0
        while True:
            try:
                await self._core.save(agent, live=live, change=change, stage=stage)
                return
            except (SerializationError, StateValidationError):
                raise
            except AgentStateError as error:
                logger.error("the end of %s is not stored yet: %s", live.task.task_id, error)
                if self._core.stopping:
                    raise
                await self._core.clock.sleep(_PAUSES[min(failures, len(_PAUSES) - 1)])
                failures += 1


async def _call(handler: Handler, context: AgentContext, task: Task) -> _Ended:
    """Run a handler; whatever it raises, but being cancelled, is how it ended."""
    try:
        return _Ended(result=await handler(context, task))
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001  # SystemExit in a handler must not end the server
        return _Ended(error=error)
