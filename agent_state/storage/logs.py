r"""Logs: one JSON object a line, appended in O(1), read from anywhere without reading it all.

A line is ``{"_crc": …, "_seq": …, …}`` and ends at ``\n`` alone. ``_seq`` counts from 1;
``_crc`` is the CRC-32 of ``<seq>:<canonical body>``; ``_dedupe`` is the caller's id, and
``_id`` the key where the file name cannot carry it. A line that a person wrote without them
counts on from the line before. All functions block and are called under the log's lock,
except ``seek`` and ``split``, which only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

import orjson

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    StateCorruptedError,
    storage_error,
)
from agent_state.protocols import LogRecord
from agent_state.serializers import canonical, parse_object
from agent_state.storage import atomic, paths, syscalls

RESERVED = frozenset({"_crc", "_seq", "_dedupe", "_id"})
BLOCK = 64 * 1024


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
        seq if type(seq) is int and seq > 0 else previous + 1,
        canonical(content),
        dedupe if type(dedupe) is str else None,
    )


class LogFile:
    """One log for writing. Keeps how it ends, so that an append reads nothing."""

    def __init__(self, path: str, key: Key, keep_torn: Callable[[bytes, str], object]) -> None:
        self.path = path
        self.key = key
        self._keep_torn = keep_torn
        self._tail: Tail | None = None
        self._ids: dict[str, int] | None = None
        self._ids_upto = 0

    def tail(self) -> Tail:
        """How the log ends now, a torn tail put aside. Raises ``StorageError``."""
        stamp = atomic.stat_file(self.path)
        if stamp is None:
            return Tail(0, 0, 0)
        if self._tail is None or (stamp.size, stamp.inode) != (self._tail.size, self._tail.inode):
            try:
                fd = syscalls.open(self.path, syscalls.APPEND)
                try:
                    self._tail = self._inspect(fd)
                finally:
                    syscalls.close(fd)
            except OSError as error:
                raise storage_error(error, "reading a log", path=self.path) from error
        return self._tail

    def append(self, records: Sequence[LogRecord], *, sync: bool) -> None:
        """Write the records' lines at the end, all or none. Their numbers must follow on.

        Raises ``StorageError``; then the log ends where it ended before. If that is not sure,
        it is a ``DurabilityUnknownError``.
        """
        data = b"".join(encode_line(self.key, record) for record in records)
        try:
            fd = syscalls.open(self.path, syscalls.APPEND)
        except OSError as error:
            raise storage_error(error, "opening a log", path=self.path) from error
        try:
            before = syscalls.fstat(fd)
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
        if sync and tail.size == 0:
            atomic.sync_directory(os.path.dirname(self.path))

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
        fd = syscalls.open(self.path, syscalls.APPEND)
        try:
            syscalls.ftruncate(fd, size)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)

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
        end, torn = _last_newline(fd, size), b""
        if end < size:
            torn = _pread(fd, end, min(size - end, BLOCK))
            try:
                whole = decode_line(torn, 0) if size - end <= BLOCK else None
            except StateCorruptedError:
                whole = None
            if whole is not None:  # only its newline is missing: an editor left it out
                atomic.write_all(fd, b"\n")
                end = size + 1
            else:
                self._keep_torn(torn, "the last line was torn; it was never acknowledged")
                syscalls.ftruncate(fd, end)
        return Tail(end, _last_seq(fd, end), status.st_ino)


def seek(path: str, *, after: int = 0, last: int | None = None) -> tuple[int, int, int]:
    """Where to start reading: offset, the number before it, and the end of the last whole line.

    Finds the place by halving, as lines are ordered by number. (0, 0, 0) without a log.
    """
    try:
        fd = syscalls.open(path, syscalls.READ)
    except FileNotFoundError:
        return 0, 0, 0
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        end = _last_newline(fd, syscalls.fstat(fd).st_size)
        if last is not None:
            after = max(after, _last_seq(fd, end) - last)
        low, high, previous = 0, end, 0
        while after > 0 and high - low > BLOCK:
            middle = _next_line(fd, (low + high) // 2, high)
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
        fd = syscalls.open(path, syscalls.READ)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        return _last_seq(fd, _last_newline(fd, syscalls.fstat(fd).st_size))
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


def split(chunk: bytes, rest: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines, and what remains of the last. ``str.splitlines`` would cut inside a record."""
    lines = (rest + chunk).split(b"\n")
    return lines[:-1], lines[-1]


def _read_from(path: str, offset: int, end: int) -> Iterator[LogRecord]:
    fd = syscalls.open(path, syscalls.READ)
    try:
        rest, previous = b"", 0
        while offset < end:
            chunk = syscalls.pread(fd, min(1 << 20, end - offset), offset)
            if not chunk:
                return
            offset += len(chunk)
            lines, rest = split(chunk, rest)
            for line in lines:
                try:
                    record = decode_line(line, previous)
                except StateCorruptedError:
                    continue  # readers report it; here only the ids of good lines matter
                previous = record.seq
                yield record
    finally:
        syscalls.close(fd)


def _pread(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := syscalls.pread(fd, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _last_newline(fd: int, end: int) -> int:
    """The offset just after the last newline before ``end``."""
    while end > 0:
        start = max(0, end - BLOCK)
        at = _pread(fd, start, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _last_seq(fd: int, end: int) -> int:
    """The number of the last line that says it, plus the lines after it that do not."""
    unnumbered = 0
    while end > 0:
        start = _last_newline(fd, end - 1)
        line = _pread(fd, start, end - 1 - start)
        try:
            seq = parse_object(line).get("_seq")
        except StateCorruptedError:
            seq, unnumbered = None, unnumbered - 1
        if type(seq) is int and seq > 0:
            return seq + unnumbered
        unnumbered += 1
        end = start
    return unnumbered


def _next_line(fd: int, offset: int, end: int) -> int:
    """The start of the first line at or after ``offset``."""
    while offset < end:
        block = _pread(fd, offset, min(BLOCK, end - offset))
        at = block.find(b"\n")
        if at >= 0:
            return offset + at + 1
        offset += len(block)
    return end


def _seq_at(fd: int, offset: int, end: int) -> int | None:
    """The number of the first readable line from ``offset`` on."""
    while offset < end:
        after = _next_line(fd, offset, end)
        try:
            seq = parse_object(_pread(fd, offset, after - 1 - offset)).get("_seq")
            if type(seq) is int:
                return seq
        except StateCorruptedError:
            pass  # a damaged line has no number; the next one has
        offset = after
    return None
