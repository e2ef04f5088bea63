"""The archiver: rotated segments become archives, and retention removes the oldest archives.

A plain segment is removed only when its archive is durable, has been read back completely, has the
hash of the segment's bytes and is in the index. Killed at any moment, a run leaves the segment, the
archive, or both, which readers treat as one; the next run continues from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Self

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import (
    AgentStateError,
    QueryError,
    StateCorruptedError,
    StateDirectoryInUseError,
    StateNotFoundError,
)
from agent_state.protocols import JsonObject
from agent_state.storage import fileio, locks, logs
from agent_state_integrations.recorder import formats
from agent_state_integrations.recorder.archive_index import (
    INDEX,
    ArchiveEntry,
    ArchiveIndex,
    known_index,
    read_index,
    write_index,
)
from agent_state_integrations.recorder.files import (
    KIND,
    AtomicFile,
    Format,
    LogSegment,
    Recording,
    writing_failed,
)
from agent_state_integrations.recorder.lazy_imports import arrow, has_arrow
from agent_state_integrations.recorder.lines import LineParser, Numbered, SkippedLines
from agent_state_integrations.recorder.parquet import ParquetLogWriter

MB = 1_000_000
PARQUET_PAST = 50 * MB
COMPRESS_PAST = timedelta(days=30)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_AGE = re.compile(r"(\d{1,6})\s*d?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """When a segment becomes an archive, and when an archive is removed.

    ``parquet_past``: while the plain segments together exceed this many bytes, the oldest becomes
    Parquet. ``compress_past``: a plain segment that is older is compressed. ``keep_for`` and
    ``keep_bytes``: archives that are older, and the oldest while all exceed this many bytes, are
    removed; None keeps all. A segment's age counts from the day in its name.
    """

    parquet_past: int = PARQUET_PAST
    compress_past: timedelta = COMPRESS_PAST
    keep_for: timedelta | None = None
    keep_bytes: int | None = None


@dataclass(slots=True)
class ArchiveReport:
    """The actions of a run, or with ``dry_run`` its plan. The names are those of segments."""

    dry_run: bool = False
    parquet: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    """Archives that an earlier run had written when it died; now in the index."""
    removed: list[str] = field(default_factory=list)
    """Archives that retention removed, with what is in them."""
    plain_bytes: int = 0
    """Plain segments before the run."""
    freed_bytes: int = 0
    """Plain segments that went, less the archives that came; and archives removed."""

    def to_dict(self) -> JsonObject:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """The result of reading all archives."""

    archives: int
    messages: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> JsonObject:
        return {**asdict(self), "ok": self.ok}


def size_of(text: str) -> int:
    """``50MB``, ``1.5GiB`` or ``1000`` as bytes. Raises ``QueryError``."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise QueryError(f"{text!r:.40} is not a size; write 50MB or 2GiB")
    power = " kmgt".index(found[2].lower()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def age_of(text: str) -> timedelta:
    """``30d``, or ``30``, as days. Raises ``QueryError``."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise QueryError(f"{text!r:.40} is not an age; write 30d")
    return timedelta(days=int(found[1]))


@dataclass(slots=True)
class SegmentContents:
    """The contents of a segment, counted line by line."""

    lines: int = 0
    messages: int = 0
    last_seq: int = 0
    first_timestamp: str | None = None
    last_timestamp: str | None = None

    def see(self, records: Iterable[Numbered]) -> None:
        """Count these messages."""
        for seq, record in records:
            moment = record["Timestamp"]
            self.messages += 1
            self.last_seq = max(self.last_seq, seq)
            if self.first_timestamp is None or moment < self.first_timestamp:
                self.first_timestamp = moment
            if self.last_timestamp is None or moment > self.last_timestamp:
                self.last_timestamp = moment


class _SummingParser(LineParser):
    """A parser that notes what it has read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, datetime.fromtimestamp(0, UTC), SkippedLines())
        self.seen = SegmentContents()

    def record(self, line: bytes) -> Numbered:
        self.seen.lines += 1
        numbered = super().record(line)
        self.seen.see([numbered])
        return numbered


def pack(recording: Recording, segment: LogSegment, kind: Format) -> ArchiveEntry:
    """Write the archive of a plain segment, durably, and read it back. The segment stays.

    A segment that Parquet cannot restore exactly (its last line has no newline, or a line is over
    256 MiB) is compressed instead. Raises ``StorageError``; then there is no archive.
    """
    if kind == "parquet" and not _is_reproducible(segment):
        kind = "zst"
    target = recording.archive_path(segment.stem, kind)
    noting = _SummingParser(segment.path)
    digest, size = hashlib.sha256(), 0
    try:
        with AtomicFile(target) as out:
            with _packer(out, kind, noting) as packer:
                for piece in formats.contents(
                    formats.open_file(segment.path), segment.path, "jsonl"
                ):
                    digest.update(piece)
                    size += len(piece)
                    packer.write(piece)
            out.publish(replace=True)
            packed = out.size
    except AgentStateError:
        raise
    except OSError as error:
        raise writing_failed(error, target) from error
    return ArchiveEntry(
        first_seq=segment.first_seq,
        day=segment.day,
        format=kind,
        **asdict(noting.seen),
        bytes=size,
        sha256=digest.hexdigest(),
        size=packed,
    )


def describe(segment: LogSegment) -> ArchiveEntry:
    """The entry of an archive, which is read completely. Raises ``StateCorruptedError``."""
    noting = _SummingParser(segment.path)
    digest = hashlib.sha256()
    size = 0

    def pieces() -> Iterator[bytes]:
        nonlocal size
        for piece in formats.contents(
            formats.open_file(segment.path), segment.path, segment.format
        ):
            digest.update(piece)
            size += len(piece)
            yield piece

    for batch in formats.split(pieces()):
        noting.records(batch)
    return ArchiveEntry(
        first_seq=segment.first_seq,
        day=segment.day,
        format=segment.format,
        **asdict(noting.seen),
        bytes=size,
        sha256=digest.hexdigest(),
        size=segment.path.stat().st_size,
    )


def sha256_of(path: Path, kind: Format) -> str:
    """Of the plain segment that a file is, or was made of. Raises ``StateCorruptedError``."""
    digest = hashlib.sha256()
    for piece in formats.contents(formats.open_file(path), path, kind):
        digest.update(piece)
    return digest.hexdigest()


def check(recording: Recording, entry: ArchiveEntry) -> None:
    """Read an archive completely. Raises ``StateCorruptedError`` unless it is what it was."""
    path = recording.archive_path(entry.stem, entry.format)
    try:
        found = sha256_of(path, entry.format)
    except FileNotFoundError:
        raise StateCorruptedError("an archive that the index names is missing", path=path) from None
    if found != entry.sha256:
        raise StateCorruptedError(
            f"this archive gives back other bytes than it was made of (sha256 {found[:12]}…, "
            f"not {entry.sha256[:12]}…)",
            path=path,
        )


def last_archived(recording: Recording) -> int:
    """The last number that was ever archived; without the index, that of the last archive.

    Raises ``StateCorruptedError`` when neither can be read.
    """
    index = known_index(recording)
    plain = {segment.stem for segment in recording.segments()}
    unknown = [
        segment
        for segment in recording.archives()
        if index.find(segment.stem) is None and segment.stem not in plain
    ]
    return max([index.last_seq, *(describe(segment).last_seq for segment in unknown[-1:])])


def packed_format() -> Format:
    """The format for compressed segments: Zstandard, or gzip if ``pyarrow`` is missing."""
    return "zst" if has_arrow() else "gz"


def _is_reproducible(segment: LogSegment) -> bool:
    """Whether the lines of a segment, joined, are its bytes."""
    size = segment.path.stat().st_size
    if size <= logs.MAX_LINE:
        with formats.open_file(segment.path) as file:
            return size == 0 or logs.pread(file.fileno(), size - 1, 1) == b"\n"
    seen = 0
    for batch in formats.batches(formats.open_file(segment.path), segment.path, "jsonl"):
        seen += sum(map(len, batch)) + len(batch)
    return seen == size


class _ParquetPacker:
    """Pieces of a segment into a Parquet file."""

    def __init__(self, out: AtomicFile, noting: _SummingParser) -> None:
        self._writer = ParquetLogWriter(out, noting)
        self._splitter = logs.Splitter()

    def write(self, piece: bytes) -> None:
        self._writer.add(self._splitter.feed(piece))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.__exit__(kind)


class _StreamPacker:
    """Pieces of a segment into a compressed one; its lines are looked at on the way."""

    def __init__(self, stream: Any, noting: _SummingParser) -> None:
        self._stream = stream
        self._noting = noting
        self._splitter = logs.Splitter()

    def write(self, piece: bytes) -> None:
        self._noting.records(self._splitter.feed(piece))
        self._stream.write(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._splitter.unended:
            self._noting.records([self._splitter.rest()])
        if kind is None:
            self._stream.close()
        else:  # else Arrow closes it when it is collected, and prints the error
            with contextlib.suppress(AgentStateError, OSError):
                self._stream.close()


def _packer(
    out: AtomicFile, kind: Format, noting: _SummingParser
) -> _ParquetPacker | _StreamPacker:
    if kind == "parquet":
        return _ParquetPacker(out, noting)
    if kind == "gz":
        # Without a time in it the same segment gives the same bytes.
        return _StreamPacker(formats.GzipWriter(out), noting)
    return _StreamPacker(
        arrow().CompressedOutputStream(arrow().PythonFile(out, "w"), "zstd"), noting
    )


LOCK = ".locks/archiver.lock"

Progress = Callable[[int, int], object]


def archive(
    state_dir: str | PathLike[str],
    policy: RetentionPolicy | None = None,
    *,
    dry_run: bool = False,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> ArchiveReport:
    """Archive and remove segments as the policy requires. Blocks.

    Safe while other processes record and read.

    Raises ``StateDirectoryInUseError`` when another archiver is at work, ``StateNotFoundError``
    where nothing was recorded, ``StorageError``: what could not be archived stays as it was.
    """
    recording = Recording(state_dir)
    if not recording.has_begun():
        raise StateNotFoundError("there is no recording here", path=recording.folder)
    policy = policy or RetentionPolicy()
    clock = clock or SystemClock()
    run = _ArchiveRun(recording, policy, clock, progress or (lambda _done, _of: None))
    if dry_run:
        return run.plan()
    with _archiver_lock(recording):
        return run.execute()


def verify_archives(
    state_dir: str | PathLike[str], *, progress: Progress | None = None
) -> VerificationReport:
    """Read every archive completely and compare it with the index; changes nothing."""
    recording = Recording(state_dir)
    problems = []
    try:
        index = read_index(recording.directory())
    except StateCorruptedError as error:
        index = ArchiveIndex()
        problems.append(str(error))
    messages = 0
    for number, entry in enumerate(index.archives, 1):
        try:
            check(recording, entry)
            messages += entry.messages
        except AgentStateError as error:
            problems.append(str(error))
        if progress is not None:
            progress(number, len(index.archives))
    plain = {segment.stem for segment in recording.segments()}
    problems += [
        f"the index does not name this archive [{segment.path}]"
        for segment in recording.archives()
        if index.find(segment.stem) is None and segment.stem not in plain
    ]
    return VerificationReport(len(index.archives), messages, tuple(problems))


class _ArchiveRun:
    """One run of the archiver."""

    def __init__(
        self, recording: Recording, policy: RetentionPolicy, clock: Clock, progress: Progress
    ) -> None:
        self._recording = recording
        self._policy = policy
        self._clock = clock
        self._progress = progress
        self._today = clock.now().date()
        self._index = known_index(recording)
        self._directory = recording.directory(sync=True, clock=clock)

    def plan(self) -> ArchiveReport:
        """The report of a dry run."""
        report = ArchiveReport(dry_run=True)
        plain = self._recording.segments()
        report.plain_bytes = sum(_sizes(plain))
        twins = {segment.stem for segment in plain}
        report.finished = [one.stem for one in self._unfinished() if one.stem in twins]
        entries = list(self._index.archives)
        for segment, kind in self._due(plain):
            if segment.stem not in report.finished:
                self._note(report, segment.stem, kind)
        report.removed = [entry.stem for entry in self._expired(entries)]
        return report

    def execute(self) -> ArchiveReport:
        """Carry out the run."""
        report = ArchiveReport()
        self._make_ready()
        report.plain_bytes = sum(_sizes(self._recording.segments()))
        self._finish(report)
        due = self._due(self._recording.segments())
        for number, (segment, kind) in enumerate(due, 1):
            entry = self._pack(segment, kind)
            self._replace(segment, entry, report)
            self._note(report, segment.stem, entry.format)
            self._progress(number, len(due))
        for entry in self._expired(self._index.archives):
            self._remove(entry, report)
        return report

    # -- what is to be done --------------------------------------------------------------

    def _due(self, plain: Sequence[LogSegment]) -> list[tuple[LogSegment, Format]]:
        """The segments that are to be archived, oldest first, and how."""
        sizes = _sizes(plain)
        total = sum(sizes)
        columns: Format = "parquet" if has_arrow() else packed_format()
        due: list[tuple[LogSegment, Format]] = []
        past = self._policy.compress_past
        if self._policy.keep_for is not None:  # only archives are removed
            past = min(past, self._policy.keep_for)
        for segment, size in zip(plain, sizes, strict=True):
            if total > self._policy.parquet_past:
                due.append((segment, columns))
                total -= size
            elif self._age(segment.day) > past:
                due.append((segment, packed_format()))
        return due

    def _expired(self, archives: Sequence[ArchiveEntry]) -> list[ArchiveEntry]:
        """The archives that retention removes: from the oldest on, no gap is made."""
        keep_for, keep_bytes = self._policy.keep_for, self._policy.keep_bytes
        total = sum(entry.size for entry in archives)
        expired = []
        for entry in archives:
            old = keep_for is not None and self._age(entry.day) > keep_for
            if not old and (keep_bytes is None or total <= keep_bytes):
                break
            expired.append(entry)
            total -= entry.size
        return expired

    def _age(self, day: str) -> timedelta:
        try:
            return self._today - date.fromisoformat(day)
        except ValueError:  # a person made up the name
            return timedelta(0)

    @staticmethod
    def _note(report: ArchiveReport, stem: str, kind: Format) -> None:
        (report.parquet if kind == "parquet" else report.compressed).append(stem)

    # -- doing it ------------------------------------------------------------------------

    def _make_ready(self) -> None:
        at = self._directory.locate(KIND, INDEX)
        self._directory.documents.make_parent(at)
        for name in self._recording.archive.iterdir():
            if name.name.startswith(fileio.TEMPORARY):  # of an archiver that died
                fileio.discard(fspath(name))
        try:
            self._index = read_index(self._directory)
        except StateCorruptedError as error:
            self._directory.documents.quarantine(at, error.message, restored=False)
            self._index = ArchiveIndex()

    def _unfinished(self) -> list[LogSegment]:
        """Archives whose segment is still there, or that the index does not name."""
        plain = {segment.stem for segment in self._recording.segments()}
        return [
            segment
            for segment in self._recording.archives()
            if segment.stem in plain or self._index.find(segment.stem) is None
        ]

    def _finish(self, report: ArchiveReport) -> None:
        """Go on where an earlier run died."""
        plain = {segment.stem: segment for segment in self._recording.segments()}
        for made in self._unfinished():
            segment = plain.get(made.stem)
            if segment is None:
                # Its segment has gone, so it had been verified: only the index was lost.
                self._enter(describe(made))
                report.finished.append(made.stem)
                continue
            try:
                entry = describe(made)
            except StateCorruptedError:
                entry = None
            sha256 = sha256_of(segment.path, "jsonl")
            indexed = self._index.find(made.stem)
            if indexed is not None and indexed.sha256 != sha256:
                why = "this segment is not the one that was archived under its name"
                raise StateCorruptedError(why, path=segment.path)
            if entry is None or entry.sha256 != sha256:
                fileio.remove_file(fspath(made.path), sync=True)
                continue
            # It may have been seen before it was durable.
            fileio.sync_directory(fspath(self._recording.archive))
            self._replace(segment, entry, report)
            report.finished.append(made.stem)

    def _pack(self, segment: LogSegment, kind: Format) -> ArchiveEntry:
        """Write an archive and read it back. Raises with the archive gone."""
        entry = pack(self._recording, segment, kind)
        try:
            check(self._recording, entry)
        except BaseException:
            self._drop(entry)
            raise
        return entry

    def _replace(self, segment: LogSegment, entry: ArchiveEntry, report: ArchiveReport) -> None:
        """Write the index and then remove the segment, while no process rotates the log."""
        size = segment.path.stat().st_size
        with self._recording.locked():
            try:
                self._enter(entry)
            except BaseException:
                self._drop(entry)
                raise
            fileio.remove_file(fspath(segment.path), sync=True)
        report.freed_bytes += size - entry.size

    def _enter(self, entry: ArchiveEntry) -> None:
        now = stamp(self._clock.now())
        self._index = write_index(self._directory, self._index.with_entry(entry), now)

    def _drop(self, entry: ArchiveEntry) -> None:
        path = self._recording.archive_path(entry.stem, entry.format)
        fileio.discard(fspath(path))

    def _remove(self, entry: ArchiveEntry, report: ArchiveReport) -> None:
        """Out of the index first: what it names must be there."""
        with self._recording.locked():
            now = stamp(self._clock.now())
            self._index = write_index(self._directory, self._index.without(entry.stem), now)
        path = self._recording.archive_path(entry.stem, entry.format)
        fileio.remove_file(fspath(path), sync=True)
        report.removed.append(entry.stem)
        report.freed_bytes += entry.size


@contextmanager
def _archiver_lock(recording: Recording) -> Iterator[None]:
    root = fspath(recording.state_dir)
    fileio.make_directories(root, ".locks", sync=False)
    lock = locks.try_acquire(f"{root}/{LOCK}")
    if lock is None:
        raise StateDirectoryInUseError("another archiver is at work here", path=root)
    try:
        yield
    finally:
        lock.release()


def _sizes(segments: Sequence[LogSegment]) -> list[int]:
    return [segment.path.stat().st_size for segment in segments]
