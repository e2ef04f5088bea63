"""One way into a state for code that is called from anywhere: other frameworks, threads, loops.

A store belongs to one event loop. A framework calls its adapter from several loops, from threads
without a loop, and often never says when it has finished. ``StateAccess`` runs each piece of work
on the loop that the state belongs to, whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Durability, StateStore
from agent_state.storage.executor import UncancellableFuture, shielded

T = TypeVar("T")

StateLocation: TypeAlias = str | PathLike[str] | StatePersistenceManager | StateStore
"""A state directory, a manager, or a store."""
Work: TypeAlias = Callable[[StatePersistenceManager], Coroutine[Any, Any, T]]
"""What is done with the manager, on its loop."""


class StateAccess:
    """Runs work on a state, for callers on any event loop and in any thread.

    ``state``: a directory, a ``StatePersistenceManager`` or a ``StateStore``. A directory is opened
    at the first use, in a thread of its own, by one manager for all accesses of this process to it,
    and closed when the last of them is; ``exclusive`` and ``durability`` are as for
    ``StatePersistenceManager``. A manager or a store is
    the caller's: it is opened if it is not open, stays open, and is used on the loop that runs when
    the access is made, or else on the first that runs when it is used.

    Use it with ``with``, ``async with``, or neither. After ``close`` the next use opens it again.
    """

    def __init__(
        self, state: StateLocation, *, exclusive: bool = False, durability: Durability | None = None
    ) -> None:
        self._home: _LoopCalls | None = None
        self._opened: StatePersistenceManager | None = None
        self._turn: asyncio.Lock | None = None
        """Only one task opens the state."""
        self._pid = os.getpid()
        self._opening = threading.Lock()
        self._closer: weakref.finalize[..., Any] | None = None
        if isinstance(state, str | PathLike):
            self._directory: _Settings | None = (str(Path(state).absolute()), exclusive, durability)
            return
        if exclusive or durability is not None:
            raise TypeError("exclusive= and durability= belong to the store that is given")
        if isinstance(state, StatePersistenceManager):
            given = state
        elif isinstance(state, StateStore):
            given = StatePersistenceManager(store=state)
        else:
            raise TypeError(
                f"a state is a directory, a manager or a store, not {type(state).__name__}"
            )
        self._directory = None
        self._given = given
        self._home = _here()

    # -- doing work --------------------------------------------------------------------------

    async def run(self, work: Work[T]) -> T:
        """The result of ``work(manager)``. Raises what it raises.

        If the caller is cancelled while it runs on another loop, its outcome is awaited first.
        """
        here = _calls_on(asyncio.get_running_loop())
        home = self._home_for(here)
        if home.loop is here.loop:
            return await self._work(work)
        ended: UncancellableFuture[T] = UncancellableFuture(loop=here.loop)

        def give(task: asyncio.Task[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop has ended: nobody waits
                here.add(partial(ended.take, task))

        context, tasks = copy_context(), home.tasks

        def start() -> None:
            task = home.loop.create_task(self._work(work), context=context)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(give)

        with _refused_if_ended():
            home.add(start)
        return await ended

    def run_blocking(self, work: Work[T]) -> T:
        """``run`` for a thread. On the state's own loop it raises ``AgentStateError``."""
        here = _here()
        home = self._home_for(here if self._directory is None else None)
        if here is not None and home.loop is here.loop:
            raise AgentStateError(
                "a blocking call on the event loop that the state belongs to would never return; "
                "call the async method, or give a directory instead of an open manager"
            )
        task = self._work(work)
        try:
            with _refused_if_ended():
                submitted = asyncio.run_coroutine_threadsafe(task, home.loop)
        except AgentStateError:
            task.close()
            raise
        return submitted.result()

    async def _work(self, work: Work[T]) -> T:
        manager = self._opened
        if manager is None or self._pid != os.getpid():
            manager = await self._open()
        return await work(manager)

    def _home_for(self, here: _LoopCalls | None) -> _LoopCalls:
        """The loop of the state; a given state's whose loop has ended moves to the caller's."""
        if self._directory is not None:
            return _background.calls()
        with self._opening:
            if self._home is None or (here is not None and self._home.loop.is_closed()):
                self._home = here or _background.calls()
                self._opened = self._turn = None
            return self._home

    # -- life ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the state now. A second call is a no-op."""
        await self.run(_nothing)

    async def close(self) -> None:
        """Close a state that was opened from its directory; a given one stays open."""
        if self._directory is not None and self._opened is not None:
            closing = asyncio.run_coroutine_threadsafe(self._close(), _background.calls().loop)
            await shielded(_outcome(closing))

    def open_blocking(self) -> None:
        """``open`` for a thread."""
        self.run_blocking(_nothing)

    def close_blocking(self) -> None:
        """``close`` for a thread."""
        if self._directory is not None and self._opened is not None:
            asyncio.run_coroutine_threadsafe(self._close(), _background.calls().loop).result()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        self.open_blocking()
        return self

    def __exit__(self, *_: object) -> None:
        self.close_blocking()

    async def _open(self) -> StatePersistenceManager:
        if self._pid != os.getpid():  # a child made by fork: the threads are its parent's
            self._pid, self._opened, self._turn = os.getpid(), None, None
        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            if self._opened is None:
                if self._directory is None:
                    await self._given.open()
                    self._opened = self._given
                else:
                    self._opened = await _directories.take(self._directory)
                    self._closer = weakref.finalize(self, _give_soon, self._directory)
                    self._closer.atexit = False  # what was acknowledged is durable
            return self._opened

    async def _close(self) -> None:
        self._opened = None
        closer, self._closer = self._closer, None
        if closer is not None and closer.detach() and self._directory is not None:
            await _directories.give(self._directory)


def as_segment(text: str) -> str:
    """A segment of a key for any text, also an empty one; no two texts have the same.

    Text of NUL characters alone gets one more, because a segment may not be empty.
    """
    return text if text.strip("\0") else text + "\0"


def from_segment(segment: str) -> str:
    """The text that ``as_segment`` was given."""
    return segment if segment.strip("\0") else segment[:-1]


async def _nothing(_: StatePersistenceManager) -> None:
    """Opening is all there is to do."""


async def _outcome(work: Future[T]) -> T:
    return await asyncio.wrap_future(work)


class _LoopCalls:
    """Calls on a loop from other threads, which wake it once, however many they are.

    Each wake-up is a system call at which the interpreter changes threads: a hundred callers that
    waited for one commit would pay more for theirs than for the commit.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.tasks: set[asyncio.Task[Any]] = set()
        """Those that were started by calls; a loop keeps none alive."""
        self._waiting: deque[Callable[[], None]] = deque()
        self._woken = False

    def add(self, call: Callable[[], None]) -> None:
        """Make a call soon, in order. Raises ``RuntimeError`` if the loop has ended."""
        if self.loop.is_closed():
            raise RuntimeError("the event loop has ended")
        self._waiting.append(call)
        if not self._woken:  # said after the call was added, and unsaid before any is made
            self._woken = True
            self.loop.call_soon_threadsafe(self._make)

    def _make(self) -> None:
        self._woken = False
        for _ in range(len(self._waiting)):
            self._waiting.popleft()()


class _Here(threading.local):
    """What belongs to a thread."""

    calls: _LoopCalls | None = None
    """Those of the loop that ran in it last."""


def _here() -> _LoopCalls | None:
    """The calls of the running loop; None if none runs."""
    try:
        return _calls_on(asyncio.get_running_loop())
    except RuntimeError:
        return None


def _calls_on(loop: asyncio.AbstractEventLoop) -> _LoopCalls:
    """The calls of the loop that runs in this thread."""
    if _thread.calls is None or _thread.calls.loop is not loop:
        _thread.calls = _LoopCalls(loop)
    return _thread.calls


@contextlib.contextmanager
def _refused_if_ended() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise AgentStateError("the event loop that the state belongs to has ended") from error


def _give_soon(directory: _Settings) -> None:
    """Give back what a forgotten access had. Waits for nothing: it may be called anywhere."""
    giving = _directories.give(directory)
    try:
        asyncio.run_coroutine_threadsafe(giving, _background.calls().loop)
    except RuntimeError:  # the interpreter ends
        giving.close()


_Settings: TypeAlias = tuple[str, bool, Durability | None]
"""A directory, and how it is opened."""


class _Directories:
    """The managers of the directories that accesses have opened, on the background loop."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._turns: dict[_Settings, asyncio.Lock] = {}
        self._managers: dict[_Settings, StatePersistenceManager] = {}
        self._users: dict[_Settings, int] = {}

    async def take(self, directory: _Settings) -> StatePersistenceManager:
        """The open manager of a directory, for one more user."""
        if self._pid != os.getpid():  # a child made by fork has none of its parent's threads
            self.__init__()  # type: ignore[misc]  # begins anew, as after a start
        path, exclusive, durability = directory
        async with self._turns.setdefault(directory, asyncio.Lock()):
            manager = self._managers.get(directory)
            if manager is None:
                manager = StatePersistenceManager(path, exclusive=exclusive, durability=durability)
                await manager.open()
                self._managers[directory] = manager
            self._users[directory] = self._users.get(directory, 0) + 1
            return manager

    async def give(self, directory: _Settings) -> None:
        """Note that a user has gone; the last one closes the manager."""
        if self._pid != os.getpid():
            return
        async with self._turns[directory]:
            self._users[directory] -= 1
            if self._users[directory] == 0:
                await self._managers.pop(directory).close()


class _BackgroundLoop:
    """One event loop in one thread, for all directories that accesses open in this process."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._calls: _LoopCalls | None = None
        self._pid = 0  # a child made by fork has the loop, and no thread that runs it

    def calls(self) -> _LoopCalls:
        if self._calls is None or self._pid != os.getpid():
            with self._starting:
                if self._calls is None or self._pid != os.getpid():
                    loop = asyncio.new_event_loop()
                    threading.Thread(
                        target=loop.run_forever, name="agent-state-access", daemon=True
                    ).start()
                    self._calls, self._pid = _LoopCalls(loop), os.getpid()
        return self._calls


_background = _BackgroundLoop()
_directories = _Directories()
_thread = _Here()
