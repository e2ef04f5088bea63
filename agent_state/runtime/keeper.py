"""Looks after agreement: between memory and disk, and with those who write beside us."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from agent_state.codec import Loaded
from agent_state.errors import AgentStateError, Key, describe
from agent_state.models import AgentState, Message, SleepState, Task
from agent_state.protocols import Notice
from agent_state.runtime.core import Core
from agent_state.runtime.live import LiveAgent, LiveTask
from agent_state.runtime.post import Bedroom
from agent_state.runtime.restore import load_agent, take_in
from agent_state.tasks import is_finished

_logger = logging.getLogger("agent_state.runtime")
_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Memory and disk did not say the same; ``mended`` says which of them was believed."""

    kind: str
    key: Key
    what: str
    mended: str


class Keeper:
    """Compares, saves again, and takes in what others have changed.

    A hand edit of what the runtime is not working on is taken over. While a handler runs, its
    agent's memory and its task are the handler's, and saved over the edit (which the store
    puts aside).
    """

    def __init__(
        self,
        core: Core,
        bedroom: Bedroom,
        *,
        welcome: Callable[[LiveAgent], None],
        cancel: Callable[[LiveAgent], None],
        finished: Callable[[Task], None],
    ) -> None:
        self._core = core
        self._bedroom = bedroom
        self._welcome = welcome
        self._cancel = cancel
        self._finished = finished
        self.disagreements: deque[Disagreement] = deque(maxlen=_REMEMBERED)

    async def check(self) -> int:
        """Compare every agent and open task with what is stored, and mend; how many differed."""
        found = 0
        for agent in list(self._core.agents.values()):
            if not agent.leased:
                continue
            async with agent.lock:
                found += await self._check_agent(agent)
                for live in list(agent.tasks.values()):
                    if live is not agent.current:
                        found += await self._check_task(agent, live)
            agent.changed.set()
        return found

    async def _check_agent(self, agent: LiveAgent) -> int:
        stored = await self._core.manager.read("agents", agent.agent_id)
        body = agent.body()
        if stored is not None and stored.state.model_dump() == body:
            return 0
        busy = agent.current is not None
        if stored is not None and stored.edited and not busy:
            self._adopt(agent, stored.state)
            self._note("agents", (agent.agent_id,), "edited outside", "memory follows the file")
            return 1
        await self._core.manager.save("agents", agent.agent_id, body)
        if busy and stored is not None:
            return 0  # a handler has changed its memory since the last save: what saving is for
        what = "missing on disk" if stored is None else "differs from memory"
        self._note("agents", (agent.agent_id,), what, "saved again from memory")
        return 1

    async def _check_task(self, agent: LiveAgent, live: LiveTask) -> int:
        key = (agent.agent_id, live.task.task_id)
        stored = await self._core.manager.read("tasks", key)
        if stored is None:
            live.revision = await self._core.manager.save("tasks", key, live.task)
            self._note("tasks", key, "missing on disk", "saved again from memory")
            return 1
        if stored.revision == live.revision and stored.state.model_dump() == live.task.model_dump():
            return 0
        take_in(agent, stored)
        self._note("tasks", key, "changed outside", "memory follows the file")
        return 1

    def _note(self, kind: str, key: Key, what: str, mended: str) -> None:
        self.disagreements.append(Disagreement(kind, key, what, mended))
        _logger.warning("%s: %s; %s", describe(kind, key), what, mended)

    def _adopt(self, agent: LiveAgent, state: object) -> None:
        if isinstance(state, AgentState):
            state.agent_id = agent.agent_id
            agent.state = state

    # -- what others write -------------------------------------------------------------------

    async def notice(self, notice: Notice) -> None:
        """Take in one change that came from outside."""
        try:
            await self._take_in(notice)
        except AgentStateError as error:
            where = describe(notice.kind, notice.key)
            _logger.warning("%s was changed outside and is not usable: %s", where, error)

    async def _take_in(self, notice: Notice) -> None:
        core, key = self._core, notice.key
        agent = core.agents.get(key[0])
        if agent is None:
            if notice.kind == "agents" and len(key) == 1:
                found = await load_agent(core.manager, key[0])
                if found is not None and key[0] not in core.agents:
                    self._welcome(found)
            return
        stored = await core.manager.read(notice.kind, key)
        if notice.kind == "sleep":
            if stored is None or not getattr(stored.state, "is_sleeping", False):
                await self._bedroom.wake(agent, "manual_wake")
            elif isinstance(stored.state, SleepState):
                agent.sleep = stored.state
                agent.changed.set()
            return
        if stored is None:
            return  # removed by hand: the next check brings back what is live
        if notice.kind == "agents" and agent.current is None:
            self._adopt(agent, stored.state)
        elif isinstance(stored.state, Message):
            take_in(agent, stored)
            await self._bedroom.wake_if_due(agent)
        elif isinstance(stored.state, Task):
            self._take_task(agent, key, stored)
        agent.changed.set()

    def _take_task(self, agent: LiveAgent, key: Key, stored: Loaded) -> None:
        live = agent.tasks.get(key[1])
        if live is None or live is not agent.current:
            take_in(agent, stored)
            if live is not None and is_finished(live.task):
                self._finished(live.task)  # by another runtime, or by hand
        elif getattr(stored.state, "cancel_requested", False):
            live.task = live.task.model_copy(update={"cancel_requested": True})
            self._cancel(agent)
