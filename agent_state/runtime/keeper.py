"""Looks after agreement: between memory and disk, and with those who write beside us."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agent_state.codec import StoredState
from agent_state.errors import AgentStateError, Key, describe
from agent_state.models import AgentState, SleepState, Task
from agent_state.protocols import Notice
from agent_state.runtime.core import Core, wants_cancel
from agent_state.runtime.live import LiveAgent, LiveTask, own
from agent_state.runtime.post import Bedroom
from agent_state.runtime.restore import give_up, load_agent, take_in
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
        welcome: Callable[[LiveAgent], Awaitable[object]],
        start: Callable[[LiveAgent], None],
        cancel: Callable[[LiveAgent], None],
        finished: Callable[[Task], None],
    ) -> None:
        self._core = core
        self._bedroom = bedroom
        self._welcome = welcome
        self._start = start
        self._cancel = cancel
        self._finished = finished
        self.disagreements: deque[Disagreement] = deque(maxlen=_REMEMBERED)

    async def check(self) -> int:
        """Compare every agent and open task with what is stored, and mend; how many differed.

        An agent that cannot be compared does not keep the others from it; its error is raised
        at the end.
        """
        found = 0
        failed: AgentStateError | None = None
        for agent in list(self._core.agents.values()):
            if not agent.leased:
                continue
            try:
                found += await self._check(agent)
            except AgentStateError as error:
                _logger.warning("agent %s could not be checked: %s", agent.agent_id, error)
                failed = failed or error
            agent.changed.set()
        if failed is not None:
            raise failed
        return found

    async def _check(self, agent: LiveAgent) -> int:
        async with agent.lock:
            found = await self._check_agent(agent)
            for live in list(agent.tasks.values()):
                if live is not agent.current:
                    found += await self._check_task(agent, live)
        for live in list(agent.tasks.values()):
            found += await self._pick_up(agent, live)
        return found

    async def _pick_up(self, agent: LiveAgent, live: LiveTask) -> bool:
        """Queue again a task that says it is in progress, and nobody works on it."""

        def change(task: Task) -> Task | None:
            if live is agent.current or not self._core.is_left(task):
                return None
            return give_up(task, self._core.now(), self._core.retry)

        if live.task.status != "in_progress" or not agent.leased:
            return False
        if not await self._core.save(agent, live=live, change=change):
            return False
        key = (agent.agent_id, live.task.task_id)
        self._note("tasks", key, "in progress, with nobody at work", "queued again")
        if is_finished(live.task):
            self._finished(live.task)
        return True

    async def _check_agent(self, agent: LiveAgent) -> int:
        stored = await self._core.manager.load_with_revision("agents", agent.agent_id)
        body = agent.body()
        theirs = stored.state.model_dump() if stored is not None else {}
        if theirs == body:
            return 0
        busy = agent.current is not None
        if stored is not None and stored.edited and not busy:
            self._adopt(agent, stored.state)
            self._note("agents", (agent.agent_id,), "edited outside", "memory follows the file")
            return 1
        group = self._core.manager.new_group()
        group.save("agents", agent.agent_id, body)
        await self._core.commit(agent, group)
        if busy and stored is not None:
            return 0  # a handler has changed its memory since the last save: what saving is for
        if {**theirs, "status": body["status"]} == body:
            return 0  # a status follows from the rest: a handler has come since, or is gone
        what = "missing on disk" if stored is None else "differs from memory"
        self._note("agents", (agent.agent_id,), what, "saved again from memory")
        return 1

    async def _check_task(self, agent: LiveAgent, live: LiveTask) -> int:
        key = (agent.agent_id, live.task.task_id)
        stored = await self._core.manager.load_with_revision("tasks", key)
        if stored is None:
            live.revision = await self._core.manager.save("tasks", key, live.task)
            self._note("tasks", key, "missing on disk", "saved again from memory")
            return 1
        if isinstance(stored.state, Task):
            own(stored.state, key)
        if stored.revision == live.revision and stored.state.model_dump() == live.task.model_dump():
            return 0
        self._take_task(agent, stored)
        self._note("tasks", key, "changed outside", "memory follows the file")
        return 1

    def _note(self, kind: str, key: Key, what: str, mended: str) -> None:
        self.disagreements.append(Disagreement(kind, key, what, mended))
        _logger.warning("%s: %s; %s", describe(kind, key), what, mended)

    def _adopt(self, agent: LiveAgent, state: object) -> None:
        if isinstance(state, AgentState):
            state.agent_id = agent.agent_id
            agent.state = state
            self._start(agent)  # the edit may have changed its type

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
                if found is not None:
                    await self._welcome(found)
        elif notice.kind == "sleep":
            await self._take_sleep(agent, await core.manager.load_with_revision("sleep", key))
        elif notice.kind == "mail":
            stored = await core.manager.load_with_revision("mail", key)
            if stored is not None:
                take_in(agent, stored)
                await self._bedroom.wake_if_due(agent)
            elif len(key) == 2:
                agent.mail.pop(key[1], None)
        elif notice.kind in ("agents", "tasks"):
            await self._take_state(agent, notice)
        if agent is not None:
            agent.changed.set()

    async def _take_state(self, agent: LiveAgent, notice: Notice) -> None:
        # Under the lock, so that what is read is not older than what is saved meanwhile.
        async with agent.lock:
            stored = await self._core.manager.load_with_revision(notice.kind, notice.key)
            if stored is None:
                return  # removed by hand: the next check brings back what is live
            if isinstance(stored.state, Task):
                self._take_task(agent, stored)
            elif agent.current is None:
                self._adopt(agent, stored.state)
        live = agent.tasks.get(notice.key[-1])
        if live is not None:
            await self._pick_up(agent, live)

    async def _take_sleep(self, agent: LiveAgent, stored: StoredState | None) -> None:
        state = stored.state if stored is not None else None
        if isinstance(state, SleepState) and state.is_sleeping:
            agent.sleep = state
        elif agent.leased:
            await self._bedroom.wake(agent, "manual_wake")
        else:
            agent.sleep = None

    def _take_task(self, agent: LiveAgent, stored: StoredState) -> None:
        live = agent.tasks.get(stored.key[-1])
        if live is None or live is not agent.current:
            take_in(agent, stored)
            if isinstance(stored.state, Task) and is_finished(stored.state):
                self._finished(stored.state)  # by another runtime, or by hand
        elif isinstance(stored.state, Task) and wants_cancel(stored.state):
            live.task = live.task.model_copy(update={"cancel_requested": True})
            self._cancel(agent)
