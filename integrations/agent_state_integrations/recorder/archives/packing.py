"""One segment as an archive, and what an archive must be to be believed."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from agent_state.errors import AgentStateError, StateCorruptedError
from agent_state.storage import logs
from agent_state_integrations.recorder.past import formats
from agent_state_integrations.recorder.past.index import Entry, archive_path, known_index
from agent_state_integrations.recorder.past.optional import arrow, has_arrow
from agent_state_integrations.recorder.past.parsing import Numbered, Parser, Skipped
from agent_state_integrations.recorder.past.staging import Staged, writing_failed
from agent_state_integrations.recorder.segments import Format, Recording, Segment


@dataclass(slots=True)
class Contents:
    """What a segment holds, seen line by line."""

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


class _Noting(Parser):
    """A parser that notes what it has read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, datetime.fromtimestamp(0, UTC), Skipped())
        self.seen = Contents()

    def record(self, line: bytes) -> Numbered:
        self.seen.lines += 1
        numbered = super().record(line)
        self.seen.see([numbered])
        return numbered


def pack(recording: Recording, segment: Segment, kind: Format) -> Entry:
    """Write the archive of a plain segment, durably, and read it back. The segment stays.

    What Parquet cannot give back as it was (a last line without its newline, a line over 256 MiB)
    is compressed instead. Raises ``StorageError``; then there is no archive.
    """
    if kind == "parquet" and not _comes_back(segment):
        kind = "zst"
    target = archive_path(recording, segment.stem, kind)
    noting = _Noting(segment.path)
    digest, size = hashlib.sha256(), 0
    try:
        with Staged(target) as out:
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
    return Entry(
        first_seq=segment.first_seq,
        day=segment.day,
        format=kind,
        **asdict(noting.seen),
        bytes=size,
        sha256=digest.hexdigest(),
        size=packed,
    )


def describe(segment: Segment) -> Entry:
    """What an archive holds, read completely. Raises ``StateCorruptedError``."""
    noting = _Noting(segment.path)
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
    return Entry(
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


def check(recording: Recording, entry: Entry) -> None:
    """Read an archive completely. Raises ``StateCorruptedError`` unless it is what it was."""
    path = archive_path(recording, entry.stem, entry.format)
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
    """The last number that was ever archived; where the index is lost, as the last archive says.

    Raises ``StateCorruptedError`` when neither tells.
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
    """What segments are compressed to: Zstandard, or gzip where ``pyarrow`` is missing."""
    return "zst" if has_arrow() else "gz"


def _comes_back(segment: Segment) -> bool:
    """Whether the lines of a segment, joined, are its bytes."""
    size = segment.path.stat().st_size
    if size <= logs.MAX_LINE:
        with formats.open_file(segment.path) as file:
            return size == 0 or logs.pread(file.fileno(), size - 1, 1) == b"\n"
    seen = 0
    for batch in formats.batches(formats.open_file(segment.path), segment.path, "jsonl"):
        seen += sum(map(len, batch)) + len(batch)
    return seen == size


class _Columns:
    """Pieces of a segment into a Parquet file."""

    def __init__(self, out: Staged, noting: _Noting) -> None:
        from agent_state_integrations.recorder.past.parquet import Writer  # needs an extra

        self._writer = Writer(out, noting)
        self._splitter = logs.Splitter()

    def write(self, piece: bytes) -> None:
        self._writer.add(self._splitter.feed(piece))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.__exit__(kind)


class _Stream:
    """Pieces of a segment into a compressed one; its lines are looked at on the way."""

    def __init__(self, stream: Any, noting: _Noting) -> None:
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


def _packer(out: Staged, kind: Format, noting: _Noting) -> _Columns | _Stream:
    if kind == "parquet":
        return _Columns(out, noting)
    if kind == "gz":
        # Without a time in it the same segment gives the same bytes.
        return _Stream(gzip.GzipFile(fileobj=out, mode="wb", mtime=0), noting)
    return _Stream(arrow().CompressedOutputStream(arrow().PythonFile(out, "w"), "zstd"), noting)
