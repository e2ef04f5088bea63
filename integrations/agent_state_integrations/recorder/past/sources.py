"""Which files a path means, in the order of the recording, and the way to their lines.

A recording may be written, rotated and archived while it is read. The live log is opened first,
before the others are looked for, and read last: what is rotated afterwards is the same file under
another name. A segment that has become an archive since is read there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from agent_state.errors import StateCorruptedError, StateNotFoundError
from agent_state_integrations.recorder.past import formats
from agent_state_integrations.recorder.past.formats import AnyFormat, Batch
from agent_state_integrations.recorder.past.index import Entry, Index, archive_path, known_index
from agent_state_integrations.recorder.past.query import Query
from agent_state_integrations.recorder.segments import KIND, Recording, Segment

_ATTEMPTS = 100
"""How often the files are looked for anew, when one was rotated while they were."""


class _Copied(Recording):
    """A recording whose folder is not below a state directory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent)
        self._own = folder

    @property
    def folder(self) -> Path:
        return self._own


@dataclass(frozen=True, slots=True)
class Source:
    """One file of messages."""

    path: Path
    format: AnyFormat
    recording: Recording | None = None
    segment: Segment | None = None
    """Which segment it is, or was made of; None for the live log and for other logs."""
    entry: Entry | None = None
    """What the index says of an archive."""
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
        """The file where it is now; None when retention has removed it meanwhile.

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
def sources(path: str | PathLike[str]) -> Iterator[list[Source]]:
    """The files that a path means: a state directory, a recording, a folder of logs, a file.

    Of a folder that is no recording: the logs and our Parquet files directly in it. Raises
    ``StateNotFoundError`` when there is nothing, ``StateCorruptedError`` for a file that is none
    of ours.
    """
    where = Path(path).resolve()
    if not where.exists():
        raise StateNotFoundError("there is no such file or folder", path=where)
    if not where.is_dir():
        kind = formats.format_of(where)
        yield [Source(where, kind or "jsonl")]
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
    for recording in (Recording(where), Recording(where.parent), _Copied(where)):
        fits = recording.folder in (where, where / KIND)
        if fits and is_begun(recording):
            return recording
    return None


def is_begun(recording: Recording) -> bool:
    """Whether anything was ever recorded."""
    if recording.current.exists() or (recording.archive / "index.json").exists():
        return True
    return bool(recording.segments() or recording.archives())


@contextmanager
def _live(recording: Recording) -> Iterator[BinaryIO | None]:
    try:
        file = formats.open_file(recording.current)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with file:
        yield file


def _files_of(recording: Recording, live: BinaryIO | None) -> list[Source]:
    index = known_index(recording)
    plain = recording.segments()  # before the archives, to which they move
    archived = {segment.stem: segment for segment in recording.archives()}
    found = {stem: _source(recording, segment, index) for stem, segment in archived.items()}
    for entry in index.archives:
        if entry.stem not in found:  # whoever opens it will miss it
            path = archive_path(recording, entry.stem, entry.format)
            gone = Segment(entry.first_seq, entry.day, path, entry.format)
            found[entry.stem] = _source(recording, gone, index)
    for segment in plain:
        # It goes only after its archive has been verified: until then, it is the one to read.
        found[segment.stem] = _source(recording, segment, index)
    order = sorted(found.values(), key=lambda source: source.segment or _NEVER)
    if live is not None:
        order.append(Source(recording.current, "jsonl", recording, live=live))
    return order


_NEVER = Segment(0, "", Path())


def _source(recording: Recording, segment: Segment, index: Index) -> Source:
    entry = index.find(segment.stem) if segment.format != "jsonl" else None
    return Source(segment.path, segment.format, recording, segment, entry)


def _is_current(recording: Recording, live: BinaryIO | None) -> bool:
    """Whether the log that was opened is the live one still: nothing was rotated meanwhile."""
    try:
        now = recording.current.stat()
    except (FileNotFoundError, NotADirectoryError):
        return live is None
    return live is not None and os.path.samestat(now, os.fstat(live.fileno()))


def _logs_in(folder: Path) -> list[Source]:
    """The logs directly in a folder. What is below may be copies of the same."""
    found = []
    for path in sorted(folder.iterdir()):
        kind = formats.format_of(path)
        if kind is None or kind == "json" or not path.is_file() or path.name.startswith("."):
            continue
        if kind == "parquet":
            from agent_state_integrations.recorder.past import parquet  # needs an extra

            if not parquet.is_ours(formats.open_file(path), path):
                continue
        found.append(Source(path, kind))
    if not found and not (folder / KIND).is_dir():
        raise StateNotFoundError("there is no recording and no log here", path=folder)
    return found
