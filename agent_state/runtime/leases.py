"""Which runtime runs an agent, where several may: one lease per agent, renewed while held.

A lease is the document ``system/leases/<agent>``: owner, expiry, and a fencing token that
grows whenever the owner changes. Where one process owns the directory there are no leases.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime

from agent_state.clock import instant, later, stamp
from agent_state.errors import AgentStateError, RevisionConflictError
from agent_state.runtime.state import LEASES, LiveAgent, RuntimeState


class AgentLeases:
    """Takes, renews and returns the leases of one runtime's agents."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state
        self._valid_until: dict[str, float] = {}
        self._next_to_expire: datetime | None = None
        """Of the leases that other runtimes held in the last round."""
        self.inherited = False
        """Whether a lease was taken whose owner had died."""

    async def take(self, agent: LiveAgent) -> bool:
        """Try to take, or renew, the agent's lease; return whether this runtime holds it."""
        state = self._state
        key = (LEASES, agent.agent_id)
        began = state.clock.monotonic()
        stored = await state.manager.load_with_revision("system", key)
        lease = stored.state.model_dump() if stored else {}
        now = state.clock.now()
        mine = lease.get("owner") == state.owner
        until = _instant(lease.get("expires_at"))
        if lease and not mine and until is not None and until > now:
            self._next_to_expire = min(until, self._next_to_expire or until)
            return False
        token = lease.get("token")
        token = token if type(token) is int else 0
        body = {
            "agent_id": agent.agent_id,
            "expires_at": stamp(later(now, state.lease_seconds)),
            "owner": state.owner,
            "token": token if mine else token + 1,
        }
        try:
            revision = await state.manager.save(
                "system", key, body, expected=stored.revision if stored else 0
            )
        except RevisionConflictError:
            return False
        except asyncio.CancelledError:
            self._valid_until.setdefault(agent.agent_id, began)  # it may be held: return it later
            raise
        state.set_fence(agent, body, revision)
        self._valid_until[agent.agent_id] = began + state.lease_seconds
        self.inherited = self.inherited or bool(lease.get("owner") and not mine)
        return True

    async def release(self, agent_id: str) -> None:
        """Return the lease, so that another runtime can take the agent at once."""
        if self._valid_until.pop(agent_id, None) is None:
            return
        manager, key = self._state.manager, (LEASES, agent_id)
        stored = await manager.load_with_revision("system", key)
        lease = stored.state.model_dump() if stored else {}
        if stored is None or lease.get("owner") != self._state.owner:
            return
        body = {**lease, "expires_at": stamp(self._state.clock.now()), "owner": ""}
        with contextlib.suppress(RevisionConflictError):  # it expired, and another runtime has it
            await manager.save("system", key, body, expected=stored.revision)

    async def release_all(self) -> None:
        """Return every lease; one that cannot be returned expires."""
        for agent_id in list(self._valid_until):
            with contextlib.suppress(AgentStateError):
                await self.release(agent_id)

    def is_valid(self, agent_id: str) -> bool:
        """Whether the agent's lease, as it was last renewed, has not expired yet."""
        return self._state.clock.monotonic() < self._valid_until.get(agent_id, 0.0)

    async def next_round(self) -> None:
        """Wait until this runtime's leases must be renewed, or the next one of another expires."""
        pause = third = self._state.lease_seconds / 3
        if self._next_to_expire is not None:
            left = (self._next_to_expire - self._state.clock.now()).total_seconds()
            pause = min(third, max(third / 10, left))
        await self._state.clock.sleep(pause)
        self._next_to_expire = None


def _instant(until: object) -> datetime | None:
    """Return when a lease expires; None for an unreadable time, which holds no runtime off."""
    try:
        return instant(str(until))
    except ValueError:
        return None
