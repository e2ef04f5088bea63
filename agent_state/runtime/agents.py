"""The agents of one runtime: create, stop, wake, and bring them from the store and back."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from agent_state.clock import stamp
from agent_state.errors import (
    AgentStateError,
    LeaseLostError,
    RevisionConflictError,
    StateValidationError,
)
from agent_state.legacy import LegacyReport, import_legacy
from agent_state.models import AgentState, AgentStatus, SleepState, WakeEvent, copied, plain_copy
from agent_state.protocols import Notice
from agent_state.runtime.copies import AgentCopies
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.ownership import RUNTIMES, AgentOwnership
from agent_state.runtime.recovery import (
    AgentRepair,
    RestoreReader,
    RestoreReport,
    apply_repair,
    expand_inline,
    garbage_collection_paused,
    load_agent,
    load_all,
    plan_repair,
    reload_agent,
)
from agent_state.runtime.runner import Runner
from agent_state.runtime.sleep import SleepService
from agent_state.runtime.state import OWNERS, RuntimeState, logger
from agent_state.runtime.waiters import TaskWaiters

T = TypeVar("T")

_MAX_CONCURRENT = 256
"""How many agents are saved or repaired at the same time."""


class AgentService:
    """``runtime.agents``: the agents of this runtime.

    ``ownership`` is None where one process owns the store.
    """

    def __init__(
        self,
        state: RuntimeState,
        sleep: SleepService,
        runner: Runner,
        waiters: TaskWaiters,
        *,
        ownership: AgentOwnership | None,
        copies: AgentCopies,
    ) -> None:
        self._state = state
        self._sleep = sleep
        self._runner = runner
        self._waiters = waiters
        self._ownership = ownership
        self._copies = copies
        self.on_obtained: Callable[[str], None] = lambda _: None
        """Called with the id of each agent that is run here from now on, or by another runtime."""
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start; what is bound to an event loop is made here."""
        self.started = False
        """Whether the runtime has started, so that an agent's loop may run."""
        self.failed: dict[str, str] = {}
        """The agents that could not be restored, with the error; they are tried again."""
        self._taking: dict[str, asyncio.Task[None]] = {}
        self._obtaining: set[str] = set()
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)
        self.before_start = asyncio.Lock()
        """Held while the store is open for an agent that is created before the start."""

    async def create(
        self,
        agent_id: str,
        *,
        agent_type: str,
        name: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        tool_sets: Sequence[Any] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> AgentState:
        """Create an agent and run it; one that exists is left as it is and returned.

        So the same start-up code serves the first start and every restart. ``name`` is the
        agent's id if None. While the runtime does not run, the agent is stored, and runs from the
        next start on. Raises ``StateValidationError`` when the existing agent has another type,
        ``RuntimeNotStartedError`` once the runtime was aborted.
        """
        self._state.check_not_aborted()
        new = AgentState(
            agent_id=agent_id,
            agent_name=name or agent_id,
            agent_type=agent_type,
            status="idle" if self._runner.can_run(agent_type) else "waiting",
            created_at=stamp(self._state.clock.now()),
            configuration=plain_copy(dict(configuration or {})),
        )
        if system_prompt is not None:
            new.context.system_prompt = system_prompt
        if tool_sets:
            new.tool_sets = plain_copy([*tool_sets])
        if metadata:
            new.metadata = plain_copy(dict(metadata))
        if not self._state.running:
            async with self.before_start:
                if not self._state.running:
                    async with self._state.manager:
                        return await self._create(new, agent_id, agent_type)
        return await self._create(new, agent_id, agent_type)

    async def _create(self, new: AgentState, agent_id: str, agent_type: str) -> AgentState:
        agent = await self._find(agent_id)
        if agent is None:
            agent = await self._store_new(new)
        if self._state.running and not self._runner.can_run(agent.state.agent_type):
            why = self._runner.handlers.missing(agent.state.agent_type)
            logger.warning("agent %s waits: %s", agent_id, why)
        if agent.state.agent_type != agent_type:
            raise StateValidationError(
                f"the agent exists, with type {agent.state.agent_type!r}",
                kind="agents",
                key=agent_id,
            )
        return copied(agent.state)

    async def _find(self, agent_id: str) -> LiveAgent | None:
        """Return the agent, live, if it exists."""
        agent = self._state.agents.get(agent_id)
        if agent is None:
            agent = await load_agent(self._state.manager, agent_id)
            if agent is not None and self._state.running:
                agent = await self.admit(agent)
        return agent

    async def _store_new(self, created: AgentState) -> LiveAgent:
        """Store a new agent and run it; if another caller was quicker, return that one's."""
        agent_id = created.agent_id
        try:
            await self._state.manager.save("agents", agent_id, created, expected=0)
        except RevisionConflictError:
            agent = await self._find(agent_id)
            if agent is None:
                raise
            return agent
        agent = LiveAgent(agent_id, created)
        agent.stored_status = created.status
        return await self.admit(agent) if self._state.running else agent

    async def stop(self, agent_id: str) -> None:
        """Let the agent finish its task and begin no other. Its state, tasks and mail stay.

        Raises ``StateNotFoundError``.
        """
        await self._set_status(self._state.agent(agent_id), "stopped")

    async def start(self, agent_id: str) -> None:
        """Let a stopped agent work again. Raises ``StateNotFoundError``."""
        agent = self._state.agent(agent_id)
        if agent.state.status == "stopped":
            await self._set_status(agent, "idle")

    async def _set_status(self, agent: LiveAgent, status: AgentStatus) -> None:
        before, agent.state.status = agent.state.status, status
        try:
            if agent.leased:
                await self._state.save(agent)
            else:  # the runtime that holds the agent notices the change
                async with self._state.manager.edit("agents", agent.agent_id) as stored:
                    stored.status = status
        except BaseException as error:
            # The change of a cancelled caller may have been made all the same.
            if not (isinstance(error, asyncio.CancelledError) and agent.leased):
                agent.state.status = before
            raise
        finally:
            agent.changed.set()

    def get(self, agent_id: str) -> AgentState:
        """Return a copy of the agent as it is now. Raises ``StateNotFoundError``."""
        agent = self._state.agent(agent_id)
        copy = copied(agent.state)
        copy.status = agent.status(agent.current)
        return copy

    def list(self) -> builtins.list[str]:
        """Return the ids of this runtime's agents, sorted."""
        return sorted(self._state.agents)

    async def sleep(
        self,
        agent_id: str,
        *,
        seconds: float | None = None,
        until: datetime | None = None,
        wake_on: Sequence[WakeEvent] = (),
        reason: str | None = None,
    ) -> SleepState:
        """Let the agent begin no task until the time, a wake event, or ``wake``.

        Give ``seconds`` or ``until`` (with a zone), or neither. ``wake_on``: ``mail_received``,
        ``high_priority_mail`` (urgent counts), ``system_event``, ``manual_wake``. Mail that was
        unread before does not wake it. Raises ``StateNotFoundError`` and
        ``StateValidationError``.
        """
        return await self._sleep.sleep(
            self._state.agent(agent_id),
            seconds=seconds,
            until=until,
            wake_on=wake_on,
            reason=reason,
        )

    async def wake(self, agent_id: str) -> bool:
        """End the agent's sleep, whatever it waits for; return whether it slept.

        Raises ``StateNotFoundError``.
        """
        return await self._sleep.wake(self._state.agent(agent_id), "manual_wake")

    # -- from the store and back -------------------------------------------------------------

    async def admit(self, agent: LiveAgent, *, retry: bool = False) -> LiveAgent:
        """Add a stored agent and run it; if it was added before, return that one.

        Raises when it cannot be restored, and forgets it. ``retry``: it is tried again later.
        """
        known = self._state.agents.setdefault(agent.agent_id, agent)
        if known is not agent:
            return known
        # From here on mail and tasks reach it; what came before is read now.
        agent.leased = False
        try:
            await self._obtain(agent)
        except BaseException as error:
            if retry and isinstance(error, AgentStateError):
                self._note_failure(agent.agent_id, error)
            else:
                self._state.agents.pop(agent.agent_id, None)
            raise
        return agent

    async def _obtain(self, agent: LiveAgent, *, read: bool = True) -> AgentRepair | None:
        """Own the agent, repair it, and run it; None when it runs elsewhere.

        ``read``: from the store, as other writers could change it until now.
        """
        self._obtaining.add(agent.agent_id)
        try:
            await self._copies.take([agent])
            if agent.elsewhere is not None or (
                self._ownership is not None and not await self._ownership.take(agent)
            ):
                repair = None
                await reload_agent(self._state.manager, agent)
                agent.has_handler = self._runner.can_run(agent.state.agent_type)
                self.failed.pop(agent.agent_id, None)
            else:
                if agent.loop is not None:
                    await cancel_and_wait([agent.loop])
                repair = await self._restore(agent, read=read)
        finally:
            self._obtaining.discard(agent.agent_id)
        if self.started:
            await self._waiters.refresh()
            self._runner.start(agent)
            self.on_obtained(agent.agent_id)
        return repair

    async def _restore(self, agent: LiveAgent, *, read: bool) -> AgentRepair:
        """Repair an agent that this runtime owns."""
        async with agent.lock:
            if read:
                # Before it is read: what is read then is what the merge was resolved to.
                await self._state.manager.check_merged("agents", agent.agent_id, reads=True)
                await reload_agent(self._state.manager, agent)
            agent.has_handler = self._runner.can_run(agent.state.agent_type)
            repair = plan_repair(agent, self._state.clock.now(), self._state.retry)
            agent.leased = True
            try:
                await apply_repair(self._state, agent, repair)
            except BaseException:
                agent.leased = False
                raise
        agent.touched = False
        self.failed.pop(agent.agent_id, None)
        return repair

    def _note_failure(self, agent_id: str, error: Exception | str) -> None:
        """Report, once, an agent that cannot be restored now; it is tried again."""
        text = str(error)
        if self.failed.get(agent_id) != text:
            unforeseen = None if isinstance(error, AgentStateError | str) else error
            logger.error("agent %s is not restored: %s", agent_id, text, exc_info=unforeseen)
        self.failed[agent_id] = text

    async def restore(self, agent_id: str) -> bool:
        """Load an agent and run it; False when it does not exist, or is live already."""
        self._state.check_not_aborted()
        if agent_id in self._state.agents:
            return False
        agent = await load_agent(self._state.manager, agent_id)
        return agent is not None and await self.admit(agent) is agent

    async def replace(self, agent_id: str, write: Callable[[], Awaitable[T]]) -> T:
        """Let ``write`` put other documents of an agent in the place of the stored ones.

        An attempt that runs is stopped, and stores nothing more; its task is queued again. The
        agent is loaded anew, whatever ``write`` raises, and so is one that was not there before.
        """
        self._state.check_not_aborted()
        agent = self._state.agents.get(agent_id)
        if agent is None:
            outcome = await write()
            await self.restore(agent_id)
            return outcome
        self._obtaining.add(agent_id)
        try:
            async with agent.lock:
                self._state.lose(agent, "is loaded anew: its documents are replaced")
                return await write()
        finally:
            await self._obtain(agent)

    async def _bring_over(self) -> LegacyReport:
        """Bring over what an ancestor has left in the directory, at the first start."""
        manager = self._state.manager
        if self.started or manager.state_dir is None:
            return LegacyReport()
        return await import_legacy(manager, manager.state_dir)

    async def restore_all(self, readers: Sequence[RestoreReader] = ()) -> RestoreReport:
        """Load and repair every agent that is not live yet, and run it once started.

        One that cannot be restored is in ``failed`` of the report, and is tried again later.
        ``readers`` see what is read.
        """
        state = self._state
        state.check_not_aborted()
        began = state.clock.monotonic()
        with garbage_collection_paused():
            legacy = await self._bring_over()
            agents, report = await load_all(state.manager, readers)
            report.legacy = legacy
            await expand_inline(state.manager, agents, report)
        repairs: dict[str, AgentRepair | Exception | None] = {}
        calls = []
        await self._copies.take(agents[name] for name in report.agents if name not in state.agents)
        for agent_id in report.agents:
            agent = agents[agent_id]
            known = state.agents.setdefault(agent_id, agent)
            if known is not agent and agent_id not in self.failed:
                continue
            if agent_id in report.failed:
                known.leased = False
                continue
            if self._needs_nothing(known, repairs):
                continue
            known.leased = False
            calls.append(partial(self._restore_for_report, known, repairs))
        try:
            await _gather_bounded(calls)
        except BaseException:
            for agent_id in agents:
                if agent_id not in repairs:
                    state.agents.pop(agent_id, None)
            raise
        for agent_id, text in report.failed.items():
            self._note_failure(agent_id, text)
        for agent_id, outcome in sorted(repairs.items()):
            self._add_to_report(report, state.agents[agent_id], outcome)
        if self._ownership is not None:
            # Another runtime may be running; the heartbeats show whether one has died.
            report.after_crash = self._ownership.inherited
            await self._ownership.remove_expired()
        report.after_crash = report.after_crash and not self.started
        report.contained = state.manager.incidents()
        report.seconds = state.clock.monotonic() - began
        return report

    def _needs_nothing(
        self, agent: LiveAgent, repairs: dict[str, AgentRepair | Exception | None]
    ) -> bool:
        """Whether an agent runs elsewhere, or runs here as it is; it is in ``repairs`` then."""
        agent.has_handler = self._runner.can_run(agent.state.agent_type)
        if agent.elsewhere is not None:
            agent.leased, repairs[agent.agent_id] = False, None
            return True
        if self._ownership is None and not self.started:
            # Nobody else writes. Most agents need no repair, and then nothing is awaited.
            repair = plan_repair(agent, self._state.clock.now(), self._state.retry)
            if not repair.needed:
                agent.touched = False
                repairs[agent.agent_id] = repair
                return True
        return False

    async def _restore_for_report(
        self, agent: LiveAgent, repairs: dict[str, AgentRepair | Exception | None]
    ) -> None:
        """Restore one of many agents; an error of one does not concern the others."""
        agent_id = agent.agent_id
        try:
            read = self._ownership is not None or self.started
            repairs[agent_id] = await self._obtain(agent, read=read)
        except Exception as error:  # noqa: BLE001  # whatever it is, the others run
            self._note_failure(agent_id, error)
            repairs[agent_id] = error

    def _add_to_report(
        self, report: RestoreReport, agent: LiveAgent, outcome: AgentRepair | Exception | None
    ) -> None:
        if isinstance(outcome, Exception):
            report.failed[agent.agent_id] = str(outcome)
            return
        if not agent.has_handler:
            report.waiting.append(agent.agent_id)
        if agent.elsewhere is not None:
            report.running_elsewhere[agent.agent_id] = agent.elsewhere
        elif outcome is None:
            report.held_elsewhere.append(agent.agent_id)
        else:
            report.add(agent, outcome)

    # -- owning agents, where several runtimes may -------------------------------------------

    async def keep_heartbeat(self, ownership: AgentOwnership) -> None:
        """Renew the heartbeat, until cancelled.

        While the store refuses for longer than the heartbeat is valid, no agent is run. After
        this process stood still, the agents that nobody took are still its own.
        """
        refused = ""
        while True:
            await ownership.wait_for_renewal()
            overslept = not ownership.is_valid
            try:
                await ownership.renew_in_time()
                refused = ""
            except AgentStateError as error:
                if refused != str(error):  # it is tried often
                    logger.warning("the heartbeat of this runtime was not renewed: %s", error)
                refused = str(error)
            if not ownership.is_valid:
                for agent in list(self._state.agents.values()):
                    if agent.leased:
                        self._state.lose(agent, "is not run: the heartbeat has expired")
            elif overslept:
                await self.confirm_all()
                ownership.inquire()

    async def confirm_all(self) -> None:
        """Stop running the agents that another runtime has taken."""
        ownership = self._ownership
        if ownership is None:
            return
        held = [agent for agent in self._state.agents.values() if agent.leased]
        await _gather_bounded([partial(self._confirm, ownership, agent) for agent in held])

    async def _confirm(self, ownership: AgentOwnership, agent: LiveAgent) -> None:
        fence = agent.fence
        try:
            owned = await ownership.confirm(agent)
        except AgentStateError as error:  # each of its commits finds out
            logger.warning("the owner of agent %s cannot be read: %s", agent.agent_id, error)
            return
        if not owned and agent.leased and agent.fence is fence:
            self._state.lose(agent, "belongs to another runtime now")
            ownership.inquire()

    async def take_over(self, ownership: AgentOwnership) -> None:
        """Take the agents that no live runtime owns, round after round, until cancelled."""
        while True:
            await ownership.next_round()
            await self.take_free()

    async def take_free(self) -> None:
        """Begin to take every agent that nobody runs. One that is stuck delays no other."""
        free = [agent for agent in self._state.agents.values() if not agent.leased]
        await self._copies.take(agent for agent in free if agent.elsewhere is not None)
        free = [agent for agent in free if agent.elsewhere is None]
        if self._ownership is not None:
            if not self._ownership.is_valid:  # others would take them at once
                self._ownership.forget_dead(free)
                return
            await self._ownership.look(free)
        wanted = [agent.agent_id for agent in free if agent.owner is None and not agent.leased]
        wanted += [agent_id for agent_id in self.failed if agent_id not in self._state.agents]
        for agent_id in wanted:
            if agent_id not in self._taking and agent_id not in self._obtaining:
                self._taking[agent_id] = asyncio.create_task(
                    self._try_to_take(agent_id), name=f"taking agent {agent_id}"
                )

    async def _try_to_take(self, agent_id: str) -> None:
        try:
            async with self._slots:
                agent = self._state.agents.get(agent_id)
                if agent is None:
                    await self.restore(agent_id)
                    self.failed.pop(agent_id, None)
                elif not agent.leased and agent_id not in self._obtaining:
                    await self._obtain(agent)
        except Exception as error:  # noqa: BLE001  # it is tried again in the next round
            self._note_failure(agent_id, error)
        finally:
            self._taking.pop(agent_id, None)
            self._state.activity.set()

    async def owner_changed(self, notice: Notice) -> None:
        """Apply what another runtime wrote about itself, or about the owner of an agent."""
        if self._ownership is None or len(notice.key) != 2:
            return
        section, name = notice.key
        agent = self._state.agents.get(name) if section == OWNERS else None
        if agent is not None and agent.leased:
            await self._confirm(self._ownership, agent)
        if section == RUNTIMES and notice.revision is None:
            self._ownership.inquire()

    async def end_taking(self) -> None:
        """Stop taking agents."""
        await cancel_and_wait([*self._taking.values()])

    async def save_all(self, *, changed_only: bool = False) -> int:
        """Save every agent that this runtime holds; return how many.

        ``changed_only``: without those that are stored as they are.
        One that cannot be saved does not prevent saving the others; the first error is raised
        at the end.
        """
        self._state.check_not_aborted()
        held = [
            agent
            for agent in self._state.agents.values()
            if agent.leased and not (changed_only and agent.is_stored)
        ]
        stored = {key[0] for key in await self._state.manager.keys("agents")} if held else set()
        failed: list[AgentStateError] = []

        async def save(agent: LiveAgent) -> None:
            try:
                async with agent.lock:
                    body = agent.body()
                    if agent.is_as_written(body):
                        return
                    if agent.agent_id not in stored and await self._is_removed(agent):
                        return  # a checkout has taken it away a moment ago
                    group = self._state.manager.new_group()
                    group.save("agents", agent.agent_id, body, append_only=True)
                    await self._state.commit(group, agent)
            except LeaseLostError as error:
                logger.warning("%s", error)  # the runtime that holds the agent saves it
            except AgentStateError as error:
                logger.error("agent %s could not be saved: %s", agent.agent_id, error)
                failed.append(error)

        await _gather_bounded([partial(save, agent) for agent in held])
        if failed:
            raise failed[0]
        return len(held)

    async def _is_removed(self, agent: LiveAgent) -> bool:
        return await self._state.manager.is_removed("agents", agent.agent_id)

    async def remove_archived(self, agent_ids: Iterable[str], mail: Iterable[str]) -> None:
        """Remove from memory what cleaning up has moved to the archive.

        ``mail`` holds messages as ``agent/id``.
        """
        manager, moved = self._state.manager, set(mail)
        for agent in list(self._state.agents.values()):
            for message_id in list(agent.mail):
                # An id may hold a slash, so that two messages can have the same name in a report.
                key = (agent.agent_id, message_id)
                if "/".join(key) in moved and await manager.load_with_revision("mail", key) is None:
                    agent.mail.pop(message_id, None)
        for agent_id in agent_ids:
            gone = self._state.agents.pop(agent_id, None)
            if gone is None:
                continue
            if gone.loop is not None:
                await cancel_and_wait([gone.loop])
            await self._copies.drop([gone])
            if self._ownership is not None:
                await self._ownership.release(gone)


async def cancel_and_wait(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel asyncio tasks and wait for their ends; an error of one is logged."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.error("a part of the runtime had failed: %r", outcome)


async def _gather_bounded(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run many calls concurrently, some hundreds at a time; the store commits them in batches.

    Raises the first error, once every call that was started has ended.
    """
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:
            await call()

    workers = [work() for _ in range(min(len(calls), _MAX_CONCURRENT))]
    for outcome in await asyncio.gather(*workers, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
