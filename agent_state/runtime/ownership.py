"""Which runtime runs an agent, where several may: a heartbeat per runtime, an owner per agent.

The document ``system/runtimes/<runtime>`` is a runtime's heartbeat: the time until which it owns
its agents, renewed three times in that time. ``system/owners/<agent>`` has the agent's owner and
a fencing token that grows by one with each change of owner; it is written at no other time, and
by compare-and-set. Every commit on behalf of an agent checks that it is unchanged. Where one
process owns the store there is neither.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from datetime import datetime
from typing import Any

from agent_state.clock import instant, later, stamp
from agent_state.codec import StoredState
from agent_state.errors import AgentStateError, Key, LockTimeoutError, RevisionConflictError
from agent_state.protocols import Check
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.state import OWNERS, RuntimeState, logger

RUNTIMES = "runtimes"
"""Below ``system``: one heartbeat per runtime."""
_LEASES = "leases"
"""Below ``system``: one lease per agent, as older versions wrote it."""

_MAX_CONFLICTS = 5
"""How often taking an agent is repeated because another runtime changed its owner meanwhile."""


class AgentOwnership:
    """Keeps one runtime's heartbeat, and takes and releases the ownership of its agents."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start; what is bound to an event loop is made here."""
        self._valid_until = 0.0
        self._renewing: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()
        self._alive: dict[str, datetime] = {}
        """Until when each other runtime owns its agents, as it was read since ``look``."""
        self._ends: dict[str, datetime] = {}
        """The same, as it was last read."""
        self._expired: dict[str, int] = {}
        """The revision of each heartbeat that was read and has expired; 0 for one that is gone."""
        self._stuck: dict[str, int] = {}
        """The revision of each of these whose lock is held by a process that stands still."""
        self._inquiry = asyncio.Event()
        self.inherited = False
        """Whether an agent was taken whose owner had died."""

    # -- the heartbeat -----------------------------------------------------------------------

    @property
    def is_valid(self) -> bool:
        """Whether the heartbeat, as it was last renewed, has not expired."""
        return self._state.clock.monotonic() < self._valid_until

    async def renew(self) -> None:
        """Store the heartbeat: one write, however many agents this runtime owns."""
        state = self._state
        began = state.clock.monotonic()
        until = stamp(later(state.clock.now(), state.lease_seconds))
        body = {"expires_at": until, "owner": state.owner}
        await state.manager.save("system", (RUNTIMES, state.owner), body)
        self._valid_until = began + state.lease_seconds

    async def renew_in_time(self) -> None:
        """Renew the heartbeat, but wait no longer than it is valid.

        A renewal that the store has not answered goes on by itself. Raises ``LockTimeoutError``
        for one, and as ``renew``.
        """
        clock = self._state.clock
        left = self._valid_until - clock.monotonic()
        if self._renewing is None:
            self._renewing = asyncio.create_task(self.renew(), name="agent-state renewal")
        limit = asyncio.ensure_future(clock.sleep(left if left > 0 else self._third))
        try:
            await asyncio.wait({self._renewing, limit}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            limit.cancel()
        if not self._renewing.done():
            key = (RUNTIMES, self._state.owner)
            raise LockTimeoutError("the store does not answer", kind="system", key=key)
        renewing, self._renewing = self._renewing, None
        renewing.result()

    async def wait_for_renewal(self) -> None:
        """Wait until it is time to renew; less long while the store refuses."""
        left = self._valid_until - self._state.clock.monotonic()
        renewed = left > 2.5 * self._third
        await self._state.clock.sleep(self._third if renewed else self._third / 10)

    async def end(self) -> None:
        """Remove the heartbeat, so that other runtimes can take the agents at once."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
            self._renewing = None
        self._valid_until = 0.0
        await self._state.manager.delete("system", (RUNTIMES, self._state.owner))

    async def remove_expired(self) -> None:
        """Remove the heartbeats of dead runtimes, whose agents were taken."""
        manager = self._state.manager
        try:
            for key in await manager.keys("system", (RUNTIMES,)):
                stored = await manager.load_with_revision("system", key)
                if stored is None or self._stuck.get(key[-1]) == stored.revision:
                    continue
                if self._end_of(_fields(stored)) is None:
                    await manager.delete("system", key, expected=stored.revision)
        except AgentStateError as error:  # another runtime's start removes them
            logger.warning("the heartbeats of dead runtimes were not removed: %s", error)

    # -- the owners of agents ----------------------------------------------------------------

    async def take(self, agent: LiveAgent) -> bool:
        """Own the agent, unless another live runtime does; return whether this one owns it."""
        for _ in range(_MAX_CONFLICTS):
            with contextlib.suppress(RevisionConflictError):  # another runtime was quicker
                return self.is_valid and await self._take(agent)
        return False

    async def _take(self, agent: LiveAgent) -> bool:
        state, key = self._state, (OWNERS, agent.agent_id)
        stored = await state.manager.load_with_revision("system", key)
        record = _fields(stored)
        old = None if stored else await self._older_lease(agent)
        if old is not None:
            record = _fields(old)
        owner, token = str(record.get("owner") or ""), record.get("token")
        token = token if type(token) is int else 0
        if stored is not None and owner == state.owner:
            self._own(agent, token, stored.revision)
            return True
        alive = self._end_of(record) is not None if old else await self._is_alive(owner)
        agent.owner = owner if alive else None
        if alive:
            return False
        body = {"agent_id": agent.agent_id, "owner": state.owner, "token": token + 1}
        group = state.manager.new_group()
        group.save("system", key, body, expected=stored.revision if stored else 0)
        if old is not None:
            group.delete("system", old.key, expected=old.revision)
        heartbeat = self._expired.get(owner)
        if heartbeat is not None and heartbeat != self._stuck.get(owner):
            group.check("system", _heartbeat(owner), heartbeat)  # unless it was renewed meanwhile
        try:
            revisions = await state.manager.commit(group)
        except LockTimeoutError as error:
            if heartbeat is None or (error.kind, error.key) != ("system", _heartbeat(owner)):
                raise
            # It was stopped while it renewed. What it stores when it goes on has expired as well.
            self._stuck[owner] = heartbeat
            return await self._take(agent)
        self._own(agent, token + 1, revisions[0])
        # A runtime that stopped in good order has removed its heartbeat.
        self.inherited = self.inherited or bool(heartbeat)
        return True

    def _own(self, agent: LiveAgent, token: int, revision: int) -> None:
        agent.owner = None
        agent.token = token
        agent.fence = Check("system", (OWNERS, agent.agent_id), revision)

    async def confirm(self, agent: LiveAgent) -> bool:
        """Whether this runtime still owns the agent, as it is stored."""
        fence = agent.fence
        if fence is None:
            return False
        stored = await self._state.manager.load_with_revision(fence.kind, fence.key)
        return stored is not None and stored.revision == fence.expected

    async def release(self, agent: LiveAgent) -> None:
        """Leave an agent that is no longer run; its token is kept."""
        fence, agent.fence = agent.fence, None
        if fence is not None:
            body = {"agent_id": agent.agent_id, "owner": "", "token": agent.token}
            with contextlib.suppress(RevisionConflictError):  # another runtime has it
                await self._state.manager.save(fence.kind, fence.key, body, expected=fence.expected)

    # -- other runtimes ----------------------------------------------------------------------

    async def look(self, agents: Collection[LiveAgent]) -> None:
        """Read the heartbeats of the agents' owners anew, each once.

        One that cannot be read now expires at the time that was read before.
        """
        self._alive.clear()
        try:
            for owner in {agent.owner for agent in agents if agent.owner}:
                await self._is_alive(owner)
        finally:
            self.forget_dead(agents)

    def forget_dead(self, agents: Collection[LiveAgent]) -> None:
        """Forget the owners whose heartbeats, as they were last read, have expired."""
        now = self._state.clock.now()
        for agent in agents:
            if agent.owner is not None and self._ends.get(agent.owner, now) <= now:
                agent.owner = None

    def inquire(self) -> None:
        """Look at other runtimes at once: one has stopped, or has released an agent."""
        self._inquiry.set()

    async def next_round(self) -> None:
        """Wait for a third of a lease, until the next heartbeat expires, or for ``inquire``."""
        clock = self._state.clock
        pause = self._third
        if self._alive:
            left = (min(self._alive.values()) - clock.now()).total_seconds()
            pause = min(pause, max(pause / 10, left))
        timer = asyncio.ensure_future(clock.sleep(pause))
        inquiry = asyncio.ensure_future(self._inquiry.wait())
        try:
            await asyncio.wait({timer, inquiry}, return_when=asyncio.FIRST_COMPLETED)
            if inquiry.done():
                await clock.sleep(self._third / 100)  # many may have a reason at once
        finally:
            timer.cancel()
            inquiry.cancel()
        self._inquiry.clear()

    async def _is_alive(self, owner: str) -> bool:
        """Whether another runtime has a heartbeat that has not expired; read once per round."""
        if not owner or owner == self._state.owner:
            return False
        async with self._reading:
            known = self._alive.get(owner)
            if known is None or known <= self._state.clock.now():
                stored = await self._state.manager.load_with_revision("system", _heartbeat(owner))
                known = self._end_of(_fields(stored))
                self._expired[owner] = stored.revision if stored else 0
            if known is None:
                self._alive.pop(owner, None)
                self._ends.pop(owner, None)
                return False
            self._alive[owner] = self._ends[owner] = known
            return True

    async def _older_lease(self, agent: LiveAgent) -> StoredState | None:
        """The agent's lease as an older version wrote it, if it has one."""
        return await self._state.manager.load_with_revision("system", (_LEASES, agent.agent_id))

    def _end_of(self, record: dict[str, Any]) -> datetime | None:
        """When it expires; None if it has, or if its time is unreadable."""
        try:
            end = instant(str(record.get("expires_at")))
        except ValueError:
            return None
        return end if record.get("owner") and end > self._state.clock.now() else None

    @property
    def _third(self) -> float:
        return self._state.lease_seconds / 3


def _heartbeat(owner: str) -> Key:
    return (RUNTIMES, owner)


def _fields(stored: StoredState | None) -> dict[str, Any]:
    return stored.state.model_dump() if stored is not None else {}
