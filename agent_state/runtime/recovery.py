"""Recovery: load the agents of a store, find what a crash left unfinished, and repair it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Protocol

from agent_state.clock import Clock
from agent_state.codec import StoredState
from agent_state.collection import COLLECTIONS
from agent_state.errors import (
    AgentStateError,
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    describe,
)
from agent_state.legacy import LegacyReport, expand_collection, inline_items
from agent_state.manager import StatePersistenceManager
from agent_state.models import AgentState, SystemState, Task
from agent_state.protocols import Document, Incident
from agent_state.runtime import transitions
from agent_state.runtime.copies import say_elsewhere
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.sleep import add_wake, wake_reason
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.task_queue import LiveTask
from agent_state.runtime.transitions import RetryPolicy

_READ_AT_ONCE = 256
"""How many documents are read at the same time, when one prevents reading all in order."""
_REPORTED = (StateCorruptedError, SchemaTooNewError)
"""Errors of a document that the manager's incidents report; it is not used."""

RUNTIME = "runtime"
"""The system document that records whether the last runtime stopped in good order."""


@dataclass(frozen=True, slots=True)
class RequeuedTask:
    """A task whose process died while it ran."""

    agent_id: str
    task_id: str
    name: str
    attempts: int
    status: str
    """Its status now: ``pending``, ``cancelled`` or ``dead``."""
    unknown_steps: tuple[str, ...] = ()
    """Steps that started and have no stored outcome; they may have had their effect."""


@dataclass(frozen=True, slots=True)
class WokenAgent:
    """A sleeper that was woken at the start, and why: ``time`` or a wake event."""

    agent_id: str
    reason: str


@dataclass(slots=True)
class RestoreReport:
    """The documents that a start restored, requeued, or could not use."""

    after_crash: bool = False
    """The runtime before this one did not stop in good order."""
    agents: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Agents whose type has no handler here; they keep everything and do nothing."""
    held_elsewhere: list[str] = field(default_factory=list)
    """Agents that another live runtime owns."""
    running_elsewhere: dict[str, str] = field(default_factory=dict)
    """Agents of which a copy runs in another worktree or clone of the repository: where."""
    failed: dict[str, str] = field(default_factory=dict)
    """Agents that could not be restored, with the error. The runtime tries them again."""
    requeued: list[RequeuedTask] = field(default_factory=list)
    tasks_pending: int = 0
    """Tasks that will be worked on, the requeued ones included."""
    woken: list[WokenAgent] = field(default_factory=list)
    asleep: list[str] = field(default_factory=list)
    unread_mail: dict[str, int] = field(default_factory=dict)
    """Unread messages by agent, where there are any."""
    edited: list[str] = field(default_factory=list)
    """Documents that a person, or another program, changed; they are used as they are."""
    without_agent: list[str] = field(default_factory=list)
    """Tasks, sleep and mail of agents that do not exist; they are left as they are."""
    legacy: LegacyReport = field(default_factory=LegacyReport)
    """What was brought over from files of this library's ancestors."""
    inline: list[Key] = field(default_factory=list)
    """Queues and mailboxes, as kind and agent, that a person wrote as one document."""
    contained: list[Incident] = field(default_factory=list)
    """Unusable documents, where they were put, and whether an earlier version was restored."""
    seconds: float = 0.0
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Sequence[str]:
        """Return a few lines for a log or a terminal."""
        lines = [
            f"{_count(len(self.agents), 'agent')} restored in {self.seconds:.2f} s"
            + (" after a crash" if self.after_crash else ""),
            f"{_count(self.tasks_pending, 'task')} to do, {len(self.requeued)} of them re-queued",
            (
                f"{_count(sum(self.unread_mail.values()), 'message')} unread, "
                f"{_count(len(self.woken), 'sleeper')} woken, {len(self.asleep)} asleep"
            ),
        ]
        for task in self.requeued:
            if task.unknown_steps:
                steps = ", ".join(task.unknown_steps)
                lines.append(f"{task.agent_id}/{task.task_id}: outcome unknown of {steps}")
        for agent_id, error in self.failed.items():
            lines.append(f"agent {agent_id} is not restored yet: {error}")
        if self.running_elsewhere:
            agents, places = [*self.running_elsewhere], {*self.running_elsewhere.values()}
            lines.append(say_elsewhere(agents, " and ".join(sorted(places))))
        if self.waiting:
            lines.append(f"no handler for {_count(len(self.waiting), 'agent')}; they wait")
        if self.without_agent:
            documents = _count(len(self.without_agent), "document")
            lines.append(f"{documents} without an agent, such as {self.without_agent[0]}")
        lines += self.legacy.lines()
        if self.edited:
            lines.append(f"{_count(len(self.edited), 'document')} changed outside")
        for incident in self.contained:
            where = f" ({incident.path})" if incident.path else ""
            kept = f"; kept at {incident.kept}" if incident.kept else ""
            back = "; an earlier version is back" if incident.restored else ""
            lines.append(f"not usable{where}: {incident.what}{kept}{back}")
        return lines

    def add(self, agent: LiveAgent, repair: AgentRepair) -> None:
        """Add what is restored of one agent."""
        ended = {task.task_id for _, task in repair.tasks if transitions.is_finished(task)}
        self.tasks_pending += len(agent.tasks.keys() - ended)
        for _, task in repair.tasks:
            steps = tuple(transitions.unknown_steps(task))
            requeued = RequeuedTask(
                agent.agent_id, task.task_id, task.name, task.attempts, task.status, steps
            )
            self.requeued.append(requeued)
        if repair.wake is not None:
            self.woken.append(WokenAgent(agent.agent_id, repair.wake))
        elif agent.sleep is not None:
            self.asleep.append(agent.agent_id)
        unread = agent.mail.unread_count
        if unread:
            self.unread_mail[agent.agent_id] = unread


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# -- loading ---------------------------------------------------------------------------------


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause garbage collection.

    Objects that are loaded stay, so that every collection while they grow in number finds
    nothing; for 10,000 agents that took a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class RestoreReader(Protocol):
    """Sees what a start reads, so that it need not read it again."""

    async def begin(self, manager: StatePersistenceManager) -> None:
        """The manager is open, and nothing is read yet."""

    def take(self, document: Document) -> None:
        """A document of an agent, a task, a sleep or mail, as it is stored."""


async def load_all(
    manager: StatePersistenceManager, readers: Sequence[RestoreReader] = ()
) -> tuple[dict[str, LiveAgent], RestoreReport]:
    """Read all agents with their open tasks, sleep and mail. Changes nothing.

    Returns the agents by id, and a report of what the documents show. Memory is bounded by what
    is live: finished tasks are read and dropped. A document that cannot be read now is in
    ``failed`` of the report, under its agent. ``readers`` may be given less than all.
    """
    agents: dict[str, LiveAgent] = {}
    report = RestoreReport()
    last = await manager.load("system", RUNTIME)
    if isinstance(last, SystemState):
        report.after_crash = (last.model_extra or {}).get("status") == "running"
    for kind in ("agents", "tasks", "sleep", "mail"):
        async for loaded in _scan(manager, kind, report.failed, readers):
            if loaded.edited:
                report.edited.append(describe(kind, loaded.key))
                if len(loaded.key) == 1 and kind in COLLECTIONS:
                    body = loaded.state.model_dump()
                    if any(True for _ in inline_items(COLLECTIONS[kind], body)):
                        report.inline.append((kind, loaded.key[0]))
            agent_id = loaded.key[0]
            if kind == "agents":
                if isinstance(loaded.state, AgentState) and len(loaded.key) == 1:
                    status = None if loaded.edited else loaded.state.status
                    agents[agent_id] = LiveAgent(agent_id, loaded.state, edited=loaded.edited)
                    agents[agent_id].stored_status = status
            elif agent_id in agents:
                agents[agent_id].apply_loaded(loaded)
            else:
                report.without_agent.append(describe(kind, loaded.key))
    report.agents = sorted(agents)
    return agents, report


async def _scan(
    manager: StatePersistenceManager,
    kind: str,
    failed: dict[str, str],
    readers: Sequence[RestoreReader],
) -> AsyncIterator[StoredState]:
    """Every usable state of a kind. An error of one is in ``failed``, under its agent."""

    def show(document: Document) -> bool:
        for reader in readers:
            reader.take(document)
        return True

    seen = set()
    try:
        async for loaded in manager.scan(kind, where=show):
            seen.add(loaded.key)
            yield loaded
    except AgentStateError as error:
        logger.warning("%s are read one by one: %s", kind, error)
    else:
        return
    keys = [key for key in await manager.keys(kind) if key not in seen]
    for start in range(0, len(keys), _READ_AT_ONCE):
        some = keys[start : start + _READ_AT_ONCE]
        reads = [manager.load_with_revision(kind, key) for key in some]
        for key, read in zip(
            some, await asyncio.gather(*reads, return_exceptions=True), strict=True
        ):
            if isinstance(read, StoredState):
                yield read
            elif isinstance(read, BaseException) and not isinstance(read, _REPORTED):
                if not isinstance(read, AgentStateError):
                    raise read
                failed[key[0]] = str(read)


async def expand_inline(
    manager: StatePersistenceManager, agents: Mapping[str, LiveAgent], report: RestoreReport
) -> None:
    """Store the items of the ``inline`` collections as documents, and give them to the agents."""
    for kind, agent_id in report.inline:
        try:
            await expand_collection(manager, kind, agent_id)
            if agent_id in agents:
                async for found in manager.scan(kind, agent_id):
                    agents[agent_id].apply_loaded(found)
        except AgentStateError as error:
            report.failed[agent_id] = str(error)


async def load_agent(manager: StatePersistenceManager, agent_id: str) -> LiveAgent | None:
    """Read one agent with its tasks, sleep and mail; None when it does not exist."""
    loaded = await manager.load_with_revision("agents", agent_id)
    if loaded is None or not isinstance(loaded.state, AgentState):
        return None
    agent = LiveAgent(agent_id, loaded.state, edited=loaded.edited)
    await reload_agent(manager, agent)
    return agent


async def reload_agent(manager: StatePersistenceManager, agent: LiveAgent) -> None:
    """Replace an agent in memory by what is stored now; what arrives while this reads is kept."""
    known = dict(agent.tasks)
    agent.unconfirmed = None  # what was stored of it is read now
    loaded = await manager.load_with_revision("agents", agent.agent_id)
    if loaded is not None and isinstance(loaded.state, AgentState):
        agent.adopt(loaded.state, edited=loaded.edited)
        agent.stored_status = None if loaded.edited else agent.state.status
    async for found in manager.scan("tasks", agent.agent_id):
        known.pop(found.key[-1], None)
        live = agent.tasks.get(found.key[-1])
        if live is None or live.revision <= found.revision:
            agent.apply_loaded(found)
    for task_id, live in known.items():
        if agent.tasks.get(task_id) is live:
            del agent.tasks[task_id]
    async for found in manager.scan("mail", agent.agent_id):
        agent.apply_loaded(found)
    sleep = await manager.load_with_revision("sleep", agent.agent_id)
    agent.sleep = None
    if sleep is not None:
        agent.apply_loaded(sleep)


# -- repair ----------------------------------------------------------------------------------


@dataclass(slots=True)
class AgentRepair:
    """The changes that one agent needs to continue."""

    tasks: list[tuple[LiveTask, Task]] = field(default_factory=list)
    """Each abandoned task, with its new state."""
    wake: str | None = None
    """Why a sleeper must wake; None when it need not."""
    status: bool = False
    """Whether the stored status is outdated."""

    @property
    def needed(self) -> bool:
        return bool(self.tasks or self.wake or self.status)


def plan_repair(agent: LiveAgent, now: datetime, policy: RetryPolicy) -> AgentRepair:
    """Requeue the tasks whose process died, and wake a sleeper that is due."""
    repair = AgentRepair(wake=wake_reason(agent, now), status=agent.state.status == "active")
    for live in agent.tasks.values():
        if live.task.status == "in_progress":
            repair.tasks.append((live, transitions.requeue(live.task, now, policy)))
    return repair


async def apply_repair(state: RuntimeState, agent: LiveAgent, repair: AgentRepair) -> None:
    """Store an agent's repair as one group, then change the agent in memory."""
    if not repair.needed:
        return
    group = state.manager.new_group()
    for live, task in repair.tasks:
        key = (agent.agent_id, task.task_id)
        group.save("tasks", key, task, expected=live.revision)
    if repair.wake is not None:
        add_wake(group, agent, repair.wake)
    else:
        group.save("agents", agent.agent_id, agent.body(), append_only=True)
    revisions = await state.commit(group, agent)
    for (live, task), revision in zip(repair.tasks, revisions, strict=False):
        agent.put(live, task, revision)
        state.note_requeued(task)
    if repair.wake is not None:
        agent.sleep = None
        agent.state.metadata["woken_by"] = repair.wake
    agent.stored_status = None
    agent.state.status = agent.status(None)


async def plan_restore(
    manager: StatePersistenceManager,
    *,
    clock: Clock,
    policy: RetryPolicy | None = None,
    handlers: Collection[str] | None = None,
) -> RestoreReport:
    """Return what a start would restore now. Changes nothing if the manager's store cannot.

    ``handlers``: the agent types that have one; None when that is not known.
    """
    began = clock.monotonic()
    agents, report = await load_all(manager)
    for agent_id in report.agents:
        agent = agents[agent_id]
        agent.has_handler = handlers is None or agent.state.agent_type in handlers
        if not agent.has_handler:
            report.waiting.append(agent_id)
        report.add(agent, plan_repair(agent, clock.now(), policy or RetryPolicy()))
    report.contained = manager.incidents()
    report.seconds = clock.monotonic() - began
    return report
