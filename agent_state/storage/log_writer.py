"""Appends to logs in O(1); a torn tail is repaired first. Everything here blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    StateCorruptedError,
    UnmergedStateError,
    storage_error,
)
from agent_state.protocols import LogRecord
from agent_state.storage import fileio, logs, syscalls
from agent_state.storage.paths import DocumentPath
from agent_state.storage.quarantine import Quarantine
from agent_state.storage.worktree import Worktree, has_conflict_markers


class Tail(NamedTuple):
    """How a log ends: bytes, last sequence number, inode."""

    size: int
    seq: int
    inode: int


class LogWriter:
    """One log for writing. Remembers how it ends, so that an append reads nothing.

    ``keep_torn(data, reason)`` gets the bytes of a torn tail. ``quarantine(reason)`` moves a file
    away that is not a log; without it such a file raises ``StateCorruptedError``. ``check(line)``
    raises an ``AgentStateError`` for a line after which nothing may be appended.
    """

    def __init__(
        self,
        path: str,
        key: Key,
        keep_torn: Callable[[bytes, str], object],
        quarantine: Callable[[str], object] | None = None,
        check: Callable[[bytes], object] | None = None,
    ) -> None:
        self.path = path
        self.key = key
        self._keep_torn = keep_torn
        self._quarantine = quarantine
        self._check = check or (lambda _: None)
        self._tail: Tail | None = None
        self._named = 0
        """The inode whose name is durable; the process that made the file may have died before."""
        self._ids: dict[str, int] | None = None
        self._ids_upto = 0
        self._ids_inode = 0

    def tail(self) -> Tail:
        """How the log ends, after a torn tail was cut off. Raises ``StorageError``."""
        stamp = fileio.stat_file(self.path)
        if stamp is None:
            return Tail(0, 0, 0)
        if self._tail is None or (stamp.size, stamp.inode) != (self._tail.size, self._tail.inode):
            try:
                fd, _ = self._open()
                try:
                    self._tail = self._inspect(fd)
                finally:
                    syscalls.close(fd)
            except AgentStateError:
                raise
            except OSError as error:
                raise storage_error(error, "reading a log", path=self.path) from error
        return self._tail

    def _open(self) -> tuple[int, os.stat_result]:
        """Open the log for writing; a file that is not a log is quarantined first."""
        try:
            return fileio.open_regular(self.path, syscalls.APPEND)
        except StateCorruptedError as error:
            if self._quarantine is None:
                raise
            self._quarantine(error.message)
            return fileio.open_regular(self.path, syscalls.APPEND)

    def append(self, records: Sequence[LogRecord], *, sync: bool) -> None:
        """Write the records' lines at the end, all or none. Their numbers must follow on.

        Raises ``StorageError``; then the log ends where it ended before. If that is not sure,
        it is a ``DurabilityUnknownError``.
        """
        data = logs.encode_lines(self.key, records)
        try:
            fd, before = self._open()
        except AgentStateError:
            raise
        except OSError as error:
            raise storage_error(error, "opening a log", path=self.path) from error
        try:
            tail = self._tail
            if tail is None or (before.st_size, before.st_ino) != (tail.size, tail.inode):
                tail = self._inspect(fd)
            try:
                fileio.write_all(fd, data)
                if sync:
                    syscalls.fdatasync(fd)
            except BaseException as error:
                self._truncate(fd, tail.size, error)
                raise
            self._tail = Tail(tail.size + len(data), records[-1].seq, before.st_ino)
            if self._ids is not None:
                self._learn(records, tail)
        except AgentStateError:
            raise
        except OSError as error:
            raise storage_error(error, "appending to a log", path=self.path) from error
        finally:
            syscalls.close(fd)
        if sync and self._named != before.st_ino:
            fileio.sync_directory(os.path.dirname(self.path))
            self._named = before.st_ino

    def _truncate(self, fd: int, size: int, cause: BaseException) -> None:
        self._tail = None
        try:
            syscalls.ftruncate(fd, size)
        except OSError as error:
            raise DurabilityUnknownError(
                f"appending failed ({cause}), and so did taking it back: {error.strerror}",
                number=error.errno,
                path=self.path,
            ) from error

    def truncate(self, size: int) -> None:
        """Cut off what was appended after ``size``. Raises ``OSError``."""
        self._tail = self._ids = None
        fd = syscalls.open(self.path, syscalls.APPEND & ~os.O_CREAT)
        try:
            syscalls.ftruncate(fd, size)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)

    def cut_damage(self, after: int) -> list[LogRecord]:
        """Cut the log where the first line past record ``after`` cannot be read.

        The good records behind it are returned. Of what was not synced, a power cut may leave a
        later block without an earlier one. Raises ``StorageError``.
        """
        if not self.tail().size:
            return []
        at, previous, end = logs.seek(self.path, after=after)
        cut, damaged, behind = -1, list[bytes](), list[LogRecord]()
        for line in logs.lines_from(self.path, at, end):
            try:
                record = logs.decode_line(line, previous)
            except StateCorruptedError:
                self._check(line)
                damaged.append(line)
                cut = at if cut < 0 else cut
            else:
                previous = record.seq
                if previous <= after:  # damage before it is older, and stays
                    cut, damaged, behind = -1, [], []
                elif cut >= 0:
                    behind.append(record)
            at += len(line) + 1
        if cut < 0 or at != end:  # with a line too long to be read, no place is sure
            return []
        for line in damaged:
            self._keep_torn(line, "a line was torn before it was synced; the journal had it")
        try:
            self.truncate(cut)
        except OSError as error:
            raise storage_error(error, "cutting a log", path=self.path) from error
        return behind

    def find(self, dedupe_key: str) -> int | None:
        """The number of the record with this id."""
        return self.ids().get(dedupe_key)

    def ids(self) -> dict[str, int]:
        """Every dedupe id with its record's number. The first call reads the log once."""
        tail = self.tail()
        if self._ids is None or tail.size < self._ids_upto or tail.inode != self._ids_inode:
            self._ids, self._ids_upto, self._ids_inode = {}, 0, tail.inode
        if tail.size > self._ids_upto:
            try:
                for record in logs.records_from(self.path, self._ids_upto, tail.size):
                    if record.dedupe_key is not None:
                        self._ids[record.dedupe_key] = record.seq
            except OSError as error:
                raise storage_error(error, "reading a log", path=self.path) from error
            self._ids_upto = tail.size
        return self._ids

    def _learn(self, records: Sequence[LogRecord], before: Tail) -> None:
        """Remember the ids of appended records, if all earlier ids are known."""
        known = (before.size, before.inode) == (self._ids_upto, self._ids_inode)
        if self._ids is not None and self._tail is not None and known:
            for record in records:
                if record.dedupe_key is not None:
                    self._ids[record.dedupe_key] = record.seq
            self._ids_upto = self._tail.size

    def _inspect(self, fd: int) -> Tail:
        """Find the last complete line; keep a torn tail, and cut it off."""
        status = syscalls.fstat(fd)
        size = status.st_size
        end = logs.last_newline(fd, size)
        self._check(next(logs.backwards(fd, end), b""))
        if end < size:
            if self._is_record(fd, end, size):  # only its newline is missing
                fileio.write_all(fd, b"\n")
                end = size + 1
            else:
                for start in range(end, size, logs.MAX_LINE):
                    torn = logs.pread(fd, start, min(size - start, logs.MAX_LINE))
                    self._keep_torn(torn, "the last line was torn; it was never acknowledged")
                syscalls.ftruncate(fd, end)
        return Tail(end, logs.last_seq_in(fd, end), status.st_ino)

    def _is_record(self, fd: int, start: int, end: int) -> bool:
        """Whether bytes without a final newline are a complete record: an editor left it out."""
        if end - start > logs.MAX_LINE:
            return False
        try:
            logs.decode_line(logs.pread(fd, start, end - start), 0)
        except StateCorruptedError:
            return False
        return True


class LogWriters:
    """The one writer of each log below ``root`` in this process."""

    def __init__(self, root: str, quarantine: Quarantine, worktree: Worktree) -> None:
        self._root = root
        self._quarantine = quarantine
        self._worktree = worktree
        self._writers: dict[str, LogWriter] = {}

    def writer(self, at: DocumentPath) -> LogWriter:
        """The writer of a log.

        Raises ``StorageError`` for a symlink among its folders, and ``UnmergedStateError`` for a
        log that git has as unmerged, or whose last line is a conflict marker.
        """
        if at.path in self._worktree.unmerged:
            self._worktree.check(at)
        fileio.has_folders(self._root, at.path)
        writer = self._writers.get(at.path)
        if writer is None:
            move = self._quarantine.move
            writer = self._writers[at.path] = LogWriter(
                at.path,
                at.key,
                partial(self._keep_torn, at),
                lambda reason: move(at.path, reason, at.kind, at.key),
                partial(self._refuse_markers, at),
            )
        return writer

    def _keep_torn(self, at: DocumentPath, torn: bytes, reason: str) -> None:
        kept = self._quarantine.keep(at.path, torn, reason, at.kind, at.key)
        path = at.path[len(self._root) + 1 :]
        self._quarantine.report(path, reason, at.kind, at.key, kept)

    def _refuse_markers(self, at: DocumentPath, line: bytes) -> None:
        if has_conflict_markers(line):
            raise UnmergedStateError(
                "it has conflict markers; resolve them", kind=at.kind, key=at.key, path=at.path
            )

    def forget(self, at: DocumentPath) -> None:
        """The log is about to be removed; the next append begins a new one."""
        self._writers.pop(at.path, None)
