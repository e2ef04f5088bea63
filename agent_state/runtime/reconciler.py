"""Reconciles agents in memory with the store, and with what other processes write there."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from agent_state.codec import StoredState
from agent_state.collection import COLLECTIONS
from agent_state.errors import (
    AgentStateError,
    Key,
    LeaseLostError,
    LockTimeoutError,
    StorageError,
    describe,
)
from agent_state.legacy import expand_collection
from agent_state.manager import StatePersistenceManager
from agent_state.models import AgentState, OpenModel, SleepState, Task, without_history_before
from agent_state.protocols import Notice, NoticeStream
from agent_state.runtime import transitions
from agent_state.runtime.agents import AgentService
from agent_state.runtime.live_agent import LiveAgent, with_stored_id
from agent_state.runtime.recovery import load_agent
from agent_state.runtime.requests import REQUESTS, RequestService
from agent_state.runtime.runner import Runner
from agent_state.runtime.sleep import SleepService
from agent_state.runtime.state import DELETED, RuntimeState, cancel_requested, logger
from agent_state.runtime.task_queue import LiveTask
from agent_state.runtime.waiters import TaskWaiters

_MAX_DRIFTS = 1000
_CHECKED_AT_ONCE = 50
"""How many agents and tasks that were not touched a periodic check compares."""
_TURN = 10
"""How many agents, or tasks, are compared before the event loop gets a turn."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A difference between memory and store."""

    kind: str
    key: Key
    what: str
    repair: str
    """Which of the two was used."""


class Reconciler:
    """Compares memory with the store, saves again, and applies the changes of others.

    A hand edit of what the runtime is not working on is applied. While a handler runs, its
    agent's memory and its task belong to the handler, and are saved over the edit (which the
    store moves to the quarantine).
    """

    def __init__(
        self,
        state: RuntimeState,
        sleep: SleepService,
        waiters: TaskWaiters,
        runner: Runner,
        agents: AgentService,
    ) -> None:
        self._state = state
        self._sleep = sleep
        self._waiters = waiters
        self._runner = runner
        self._agents = agents
        self._removed: set[str] = set()
        self._deletions: set[Key] = set()
        """What says that tasks were deleted, as it was found by the check before."""
        self._unchecked: deque[tuple[str, str | None]] = deque()
        """The agents, and the tasks by agent, that are still to be compared in this round."""
        self.drifts: deque[Drift] = deque(maxlen=_MAX_DRIFTS)
        """The latest thousand differences that were found and repaired."""

    async def check(self) -> int:
        """Compare every agent and open task with the store, and repair; return how many differed.

        An agent that cannot be compared does not prevent comparing the others; the first error
        is raised at the end.
        """
        agents = self._state.agents
        return await self._check_each({name: [*agent.tasks] for name, agent in agents.items()})

    async def check_some(self) -> int:
        """As ``check``, for the agents and tasks that were touched since they were last compared.

        And for the next few of the others, so that in time each is compared.
        """
        for kind, key in list(self._state.doubtful):
            if await self.notice(Notice(kind, key, 0, outside=True)):
                self._state.doubtful.pop((kind, key), None)
        if self._state.shared:
            await self._end_deletions()
        agents = self._state.agents
        chosen = {
            name: dict(agent.touched_tasks) for name, agent in agents.items() if agent.touched
        }
        for _ in range(_CHECKED_AT_ONCE):
            if not self._unchecked:
                others = [(name, task_id) for name in agents for task_id in agents[name].tasks]
                self._unchecked.extend(zip(agents, repeat(None)))
                self._unchecked.extend(others)
                if len(self._unchecked) <= _CHECKED_AT_ONCE:
                    for name, task_id in self._unchecked:
                        _add(chosen, name, task_id)
                    break
            _add(chosen, *self._unchecked.popleft())
        return await self._check_each(chosen)

    async def _check_each(self, chosen: Mapping[str, Iterable[str]]) -> int:
        """Compare agents, and these tasks of theirs."""
        found = 0
        failed: AgentStateError | None = None
        for number, (name, tasks) in enumerate(chosen.items()):
            if number % _TURN == _TURN - 1:
                await asyncio.sleep(0)  # a store in memory answers without a pause
            agent = self._state.agents.get(name)
            if agent is None or not agent.leased:
                continue
            agent.touched = False
            try:
                found += await self._check(agent, tasks)
            except LeaseLostError as error:
                logger.warning("%s", error)
            except AgentStateError as error:
                logger.warning("agent %s could not be checked: %s", agent.agent_id, error)
                agent.touched = True
                failed = failed or error
            agent.changed.set()
        if failed is not None:
            raise failed
        return found

    async def _check(self, agent: LiveAgent, tasks: Iterable[str]) -> int:
        if agent.may_be_archived() and await self._forget_removed(agent):
            return 1
        async with agent.lock:
            found = await self._check_agent(agent)
        if agent.agent_id in self._removed:
            self._removed.discard(agent.agent_id)
            return await self._forget_removed(agent)
        # Not under one lock: whoever cancels a task does not wait for a long queue.
        for number, task_id in enumerate(tasks):
            if number % _TURN == _TURN - 1:
                await asyncio.sleep(0)
            async with agent.lock:
                live = agent.tasks.get(task_id)
                if live is not None:
                    found += await self._check_task(agent, live)
                agent.touched_tasks.pop(task_id, None)
            if live is not None:
                found += await self._requeue_abandoned(agent, live)
        return found

    async def _forget_removed(self, agent: LiveAgent) -> bool:
        """Forget an agent that cleaning up has archived, or git removed; return whether it was."""
        manager = self._state.manager
        archived = agent.may_be_archived()
        if await manager.load_with_revision("agents", agent.agent_id) is not None:
            return False
        if not archived:
            if not await self._is_removed("agents", (agent.agent_id,)):
                return False
            self._record("agents", (agent.agent_id,), "removed by git", "it is not run any more")
        await self._agents.remove_archived([agent.agent_id], ())
        return True

    async def _forget_task(self, agent: LiveAgent, key: Key) -> bool:
        """Forget a missing task that was deleted, or that git removed; return whether it was."""
        live = agent.tasks.get(key[-1])
        if live is not None and live is agent.current:
            return False
        if not (self._state.shared and await self._is_stored("system", (DELETED, *key))):
            if live is None or not await self._is_removed("tasks", key):
                return False
            self._record("tasks", key, "removed by git", "it is not done any more")
        agent.tasks.pop(key[-1], None)
        self._waiters.notify_deleted(key)
        return True

    async def _task_deleted(self, note: Key) -> None:
        """Forget a task that another process has deleted, unless there is one of that id again."""
        if note[0] != DELETED or len(note) != 3:
            return
        agent, key = self._state.agents.get(note[1]), note[1:]
        if agent is not None:
            async with agent.lock:
                if not await self._is_stored("tasks", key):
                    await self._forget_task(agent, key)

    async def _end_deletions(self) -> None:
        """Remove what says that tasks were deleted, once their owners must have seen it.

        That is the second time, since a task may just be on its way into memory.
        """
        found = {
            key
            for key in await self._state.manager.keys("system", DELETED)
            if (agent := self._state.agents.get(key[1])) is not None and agent.leased
        }
        for key in found & self._deletions:
            await self._task_deleted(key)
            await self._state.manager.delete("system", key)
        self._deletions = found

    async def _is_stored(self, kind: str, key: Key) -> bool:
        return await self._state.manager.load_with_revision(kind, key) is not None

    async def _is_removed(self, kind: str, key: Key) -> bool:
        return await self._state.manager.is_removed(kind, key)

    async def _check_agent(self, agent: LiveAgent) -> int:
        stored = await self._state.manager.load_with_revision("agents", agent.agent_id)
        theirs: dict[str, Any] = {}
        if stored is not None and isinstance(stored.state, AgentState):
            start = stored.state.context.conversation_history_offset
            if agent.current is None:
                agent.state = without_history_before(agent.state, start)
            start = agent.state.context.conversation_history_offset
            theirs = without_history_before(stored.state, start).model_dump()
        body = agent.body()
        if theirs == body or (stored is not None and stored.edited and agent.is_as_written(body)):
            return 0
        if stored is None and agent.may_be_archived():
            return 0  # a moment ago; the next check forgets it
        if stored is None and await self._is_removed("agents", (agent.agent_id,)):
            self._removed.add(agent.agent_id)
            return 0
        busy = agent.current is not None
        if stored is not None and stored.edited and not busy:
            self._adopt(agent, stored)
            self._record("agents", (agent.agent_id,), "edited outside", "memory follows the file")
            return 1
        group = self._state.manager.new_group()
        group.save("agents", agent.agent_id, body, append_only=True)
        await self._state.commit(group, agent)
        if busy and stored is not None:
            return 0  # the handler has changed its memory since the last save, as it may
        if {**theirs, "status": body["status"]} == body:
            return 0  # the status follows from the rest: a handler was registered, or is missing
        what = "missing on disk" if stored is None else "differs from memory"
        self._record("agents", (agent.agent_id,), what, "saved again from memory")
        return 1

    async def _check_task(self, agent: LiveAgent, live: LiveTask) -> int:
        manager, key = self._state.manager, (agent.agent_id, live.task.task_id)
        stored = await manager.load_with_revision("tasks", key)
        if live is agent.current:
            if stored is not None and stored.revision != live.revision:
                self._apply_task(agent, stored)
            return 0
        if not agent.leased or (stored is None and not live.revision):
            return 0  # the first attempt at a message stores its task
        if stored is None:
            if await self._forget_task(agent, key):
                return 1
            group = manager.new_group()
            group.save("tasks", key, live.task, expected=0)
            live.revision = (await self._state.commit(group, agent))[0]
            self._record("tasks", key, "missing on disk", "saved again from memory")
            return 1
        if isinstance(stored.state, Task):
            with_stored_id(stored.state, key)
        if stored.revision == live.revision and stored.state.model_dump() == live.task.model_dump():
            return 0
        self._apply_task(agent, stored)
        self._record("tasks", key, "changed outside", "memory follows the file")
        return 1

    async def _requeue_abandoned(self, agent: LiveAgent, live: LiveTask) -> bool:
        """Queue a task again that is in progress, although no attempt of this runtime runs.

        This runtime owns the agent, so that no other one can be working on it.
        """

        def change(task: Task) -> Task | None:
            if live is agent.current or task.status != "in_progress":
                return None
            return transitions.requeue(task, self._state.clock.now(), self._state.retry)

        if live.task.status != "in_progress" or not agent.leased:
            return False
        if not await self._state.save(agent, live=live, change=change):
            return False
        key = (agent.agent_id, live.task.task_id)
        self._record("tasks", key, "in progress, but abandoned", "queued again")
        self._state.note_requeued(live.task)
        if transitions.is_finished(live.task):
            self._waiters.notify_finished(live.task)
        return True

    def _record(self, kind: str, key: Key, what: str, repair: str) -> None:
        self.drifts.append(Drift(kind, key, what, repair))
        logger.warning("%s: %s; %s", describe(kind, key), what, repair)

    # -- what other processes write ----------------------------------------------------------

    async def catch_up(self) -> None:
        """Apply every difference between store and memory, after notices were missed."""
        await self._agents.confirm_all()
        seen: set[tuple[str, Key]] = set()
        for kind in ("agents", "tasks", "sleep", "mail"):
            async for loaded in self._state.manager.scan(kind):
                seen.add((kind, loaded.key))
                if self._is_news(kind, loaded):
                    await self.notice(Notice(kind, loaded.key, loaded.revision, outside=True))
        for agent in list(self._state.agents.values()):
            gone: list[tuple[str, Key]]
            gone = [("mail", (agent.agent_id, message_id)) for message_id in agent.mail]
            gone += [("tasks", (agent.agent_id, task_id)) for task_id in agent.tasks]
            if agent.sleep is not None:
                gone.append(("sleep", (agent.agent_id,)))
            for kind, key in gone:
                if (kind, key) not in seen:
                    await self.notice(Notice(kind, key, None, outside=True))

    def _is_news(self, kind: str, loaded: StoredState) -> bool:
        agent = self._state.agents.get(loaded.key[0])
        if agent is None:
            return kind == "agents"
        known: OpenModel | None = None
        if kind == "agents":
            known = agent.state
        elif kind == "sleep":
            known = agent.sleep
        elif kind == "mail":
            known = agent.mail.get(loaded.key[-1])
        elif isinstance(loaded.state, Task):
            live = agent.tasks.get(loaded.key[-1])
            if live is None:
                return not transitions.is_finished(loaded.state)
            return live.revision != loaded.revision
        return known is None or known.model_dump() != loaded.state.model_dump()

    async def notice(self, notice: Notice) -> bool:
        """Apply one change that another process made; an unusable document is logged.

        Returns whether it was applied; if the store refused, the next check tries again.
        """
        try:
            await self._apply(notice)
            return True
        except LeaseLostError as error:
            logger.warning("%s", error)
            return True
        except (StorageError, LockTimeoutError) as error:
            where = describe(notice.kind, notice.key)
            logger.warning("%s was changed outside and is looked at again: %s", where, error)
            self._state.doubtful[notice.kind, notice.key] = None
            return False
        except AgentStateError as error:
            where = describe(notice.kind, notice.key)
            logger.warning("%s was changed outside and is not usable: %s", where, error)
            return True
        except Exception:  # noqa: BLE001  # an error in one document must not hide the notices of others
            logger.exception("the change of %s", describe(notice.kind, notice.key))
            return True

    async def _apply(self, notice: Notice) -> None:
        if notice.kind == "system":
            await self._task_deleted(notice.key)
            await self._agents.owner_changed(notice)
            return
        manager, key = self._state.manager, notice.key
        agent = self._state.agents.get(key[0])
        if agent is None:
            if notice.kind == "agents" and len(key) == 1:
                found = await load_agent(manager, key[0])
                if found is not None:
                    await self._agents.admit(found, retry=True)
            return
        if len(key) == 1 and notice.kind in COLLECTIONS:
            await self._apply_collection(agent, notice.kind)
        elif notice.kind == "sleep":
            await self._apply_sleep(agent, await manager.load_with_revision("sleep", key))
        elif notice.kind == "mail":
            stored = await manager.load_with_revision("mail", key)
            if stored is not None:
                agent.apply_loaded(stored)
                await self._sleep.wake_if_due(agent)
            else:
                agent.mail.pop(key[-1], None)
        elif notice.kind in ("agents", "tasks"):
            gone = notice.revision is None or agent.may_be_archived()
            if notice.kind == "agents" and gone and await self._forget_removed(agent):
                return
            await self._apply_state(agent, notice)
        if not agent.leased and not self._state.shared:
            await self._agents.take_free()  # it could not be saved, and now it may be
        agent.changed.set()

    async def _apply_collection(self, agent: LiveAgent, kind: str) -> None:
        """Take in the tasks or the mail that a person wrote into one document."""
        manager = self._state.manager
        if await expand_collection(manager, kind, agent.agent_id):
            async for stored in manager.scan(kind, agent.agent_id):
                agent.apply_loaded(stored)
            await self._sleep.wake_if_due(agent)

    async def _apply_state(self, agent: LiveAgent, notice: Notice) -> None:
        # Under the lock, so that what is read is not older than a concurrent save.
        async with agent.lock:
            stored = await self._state.manager.load_with_revision(notice.kind, notice.key)
            if stored is None:
                if notice.kind == "tasks" and len(notice.key) == 2:
                    await self._forget_task(agent, notice.key)
                return  # removed by hand: the next check saves it again from memory
            if isinstance(stored.state, Task):
                self._apply_task(agent, stored)
            elif agent.current is None:
                self._adopt(agent, stored)
        live = agent.tasks.get(notice.key[-1])
        if live is not None:
            await self._requeue_abandoned(agent, live)

    async def _apply_sleep(self, agent: LiveAgent, stored: StoredState | None) -> None:
        sleep = stored.state if stored is not None else None
        if isinstance(sleep, SleepState) and sleep.is_sleeping:
            agent.sleep = sleep
        elif agent.leased:
            await self._sleep.wake(agent, "manual_wake", if_leased=True)
        else:
            agent.sleep = None

    def _apply_task(self, agent: LiveAgent, stored: StoredState) -> None:
        live = agent.tasks.get(stored.key[-1])
        if live is None or live is not agent.current:
            agent.apply_loaded(stored)
            if isinstance(stored.state, Task) and transitions.is_finished(stored.state):
                self._waiters.notify_finished(stored.state)  # by another runtime, or by hand
        elif isinstance(stored.state, Task):
            if cancel_requested(stored.state):
                live.task = live.task.model_copy(update={"cancel_requested": True})
                agent.request_stop("cancel")
            elif self._state.shared and not self._state.holds(stored.state):
                agent.request_stop("lease")

    def _adopt(self, agent: LiveAgent, stored: StoredState) -> None:
        if isinstance(stored.state, AgentState):
            agent.adopt(stored.state, edited=stored.edited)
            self._runner.start(agent)  # the edit may have changed its type


def _add(chosen: dict[str, dict[str, None]], name: str, task_id: str | None) -> None:
    tasks = chosen.setdefault(name, {})
    if task_id is not None:
        tasks[task_id] = None


class OutsideChanges:
    """Gives the changes of other processes, and what was missed of them, to whom they concern."""

    def __init__(
        self,
        manager: StatePersistenceManager,
        reconciler: Reconciler,
        requests: RequestService,
        notices: NoticeStream,
    ) -> None:
        self._manager = manager
        self._reconciler = reconciler
        self._requests = requests
        self._notices: NoticeStream | None = notices

    async def run(self) -> None:
        """Read notices until they end. A second call subscribes anew, and catches up."""
        notices, self._notices = self._notices, None
        missed = notices is None
        async with contextlib.aclosing(notices or await self._manager.subscribe()) as stream:
            if missed:
                await self._requests.find()
                await self._reconciler.catch_up()
            async for notice in stream:
                if notice.outside and notice.kind == REQUESTS:
                    self._requests.note(notice.key)
                elif notice.outside:
                    await self._reconciler.notice(notice)
