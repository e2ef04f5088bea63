"""What all parts of the runtime share: the store, the clock, the agents, and saving together."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from heapq import heappop, heappush

from agent_state.clock import Clock, IdFactory, new_id, stamp
from agent_state.errors import RevisionConflictError
from agent_state.manager import Group, StatePersistenceManager
from agent_state.models import Task
from agent_state.runtime.live import LiveAgent, LiveTask
from agent_state.tasks import RetryPolicy

logger = logging.getLogger("agent_state.runtime")

_LONGEST_NAP = 30.0
_CONFLICTS = 5


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
        change: Callable[[Task], Task] | None = None,
        stage: Callable[[Group], None] | None = None,
    ) -> None:
        """Save the agent, one of its tasks changed, and what ``stage`` adds, as one group.

        The change is made on the task as it is once nobody else is saving, and takes effect in
        memory once it is stored; so changes side by side do not undo one another.
        """
        async with agent.lock:
            for _ in range(_CONFLICTS):
                group = self.manager.new_group()
                current = agent.current
                changed = None
                if live is not None and change is not None:
                    changed = change(live.task)
                    key = (agent.agent_id, changed.task_id)
                    group.save("tasks", key, changed, expected=live.revision)
                    current = live if changed.status == "in_progress" else None
                agent.state.last_active = stamp(self.now())
                body = agent.body(status=agent.status(current))
                group.save("agents", agent.agent_id, body)
                if stage is not None:
                    stage(group)
                try:
                    numbers = await self.manager.commit(group)
                except RevisionConflictError as conflict:
                    if live is None or conflict.kind != "tasks":
                        raise
                    await self._give_way(agent, live)
                    continue
                if live is not None and changed is not None:
                    agent.put(live, changed, numbers[0])
                return
            raise RevisionConflictError(
                "somebody else keeps changing the agent's task", kind="agents", key=agent.agent_id
            )

    async def _give_way(self, agent: LiveAgent, live: LiveTask) -> None:
        """Somebody else changed a task that is ours: build on theirs, and heed a cancellation."""
        stored = await self.manager.read("tasks", (agent.agent_id, live.task.task_id))
        live.revision = stored.revision if stored else 0
        if stored is not None and getattr(stored.state, "cancel_requested", False):
            live.task = live.task.model_copy(update={"cancel_requested": True})


class Alarm:
    """Wakes agents' loops when their time has come; one waiter for all of them."""

    def __init__(self, core: Core, ring: Callable[[LiveAgent], Awaitable[None]]) -> None:
        self._core = core
        self._ring = ring
        self._times: list[tuple[datetime, str]] = []
        self._earlier = asyncio.Event()

    def set(self, agent: LiveAgent) -> None:
        """Ring for this agent when it has something to do by itself."""
        when = agent.next_time()
        if when is None:
            return
        if not self._times or when < self._times[0][0]:
            self._earlier.set()
        heappush(self._times, (when, agent.agent_id))

    async def run(self) -> None:
        """Until cancelled. The wall clock decides, and is looked at twice a minute: it may jump."""
        while True:
            now = self._core.now()
            while self._times and self._times[0][0] <= now:
                _, agent_id = heappop(self._times)
                agent = self._core.agents.get(agent_id)
                if agent is not None:
                    await self._ring(agent)
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
