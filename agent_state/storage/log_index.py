"""Finds the records of a long log by their dedupe keys, without reading the log.

Beside the log, in ``.index/``, lies a folder with a few files. Each covers a stretch of the log's
bytes, which its name gives, and has one line for each record with a dedupe key: the key, the number
and the offset, sorted. Where four files of about the same size follow one another, they become one,
so their number grows with the logarithm of the log's length. What no file covers is at the end of
the log, and is read.

The files are derived and may be removed at any time. Each names the checksum of the bytes before
its end; where the log has others there, it is written anew from that place on. Whoever finds an
entry looks at its line. All functions block, and raise ``OSError`` or ``AgentStateError``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from heapq import merge
from itertools import chain
from operator import attrgetter
from typing import NamedTuple
from zlib import crc32

import orjson

from agent_state.errors import StateCorruptedError
from agent_state.protocols import LogRecord
from agent_state.storage import fileio, logs, syscalls

INDEX = ".index"
INDEXED_BYTES = 4 * 1024 * 1024
"""How long the end of a log may be that no file covers; a shorter log has no index."""
_MERGED = 4
_CHECKED_BYTES = 1024
_HEADER_BYTES = 1024
_PIECE = 4096


class LogIndexEntry(NamedTuple):
    """A record with a dedupe key: the key, its number, and where its line begins."""

    dedupe_key: str
    seq: int
    offset: int


class Covered(NamedTuple):
    """The bytes of a log that are covered, and the number of the last record there."""

    size: int
    seq: int


@dataclass(frozen=True, slots=True)
class _Header:
    """The first line of a file."""

    start: int
    end: int
    last: int
    """The number of the last record."""
    unkeyed: bool
    """Whether there are records without a dedupe key."""
    ordered: bool
    """Whether the numbers that the lines state ascend."""
    checksum: int
    """Of the log's bytes before ``end``."""
    size: int
    """The bytes that follow the header."""


@dataclass(frozen=True, slots=True)
class _IndexFile:
    """A file that covers a stretch of the log."""

    path: str
    header: _Header
    begin: int
    """Where the entries begin."""

    @property
    def level(self) -> int:
        """How often it is four times as long as the shortest."""
        return ((self.header.end - self.header.start) // INDEXED_BYTES).bit_length() // 2


class LogIndex:
    """The index of one log. ``folder``: where its files are, below ``root``."""

    def __init__(self, root: str, path: str, *, durable: bool) -> None:
        self._root = root
        self._path = path
        self._folder = folder_of(root, path)
        self._durable = durable
        self._runs: list[_IndexFile] = []

    @property
    def covered(self) -> Covered:
        """How much of the log is covered."""
        return (
            Covered(self._runs[-1].header.end, self._runs[-1].header.last) if self._runs else _NONE
        )

    @property
    def has_unkeyed(self) -> bool:
        """Whether there are records without a dedupe key in what is covered."""
        return any(run.header.unkeyed for run in self._runs)

    def load(self, fd: int, size: int) -> Covered:
        """Take the files that fit the log, which is open and ``size`` bytes long."""
        found: dict[int, list[_IndexFile]] = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for name in fileio.list_folder(self._folder):
                run = _read_header(f"{self._folder}/{name}")
                if run is not None:
                    found.setdefault(run.header.start, []).append(run)
        self._runs, at = [], 0
        while at in found:
            fitting = (run for run in found[at] if _fits(run.header, fd, size))
            run = max(fitting, key=lambda run: run.header.end, default=None)
            if run is None:
                break
            self._runs.append(run)
            at = run.header.end
        if self._runs and all(run.header.ordered for run in self._runs):
            status = syscalls.fstat(fd)
            mtime_ns = status.st_mtime_ns if at == status.st_size else 0
            logs.note_if_unknown(self._path, status.st_ino, at, mtime_ns)
        return self.covered

    def extend(self, fd: int, size: int) -> Covered:
        """Cover an open log up to ``size``, which is the end of a line."""
        fileio.make_directories(self._root, self._folder[len(self._root) + 1 :], sync=self._durable)
        start, last = self.covered
        while start < size:
            end = min(size, start + INDEXED_BYTES)
            end = end if end == size else logs.next_line(fd, end, size)
            header, lines = _index(fd, start, end, last)
            self._runs.append(self._write(header, lines))
            start, last = end, header.last
            self._merge()
        return self.covered

    def discard(self) -> None:
        """Remove all files."""
        self._runs = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for name in fileio.list_folder(self._folder):
                fileio.discard(f"{self._folder}/{name}")

    def find(self, prefix: str, *, whole: bool = False) -> list[LogIndexEntry]:
        """The entries whose keys begin so; ``whole``: whose keys are this."""
        text = orjson.dumps([prefix])
        wanted = text[:-1] + b"," if whole else text[:-2]
        return [*chain.from_iterable(_search(run, wanted) for run in self._runs)]

    def _merge(self) -> None:
        while (
            len(last := self._runs[-_MERGED:]) == _MERGED and len({run.level for run in last}) == 1
        ):
            header = _Header(
                start=last[0].header.start,
                end=last[-1].header.end,
                last=last[-1].header.last,
                unkeyed=any(run.header.unkeyed for run in last),
                ordered=all(run.header.ordered for run in last),
                checksum=last[-1].header.checksum,
                size=sum(run.header.size for run in last),
            )
            self._runs[-_MERGED:] = [self._write(header, merge(*map(_lines, last)))]
            for run in last:
                fileio.discard(run.path)

    def _write(self, header: _Header, lines: Iterable[bytes]) -> _IndexFile:
        temporary = f"{self._folder}/{fileio.TEMPORARY}{secrets.token_hex(8)}"
        path = f"{self._folder}/{header.start}-{header.end}.jsonl"
        first = orjson.dumps(asdict(header)) + b"\n"
        fd = syscalls.open(temporary, syscalls.CREATE_NEW)
        try:
            try:
                waiting, size = [first], 0
                for line in lines:
                    waiting.append(line)
                    size += len(line)
                    if size > logs.BLOCK:
                        fileio.write_all(fd, b"".join(waiting))
                        waiting, size = [], 0
                fileio.write_all(fd, b"".join(waiting))
                if self._durable:  # a torn file would hide records
                    syscalls.fdatasync(fd)
            finally:
                syscalls.close(fd)
            syscalls.rename(temporary, path)
        except BaseException:
            fileio.discard(temporary)
            raise
        return _IndexFile(path, header, len(first))


_NONE = Covered(0, 0)
_OFFSET = attrgetter("offset")


def folder_of(root: str, path: str) -> str:
    """Where the index of a log is."""
    return f"{root}/{INDEX}{path[len(root) :]}"


def remove_orphans(root: str, files: Iterable[os.DirEntry[str]]) -> int:
    """Remove those files of indexes whose logs are gone; how many there were."""
    removed, folders = 0, set[str]()
    for entry in files:
        folder = os.path.dirname(entry.path)
        if (
            folder in folders
            or fileio.stat_file(f"{root}{folder[len(root) + len(INDEX) + 1 :]}") is None
        ):
            folders.add(folder)
            fileio.discard(entry.path)
            removed += 1
    for folder in folders:
        with contextlib.suppress(OSError):
            syscalls.rmdir(folder)
    return removed


def read_entries(path: str, entries: Iterable[LogIndexEntry]) -> list[LogRecord]:
    """The records of these entries, in the order of the log; a damaged line is left out.

    Raises ``StateCorruptedError`` when another line stands in the place of one.
    """
    fd, status = fileio.open_regular(path, syscalls.READ)
    try:
        found = (_record_at(fd, entry, status.st_size) for entry in sorted(entries, key=_OFFSET))
        return [record for record in found if record is not None]
    finally:
        syscalls.close(fd)


def _record_at(fd: int, entry: LogIndexEntry, size: int) -> LogRecord | None:
    line = next(logs.forwards(fd, entry.offset, size), b"")
    try:
        record = logs.decode_line(line, entry.seq - 1)
    except StateCorruptedError:
        if entry.offset and logs.pread(fd, entry.offset - 1, 1) != b"\n":
            raise
        return None
    if (record.dedupe_key, record.seq) != (entry.dedupe_key, entry.seq):
        raise StateCorruptedError("the index does not fit the log")
    return record


def find_records(root: str, path: str, prefix: str) -> list[LogRecord] | None:
    """The records of a log whose dedupe keys begin so, in order. Nothing is written.

    None where only reading the log tells: it is short, or has no index that fits, or has records
    without a dedupe key.
    """
    index = LogIndex(root, path, durable=False)
    try:
        fd, status = fileio.open_regular(path, syscalls.READ)
        try:
            end = logs.end_of_lines(fd, status.st_size)
            covered = index.load(fd, end)
        finally:
            syscalls.close(fd)
        if not covered.size or index.has_unkeyed:
            return None
        found = read_entries(path, index.find(prefix))
        last = covered.seq
        for line in logs.lines_from(path, covered.size, end):
            before = last
            try:
                last, dedupe_key = logs.number_and_key(line, last)
                if dedupe_key is None:
                    return None
                if dedupe_key.startswith(prefix):
                    found.append(logs.decode_line(line, before))
            except StateCorruptedError:
                continue  # readers report it
    except (FileNotFoundError, StateCorruptedError):  # somebody is writing it
        return None
    return found


def _index(fd: int, start: int, end: int, previous: int) -> tuple[_Header, Sequence[bytes]]:
    """The entries of the lines between two offsets; ``previous`` is the number before them."""
    lines, unkeyed, ordered, offset = list[bytes](), False, True, start
    for line in logs.forwards(fd, start, end):
        try:
            stated = logs.stated_seq(line)
            seq, dedupe_key = logs.number_and_key(line, previous)
        except StateCorruptedError:
            pass  # readers report it
        else:
            ordered = ordered and (stated is None or stated > previous)
            previous = seq
            if dedupe_key is None:
                unkeyed = True
            else:
                lines.append(orjson.dumps([dedupe_key, seq, offset]) + b"\n")
        offset += len(line) + 1
    if offset != end:
        raise StateCorruptedError("a line is too long to be indexed")
    lines.sort()
    checksum = _checksum(fd, end)
    size = sum(map(len, lines))
    return _Header(start, end, previous, unkeyed, ordered, checksum, size), lines


def _checksum(fd: int, end: int) -> int:
    start = max(0, end - _CHECKED_BYTES)
    return crc32(logs.pread(fd, start, end - start))


def _fits(header: _Header, fd: int, size: int) -> bool:
    return header.end <= size and _checksum(fd, header.end) == header.checksum


def _read_header(path: str) -> _IndexFile | None:
    """The file at a path; None if it is not whole."""
    if os.path.basename(path).startswith(fileio.TEMPORARY):
        return None
    try:
        fd, status = fileio.open_regular(path, syscalls.READ)
    except FileNotFoundError:
        return None
    try:
        first = logs.pread(fd, 0, _HEADER_BYTES).partition(b"\n")[0]
    finally:
        syscalls.close(fd)
    try:
        run = _IndexFile(path, _Header(**orjson.loads(first)), len(first) + 1)
    except (TypeError, ValueError):
        return None
    return run if status.st_size == run.begin + run.header.size else None


def _lines(run: _IndexFile) -> Iterator[bytes]:
    for line in logs.lines_from(run.path, run.begin, run.begin + run.header.size):
        yield line + b"\n"


def _search(run: _IndexFile, wanted: bytes) -> Iterator[LogIndexEntry]:
    """The entries of a file whose lines begin so."""
    fd, status = fileio.open_regular(run.path, syscalls.READ)
    try:
        end = run.begin + run.header.size
        if status.st_size != end:
            raise StateCorruptedError("a file of an index was changed", path=run.path)
        low, high = run.begin, end  # every line before ``low`` comes before what is wanted
        while high - low > _PIECE:
            middle = (low + high) // 2
            start = _next_line(fd, middle, high)
            if start < high and logs.pread(fd, start, len(wanted)) < wanted:
                low = start
            else:
                high = middle
        for line in _lines_from(fd, low, end):
            if line.startswith(wanted):
                try:
                    yield LogIndexEntry(*orjson.loads(line))
                except (TypeError, ValueError) as error:
                    raise StateCorruptedError("an index is damaged", path=run.path) from error
            elif line > wanted:
                return
    finally:
        syscalls.close(fd)


def _lines_from(fd: int, start: int, end: int) -> Iterator[bytes]:
    """As ``logs.forwards``, in small pieces: few lines are looked at."""
    splitter = logs.Splitter()
    while start < end and (piece := logs.pread(fd, start, min(_PIECE, end - start))):
        yield from splitter.feed(piece)
        start += len(piece)


def _next_line(fd: int, offset: int, end: int) -> int:
    """The start of the first line after ``offset``."""
    while offset < end and (piece := logs.pread(fd, offset, min(256, end - offset))):
        at = piece.find(b"\n")
        if at >= 0:
            return offset + at + 1
        offset += len(piece)
    return end
