"""The manager for scripts and notebooks: the same methods, blocking.

One background thread runs one event loop with the asynchronous manager on it. There is no second
implementation: each method runs the method of the same name there.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from agent_state.codec import Group
from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.metrics import JournalLag
from agent_state.protocols import Incident, Notice, NoticeStream

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_BATCH = 256


def _constructed(
    make: Callable[P, T],
) -> Callable[[Callable[[S, T], None]], Callable[Concatenate[S, P], None]]:
    """An ``__init__`` that takes the arguments of ``make`` and is given the result."""

    def decorate(init: Callable[[S, T], None]) -> Callable[Concatenate[S, P], None]:
        def construct(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, make(*args, **kwargs))

        return construct

    return decorate


def _blocking(
    method: Callable[Concatenate[StatePersistenceManager, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncStatePersistenceManager, P], T]:
    """The blocking method for one that is awaited."""

    @wraps(method)
    def call(self: SyncStatePersistenceManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._call(method(self._manager, *args, **kwargs))

    return call


def _iterated(
    method: Callable[Concatenate[StatePersistenceManager, P], AsyncIterator[T]],
) -> Callable[Concatenate[SyncStatePersistenceManager, P], Iterator[T]]:
    """The blocking method for one that is used with ``async for``."""

    @wraps(method)
    def iterate(
        self: SyncStatePersistenceManager, /, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[T]:
        return self._iterate(method(self._manager, *args, **kwargs), _BATCH)

    return iterate


def _entered(
    method: Callable[Concatenate[StatePersistenceManager, P], AbstractAsyncContextManager[T]],
) -> Callable[Concatenate[SyncStatePersistenceManager, P], AbstractContextManager[T]]:
    """The blocking method for one that is used with ``async with``."""

    @wraps(method)
    def enter(
        self: SyncStatePersistenceManager, /, *args: P.args, **kwargs: P.kwargs
    ) -> AbstractContextManager[T]:
        return self._enter(method(self._manager, *args, **kwargs))

    return enter


class SyncStatePersistenceManager:
    """Takes the arguments of ``StatePersistenceManager``. Use it with ``with``.

    Any thread may call it. A lock belongs to the thread that took it: that thread's saves go
    through, and those of other threads wait.
    """

    @_constructed(StatePersistenceManager)
    def __init__(self, manager: StatePersistenceManager) -> None:
        self._manager = manager
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._holders = threading.local()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Start the thread and open the store. A second call is a no-op."""
        if self._loop is not None:
            self._refuse_child()
            return
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(_serve(started)), name="agent-state-sync", daemon=True
        )
        self._thread.start()
        self._pid = os.getpid()
        self._loop, self._stopped = started.result()
        try:
            self._call(self._manager.open())
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """Close the store and end the thread. A second call is a no-op."""
        if self._loop is not None:
            if self._pid != os.getpid():
                self._loop = None  # the parent's thread closes it
                return
            try:
                self._call(self._manager.close())
            finally:
                self._stop()

    # -- the methods of the asynchronous manager -------------------------------------------

    flush = _blocking(StatePersistenceManager.flush)

    save_agent_state = _blocking(StatePersistenceManager.save_agent_state)
    load_agent_state = _blocking(StatePersistenceManager.load_agent_state)
    save_sleep_state = _blocking(StatePersistenceManager.save_sleep_state)
    load_sleep_state = _blocking(StatePersistenceManager.load_sleep_state)
    save_system_state = _blocking(StatePersistenceManager.save_system_state)
    load_system_state = _blocking(StatePersistenceManager.load_system_state)
    save_task_queue_state = _blocking(StatePersistenceManager.save_task_queue_state)
    load_task_queue_state = _blocking(StatePersistenceManager.load_task_queue_state)
    save_mailbox_state = _blocking(StatePersistenceManager.save_mailbox_state)
    load_mailbox_state = _blocking(StatePersistenceManager.load_mailbox_state)
    list_persisted_agents = _blocking(StatePersistenceManager.list_persisted_agents)

    save = _blocking(StatePersistenceManager.save)
    load = _blocking(StatePersistenceManager.load)
    load_with_revision = _blocking(StatePersistenceManager.load_with_revision)
    delete = _blocking(StatePersistenceManager.delete)
    erase = _blocking(StatePersistenceManager.erase)
    is_removed = _blocking(StatePersistenceManager.is_removed)
    check_merged = _blocking(StatePersistenceManager.check_merged)
    keys = _blocking(StatePersistenceManager.keys)
    scan = _iterated(StatePersistenceManager.scan)
    append = _blocking(StatePersistenceManager.append)
    read_log = _iterated(StatePersistenceManager.read_log)
    read_keyed = _iterated(StatePersistenceManager.read_keyed)

    lock = _entered(StatePersistenceManager.lock)
    edit = _entered(StatePersistenceManager.edit)
    group = _entered(StatePersistenceManager.group)
    commit = _blocking(StatePersistenceManager.commit)
    cleanup_old_states = _blocking(StatePersistenceManager.cleanup_old_states)

    def new_group(self) -> Group:
        """An empty group, for ``commit``."""
        return self._manager.new_group()

    def incidents(self) -> list[Incident]:
        """Damaged and unusable documents that were found since ``open``, and what was done."""
        return self._manager.incidents()

    def journal_lag(self) -> JournalLag | None:
        """How far the files are behind the journal; None for a store without a journal."""
        return self._manager.journal_lag()

    def watch(self) -> Iterator[Notice]:
        """The changes made after this returns. Waits for each one; ``close`` ends it."""
        return self._follow(self._call(self._manager.subscribe()))

    # -- the thread's side -----------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop; in the task that holds this thread's locks, if any."""
        if self._loop is None:
            work.close()
            raise _NotOpenError("the manager is not open; use it with `with`")
        if self._pid != os.getpid():
            work.close()
            self._refuse_child()
        holder: _LockHolder | None = getattr(self._holders, "current", None)
        if holder is not None:
            return holder.run(work)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _refuse_child(self) -> None:
        if self._pid != os.getpid():
            raise AgentStateError(
                "the manager was opened before a fork; open another one in the child"
            )

    def _iterate(self, items: AsyncIterator[T], at_once: int) -> Iterator[T]:
        async def next_items() -> list[T]:
            batch: list[T] = []
            async for item in items:
                batch.append(item)
                if len(batch) == at_once:
                    break
            return batch

        try:
            while batch := self._call(next_items()):
                yield from batch
        finally:
            # This may run in the loop's thread, by garbage collection: it must not wait there.
            if self._loop is not None and isinstance(items, AsyncGenerator | NoticeStream):
                asyncio.run_coroutine_threadsafe(_awaited(items.aclose()), self._loop)

    def _follow(self, notices: NoticeStream) -> Iterator[Notice]:
        with suppress(_NotOpenError, CancelledError):  # another thread closed the manager
            yield from self._iterate(notices, 1)

    @contextmanager
    def _enter(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        with self._holding_locks():
            value = self._call(_awaited(context.__aenter__()))
            try:
                yield value
            except BaseException as error:
                leaving = context.__aexit__(type(error), error, error.__traceback__)
                if not self._call(_awaited(leaving)):
                    raise
            else:
                self._call(_awaited(context.__aexit__(None, None, None)))

    @contextmanager
    def _holding_locks(self) -> Iterator[None]:
        """Run this thread's calls in one task, because a lock belongs to the task that took it."""
        if self._loop is None or getattr(self._holders, "current", None) is not None:
            yield
            return
        self._holders.current = holder = _LockHolder(self._loop)
        try:
            yield
        finally:
            self._holders.current = None
            holder.stop()

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()


class _NotOpenError(RuntimeError):
    """The manager is closed."""


class _LockHolder:
    """A task on the loop that runs the coroutines of one thread, one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Callable[[], Coroutine[Any, Any, None]] | None] = asyncio.Queue()
        self._task = asyncio.run_coroutine_threadsafe(self._serve(), loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = Future()

        async def complete() -> None:
            try:
                done.set_result(await work)
            except BaseException as error:  # noqa: BLE001  # it is the caller's, and raised there
                done.set_exception(error)

        self._put(complete)
        return done.result()

    def stop(self) -> None:
        self._put(None)
        self._task.result()

    def _put(self, job: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, job)

    async def _serve(self) -> None:
        while (job := await self._queue.get()) is not None:
            await job()


async def _serve(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    """Keep the loop running until the event is set; ``asyncio.run`` then ends every task."""
    stopped = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stopped))
    await stopped.wait()


async def _awaited(work: Awaitable[T]) -> T:
    return await work
