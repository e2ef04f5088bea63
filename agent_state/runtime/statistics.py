"""What agents and tasks look like at one time, in figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import datetime

from agent_state.clock import instant, sort_text
from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.metrics import LatencyHistogram, Metric
from agent_state.models import Task, meaning_of
from agent_state.runtime import transitions
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.state import RuntimeState, logger

_COUNT_SECONDS = 60.0
"""Dead letters are counted anew after so long."""
_COUNT_SHARE = 20.0
"""And after so many times the time that counting took."""


class RuntimeStatistics:
    """``runtime.statistics``: figures about the agents that this runtime runs."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state
        self._dead: int | None = None
        self._died = 0
        """How many attempts had ended their tasks as dead when these were counted."""
        self._counted_at = 0.0
        self._took = 0.0
        self._is_counting = False

    @property
    def saves(self) -> LatencyHistogram:
        """How long saves took."""
        return self._state.manager.saves.seconds

    async def metrics(self) -> list[Metric]:
        """Return all figures but the times of saves, which are in ``saves``.

        Dead letters are read from the store, at most once a minute; in between those that died
        since are added. All else is in memory.
        """
        here = [agent for agent in self._state.agents.values() if agent.leased]
        dead = await self._dead_letters()
        return [
            _agents(here),
            *_queues(here, self._state.clock.now()),
            *(() if dead is None else (_dead(dead),)),
            _attempts(self._state.attempts),
            *_storage(self._state.manager),
        ]

    async def _dead_letters(self) -> int | None:
        """Return the number of dead tasks; None while it is not known."""
        died = sum(n for (_, outcome), n in self._state.attempts.items() if outcome == "dead")
        began = time.monotonic()
        fresh = max(_COUNT_SECONDS, _COUNT_SHARE * self._took)
        if self._is_counting or (self._dead is not None and began - self._counted_at < fresh):
            return None if self._dead is None else self._dead + died - self._died
        self._is_counting = True
        try:
            dead = 0
            async for task in _stored_tasks(self._state.manager):
                dead += meaning_of(task.status) == "dead"
        except AgentStateError as error:  # the figures in memory are wanted all the more
            logger.warning("dead tasks could not be counted: %s", error)
            return None
        finally:
            self._is_counting = False
        self._dead, self._died, self._counted_at = dead, died, time.monotonic()
        self._took = self._counted_at - began
        return dead


async def stored_metrics(manager: StatePersistenceManager) -> list[Metric]:
    """Return the figures of a store whose agents no runtime of this process runs.

    Every stored task is read. Raises as ``scan``.
    """
    dead, queues = 0, _Queues()
    async for task in _stored_tasks(manager):
        status = meaning_of(task.status)
        dead += status == "dead"
        queues.running += status == "in_progress"
        if status in transitions.CLAIMABLE:
            queues.add(None, task)
    return [*queues.metrics(manager.clock.now()), _dead(dead), *_storage(manager)]


async def _stored_tasks(manager: StatePersistenceManager) -> AsyncIterator[Task]:
    async for loaded in manager.scan("tasks"):
        if isinstance(loaded.state, Task) and len(loaded.key) == 2:
            yield loaded.state


class _Queues:
    """The tasks that wait and run, by the agent's type; None where no type is known."""

    def __init__(self) -> None:
        self.running = 0
        self._waiting: Counter[str | None] = Counter()
        self._oldest: dict[str | None, str] = {}

    def add(self, agent_type: str | None, task: Task) -> None:
        """Count a task that waits."""
        self._waiting[agent_type] += 1
        due = sort_text(task.not_before or task.created_at)
        # Our times sort as text. There may be many tasks, so that only the oldest one's is read.
        if due[:1].isdigit() and due < self._oldest.setdefault(agent_type, due):
            self._oldest[agent_type] = due

    def metrics(self, now: datetime) -> Iterator[Metric]:
        types = sorted(self._waiting, key=str)
        labels = {name: {} if name is None else {"agent_type": name} for name in types}
        text = "Tasks that wait for an attempt, those for a later time included."
        waiting = [(labels[name], float(self._waiting[name])) for name in types]
        yield Metric("agent_state.tasks.waiting", text, waiting)
        text = "How long the oldest waiting task has been due; 0 while none is due."
        ages = [(labels[name], _seconds_since(self._oldest.get(name, ""), now)) for name in types]
        yield Metric("agent_state.tasks.oldest.age", text, ages, unit="s")
        text = "Tasks that an attempt runs for."
        yield Metric("agent_state.tasks.running", text, [({}, float(self.running))])


def _queues(agents: list[LiveAgent], now: datetime) -> Iterator[Metric]:
    queues = _Queues()
    for agent in agents:
        agent_type = agent.state.agent_type or ""
        queues.running += agent.current is not None
        for live in agent.tasks.values():
            if live.task.status in transitions.CLAIMABLE and live is not agent.current:
                queues.add(agent_type, live.task)
    return queues.metrics(now)


def _agents(agents: list[LiveAgent]) -> Metric:
    status = Counter(agent.status(agent.current) for agent in agents)
    text = "Agents that this runtime runs, by status."
    values = [({"status": word}, float(status[word])) for word in sorted(status)]
    return Metric("agent_state.agents", text, values)


def _dead(count: int) -> Metric:
    text = "Stored tasks that will not be tried again unless somebody requeues them."
    return Metric("agent_state.tasks.dead", text, [({}, float(count))])


def _attempts(attempts: Counter[tuple[str, str]]) -> Metric:
    text = (
        "Attempts that ended, by what became of the task; pending: it slept or the runtime stopped,"
        " lost: another runtime has it, or its end could not be stored."
    )
    values = [
        ({"agent_type": agent_type, "outcome": outcome}, float(count))
        for (agent_type, outcome), count in sorted(attempts.items())
    ]
    return Metric("agent_state.attempts", text, values, "counter")


def _storage(manager: StatePersistenceManager) -> Iterator[Metric]:
    yield manager.saves.metric()
    lag = manager.journal_lag()
    if lag is not None:
        yield from lag.metrics()
    if manager.mirror is not None:
        status = manager.mirror.status()
        text = "Documents and logs that have changed and are not mirrored yet."
        yield Metric("agent_state.mirror.waiting", text, [({}, float(status.waiting))])
        text = "How long the oldest of them has waited."
        yield Metric("agent_state.mirror.lag", text, [({}, status.lag)], unit="s")


def _seconds_since(time: str, now: datetime) -> float:
    try:
        return max(0.0, (now - instant(time)).total_seconds())
    except ValueError:  # a person wrote it
        return 0.0
