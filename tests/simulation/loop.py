"""An event loop whose time passes only when nothing is left to do, and the clocks that show it.

So an hour of timeouts and retries is over in milliseconds, and the order of everything depends on
the program alone: there is no thread, no socket and no real time.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")

MOST_TURNS = 20_000
"""Turns of the event loop in one instant after which something spins; hundreds are usual."""
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class StalledError(Exception):
    """Nothing is scheduled any more, and what is waited for cannot happen."""


class _Idle:
    """In the place of a selector: waiting for a time makes it that time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.turns = 0
        """Turns of the loop since time has passed."""

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise StalledError("every task waits for another one")
        self.turns += 1
        if timeout > 0:
            self._loop.now += timeout
            self.turns = 0
        elif self.turns > MOST_TURNS:
            raise StalledError("something goes round and round, and time does not pass")
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """``now``: the seconds that have passed."""

    def __init__(self, now: float = 0.0) -> None:
        super().__init__()
        self.now = now
        self._selector = _Idle(self)
        self._clock_resolution = 1e-6  # what the base class takes for simultaneous

    def time(self) -> float:
        return self.now

    def _process_events(self, event_list: list[Any]) -> None:
        """There is no file descriptor to have an event."""

    def _write_to_self(self) -> None:
        """There is no other thread to wake this one."""

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Call the function in a later turn of the loop, in its only thread."""
        outcome: asyncio.Future[T] = self.create_future()

        def call() -> None:
            if outcome.cancelled():
                return
            try:
                result = func(*args)
            except BaseException as error:  # noqa: BLE001  # carried to the caller that awaits
                outcome.set_exception(error)
            else:
                outcome.set_result(result)

        self.call_soon(call, context=contextvars.copy_context())
        return outcome

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; then cancel all others, and close the loop."""
        try:
            return self.run_until_complete(main)
        finally:
            for _ in range(100):
                left = asyncio.all_tasks(self)
                if not left:
                    break
                for task in left:
                    task.cancel()
                self._selector.turns = 0
                self.run_until_complete(_turns(4))
                for task in left:
                    if task.done() and not task.cancelled():
                        task.exception()
            self.run_until_complete(self.shutdown_asyncgens())
            self.close()


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class InlineThreads:
    """In the place of ``WorkerThreads``: does the work at once, in the caller's thread."""

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit

    def put(self, job: Callable[[], None]) -> None:
        job()

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        outcome: Future[T] = Future()
        try:
            outcome.set_result(work(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  # carried to the caller
            outcome.set_exception(error)
        return outcome

    def shutdown(self, *, wait: bool = True) -> None:
        """No thread is left to end."""


class LoopClock:
    """A ``Clock`` that shows the time of the running ``VirtualLoop``."""

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))
