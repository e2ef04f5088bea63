"""Appends to logs in O(1); a torn tail is repaired first. Everything here blocks.

Others write into logs too: a person, another program, git. Their lines are never in the way of a
record: its number is an order, and whether a log has it is told by its content.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    StateCorruptedError,
    UnmergedStateError,
    storage_error,
)
from agent_state.protocols import Incident, LogRecord
from agent_state.storage import fileio, log_index, logs, paths, syscalls
from agent_state.storage.log_index import Covered, LogIndex
from agent_state.storage.paths import DocumentPath
from agent_state.storage.quarantine import Quarantine
from agent_state.storage.tree import DocumentTree
from agent_state.storage.worktree import Worktree, has_conflict_markers

_LATE_SECONDS = 0.05
"""After a log was replaced, who has opened it before needs at most so long to add its line."""

_logger = logging.getLogger("agent_state.storage")


class Tail(NamedTuple):
    """How a log ends: bytes, last sequence number, inode."""

    size: int
    seq: int
    inode: int

    def fits(self, size: int, inode: int) -> bool:
        """Whether a file of this size and inode ends so."""
        return (size, inode) == (self.size, self.inode)


class LogWriter:
    """One log for writing. Remembers how it ends, so that an append reads nothing.

    ``keep_torn(data, reason)`` gets the bytes of a torn tail. ``quarantine(reason)`` moves a file
    away that is not a log; without it such a file raises ``StateCorruptedError``. ``tell(what)`` is
    called when lines of others were given new numbers; without it, lines whose numbers come twice
    stay as they are, and only count on. ``check(line)`` raises an ``AgentStateError`` for a line
    after which nothing may be appended. ``durable``: whether a log that is written anew is fsynced.
    ``index``: finds the records of a long log; without it all dedupe keys are kept in memory.
    """

    def __init__(
        self,
        path: str,
        key: Key,
        keep_torn: Callable[[bytes, str], object],
        quarantine: Callable[[str], object] | None = None,
        tell: Callable[[str], object] | None = None,
        *,
        check: Callable[[bytes], object] | None = None,
        durable: bool = True,
        index: LogIndex | None = None,
    ) -> None:
        self.path = path
        self.key = key
        self._tell = tell
        self._durable = durable
        self._mutex = threading.RLock()
        self._keep_torn = keep_torn
        self._quarantine = quarantine
        self._check = check or (lambda _: None)
        self._tail: Tail | None = None
        self._named = 0
        """The inode whose name is durable; the process that made the file may have died before."""
        self._moved = False
        """Whether it was told that lines were moved; it may happen again and again."""
        self._ids: dict[str, int] | None = None
        """The dedupe keys of the records that no index covers, with their numbers."""
        self._ids_upto = Tail(0, 0, 0)
        self._index = index
        self._covered = Covered(0, 0)

    def tail(self) -> Tail:
        """How the log ends, after a torn tail was cut off. Raises ``StorageError``.

        Where numbers come twice, or out of order, the log is numbered anew first.
        """
        with self._mutex:
            stamp = fileio.stat_file(self.path)
            if stamp is None:
                self._tail = None
            elif self._tail is None or not self._tail.fits(stamp.size, stamp.inode):
                with self._errors("reading a log"):
                    self._take_stock()
            return self._tail or Tail(0, 0, 0)

    def unchanged(self) -> bool:
        """Whether the file is as it was left here; whether there is none, if it never was."""
        with self._mutex:
            stamp, tail = fileio.stat_file(self.path), self._tail
            if stamp is None or tail is None:
                return stamp is None and tail is None
            return tail.fits(stamp.size, stamp.inode)

    def append(self, records: Sequence[LogRecord], *, sync: bool) -> None:
        """Write the records' lines at the end, all or none. Their numbers must follow on.

        If others have added lines by now, the records are numbered on from these. Raises
        ``StorageError``; then the log ends where it ended before. If that is not sure, it is a
        ``DurabilityUnknownError``.
        """
        try:
            with self._mutex:
                self._append(records, sync=sync)
        except AgentStateError:
            raise
        except OSError as error:
            raise storage_error(error, "appending to a log", path=self.path) from error

    def _append(self, records: Sequence[LogRecord], *, sync: bool) -> None:
        fd, tail = self._open_at_end()
        try:
            if records[0].seq <= tail.seq:
                records = _numbered_on(records, tail.seq)
            data = logs.encode_lines(self.key, records)
            try:
                fileio.write_all(fd, data)
                if sync:
                    syscalls.fdatasync(fd)
            except BaseException as error:
                self._truncate(fd, tail.size, error)
                raise
        finally:
            syscalls.close(fd)
        self._tail = Tail(tail.size + len(data), records[-1].seq, tail.inode)
        if self._ids is not None:
            self._learn(records, tail)
        if sync and self._named != tail.inode:
            fileio.sync_directory(os.path.dirname(self.path))
            self._named = tail.inode

    def bring(self, records: Sequence[LogRecord], *, sync: bool) -> int:
        """Append those records that the log does not have yet; they are ordered, and keep numbers.

        Lines of others that have taken such a number are moved behind them, and numbered on.
        Returns the number of the last line. Raises as ``append``.
        """
        with self._mutex:
            tail = self.tail()
            if tail.seq >= records[0].seq:
                with self._errors("appending to a log"):
                    records = self._lacking(records)
                    if not records or (tail.seq >= records[0].seq and self._insert(records)):
                        return self.tail().seq
            self.append(records, sync=sync)
            return self._tail.seq if self._tail is not None else records[-1].seq

    def _lacking(self, records: Sequence[LogRecord]) -> list[LogRecord]:
        """Those of the records that the log does not have."""
        found = self._lines_from(records[0].seq)
        there = {record.seq: record for _, _, record in found if record is not None}
        return [each for each in records if not logs.same(each, there.get(each.seq))]

    def _insert(self, records: Sequence[LogRecord]) -> bool:
        """Put records in before the lines that have their numbers; False if no place is sure."""
        lines = [*self._lines_from(records[0].seq)]
        theirs, known = list[tuple[bytes, LogRecord | None]](), list[LogRecord]()
        missing = {record.seq for record in records}
        for _, line, record in lines:
            if record is not None and logs.is_stamped(line, record) and record.seq not in missing:
                known.append(record)  # written here earlier
            else:
                theirs.append((line, record))
        ordered = sorted([*records, *known], key=attrgetter("seq"))
        last, behind = ordered[-1].seq, list[bytes]()
        for line, record in theirs:
            if record is None:
                behind.append(line + b"\n")
            else:
                last = max(record.seq, last + 1)
                behind.append(logs.encode_lines(self.key, [replace(record, seq=last)]))
        at, end = lines[0][0], self.tail().size
        if at + sum(len(line) + 1 for _, line, _ in lines) != end:
            return False  # a line is too long to be read, or was added this moment
        ours = [logs.encode_lines(self.key, ordered)]
        size, inode = self._rewrite(at, chain(ours, behind), end)
        self._tail = Tail(size, last, inode)
        if not self._moved:
            self._report(f"lines of others stood where record {records[0].seq} belongs, now behind")
            self._moved = True
        return True

    def _lines_from(self, seq: int) -> Iterator[tuple[int, bytes, LogRecord | None]]:
        """The lines from a number on, each with its offset, and its record unless it is damaged."""
        offset, previous, end = logs.seek(self.path, after=seq - 1)
        begun = False
        for line in logs.lines_from(self.path, offset, end):
            record = None
            try:
                record = logs.decode_line(line, previous)
                previous = record.seq
            except StateCorruptedError:
                pass  # readers report it
            begun = begun or previous >= seq
            if begun:
                yield offset, line, record
            offset += len(line) + 1

    def _take_stock(self) -> None:
        """Find out how the log ends. Raises ``OSError``."""
        fd, status = self._open()
        try:
            if self._index is not None and status.st_size >= log_index.INDEXED_BYTES:
                self._index.load(fd, status.st_size)  # it knows whether the numbers ascend
            self._tail = self._inspect(fd)
            if self._tell and not logs.is_ordered(self.path, fd, self._tail.size):
                self._number_anew(fd, self._tail.size)
        finally:
            syscalls.close(fd)

    def _number_anew(self, fd: int, end: int) -> None:
        """Write the log anew with ascending numbers: those that every reader has counted."""
        if sum(len(line) + 1 for line in logs.forwards(fd, 0, end)) != end:
            return  # a line is too long to be read
        changed: list[int] = []
        last = 0

        def lines() -> Iterator[bytes]:
            nonlocal last
            for line in logs.forwards(fd, 0, end):
                try:
                    record, stated = logs.decode_line(line, last), logs.stated_seq(line)
                except StateCorruptedError:
                    yield line + b"\n"
                    continue
                last = record.seq
                if stated in (None, last):
                    yield line + b"\n"
                else:
                    changed.append(last)
                    yield logs.encode_lines(self.key, [record])

        size, inode = self._rewrite(0, lines(), end)
        self._tail = Tail(size, last, inode)
        self._report(
            "numbers came twice, or out of order: "
            f"{len(changed)} records, from {changed[0]} on, have new ones"
        )

    def _rewrite(self, kept: int, lines: Iterable[bytes], end: int) -> tuple[int, int]:
        """Replace the log by its first ``kept`` bytes and these lines; its size and inode.

        ``end``: so many bytes of it were read. What somebody adds to it meanwhile is added to the
        new one.
        Raises ``OSError``.
        """
        self._tail = self._ids = None
        folder = os.path.dirname(self.path)
        temporary = f"{folder}/{fileio.TEMPORARY}{secrets.token_hex(8)}"
        with ExitStack() as stack:
            source, _ = fileio.open_regular(self.path, syscalls.READ)
            stack.callback(syscalls.close, source)
            fd = syscalls.open(temporary, syscalls.CREATE_NEW | os.O_APPEND)
            stack.callback(syscalls.close, fd)
            try:
                for start in range(0, kept, logs.BLOCK):
                    fileio.write_all(fd, logs.pread(source, start, min(logs.BLOCK, kept - start)))
                for line in lines:
                    fileio.write_all(fd, line)
                if self._durable:
                    syscalls.fdatasync(fd)
                status = syscalls.fstat(fd)
                syscalls.rename(temporary, self.path)
            except BaseException:
                fileio.discard(temporary)
                raise
            time.sleep(_LATE_SECONDS)
            if added := logs.pread(source, end, syscalls.fstat(source).st_size - end):
                fileio.write_all(fd, added)
        if self._durable:
            fileio.sync_directory(folder)
        return status.st_size, status.st_ino

    def _report(self, what: str) -> None:
        _logger.warning("%s: %s", self.path, what)
        if self._tell is not None:
            self._tell(what)

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except AgentStateError:
            raise
        except OSError as error:
            raise storage_error(error, action, path=self.path) from error

    def _open(self) -> tuple[int, os.stat_result]:
        """Open the log for writing; a file that is not a log is quarantined first."""
        try:
            return fileio.open_regular(self.path, syscalls.APPEND)
        except StateCorruptedError as error:
            if self._quarantine is None:
                raise
            self._quarantine(error.message)
            return fileio.open_regular(self.path, syscalls.APPEND)

    def _open_at_end(self) -> tuple[int, Tail]:
        """Open the log for writing, and how it ends now. Raises ``OSError``."""
        fd, status = self._open()
        tail = self._tail
        if tail is not None and tail.fits(status.st_size, status.st_ino):
            return fd, tail
        if not status.st_size:
            return fd, Tail(0, 0, status.st_ino)
        syscalls.close(fd)
        self._take_stock()
        fd, status = self._open()
        if self._tail is not None and self._tail.fits(status.st_size, status.st_ino):
            return fd, self._tail
        try:
            return fd, self._inspect(fd)  # somebody goes on writing
        except BaseException:
            syscalls.close(fd)
            raise

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

    def rewrite(self, body_of: Callable[[LogRecord], bytes]) -> int:
        """Write the log anew with other bodies, whole or not at all; how many changed.

        Numbers and dedupe keys stay, and so do lines that cannot be read. Raises ``StorageError``.
        """
        with self._mutex, self._errors("writing a log anew"):
            end, count = self.tail().size, 0

            def lines() -> Iterator[bytes]:
                nonlocal count
                previous = 0
                for line in logs.lines_from(self.path, 0, end):
                    try:
                        record = logs.decode_line(line, previous)
                    except StateCorruptedError:
                        yield line + b"\n"
                        continue
                    previous = record.seq
                    body = body_of(record)
                    if body == record.body:
                        yield line + b"\n"
                    else:
                        count += 1
                        yield logs.encode_lines(self.key, [replace(record, body=body)])

            found = logs.records_from(self.path, 0, end)
            if any(body_of(record) != record.body for record in found):
                self._rewrite(0, lines(), end)
            return count

    def truncate(self, size: int) -> None:
        """Cut off what was appended after ``size``. Raises ``OSError``."""
        with self._mutex:
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
        with self._errors("cutting a log"):
            self.truncate(cut)
        return behind

    def find(self, dedupe_key: str) -> int | None:
        """The number of the record with this id."""
        with self._mutex, self._errors("reading a log"):
            seq = self._recent_ids().get(dedupe_key)
            if seq is None and self._covered.size:
                return self._indexed(dedupe_key)
            return seq

    def ids(self) -> dict[str, int] | None:
        """Every dedupe id with its record's number; None for a long log, which has an index.

        The first call reads the log once.
        """
        with self._mutex, self._errors("reading a log"):
            recent = self._recent_ids()
            return None if self._covered.size else recent

    def _recent_ids(self) -> dict[str, int]:
        """The ids of the records that no index covers, up to date."""
        tail, known = self.tail(), self._ids_upto
        if self._ids is None or tail.size < known.size or tail.inode != known.inode:
            self._use_index(tail)
        if tail.size - self._covered.size >= log_index.INDEXED_BYTES and self._index is not None:
            self._use_index(tail, extend=True)
        ids, (upto, last, _) = self._ids or {}, self._ids_upto
        if tail.size > upto:
            for line in logs.lines_from(self.path, upto, tail.size):
                try:
                    last, dedupe_key = logs.number_and_key(line, last)
                except StateCorruptedError:
                    continue  # readers report it
                if dedupe_key is not None:
                    ids[dedupe_key] = last
            self._ids_upto = tail
        self._ids = ids
        return ids

    def _use_index(self, tail: Tail, *, extend: bool = False) -> None:
        """Take what the index covers; ``extend``: up to the end of the log."""
        self._ids, self._ids_upto = {}, Tail(0, 0, tail.inode)
        self._covered = Covered(0, 0)
        if self._index is None or tail.size < log_index.INDEXED_BYTES:
            return
        try:
            fd, _ = fileio.open_regular(self.path, syscalls.READ)
            try:
                if extend:
                    self._covered = self._index.extend(fd, tail.size)
                else:
                    self._covered = self._index.load(fd, tail.size)
            finally:
                syscalls.close(fd)
        except (OSError, AgentStateError) as error:
            self._give_up_index(error)
        self._ids_upto = Tail(*self._covered, tail.inode)

    def _give_up_index(self, error: Exception) -> None:
        """Go on without an index."""
        _logger.warning("%s: its index cannot be used, all of it is read: %s", self.path, error)
        self._index, self._ids, self._covered = None, None, Covered(0, 0)

    def _indexed(self, dedupe_key: str) -> int | None:
        """The number of the record with this id, if the index covers it."""
        for _ in range(2):
            if self._index is None or not self._covered.size:
                break
            try:
                found = log_index.read_entries(self.path, self._index.find(dedupe_key, whole=True))
                return found[-1].seq if found else None
            except (FileNotFoundError, StateCorruptedError):
                # Another process has merged its files, or somebody has edited the log.
                self._ids = None
                self._index.discard()
            except (OSError, AgentStateError) as error:
                self._give_up_index(error)
            self._recent_ids()
        return self._recent_ids().get(dedupe_key)

    def _learn(self, records: Sequence[LogRecord], before: Tail) -> None:
        """Remember the ids of appended records, if all earlier ids are known."""
        if self._ids is None or self._tail is None:
            return
        if before != self._ids_upto and (before.size or self._ids_upto.size):
            return
        if (
            self._index is not None
            and self._tail.size - self._covered.size >= log_index.INDEXED_BYTES
        ):
            self._use_index(self._tail, extend=True)
            return
        for record in records:
            if record.dedupe_key is not None:
                self._ids[record.dedupe_key] = record.seq
        self._ids_upto = self._tail

    def _inspect(self, fd: int) -> Tail:
        """Find the last complete line; keep a torn tail, and cut it off."""
        status = syscalls.fstat(fd)
        size = status.st_size
        end = logs.last_newline(fd, size)
        self._check(next(logs.backwards(fd, end), b""))
        if end < size:
            if logs.end_of_lines(fd, size) == size:  # only its newline is missing
                fileio.write_all(fd, b"\n")
                end = size + 1
            else:
                for start in range(end, size, logs.MAX_LINE):
                    torn = logs.pread(fd, start, min(size - start, logs.MAX_LINE))
                    self._keep_torn(torn, "the last line was torn; it was never acknowledged")
                syscalls.ftruncate(fd, end)
        return Tail(end, logs.last_number(self.path, fd, end), status.st_ino)


def _numbered_on(records: Iterable[LogRecord], last: int) -> list[LogRecord]:
    return [replace(record, seq=number) for number, record in enumerate(records, last + 1)]


class LogWriters:
    """The one writer of each log of a tree in this process."""

    def __init__(
        self, tree: DocumentTree, quarantine: Quarantine, worktree: Worktree, *, durable: bool
    ) -> None:
        self._tree = tree
        self._root = tree.root
        self._quarantine = quarantine
        self._worktree = worktree
        self._durable = durable
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
            self._tree.take_by_hand(at, paths.LOG)
            move = self._quarantine.move
            writer = self._writers[at.path] = LogWriter(
                at.path,
                at.key,
                partial(self._keep_torn, at),
                lambda reason: move(at.path, reason, at.kind, at.key),
                partial(self._tell, at),
                check=partial(self._refuse_markers, at),
                durable=self._durable,
                index=LogIndex(self._root, at.path, durable=self._durable),
            )
        return writer

    def unchanged(self, at: DocumentPath) -> bool:
        """Whether the file of a log is as it was left here. Raises ``StorageError``."""
        writer = self._writers.get(at.path)
        return writer is None or writer.unchanged()

    def _keep_torn(self, at: DocumentPath, torn: bytes, reason: str) -> None:
        kept = self._quarantine.keep(at.path, torn, reason, at.kind, at.key)
        path = at.path[len(self._root) + 1 :]
        self._quarantine.report(path, reason, at.kind, at.key, kept)

    def _refuse_markers(self, at: DocumentPath, line: bytes) -> None:
        if has_conflict_markers(line):
            raise UnmergedStateError(
                "it has conflict markers; resolve them", kind=at.kind, key=at.key, path=at.path
            )

    def _tell(self, at: DocumentPath, what: str) -> None:
        path = at.path[len(self._root) + 1 :]
        self._quarantine.tell(Incident(what, at.kind, at.key, path))

    def forget(self, at: DocumentPath) -> None:
        """The log is about to be removed; the next append begins a new one."""
        self._writers.pop(at.path, None)
