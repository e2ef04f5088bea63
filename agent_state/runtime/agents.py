"""The agents of one runtime: create, stop, wake, and bring them from the store and back."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from agent_state.clock import stamp
from agent_state.errors import (
    AgentStateError,
    LeaseLostError,
    RevisionConflictError,
    StateValidationError,
)
from agent_state.models import AgentState, AgentStatus, SleepState, WakeEvent, detached
from agent_state.runtime.leases import AgentLeases
from agent_state.runtime.recovery import (
    AgentRepair,
    RestoreReport,
    apply_repair,
    garbage_collection_paused,
    load_agent,
    load_all,
    plan_repair,
    reload_agent,
)
from agent_state.runtime.runner import Runner
from agent_state.runtime.sleep import SleepService
from agent_state.runtime.state import LiveAgent, RuntimeState, logger
from agent_state.runtime.tasks import TaskWaiters

_MAX_CONCURRENT = 256
"""How many agents are saved or repaired at the same time."""


class AgentService:
    """``runtime.agents``: the agents of this runtime.

    ``leases`` is None where one process owns the store.
    """

    def __init__(
        self,
        state: RuntimeState,
        sleep: SleepService,
        runner: Runner,
        waiters: TaskWaiters,
        leases: AgentLeases | None,
    ) -> None:
        self._state = state
        self._sleep = sleep
        self._runner = runner
        self._waiters = waiters
        self._leases = leases
        self.started = False
        """Whether the runtime has started, so that an agent's loop may run."""

    async def create(
        self,
        agent_id: str,
        *,
        agent_type: str,
        name: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        tool_sets: Sequence[Any] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> AgentState:
        """Create an agent and run it; one that exists is left as it is and returned.

        So the same start-up code serves the first start and every restart. ``name`` is the
        agent's id if None. Raises ``StateValidationError`` when the existing agent has another
        type.
        """
        agent = await self._find(agent_id)
        if agent is None:
            created = AgentState(
                agent_id=agent_id,
                agent_name=name or agent_id,
                agent_type=agent_type,
                status="idle" if self._runner.can_run(agent_type) else "waiting",
                created_at=stamp(self._state.clock.now()),
                configuration=detached(dict(configuration or {})),
            )
            if system_prompt is not None:
                created.context.system_prompt = system_prompt
            if tool_sets:
                created.tool_sets = detached([*tool_sets])
            if metadata:
                created.metadata = detached(dict(metadata))
            agent = await self._store_new(created)
        if agent.state.agent_type != agent_type:
            raise StateValidationError(
                f"the agent exists, with type {agent.state.agent_type!r}",
                kind="agents",
                key=agent_id,
            )
        return agent.state.model_copy(deep=True)

    async def _find(self, agent_id: str) -> LiveAgent | None:
        """Return the agent, live, if it exists."""
        agent = self._state.agents.get(agent_id)
        if agent is None:
            stored = await load_agent(self._state.manager, agent_id)
            agent = None if stored is None else await self.admit(stored)
        return agent

    async def _store_new(self, created: AgentState) -> LiveAgent:
        """Store a new agent and run it; if another caller was quicker, return that one's."""
        agent_id = created.agent_id
        try:
            await self._state.manager.save("agents", agent_id, created, expected=0)
        except RevisionConflictError:
            agent = await self._find(agent_id)
            if agent is None:
                raise
            return agent
        return await self.admit(LiveAgent(agent_id, created))

    async def stop(self, agent_id: str) -> None:
        """Let the agent finish its task and begin no other. Its state, tasks and mail stay.

        Raises ``StateNotFoundError``.
        """
        await self._set_status(self._state.agent(agent_id), "stopped")

    async def start(self, agent_id: str) -> None:
        """Let a stopped agent work again. Raises ``StateNotFoundError``."""
        agent = self._state.agent(agent_id)
        if agent.state.status == "stopped":
            await self._set_status(agent, "idle")

    async def _set_status(self, agent: LiveAgent, status: AgentStatus) -> None:
        before, agent.state.status = agent.state.status, status
        try:
            if agent.leased:
                await self._state.save(agent)
            else:  # the runtime that holds the agent notices the change
                async with self._state.manager.edit("agents", agent.agent_id) as stored:
                    stored.status = status
        except BaseException as error:
            # The change of a cancelled caller may have been made all the same.
            if not (isinstance(error, asyncio.CancelledError) and agent.leased):
                agent.state.status = before
            raise
        finally:
            agent.changed.set()

    def get(self, agent_id: str) -> AgentState:
        """Return a copy of the agent as it is now. Raises ``StateNotFoundError``."""
        agent = self._state.agent(agent_id)
        copy = agent.state.model_copy(deep=True)
        copy.status = agent.status(agent.current)
        return copy

    def list(self) -> builtins.list[str]:
        """Return the ids of this runtime's agents, sorted."""
        return sorted(self._state.agents)

    async def sleep(
        self,
        agent_id: str,
        *,
        seconds: float | None = None,
        until: datetime | None = None,
        wake_on: Sequence[WakeEvent] = (),
        reason: str | None = None,
    ) -> SleepState:
        """Let the agent begin no task until the time, a wake event, or ``wake``.

        Give ``seconds`` or ``until`` (with a zone), or neither. ``wake_on``: ``mail_received``,
        ``high_priority_mail`` (urgent counts), ``system_event``, ``manual_wake``. Mail that was
        unread before does not wake it. Raises ``StateNotFoundError`` and
        ``StateValidationError``.
        """
        return await self._sleep.sleep(
            self._state.agent(agent_id),
            seconds=seconds,
            until=until,
            wake_on=wake_on,
            reason=reason,
        )

    async def wake(self, agent_id: str) -> bool:
        """End the agent's sleep, whatever it waits for; return whether it slept.

        Raises ``StateNotFoundError``.
        """
        return await self._sleep.wake(self._state.agent(agent_id), "manual_wake")

    # -- from the store and back -------------------------------------------------------------

    async def admit(self, agent: LiveAgent) -> LiveAgent:
        """Add a stored agent and run it; if it was added before, return that one."""
        known = self._state.agents.setdefault(agent.agent_id, agent)
        if known is not agent:
            return known
        # From here on mail and tasks reach it; what came before is read now.
        agent.leased = False
        try:
            if self._leases is None or await self._leases.take(agent):
                await self._gained(agent)
            else:
                await reload_agent(self._state.manager, agent)
                self._runner.start(agent)
        except BaseException:
            self._state.agents.pop(agent.agent_id, None)
            raise
        return agent

    async def _gained(self, agent: LiveAgent) -> None:
        """Run an agent that this runtime holds from now on, after repairing it."""
        if agent.loop is not None:
            await cancel_and_wait([agent.loop])
        async with agent.lock:
            await reload_agent(self._state.manager, agent)
            agent.has_handler = self._runner.can_run(agent.state.agent_type)
            repair = plan_repair(agent, self._state.clock.now(), self._state.retry)
            agent.leased = True
            try:
                await apply_repair(self._state, agent, repair)
            except BaseException:
                agent.leased = False
                raise
        await self._waiters.refresh()
        self._runner.start(agent)

    async def renew_leases(self, leases: AgentLeases) -> None:
        """Renew the held leases and try to take the others, until cancelled."""
        while True:
            await leases.next_round()
            for agent in list(self._state.agents.values()):
                if self._state.agents.get(agent.agent_id) is agent:  # not cleaned up just now
                    await self._renew_lease(leases, agent)

    async def _renew_lease(self, leases: AgentLeases, agent: LiveAgent) -> None:
        try:
            held = await leases.take(agent)
            if held and not agent.leased:
                await self._gained(agent)
        except AgentStateError as error:
            logger.warning("the lease of agent %s: %s", agent.agent_id, error)
            held = leases.is_valid(agent.agent_id)
        if agent.leased and not held:
            logger.warning("agent %s belongs to another runtime now", agent.agent_id)
            agent.leased = False
            agent.request_stop("lease")
            agent.changed.set()

    async def restore(self, agent_id: str) -> bool:
        """Load an agent and run it; False when it does not exist, or is live already."""
        if agent_id in self._state.agents:
            return False
        agent = await load_agent(self._state.manager, agent_id)
        return agent is not None and await self.admit(agent) is agent

    async def restore_all(self) -> RestoreReport:
        """Load and repair every agent that is not live yet, and run it once started."""
        state = self._state
        began = state.clock.monotonic()
        with garbage_collection_paused():
            agents, report = await load_all(state.manager)
        fresh, repairs = [], []
        for agent_id in report.agents:
            agent = agents[agent_id]
            if state.agents.setdefault(agent_id, agent) is agent:
                fresh.append(agent)
        try:
            for agent in fresh:
                repair = await self._examine(agent, report)
                if repair.needed or self.started:
                    repairs.append(partial(self._repair, agent, repair))
            await _gather_bounded(repairs)
        except BaseException:
            for agent in fresh:
                state.agents.pop(agent.agent_id, None)
            raise
        if self._leases is not None:
            # Another runtime may be running; the leases show whether one has died.
            report.after_crash = self._leases.inherited
        report.contained = state.manager.incidents()
        report.seconds = state.clock.monotonic() - began
        return report

    async def _examine(self, agent: LiveAgent, report: RestoreReport) -> AgentRepair:
        """Find what a crash left of an agent that was just loaded, and add it to the report."""
        if self._leases is not None:
            agent.leased = await self._leases.take(agent)
        if self._leases is not None or self.started:
            # Other writers could change it until now; from here on changes reach the agent.
            await reload_agent(self._state.manager, agent)
        agent.has_handler = self._runner.can_run(agent.state.agent_type)
        if not agent.has_handler:
            report.waiting.append(agent.agent_id)
        if not agent.leased:
            report.held_elsewhere.append(agent.agent_id)
            return AgentRepair()
        repair = plan_repair(agent, self._state.clock.now(), self._state.retry)
        report.add(agent, repair)
        return repair

    async def _repair(self, agent: LiveAgent, repair: AgentRepair) -> None:
        await apply_repair(self._state, agent, repair)
        if self.started:
            self._runner.start(agent)

    async def save_all(self) -> int:
        """Save every agent that this runtime holds; return how many.

        One that cannot be saved does not prevent saving the others; the first error is raised
        at the end.
        """
        held = [agent for agent in self._state.agents.values() if agent.leased]
        failed: list[AgentStateError] = []

        async def save(agent: LiveAgent) -> None:
            try:
                async with agent.lock:
                    group = self._state.manager.new_group()
                    group.save("agents", agent.agent_id, agent.body())
                    await self._state.commit(agent, group)
            except LeaseLostError as error:
                logger.warning("%s", error)  # the runtime that holds the agent saves it
            except AgentStateError as error:
                logger.error("agent %s could not be saved: %s", agent.agent_id, error)
                failed.append(error)

        await _gather_bounded([partial(save, agent) for agent in held])
        if failed:
            raise failed[0]
        return len(held)

    async def remove_archived(self, agent_ids: Iterable[str], mail: Iterable[str]) -> None:
        """Remove from memory what cleaning up has moved to the archive.

        ``mail`` holds messages as ``agent/id``.
        """
        manager, moved = self._state.manager, set(mail)
        for agent in list(self._state.agents.values()):
            for message_id in list(agent.mail):
                # An id may hold a slash, so that two messages can have the same name in a report.
                key = (agent.agent_id, message_id)
                if "/".join(key) in moved and await manager.load_with_revision("mail", key) is None:
                    agent.mail.pop(message_id, None)
        for agent_id in agent_ids:
            gone = self._state.agents.pop(agent_id, None)
            if gone is None:
                continue
            if gone.loop is not None:
                await cancel_and_wait([gone.loop])
            if self._leases is not None:
                await self._leases.release(agent_id)


async def cancel_and_wait(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel asyncio tasks and wait for their ends; an error of one is logged."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.error("a part of the runtime had failed: %r", outcome)


async def _gather_bounded(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run many calls concurrently, some hundreds at a time; the store commits them in batches.

    Raises the first error, once every call that was started has ended.
    """
    for start in range(0, len(calls), _MAX_CONCURRENT):
        started = [call() for call in calls[start : start + _MAX_CONCURRENT]]
        for outcome in await asyncio.gather(*started, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
