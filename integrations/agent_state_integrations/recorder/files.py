"""Where the files of a recording are: the live log, rotated segments, archives.

    state/record/current.jsonl                       what is being written
    state/record/2026-11-21-000000000001.jsonl       a segment: the day it began, its first number
    state/record/archive/2026-11-21-….parquet        the same, archived; also .jsonl.zst, .jsonl.gz

Numbers go on from one segment to the next, so that a number names a message for ever.


A large file written durably in pieces: whole under its name, or not there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from agent_state.errors import Key, StorageError, storage_error
from agent_state.storage import fileio, locks, syscalls

KIND = "record"
CURRENT: Key = ("current",)
DEAD_LETTERS: Key = ("dead-letter",)
ARCHIVE = "archive"
CHECKPOINTS = "checkpoints"
LOCK = ".locks/recorder.lock"
"""Held for each batch, by whoever changes which files there are."""
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
    """One file of messages that is not written any more. Ordered by ``first_seq``."""

    first_seq: int
    day: str
    """The UTC day on which it was begun, ``2026-11-21``."""
    path: Path
    format: Format = "jsonl"

    @property
    def stem(self) -> str:
        """What a segment and its archive have in common."""
        return stem_of(self.day, self.first_seq)


def stem_of(day: str, first_seq: int) -> str:
    """The name, without ending, of the segment that begins with this number."""
    return f"{day}-{first_seq:012d}"


class Recording:
    """The files below a state directory that make up its recording; none need be there."""

    def __init__(self, state_dir: str | PathLike[str]) -> None:
        self.state_dir = Path(state_dir).absolute()

    @property
    def folder(self) -> Path:
        return self.state_dir / KIND

    @property
    def current(self) -> Path:
        """The live log."""
        return self.folder / "current.jsonl"

    @property
    def dead_letters(self) -> Path:
        """What could not be understood, each with its reason."""
        return self.folder / "dead-letter.jsonl"

    @property
    def archive(self) -> Path:
        return self.folder / ARCHIVE

    @property
    def lock(self) -> Path:
        return self.state_dir / LOCK

    def locked(self) -> AbstractContextManager[object]:
        """While nobody else records, rotates, or takes a segment away.

        Raises ``LockTimeoutError`` after 30 s.
        """
        return locks.holding(os.fspath(self.lock), LOCK_SECONDS)

    def segments(self) -> list[LogSegment]:
        """The rotated segments that are still plain, in order."""
        return _segments_in(self.folder, {".jsonl"})

    def archives(self) -> list[LogSegment]:
        """The archived segments, in order."""
        return _segments_in(self.archive, set(ENDINGS) - {".jsonl"})

    def segment_path(self, day: str, first_seq: int) -> Path:
        return self.folder / f"{stem_of(day, first_seq)}.jsonl"


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
    """A temporary file beside ``path``, written to like any file.

    ``publish`` gives it its name, durably. Left without that, as on any error, the file is gone.
    The directory must exist. Raises ``OSError``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.size = 0
        name = f"{fileio.TEMPORARY}{secrets.token_hex(8)}"
        self._temporary = os.fspath(path.parent / name)
        self._fd = syscalls.open(self._temporary, syscalls.CREATE_NEW)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Every byte of what is given."""
        view = memoryview(data).cast("B")
        fileio.write_all(self._fd, view)
        self.size += len(view)
        return len(view)

    def publish(self, *, replace: bool) -> None:
        """Sync it and give it its name. Raises ``FileExistsError`` unless it may ``replace``."""
        syscalls.fdatasync(self._fd)
        self._close()
        target = os.fspath(self.path)
        if replace:
            syscalls.rename(self._temporary, target)
        else:
            _rename_anew(self._temporary, target)
        fileio.sync_directory(os.fspath(self.path.parent))

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


def _rename_anew(temporary: str, target: str) -> None:
    """A rename that never replaces. Two names for one file are what makes it sure."""
    try:
        syscalls.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(f"there is {target} already") from error
        syscalls.rename(temporary, target)
        return
    syscalls.unlink(temporary)


def writing_failed(error: OSError, path: Path) -> StorageError:
    """What is raised when a large file could not be written."""
    if isinstance(error, StorageError):
        return error
    return storage_error(error, "writing a file", path=path)
