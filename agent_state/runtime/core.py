"""What all parts of the runtime share: the store, the clock, the agents, and saving together."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from heapq import heappop, heappush
from typing import Any

from agent_state.clock import Clock, IdFactory, instant, new_id, stamp
from agent_state.codec import Group
from agent_state.errors import Key, LeaseLostError, RevisionConflictError
from agent_state.manager import StatePersistenceManager
from agent_state.models import OpenModel, Task
from agent_state.runtime.live import LiveAgent, LiveTask, own
from agent_state.tasks import RetryPolicy

logger = logging.getLogger("agent_state.runtime")

_LONGEST_NAP = 30.0
_CONFLICTS = 5
LEASES = "leases"
"""Below ``system``, a lease for each agent where several runtimes share a store."""


@dataclass(slots=True)
class Core:
    """The runtime's shared parts. ``owner`` is this runtime's random id in leases."""

    manager: StatePersistenceManager
    owner: str
    clock: Clock
    new_id: IdFactory = new_id
    random: random.Random = field(default_factory=random.Random)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    lease_seconds: float = 60.0
    shared: bool = False
    """Whether other runtimes may write beside this one."""
    fenced: bool = False
    """Whether no save of an agent is made once its lease is another's: see ``commit``."""
    agents: dict[str, LiveAgent] = field(default_factory=dict)
    stopping: bool = False
    activity: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever an agent may have become idle."""

    def now(self) -> datetime:
        return self.clock.now()

    async def save(
        self,
        agent: LiveAgent,
        *,
        live: LiveTask | None = None,
        change: Callable[[Task], Task | None] | None = None,
        stage: Callable[[Group], None] | None = None,
    ) -> bool:
        """Save the agent, one of its tasks changed, and what ``stage`` adds, as one group.

        The change is made on the task as it is once nobody else is saving, and takes effect in
        memory once it is stored; so changes side by side do not undo one another. A change that
        gives None finds nothing to do; then nothing is saved, and False returned. The state of
        an agent that another runtime holds is left to that one. Raises ``LeaseLostError`` when
        the task that runs here has become another runtime's.
        """
        async with agent.lock:
            for _ in range(_CONFLICTS):
                group = self.manager.new_group()
                current = agent.current
                changed = None
                if live is not None and change is not None:
                    changed = change(live.task)
                    if changed is None:
                        return False
                    key = (agent.agent_id, changed.task_id)
                    group.save("tasks", key, changed, expected=live.revision)
                    if changed.status == "in_progress":
                        current = live
                    elif live is current:
                        current = None
                if agent.leased:
                    agent.state.last_active = stamp(self.now())
                    body = agent.body(status=agent.status(current))
                    group.save("agents", agent.agent_id, body)
                if stage is not None:
                    stage(group)
                try:
                    numbers = await self.commit(agent, group)
                except RevisionConflictError as conflict:
                    if live is None or conflict.kind != "tasks":
                        raise
                    await self._give_way(agent, live)
                    continue
                if live is not None and changed is not None:
                    agent.put(live, changed, numbers[0])
                return True
            raise RevisionConflictError(
                "somebody else keeps changing the agent's task", kind="agents", key=agent.agent_id
            )

    def build_on(self, agent: LiveAgent, lease: Mapping[str, Any] | OpenModel, stored: int) -> None:
        """Fence what is saved of the agent from now on: its lease must be stored as it is here."""
        if self.fenced:
            group = self.manager.new_group()
            group.save("system", (LEASES, agent.agent_id), lease, expected=stored)
            [agent.fence] = group.changes

    async def commit(self, agent: LiveAgent, group: Group) -> list[int]:
        """Make the group, where ``fenced`` only if the agent still is this runtime's.

        A process that stood still (SIGSTOP, a paused machine) for longer than its lease does not
        know yet that it has lost the agent. Raises ``LeaseLostError``; then nothing was changed.
        """
        count = len(group.changes)
        for _ in range(_CONFLICTS):
            fence = agent.fence if agent.leased else None
            if not self.fenced or fence is None:
                return await self.manager.commit(group)
            group.changes[count:] = [fence]
            try:
                return (await self.manager.commit(group))[:count]
            except RevisionConflictError as conflict:
                if (conflict.kind, conflict.key) != (fence.kind, fence.key):
                    raise
            finally:
                del group.changes[count:]
            # It was renewed meanwhile, or it is another's.
            lease = await self.manager.load_with_revision(fence.kind, fence.key)
            if lease is None or (lease.state.model_extra or {}).get("owner") != self.owner:
                raise LeaseLostError(
                    "another runtime has taken the agent over", kind="agents", key=agent.agent_id
                )
            self.build_on(agent, lease.state, lease.revision)
        raise RevisionConflictError("the lease keeps changing", kind="agents", key=agent.agent_id)

    async def _give_way(self, agent: LiveAgent, live: LiveTask) -> None:
        """Somebody else changed the task: build on theirs.

        The task that runs is its handler's, and saved over a hand edit; a cancellation counts.
        """
        key = (agent.agent_id, live.task.task_id)
        stored = await self.manager.load_with_revision("tasks", key)
        theirs = stored.state if stored is not None else None
        if stored is None or not isinstance(theirs, Task):
            live.revision = stored.revision if stored else 0
            if self.shared:
                agent.tasks.pop(live.task.task_id, None)
                raise lease_lost(key)  # done and cleaned up by another runtime
        elif live is not agent.current:
            agent.put(live, own(theirs, key), stored.revision)
        elif not self.shared or self.holds(theirs):
            live.revision = stored.revision
            if wants_cancel(theirs):
                live.task = live.task.model_copy(update={"cancel_requested": True})
        else:
            # What runs here keeps its old version, so that it can never be saved over theirs.
            agent.put(LiveTask(theirs, stored.revision), own(theirs, key), stored.revision)
            raise lease_lost(key)

    def is_left(self, task: Task) -> bool:
        """Whether the task is in progress, and nobody but this runtime could be at work on it."""
        if task.status != "in_progress":
            return False
        lease = task.lease
        if not self.shared or lease is None or lease.owner == self.owner:
            return True
        try:
            return instant(lease.expires_at) <= self.now()
        except ValueError:
            return True

    def holds(self, task: Task) -> bool:
        """Whether this runtime has claimed the task."""
        lease = task.lease
        return task.status == "in_progress" and lease is not None and lease.owner == self.owner


def wants_cancel(task: Task) -> bool:
    """Whether whoever wrote this version wants the task to end."""
    return task.cancel_requested or task.status == "cancelled"


def lease_lost(key: Key) -> LeaseLostError:
    return LeaseLostError("another runtime has taken the task over", kind="tasks", key=key)


class Alarm:
    """Lets agents' loops look again when their time has come; one waiter for all of them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._times: list[tuple[datetime, str]] = []
        self._next: dict[str, datetime] = {}
        self._earlier = asyncio.Event()

    def set(self, agent: LiveAgent) -> None:
        """Ring for this agent when it has something to do by itself."""
        when = agent.next_time()
        known = self._next.get(agent.agent_id)
        if when is None or (known is not None and known <= when):
            return
        if not self._times or when < self._times[0][0]:
            self._earlier.set()
        self._next[agent.agent_id] = when
        heappush(self._times, (when, agent.agent_id))

    async def run(self) -> None:
        """Until cancelled. The wall clock decides, and is looked at twice a minute: it may jump."""
        while True:
            self._ring(self._core.now())
            self._earlier.clear()
            if not self._times:
                await self._earlier.wait()
                continue
            pause = (self._times[0][0] - self._core.now()).total_seconds()
            napping = asyncio.ensure_future(self._core.clock.sleep(min(pause, _LONGEST_NAP)))
            sooner = asyncio.ensure_future(self._earlier.wait())
            try:
                await asyncio.wait({napping, sooner}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                napping.cancel()
                sooner.cancel()

    def _ring(self, now: datetime) -> None:
        while self._times and self._times[0][0] <= now:
            when, agent_id = heappop(self._times)
            if self._next.get(agent_id) != when:
                continue  # it rang earlier instead
            del self._next[agent_id]
            agent = self._core.agents.get(agent_id)
            if agent is not None:
                agent.changed.set()
