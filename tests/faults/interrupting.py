"""Cancelling a coroutine at each of its awaits, and what must not be left behind afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from agent_state.storage import document_locks, locks, syscalls
from agent_state.testing.faults import CALLS

T = TypeVar("T")

SYNCS = ("fsync", "fdatasync", "fsync_directory")


class CancelledAt(Generic[T]):
    """Awaits a coroutine, and cancels the task that does at the n-th suspension.

    ``reached`` says whether there were so many.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], at: int) -> None:
        self._coroutine = coroutine
        self._at = at
        self._suspensions = 0

    @property
    def reached(self) -> bool:
        return self._suspensions >= self._at

    def __await__(self) -> Generator[Any, None, T]:
        inner = self._coroutine.__await__()
        raised: BaseException | None = None
        while True:
            try:
                waited_for = next(inner) if raised is None else _thrown(inner, raised)
            except StopIteration as end:
                value: T = end.value
                return value
            self._suspensions += 1
            if self._suspensions == self._at:
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_soon(task.cancel)
            raised = None
            try:
                yield waited_for
            except BaseException as error:  # noqa: BLE001  # thrown into what it was meant for
                raised = error


def _thrown(inner: Generator[Any, Any, Any], error: BaseException) -> Any:  # what it waits for next
    return inner.throw(error)


async def cancel_at(point: int, work: Callable[[], Coroutine[Any, Any, object]]) -> bool:
    """Run the work in a task of its own and cancel it there; whether it came so far."""
    awaiting = CancelledAt(work(), point)

    async def run() -> None:
        await awaiting

    await asyncio.gather(asyncio.create_task(run()), return_exceptions=True)
    return awaiting.reached


class SlowSync:
    """The next sync call takes so many seconds; ``begun`` is set when it begins."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._armed = False
        self._real: dict[str, Callable[..., None]] = {}
        self.slow = 0
        """How many calls were slow."""

    def arm(self) -> None:
        self._armed = True

    def __enter__(self) -> Self:
        for name in SYNCS:
            real = self._real[name] = getattr(syscalls, name)
            setattr(syscalls, name, self._slowed(real))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, real in self._real.items():
            setattr(syscalls, name, real)

    def _slowed(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(about: Any) -> None:
            if self._armed:
                self._armed = False
                self.slow += 1
                time.sleep(self._seconds)
            real(about)

        return call


class PatientDisk:
    """Every system call waits until the event loop has turned once; where it cannot, it is told.

    So a call made on the loop's own thread, or awaited there by blocking, is found without
    measuring any time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float = 0.0) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._seconds = seconds
        self._real: dict[str, Callable[..., Any]] = {}
        self.calls = 0
        self.blocked: list[str] = []
        """What was called while the loop stood still."""

    def __enter__(self) -> Self:
        for name in CALLS:
            real = self._real[name] = getattr(syscalls, name)
            setattr(syscalls, name, self._patient(name, real))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, real in self._real.items():
            setattr(syscalls, name, real)

    def _patient(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:  # any system call
            self.calls += 1
            if threading.get_ident() == self._thread:
                self.blocked.append(f"{name} {args[0]} on the loop's own thread")
            else:
                if name in SYNCS:
                    time.sleep(self._seconds)
                turned = threading.Event()
                self._loop.call_soon_threadsafe(turned.set)
                if not turned.wait(3):
                    self.blocked.append(f"{name} {args[0]} while the loop waited for it")
            return real(*args)

        return call


class Footprint:
    """What a process holds: descriptors, threads of the stores, tasks."""

    def __init__(self) -> None:
        self._descriptors = _descriptors()
        self._threads = _threads()
        self._tasks = asyncio.all_tasks()

    def tasks(self) -> list[str]:
        """The tasks that have begun since and have not ended."""
        return [task.get_name() for task in asyncio.all_tasks() - self._tasks if not task.done()]

    def leaked(self) -> list[str]:
        """What has come since and is still there."""
        threads = [thread.name for thread in _threads() - self._threads]
        return [*sorted(_descriptors() - self._descriptors), *threads, *self.tasks()]

    async def still_leaked(self) -> list[str]:
        """The same, once what ends by itself has: the native watcher takes up to half a second."""
        for _ in range(300):
            if not self.leaked():
                break
            await asyncio.sleep(0.01)
        return self.leaked()


def _descriptors() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} -> {entry.readlink()}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("agent-state")}


def locks_held(root: Path) -> list[str]:
    """The lock files that somebody holds."""
    held = []
    for path in sorted((root / ".locks").rglob("*.*")):
        if path.name == document_locks.FILE:
            with path.open("r+b") as file, contextlib.suppress(BlockingIOError):
                everything = document_locks.FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, everything)
                continue
            held.append(path.name)
            continue
        if path.is_dir():
            continue
        lock = locks.try_acquire(str(path))
        if lock is None:
            held.append(str(path.relative_to(root / ".locks")))
        else:
            lock.release()
    return held
