"""File work off the event loop: a pool of the store's own, and an outcome that is awaited."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_logger = logging.getLogger("agent_state.storage")


class UncancellableFuture(asyncio.Future[T]):
    """The outcome of a change that has been handed over.

    It cannot be cancelled: the change happens all the same. ``asyncio`` lets a task whose
    future refuses wait on, and raises ``CancelledError`` in it once the outcome is there. So a
    lock held around the ``await`` is held until the work has really ended, and no save that
    timed out can land on top of a newer one.
    """

    _abandoned = False

    def cancel(self, msg: object = None) -> bool:
        self._abandoned = True
        return False

    def fail(self, error: BaseException) -> None:
        """Settle with an error; when its caller was cancelled, the log is where it is told."""
        self.set_exception(error)
        if self._abandoned:
            self.exception()
            _logger.error("a change whose caller was cancelled failed: %s", error)


async def shielded(work: Coroutine[Any, Any, T]) -> T:
    """Await what must not stay half done: a cancelled caller waits for its end all the same."""
    ended: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())

    def settle(task: asyncio.Task[T]) -> None:
        if task.cancelled():  # with its loop, which ends
            ended.fail(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            ended.fail(error)
        else:
            ended.set_result(task.result())

    asyncio.create_task(work).add_done_callback(settle)
    return await ended


class Executor:
    """Threads for one store.

    Not the loop's default pool: there, threads that wait for a lock can take every place and
    starve the one that would let it go.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"agent-state-{name}")
        self._outstanding = 0
        self._idle: UncancellableFuture[None] | None = None

    def run(self, work: Callable[[], T]) -> UncancellableFuture[T]:
        """Start the work in a thread at once; await what is returned for its outcome."""
        loop = asyncio.get_running_loop()
        outcome: UncancellableFuture[T] = UncancellableFuture(loop=loop)

        def settle(result: T | None, error: BaseException | None) -> None:
            self._outstanding -= 1
            if self._idle is not None and not self._outstanding:
                self._idle.set_result(None)
                self._idle = None
            if error is not None:
                outcome.fail(error)
            else:
                outcome.set_result(result)  # type: ignore[arg-type]  # T when there is no error

        def call() -> None:
            try:
                result, error = work(), None
            except BaseException as raised:  # noqa: BLE001  # carried to whoever awaits
                result, error = None, raised
            loop.call_soon_threadsafe(settle, result, error)

        self._executor.submit(call)
        self._outstanding += 1
        return outcome

    async def ended(self) -> None:
        """Wait until everything that was started has its outcome."""
        if self._outstanding:
            if self._idle is None:
                self._idle = UncancellableFuture(loop=asyncio.get_running_loop())
            await self._idle

    def close(self) -> None:
        """Wait for what runs, then let the threads go. Blocks; ``ended`` first does not."""
        self._executor.shutdown(wait=True)
