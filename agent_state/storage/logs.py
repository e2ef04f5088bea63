r"""Logs: one JSON object a line, appended in O(1), read from anywhere without reading it all.

A line is ``{"_crc": …, "_seq": …, …}`` and ends at ``\n`` alone. ``_seq`` counts from 1;
``_crc`` is the CRC-32 of ``<seq>:<canonical body>``; ``_dedupe`` is the caller's id, and
``_id`` the key where the file name cannot carry it. A line that a person wrote without them
counts on from the line before. All functions block and are called under the log's lock,
except ``seek`` and ``last_seq``, which only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeGuard
from zlib import crc32

import orjson

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    SerializationError,
    StateCorruptedError,
    storage_error,
)
from agent_state.protocols import LogRecord
from agent_state.serializers import canonical, parse_object
from agent_state.storage import atomic, lines, paths, syscalls

RESERVED = frozenset({"_crc", "_seq", "_dedupe", "_id"})
MAX_SEQ = 2**62
"""What a line may say. What is counted on from there is below the 64 bits that can be written."""
_MAX_RECORD = lines.MAX_LINE - 1024 * 1024
"""Room is left for the reserved keys."""


class Tail(NamedTuple):
    """How a log ends: bytes, last sequence number, inode."""

    size: int
    seq: int
    inode: int


def encode_line(key: Key, record: LogRecord) -> bytes:
    """One line, with its newline."""
    content = orjson.loads(record.body)
    content["_crc"] = line_checksum(record.seq, record.body)
    content["_seq"] = record.seq
    if record.dedupe_id is not None:
        content["_dedupe"] = record.dedupe_id
    if not paths.self_describing(key):
        content["_id"] = key[0] if len(key) == 1 else list(key)
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def check_record(body: bytes, dedupe_id: object) -> None:
    """Raises ``SerializationError`` for a record that could not be read back."""
    if dedupe_id is not None and type(dedupe_id) is not str:
        raise SerializationError(
            f"a dedupe id is text, not {type(dedupe_id).__name__}", field="dedupe_id"
        )
    try:
        size = len(body) + len((dedupe_id or "").encode())
    except UnicodeEncodeError as error:
        why = "a lone surrogate is not Unicode text"
        raise SerializationError(why, field="dedupe_id") from error
    if size > _MAX_RECORD:
        raise SerializationError(f"a record of {size} bytes is over the limit of {_MAX_RECORD}")


def line_checksum(seq: int, body: bytes) -> str:
    """What ``_crc`` says on a line that we wrote."""
    return f"{crc32(b'%d:%b' % (seq, body)):08x}"


def decode_line(line: bytes, previous: int) -> LogRecord:
    """The record in a line without its newline; ``previous`` is the number before it.

    A wrong ``_crc`` on a line that is JSON means a person changed it, and it counts as it is.
    Raises ``StateCorruptedError`` for anything else.
    """
    content = parse_object(line)
    content.pop("_crc", None)
    content.pop("_id", None)
    seq = content.pop("_seq", None)
    dedupe = content.pop("_dedupe", None)
    return LogRecord(
        seq if is_seq(seq) else previous + 1,
        canonical(content),
        dedupe if type(dedupe) is str else None,
    )


class LogFile:
    """One log for writing. Keeps how it ends, so that an append reads nothing.

    ``keep_torn`` is given the bytes of a torn tail and the reason, ``put_aside`` the reason why
    what stands at ``path`` is no log.
    """

    def __init__(
        self,
        path: str,
        key: Key,
        keep_torn: Callable[[bytes, str], object],
        put_aside: Callable[[str], object] | None = None,
    ) -> None:
        self.path = path
        self.key = key
        self._keep_torn = keep_torn
        self._put_aside = put_aside
        self._tail: Tail | None = None
        self._named = 0
        """The inode whose name is known to be durable; whoever made the file may have died."""
        self._ids: dict[str, int] | None = None
        self._ids_upto = 0

    def tail(self) -> Tail:
        """How the log ends now, a torn tail put aside. Raises ``StorageError``."""
        stamp = atomic.stat_file(self.path)
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
        """Open the log for writing, a new one if what stands there is none."""
        try:
            return atomic.open_regular(self.path, syscalls.APPEND)
        except StateCorruptedError as error:
            if self._put_aside is None:
                raise
            self._put_aside(error.message)
            return atomic.open_regular(self.path, syscalls.APPEND)

    def append(self, records: Sequence[LogRecord], *, sync: bool) -> None:
        """Write the records' lines at the end, all or none. Their numbers must follow on.

        Raises ``StorageError``; then the log ends where it ended before. If that is not sure,
        it is a ``DurabilityUnknownError``.
        """
        data = b"".join(encode_line(self.key, record) for record in records)
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
                atomic.write_all(fd, data)
                if sync:
                    syscalls.fdatasync(fd)
            except BaseException as error:
                self._cut_back(fd, tail.size, error)
                raise
            self._tail = Tail(tail.size + len(data), records[-1].seq, before.st_ino)
        except AgentStateError:
            raise
        except OSError as error:
            raise storage_error(error, "appending to a log", path=self.path) from error
        finally:
            syscalls.close(fd)
        if sync and self._named != before.st_ino:
            atomic.sync_directory(os.path.dirname(self.path))
            self._named = before.st_ino

    def _cut_back(self, fd: int, size: int, cause: BaseException) -> None:
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
        """Take back what was appended after ``size``. Raises ``OSError``."""
        self._tail = None
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
        at, previous, end = seek(self.path, after=after)
        cut, damaged, behind = -1, list[bytes](), list[LogRecord]()
        for line in _lines_from(self.path, at, end):
            try:
                record = decode_line(line, previous)
            except StateCorruptedError:
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

    def find(self, dedupe_id: str) -> int | None:
        """The number of the record with this id."""
        return self.ids().get(dedupe_id)

    def ids(self) -> dict[str, int]:
        """Every dedupe id with its record's number. The first question reads the log once."""
        tail = self.tail()
        if self._ids is None or tail.size < self._ids_upto:
            self._ids, self._ids_upto = {}, 0
        if tail.size > self._ids_upto:
            try:
                for record in _read_from(self.path, self._ids_upto, tail.size):
                    if record.dedupe_id is not None:
                        self._ids[record.dedupe_id] = record.seq
            except OSError as error:
                raise storage_error(error, "reading a log", path=self.path) from error
            self._ids_upto = tail.size
        return self._ids

    def _inspect(self, fd: int) -> Tail:
        """Find the last whole line; put a torn tail aside and cut it off."""
        status = syscalls.fstat(fd)
        size = status.st_size
        end = lines.last_newline(fd, size)
        if end < size:
            if self._is_record(fd, end, size):  # only its newline is missing
                atomic.write_all(fd, b"\n")
                end = size + 1
            else:
                for start in range(end, size, lines.MAX_LINE):
                    torn = lines.pread(fd, start, min(size - start, lines.MAX_LINE))
                    self._keep_torn(torn, "the last line was torn; it was never acknowledged")
                syscalls.ftruncate(fd, end)
        return Tail(end, _last_seq(fd, end), status.st_ino)

    def _is_record(self, fd: int, start: int, end: int) -> bool:
        """Whether what no newline ends is a whole record: an editor left it out."""
        if end - start > lines.MAX_LINE:
            return False
        try:
            decode_line(lines.pread(fd, start, end - start), 0)
        except StateCorruptedError:
            return False
        return True


def seek(path: str, *, after: int = 0, last: int | None = None) -> tuple[int, int, int]:
    """Where to start reading: offset, the number before it, and the end of the last whole line.

    Finds the place by halving, as lines are ordered by number. (0, 0, 0) without a log.
    """
    try:
        fd, status = atomic.open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0, 0
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        end = lines.last_newline(fd, status.st_size)
        if last is not None:
            after = max(after, _last_seq(fd, end) - last)
        low, high, previous = 0, end, 0
        while after > 0 and high - low > lines.BLOCK:
            middle = lines.next_line(fd, (low + high) // 2, high)
            seq = _seq_at(fd, middle, high)
            if seq is None or seq > after:
                high = (low + high) // 2
            else:
                low, previous = middle, seq - 1
        return low, previous, end
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


def last_seq(path: str) -> int:
    """The number of the last record of a log that may be written meanwhile; 0 without a log."""
    try:
        fd, status = atomic.open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        return _last_seq(fd, lines.last_newline(fd, status.st_size))
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


def first_line(path: str) -> bytes:
    """The first whole line; nothing when there is none."""
    try:
        fd, status = atomic.open_regular(path, syscalls.READ)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        return next(lines.forwards(fd, 0, status.st_size), b"")
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


def _lines_from(path: str, offset: int, end: int) -> Iterator[bytes]:
    """Whole lines of a log, which need not be there if there are none. Raises ``StorageError``."""
    if offset >= end:
        return
    try:
        fd, _ = atomic.open_regular(path, syscalls.READ)
        try:
            yield from lines.forwards(fd, offset, end)
        finally:
            syscalls.close(fd)
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error


def _read_from(path: str, offset: int, end: int) -> Iterator[LogRecord]:
    previous = 0
    for line in _lines_from(path, offset, end):
        try:
            record = decode_line(line, previous)
        except StateCorruptedError:
            continue  # readers report it; here only the ids of good lines matter
        previous = record.seq
        yield record


def _last_seq(fd: int, end: int) -> int:
    """The number of the last line that says it, plus the lines after it that do not."""
    unnumbered = 0
    for line in lines.backwards(fd, end):
        try:
            seq = parse_object(line).get("_seq")
        except StateCorruptedError:
            continue
        if is_seq(seq):
            return seq + unnumbered
        unnumbered += 1
    return unnumbered


def _seq_at(fd: int, offset: int, end: int) -> int | None:
    """The number of the first line from ``offset`` on that says it."""
    for line in lines.forwards(fd, offset, end):
        try:
            seq = parse_object(line).get("_seq")
        except StateCorruptedError:
            continue
        if is_seq(seq):
            return seq
    return None


def is_seq(value: object) -> TypeGuard[int]:
    """Whether a line's ``_seq`` can be meant: what comes after it must be writable too."""
    return type(value) is int and 0 < value <= MAX_SEQ
