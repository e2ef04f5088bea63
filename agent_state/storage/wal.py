"""The write-ahead log: segments of records, and group commit with one write and one fdatasync.

Segments are ``.journal/<number>.jsonl``, lines as in ``changes``. An fsync that fails is never
repeated on the same descriptor, since the kernel may have dropped the pages and would report
success the next time: the segment is closed for good and a new one begun.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import NamedTuple

from agent_state.errors import (
    DurabilityUnknownError,
    StateCorruptedError,
    StorageError,
    storage_error,
)
from agent_state.storage import fileio, logs, syscalls
from agent_state.storage.changes import (
    ResolvedChange,
    Superseded,
    decode_journal_record,
    frame,
)
from agent_state.storage.executor import Batcher, Executor
from agent_state.storage.patches import Patched, PatchEncoder, SegmentVersions, make_whole

SEGMENT_BYTES = 64 * 1024 * 1024
_MOST_EXPANDED = 8
"""So many times its limit the bodies in a segment may have: a recovery makes and checks each."""
_BLOCK = 512
_NULS = re.compile(rb"\0+")
_NAME = re.compile(r"(\d{8,})\.jsonl")


class WalSyncError(StorageError):
    """The disk did not confirm a batch; its segment is closed for good."""


class WriteAheadLog:
    """The segments of one directory. Its methods block, and one thread calls them.

    ``in_place()``: whether the directory is still the one at its path. ``prepare()`` makes its
    folders again if they were removed, or raises what keeps this process from writing there.
    """

    def __init__(
        self,
        folder: str,
        *,
        sync: bool,
        in_place: Callable[[], bool] = lambda: True,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder = folder
        self._sync = sync
        self._in_place = in_place
        self._prepare = prepare
        self.incomplete = False
        """A segment was removed by others before its changes were durable in their files."""
        self._fd = -1
        self._path = ""
        self.size = 0
        """Bytes in the open segment."""
        self._patches = PatchEncoder()

    def is_longer(self, limit: int) -> bool:
        """Whether the open segment has more bytes, or its records take longer to be replayed."""
        return self.size > limit or self._patches.body_bytes > _MOST_EXPANDED * limit

    def append(self, groups: Sequence[Sequence[ResolvedChange]]) -> None:
        """Add a batch of records, one for each group; when this returns it is durable.

        Raises ``StorageError`` when nothing was added, ``WalSyncError`` when that is unknown; the
        next ``append`` then begins a new segment.
        """
        if self._fd < 0:
            self._begin()
        try:
            self._append([*map(self._patches.encode, groups)])
        except BaseException:
            self._patches.clear()  # the file may not have these versions
            raise

    def _append(self, records: Sequence[bytes]) -> None:
        data = b"".join(map(frame, records, repeat(self.size)))
        try:
            fileio.write_all(self._fd, data)
        except OSError as error:
            if not self._truncate_batch():
                raise WalSyncError(
                    f"the journal could not be cut back: {error.strerror}",
                    number=error.errno,
                    path=self._path,
                ) from error
            raise storage_error(error, "writing the journal", path=self._path) from error
        if self._sync:
            try:
                syscalls.fdatasync(self._fd)
            except OSError as error:
                self._truncate_batch()
                self.close()
                raise WalSyncError(
                    f"the journal was not confirmed: {error.strerror}",
                    number=error.errno,
                    path=self._path,
                ) from error
        try:
            in_place = syscalls.fstat(self._fd).st_nlink > 0 and self._in_place()
        except OSError as error:
            path = self._path
            self.close()
            raise WalSyncError(
                f"the journal could not be looked at: {error.strerror}",
                number=error.errno,
                path=path,
            ) from error
        if not in_place:
            path, self.incomplete = self._path, True
            self.close()
            raise WalSyncError("the journal was removed while it was written", path=path)
        self.size += len(data)

    def seal(self) -> list[str]:
        """Close the open segment; the paths of all segments, oldest first."""
        self.close()
        self.incomplete = False
        return segments(self._folder)

    def _begin(self) -> None:
        self._prepare()
        existing = filter(_NAME.fullmatch, fileio.list_folder(self._folder))
        number = max(map(_number, existing), default=0) + 1
        path = f"{self._folder}/{number:08d}.jsonl"
        try:
            fd = syscalls.open(path, syscalls.CREATE_NEW)
            try:
                if self._sync:
                    syscalls.fsync_directory(self._folder)
            except BaseException:
                syscalls.close(fd)
                fileio.discard(path)
                raise
        except OSError as error:
            raise storage_error(error, "beginning a journal segment", path=path) from error
        self._fd, self._path, self.size = fd, path, 0

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd, self.size = self._fd, -1, 0
            self._patches = PatchEncoder()
            syscalls.close(fd)

    def _truncate_batch(self) -> bool:
        """Cut off what may have been written of a failed batch; whether that worked.

        If not, the segment is closed for good. Recovery drops a torn last record; a complete one
        that was not acknowledged is at worst a change that did happen.
        """
        try:
            if syscalls.fstat(self._fd).st_size != self.size:
                syscalls.ftruncate(self._fd, self.size)
                os.lseek(self._fd, self.size, os.SEEK_SET)
        except OSError:
            self.close()
            return False
        return True


@dataclass(slots=True)
class WalSegment:
    """The contents of a segment, read back."""

    path: str
    records: list[list[ResolvedChange | Superseded]] = field(default_factory=list)
    """Each document has its last version here at least, and those that are no patches."""
    damaged: int = 0
    """Lines that cannot be read, or have a patch of one; they may have been acknowledged."""
    torn: int = 0
    """Bytes at the end that are an incomplete batch; nothing in them was acknowledged."""


def segments(folder: str) -> list[str]:
    """The paths of all segments, oldest first. Raises ``StorageError``."""
    names = sorted(filter(_NAME.fullmatch, fileio.list_folder(folder)), key=_number)
    return [f"{folder}/{name}" for name in names]


def read_segment(path: str) -> WalSegment:
    """Every record that may have been acknowledged, in order. Its checksum proves a record.

    A batch is written only when the one before it is durable, so only the last batch may have
    holes, where blocks did not reach the disk. It ends at the first hole: records behind it may
    build on what is lost, and were not acknowledged either. A line that cannot be read for another
    reason, or before the last batch, is damage. Raises ``StateCorruptedError`` for anything but a
    regular file, ``StorageError`` when it cannot be read.
    """
    found: list[tuple[int, list[ResolvedChange | Patched]]] = []
    versions = SegmentVersions()
    unread: list[int] = []
    holes: list[int] = []
    confirmed = start = 0
    splitter = logs.Splitter()

    def read(line: bytes) -> None:
        nonlocal confirmed
        changes, batch, _ = decode_journal_record(line)
        confirmed = max(confirmed, start if batch is None else batch)
        found.append((start, versions.take(changes)))

    for piece in fileio.read_pieces(path):
        for line in splitter.feed(piece):
            try:
                read(line)
            except StateCorruptedError:
                (holes if _was_not_written(line, start) else unread).append(start)
            start += len(line) + 1
    torn = splitter.unended
    rest = splitter.rest()
    for line in (rest, rest[:-1]):  # its newline may be missing, or be the byte that is damaged
        with contextlib.suppress(StateCorruptedError):
            read(line)
            torn = 0
            break
    end = start + splitter.unended
    hole = min((each for each in holes if each >= confirmed), default=end)
    records, forged = make_whole([changes for begins, changes in found if begins < hole])
    damaged = sum(begins < hole for begins in (*unread, *holes)) + forged
    return WalSegment(path, records, damaged, end - hole or torn)


def _was_not_written(line: bytes, start: int) -> bool:
    """Whether a line has the NULs of lost blocks: from its start, or a block's, to a block's end.

    A disk writes a block of 512 bytes or does not.
    """
    runs = [(start + run.start(), start + run.end()) for run in _NULS.finditer(line)]
    return bool(runs) and all(
        (first == start or first % _BLOCK == 0) and end % _BLOCK == 0 for first, end in runs
    )


def make_durable(paths: list[str], folder: str) -> None:
    """Fsync segments before files build on them: their writer may have died before its fsync.

    Raises ``StorageError``.
    """
    for path in paths:
        try:
            fd, _ = fileio.open_regular(path, syscalls.READ)
            try:
                syscalls.fsync(fd)
            finally:
                syscalls.close(fd)
        except StateCorruptedError:
            continue  # no regular file: reading it reports that
        except OSError as error:
            raise storage_error(error, "syncing the journal", path=path) from error
    if paths:
        fileio.sync_directory(folder)


def remove_segments(paths: list[str], folder: str, *, sync: bool) -> None:
    """Remove segments whose every change is durable in its file."""
    for path in paths:
        fileio.remove_file(path, sync=False)
    if paths and sync and fileio.stat_file(folder) is not None:
        # A segment that came back after a power cut would restore what was deleted since.
        fileio.sync_directory(folder)


def _number(name: str) -> int:
    return int(name.removesuffix(".jsonl"))


class LogSave(NamedTuple):
    """A commit on its way to the log; one without changes waits for those before it."""

    changes: Sequence[ResolvedChange] = ()


class GroupCommit:
    """Writes the records of many tasks to the log, in the order they were submitted.

    Saves that are ready in the same turn of the event loop share one write and one fdatasync; saves
    that arrive during a write share the next one.

    ``finished(saves, error)`` is called for each batch before its callers are woken: ``error`` is
    None, or the reason why nothing of the batch is durable; then all later saves failed too.
    ``unflushed()`` gives the changes that a new segment must repeat if the old one is in doubt.
    ``check(saves)`` is called in the writing thread before a batch is written, and raises what
    refuses it.
    """

    def __init__(
        self,
        log: WriteAheadLog,
        *,
        check: Callable[[Sequence[LogSave]], None],
        finished: Callable[[Sequence[LogSave], BaseException | None], None],
        unflushed: Callable[[], list[ResolvedChange]],
    ) -> None:
        self.log = log
        self._check = check
        self._unflushed = unflushed
        self._writer = Executor("journal", 1)
        self._saves: Batcher[LogSave, None] = Batcher(
            # mypy does not follow a ParamSpec through partial
            partial(self._writer.run, self._append_checked),  # type: ignore[call-arg]  # as above
            finished=finished,
            retry=self._retry,
            ordered=True,
        )
        self.submit = self._saves.submit
        """Queue a save; await the outcome."""

    async def seal(self) -> list[str]:
        """Close the open segment; the paths of all segments. The next record begins a new one."""
        return await self._writer.run(self.log.seal)

    async def close(self) -> None:
        """Wait for what was submitted. Nothing may be submitted after."""
        await self._saves.close()
        await self._writer.run(self.log.close)
        self._writer.close()

    def abandon(self) -> None:
        """End the thread and close the log; what was not durable is lost."""
        self._writer.close()
        self.log.close()

    def _append_checked(self, saves: Sequence[LogSave]) -> list[None]:
        self._check(saves)
        return self._append(saves)

    def _append(
        self, saves: Sequence[LogSave], repeated: Sequence[ResolvedChange] = ()
    ) -> list[None]:
        groups = [*([change] for change in repeated), *(save.changes for save in saves)]
        if groups := [group for group in groups if group]:
            self.log.append(groups)
        return [None] * len(saves)

    def _retry(self, saves: list[LogSave], error: BaseException) -> Awaitable[list[None]] | None:
        """Write a batch again, into a new segment that repeats the unflushed records."""
        if not isinstance(error, WalSyncError):
            return None
        return self._writer.run(self._append_again, saves, self._unflushed())

    def _append_again(
        self, saves: Sequence[LogSave], repeated: Sequence[ResolvedChange]
    ) -> list[None]:
        try:
            return self._append(saves, repeated)
        except StorageError as error:
            raise DurabilityUnknownError(
                f"the disk confirmed neither the journal nor a new one: {error}",
                number=error.errno,
                path=error.path,
            ) from error
