"""Functions of the application that are called when a task fails or dies, and after a restore.

They run beside the agents: nothing waits for them but the stop of the runtime, and an error of one
is logged and changes nothing.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from agent_state.models import Task, copied
from agent_state.storage.executor import run_in_thread

_logger = logging.getLogger("agent_state.runtime")
HookEvent = Literal["failure", "dead", "restore"]
TaskHook = Callable[[Task, BaseException | None], Awaitable[object] | object]
"""Called with the task as it is stored, and the error; None for one that is not known here."""


class HookRegistry:
    """The hooks of one runtime, and those that run."""

    def __init__(self) -> None:
        self._hooks: dict[HookEvent, list[Callable[..., Any]]] = {}
        self._running: set[asyncio.Task[None]] = set()

    def add(self, event: HookEvent, function: Callable[..., Any]) -> None:
        """Register a function. Raises ``TypeError`` for what cannot be called."""
        if not callable(function):
            raise TypeError(f"a hook is a function, not {function!r:.80}")
        self._hooks.setdefault(event, []).append(function)

    def add_all(self, other: HookRegistry) -> None:
        """Register every function that another registry has."""
        for event, functions in other._hooks.items():
            self._hooks.setdefault(event, []).extend(functions)

    def call_failure(self, task: Task, error: BaseException | None, *, dead: bool) -> None:
        """Call the hooks of a failed attempt, and those of dead tasks if it was the last one."""
        self.call("failure", task, error)
        if dead:
            self.call("dead", task, error)

    def call(self, event: HookEvent, about: Any, *more: object) -> None:
        """Call the hooks of an event; each is given its own copy of what it is about."""
        for function in self._hooks.get(event, ()):
            given = copied(about) if isinstance(about, Task) else about
            call = asyncio.create_task(
                _call(function, event, given, *more), name=f"agent-state on_{event}"
            )
            self._running.add(call)
            call.add_done_callback(self._running.discard)

    async def end(self, seconds: float) -> None:
        """Wait for the hooks that run, but no longer than this; then cancel them."""
        if not self._running:
            return
        _, late = await asyncio.wait(self._running, timeout=seconds)
        for call in late:
            _logger.error("%s did not end, and is cancelled", call.get_name())
            call.cancel()
        if late:
            await asyncio.wait(late, timeout=seconds)

    def abort(self) -> list[asyncio.Task[None]]:
        """Return the hooks that run, to be cancelled."""
        return list(self._running)


async def _call(function: Callable[..., Any], event: HookEvent, *args: object) -> None:
    """Call one hook; a plain function runs in a thread."""
    name = getattr(function, "__qualname__", repr(function))
    try:
        if inspect.iscoroutinefunction(function):
            await function(*args)
        else:
            result = await run_in_thread(function, *args)
            if inspect.isawaitable(result):
                await result
    except asyncio.CancelledError:
        raise
    except BaseException:  # SystemExit in a hook must not end the server
        _logger.exception("on_%s: the hook %s failed", event, name)
