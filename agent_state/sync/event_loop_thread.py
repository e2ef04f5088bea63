"""An event loop in a thread of its own, and how other threads use what lives on it.

There is no second implementation: each blocking method runs the asynchronous method of the same
name on the loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar

from agent_state.errors import AgentStateError
from agent_state.protocols import NoticeStream

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")

Job: TypeAlias = Coroutine[Any, Any, None]

_BATCH = 256


class _NotOpenError(AgentStateError, RuntimeError):
    """It is closed."""


class EventLoopThread:
    """An event loop in a thread of its own, on which other threads run coroutines and wait.

    ``name``: what its errors call the object that lives on it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._holders = threading.local()
        self._waiting: set[Future[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pid = os.getpid()

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not stopped, in this process or the one before a fork."""
        return self._loop is not None

    def start(self, opening: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Start the thread, unless it runs, and open what lives on it; stop it if that fails."""
        if self._loop is not None:
            return self.call(opening())
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="agent-state-sync", daemon=True
        )
        self._thread.start()
        self._pid = os.getpid()
        self._loop, self._stopped = started.result()
        try:
            return self.call(opening())
        except BaseException:
            self._stop()
            raise

    def _run(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        try:
            asyncio.run(_serve(started))
        finally:
            for done in list(self._waiting):  # what came as the loop ended
                done.cancel()

    def stop(self, closing: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Close what lives on it, and end the thread. A second call is a no-op."""
        if self._loop is None:
            return
        if self._pid != os.getpid():
            self._loop = None  # the parent's thread closes it
            return
        if problem := self._problem():
            raise problem
        try:
            self.call(closing())
        finally:
            self._stop()

    def call(self, work: Coroutine[Any, Any, T], holder: _LockHolder | None = None) -> T:
        """Run a coroutine on the loop; in the task that holds this thread's locks, if any.

        ``holder``: the task, if it is another thread's.

        Raises ``AgentStateError`` when it is closed, or was opened before a fork, or when the
        caller is the loop itself, which would wait for itself.
        """
        loop, problem = self._loop, self._problem()
        if loop is None or problem is not None:
            work.close()
            raise problem or self._not_open()
        holder = holder or self._holder()
        put = partial(self._put, loop) if holder is None else holder.put
        return self._result(work, put)

    def _result(
        self, work: Coroutine[Any, Any, T], put: Callable[[Callable[[], Job]], object]
    ) -> T:
        done: Future[T] = Future()

        async def complete() -> None:
            with suppress(InvalidStateError):  # the loop ended, and nobody waits
                try:
                    done.set_result(await work)
                except asyncio.CancelledError:
                    done.cancel()
                except BaseException as error:  # noqa: BLE001  # it is the caller's, and raised there
                    done.set_exception(error)

        self._waiting.add(done)
        try:
            put(complete)
        except RuntimeError as error:  # the loop has ended
            work.close()
            raise self._not_open() from error
        try:
            return done.result()
        except CancelledError as error:
            if self._loop is not None:
                raise
            work.close()
            raise self._not_open() from error
        finally:
            self._waiting.discard(done)

    def _put(self, loop: asyncio.AbstractEventLoop, job: Callable[[], Job]) -> None:
        loop.call_soon_threadsafe(self._begin, job)

    def _begin(self, job: Callable[[], Job]) -> None:
        task = asyncio.ensure_future(job())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def do(self, function: Callable[[], T]) -> T:
        """Run a plain function on the loop if it runs, else at once."""
        if self._loop is None or threading.current_thread() is self._thread:
            return function()

        async def work() -> T:
            return function()

        return self.call(work())

    def iterate(self, items: AsyncIterator[T], at_once: int) -> Iterator[T]:
        """Yield what an asynchronous iterator yields, so many at once from the loop."""

        async def next_items() -> list[T]:
            batch: list[T] = []
            async for item in items:
                batch.append(item)
                if len(batch) == at_once:
                    break
            return batch

        try:
            while batch := self.call(next_items()):
                yield from batch
        finally:
            # This may run in the loop's thread, by garbage collection: it must not wait there.
            loop = self._loop if self._pid == os.getpid() else None
            if loop is not None and isinstance(items, AsyncGenerator | NoticeStream):
                with suppress(RuntimeError):  # the loop has ended, and closed it
                    self._put(loop, partial(_awaited, items.aclose))

    def follow(self, items: AsyncIterator[T]) -> Iterator[T]:
        """Yield what is yielded as it comes, until another thread closes what lives here."""
        with suppress(_NotOpenError):
            yield from self.iterate(items, 1)

    @contextmanager
    def enter(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter and leave in one task, with what this thread calls between the two.

        Another thread may leave it.
        """
        with self._holding_locks() as holder:
            value = self.call(_awaited(context.__aenter__), holder)
            try:
                yield value
            except BaseException as error:
                leaving = partial(context.__aexit__, type(error), error, error.__traceback__)
                if not self.call(_awaited(leaving), holder):
                    raise
            else:
                self.call(_awaited(partial(context.__aexit__, None, None, None)), holder)

    def _holder(self) -> _LockHolder | None:
        """The task that holds this thread's locks."""
        holder: _LockHolder | None = getattr(self._holders, "current", None)
        return holder if holder is not None and not holder.stopped else None

    @contextmanager
    def _holding_locks(self) -> Iterator[_LockHolder | None]:
        """Run this thread's calls in one task, because a lock belongs to the task that took it."""
        if self._loop is None or self._holder() is not None:
            yield self._holder()
            return
        if problem := self._problem():
            raise problem
        try:
            self._holders.current = holder = _LockHolder(self._loop)
        except RuntimeError as error:  # the loop has ended
            raise self._not_open() from error
        try:
            yield holder
        finally:
            holder.stopped = True  # here, as this may be another thread
            if self._pid == os.getpid():
                holder.stop()

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def _not_open(self) -> _NotOpenError:
        return _NotOpenError(f"the {self._name} is not open; use it with `with`")

    def _problem(self) -> AgentStateError | None:
        if self._loop is not None and self._pid != os.getpid():
            return AgentStateError(
                f"the {self._name} was opened before a fork; open another one in the child"
            )
        if threading.current_thread() is self._thread:
            return AgentStateError(
                f"the {self._name} would wait for itself: in a coroutine on its own event loop, "
                "await the asynchronous one"
            )
        return None


class _LockHolder:
    """A task on the loop that runs the coroutines of one thread, one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Callable[[], Job] | None] = asyncio.Queue()
        self._task: asyncio.Task[None]
        self.stopped = False
        loop.call_soon_threadsafe(self._begin)

    def put(self, job: Callable[[], Job] | None) -> None:
        self._loop.call_soon_threadsafe(self._take, job)

    def _take(self, job: Callable[[], Job] | None) -> None:
        if self._task.done() and job is not None:  # of a thread that had just seen it running
            self._begin()
        self._queue.put_nowait(job)

    def stop(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the task with it
            self.put(None)

    def _begin(self) -> None:
        self._task = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        while (job := await self._queue.get()) is not None or not self._queue.empty():
            if job is not None:
                await job()


async def _serve(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    """Keep the loop running until the event is set; ``asyncio.run`` then ends every task."""
    stopped = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stopped))
    await stopped.wait()


async def _awaited(begin: Callable[[], Awaitable[T]]) -> T:
    return await begin()


# -- views ---------------------------------------------------------------------------------------


class BlockingView(Generic[A]):
    """An asynchronous object as other threads use it. A subclass names the methods."""

    def __init__(self, thread: EventLoopThread, viewed: A) -> None:
        self.thread = thread
        self.viewed = viewed


def blocking(
    method: Callable[Concatenate[A, P], Awaitable[T]],
) -> Callable[Concatenate[BlockingView[A], P], T]:
    """The blocking method for one that is awaited."""

    @wraps(method)
    def call(self: BlockingView[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.thread.call(_awaited(partial(method, self.viewed, *args, **kwargs)))

    return call


def plain(method: Callable[Concatenate[A, P], T]) -> Callable[Concatenate[BlockingView[A], P], T]:
    """The method itself, run on the loop, where nothing changes meanwhile."""

    @wraps(method)
    def call(self: BlockingView[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.thread.do(partial(method, self.viewed, *args, **kwargs))

    return call


def iterated(
    method: Callable[Concatenate[A, P], AsyncIterator[T]],
) -> Callable[Concatenate[BlockingView[A], P], Iterator[T]]:
    """The blocking method for one that is used with ``async for``."""

    @wraps(method)
    def iterate(self: BlockingView[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.thread.iterate(method(self.viewed, *args, **kwargs), _BATCH)

    return iterate


def followed(
    method: Callable[Concatenate[A, P], AsyncIterator[T]],
) -> Callable[Concatenate[BlockingView[A], P], Iterator[T]]:
    """The same for one that yields what happens, and ends when its object is closed."""

    @wraps(method)
    def follow(self: BlockingView[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.thread.follow(method(self.viewed, *args, **kwargs))

    return follow


def entered(
    method: Callable[Concatenate[A, P], AbstractAsyncContextManager[T]],
) -> Callable[Concatenate[BlockingView[A], P], AbstractContextManager[T]]:
    """The blocking method for one that is used with ``async with``."""

    @wraps(method)
    def enter(
        self: BlockingView[A], /, *args: P.args, **kwargs: P.kwargs
    ) -> AbstractContextManager[T]:
        return self.thread.enter(method(self.viewed, *args, **kwargs))

    return enter
