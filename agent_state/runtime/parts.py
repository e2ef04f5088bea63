"""The parts of a runtime, put together once and shared by the groups of its methods."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, cast

from agent_state.clock import Clock, IdFactory, SystemClock, new_id
from agent_state.errors import StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Durability, Mirror, Observer, StateStore
from agent_state.runtime.context import Handler, TaskContext
from agent_state.runtime.core import Alarm, Core, logger
from agent_state.runtime.keeper import Keeper
from agent_state.runtime.leases import AgentLeases
from agent_state.runtime.live import LiveAgent, LiveTask
from agent_state.runtime.post import Bedroom, PostOffice
from agent_state.runtime.report import RestoreReport
from agent_state.runtime.restore import (
    apply_agent,
    plan_agent,
    read_again,
)
from agent_state.runtime.runner import Runner
from agent_state.tasks import RetryPolicy

if TYPE_CHECKING:
    from agent_state.runtime.sessions import AsyncAgentSessionManager

_SIDE_BY_SIDE = 256


class Parts:
    """The store, the agents, and those who look after them."""

    def __init__(
        self,
        state_dir: str | PathLike[str] | None = None,
        *,
        exclusive: bool = True,
        durability: Durability | None = None,
        store: StateStore | None = None,
        mirror: Mirror | None = None,
        mirror_restores: bool = False,
        observer: Observer | None = None,
        clock: Clock | None = None,
        new_id: IdFactory = new_id,
        random: random.Random | None = None,
        retry: RetryPolicy | None = None,
        lease_seconds: float = 60.0,
        save_every: float = 30.0,
        grace_seconds: float = 10.0,
    ) -> None:
        # A store for several machines brings the time they share. There a lease is fenced, too.
        shared_clock: Clock | None = getattr(store, "clock", None)
        clock = clock or shared_clock or SystemClock()
        self.manager = StatePersistenceManager(
            state_dir,
            exclusive=exclusive and store is None,
            durability=durability,
            store=store,
            mirror=mirror,
            mirror_restores=mirror_restores,
            observer=observer,
            clock=clock,
        )
        self.core = Core(
            self.manager,
            owner=new_id(),
            clock=clock,
            new_id=new_id,
            random=random or _random(),
            retry=retry or RetryPolicy(),
            lease_seconds=lease_seconds,
            shared=not exclusive,
            fenced=not exclusive and shared_clock is not None,
        )
        self._save_every = save_every
        self._grace = grace_seconds
        self._handlers: dict[str, Handler] = {}
        self._bedroom = Bedroom(self.core)
        self.post = PostOffice(self.core, self._bedroom)
        self._alarm = Alarm(self.core)
        self._runner = Runner(self.core, self._alarm, self._bedroom, self._handlers, self._context)
        self._keeper = Keeper(
            self.core,
            self._bedroom,
            welcome=self._admit,
            start=self._runner.start,
            cancel=lambda agent: self._runner.stop(agent, "cancel"),
            finished=self._runner.results.tell_finished,
        )
        self._leases: AgentLeases | None = None
        if not exclusive:
            self._leases = AgentLeases(self.core, gained=self._gained, lost=self._lost)
        self._services: list[asyncio.Task[None]] = []
        self.report: RestoreReport | None = None
        """What the last start restored; None before the first."""

    def _context(self, agent: LiveAgent, live: LiveTask) -> TaskContext:
        # The methods a handler uses are those of the whole, which inherits from this.
        return TaskContext(cast("AsyncAgentSessionManager", self), agent, live)

    async def _admit(self, agent: LiveAgent) -> LiveAgent:
        """Make a stored agent live and run it; the one that lives, if somebody was quicker."""
        known = self.core.agents.setdefault(agent.agent_id, agent)
        if known is not agent:
            return known
        # From here on mail and tasks reach it; what came before is read now.
        agent.leased = False
        try:
            if self._leases is None or await self._leases.take(agent):
                await self._gained(agent)
            else:
                await read_again(self.manager, agent)
                self._runner.start(agent)
        except BaseException:
            self.core.agents.pop(agent.agent_id, None)
            raise
        return agent

    async def _gained(self, agent: LiveAgent) -> None:
        """An agent has become ours: see what its last runtime left, and run it."""
        if agent.loop is not None:
            await cancelled([agent.loop])
        async with agent.lock:
            await read_again(self.manager, agent)
            agent.has_handler = agent.state.agent_type in self._handlers
            repair = plan_agent(agent, self.core.now(), self.core.retry)
            agent.leased = True
            try:
                await apply_agent(self.core, agent, repair)
            except BaseException:
                agent.leased = False
                raise
        await self._runner.results.catch_up()
        self._runner.start(agent)

    def _lost(self, agent: LiveAgent) -> None:
        logger.warning("agent %s is another runtime's now", agent.agent_id)
        self._runner.stop(agent, "lease")
        agent.changed.set()

    def _agent(self, agent_id: str) -> LiveAgent:
        agent = self.core.agents.get(agent_id)
        if agent is None:
            raise StateNotFoundError("no such agent", kind="agents", key=agent_id)
        return agent


async def cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.error("a part of the runtime had failed: %r", outcome)


def _random() -> random.Random:
    return random.Random()  # noqa: S311  # jitter, not secrets


async def together(work: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Do many things side by side, some hundreds at a time; the store commits them as batches.

    Raises the first error, once everything that was begun has ended.
    """
    waiting = list(work)
    for start in range(0, len(waiting), _SIDE_BY_SIDE):
        begun = [begin() for begin in waiting[start : start + _SIDE_BY_SIDE]]
        for outcome in await asyncio.gather(*begun, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
