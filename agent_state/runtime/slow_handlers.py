"""Reports handlers that run for long, with their stacks: those that wait, and one that blocks.

A coroutine that computes, or waits without ``await``, stops its whole event loop. So the loop is
watched from a thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any

from agent_state.clock import Clock
from agent_state.runtime.attempt import StepRun, WorkingCopy
from agent_state.runtime.handlers import HandlerRegistry
from agent_state.runtime.state import logger
from agent_state.runtime.task_queue import LiveTask

_MAX_PAUSE_SECONDS = 30.0
_MIN_PAUSE_SECONDS = 0.01


@dataclass(slots=True)
class RunningHandler:
    """A handler that runs now."""

    agent_id: str
    work: asyncio.Task[Any]
    live: LiveTask
    copy: WorkingCopy
    began: float
    """By the monotonic clock."""
    warn_after_seconds: float
    """How long it may run before it is reported; twice as long after each report."""

    def __str__(self) -> str:
        return f"task {self.agent_id}/{self.live.task.task_id} ({self.live.task.name})"

    def stack(self) -> str:
        """Return where it is, and then where the steps are that it runs in threads."""
        frames = sys._current_frames()  # noqa: SLF001  # public, as its documentation says
        threads = (frames.get(number) for number in self.copy.thread_ids())
        stacks = ["".join(traceback.format_stack(frame)) for frame in threads if frame is not None]
        return "and in a thread:\n".join([_format_coroutine(self.work.get_coro()), *stacks])


class SlowHandlerMonitor:
    """Reports what runs for longer than its handler may, in the log."""

    def __init__(self, clock: Clock, handlers: HandlerRegistry) -> None:
        self._clock = clock
        self._handlers = handlers
        self.running: dict[str, RunningHandler] = {}
        """By agent."""

    @property
    def pause_seconds(self) -> float:
        """How long to pause between two looks."""
        return min(self._handlers.shortest_warning_seconds / 4, _MAX_PAUSE_SECONDS)

    def report_slow(self) -> None:
        """Report the handlers that have run for long since their last report."""
        for run in self.running.values():
            seconds = self._clock.monotonic() - run.began
            if seconds >= run.warn_after_seconds:
                run.warn_after_seconds *= 2
                text = "%s has run for %.0f s; its handler is here:\n%s"
                logger.warning(text, run, seconds, run.stack())

    async def watch_loop(self) -> None:
        """Report a handler that blocks this event loop, from a thread, until cancelled."""
        ended = threading.Event()
        arguments = (asyncio.get_running_loop(), threading.get_ident(), ended)
        thread = threading.Thread(
            target=self._watch, args=arguments, name="agent-state blocked loop", daemon=True
        )
        thread.start()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
            thread.join()

    def _watch(
        self, loop: asyncio.AbstractEventLoop, thread_id: int, ended: threading.Event
    ) -> None:
        answered, blocked, limit = threading.Event(), 0.0, 0.0
        answered.set()
        # Pauses are counted, and no clock is read: a process that stood still is not blocked.
        while not ended.wait(pause := max(self.pause_seconds, _MIN_PAUSE_SECONDS)):
            if answered.is_set():
                answered.clear()
                blocked, limit = 0.0, self._handlers.shortest_warning_seconds
                try:
                    loop.call_soon_threadsafe(answered.set)
                except RuntimeError:
                    return  # the loop was closed, and nothing was stopped
                continue
            blocked += pause
            frame = sys._current_frames().get(thread_id)  # noqa: SLF001  # as above
            if blocked >= limit and frame is not None:
                limit *= 2
                at_work = [run for run in [*self.running.values()] if _executes(run.work)]
                what = f" by {at_work[0]}" if at_work else ""
                stack = "".join(traceback.format_stack(frame))
                text = "the event loop has been blocked%s for %.3g s; it is here:\n%s"
                logger.error(text, what, blocked, stack)


def _executes(work: asyncio.Task[Any]) -> bool:
    """Whether the task's own coroutine is the one that runs at this moment."""
    return bool(getattr(work.get_coro(), "cr_running", False))


def _format_coroutine(coroutine: Any) -> str:
    """Return where a suspended coroutine is, as in a traceback, the innermost call last."""
    frames: list[tuple[FrameType, int]] = []
    while coroutine is not None:
        if isinstance(coroutine, StepRun):
            coroutine = coroutine.work
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            frames.append((frame, frame.f_lineno))
        inner = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
        if inner is None and frame is not None:
            inner = frame.f_locals.get("self")
            inner = inner if isinstance(inner, StepRun) and inner is not coroutine else None
        coroutine = inner
    return "".join(traceback.StackSummary.extract(iter(frames)).format())
