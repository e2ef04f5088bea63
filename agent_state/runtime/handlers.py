"""The handlers of agent types, and the stacks of those that run."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from agent_state.errors import StateValidationError
from agent_state.runtime.attempt import StepRun
from agent_state.runtime.context import Handler

WARN_AFTER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class RegisteredHandler:
    """The function that does the tasks of an agent type, and how it is run."""

    function: Handler
    warn_after_seconds: float = WARN_AFTER_SECONDS


class HandlerRegistry:
    """The handlers of one runtime, by agent type."""

    def __init__(self) -> None:
        self._handlers: dict[str, RegisteredHandler] = {}

    def __contains__(self, agent_type: object) -> bool:
        return agent_type in self._handlers

    def __iter__(self) -> Iterator[str]:
        return iter(self._handlers)

    def get(self, agent_type: str | None) -> RegisteredHandler | None:
        """Return the handler of an agent type; None if it has none."""
        return self._handlers.get(agent_type or "")

    def add(self, agent_type: str, handler: RegisteredHandler) -> None:
        """Register a handler.

        Raises ``ValueError`` when the type has one, ``TypeError`` for a plain function.
        """
        if agent_type in self._handlers:
            raise ValueError(f"agent type {agent_type!r} has a handler already")
        if not inspect.iscoroutinefunction(handler.function):
            raise TypeError(f"the handler of {agent_type!r} must be an async function")
        self._handlers[agent_type] = handler

    @property
    def shortest_warning_seconds(self) -> float:
        """The shortest time after which a running handler is reported."""
        times = (handler.warn_after_seconds for handler in self._handlers.values())
        return min(times, default=WARN_AFTER_SECONDS)

    def missing(self, agent_type: str | None) -> str:
        """Say, for a log, that a type has no handler, and which types have one."""
        known = ", ".join(sorted(map(repr, self._handlers))) or "none"
        return f"no handler for agent type {agent_type!r} is registered (registered: {known})"


def check_warn_after(seconds: float) -> float:
    """Return the time. Raises ``StateValidationError`` unless it is positive."""
    if not seconds > 0:
        raise StateValidationError(f"warn_after_seconds is positive, not {seconds}")
    return seconds


def format_stack(coroutine: Any) -> str:
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
