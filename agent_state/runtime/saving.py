"""Saving and restoring: what a runtime does by itself, and on demand."""

from __future__ import annotations

from functools import partial

from agent_state.cleanup import CleanupReport
from agent_state.errors import AgentStateError, LeaseLostError
from agent_state.runtime.core import logger
from agent_state.runtime.keeper import Disagreement
from agent_state.runtime.live import LiveAgent
from agent_state.runtime.parts import Parts, cancelled, together
from agent_state.runtime.report import RestoreReport
from agent_state.runtime.restore import (
    Repair,
    apply_agent,
    collecting_later,
    load_agent,
    load_all,
    plan_agent,
    read_again,
    tell,
)


class SavingMethods(Parts):
    """How a runtime's agents come from disk and go there."""

    # -- saving and restoring ----------------------------------------------------------------

    @property
    def disagreements(self) -> list[Disagreement]:
        """Where memory and disk did not agree, and which was believed; the latest thousand."""
        return list(self._keeper.disagreements)

    async def check(self) -> int:
        """Compare memory with disk now and mend what differs; how many differed."""
        return await self._keeper.check()

    async def save_session_state(self, agent_id: str) -> None:
        """Save one agent as it is now."""
        await self.core.save(self._agent(agent_id))

    async def save_all_session_states(self) -> int:
        """Save every agent that is this runtime's; how many.

        One that cannot be saved does not keep the others from it; its error is raised at the end.
        """
        mine = [agent for agent in self.core.agents.values() if agent.leased]
        failed: list[AgentStateError] = []

        async def save(agent: LiveAgent) -> None:
            try:
                async with agent.lock:
                    group = self.manager.new_group()
                    group.save("agents", agent.agent_id, agent.body())
                    await self.core.commit(agent, group)
            except LeaseLostError as error:
                logger.warning("%s", error)  # the agent is saved, by whoever runs it
            except AgentStateError as error:
                logger.error("agent %s could not be saved: %s", agent.agent_id, error)
                failed.append(error)

        await together(partial(save, agent) for agent in mine)
        if failed:
            raise failed[0]
        return len(mine)

    async def restore_session_state(self, agent_id: str) -> bool:
        """Take an agent from disk and run it; False when there is none, or it is live already."""
        if agent_id in self.core.agents:
            return False
        agent = await load_agent(self.manager, agent_id)
        if agent is None:
            return False
        return await self._admit(agent) is agent

    async def restore_all_session_states(self) -> RestoreReport:
        """Take everything from disk; ``start`` calls this. Agents that are live are left alone."""
        began = self.core.clock.monotonic()
        with collecting_later():
            restored = await load_all(self.manager)
        report = restored.report
        fresh = [
            agent
            for agent in map(restored.agents.__getitem__, report.agents)
            if self.core.agents.setdefault(agent.agent_id, agent) is agent
        ]
        try:
            repairs = [(agent, await self._look_over(agent, report)) for agent in fresh]
            await together(
                partial(self._set_right, agent, repair)
                for agent, repair in repairs
                if repair.needed or self._services
            )
        except BaseException:
            for agent in fresh:
                self.core.agents.pop(agent.agent_id, None)
            raise
        if self._leases is not None:
            # Another runtime may be running beside us; its leases say whether one has died.
            report.after_crash = self._leases.inherited
        report.contained = self.manager.incidents()
        report.seconds = self.core.clock.monotonic() - began
        return report

    async def _look_over(self, agent: LiveAgent, report: RestoreReport) -> Repair:
        """What a crash has left of an agent that was just read, told to the report."""
        if self._leases is not None:
            agent.leased = await self._leases.take(agent)
        if self._leases is not None or self._services:
            # Others could write until now; from here on what comes reaches the agent.
            await read_again(self.manager, agent)
        agent.has_handler = agent.state.agent_type in self._handlers
        if not agent.has_handler:
            report.waiting.append(agent.agent_id)
        if not agent.leased:
            report.held_elsewhere.append(agent.agent_id)
            return Repair()
        repair = plan_agent(agent, self.core.now(), self.core.retry)
        tell(report, agent, repair)
        return repair

    async def _set_right(self, agent: LiveAgent, repair: Repair) -> None:
        await apply_agent(self.core, agent, repair)
        if self._services:
            self._runner.start(agent)

    async def cleanup_old_states(self, max_age_hours: float = 24) -> CleanupReport:
        """Move what is finished and old into archive logs; see the manager's method."""
        report = await self.manager.cleanup_old_states(max_age_hours)
        moved = set(report.mail)
        for agent in list(self.core.agents.values()):
            for message_id in list(agent.mail):
                # An id may hold a slash, so that two messages can read the same in the report.
                key = (agent.agent_id, message_id)
                if (
                    "/".join(key) in moved
                    and await self.manager.load_with_revision("mail", key) is None
                ):
                    agent.mail.pop(message_id, None)
        for agent_id in report.agents:
            gone = self.core.agents.pop(agent_id, None)
            if gone is not None:
                if gone.loop is not None:
                    await cancelled([gone.loop])
                if self._leases is not None:
                    await self._leases.give_back(gone.agent_id)
        return report
