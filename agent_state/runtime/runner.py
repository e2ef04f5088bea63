"""Runs agents: one loop each, one task at a time, each attempt under a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from agent_state import tasks as rules
from agent_state.errors import AgentStateError, LeaseLostError
from agent_state.models import Task
from agent_state.runtime.context import Handler, TaskContext
from agent_state.runtime.core import Alarm, Core, logger
from agent_state.runtime.endings import PAUSES, Ended, Endings
from agent_state.runtime.live import LiveAgent, LiveTask
from agent_state.runtime.post import Bedroom
from agent_state.runtime.results import Results

STUBBORN_SECONDS = 5.0
"""How long a handler may take to end after it was cancelled, before it is left behind."""

MakeContext = Callable[[LiveAgent, LiveTask], TaskContext]


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
        self._work: dict[str, asyncio.Task[Ended]] = {}
        self._stops: dict[str, asyncio.Future[str]] = {}
        self._left_behind: set[asyncio.Task[Ended]] = set()
        self.results = Results(core)
        self._endings = Endings(core, self.results)
        self._at_work: set[str] = set()

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

    @property
    def at_work(self) -> int:
        """How many agents run a handler, or store what comes before and after."""
        return len(self._at_work)

    # -- the loop of one agent ---------------------------------------------------------------

    async def _live(self, agent: LiveAgent) -> None:
        failures = 0
        while not self._core.stopping:
            agent.changed.clear()
            self._at_work.add(agent.agent_id)
            try:
                worked = await self._work_once(agent)
                failures = 0
            except Exception as error:  # noqa: BLE001  # nothing may end an agent unseen
                # The store refused (a full disk, say). Nothing is lost; try again in a while.
                unforeseen = None if isinstance(error, AgentStateError) else error
                logger.error("agent %s cannot work: %s", agent.agent_id, error, exc_info=unforeseen)
                self._rest(agent)
                await self._core.clock.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
                failures += 1
                continue
            finally:
                self._rest(agent)
            if not worked:
                self._alarm.set(agent)
                await agent.changed.wait()

    def _rest(self, agent: LiveAgent) -> None:
        self._at_work.discard(agent.agent_id)
        self._core.activity.set()

    async def _work_once(self, agent: LiveAgent) -> bool:
        """Wake if it is time, and make one attempt; whether there was anything to do."""
        await self._bedroom.wake_if_due(agent)
        live = agent.next_task(self._core.now()) if agent.may_work() else None
        if live is None:
            return False
        await self._attempt(agent, live)
        return True

    async def _attempt(self, agent: LiveAgent, live: LiveTask) -> None:
        handler = self._handlers.get(agent.state.agent_type or "")
        if handler is None:
            agent.has_handler = False
            return
        # From here on it can be stopped, also while it is being claimed.
        stop = self._stops[agent.agent_id] = asyncio.get_running_loop().create_future()
        try:
            if await self._claim(agent, live):
                agent.current = live
                if self._core.stopping:
                    self.stop(agent, "shutdown")
                ended = None if stop.done() else await self._run(agent, live, handler, stop)
                await self._endings.conclude(
                    agent, live, ended, stop.result() if stop.done() else None
                )
        finally:
            agent.current = None
            del self._stops[agent.agent_id]
            self._core.activity.set()
        if rules.is_finished(live.task):
            self.results.tell_finished(live.task)

    async def _claim(self, agent: LiveAgent, live: LiveTask) -> bool:
        """Take the task, if it still is as it was chosen; one that nobody wants any more ends."""
        core = self._core

        def change(task: Task) -> Task | None:
            now = core.now()
            due = rules.due_at(task)
            if core.holds(task):  # by an earlier claim of ours whose outcome was not known
                return rules.renew(task, now, core.lease_seconds)
            if task.status not in rules.CLAIMABLE or (due is not None and due > now):
                return None
            if task.cancel_requested:
                return rules.cancel(task, now)
            return rules.claim(task, core.owner, now, core.lease_seconds)

        saved = await core.save(agent, live=live, change=change)
        return saved and live.task.status == "in_progress"

    async def _run(
        self, agent: LiveAgent, live: LiveTask, handler: Handler, stop: asyncio.Future[str]
    ) -> Ended | None:
        """Run the handler under a heartbeat; how it ended, None when it was stopped."""
        context = self._context(agent, live)
        work = asyncio.create_task(_call(handler, context), name=live.task.task_id)
        self._work[agent.agent_id] = work
        beating = asyncio.create_task(self._beat(agent, live))
        try:
            return await self._until_ended(work, stop, live.task.timeout_seconds)
        finally:
            context.end()
            beating.cancel()
            await asyncio.wait({beating})
            del self._work[agent.agent_id]

    async def _until_ended(
        self, work: asyncio.Task[Ended], stop: asyncio.Future[str], seconds: float | None
    ) -> Ended | None:
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
                return Ended(error=TimeoutError(f"not done within {seconds:g} s"))
        return work.result() if work.done() and not work.cancelled() else None

    async def _let_end(self, work: asyncio.Task[Ended]) -> None:
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
            except LeaseLostError:
                self.stop(agent, "lease")
                return
            except AgentStateError as error:
                logger.warning("the lease of %s was not renewed: %s", live.task.task_id, error)
            if live.task.cancel_requested:
                self.stop(agent, "cancel")


async def _call(handler: Handler, context: TaskContext) -> Ended:
    """Run a handler; whatever it raises, but being cancelled, is how it ended."""
    try:
        return Ended(result=await handler(context, context.task))
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001  # SystemExit in a handler must not end the server
        return Ended(error=error)
