r"""Logs: one JSON object a line, appended in O(1), read from anywhere without reading it all.

A line is ``{"_crc": …, "_seq": …, …}`` and ends at ``\n`` alone. ``_seq`` counts from 1;
``_crc`` is the CRC-32 of ``<seq>:<canonical body>``; ``_dedupe`` is the caller's id, and
``_id`` the key where the file name cannot carry it. A line that a person wrote without them
counts on from the line before. All functions block, and only read.

Memory is bounded however long a line or a file is (a sparse file costs nothing to make): a line
over ``MAX_LINE`` is read as an empty one, which nothing can decode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TypeGuard
from zlib import crc32

import orjson

from agent_state.errors import (
    Key,
    SerializationError,
    StateCorruptedError,
    storage_error,
)
from agent_state.protocols import LogRecord
from agent_state.serializers import canonical_json, parse_object
from agent_state.storage import fileio, paths, syscalls

BLOCK = 64 * 1024
MAX_LINE = fileio.MAX_BYTES


class Splitter:
    """Cuts pieces of a file into lines."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.unended = 0
        """Bytes after the last newline."""

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that end in this piece. ``str.splitlines`` would cut inside a record."""
        head, *others = piece.split(b"\n")
        self._add(head)
        if not others:
            return []
        first = self.rest()
        self._parts, self.unended = [], 0
        self._add(others.pop())
        return [first, *others]

    def rest(self) -> bytes:
        """The bytes after the last newline."""
        return b"".join(self._parts)

    def _add(self, part: bytes) -> None:
        self.unended += len(part)
        if self.unended <= MAX_LINE:
            self._parts.append(part)
        else:
            self._parts.clear()


def forwards(fd: int, start: int, end: int) -> Iterator[bytes]:
    """The complete lines between two offsets; ``start`` is the beginning of a line."""
    splitter = Splitter()
    while start < end and (piece := pread(fd, start, min(BLOCK, end - start))):
        yield from splitter.feed(piece)
        start += len(piece)


def backwards(fd: int, end: int) -> Iterator[bytes]:
    """The complete lines before ``end``, last first; ``end`` is just after a newline, or 0."""
    splitter = Splitter()
    position = end - 1
    while position > 0:
        start = max(0, position - BLOCK)
        # Feed reversed blocks: in reverse, the newline comes before its line.
        for line in splitter.feed(pread(fd, start, position - start)[::-1]):
            yield line[::-1]
        position = start
    if end > 0:
        yield splitter.rest()[::-1]


def last_newline(fd: int, end: int) -> int:
    """The offset just after the last newline before ``end``."""
    while end > 0:
        start = max(0, end - BLOCK)
        at = pread(fd, start, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def next_line(fd: int, offset: int, end: int) -> int:
    """The start of the first line at or after ``offset``."""
    while offset < end and (block := pread(fd, offset, min(BLOCK, end - offset))):
        at = block.find(b"\n")
        if at >= 0:
            return offset + at + 1
        offset += len(block)
    return end


def pread(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := syscalls.pread(fd, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


RESERVED = frozenset({"_crc", "_seq", "_dedupe", "_id"})
MAX_SEQ = 2**62
"""The highest ``_seq`` of a line; the numbers after it still fit into 64 bits."""
_MAX_RECORD = MAX_LINE - 1024 * 1024
"""Room is left for the reserved keys."""


def encode_lines(key: Key, records: Iterable[LogRecord]) -> bytes:
    """The lines of these records, each with its newline."""
    carried = b""
    if not paths.self_describing(key):
        carried = b'"_id":%b,' % orjson.dumps(key[0] if len(key) == 1 else list(key))
    return b"".join(map(_encode_line, repeat(carried), records))


def _encode_line(carried: bytes, record: LogRecord) -> bytes:
    """The reserved keys, then the body's, in the body's order."""
    body = record.body
    if body[:2] != b'{"' or b"\n" in body or b'"_' in body:
        content = orjson.loads(body)  # it is empty, not canonical, or may have reserved keys
        body = canonical_json({name: content[name] for name in content if name not in RESERVED})
    dedupe = b""
    if record.dedupe_key is not None:
        dedupe = b'"_dedupe":%b,' % orjson.dumps(record.dedupe_key)
    crc = crc32(record.body, crc32(b"%d:" % record.seq))
    rest = b",%b\n" % body[1:] if body != b"{}" else b"}\n"
    return b'{"_crc":"%08x",%b%b"_seq":%d%b' % (crc, dedupe, carried, record.seq, rest)


def check_record(body: bytes, dedupe_key: object) -> None:
    """Raises ``SerializationError`` for a record that could not be read back."""
    if dedupe_key is not None and type(dedupe_key) is not str:
        raise SerializationError(
            f"a dedupe key is text, not {type(dedupe_key).__name__}", field="dedupe_key"
        )
    try:
        size = len(body) + len((dedupe_key or "").encode())
    except UnicodeEncodeError as error:
        why = "a lone surrogate is not Unicode text"
        raise SerializationError(why, field="dedupe_key") from error
    if size > _MAX_RECORD:
        raise SerializationError(f"a record of {size} bytes is over the limit of {_MAX_RECORD}")


def line_checksum(seq: int, body: bytes) -> str:
    """The value of ``_crc``."""
    return f"{crc32(body, crc32(b'%d:' % seq)):08x}"


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
        canonical_json(content),
        dedupe if type(dedupe) is str else None,
    )


def seek(path: str, *, after: int = 0, last: int | None = None) -> tuple[int, int, int]:
    """Where to start reading: offset, the number before it, and the end of the last line.

    Finds the place by halving, as lines are ordered by number. (0, 0, 0) without a log.
    """
    try:
        fd, status = fileio.open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0, 0
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        end = last_newline(fd, status.st_size)
        if last is not None:
            after = max(after, last_seq_in(fd, end) - last)
        low, high, previous = 0, end, 0
        while after > 0 and high - low > BLOCK:
            middle = next_line(fd, (low + high) // 2, high)
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
    """The number of the last record; 0 without a log. A writer may be appending."""
    try:
        fd, status = fileio.open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        return last_seq_in(fd, last_newline(fd, status.st_size))
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


def first_line(path: str) -> bytes:
    """The first complete line; empty if there is no complete line."""
    try:
        fd, status = fileio.open_regular(path, syscalls.READ)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        return next(forwards(fd, 0, status.st_size), b"")
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


def lines_from(path: str, offset: int, end: int) -> Iterator[bytes]:
    """The lines between two offsets; no log is needed for none. Raises ``StorageError``."""
    if offset >= end:
        return
    try:
        fd, _ = fileio.open_regular(path, syscalls.READ)
        try:
            yield from forwards(fd, offset, end)
        finally:
            syscalls.close(fd)
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error


def records_from(path: str, offset: int, end: int) -> Iterator[LogRecord]:
    previous = 0
    for line in lines_from(path, offset, end):
        try:
            record = decode_line(line, previous)
        except StateCorruptedError:
            continue  # readers report it; here only the ids of good lines matter
        previous = record.seq
        yield record


def last_seq_in(fd: int, end: int) -> int:
    """The number of the last line that has one, plus the lines after it."""
    unnumbered = 0
    for line in backwards(fd, end):
        try:
            seq = parse_object(line).get("_seq")
        except StateCorruptedError:
            continue
        if is_seq(seq):
            return seq + unnumbered
        unnumbered += 1
    return unnumbered


def _seq_at(fd: int, offset: int, end: int) -> int | None:
    """The number of the first line from ``offset`` on that has one."""
    for line in forwards(fd, offset, end):
        try:
            seq = parse_object(line).get("_seq")
        except StateCorruptedError:
            continue
        if is_seq(seq):
            return seq
    return None


def is_seq(value: object) -> TypeGuard[int]:
    """Whether a line's ``_seq`` is valid: the next number must be writable too."""
    return type(value) is int and 0 < value <= MAX_SEQ
