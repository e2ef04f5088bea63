"""Saving and restoring: what a runtime does by itself, and on demand."""

from __future__ import annotations

from agent_state.cleanup import CleanupReport
from agent_state.runtime.keeper import Disagreement
from agent_state.runtime.parts import Parts, cancelled
from agent_state.runtime.report import RestoreReport
from agent_state.runtime.restore import (
    apply_agent,
    load_agent,
    load_all,
    plan_agent,
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
        """Save every agent that is this runtime's; how many."""
        mine = [agent for agent in self.core.agents.values() if agent.leased]
        for agent in mine:
            async with agent.lock:
                await self.manager.save("agents", agent.agent_id, agent.body())
        return len(mine)

    async def restore_session_state(self, agent_id: str) -> bool:
        """Take an agent from disk and run it; False when there is none, or it is live already."""
        if agent_id in self.core.agents:
            return False
        agent = await load_agent(self.manager, agent_id)
        if agent is None:
            return False
        await self._gained(agent)
        return True

    async def restore_all_session_states(self) -> RestoreReport:
        """Take everything from disk; ``start`` calls this. Agents that are live are left alone."""
        began = self.core.clock.monotonic()
        restored = await load_all(self.manager)
        report = restored.report
        for agent_id in report.agents:
            if agent_id in self.core.agents:
                continue
            agent = restored.agents[agent_id]
            agent.has_handler = agent.state.agent_type in self._handlers
            if not agent.has_handler:
                report.waiting.append(agent_id)
            if self._leases is not None:
                agent.leased = await self._leases.take(agent)
            if agent.leased:
                repair = plan_agent(agent, self.core.now(), self.core.retry)
                tell(report, agent, repair)
                await apply_agent(self.core, agent, repair)
            else:
                report.held_elsewhere.append(agent_id)
            self.core.agents[agent_id] = agent
        report.contained = self.manager.incidents()
        report.seconds = self.core.clock.monotonic() - began
        return report

    async def cleanup_old_states(self, max_age_hours: float = 24) -> CleanupReport:
        """Move what is finished and old into archive logs; see the manager's method."""
        report = await self.manager.cleanup_old_states(max_age_hours)
        for where in report.mail:
            agent_id, _, message_id = where.partition("/")
            agent = self.core.agents.get(agent_id)
            if agent is not None:
                agent.mail.pop(message_id, None)
        for agent_id in report.agents:
            gone = self.core.agents.pop(agent_id, None)
            if gone is not None and gone.loop is not None:
                await cancelled([gone.loop])
        return report
