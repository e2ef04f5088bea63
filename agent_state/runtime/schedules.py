"""Schedules: tasks that are queued at the times of cron expressions.

The document ``system/schedules/<agent>/<task name>`` has the time of the last run. A run is queued
in one commit with that time, which is compared and set; so of several runtimes one queues it, and
a kill leaves both or neither. Times that passed while no runtime ran, or while the run before had
not ended, are made up for by one run, for the last of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

from agent_state.clock import Backoff, stamp
from agent_state.codec import Group, StoredState
from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    StateNotFoundError,
    StateValidationError,
    needs_extra,
)
from agent_state.runtime import transitions
from agent_state.runtime.dedupe import dedupe_id
from agent_state.runtime.payloads import as_object
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.tasks import TaskService

SCHEDULES = "schedules"
"""Below ``system``: the last run of each schedule, by agent and task name."""

_MAX_PAUSE_SECONDS = 30.0
"""How long to wait at most: the wall clock may jump."""
_RETRY_SECONDS, _RETRY_SECONDS_MAX = 0.5, 5.0
"""How long to wait while the store refuses: after the first refusal, and at most."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The times at which a task is queued for an agent."""

    agent_id: str
    name: str
    """The name of the task."""
    cron: str
    """The cron expression."""
    zone: ZoneInfo
    """The time zone in which the expression is read."""
    payload: Mapping[str, Any]

    @property
    def key(self) -> Key:
        """The key of its document."""
        return (SCHEDULES, self.agent_id, self.name)

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first time after the moment; None if there is none."""
        local = moment.astimezone(self.zone)
        return _utc(next(_cronsim().CronSim(self.cron, local), None))

    def last_until(self, moment: datetime) -> datetime | None:
        """Return the last time that is not after the moment; None if there is none."""
        # Backwards, the first time is before the one that is given.
        local = (moment + timedelta(microseconds=1)).astimezone(self.zone)
        return _utc(next(_cronsim().CronSim(self.cron, local, reverse=True), None))

    def task_id(self, due: datetime) -> str:
        """Return the id of the run that is due then: there is one."""
        task_id = f"{self.name}-{due:%Y%m%dT%H%M%SZ}"
        return task_id if len(task_id) < 100 else dedupe_id(SCHEDULES, self.name, stamp(due))


def new_schedule(
    agent_id: str, name: str, cron: str, zone: str, payload: object, *, now: datetime
) -> Schedule:
    """Return a schedule.

    Raises ``StateValidationError`` for what is no cron expression, an expression without a time to
    come, and an unknown time zone, ``MissingExtraError`` without the extra ``cron``.
    """
    try:
        schedule = Schedule(agent_id, name, cron, ZoneInfo(zone), as_object(payload))
        if schedule.next_after(now) is None:
            raise StateValidationError(f"{cron!r} has no time to come")
    except _cronsim().CronSimError as error:
        raise StateValidationError(f"{cron!r} is no cron expression: {error}") from error
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, AgentStateError):
            raise
        raise StateValidationError(f"{zone!r} is no known time zone") from error
    return schedule


class Scheduler:
    """Queues the runs of one runtime's schedules."""

    def __init__(self, state: RuntimeState, tasks: TaskService) -> None:
        self._state = state
        self._tasks = tasks
        self._schedules: dict[Key, Schedule] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start; what is bound to an event loop is made here."""
        self._next: dict[Key, datetime] = {}
        """When each schedule is to be looked at."""
        self._late: dict[Key, str] = {}
        """Why a run that is due is not queued yet, as it was reported."""
        self._refused: dict[Key, Backoff] = {}
        """The pauses of those that the store refuses to queue."""
        self._awaited: dict[Key, asyncio.Task[None]] = {}
        """Waits for the end of the run before."""
        self._changed = asyncio.Event()

    def add(self, schedule: Schedule) -> None:
        """Add a schedule. Raises ``ValueError`` when the agent has one for that task."""
        if schedule.key in self._schedules:
            raise ValueError(f"{schedule.name!r} of {schedule.agent_id!r} has a schedule already")
        self._schedules[schedule.key] = schedule
        self._changed.set()

    def look_again(self, agent_id: str) -> None:
        """Look at once at the runs of an agent that are late: it runs here now."""
        for key in self._late:
            if key[1] == agent_id:
                self._look_at_once(key)

    def _look_at_once(self, key: Key) -> None:
        self._next.pop(key, None)
        self._changed.set()

    def add_all(self, other: Scheduler) -> None:
        """Add every schedule that another scheduler has. Raises as ``add``."""
        for schedule in other._schedules.values():
            self.add(schedule)

    async def run(self) -> None:
        """Queue each run when it is due, until cancelled."""
        try:
            await self._run()
        finally:
            for waiting in self._awaited.values():
                waiting.cancel()
            self._awaited.clear()

    async def _run(self) -> None:
        clock = self._state.clock
        while True:
            self._changed.clear()
            for schedule in [*self._schedules.values()]:
                now = clock.now()
                if self._next.get(schedule.key, now) <= now:
                    await self._look(schedule, now)
            first = min(self._next.values(), default=datetime.max.replace(tzinfo=UTC))
            seconds = max(0.0, (first - clock.now()).total_seconds())
            pause = asyncio.ensure_future(clock.sleep(min(seconds, _MAX_PAUSE_SECONDS)))
            changed = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait({pause, changed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                pause.cancel()
                changed.cancel()

    async def _look(self, schedule: Schedule, now: datetime) -> None:
        """Queue the run that is due, if one is, and note when to look again."""
        why, pause = None, _MAX_PAUSE_SECONDS
        try:
            why = await self._queue_due(schedule, now)
        except RevisionConflictError:
            pass  # another runtime was quicker
        except StateNotFoundError:
            why = f"there is no agent {schedule.agent_id!r}"
        except AgentStateError as error:
            why = str(error)
            backoff = Backoff(_RETRY_SECONDS, _RETRY_SECONDS_MAX)
            pause = self._refused.setdefault(schedule.key, backoff).pause()
        else:
            self._refused.pop(schedule.key, None)
        again = now + timedelta(seconds=pause)
        if why is None:
            self._late.pop(schedule.key, None)
            again = schedule.next_after(now) or again
        elif self._late.get(schedule.key) != why:
            self._late[schedule.key] = why
            logger.warning(
                "the run of %s for %s is late: %s", schedule.name, schedule.agent_id, why
            )
        self._next[schedule.key] = again

    async def _queue_due(self, schedule: Schedule, now: datetime) -> str | None:
        """Queue the last run that is due, if there is one; return why that has to wait."""
        stored = await self._state.manager.load_with_revision("system", schedule.key)
        known = _fields(stored)
        same = (known.get("cron"), known.get("zone")) == (schedule.cron, schedule.zone.key)
        last, due = transitions.time_of(known.get("last_run")), schedule.last_until(now)
        record = {
            "agent_id": schedule.agent_id,
            "cron": schedule.cron,
            "last_run": stamp(now),
            "last_task": known.get("last_task"),
            "task": schedule.name,
            "zone": schedule.zone.key,
        }
        expected = stored.revision if stored is not None else 0
        if last is None or not same:  # it begins now
            await self._state.manager.save("system", schedule.key, record, expected=expected)
            return None
        if due is None or due <= last:
            return None
        before = (schedule.agent_id, str(known.get("last_task")))
        if await self._tasks.waiters.is_unfinished(before):
            if schedule.key not in self._awaited:
                waiting = asyncio.create_task(self._wait_for_end(schedule.key, before))
                self._awaited[schedule.key] = waiting
            return f"task {before[1]}, the run before, has not ended"
        task_id = schedule.task_id(due)
        record |= {"last_run": stamp(due), "last_task": task_id}

        def add(group: Group) -> None:
            group.save("system", schedule.key, record, expected=expected)

        await self._tasks.submit_run(
            schedule.agent_id,
            schedule.name,
            schedule.payload,
            task_id=task_id,
            scheduled_for=due,
            add=add,
        )
        return None

    async def _wait_for_end(self, key: Key, task: Key) -> None:
        """Look again once a task has ended, whichever runtime makes it."""
        try:
            with suppress(AgentStateError), self._tasks.waiters.waiting(task) as end:
                if await self._tasks.waiters.is_unfinished(task):
                    await end
        finally:
            self._awaited.pop(key, None)
        self._look_at_once(key)


def _fields(stored: StoredState | None) -> dict[str, Any]:
    return stored.state.model_dump() if stored is not None else {}


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(UTC)


def _cronsim() -> ModuleType:
    with needs_extra("cron", "cronsim"):
        import cronsim  # an extra: whoever has no schedule needs it not
    return cronsim
