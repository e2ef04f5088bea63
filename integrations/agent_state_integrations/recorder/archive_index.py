"""The index of archives: their contents, time ranges and hashes.

It is the document ``record/archive/index.json``. The archiver writes it before it removes a plain
segment; readers skip archives that it excludes, and report archives that it names and are missing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from agent_state.errors import StateCorruptedError
from agent_state.migrations import migrate
from agent_state.protocols import Document, JsonObject
from agent_state.serializers import canonical_json, parse_object
from agent_state_integrations.recorder.files import (
    ARCHIVE,
    KIND,
    Format,
    Recording,
    StateDirectory,
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
    """The UTC day in its name."""
    format: Format
    last_seq: int
    """The last number in it."""
    lines: int
    """Lines of the plain segment."""
    messages: int
    """Lines that hold a message."""
    first_timestamp: str | None
    """The earliest time of a message, not necessarily of the first one; None without messages."""
    last_timestamp: str | None
    """The latest time of a message; None without messages."""
    bytes: int
    """Size of the plain segment."""
    sha256: str
    """Hash of the plain segment."""
    size: int
    """Bytes of the archive."""

    @property
    def stem(self) -> str:
        """The file name without its ending."""
        return stem_of(self.day, self.first_seq)


@dataclass(frozen=True, slots=True)
class ArchiveIndex:
    """All archives, in order."""

    archives: tuple[ArchiveEntry, ...] = ()
    last_seq: int = 0
    """The last number that was ever archived, also in archives that retention has removed."""
    removed: int = 0
    """The number of archives that retention has removed."""
    revision: int = field(default=0, compare=False)

    def find(self, stem: str) -> ArchiveEntry | None:
        """The entry of one archive."""
        return next((entry for entry in self.archives if entry.stem == stem), None)

    def with_entry(self, entry: ArchiveEntry) -> ArchiveIndex:
        """The index with this archive added or replaced."""
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
        """The body of the document."""
        return {
            "archives": [asdict(entry) for entry in self.archives],
            "last_seq": self.last_seq,
            "removed": self.removed,
        }


def read_index(directory: StateDirectory) -> ArchiveIndex:
    """The index; an empty one if it is missing.

    Raises ``StateCorruptedError``, and ``SchemaTooNewError`` for one of a newer version.
    """
    stored = directory.documents.read(directory.locate(KIND, INDEX))
    if stored is None:
        return ArchiveIndex()
    schema = stored.document.schema or SCHEMA
    body: dict[str, Any] = migrate(schema, parse_object(stored.document.body))
    try:
        archives = tuple(ArchiveEntry(**entry) for entry in body["archives"])
        return ArchiveIndex(archives, body["last_seq"], body["removed"], stored.document.revision)
    except (KeyError, TypeError) as error:
        raise StateCorruptedError(f"no index of archives: {error}", kind=KIND, key=INDEX) from error


def known_index(recording: Recording) -> ArchiveIndex:
    """The index for a reader, which treats a damaged one as empty."""
    if recording.folder.name != KIND:  # a copy of the folder alone
        return ArchiveIndex()
    try:
        return read_index(recording.directory())
    except StateCorruptedError:
        return ArchiveIndex()


def write_index(directory: StateDirectory, index: ArchiveIndex, saved_at: str) -> ArchiveIndex:
    """Write a new version of the index, and return it. Raises ``StorageError``."""
    revision = index.revision + 1
    body = canonical_json(index.to_dict())
    document = Document(KIND, INDEX, body, revision, saved_at, SCHEMA)
    directory.documents.write(directory.locate(KIND, INDEX), document, {})
    return ArchiveIndex(index.archives, index.last_seq, index.removed, revision)
