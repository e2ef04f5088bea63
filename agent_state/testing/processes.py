"""Processes that a test pretends: they are restarted, killed, and crash where the test says.

A pretended process is a runtime or a manager. After ``kill``, or a crash, the state directory is
as a killed process leaves it: nothing more is written, and every lock is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Change
from agent_state.runtime import AsyncAgentSessionManager
from agent_state.testing.faults import Action, Crash, Fault, FaultyDisk, check_ordinal

Process: TypeAlias = AsyncAgentSessionManager | StatePersistenceManager
"""What stands for a process: it has a state directory, or a store, and is open."""
P = TypeVar("P", AsyncAgentSessionManager, StatePersistenceManager)


async def kill(process: Process) -> None:
    """End a runtime or a manager as ``kill -9`` does, and leave its files as they are.

    Nothing is flushed, requeued or released in good order: running handlers end where they are,
    and what they do in their ``finally`` reaches no disk. All that this process has open in the
    same directory ends with it. A change that was being written is made, or is not. Where the
    state is not on a disk, what was committed stays.
    """
    state_dir = manager_of(process).state_dir
    if state_dir is None:
        await _let_go(process)
        return
    with FaultyDisk(under=state_dir) as disk:
        disk.crash()
        await _let_go(process)


async def _let_go(process: Process) -> None:
    """End the tasks, the threads and the locks of a process whose disk takes nothing any more."""
    if isinstance(process, AsyncAgentSessionManager):
        await process.abort()
    with contextlib.suppress(Crash, AgentStateError):
        await manager_of(process).close()


def manager_of(process: Process) -> StatePersistenceManager:
    """The manager of a runtime; a manager is its own."""
    return process.manager if isinstance(process, AsyncAgentSessionManager) else process


class ProcessGroup:
    """The pretended processes of one test."""

    def __init__(self) -> None:
        self._living: dict[Process, Callable[[], Any]] = {}
        self._made: dict[Process, Callable[[], Any]] = {}
        self._replaced: set[Process] = set()

    @property
    def living(self) -> list[Process]:
        """Those that run, oldest first."""
        return [*self._living]

    async def begin(self, make: Callable[[], P]) -> P:
        """Start the runtime, or open the manager, that ``make`` returns."""
        process = make()
        if isinstance(process, AsyncAgentSessionManager):
            await process.start()
        else:
            await process.open()
        self._living[process] = self._made[process] = make
        return process

    async def restart(self, process: P, *, crash: bool = False) -> P:
        """End a process, unless it is dead, and start another one with the same settings.

        A new runtime has the handlers, hooks and schedules of the old one, as a program that is
        started again registers them again; it shares nothing else with it. ``crash``: end it by
        ``kill``; otherwise in good order. Raises ``TypeError`` for one that this group did not
        begin: ``kill`` that one, and make another. Raises ``ValueError`` for one that was
        restarted before.
        """
        if process in self._replaced:
            raise ValueError("it was restarted before: use what `restart` returned then")
        make = self._made.get(process)
        if make is None:
            raise TypeError(
                f"{type(process).__name__} is not one that these fixtures made, so its settings "
                "are not known: end it with `agent_state.testing.kill`, and make another one"
            )
        if self._living.pop(process, None) is not None:
            await (kill(process) if crash else _stop(process))
        successor: P = await self.begin(lambda: _successor(process, make()))
        self._replaced.add(process)
        return successor

    async def flush(self) -> None:
        """Write all that was acknowledged to its readable files."""
        for process in self.living:
            await manager_of(process).flush()

    async def bury(self) -> None:
        """Let go of every process, on a disk that takes nothing any more."""
        while self._living:
            await _let_go(self._living.popitem()[0])

    async def end(self) -> None:
        """Stop every process in good order; raises the first error once all have stopped."""
        async with contextlib.AsyncExitStack() as stack:
            while self._living:
                stack.push_async_callback(_stop, self._living.popitem()[0])


def _successor(old: P, new: P) -> P:
    if isinstance(old, AsyncAgentSessionManager) and isinstance(new, AsyncAgentSessionManager):
        new.register_as(old)
    return new


async def _stop(process: Process) -> None:
    if isinstance(process, AsyncAgentSessionManager):
        await process.stop()
    else:
        await process.close()


class CrashPoint:
    """A block of a test that is a process, which dies where the test says.

    ::

        async with CrashPoint("state", call="rename", at=2):
            async with Application("state") as application:
                await application.work()

    ``call``: the system call (see ``Fault``) at whose ``at``-th use it dies; ``action`` says
    whether before, after, or in the midst of it. ``commits`` in its place: it dies when so many
    commits are durable, and before the one that made the last of them is told. The block ends at
    the crash, wherever it waits. What is open in ``state_dir`` must be closed when the block ends,
    as it is by an ``async with`` within it; ``group``: processes that die with it.

    Leaving the block raises ``AssertionError`` when the process did not come to the crash. What
    the store writes later than it acknowledges, such as the files of an exclusive directory, is
    reached by ``flush``.
    """

    def __init__(
        self,
        state_dir: str | os.PathLike[str] | None,
        *,
        call: str | None = None,
        at: int = 1,
        action: Action = "crash before",
        commits: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if (call is None) == (commits is None):
            raise TypeError("a crash is at a call, or after a number of commits")
        check_ordinal(at if commits is None else commits)
        if call is not None and state_dir is None:
            raise TypeError("this state is not on a disk, and makes no system call")
        self._call, self._at, self._commits = call, at, commits
        self._group = group or ProcessGroup()
        self._state_dir: str | None = None
        self._disk: FaultyDisk | None = None
        if state_dir is not None:
            if not action.startswith("crash"):
                raise ValueError(f"{action!r} is no crash: crash before, crash after, crash torn")
            faults = [] if call is None else [Fault(at, call, action)]
            self._disk = FaultyDisk(*faults, at_crash=self._notice, under=state_dir)
            self._state_dir = os.path.realpath(state_dir)
        self._committed = 0
        self._left = self._cancelling = False
        self.happened = False
        """Whether the process has died."""

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a block of a test runs in a task"
        self._task, self._loop = task, asyncio.get_running_loop()
        self._stack = contextlib.ExitStack()
        if self._disk is not None:
            self._stack.enter_context(self._disk)
        self._stack.enter_context(self._counted_commits())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._left = True
        if self._cancelling:
            self._task.uncancel()
        with self._stack:
            if self.happened:
                await self._group.bury()
        if self.happened:
            return error is None or _is_of_the_crash(error)
        if error is None:
            raise AssertionError(f"the block ended before the crash: it made {self._made()}")
        return False

    def _made(self) -> str:
        if self._commits is not None:
            return f"{self._committed} of {self._commits} commits"
        made = 0 if self._disk is None else self._disk.count(self._call)
        return f"{made} of {self._at} calls of {self._call}"

    def _notice(self) -> None:
        """End the process, and the block; called in the thread that came to the crash."""
        self.happened = True
        if self._disk is not None:
            self._disk.crash()
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if not self._left:
            self._cancelling = True
            self._task.cancel()

    @contextlib.contextmanager
    def _counted_commits(self) -> Iterator[None]:
        """Count the commits of all managers of the directory; after the crash, refuse them."""
        real = StatePersistenceManager._commit  # noqa: SLF001  # every change of a manager is one
        point = self

        async def commit(self: StatePersistenceManager, changes: Sequence[Change]) -> list[int]:
            if self.state_dir is not None and self.state_dir != point._state_dir:
                return await real(self, changes)
            point._refuse_the_dead()
            numbers = await real(self, changes)
            point._committed += 1
            if point._committed == point._commits:
                point._notice()
            point._refuse_the_dead()
            return numbers

        StatePersistenceManager._commit = commit  # type: ignore[method-assign]  # for the test  # noqa: SLF001
        try:
            yield
        finally:
            StatePersistenceManager._commit = real  # type: ignore[method-assign]  # as before  # noqa: SLF001

    def _refuse_the_dead(self) -> None:
        if self.happened:
            raise Crash("a commit after the end")


def _is_of_the_crash(error: BaseException) -> bool:
    """Whether an error comes of the crash alone, also within groups of errors."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_of_the_crash, error.exceptions))
    return isinstance(error, Crash | asyncio.CancelledError | AgentStateError)
