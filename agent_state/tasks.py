"""The states of a task and the ways between them, as pure functions.

              claim                    complete
    pending ────────▶ in_progress ─────────────────▶ completed
       ▲  ▲              │  │  │
       │  └── put_back ──┘  │  └── fail (last attempt) ──▶ dead
       │      suspend       │
       │      interrupt     ├── fail ──▶ failed ── claim, after a pause ──▶ in_progress
       │                    │
       │                    └── cancel ──▶ cancelled   (from pending and failed too)

A task is done at least once: ``claim`` counts the attempt and gives a lease; whoever finds a
lease whose owner is gone puts the task back. An attempt that ended with its process is an
interruption, not a failure: it does not use up ``max_attempts``, but a task that takes its
process down again and again ends as ``dead`` all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from random import Random
from typing import Any

from agent_state.clock import instant, later, stamp
from agent_state.errors import StateValidationError
from agent_state.models import PRIORITIES, UNFINISHED, Lease, Task, detached

CLAIMABLE = frozenset({"pending", "failed"})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to wait after a failure.

    After the n-th: ``base * factor**(n-1)`` seconds, at most ``max``, spread evenly by
    ``± jitter`` of itself, so that what failed together does not return together.
    ``max_interruptions``: how often its process may die before a task counts as the reason.
    """

    base_seconds: float = 1.0
    factor: float = 2.0
    max_seconds: float = 300.0
    jitter: float = 0.25
    max_interruptions: int = 20

    def delay(self, failures: int, random: Random) -> float:
        """Seconds to wait after so many failures (1 or more)."""
        try:
            pause = self.base_seconds * self.factor ** (failures - 1)
        except OverflowError:
            pause = self.max_seconds
        return min(self.max_seconds, pause) * (1 + self.jitter * random.uniform(-1.0, 1.0))


def new_task(
    task_id: str,
    agent_id: str,
    name: str,
    payload: Mapping[str, Any],
    *,
    now: datetime,
    priority: str = "normal",
    delay_seconds: float = 0.0,
    max_attempts: int = 3,
    timeout_seconds: float | None = None,
    dedupe_key: str | None = None,
) -> Task:
    """A pending task. Raises ``StateValidationError`` for a priority that is no word of ours."""
    if priority not in PRIORITIES:
        known = ", ".join(PRIORITIES)
        raise StateValidationError(f"priority {priority!r} is none of {known}", kind="tasks")
    task = Task(
        task_id=task_id,
        agent_id=agent_id,
        name=name,
        payload=detached(dict(payload)),
        status="pending",
        priority=priority,
        created_at=stamp(now),
        attempts=0,
        max_attempts=max_attempts,
    )
    if delay_seconds > 0:
        task.not_before = stamp(later(now, delay_seconds))
    if timeout_seconds is not None:
        task.timeout_seconds = timeout_seconds
    if dedupe_key is not None:
        task.dedupe_key = dedupe_key
    return task


def claim(task: Task, owner: str, now: datetime, lease_seconds: float) -> Task:
    """Take the task for one attempt."""
    return _with(
        task,
        status="in_progress",
        attempts=task.attempts + 1,
        started_at=stamp(now),
        not_before=None,
        error=None,
        lease=Lease(owner=owner, expires_at=stamp(later(now, lease_seconds))),
    )


def renew(task: Task, now: datetime, lease_seconds: float) -> Task:
    """A heartbeat: the lease runs on from now."""
    owner = task.lease.owner if task.lease else ""
    return _with(task, lease=Lease(owner=owner, expires_at=stamp(later(now, lease_seconds))))


def complete(task: Task, result: object, now: datetime) -> Task:
    """Done, with its result."""
    return _with(
        task,
        status="completed",
        result=result,
        error=None,
        finished_at=stamp(now),
        lease=None,
    )


def fail(
    task: Task,
    error: str,
    now: datetime,
    policy: RetryPolicy,
    random: Random,
    *,
    permanent: bool = False,
) -> Task:
    """The attempt failed: wait for the next one, or ``dead`` when there is none."""
    failures = task.attempts - task.interruptions
    if permanent or failures >= task.max_attempts:
        return _with(task, status="dead", error=error, finished_at=stamp(now), lease=None)
    pause = policy.delay(max(1, failures), random)
    return _with(
        task, status="failed", error=error, not_before=stamp(later(now, pause)), lease=None
    )


def told(error: BaseException) -> str:
    """An error in words that can be stored, whatever it holds and however it prints."""
    try:
        message = str(error)
    except Exception as unprintable:  # noqa: BLE001  # a handler's own class may raise anything
        message = f"(its message raises {type(unprintable).__name__})"
    said = f"{type(error).__name__}: {message}"
    # A lone surrogate in a message must not keep the failure itself from being stored.
    return said.encode("utf-8", "backslashreplace").decode()[:4000]


def put_back(task: Task) -> Task:
    """Undo a claim whose attempt was stopped in good order; it does not count."""
    return _with(task, status="pending", attempts=max(0, task.attempts - 1), lease=None)


def suspend(task: Task) -> Task:
    """The handler chose to wait (its agent falls asleep); the attempt does not count."""
    return put_back(task)


def interrupt(task: Task, now: datetime, policy: RetryPolicy) -> Task:
    """The process died during the attempt."""
    interruptions = task.interruptions + 1
    if interruptions > policy.max_interruptions:
        return _with(
            task,
            status="dead",
            interruptions=interruptions,
            error=f"its process died {interruptions} times while it ran",
            finished_at=stamp(now),
            lease=None,
        )
    return _with(task, status="pending", interruptions=interruptions, lease=None)


def cancel(task: Task, now: datetime) -> Task:
    """Nobody wants it any more."""
    return _with(
        task, status="cancelled", cancel_requested=True, finished_at=stamp(now), lease=None
    )


def is_finished(task: Task) -> bool:
    """Whether nothing will happen to it any more."""
    return task.status not in UNFINISHED


def due_at(task: Task) -> datetime | None:
    """When it may start; None for at once. An unreadable time is no reason to wait for ever."""
    if task.not_before is None:
        return None
    try:
        return instant(task.not_before)
    except ValueError:
        return None


def order(task: Task) -> tuple[int, str, str]:
    """Sorts first what is done first: by priority, then by age."""
    return (-PRIORITIES.get(task.priority, 1), task.created_at or "", task.task_id)


def unknown_steps(task: Task) -> list[str]:
    """The steps that had started and of which nobody knows whether they finished."""
    return [name for name, step in task.steps.items() if step.status == "started"]


def _with(task: Task, **changes: object) -> Task:
    changed = task.model_copy(update=changes)
    for name, value in changes.items():
        # What is back at its default is not written; a file shows what there is to say.
        if name in Task.defaults and value == Task.defaults[name]:
            changed.model_fields_set.discard(name)
    changed.model_fields_set.update(("status", "attempts"))
    return changed
