"""Which runtime runs an agent, where several may: a lease per agent, renewed while held.

A lease is the document ``system/leases/<agent>``: owner, expiry, and a fencing token that
grows with every change of hands. Where one process owns the directory none of this is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime

from agent_state.clock import instant, later, stamp
from agent_state.errors import AgentStateError, RevisionConflictError
from agent_state.models import OpenModel
from agent_state.runtime.core import LEASES, Core, logger
from agent_state.runtime.live import LiveAgent

LeaseChange = Callable[[LiveAgent], Awaitable[None]]


class AgentLeases:
    """Takes, renews and gives back the leases of one runtime's agents.

    ``gained`` is awaited when an agent becomes ours, ``lost`` is called when it is not any more.
    """

    def __init__(
        self, core: Core, *, gained: LeaseChange, lost: Callable[[LiveAgent], None]
    ) -> None:
        self._core = core
        self._gained = gained
        self._lost = lost
        self._valid_until: dict[str, float] = {}
        self._next_to_expire: datetime | None = None
        """Of the leases that others held when we last looked."""
        self.inherited = False
        """Whether a lease was taken of which the owner had died."""

    async def take(self, agent: LiveAgent) -> bool:
        """Try to get, or renew, the lease; whether it is ours."""
        core = self._core
        key = (LEASES, agent.agent_id)
        began = core.clock.monotonic()
        stored = await core.manager.load_with_revision("system", key)
        lease = stored.state.model_dump() if stored else {}
        now = core.now()
        mine = lease.get("owner") == core.owner
        until = _instant(lease.get("expires_at"))
        if lease and not mine and until is not None and until > now:
            self._next_to_expire = min(until, self._next_to_expire or until)
            return False
        token = lease.get("token")
        token = token if type(token) is int else 0
        body = {
            "agent_id": agent.agent_id,
            "expires_at": stamp(later(now, core.lease_seconds)),
            "owner": core.owner,
            "token": token if mine else token + 1,
        }
        try:
            revision = await core.manager.save(
                "system", key, body, expected=stored.revision if stored else 0
            )
        except RevisionConflictError:
            return False
        except asyncio.CancelledError:
            self._valid_until.setdefault(agent.agent_id, began)  # it may be ours: to give back
            raise
        core.build_on(agent, body, revision)
        self._valid_until[agent.agent_id] = began + core.lease_seconds
        self.inherited = self.inherited or bool(lease.get("owner") and not mine)
        return True

    async def give_back(self, agent_id: str) -> None:
        """Let another runtime have the agent at once."""
        if self._valid_until.pop(agent_id, None) is None:
            return
        key = (LEASES, agent_id)
        stored = await self._core.manager.load_with_revision("system", key)
        if stored is None or not _is_mine(stored.state, self._core.owner):
            return
        body = {**stored.state.model_dump(), "expires_at": stamp(self._core.now()), "owner": ""}
        try:
            await self._core.manager.save("system", key, body, expected=stored.revision)
        except RevisionConflictError:
            return  # it has expired and somebody else has it

    async def give_all_back(self) -> None:
        """The same for every agent; what cannot be given back expires."""
        for agent_id in list(self._valid_until):
            with contextlib.suppress(AgentStateError):
                await self.give_back(agent_id)

    async def run(self) -> None:
        """Renew what is held and try for what is not, until cancelled."""
        while True:
            await self._core.clock.sleep(self._pause())
            self._next_to_expire = None
            for agent in list(self._core.agents.values()):
                await self._look_after(agent)

    def _pause(self) -> float:
        """Until ours are to be renewed, or the lease of one who has died expires."""
        third = self._core.lease_seconds / 3
        if self._next_to_expire is None:
            return third
        left = (self._next_to_expire - self._core.now()).total_seconds()
        return min(third, max(third / 10, left))

    async def _look_after(self, agent: LiveAgent) -> None:
        if self._core.agents.get(agent.agent_id) is not agent:
            return  # cleaned up since this round began
        try:
            held = await self.take(agent)
            if held and not agent.leased:
                await self._gained(agent)
        except AgentStateError as error:
            logger.warning("the lease of agent %s: %s", agent.agent_id, error)
            held = self._core.clock.monotonic() < self._valid_until.get(agent.agent_id, 0.0)
        if agent.leased and not held:
            agent.leased = False
            self._lost(agent)


def _instant(until: object) -> datetime | None:
    """When a lease expires; None when what it says is no time, and it holds nobody off."""
    try:
        return instant(str(until))
    except ValueError:
        return None


def _is_mine(state: OpenModel, owner: str) -> bool:
    return (state.model_extra or {}).get("owner") == owner
