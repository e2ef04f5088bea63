"""Where the files of a recording are: the live log, rotated segments, archives.

    state/record/current.jsonl                       what is being written
    state/record/2026-11-21-000000000001.jsonl       a segment: the day it began, its first number
    state/record/archive/2026-11-21-….parquet        the same, archived; also .jsonl.zst, .jsonl.gz

Numbers go on from one segment to the next, so that a number names a message for ever.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from agent_state.errors import Key
from agent_state.storage import locks

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
class Segment:
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

    def segments(self) -> list[Segment]:
        """The rotated segments that are still plain, in order."""
        return _segments_in(self.folder, {".jsonl"})

    def archives(self) -> list[Segment]:
        """The archived segments, in order."""
        return _segments_in(self.archive, set(ENDINGS) - {".jsonl"})

    def segment_path(self, day: str, first_seq: int) -> Path:
        return self.folder / f"{stem_of(day, first_seq)}.jsonl"


def _segments_in(folder: Path, endings: set[str]) -> list[Segment]:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        match = _STEM.match(name)
        if match and (ending := name[match.end() :]) in endings:
            found.append(Segment(int(match[2]), match[1], folder / name, ENDINGS[ending]))
    return sorted(found)
