"""A barrier: for a moment no file changes, and the files have every acknowledged change.

Another program (git, a backup) that reads many files then reads one state: no group of documents
is torn. Writers share the lock ``.locks/barrier.lock`` while they bring a set of complete groups to
their files; who wants the barrier takes it alone. A writer waits ``HOLD_SECONDS`` at most.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from agent_state.errors import AgentStateError, LockTimeoutError, StorageError
from agent_state.storage import fileio, locks, syscalls
from agent_state.storage.locks import FileLock

HOLD_SECONDS = 2.0
"""So long writers wait for the holder of the barrier; then they go on."""
FLUSH_SECONDS = 10.0
"""So long a writer may take to bring what is acknowledged to the files."""
_PAUSE_SECONDS = 0.005
_GRANULARITY_NS = 20_000_000
"""The time of a file may be so much before the clock's."""


class Share:
    """A writer's share of the barrier in a folder of locks."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path = f"{folder}/barrier.lock"
        self._lock: FileLock | None = None
        self._went_on = False

    def join(self) -> bool:
        """Take the share; False while another program holds the barrier. Twice is a no-op."""
        if self._lock is None:
            try:
                self._lock = locks.try_acquire(self._path, shared=True)
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    raise
                return True  # the folder was removed: nobody holds anything there
        return self._lock is not None

    def wait(self) -> None:
        """Join, or wait until the holder has had its time, and go on. Blocks."""
        deadline = time.monotonic() + HOLD_SECONDS
        while not self.join():
            if time.monotonic() >= deadline:
                self.go_on()
                return
            time.sleep(_PAUSE_SECONDS)

    def go_on(self) -> None:
        """Write without a share: the holder finds out that what it has read may be torn."""
        self._went_on = True
        _touch(self._path, time.time_ns())

    def leave(self) -> None:
        """Give the share back, if there is one."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
        if self._went_on:
            self._went_on = False
            _touch(self._path, time.time_ns())  # for who has begun to hold meanwhile

    def note_settled(self, began_ns: int) -> None:
        """Everything that was acknowledged at that time is in its file."""
        _mark(f"{self._folder}/settled", began_ns)

    def is_wanted(self) -> bool:
        """Whether another program waits for a note that is newer than the last one."""
        with contextlib.suppress(AgentStateError):  # a mark that cannot be read is none
            wanted = fileio.stat_file(f"{self._folder}/wanted")
            if wanted is None or abs(time.time_ns() - wanted.mtime_ns) > FLUSH_SECONDS * 1e9:
                return False
            settled = fileio.stat_file(f"{self._folder}/settled")
            return settled is None or settled.mtime_ns <= wanted.mtime_ns + _GRANULARITY_NS
        return False


def _touch(path: str, time_ns: int) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # the folder was removed
        syscalls.utime(path, time_ns)


def _mark(path: str, time_ns: int) -> None:
    """Give a mark, an empty file, this time."""
    try:
        if fileio.stat_file(path) is None:
            fileio.replace_file(path, b"", sync=False)
        syscalls.utime(path, time_ns)
    except OSError:
        return  # the folder was removed: who waits for the mark is told so


@contextmanager
def hold(
    root: str, *, acknowledged: int | None = None, timeout: float = FLUSH_SECONDS
) -> Iterator[None]:
    """Hold the writers of a state directory in a ``with`` block, with everything in its file.

    ``acknowledged``: what was, at an earlier call of ``request``; None for until now.
    Blocks. Raises ``LockTimeoutError`` when the writers do not come to rest in time, and after the
    block when one did not wait for its end: what was read in it may be torn. Without a writer
    there is nothing to wait for.
    """
    folder, deadline = f"{root}/.locks", time.monotonic() + timeout
    path = f"{folder}/barrier.lock"
    if fileio.stat_file(folder) is None:  # no process has written here: a clone
        yield
        if fileio.stat_file(folder) is not None:
            raise LockTimeoutError("a writer came meanwhile", path=path)
        return
    newest = request(root) if acknowledged is None else acknowledged
    _wait_until_settled(root, folder, newest, deadline)
    with _alone(path, deadline):
        began, before = time.monotonic(), fileio.stat_file(path)
        yield
        took, after = time.monotonic() - began, fileio.stat_file(path)
    if before != after:
        raise LockTimeoutError(
            f"it was read for {took:.1f} s; writers wait for {HOLD_SECONDS:g} s", path=path
        )


@contextmanager
def _alone(path: str, deadline: float) -> Iterator[None]:
    while (lock := locks.try_acquire(path)) is None:
        if time.monotonic() >= deadline:
            raise LockTimeoutError("the writers do not come to rest", path=path)
        time.sleep(_PAUSE_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _wait_until_settled(root: str, folder: str, newest: int, deadline: float) -> None:
    """Wait until the owner's files have what its journal had then."""
    if locks.owner_of(folder) is None:
        return
    while newest:
        settled = fileio.stat_file(f"{folder}/settled")
        if settled is not None and settled.mtime_ns > newest + _GRANULARITY_NS:
            return
        if not any(map(_is_segment, fileio.list_folder(f"{root}/.journal"))):
            return
        if time.monotonic() >= deadline:
            raise LockTimeoutError("the owner does not update the files", path=root)
        time.sleep(_PAUSE_SECONDS)


def request(root: str) -> int:
    """Ask the owner to bring what is acknowledged to the files; when the last of it was, or 0."""
    newest = _acknowledged_ns(root)
    if newest:
        _mark(f"{root}/.locks/wanted", time.time_ns())
    return newest


def _acknowledged_ns(root: str) -> int:
    """When something was written to the journal last; 0 if it is empty."""
    times = []
    for name in filter(_is_segment, fileio.list_folder(f"{root}/.journal")):
        try:
            stamp = fileio.stat_file(os.path.join(root, ".journal", name))
        except AgentStateError:
            continue
        if stamp is not None:
            times.append(stamp.mtime_ns)
    return max(times, default=0)


def _is_segment(name: str) -> bool:
    return name[:1].isdigit()
