"""Blocking work off the event loop: threads of the store's own, and batches of many callers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar
from weakref import WeakSet

from agent_state.errors import AgentStateError
from agent_state.storage.worker_threads import WorkerThreads, submitted

T = TypeVar("T")
R = TypeVar("R")
Args = ParamSpec("Args")

TEARDOWN_SECONDS = 2.0
"""How long a loop that ends waits for the outcome of a change."""

LOOK_SECONDS = 1.0
"""How often who waits for an end looks for outcomes that a Ctrl-C kept from being set."""

_logger = logging.getLogger("agent_state.storage")


class UncancellableFuture(asyncio.Future[T]):
    """The outcome of a submitted change, which happens even if its caller is cancelled.

    It cannot be cancelled. ``asyncio`` lets a task whose future refuses wait on, and raises
    ``CancelledError`` in it once the outcome is known. So a lock held around the ``await`` is held
    until the work has ended, and no save that timed out can land on top of a newer one.

    When ``asyncio.run`` cancels what is left, it waits no longer than ``TEARDOWN_SECONDS``: a
    second Ctrl-C raises ``KeyboardInterrupt`` anywhere, also where the outcome was to be set.
    """

    _abandoned = False
    settle: Callable[[], None] | None = None
    """Takes the outcome if it is known; for who waits after a Ctrl-C kept it from being set."""

    def cancel(self, msg: object = None) -> bool:
        self._abandoned = True
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.get_loop().call_later(TEARDOWN_SECONDS, super().cancel)
        return False

    def fail(self, error: BaseException) -> None:
        """Set an exception; if the caller was cancelled, log it, as nothing else reports it."""
        self.set_exception(error)
        if self._abandoned:
            self.exception()
            _logger.error("a change whose caller was cancelled failed: %s", error)

    def take(self, task: asyncio.Task[T]) -> None:
        """Set the outcome of a task that has ended; a no-op if nobody waits any more."""
        if self.done():
            return
        if task.cancelled():  # with its loop, which ends
            self.fail(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.fail(error)
        else:
            self.set_result(task.result())


async def shielded(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` to completion even if the caller is cancelled.

    ``CancelledError`` is raised in the caller afterwards.
    """
    ended: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
    asyncio.create_task(work).add_done_callback(ended.take)
    return await ended


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended; raises what it raised, if it failed.

    It looks once a second as well: a Ctrl-C may keep the loop from waking who waits.
    """
    task.cancel()
    while not task.done():
        await asyncio.wait((task,), timeout=LOOK_SECONDS)
    if not task.cancelled():
        task.result()


class Executor:
    """Threads for one store.

    Not the loop's default pool: there, threads that wait for a lock can take every place and
    starve the one that would release it.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.threads = WorkerThreads(f"agent-state-{name}", threads)
        self._outstanding: set[UncancellableFuture[Any]] = set()

    def run(
        self, work: Callable[Args, T], *args: Args.args, **kwargs: Args.kwargs
    ) -> UncancellableFuture[T]:
        """Start ``work(...)`` in a thread at once; await the returned future for its outcome."""
        loop = asyncio.get_running_loop()
        outcome: UncancellableFuture[T] = UncancellableFuture(loop=loop)
        results: list[T] = []
        errors: list[BaseException] = []

        def settle() -> None:
            """Take the outcome of the thread, if it has ended."""
            if not outcome.done():
                if errors:
                    outcome.fail(errors[0])
                elif results:
                    outcome.set_result(results[0])
            if outcome.done():
                self._outstanding.discard(outcome)

        def job() -> None:
            try:
                results.append(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001  # raised where it is awaited
                errors.append(error)
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(settle)

        outcome.settle = settle
        self._outstanding.add(outcome)
        _started.add(outcome)
        self.threads.put(job)
        return outcome

    async def ended(self) -> None:
        """Wait until everything that was started has its outcome."""
        while self._outstanding:
            for outcome in list(self._outstanding):
                _settle(outcome)
            if self._outstanding:
                await asyncio.wait(self._outstanding, timeout=LOOK_SECONDS)

    def close(self) -> None:
        """Wait for running work, then end the threads. Blocks; ``ended`` first does not."""
        self.threads.shutdown(wait=True)


async def run_in_thread(function: Callable[Args, T], *args: Args.args, **kwargs: Args.kwargs) -> T:
    """Do as ``asyncio.to_thread``; a ``FakeClock`` waits for it."""
    work = partial(copy_context().run, function, *args, **kwargs)
    outcome = asyncio.get_running_loop().run_in_executor(None, work)
    _started.add(outcome)
    return await outcome


_started: WeakSet[asyncio.Future[Any]] = WeakSet()


def threads_are_busy() -> bool:
    """Whether a thread works for the running event loop, or reads a file for any loop."""
    if not _started and not submitted:
        return False  # the usual answer to a clock that asks a million times
    loop = asyncio.get_running_loop()
    _started.difference_update([each for each in _started.copy() if each.done()])
    submitted.difference_update([each for each in submitted.copy() if each.done()])
    return bool(submitted) or any(each.get_loop() is loop for each in _started.copy())


def _settle(outcome: asyncio.Future[Any]) -> None:
    if isinstance(outcome, UncancellableFuture) and outcome.settle is not None:
        outcome.settle()


Retry: TypeAlias = Callable[[list[T], BaseException], Awaitable[Sequence[R | Exception]] | None]


class Batcher(Generic[T, R]):
    """Collects items of many tasks and works on them a batch at a time.

    Items that are submitted in one turn of the event loop share a batch; items that arrive while
    ``workers`` batches are running wait for the next one, in order.

    ``work(items)`` starts the work on a batch and returns its awaitable, such as
    ``Executor.run(...)`` or a coroutine. The awaited value has a result, or the exception to raise,
    for each item in order; an exception that it raises is every item's. Where a batch is run by a
    coroutine, the end of the loop (``asyncio.run``) cancels it; a future of ``Executor`` continues.

    ``max_items`` and ``max_bytes`` limit a batch; ``size_of(item)`` gives the bytes of an item, and
    one larger item is a batch by itself. With several ``workers`` the waiting items are shared
    out evenly.

    ``finished(items, error)`` is called before the callers are woken: ``error`` is None, or the
    exception of the batch. ``retry(items, error)`` may start a failed batch once more, by returning
    an awaitable like ``work``'s; it returns None to let it fail.

    ``ordered``: an item may build on those before it, so a failed batch fails all that wait too.
    ``cancellable``: a cancelled caller stops waiting at once. Otherwise it waits for the outcome
    and is cancelled then, see ``UncancellableFuture``. The work is done in both cases.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Awaitable[Sequence[R | Exception]]],
        *,
        max_items: int = sys.maxsize,
        max_bytes: int = sys.maxsize,
        size_of: Callable[[T], int] | None = None,
        workers: int = 1,
        finished: Callable[[Sequence[T], BaseException | None], None] | None = None,
        retry: Retry[T, R] | None = None,
        ordered: bool = False,
        cancellable: bool = False,
    ) -> None:
        self._work = work
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._workers = workers
        self._finished = finished
        self._retry = retry
        self._ordered = ordered
        self._future: type[asyncio.Future[Any]] = (
            asyncio.Future if cancellable else UncancellableFuture
        )
        self._items: list[T] = []
        self._outcomes: list[asyncio.Future[R]] = []
        self._running: dict[asyncio.Future[Sequence[R | Exception]], Callable[..., None]] = {}
        self._scheduled = False
        self._closed = False

    def submit(self, item: T) -> asyncio.Future[R]:
        """Queue an item; await the returned future for its outcome.

        Raises ``AgentStateError`` after ``close``.
        """
        if self._closed:
            raise AgentStateError("it is closed")
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[R] = self._future(loop=loop)
        self._items.append(item)
        self._outcomes.append(outcome)
        if not self._scheduled and len(self._running) < self._workers:
            self._scheduled = True
            loop.call_soon(self._start)
        return outcome

    async def close(self) -> None:
        """Wait as ``ended``, and refuse what is submitted from then on."""
        await self.ended()
        self._closed = True

    async def ended(self) -> None:
        """Wait until everything submitted has its outcome."""
        while self._items or self._running:
            for running, end in list(self._running.items()):
                _settle(running)
                if running.done():
                    end(running)  # after a Ctrl-C nobody else may do it
            if self._running:
                await asyncio.wait(self._running, timeout=LOOK_SECONDS)
                continue
            await asyncio.sleep(0)
            if self._items and not self._running:
                self._start()

    def _start(self) -> None:
        self._scheduled = False
        while self._items and (idle := self._workers - len(self._running)) > 0:
            count = min(-(-len(self._items) // idle), self._max_items)
            if self._size_of is not None:
                count = self._count_within_bytes(count, self._size_of)
            items, self._items = self._items[:count], self._items[count:]
            outcomes, self._outcomes = self._outcomes[:count], self._outcomes[count:]
            self._run(self._work(items), items, outcomes, self._retry)

    def _run(
        self,
        work: Awaitable[Sequence[R | Exception]],
        items: list[T],
        outcomes: list[asyncio.Future[R]],
        retry: Retry[T, R] | None,
    ) -> None:
        running = asyncio.ensure_future(work)
        self._running[running] = end = partial(self._ended, items, outcomes, retry)
        running.add_done_callback(end)

    def _count_within_bytes(self, count: int, size_of: Callable[[T], int]) -> int:
        size = 0
        for index, item in enumerate(self._items[:count]):
            size += size_of(item)
            if index and size > self._max_bytes:
                return index
        return count

    def _ended(
        self,
        items: list[T],
        outcomes: list[asyncio.Future[R]],
        retry: Retry[T, R] | None,
        running: asyncio.Future[Sequence[R | Exception]],
    ) -> None:
        if self._running.pop(running, None) is None:
            return
        error = asyncio.CancelledError() if running.cancelled() else running.exception()
        if error is not None and retry is not None and (again := retry(items, error)) is not None:
            self._run(again, items, outcomes, None)
            return
        if error is not None and self._ordered:
            items, self._items = items + self._items, []
            outcomes, self._outcomes = outcomes + self._outcomes, []
        if self._finished is not None:
            self._finished(items, error)
        results = running.result() if error is None else [error] * len(outcomes)
        for outcome, result in zip(outcomes, results, strict=True):
            if outcome.done():
                continue  # its caller was cancelled
            if not isinstance(result, BaseException):
                outcome.set_result(result)
            elif isinstance(outcome, UncancellableFuture):
                outcome.fail(result)
            else:
                outcome.set_exception(result)
        if self._workers > 1:
            self._start()  # at once, or two workers that end together would share out a batch
        elif self._items and not self._scheduled:
            # Not at once: the callers woken above may have more for the next batch.
            self._scheduled = True
            outcomes[0].get_loop().call_soon(self._start)
