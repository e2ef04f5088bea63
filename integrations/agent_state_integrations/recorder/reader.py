"""Reads a recording: live log, segments, archives, exports and older logs, in order.

A recording may be written, rotated and archived while it is read. The live log is opened first,
before the other files are listed, and read last: if it is rotated afterwards, it is the same file
under another name. A segment that has become an archive since is read there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO

from agent_state.errors import StateCorruptedError, StateNotFoundError
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_line
from agent_state.storage import logs
from agent_state_integrations.recorder import formats, parquet
from agent_state_integrations.recorder.archive_index import (
    ArchiveEntry,
    ArchiveIndex,
    known_index,
)
from agent_state_integrations.recorder.copies import LEFT_OUT, CopyIndex
from agent_state_integrations.recorder.enrichment import enrich
from agent_state_integrations.recorder.files import KIND, LogSegment, Recording
from agent_state_integrations.recorder.formats import AnyFormat, Batch
from agent_state_integrations.recorder.lines import LineParser, Numbered, SkippedLines
from agent_state_integrations.recorder.message import RecordedMessage
from agent_state_integrations.recorder.query import Query
from agent_state_integrations.recorder.rules import Rules

_ATTEMPTS = 100
"""How often the files are listed again, when one was rotated in the meantime."""


class _CopiedRecording(Recording):
    """A recording whose folder is not below a state directory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent)
        self._own = folder

    @property
    def folder(self) -> Path:
        return self._own


@dataclass(frozen=True, slots=True)
class LogSource:
    """One file of messages."""

    path: Path
    format: AnyFormat
    recording: Recording | None = None
    segment: LogSegment | None = None
    """Which segment it is, or was made of; None for the live log and for other logs."""
    entry: ArchiveEntry | None = None
    """The entry of an archive in the index."""
    live: BinaryIO | None = None

    def may_hold(self, query: Query | None) -> bool:
        """Whether a message that is meant may be in it."""
        if query is None or self.entry is None:
            return True
        return query.may_be_in(self.entry.first_timestamp, self.entry.last_timestamp)

    @property
    def received(self) -> datetime:
        """The time for lines that name none: when the file was last written."""
        try:
            return datetime.fromtimestamp(self.path.stat().st_mtime, UTC)
        except (OSError, OverflowError, ValueError):
            return datetime.fromtimestamp(0, UTC)

    def batches(self, query: Query | None = None, *, backwards: bool = False) -> Iterator[Batch]:
        """The lines of the file; see ``formats.batches``."""
        found = self.opened()
        if found is not None:
            file, path, kind = found
            yield from formats.batches(file, path, kind, query, backwards=backwards)

    def opened(self) -> tuple[BinaryIO, Path, AnyFormat] | None:
        """The open file, wherever it is now; None if retention has removed it since.

        Raises ``StateCorruptedError`` when it should be there, and is not.
        """
        if self.live is not None:
            return os.fdopen(os.dup(self.live.fileno()), "rb", buffering=0), self.path, "jsonl"
        try:
            return formats.open_file(self.path), self.path, self.format
        except FileNotFoundError:
            if self.segment is None or self.recording is None:
                raise StateNotFoundError("there is no such file", path=self.path) from None
        for other in (*self.recording.archives(), *self.recording.segments()):
            if other.stem == self.segment.stem:
                with contextlib.suppress(FileNotFoundError):
                    return formats.open_file(other.path), other.path, other.format
        if known_index(self.recording).find(self.segment.stem) is not None:
            raise StateCorruptedError("an archive that the index names is missing", path=self.path)
        return None


@contextmanager
def sources(path: str | PathLike[str]) -> Iterator[list[LogSource]]:
    """The files that a path means: a state directory, a recording, a folder of logs, a file.

    In another folder: the logs and our Parquet files directly in it. Raises
    ``StateNotFoundError`` when there is nothing, ``StateCorruptedError`` for a Parquet file of
    another program.
    """
    where = Path(path).resolve()
    if not where.exists():
        raise StateNotFoundError("there is no such file or folder", path=where)
    if not where.is_dir():
        kind = formats.format_of(where)
        yield [LogSource(where, kind or "jsonl")]
        return
    recording = recording_at(where)
    if recording is None:
        yield _logs_in(where)
        return
    for attempt in range(1, _ATTEMPTS + 1):
        with _live(recording) as live:
            files = _files_of(recording, live)
            if _is_current(recording, live) or attempt == _ATTEMPTS:
                yield files
                return


def recording_at(where: Path) -> Recording | None:
    """The recording that a state directory has, or a folder is; None for another folder."""
    for recording in (Recording(where), Recording(where.parent), _CopiedRecording(where)):
        fits = recording.folder in (where, where / KIND)
        if fits and recording.has_begun():
            return recording
    return None


@contextmanager
def _live(recording: Recording) -> Iterator[BinaryIO | None]:
    try:
        file = formats.open_file(recording.current)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with file:
        yield file


def _files_of(recording: Recording, live: BinaryIO | None) -> list[LogSource]:
    index = known_index(recording)
    plain = recording.segments()  # before the archives, to which they move
    archived = {segment.stem: segment for segment in recording.archives()}
    found = {stem: _source(recording, segment, index) for stem, segment in archived.items()}
    for entry in index.archives:
        if entry.stem not in found:  # an error when it is opened
            path = recording.archive_path(entry.stem, entry.format)
            gone = LogSegment(entry.first_seq, entry.day, path, entry.format)
            found[entry.stem] = _source(recording, gone, index)
    for segment in plain:
        # It goes only after its archive has been verified: until then, it is the one to read.
        found[segment.stem] = _source(recording, segment, index)
    order = sorted(found.values(), key=lambda source: source.segment or _NEVER)
    if live is not None:
        order.append(LogSource(recording.current, "jsonl", recording, live=live))
    return order


_NEVER = LogSegment(0, "", Path())


def _source(recording: Recording, segment: LogSegment, index: ArchiveIndex) -> LogSource:
    entry = index.find(segment.stem) if segment.format != "jsonl" else None
    return LogSource(segment.path, segment.format, recording, segment, entry)


def _is_current(recording: Recording, live: BinaryIO | None) -> bool:
    """Whether the opened log is still the live one, so that nothing was rotated."""
    try:
        now = recording.current.stat()
    except (FileNotFoundError, NotADirectoryError):
        return live is None
    return live is not None and os.path.samestat(now, os.fstat(live.fileno()))


NO_LOGS = {
    "dead-letter.jsonl": "it holds dead letters",
    "history.jsonl": "a list of prompts, which the sessions hold too",
}
"""Files with the ending of a log that are none, and why."""


def copies_among(found: Sequence[LogSource]) -> CopyIndex:
    """The copies among logs that no recording of ours holds; it holds none. Raises as ``read``."""
    return CopyIndex.of(
        (source.path, source.batches)
        for source in found
        if source.recording is None and source.format != "parquet"
    )


def _logs_in(folder: Path) -> list[LogSource]:
    """The logs directly in a folder; its subfolders may hold copies of them."""
    found = []
    for path in sorted(folder.iterdir()):
        kind = formats.format_of(path)
        if kind is None or kind == "json" or not path.is_file() or path.name.startswith("."):
            continue
        if path.name in NO_LOGS:
            continue
        if kind == "parquet" and not parquet.is_ours(formats.open_file(path), path):
            continue
        found.append(LogSource(path, kind))
    if not found and not (folder / KIND).is_dir():
        raise StateNotFoundError("there is no recording and no log here", path=folder)
    return found


_BATCH = 1000
_SEQ = re.compile(rb'\{"_crc":"[0-9a-f]{8}","_seq":(\d{1,18})[,}]')


def read(
    path: str | PathLike[str],
    query: Query | None = None,
    *,
    rules: Rules | None = None,
    skipped: SkippedLines | None = None,
) -> Iterator[RecordedMessage]:
    """The messages that a query means, in the order of the log. Blocks; memory is bounded.

    ``path`` is a state directory, the folder of a recording, one file of a recording, an export,
    a log in an older form, or a folder with such logs directly in it. Messages without
    enrichment get it from ``rules``. Lines without a message are counted in ``skipped``.

    Raises ``StateNotFoundError`` when there is nothing, ``StateCorruptedError`` naming an archive
    that is damaged or missing, ``StorageError``, and ``MissingExtraError`` where one is needed.
    """
    for seq, record in read_records(path, query, rules=rules, skipped=skipped):
        yield RecordedMessage.from_record(record, seq)


def read_records(
    path: str | PathLike[str],
    query: Query | None = None,
    *,
    rules: Rules | None = None,
    skipped: SkippedLines | None = None,
) -> Iterator[Numbered]:
    """``read`` as plain objects, each with its number in the recording (0: it has none)."""
    found = _matching(path, query, rules, skipped if skipped is not None else SkippedLines())
    return found if query is None or query.limit is None else islice(found, query.limit)


def _matching(
    path: str | PathLike[str], query: Query | None, rules: Rules | None, skipped: SkippedLines
) -> Iterator[Numbered]:
    test = query.test() if query is not None else None
    backwards = query is not None and query.newest_first
    # Enrichment by these rules is in no column; only the time of a message is in the index.
    asked = query if rules is None else None
    with sources(path) as found:
        copies = copies_among(found)
        for source in reversed(found) if backwards else found:
            if not source.may_hold(query):
                continue
            parser = LineParser(source.path, source.received, skipped, backwards=backwards)
            with closing(_once(source, copies, asked, backwards=backwards)) as batches:
                for batch in batches:
                    for numbered in parser.records(batch):
                        if rules is not None:
                            enrich(numbered[1], rules)
                        if test is None or test(numbered[1]):
                            yield numbered


def _once(
    source: LogSource, copies: CopyIndex, asked: Query | None, *, backwards: bool
) -> Generator[Batch, None, None]:
    """The lines of a file without those that are copies."""
    if source.path not in copies:
        yield from source.batches(asked, backwards=backwards)
        return
    for batch in formats.in_order(
        copies.without_copies(source.path, source.batches()), backwards=backwards
    ):
        yield [line for line in batch if line is not LEFT_OUT]


def count(
    path: str | PathLike[str], query: Query | None = None, *, skipped: SkippedLines | None = None
) -> int:
    """How many messages a query means; in Parquet files without reading any. Raises as ``read``."""
    query = query or Query()
    skipped = skipped if skipped is not None else SkippedLines()
    test, total = query.test(), 0
    with sources(path) as found:
        copies = copies_among(found)
        for source in found:
            if source.may_hold(query):
                total += _count_in(source, copies, query, test, skipped)
    return total if query.limit is None else min(total, query.limit)


def _count_in(
    source: LogSource,
    copies: CopyIndex,
    query: Query,
    test: Callable[[JsonObject], bool] | None,
    skipped: SkippedLines,
) -> int:
    opened = source.opened()
    if opened is None:
        return 0
    file, path, kind = opened
    if kind == "parquet":
        return parquet.count(file, path, query)
    file.close()
    parser, total = LineParser(path, source.received, skipped), 0
    for batch in _once(source, copies, None, backwards=False):
        records = parser.records(batch)
        total += len(records) if test is None else sum(test(record) for _, record in records)
    return total


# -- lines as they stand in the log --------------------------------------------------------------


def raw_lines(
    recording: Recording | str | PathLike[str], first_seq: int, last_seq: int
) -> Iterator[bytes]:
    """The lines with these numbers as they were written, without newlines, wherever they are.

    A line's own number counts, and lines without one are left out. Raises as ``read``.
    """
    if not isinstance(recording, Recording):
        found = recording_at(Path(recording).resolve())
        if found is None:
            raise StateNotFoundError("there is no recording here", path=recording)
        recording = found
    if not recording.has_begun():
        return
    with sources(recording.folder) as files:
        for source in between(files, first_seq, last_seq):
            yield from lines_between(source, first_seq, last_seq)


def between(files: Sequence[LogSource], first_seq: int, last_seq: int) -> Iterator[LogSource]:
    """Those of a recording's files, which are in order, that may hold these numbers."""
    for number, source in enumerate(files):
        following = files[number + 1].segment if number + 1 < len(files) else None
        begins = source.segment.first_seq if source.segment is not None else 0
        ended = following is not None and following.first_seq <= first_seq
        ended = ended or (source.entry is not None and source.entry.last_seq < first_seq)
        if begins <= last_seq and not ended:
            yield source


def records_between(
    recording: Recording | str | PathLike[str],
    first_seq: int,
    last_seq: int,
    *,
    skipped: SkippedLines | None = None,
) -> Iterator[Numbered]:
    """The messages with these numbers. Raises as ``read``."""
    where = recording.folder if isinstance(recording, Recording) else recording
    unknown = datetime.fromtimestamp(0, UTC)
    parser = LineParser(where, unknown, skipped if skipped is not None else SkippedLines())
    found = raw_lines(recording, first_seq, last_seq)
    while batch := list(islice(found, _BATCH)):
        yield from parser.records(batch)


def lines_between(source: LogSource, first: int, last: int) -> Iterator[bytes]:
    """``raw_lines`` of one file."""
    opened = source.opened()
    if opened is None:
        return
    file, path, kind = opened
    with file:
        if kind == "parquet":
            batches = parquet.lines_between(file, path, first, last)
        elif kind == "jsonl":
            start, end = _place(file.fileno(), fspath(path), first)
            batches = ([line] for line in logs.forwards(file.fileno(), start, end))
        else:
            batches = formats.batches(file, path, kind)
        yield from _numbered(batches, first, last)


def _place(fd: int, path: str, first: int) -> tuple[int, int]:
    """Where to begin in an open log, and where its last record ends."""
    start, _, _ = logs.seek(path, after=first - 1)
    status = os.fstat(fd)
    try:
        same = os.path.samestat(Path(path).stat(), status)
    except FileNotFoundError:
        same = False
    return (start if same else 0), logs.end_of_lines(fd, status.st_size)


def _numbered(batches: Iterator[list[bytes]], first: int, last: int) -> Iterator[bytes]:
    for batch in batches:
        for line in batch:
            seq = number_of(line)
            if first <= seq <= last:
                yield line
            elif seq > last and _is_intact(line):
                return


def _is_intact(line: bytes) -> bool:
    """Whether the checksum of a line is right, so that its number can be trusted."""
    try:
        logs.decode_line(line, 0)
    except StateCorruptedError:
        return False
    return True


def number_of(line: bytes) -> int:
    """The number in a line; 0 for none. For our own lines the beginning is enough."""
    found = _SEQ.match(line)
    if found is not None and line.endswith(b"}"):
        return int(found[1])
    try:
        seq = parse_line(line).get("_seq")
    except StateCorruptedError:
        return 0
    return seq if logs.is_seq(seq) else 0
