"""The index of archives: what each holds, from when to when, and what it hashes to.

It is the document ``record/archive/index.json``. The archiver writes it before a plain segment
goes; readers leave out what it says they need not open, and miss what it says must be there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from os import fspath
from pathlib import Path
from typing import Any

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import StateCorruptedError
from agent_state.migrations import migrate
from agent_state.protocols import Document, JsonObject
from agent_state.serializers import canonical_json, parse_object
from agent_state.storage.directory import StateDirectory
from agent_state_integrations.recorder.files import (
    ARCHIVE,
    ENDINGS,
    KIND,
    Format,
    Recording,
    stem_of,
)

SCHEMA = "record_index/1"
INDEX = (ARCHIVE, "index")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveEntry:
    """One archive."""

    first_seq: int
    """The number in its name."""
    day: str
    format: Format
    last_seq: int
    """The last number in it."""
    lines: int
    messages: int
    """Lines that hold a message."""
    first_timestamp: str | None
    """The earliest time of a message, which need not be the first one's; None without any."""
    last_timestamp: str | None
    bytes: int
    """Of the plain segment."""
    sha256: str
    """Of the plain segment."""
    size: int
    """Bytes of the archive."""

    @property
    def stem(self) -> str:
        return stem_of(self.day, self.first_seq)


@dataclass(frozen=True, slots=True)
class ArchiveIndex:
    """All archives, in order."""

    archives: tuple[ArchiveEntry, ...] = ()
    last_seq: int = 0
    """The last number that was ever archived, also in what retention removed since."""
    removed: int = 0
    """How many archives retention has removed."""
    revision: int = field(default=0, compare=False)

    def find(self, stem: str) -> ArchiveEntry | None:
        """The entry of one archive."""
        return next((entry for entry in self.archives if entry.stem == stem), None)

    def with_entry(self, entry: ArchiveEntry) -> ArchiveIndex:
        """The index with one more archive, or another one in its place."""
        others = [kept for kept in self.archives if kept.stem != entry.stem]
        archives = sorted([*others, entry], key=lambda one: (one.first_seq, one.day))
        return ArchiveIndex(
            tuple(archives), max(self.last_seq, entry.last_seq), self.removed, self.revision
        )

    def without(self, stem: str) -> ArchiveIndex:
        """The index without an archive that retention removes."""
        archives = tuple(entry for entry in self.archives if entry.stem != stem)
        removed = self.removed + len(self.archives) - len(archives)
        return ArchiveIndex(archives, self.last_seq, removed, self.revision)

    def to_dict(self) -> JsonObject:
        return {
            "archives": [asdict(entry) for entry in self.archives],
            "last_seq": self.last_seq,
            "removed": self.removed,
        }


def directory_of(
    recording: Recording, *, sync: bool = False, clock: Clock | None = None
) -> StateDirectory:
    """The state directory of a recording, for its documents."""
    now = (clock or SystemClock()).now
    return StateDirectory(fspath(recording.state_dir), sync=sync, now=lambda: stamp(now()))


def read_index(directory: StateDirectory) -> ArchiveIndex:
    """The index; an empty one where there is none.

    Raises ``StateCorruptedError``, and ``SchemaTooNewError`` for one of a newer version.
    """
    stored = directory.documents.read(directory.locate(KIND, INDEX))
    if stored is None:
        return ArchiveIndex()
    stated = stored.document.schema or SCHEMA
    body: dict[str, Any] = migrate(stated, parse_object(stored.document.body))
    try:
        archives = tuple(ArchiveEntry(**entry) for entry in body["archives"])
        return ArchiveIndex(archives, body["last_seq"], body["removed"], stored.document.revision)
    except (KeyError, TypeError) as error:
        raise StateCorruptedError(f"no index of archives: {error}", kind=KIND, key=INDEX) from error


def known_index(recording: Recording) -> ArchiveIndex:
    """The index for one who only reads: a damaged one is as good as none."""
    if recording.folder.name != KIND:  # a copy of the folder alone
        return ArchiveIndex()
    try:
        return read_index(directory_of(recording))
    except StateCorruptedError:
        return ArchiveIndex()


def write_index(directory: StateDirectory, index: ArchiveIndex, saved_at: str) -> ArchiveIndex:
    """Put a new version of the index in its place. Raises ``StorageError``."""
    revision = index.revision + 1
    body = canonical_json(index.to_dict())
    document = Document(KIND, INDEX, body, revision, saved_at, SCHEMA)
    directory.documents.write(directory.locate(KIND, INDEX), document, {})
    return ArchiveIndex(index.archives, index.last_seq, index.removed, revision)


def archive_path(recording: Recording, stem: str, kind: Format) -> Path:
    """Where the archive of a segment stands."""
    ending = next(ending for ending, known in ENDINGS.items() if known == kind)
    return recording.archive / f"{stem}{ending}"
