"""Locks between processes: the operating system's own, never a file's mere existence.

The kernel releases them when a process dies, so a dead process never blocks anyone. Lock
files are never deleted (a second holder would get in through the new file), each acquisition
has its own descriptor, and a lock is held by that descriptor, not by a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from filelock import lock_descriptor, unlock_descriptor

from agent_state.errors import (
    AgentStateError,
    LockTimeoutError,
    StateDirectoryInUseError,
    StorageError,
    StorageFullError,
    storage_error,
)
from agent_state.storage import fileio, syscalls

WRITERS = "writers.d"
"""The folder of writers' own locks; its dot keeps it apart from the folders of kinds."""

_POLL_SECONDS = 0.002
_BRIEF_WAIT_SECONDS = 0.25


@dataclass(slots=True, eq=False)
class FileLock:
    """One held lock. Made by ``acquire`` or ``try_acquire``."""

    _fd: int
    path: str

    @property
    def inode(self) -> int:
        try:
            return syscalls.fstat(self._fd).st_ino
        except OSError as error:
            raise storage_error(error, "looking at a lock file", path=self.path) from error

    def note(self, text: str) -> None:
        """Write a note for processes that find the lock held; it proves nothing."""
        try:
            syscalls.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            fileio.write_all(self._fd, text.encode())
        except OSError as error:
            raise storage_error(error, "writing a lock file", path=self.path) from error

    def release(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                # A child made by fork holds the same lock until it is unlocked, not closed.
                unlock_descriptor(fd)
            finally:
                syscalls.close(fd)


def try_acquire(path: str) -> FileLock | None:
    """The lock, or None when it is taken. Raises ``StorageError``."""
    try:
        fd = syscalls.open(path, syscalls.LOCK)
    except OSError as error:
        raise storage_error(error, "opening a lock file", path=path) from error
    try:
        if lock_descriptor(fd, blocking=False):
            return FileLock(fd, path)
    except OSError as error:
        syscalls.close(fd)
        raise storage_error(error, "locking a file", path=path) from error
    except BaseException:
        syscalls.close(fd)
        raise
    syscalls.close(fd)
    return None


def acquire(path: str, timeout: float) -> FileLock:
    """Wait for the lock at most ``timeout`` seconds. Raises ``LockTimeoutError``."""
    lock = try_acquire(path)
    deadline = time.monotonic() + timeout
    while lock is None:
        if time.monotonic() >= deadline:
            raise LockTimeoutError(f"not free within {timeout:g} s", path=path)
        time.sleep(_POLL_SECONDS)
        lock = try_acquire(path)
    return lock


def acquire_at_once(root: str, folder: str, name: str, *, sync: bool) -> FileLock:
    """The lock ``name`` in a folder below ``root``, without waiting.

    Missing folders are made. Raises ``LockTimeoutError`` when it is taken, ``StorageError``.
    """
    path = f"{folder}/{name}"
    try:
        exists = fileio.has_folders(root, path)
        lock = try_acquire(path) if exists else None
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        exists, lock = False, None  # removed since
    if not exists:
        fileio.make_directories(root, os.path.dirname(path)[len(root) + 1 :], sync=sync)
        lock = try_acquire(path)
    if lock is None:
        raise LockTimeoutError("not free", path=path)
    return lock


@contextlib.contextmanager
def holding(path: str, timeout: float) -> Iterator[FileLock]:
    """The lock, for the time of a ``with`` block."""
    lock = acquire(path, timeout)
    try:
        yield lock
    finally:
        lock.release()


# A directory has either one owner or several writers. A process first takes its own lock and then
# looks for the other kind; if it finds one, it backs off. So of two that start at the same moment,
# at least one sees the other, and never do both go on.


def acquire_exclusive(locks: str) -> FileLock:
    """Become the only writer. Raises ``StateDirectoryInUseError``, naming the holder's pid."""
    path = f"{locks}/owner.lock"
    lock = _take(path, "another process owns the state directory")
    try:
        for writer in _writers(locks):
            _take(writer, "another process writes to the state directory").release()
            fileio.discard(writer)
        _write_pid(lock)
    except BaseException:
        lock.release()
        raise
    return lock


def acquire_shared(locks: str) -> FileLock:
    """Become one of several writers. Raises ``StateDirectoryInUseError`` when it has an owner."""
    while True:
        lock = acquire(f"{locks}/{WRITERS}/{secrets.token_hex(8)}.lock", _BRIEF_WAIT_SECONDS)
        try:
            current = is_current(lock)
        except BaseException:
            release_shared(lock)
            raise
        if current:
            break
        lock.release()  # an owner took the new file for a dead writer's and removed it
    try:
        _write_pid(lock)
        _take(f"{locks}/owner.lock", "another process owns the state directory").release()
        for writer in _writers(locks):
            if writer != lock.path and (dead := try_acquire(writer)) is not None:
                fileio.discard(writer)
                dead.release()
    except BaseException:
        release_shared(lock)
        raise
    return lock


def only_writer_since(lock: FileLock) -> int | None:
    """Since when (mtime_ns) a writer has been the only one; None when others are alive.

    The lock file of a later writer gets a later mtime.
    """
    stamp = fileio.stat_file(lock.path)
    for writer in _writers(os.path.dirname(os.path.dirname(lock.path))):
        if writer != lock.path:
            other = try_acquire(writer)
            if other is None:
                return None
            other.release()
    return stamp.mtime_ns if stamp is not None else None


def release_shared(lock: FileLock) -> None:
    """Release a writer's lock and remove its file, on which no process waits."""
    fileio.discard(lock.path)
    lock.release()


def owner_of(locks: str) -> int | None:
    """The pid of the process that owns the directory; 0 when unknown, None for no owner."""
    path = f"{locks}/owner.lock"
    if fileio.stat_file(path) is None:
        return None
    lock = try_acquire(path)
    if lock is None:
        return _pid(path) or 0
    lock.release()
    return None


def _write_pid(lock: FileLock) -> None:
    """Write our pid. Ignores a full disk: the process may be about to delete."""
    with contextlib.suppress(StorageFullError):
        lock.note(f"{os.getpid()}\n")


def _take(path: str, refusal: str) -> FileLock:
    """The lock, or the error with its holder's pid. Others hold it briefly, so wait a little."""
    try:
        return acquire(path, _BRIEF_WAIT_SECONDS)
    except LockTimeoutError as error:
        raise StateDirectoryInUseError(refusal, pid=_pid(path), path=path) from error


def _writers(locks: str) -> list[str]:
    folder = f"{locks}/{WRITERS}"
    return [f"{folder}/{name}" for name in fileio.list_folder(folder) if name.endswith(".lock")]


def _pid(path: str) -> int | None:
    try:
        found = fileio.read_file(path)
        return int(found[0]) if found else None
    except (AgentStateError, ValueError):
        return None  # the note is optional: the lock alone counts


def is_current(lock: FileLock) -> bool:
    """Whether the locked file is still the one at its path."""
    stamp = fileio.stat_file(lock.path)
    return stamp is not None and stamp.inode == lock.inode


@dataclass(slots=True, eq=False)
class _TaskLock:
    mutex: asyncio.Lock = field(default_factory=asyncio.Lock)
    holder: asyncio.Task[object] | None = None
    depth: int = 0
    users: int = 0
    """How many tasks hold it or wait for it."""


class TaskLocks:
    """Named re-entrant locks between the tasks of this process.

    ``timeout``: seconds that a task waits for each.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.held: dict[str, _TaskLock] = {}
        """The locks that a task holds or waits for, by name."""

    def held_by_other(self, name: str) -> bool:
        """Whether another task holds this lock."""
        lock = self.held.get(name)
        return lock is not None and lock.depth > 0 and lock.holder is not asyncio.current_task()

    @asynccontextmanager
    async def hold(self, names: Iterable[str]) -> AsyncIterator[None]:
        """Hold all these locks, taken in sorted order. Raises ``LockTimeoutError``."""
        me = asyncio.current_task()
        entered: list[tuple[str, _TaskLock]] = []
        try:
            for name in sorted(set(names)):
                lock = self.held.setdefault(name, _TaskLock())
                lock.users += 1
                entered.append((name, lock))
                if lock.holder is not me:
                    if lock.mutex.locked():
                        await self._wait(name, lock)
                    else:
                        await lock.mutex.acquire()
                    lock.holder = me
                lock.depth += 1
            yield
        finally:
            for name, lock in reversed(entered):
                lock.users -= 1
                if lock.holder is me:  # the last one may never have been taken
                    lock.depth -= 1
                    if lock.depth == 0:
                        lock.holder = None
                        lock.mutex.release()
                if lock.users == 0:
                    del self.held[name]

    async def _wait(self, name: str, lock: _TaskLock) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await lock.mutex.acquire()
        except TimeoutError as error:
            raise LockTimeoutError(
                f"{name}: another task of this process held it for {self._timeout:g} s"
            ) from error
