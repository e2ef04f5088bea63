"""The files of a recording: the live log, rotated segments, archives.

    state/record/current.jsonl                       the live log, to which messages are appended
    state/record/2026-11-21-000000000001.jsonl       a segment: the day it began, its first number
    state/record/archive/2026-11-21-….parquet        the same, archived; also .jsonl.zst, .jsonl.gz

Sequence numbers go on from one segment to the next, so a number identifies a message for ever.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import Key, StorageError, storage_error
from agent_state.storage import fileio, locks, paths, syscalls
from agent_state.storage.directory import StateDirectory as StateDirectory

KIND = "record"
CURRENT: Key = ("current",)
DEAD_LETTERS: Key = ("dead-letter",)
ARCHIVE = "archive"
LOCK = ".locks/recorder.lock"
"""Held for each batch, and while the set of files changes."""
LOCK_SECONDS = 30.0

Format = Literal["jsonl", "zst", "gz", "parquet"]
ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".jsonl.zst": "zst",
    ".jsonl.gz": "gz",
    ".parquet": "parquet",
}

_STEM = re.compile(r"(\d{4}-\d{2}-\d{2})-(\d{12,})")


@dataclass(frozen=True, slots=True, order=True)
class LogSegment:
    """One file of messages that is no longer written. Ordered by ``first_seq``."""

    first_seq: int
    day: str
    """The UTC day on which it was begun, ``2026-11-21``."""
    path: Path
    format: Format = "jsonl"

    @property
    def stem(self) -> str:
        """The file name without its ending; a segment and its archive have the same."""
        return stem_of(self.day, self.first_seq)


def stem_of(day: str, first_seq: int) -> str:
    """The name, without ending, of the segment that begins with this number."""
    return f"{day}-{first_seq:012d}"


class Recording:
    """The paths of a recording below a state directory; none of them need exist."""

    def __init__(self, state_dir: str | PathLike[str]) -> None:
        self.state_dir = Path(paths.resolve_root(state_dir))

    @property
    def folder(self) -> Path:
        """The folder ``record``."""
        return self.state_dir / KIND

    @property
    def current(self) -> Path:
        """The live log."""
        return self.folder / "current.jsonl"

    @property
    def dead_letters(self) -> Path:
        """The log of messages that could not be read, each with its reason."""
        return self.folder / "dead-letter.jsonl"

    @property
    def archive(self) -> Path:
        """The folder of archives."""
        return self.folder / ARCHIVE

    def locked(self) -> AbstractContextManager[object]:
        """Excludes other processes that record, rotate, or remove a segment.

        Raises ``LockTimeoutError`` after 30 s.
        """
        root = fspath(self.state_dir)
        return locks.holding(f"{root}/{LOCK}", LOCK_SECONDS, root=root)

    def directory(self, *, sync: bool = False, clock: Clock | None = None) -> StateDirectory:
        """The state directory, for the recording's documents, logs and quarantine."""
        now = (clock or SystemClock()).now
        return StateDirectory(fspath(self.state_dir), sync=sync, now=lambda: stamp(now()))

    def segments(self) -> list[LogSegment]:
        """The rotated segments that are not archived yet, in order."""
        return _segments_in(self.folder, {".jsonl"})

    def archives(self) -> list[LogSegment]:
        """The archived segments, in order."""
        return _segments_in(self.archive, set(ENDINGS) - {".jsonl"})

    def segment_path(self, day: str, first_seq: int) -> Path:
        """The path of a segment."""
        return self.folder / f"{stem_of(day, first_seq)}.jsonl"

    def archive_path(self, stem: str, kind: Format) -> Path:
        """The path of the archive of a segment."""
        ending = next(ending for ending, known in ENDINGS.items() if known == kind)
        return self.archive / f"{stem}{ending}"

    def has_begun(self) -> bool:
        """Whether anything was ever recorded."""
        if self.current.exists() or (self.archive / "index.json").exists():
            return True
        return bool(self.segments() or self.archives())


def _segments_in(folder: Path, endings: set[str]) -> list[LogSegment]:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        match = _STEM.match(name)
        if match and (ending := name[match.end() :]) in endings:
            found.append(LogSegment(int(match[2]), match[1], folder / name, ENDINGS[ending]))
    return sorted(found)


class AtomicFile(io.RawIOBase):
    """A large file that is written in pieces and appears complete and durable, or not at all.

    It is a temporary file in the folder of ``path``, which ``publish`` renames. If the context
    ends without that, the file is removed. The directory must exist. Raises ``OSError``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.size = 0
        name = f"{fileio.TEMPORARY}{secrets.token_hex(8)}"
        self._temporary = fspath(path.parent / name)
        self._fd = syscalls.open(self._temporary, syscalls.CREATE_NEW)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of the data. Raises ``ValueError`` once it is closed."""
        if self._fd < 0:  # a writer of archives that was left behind may still flush
            raise ValueError("the file is closed")
        view = memoryview(data).cast("B")
        fileio.write_all(self._fd, view)
        self.size += len(view)
        return len(view)

    def publish(self, *, replace: bool) -> None:
        """Sync and rename. Raises ``FileExistsError`` unless it may ``replace``."""
        syscalls.fdatasync(self._fd)
        self._close()
        target = fspath(self.path)
        if replace:
            syscalls.rename(self._temporary, target)
        else:
            _rename_new(self._temporary, target)
        fileio.sync_directory(fspath(self.path.parent))

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            syscalls.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._close()
        if os.path.lexists(self._temporary):
            fileio.discard(self._temporary)


def _rename_new(temporary: str, target: str) -> None:
    """A rename that never replaces a file: a hard link is refused if the name exists."""
    try:
        syscalls.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(f"{target} exists already") from error
        syscalls.rename(temporary, target)
        return
    syscalls.unlink(temporary)


def writing_failed(error: OSError, path: Path) -> StorageError:
    """The error to raise when a large file could not be written."""
    if isinstance(error, StorageError):
        return error
    return storage_error(error, "writing a file", path=path)
