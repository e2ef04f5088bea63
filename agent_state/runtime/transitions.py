"""The states of a task and the transitions between them, as pure functions.

              claim                    complete
    pending ────────▶ in_progress ─────────────────▶ completed
       ▲  ▲              │  │  │
       │  └── release ───┘  │  └── fail (last attempt) ──▶ dead
       │      wait          │
       │      interrupt     │
       │                    ├── fail ──▶ failed ── claim, after a pause ──▶ in_progress
       │                    │
       │                    └── cancel ──▶ cancelled   (from pending and failed too)
       │
       └── retry, on request, from dead, failed and cancelled

A task runs at least once. ``claim`` counts the attempt and names the runtime that makes it; the
runtime that owns the agent after a dead one requeues the task. An attempt that ended with its
process is an interruption, not a failure: it does not count against ``max_attempts``, but a task
whose process dies again and again ends as ``dead``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from traceback import TracebackException, format_exception
from typing import Any

from agent_state.clock import check_count, check_duration, instant, later, sort_text, stamp
from agent_state.errors import InvalidPayloadError, StateValidationError, UnknownStepError
from agent_state.models import (
    PRIORITIES,
    UNFINISHED,
    Lease,
    Priority,
    Task,
    TaskReference,
    meaning_of,
    plain_copy,
)

_MAX_TRACEBACK = 8000
_RUNNER = "agent_state/runtime/runner.py"
"""Where handlers are called."""
MAX_ATTEMPTS = 3
"""After how many failed attempts a task is ``dead``, unless somebody says otherwise."""
CLAIMABLE = frozenset({"pending", "failed"})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a failed task waits for its next attempt.

    The n-th failure waits ``base_seconds * factor**(n-1)``, at most ``max_seconds``.
    """

    base_seconds: float = 1.0
    """The wait after the first failure."""
    factor: float = 2.0
    """Each wait is this many times the one before."""
    max_seconds: float = 300.0
    """The longest wait."""
    jitter: float = 0.25
    """The fraction by which each wait varies at random, so that retries spread out."""
    max_interruptions: int = 20
    """How often the process may die during a task before the task ends as ``dead``."""
    not_retried: tuple[type[BaseException], ...] = ()
    """Errors that end a task as ``dead`` at once, because another attempt would fail too."""

    def __post_init__(self) -> None:
        for name in ("base_seconds", "factor", "max_seconds", "jitter"):
            check_duration(name, getattr(self, name))
        check_count("max_interruptions", self.max_interruptions)
        known = isinstance(self.not_retried, tuple | list) and all(
            isinstance(each, type) and issubclass(each, BaseException) for each in self.not_retried
        )
        if not known:
            text = f"not_retried is a tuple of exception classes, not {self.not_retried!r}"
            raise StateValidationError(text)

    def gives_up(self, error: BaseException) -> bool:
        """Whether no other attempt is made after it; of a group, after one of its errors."""
        if isinstance(error, BaseExceptionGroup):
            return any(map(self.gives_up, error.exceptions))
        return isinstance(error, (UnknownStepError, InvalidPayloadError, *self.not_retried))

    def delay(self, failures: int, random: Random) -> float:
        """Return the seconds to wait after the given number of failures (1 or more)."""
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
    priority: Priority = "normal",
    delay_seconds: float = 0.0,
    max_attempts: int = MAX_ATTEMPTS,
    timeout_seconds: float | None = None,
) -> Task:
    """Return a pending task.

    Raises ``StateValidationError`` for an unknown priority, a time that is no number, and a number
    of attempts that is none.
    """
    check_duration("delay_seconds", delay_seconds)
    if timeout_seconds is not None:
        check_duration("timeout_seconds", timeout_seconds)
    check_count("max_attempts", max_attempts, 1)
    if priority not in PRIORITIES:
        known = ", ".join(PRIORITIES)
        raise StateValidationError(f"priority {priority!r} is not one of {known}", kind="tasks")
    task = Task(
        task_id=task_id,
        agent_id=agent_id,
        name=name,
        payload=plain_copy(dict(payload)),
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
    return task


def claim(task: Task, owner: str, now: datetime, *, token: int | None = None) -> Task:
    """Start an attempt of the runtime ``owner``, which owns the agent by ``token``: count it."""
    lease = Lease(owner=owner) if token is None else Lease(owner=owner, token=token)
    return _with(
        task,
        status="in_progress",
        attempts=task.attempts + 1,
        started_at=stamp(now),
        not_before=None,
        waits_for=[],
        waits_until=None,
        error=None,
        traceback=None,
        lease=lease,
    )


def complete(task: Task, result: object, now: datetime) -> Task:
    """End the task with its result."""
    return _with(
        task,
        status="completed",
        result=result,
        error=None,
        traceback=None,
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
    traceback: str | None = None,
    permanent: bool = False,
) -> Task:
    """End a failed attempt: the task waits for the next one, or is ``dead`` after the last."""
    failures = counted_failures(task)
    failed = _with(task, error=error, traceback=traceback, lease=None, wait_deadlines={})
    if permanent or failures >= task.max_attempts:
        return _with(failed, status="dead", finished_at=stamp(now))
    pause = policy.delay(max(1, failures), random)
    return _with(failed, status="failed", not_before=stamp(later(now, pause)))


def format_error(error: BaseException) -> str:
    """Return an error as text that can be stored, even if its message cannot be formatted."""
    try:
        message = str(error)
    except Exception as unprintable:  # noqa: BLE001  # a handler's own class may raise anything
        message = f"(its message raises {type(unprintable).__name__})"
    text = f"{type(error).__name__}: {message}"
    # A lone surrogate in a message must not prevent storing the failure.
    return text.encode("utf-8", "backslashreplace").decode()[:4000]


def format_traceback(error: BaseException) -> str | None:
    """Return where an error was raised, as text that can be stored; None if nowhere.

    The files are named as they are imported, because documents contain no path of a machine.
    """
    if error.__traceback__ is None:
        return None
    report = TracebackException.from_exception(error)
    for part in _parts(report):
        for frame in part.stack:
            frame.filename = _import_path(frame.filename)
    if report.stack and report.stack[0].filename == _RUNNER:
        del report.stack[0]
    text = "".join(report.format())
    return text.encode("utf-8", "backslashreplace").decode()[-_MAX_TRACEBACK:]


def _parts(report: TracebackException) -> Iterator[TracebackException]:
    """Yield a report with all that it consists of: causes, contexts, errors of a group."""
    waiting, seen = [report], set()
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            more = (part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ()))
            waiting += filter(None, more)


def _import_path(file: str) -> str:
    """Return a file's path below the folder that it was imported from."""
    folders = [f"{Path(folder).absolute()}/" for folder in sys.path]
    longest = max((folder for folder in folders if file.startswith(folder)), key=len, default="")
    return file.removeprefix(longest) if longest else Path(file).name


def is_text(error: BaseException) -> bool:
    """Whether the error's traceback can be written to a log: not with half a surrogate pair."""
    try:
        "".join(format_exception(error)).encode()
    except UnicodeEncodeError:
        return False
    return True


def release(task: Task) -> Task:
    """Undo a claim: the attempt ended early, on request, and does not count."""
    return _with(task, status="pending", attempts=max(0, task.attempts - 1), lease=None)


def wait(task: Task, tasks: Iterable[TaskReference], name: str, deadline: datetime | None) -> Task:
    """End an attempt that waits for other tasks to end; it does not count.

    ``deadline``: it waits no longer, and this is the end of its handler's wait of that name.
    """
    waiting = _with(release(task), waits_for=[*tasks])
    if deadline is None:
        return waiting
    until = stamp(deadline)
    deadlines = {**task.wait_deadlines, name: until}
    return _with(waiting, waits_until=until, wait_deadlines=deadlines)


def requeue(task: Task, now: datetime, policy: RetryPolicy) -> Task:
    """End an attempt that was abandoned: cancel the task if that was requested, or interrupt it."""
    return cancel(task, now) if task.cancel_requested else interrupt(task, now, policy)


def interrupt(task: Task, now: datetime, policy: RetryPolicy) -> Task:
    """End an attempt whose process died."""
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
    """End the task without a result, on request."""
    return _with(
        task, status="cancelled", cancel_requested=True, finished_at=stamp(now), lease=None
    )


def request_cancel(task: Task, now: datetime) -> Task | None:
    """Cancel the task, or let its running attempt be cancelled; None if it was finished."""
    if is_finished(task):
        return None
    if task.status == "in_progress":
        return task.model_copy(update={"cancel_requested": True})
    return cancel(task, now)


def retry(task: Task) -> Task | None:
    """Queue the task again, due at once, on request; None unless it failed, is dead or cancelled.

    All attempts that ``max_attempts`` permits are before it. Its error stays until the next one.
    """
    if task.status not in ("dead", "failed", "cancelled"):
        return None
    return _with(
        task,
        status="pending",
        forgiven=task.attempts,
        wait_deadlines={},
        interruptions=0,
        not_before=None,
        finished_at=None,
        cancel_requested=False,
        lease=None,
    )


def counted_failures(task: Task) -> int:
    """Return how many attempts count against ``max_attempts``, the running one included."""
    return task.attempts - task.interruptions - task.forgiven


def is_finished(task: Task) -> bool:
    """Whether the task is in a final state."""
    return meaning_of(task.status) not in UNFINISHED


def due_at(task: Task) -> datetime | None:
    """Return when the task may start; None for at once, also if the stored time is unreadable."""
    return time_of(task.not_before)


def is_finished_at(task: Task, moment: datetime | None) -> bool:
    """Whether the task was in a final state at that moment; None for now."""
    finished = time_of(task.finished_at)
    return is_finished(task) and (moment is None or finished is None or finished <= moment)


def time_of(stored: str | float | None) -> datetime | None:
    """Return a stored time; None for none, and for what is no time, such as a hand edit left."""
    if stored is None:
        return None
    try:
        return instant(stored)
    except ValueError:
        return None


def order(task: Task) -> tuple[int, str, str]:
    """Return the sort key of the queue: higher priority first, then older first."""
    return (-PRIORITIES.get(task.priority, 1), sort_text(task.created_at), task.task_id)


def unknown_steps(task: Task) -> list[str]:
    """Return the steps that started and have no stored outcome."""
    return [name for name, step in task.steps.items() if step.status == "started"]


def _with(task: Task, **changes: object) -> Task:
    changed = task.model_copy(update=changes)
    for name, value in changes.items():
        # A field at its default is not written, so that files stay short.
        if name in Task.defaults and value == Task.defaults[name]:
            changed.model_fields_set.discard(name)
    changed.model_fields_set.update(("status", "attempts"))
    return changed
