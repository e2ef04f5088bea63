"""From the directory to live agents: load, see what a crash left, put it right."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from agent_state import tasks as rules
from agent_state.clock import Clock
from agent_state.codec import StoredState
from agent_state.errors import describe
from agent_state.manager import StatePersistenceManager
from agent_state.models import AgentState, MailMessage, SleepState, SystemState, Task
from agent_state.runtime.core import Core
from agent_state.runtime.live import LiveAgent, LiveTask, own
from agent_state.runtime.post import stage_wake, wake_reason
from agent_state.runtime.report import Requeued, RestoreReport, Woken
from agent_state.tasks import RetryPolicy

RUNTIME = "runtime"
"""The system document that says whether the last runtime ended in good order."""


@dataclass(slots=True)
class Restored:
    """Everything live, loaded and not yet changed."""

    agents: dict[str, LiveAgent] = field(default_factory=dict)
    report: RestoreReport = field(default_factory=RestoreReport)


@contextmanager
def collecting_later() -> Iterator[None]:
    """No garbage collection meanwhile.

    What is loaded stays, so that looking through it again and again while it grows finds nothing;
    for 10,000 agents that took a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


async def load_all(manager: StatePersistenceManager) -> Restored:
    """Read all agents with their open tasks, sleep and mail. Changes nothing.

    Memory is bounded by what is live: finished tasks are looked at and let go of.
    """
    restored = Restored()
    report = restored.report
    last = await manager.load("system", RUNTIME)
    report.after_crash = isinstance(last, SystemState) and _status(last) == "running"
    async for loaded in manager.scan("agents"):
        if isinstance(loaded.state, AgentState) and len(loaded.key) == 1:
            agent = LiveAgent(loaded.state)
            # The key is what everything else of the agent is filed under.
            agent.state.agent_id = loaded.key[0]
            restored.agents[loaded.key[0]] = agent
        _note_edit(report, "agents", loaded)
    for kind in ("tasks", "sleep", "mail"):
        async for loaded in manager.scan(kind):
            owner = restored.agents.get(loaded.key[0])
            _note_edit(report, kind, loaded)
            if owner is None:
                report.without_agent.append(describe(kind, loaded.key))
            else:
                take_in(owner, loaded)
    report.agents = sorted(restored.agents)
    return restored


async def load_agent(manager: StatePersistenceManager, agent_id: str) -> LiveAgent | None:
    """One agent with all that is its; None when there is none."""
    loaded = await manager.load_with_revision("agents", agent_id)
    if loaded is None or not isinstance(loaded.state, AgentState):
        return None
    agent = LiveAgent(loaded.state)
    agent.state.agent_id = agent_id
    await read_again(manager, agent)
    return agent


async def read_again(manager: StatePersistenceManager, agent: LiveAgent) -> None:
    """Fill an agent with what is stored of it now; what comes while this reads stays."""
    known = dict(agent.tasks)
    loaded = await manager.load_with_revision("agents", agent.agent_id)
    if loaded is not None and isinstance(loaded.state, AgentState):
        loaded.state.agent_id = agent.agent_id
        agent.state = loaded.state
    async for found in manager.scan("tasks", agent.agent_id):
        known.pop(found.key[-1], None)
        live = agent.tasks.get(found.key[-1])
        if live is None or live.revision <= found.revision:
            take_in(agent, found)
    for task_id, live in known.items():
        if agent.tasks.get(task_id) is live:
            del agent.tasks[task_id]
    async for found in manager.scan("mail", agent.agent_id):
        take_in(agent, found)
    sleep = await manager.load_with_revision("sleep", agent.agent_id)
    agent.sleep = None
    if sleep is not None:
        take_in(agent, sleep)


def take_in(agent: LiveAgent, loaded: StoredState) -> None:
    """Give an agent one of its documents; what is not our runtime's is left alone."""
    state = loaded.state
    if isinstance(state, Task) and len(loaded.key) == 2:
        live = agent.tasks.get(loaded.key[1]) or LiveTask(state, loaded.revision)
        agent.put(live, own(state, loaded.key), loaded.revision)
    elif isinstance(state, MailMessage) and len(loaded.key) == 2:
        # As with tasks: a copied file is a message of its own.
        state.to_agent, state.message_id = loaded.key
        agent.mail[loaded.key[1]] = state
    elif isinstance(state, SleepState):
        agent.sleep = state if state.is_sleeping else None


@dataclass(slots=True)
class Repair:
    """What must change for one agent to go on."""

    tasks: list[tuple[LiveTask, Task]] = field(default_factory=list)
    wake: str | None = None
    status: bool = False

    @property
    def needed(self) -> bool:
        return bool(self.tasks or self.wake or self.status)


def plan_agent(agent: LiveAgent, now: datetime, policy: RetryPolicy) -> Repair:
    """Tasks whose process died go back to the queue; sleepers that are due wake."""
    repair = Repair()
    for live in agent.tasks.values():
        if live.task.status == "in_progress":
            repair.tasks.append((live, give_up(live.task, now, policy)))
    repair.wake = wake_reason(agent, now)
    repair.status = agent.state.status == "active"
    return repair


def give_up(task: Task, now: datetime, policy: RetryPolicy) -> Task:
    """What becomes of a task in progress that nobody works on any more."""
    if task.cancel_requested:
        return rules.cancel(task, now)
    return rules.interrupt(task, now, policy)


async def apply_agent(core: Core, agent: LiveAgent, repair: Repair) -> None:
    """Store an agent's repair as one group, then live by it."""
    if not repair.needed:
        return
    group = core.manager.new_group()
    for live, task in repair.tasks:
        key = (agent.agent_id, task.task_id)
        group.save("tasks", key, task, expected=live.revision)
    if repair.wake is not None:
        stage_wake(group, agent, repair.wake)
    else:
        group.save("agents", agent.agent_id, agent.body())
    numbers = await core.commit(agent, group)
    for (live, task), number in zip(repair.tasks, numbers, strict=False):
        agent.put(live, task, number)
    if repair.wake is not None:
        agent.sleep = None
        agent.state.metadata["woken_by"] = repair.wake
    agent.state.status = agent.status(None)


def tell(report: RestoreReport, agent: LiveAgent, repair: Repair) -> None:
    """Add one agent's repair to the report."""
    for _, task in repair.tasks:
        steps = tuple(rules.unknown_steps(task))
        report.requeued.append(
            Requeued(agent.agent_id, task.task_id, task.name, task.attempts, task.status, steps)
        )
    done = {task.task_id for _, task in repair.tasks if rules.is_finished(task)}
    report.tasks_pending += len(agent.tasks.keys() - done)
    if repair.wake is not None:
        report.woken.append(Woken(agent.agent_id, repair.wake))
    elif agent.sleep is not None:
        report.asleep.append(agent.agent_id)
    unread = sum(1 for _ in agent.unread())
    if unread:
        report.unread_mail[agent.agent_id] = unread


async def plan_restore(
    manager: StatePersistenceManager,
    *,
    clock: Clock,
    policy: RetryPolicy | None = None,
    handlers: Collection[str] | None = None,
) -> RestoreReport:
    """What a start would restore now; changes nothing when the manager's store cannot.

    ``handlers``: the agent types there are; None when that is not known.
    """
    began = clock.monotonic()
    restored = await load_all(manager)
    report = restored.report
    for agent_id in report.agents:
        agent = restored.agents[agent_id]
        agent.has_handler = handlers is None or agent.state.agent_type in handlers
        if not agent.has_handler:
            report.waiting.append(agent_id)
        tell(report, agent, plan_agent(agent, clock.now(), policy or RetryPolicy()))
    report.contained = manager.incidents()
    report.seconds = clock.monotonic() - began
    return report


def _status(state: SystemState) -> object:
    return (state.model_extra or {}).get("status")


def _note_edit(report: RestoreReport, kind: str, loaded: StoredState) -> None:
    if loaded.edited:
        report.edited.append(describe(kind, loaded.key))
