"""Locks between processes: the operating system's own, never a file's mere existence.

The kernel releases them when a process dies, so a dead process never blocks anyone. Lock
files are never deleted (a second holder would get in through the new file), each acquisition
has its own descriptor, and a lock is held by that descriptor, not by a thread. A child made by
fork closes its copies of the descriptors, so that it holds no lock of its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

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

if sys.platform == "linux":
    import fcntl

PER_DOCUMENT = sys.platform == "linux"
"""Whether the system has locks of an open file on a part of it."""
WRITERS = "writers.d"
"""The folder of writers' own locks; its dot keeps it apart from the folders of kinds."""

_WRITER = ".writer" if PER_DOCUMENT else ".lock"
_POLL_SECONDS = 0.002
_BRIEF_WAIT_SECONDS = 0.25
_LOOK_SECONDS = 0.25
_SEEN_SECONDS = 0.05


class FileLock:
    """An open lock file. ``acquire`` and ``try_acquire`` return one that is locked."""

    def __init__(self, path: str, flags: int = syscalls.LOCK) -> None:
        self.path = path
        try:
            self._fd = syscalls.open(path, flags)
        except OSError as error:
            raise storage_error(error, "opening a lock file", path=path) from error
        _open_files.add(self)

    def fileno(self) -> int:
        """Its descriptor; -1 after ``release``, and in a child made by fork."""
        return self._fd

    @cached_property
    def inode(self) -> int:
        try:
            return syscalls.fstat(self._fd).st_ino
        except OSError as error:
            raise storage_error(error, "looking at a lock file", path=self.path) from error

    def lock(self, *, shared: bool = False) -> bool:
        """Lock the whole file without waiting; whether it was free."""
        try:
            if not shared:
                return lock_descriptor(self._fd, blocking=False)
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise storage_error(error, "locking a file", path=self.path) from error
        return True

    def note(self, text: str) -> None:
        """Write a note for processes that find the lock held; it proves nothing."""
        try:
            syscalls.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            fileio.write_all(self._fd, text.encode())
        except OSError as error:
            raise storage_error(error, "writing a lock file", path=self.path) from error

    def release(self) -> None:
        """Unlock and close; a second call is a no-op."""
        _open_files.discard(self)
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                # Whoever inherited the descriptor would hold the lock until it is closed there.
                unlock_descriptor(fd)
            finally:
                syscalls.close(fd)

    def close_in_child(self) -> None:
        """Close it after a fork, without unlocking what the parent has locked."""
        fd, self._fd = self._fd, -1
        os.close(fd)


_open_files: set[FileLock] = set()


def _close_in_child() -> None:
    while _open_files:
        _open_files.pop().close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def try_acquire(path: str, *, shared: bool = False) -> FileLock | None:
    """The lock, or None when it is taken. ``shared``: with others who share it (only Linux).

    Raises ``StorageError``.
    """
    return _lock(FileLock(path), shared=shared)


def _lock(lock: FileLock, *, shared: bool) -> FileLock | None:
    try:
        free = lock.lock(shared=shared)
    except BaseException:
        lock.release()
        raise
    if free:
        return lock
    lock.release()
    return None


def acquire(path: str, timeout: float, *, shared: bool = False) -> FileLock:
    """Wait for the lock at most ``timeout`` seconds. Raises ``LockTimeoutError``."""
    return _wait(partial(try_acquire, path, shared=shared), path, timeout)


def _wait(attempt: Callable[[], FileLock | None], path: str, timeout: float) -> FileLock:
    lock = attempt()
    deadline = time.monotonic() + timeout
    while lock is None:
        if time.monotonic() >= deadline:
            raise LockTimeoutError(f"not free within {timeout:g} s", path=path)
        time.sleep(_POLL_SECONDS)
        lock = attempt()
    return lock


def open_below(root: str, path: str, *, sync: bool) -> FileLock:
    """Open a lock file below ``root``, not locked yet. Missing folders are made."""
    try:
        if fileio.has_folders(root, path):
            return FileLock(path)
    except StorageError as error:
        if error.errno != errno.ENOENT:  # removed since
            raise
    fileio.make_directories(root, os.path.dirname(path)[len(root) + 1 :], sync=sync)
    return FileLock(path)


def holder_of(path: str, byte: int | None = None) -> int | None:
    """The pid of a process that has locked this file, or a byte of it; None when unknown.

    Linux says which process has it; elsewhere the holder's note is all there is.
    """
    try:
        status = syscalls.stat(path)
        processes = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return _noted_pid(path)
    for pid in processes:
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for fd in os.listdir(f"/proc/{pid}/fdinfo"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}") as info:
                    # lock:  1: OFDLCK  ADVISORY  WRITE -1 fe:00:1311 7 7
                    held = {line.split()[-2] for line in info if line.startswith("lock:")}
                    wanted = {str(byte)} if byte is not None else held
                    if held & wanted and os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), status):
                        return int(pid)
    return _noted_pid(path)


@contextlib.contextmanager
def holding(path: str, timeout: float, *, root: str | None = None) -> Iterator[FileLock]:
    """The lock, for the time of a ``with`` block. ``root``: make its folders below it if needed."""
    while True:
        if root is not None:
            open_below(root, path, sync=False).release()
        lock = acquire(path, timeout)
        if is_current(lock):
            break
        lock.release()  # its folder was removed, and others lock the new one
    try:
        yield lock
    finally:
        lock.release()


# A directory has either one owner or several writers. A process first takes its own lock and then
# looks for the other kind; if it finds one, it backs off. So of two that start at the same moment,
# at least one sees the other, and never do both go on. Writers that lock by document also share
# the owner's lock, so that no older version, which locks otherwise, becomes a writer beside them.
#
# Git and people remove ``.locks``: whoever comes next would lock new files, and find nobody. So
# both also lock the directory itself (Linux), and look again and again whether what they locked is
# still at its path.


class Standing:
    """The locks by which this process is the owner of a directory, or one of its writers."""

    def __init__(self, locks: str, *, exclusive: bool) -> None:
        self._root, self._folder = os.path.dirname(locks), locks
        self._exclusive = exclusive
        self._mutex = threading.Lock()
        self._looked_at = self._seen_at = 0.0
        self._directory: FileLock | None = None
        self.own: FileLock | None = None
        """The owner's lock, or the writer's own."""
        self._shared: FileLock | None = None

    @property
    def in_place(self) -> bool:
        """Whether the directory at the path is the one that is locked. Raises ``StorageError``."""
        return self._directory is None or is_current(self._directory)

    @property
    def seems_in_place(self) -> bool:
        """``in_place`` as of a moment ago, for every batch of the write-ahead log."""
        now = time.monotonic()
        if now - self._seen_at < _SEEN_SECONDS:
            return True
        if self.in_place:
            self._seen_at = now
            return True
        return False

    def take(self) -> None:
        """Take all locks. Raises ``StateDirectoryInUseError``."""
        try:
            if self._exclusive:
                self.own = _acquire_owner(self._folder)
            else:
                self.own, self._shared = _acquire_writer(self._folder)
            if PER_DOCUMENT:
                self._directory = self._lock_directory()
        except BaseException:
            self.release()
            raise

    def renew(self, prepare: Callable[[], object]) -> None:
        """Take again the locks that are no longer at their paths, after ``prepare``.

        A look at ``.locks`` is made a few times a second at most. Raises
        ``StateDirectoryInUseError`` when another process has the directory by now, and
        ``StorageError``.
        """
        with self._mutex:
            if not self.in_place:
                prepare()
                directory = self._lock_directory()
                self._directory, former = directory, self._directory
                if former is not None:
                    former.release()
            elif time.monotonic() - self._looked_at < _LOOK_SECONDS:
                return
            self._looked_at = time.monotonic()
            locks = [lock for lock in (self.own, self._shared) if lock is not None]
            if self.own is None or all(map(is_current, locks)):
                return
            prepare()
            again = Standing(self._folder, exclusive=self._exclusive)
            try:
                if self._exclusive:
                    again.own = _acquire_owner(self._folder)
                else:
                    again.own, again._shared = _acquire_writer(self._folder)
            except StateDirectoryInUseError:
                if self._directory is None:
                    raise
                return  # somebody tries for a moment, and will find the directory locked
            for lock in locks:
                lock.release()
            self.own, self._shared = again.own, again._shared

    def release(self) -> None:
        """Release the locks, and remove a writer's own file, on which no process waits."""
        with self._mutex:
            try:
                if self.own is not None and not self._exclusive:
                    fileio.discard(self.own.path)
            finally:
                for lock in (self.own, self._shared, self._directory):
                    if lock is not None:
                        lock.release()
                self.own = self._shared = self._directory = None

    def _lock_directory(self) -> FileLock:
        attempt = partial(_try_directory, self._root, shared=not self._exclusive)
        try:
            return _wait(attempt, self._root, _BRIEF_WAIT_SECONDS)
        except LockTimeoutError:
            what = "another process writes to" if self._exclusive else "another process owns"
            raise _in_use(what, self._root) from None


def _try_directory(root: str, *, shared: bool) -> FileLock | None:
    return _lock(FileLock(root, syscalls.DIRECTORY), shared=shared)


def acquire_exclusive(locks: str) -> Standing:
    """Become the only writer. Raises ``StateDirectoryInUseError``, naming the holder's pid."""
    standing = Standing(locks, exclusive=True)
    standing.take()
    return standing


def acquire_shared(locks: str) -> Standing:
    """Become one of several writers. Raises ``StateDirectoryInUseError`` when it has an owner."""
    standing = Standing(locks, exclusive=False)
    standing.take()
    return standing


def _acquire_owner(locks: str) -> FileLock:
    path = f"{locks}/owner.lock"
    try:
        lock = acquire(path, _BRIEF_WAIT_SECONDS)
    except LockTimeoutError:
        _refuse_writers(locks)
        raise _in_use("another process owns", path) from None
    try:
        _refuse_writers(locks)
        _write_pid(lock)
    except BaseException:
        lock.release()
        raise
    return lock


def _acquire_writer(locks: str) -> tuple[FileLock, FileLock | None]:
    """A writer's own lock, and its share in the owner's."""
    while True:
        own = acquire(f"{locks}/{WRITERS}/{secrets.token_hex(8)}{_WRITER}", _BRIEF_WAIT_SECONDS)
        with _released_on_error(own):
            if is_current(own):
                break
        own.release()  # an owner took the new file for a dead writer's and removed it
    with _released_on_error(own):
        _write_pid(own)
        shared = _take(f"{locks}/owner.lock", "another process owns", shared=PER_DOCUMENT)
        with _released_on_error(shared):
            for writer in _writers(locks):
                if writer != own.path:
                    _look_at(writer)
    if PER_DOCUMENT:
        return own, shared
    shared.release()
    return own, None


@contextlib.contextmanager
def _released_on_error(lock: FileLock) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if lock.path.endswith(_WRITER):
            fileio.discard(lock.path)
        lock.release()
        raise


def _look_at(writer: str) -> None:
    """Remove a dead writer's lock. Raises ``StateDirectoryInUseError`` for one of old."""
    if (dead := try_acquire(writer)) is not None:
        fileio.discard(writer)
        dead.release()
    elif not writer.endswith(_WRITER):
        raise _in_use("an older version of agent_state writes to", writer)


def only_writer_since(member: Standing) -> int | None:
    """Since when (mtime_ns) a writer has been the only one; None when others are alive.

    The lock file of a later writer gets a later mtime.
    """
    if member.own is None:
        return None
    path = member.own.path
    stamp = fileio.stat_file(path)
    for writer in _writers(os.path.dirname(os.path.dirname(path))):
        if writer != path:
            other = try_acquire(writer)
            if other is None:
                return None
            other.release()
    return stamp.mtime_ns if stamp is not None else None


def owner_of(locks: str) -> int | None:
    """The pid of the process that owns the directory; 0 when unknown, None for no owner."""
    path, root = f"{locks}/owner.lock", os.path.dirname(locks)
    attempts = {path: partial(try_acquire, path, shared=PER_DOCUMENT)}
    if PER_DOCUMENT:
        attempts = {root: partial(_try_directory, root, shared=True), **attempts}
    for taken, attempt in attempts.items():
        if fileio.stat_file(taken) is not None:
            lock = attempt()
            if lock is None:
                return holder_of(taken) or 0
            lock.release()
    return None


def _write_pid(lock: FileLock) -> None:
    """Write our pid. Ignores a full disk: the process may be about to delete."""
    with contextlib.suppress(StorageFullError):
        lock.note(f"{os.getpid()}\n")


def _take(path: str, refusal: str, *, shared: bool = False) -> FileLock:
    """The lock, or the error with its holder's pid. Others hold it briefly, so wait a little."""
    try:
        return acquire(path, _BRIEF_WAIT_SECONDS, shared=shared)
    except LockTimeoutError:
        raise _in_use(refusal, path) from None


def _refuse_writers(locks: str) -> None:
    """Remove the locks of dead writers. Raises ``StateDirectoryInUseError`` for a living one."""
    for writer in _writers(locks):
        _take(writer, "another process writes to").release()
        fileio.discard(writer)


def _in_use(refusal: str, path: str) -> StateDirectoryInUseError:
    pid = holder_of(path)
    if pid == os.getpid():
        refusal = refusal.replace("another process", "this process itself")
    return StateDirectoryInUseError(f"{refusal} the state directory", pid=pid, path=path)


def _writers(locks: str) -> list[str]:
    folder = f"{locks}/{WRITERS}"
    names = fileio.list_folder(folder)
    return [f"{folder}/{name}" for name in names if name.endswith((".lock", _WRITER))]


def _noted_pid(path: str) -> int | None:
    try:
        found = fileio.read_file(path)
        return int(found[0]) if found else None
    except (AgentStateError, ValueError):
        return None  # the note is optional: the lock alone counts


def is_current(lock: FileLock) -> bool:
    """Whether the locked file is still the one at its path."""
    stamp = fileio.stat_file(lock.path)
    if stamp is None or stamp.inode == lock.inode:
        return stamp is not None
    del lock.inode  # an overlay may give a directory another one when it is first written to
    return stamp.inode == lock.inode


# -- between tasks -----------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _TaskLock:
    """The tasks that have one lock, how often each, and those that wait for it, in order."""

    holders: dict[asyncio.Task[object] | None, int] = field(default_factory=dict)
    exclusive: bool = False
    waiting: deque[_Turn] = field(default_factory=deque)

    def admits(self, task: asyncio.Task[object] | None, *, exclusive: bool) -> bool:
        """Whether a task may have it beside its other holders."""
        alone = self.holders.keys() <= {task}
        return alone or not (exclusive or self.exclusive)

    def enter(self, task: asyncio.Task[object] | None, *, exclusive: bool) -> None:
        self.holders[task] = self.holders.get(task, 0) + 1
        self.exclusive = self.exclusive or exclusive

    def leave(self, task: asyncio.Task[object] | None, *, exclusive: bool) -> None:
        """Leave once; ``exclusive``: whether the task had it so before it entered."""
        self.exclusive = exclusive
        self.holders[task] -= 1
        if not self.holders[task]:
            del self.holders[task]
        self.wake()

    def wake(self) -> None:
        """Let in those whose turn it is."""
        while self.waiting and self.admits(
            self.waiting[0].task, exclusive=self.waiting[0].exclusive
        ):
            turn = self.waiting.popleft()
            if not turn.came.cancelled():
                self.enter(turn.task, exclusive=turn.exclusive)
                turn.came.set_result(None)


@dataclass(slots=True, eq=False)
class _Turn:
    """A task that waits for a lock. When ``came`` is done, it has the lock."""

    task: asyncio.Task[object] | None
    exclusive: bool
    came: asyncio.Future[None]


class TaskLocks:
    """Named re-entrant locks between the tasks of this process, exclusive or shared.

    They are given in the order in which they were asked for. ``timeout``: seconds that a task
    waits for each.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.held: dict[Any, _TaskLock] = {}
        """The locks that a task holds or waits for, by name."""

    def taken(self, wanted: Mapping[Any, bool]) -> bool:
        """Whether another task holds one of these locks; True: wanted exclusive, False: shared."""
        me = asyncio.current_task()
        found = [(lock, wanted[name]) for name, lock in self.held.items() if name in wanted]
        return not all(lock.admits(me, exclusive=exclusive) for lock, exclusive in found)

    @asynccontextmanager
    async def hold(self, wanted: Iterable[Any] | Mapping[Any, bool]) -> AsyncIterator[None]:
        """Hold all these locks, taken in sorted order; a mapping as in ``taken``.

        Raises ``LockTimeoutError``.
        """
        modes = wanted if isinstance(wanted, Mapping) else dict.fromkeys(wanted, True)
        me = asyncio.current_task()
        entered: list[tuple[Any, _TaskLock, bool]] = []
        try:
            for name in sorted(modes):
                lock = self.held.setdefault(name, _TaskLock())
                had_it_exclusive = lock.exclusive and me in lock.holders
                if lock.admits(me, exclusive=modes[name]) and (
                    me in lock.holders or not lock.waiting
                ):
                    lock.enter(me, exclusive=modes[name])
                else:
                    await self._wait(name, lock, me, exclusive=modes[name])
                entered.append((name, lock, had_it_exclusive))
            yield
        finally:
            for name, lock, had_it_exclusive in reversed(entered):
                lock.leave(me, exclusive=had_it_exclusive)
                self._forget_unused(name, lock)

    def _forget_unused(self, name: Any, lock: _TaskLock) -> None:
        # One who was cancelled while his turn was passed over may come after the last holder.
        if not lock.holders and not lock.waiting and self.held.get(name) is lock:
            del self.held[name]

    async def _wait(
        self, name: Any, lock: _TaskLock, me: asyncio.Task[object] | None, *, exclusive: bool
    ) -> None:
        turn = _Turn(me, exclusive, asyncio.get_running_loop().create_future())
        if me in lock.holders:  # those who wait wait for it
            lock.waiting.appendleft(turn)
        else:
            lock.waiting.append(turn)
        try:
            async with asyncio.timeout(self._timeout):
                await turn.came
        except BaseException as error:
            if turn in lock.waiting:
                lock.waiting.remove(turn)
                lock.wake()
            elif not turn.came.cancelled():
                lock.leave(me, exclusive=False)
            self._forget_unused(name, lock)
            if not isinstance(error, TimeoutError):
                raise
            what = "/".join((name[0], *name[1])) if isinstance(name, tuple) else name
            raise LockTimeoutError(
                f"{what}: another task of this process held it for {self._timeout:g} s"
            ) from error
