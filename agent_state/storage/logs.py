r"""Logs: one JSON object a line, appended in O(1), read from anywhere without reading it all.

A line is ``{"_crc": …, "_seq": …, …}`` and ends at ``\n`` alone. ``_seq`` counts from 1;
``_crc`` is the CRC-32 of ``<seq>:<canonical body>``; ``_dedupe`` is the caller's id, and
``_id`` the key where the file name cannot carry it. A line without a number, or with one that is
not above the number before it, counts on from there: a person wrote it, or git merged two logs. So
a number is an order, never an identity. A last line without its newline counts if it is a whole
record. All functions block, and only read.

Memory is bounded however long a line or a file is (a sparse file costs nothing to make): a line
over ``MAX_LINE`` is read as an empty one, which nothing can decode.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TypeGuard
from zlib import crc32

import orjson

from agent_state.errors import Key, SerializationError, StateCorruptedError, storage_error
from agent_state.protocols import LogRecord
from agent_state.serializers import canonical_json, parse_line
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

    def feed_last(self, piece: bytes) -> list[bytes]:
        """The lines that end in the last piece, with or without a newline."""
        lines = self.feed(piece)
        return [*lines, self.rest()] if self.unended else lines

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
    """The lines between two offsets; ``start`` is the beginning of a line, ``end`` an end."""
    splitter = Splitter()
    while start < end and (piece := pread(fd, start, min(BLOCK, end - start))):
        yield from splitter.feed(piece)
        start += len(piece)
    if splitter.unended:
        yield splitter.rest()


def backwards(fd: int, end: int) -> Iterator[bytes]:
    """The lines before ``end``, last first; ``end`` is an end of the lines, or 0."""
    splitter = Splitter()
    position = end - 1 if end > 0 and pread(fd, end - 1, 1) == b"\n" else end
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


def end_of_lines(fd: int, size: int) -> int:
    """The end of the last record: after its newline, or of the file if only that is missing."""
    end = last_newline(fd, size)
    if end < size <= end + MAX_LINE:
        return size if is_whole(pread(fd, end, size - end)) else end
    return end


def is_whole(rest: bytes) -> bool:
    """Whether a last line without its newline is a record, which an editor left so.

    One that ends with NULs is not: a power cut leaves the end of a write like that.
    """
    try:
        parse_line(rest)
    except StateCorruptedError:
        return False
    return not rest.endswith(b"\0")


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


def same(ours: LogRecord, other: LogRecord | None) -> bool:
    """Whether two records are one: the number, the dedupe key and the content."""
    if other is None or (ours.seq, ours.dedupe_key) != (other.seq, other.dedupe_key):
        return False
    return ours.body == other.body or _content(ours.body) == _content(other.body)


def _content(body: bytes) -> bytes:
    content = orjson.loads(body)
    return canonical_json({name: content[name] for name in content if name not in RESERVED})


def is_stamped(line: bytes, record: LogRecord) -> bool:
    """Whether a line has the checksum and number of its record: a store wrote it."""
    content = parse_line(line)
    return content.get("_seq") == record.seq and content.get("_crc") == line_checksum(
        record.seq, record.body
    )


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
        body = _content(body)  # it is empty, not canonical, or may have reserved keys
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
    content = parse_line(line)
    content.pop("_crc", None)
    content.pop("_id", None)
    seq = content.pop("_seq", None)
    dedupe = content.pop("_dedupe", None)
    return LogRecord(
        seq if is_seq(seq) and seq > previous else previous + 1,
        canonical_json(content),
        dedupe if type(dedupe) is str else None,
    )


def seek(path: str, *, after: int = 0, last: int | None = None) -> tuple[int, int, int]:
    """Where to start reading: offset, the number before it, and the end of the last line.

    Finds the place by halving if the lines are ordered by number; else it is the beginning.
    (0, 0, 0) without a log.
    """
    try:
        fd, status = fileio.open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0, 0
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        end = end_of_lines(fd, status.st_size)
        ordered = is_ordered(path, fd, end)
        if last is not None:
            after = max(after, last_number(path, fd, end) - last)
        low, high, previous = 0, end, 0
        while ordered and after > 0 and high - low > BLOCK:
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
        end = end_of_lines(fd, status.st_size)
        return last_number(path, fd, end)
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


def end_name(path: str) -> str | None:
    """The checksum that the last line states, by which a record knows what it follows.

    None without a line, or for one that nobody stamped. Raises ``StorageError``.
    """
    try:
        fd, status = fileio.open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        line = next(backwards(fd, end_of_lines(fd, status.st_size)), b"")
        found = parse_line(line).get("_crc") if line else None
    except StateCorruptedError:
        return None
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)
    return found if type(found) is str else None


def first_line(path: str) -> bytes:
    """The first line; empty if there is none."""
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


def records_from(path: str, offset: int, end: int, previous: int = 0) -> Iterator[LogRecord]:
    """The records between two offsets; ``previous`` is the number before them."""
    for line in lines_from(path, offset, end):
        try:
            record = decode_line(line, previous)
        except StateCorruptedError:
            continue  # readers report it; here only the ids of good lines matter
        previous = record.seq
        yield record


def last_seq_in(fd: int, end: int) -> int:
    """The number of the last line of an ordered log that has one, plus the lines after it."""
    unnumbered = 0
    for line in backwards(fd, end):
        try:
            seq = stated_seq(line)
        except StateCorruptedError:
            continue
        if seq is not None:
            return seq + unnumbered
        unnumbered += 1
    return unnumbered


def last_number(path: str, fd: int, end: int) -> int:
    """The number of the last line of an open log, whose lines end at ``end``."""
    if is_ordered(path, fd, end):
        return last_seq_in(fd, end)
    number = 0
    for line in forwards(fd, 0, end):
        try:
            number = max(stated_seq(line) or 0, number + 1)
        except StateCorruptedError:
            continue
    return number


def _seq_at(fd: int, offset: int, end: int) -> int | None:
    """The number of the first line from ``offset`` on that has one."""
    for line in forwards(fd, offset, end):
        try:
            seq = stated_seq(line)
        except StateCorruptedError:
            continue
        if seq is not None:
            return seq
    return None


# -- the order of the numbers ------------------------------------------------------------------

_HEAD = re.compile(
    rb'\{"_crc":"[0-9a-f]{8}",(?:"_dedupe":(?P<dedupe>"(?:[^"\\]|\\.)*"),)?'
    rb'(?:"_id":(?:"(?:[^"\\]|\\.)*"|\[[^\]]*\]),)?"_seq":(?P<seq>[1-9][0-9]{0,17})[,}]'
)
_HEAD_BYTES = 8192
_ORDERED_MAX = 10_000
_ordered: dict[str, tuple[int, int, int]] = {}
"""By path the inode, the size and the mtime of a log whose numbers ascend to there."""
_ordered_mutex = threading.Lock()


def is_ordered(path: str, fd: int, end: int) -> bool:
    """Whether the numbers that lines state ascend, so that a place may be found by halving.

    The first look at a log reads all of it, about as fast as the disk gives it; a later one reads
    what was added since.
    """
    status = syscalls.fstat(fd)
    inode, size, mtime = _ordered.get(path, (0, 0, 0))
    known = 0 < size <= end and inode == status.st_ino
    if known and (size == end and mtime == status.st_mtime_ns):
        return True
    if known and size < end and pread(fd, size - 1, 1) == b"\n":
        ordered = _ascend(fd, size, end, last_seq_in(fd, size))
    else:
        ordered = _is_contiguous(fd, end) or _ascend(fd, 0, end, 0)
    if ordered:
        note_ordered(path, status.st_ino, end, status.st_mtime_ns)
    return ordered


def note_ordered(path: str, inode: int, size: int, mtime_ns: int) -> None:
    """The numbers of this log ascend up to ``size``."""
    with _ordered_mutex:
        if len(_ordered) >= _ORDERED_MAX:
            _ordered.clear()
        _ordered[path] = (inode, size, mtime_ns)


def note_if_unknown(path: str, inode: int, size: int, mtime_ns: int) -> None:
    """The numbers ascend up to ``size``, as an index says, unless more is known."""
    if _ordered.get(path, (0, 0, 0))[:1] != (inode,):
        note_ordered(path, inode, size, mtime_ns)


def _ascend(fd: int, start: int, end: int, previous: int) -> bool:
    for line in forwards(fd, start, end):
        try:
            seq = stated_seq(line)
        except StateCorruptedError:
            continue
        if seq is not None and seq <= previous:
            return False
        previous = seq or previous + 1
    return True


def _is_contiguous(fd: int, end: int) -> bool:
    """Whether each block of a long log begins with the number that its place asks for.

    Lines are counted, not read, so this is fast; False for any log with a gap.
    """
    if end <= BLOCK:
        return False
    first = lines = 0
    for offset in range(0, end, BLOCK):
        block = pread(fd, offset, min(BLOCK + _HEAD_BYTES, end - offset))
        start = block.find(b"\n", 0, BLOCK) + 1 if offset else 0
        if (start or not offset) and start < len(block):
            head = _HEAD.match(block, start)
            if head is None:
                return False
            first = first or int(head["seq"])
            if int(head["seq"]) != first + lines + (1 if offset else 0):
                return False
        lines += block.count(b"\n", 0, BLOCK)
    return True


def stated_seq(line: bytes) -> int | None:
    """The valid number that a line states. Raises ``StateCorruptedError``."""
    head = _HEAD.match(line)
    if head is not None and line.endswith(b"}"):
        return int(head["seq"])
    seq = parse_line(line).get("_seq")
    return seq if is_seq(seq) else None


def number_and_key(line: bytes, previous: int) -> tuple[int, str | None]:
    """The number and the dedupe key of a line; ``previous`` is the number before it.

    Raises ``StateCorruptedError``, but not for every line that ``decode_line`` refuses.
    """
    head = _HEAD.match(line)
    if head is not None and line.endswith(b"}") and int(head["seq"]) > previous:
        text = head["dedupe"]
        if text is not None:
            with contextlib.suppress(orjson.JSONDecodeError):  # not UTF-8
                return int(head["seq"]), orjson.loads(text)
        elif b'"_dedupe"' not in line:
            return int(head["seq"]), None
    record = decode_line(line, previous)
    return record.seq, record.dedupe_key


def is_seq(value: object) -> TypeGuard[int]:
    """Whether a line's ``_seq`` is valid: the next number must be writable too."""
    return type(value) is int and 0 < value <= MAX_SEQ
