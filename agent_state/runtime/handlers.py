"""The handlers of tasks: by name and by agent type, how they are run, and where they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypedDict

from agent_state.clock import check_count, is_number
from agent_state.errors import StateValidationError
from agent_state.models import PRIORITIES, Priority, Task
from agent_state.runtime.payloads import HandlerSignature, as_object
from agent_state.runtime.rate_limits import RateLimit
from agent_state.runtime.results import as_json
from agent_state.runtime.transitions import RetryPolicy

WARN_AFTER_SECONDS = 300.0
ON_MAIL = "on_mail"
"""The name of the tasks that handle messages."""


class HandlerOptions(TypedDict, total=False):
    """How the tasks of one handler are run."""

    warn_after_seconds: float
    """A handler that runs longer is reported in the log, with its stack; again after twice the
    time. 300 if not given."""
    retry: RetryPolicy
    """How long its failed tasks wait, and which errors end one at once; the runtime's if not
    given."""
    timeout_seconds: float
    """How long one attempt may take, where the task does not say; any time if not given."""
    max_attempts: int
    """After how many failed attempts its tasks are ``dead``, unless the caller says; else 3."""
    priority: Priority
    """The priority of its tasks, unless the caller gives one; else ``normal``."""
    concurrency: int
    """How many of its attempts may run at the same time in one runtime; any number if not given."""
    rate_limits: Sequence[RateLimit]
    """The limits of which each attempt uses one, before it begins."""


def check_options(options: HandlerOptions) -> None:
    """Raise ``StateValidationError`` for an option that is out of range."""
    for name in ("warn_after_seconds", "timeout_seconds"):
        value = options.get(name, 1)
        if not (is_number(value) and 0 < value < math.inf):
            raise StateValidationError(f"{name} is positive, not {value!r}")
    for name in ("max_attempts", "concurrency"):
        check_count(name, options.get(name, 1), 1)
    retry, limits = options.get("retry", RetryPolicy()), options.get("rate_limits", ())
    if not isinstance(retry, RetryPolicy):
        raise StateValidationError(f"retry is a RetryPolicy, not {retry!r}")
    if isinstance(limits, RateLimit) or not all(isinstance(each, RateLimit) for each in limits):
        raise StateValidationError(f"rate_limits are a list of RateLimit, not {limits!r}")
    priority = options.get("priority", "normal")
    if priority not in PRIORITIES:
        known = ", ".join(PRIORITIES)
        raise StateValidationError(f"priority {priority!r} is not one of {known}")


@dataclass(frozen=True, slots=True)
class RegisteredHandler:
    """The function that does tasks, and how it is run."""

    function: Callable[..., Awaitable[object]]
    signature: HandlerSignature | None = None
    """What a handler by name takes and returns; None: it takes the task and returns JSON."""
    warn_after_seconds: float = WARN_AFTER_SECONDS
    retry: RetryPolicy | None = None
    timeout_seconds: float | None = None
    max_attempts: int | None = None
    priority: Priority | None = None
    concurrency: int | None = None
    rate_limits: Sequence[RateLimit] = ()

    takes_mail: bool = False
    """Whether it is given messages."""

    @property
    def is_limited(self) -> bool:
        """Whether an attempt may have to wait before it begins."""
        return self.concurrency is not None or bool(self.rate_limits)

    def arguments(self, task: Task) -> tuple[Any, ...]:
        """Return what the function is given after its context.

        Raises ``InvalidPayloadError``.
        """
        return (task,) if self.signature is None else self.signature.arguments(task)

    def knows_version(self, task: Task) -> bool:
        """Whether it can read the task's payload, which a newer deploy may have queued."""
        return self.signature is None or self.signature.knows_version(task)

    @property
    def payload_version(self) -> int:
        """The version of the layout of its payloads."""
        return 1 if self.signature is None else self.signature.version

    def payload_to_stored(self, payload: object) -> dict[str, Any]:
        """Return a payload as it is stored. Raises ``InvalidPayloadError``."""
        return as_object(payload) if self.signature is None else self.signature.to_stored(payload)

    def result_from_json(self, stored: Any) -> Any:
        """Return a stored result as its type. Raises ``StateValidationError``."""
        return stored if self.signature is None else self.signature.result_from_json(stored)

    def result_to_json(self, result: object) -> Any:
        """Return what is stored of a result. Raises ``StateValidationError``."""
        return as_json(result) if self.signature is None else self.signature.result_to_json(result)


class HandlerRegistry:
    """The handlers of one runtime: by agent type and task name, and by agent type alone."""

    def __init__(self) -> None:
        self._handlers: dict[str, RegisteredHandler] = {}
        self._named: dict[str, dict[str, RegisteredHandler]] = {}

    def __contains__(self, agent_type: object) -> bool:
        """Whether agents of the type have a handler for some tasks at least."""
        return agent_type in self._handlers or agent_type in self._named

    def get(self, agent_type: str | None, name: str) -> RegisteredHandler | None:
        """Return the handler of such tasks of an agent type; None if there is none."""
        named = self._named.get(agent_type or "", {})
        return named.get(name) or self._handlers.get(agent_type or "")

    def handles_mail(self, agent_type: str | None) -> bool:
        """Whether the agent type has a handler for its mail."""
        handler = self._named.get(agent_type or "", {}).get(ON_MAIL)
        return handler is not None and handler.takes_mail

    def add(self, agent_type: str, handler: RegisteredHandler, *, name: str | None = None) -> None:
        """Register a handler of all tasks of an agent type, or of those with that name.

        Raises ``ValueError`` when these have one, ``TypeError`` for a plain function, and
        ``StateValidationError`` when another handler has another rate limit of the same name.
        """
        handlers, key, what = self._handlers, agent_type, f"agent type {agent_type!r}"
        if name is not None:
            handlers, key = self._named.setdefault(agent_type, {}), name
            what = f"task {name!r} of {what}"
        if key in handlers:
            raise ValueError(f"{what} has a handler already")
        if not inspect.iscoroutinefunction(handler.function):
            raise TypeError(f"the handler of {what} must be an async function")
        for _, other, _ in self.registered():
            check_same_limits(*other.rate_limits, *handler.rate_limits)
        handlers[key] = handler

    def registered(self) -> Iterator[tuple[str, RegisteredHandler, str | None]]:
        """Every handler: its agent type, itself, and the name of its tasks; None for any name."""
        for agent_type, handler in self._handlers.items():
            yield agent_type, handler, None
        for agent_type, named in self._named.items():
            for name, handler in named.items():
                yield agent_type, handler, name

    @property
    def shortest_warning_seconds(self) -> float:
        """The shortest time after which a running handler is reported."""
        every = chain(self._handlers.values(), *(each.values() for each in self._named.values()))
        times = (handler.warn_after_seconds for handler in every)
        return min(times, default=WARN_AFTER_SECONDS)

    def missing(self, agent_type: str | None, name: str | None = None) -> str:
        """Say, for a log, that a type has no handler, and which have one."""
        names = self._named.get(agent_type or "")
        if name is not None and names:
            what, known = f"task {name!r} of agent type {agent_type!r}", [*names]
        else:
            what, known = f"agent type {agent_type!r}", [*{*self._handlers, *self._named}]
        registered = ", ".join(sorted(map(repr, known))) or "none"
        return f"no handler for {what} is registered (registered: {registered})"


def check_same_limits(*limits: RateLimit) -> None:
    """Raise ``StateValidationError`` unless limits of one name are the same."""
    by_name = {limit.name: limit for limit in limits}
    for limit in limits:
        if by_name[limit.name] != limit:
            raise StateValidationError(f"there are two rate limits named {limit.name!r}")
