"""What a state directory occupies: files and bytes by folder, and the largest files."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agent_state.cli.output import (
    OK,
    PROBLEM,
    counted,
    print_error,
    print_line,
    show_json,
    show_table,
)
from agent_state.errors import StateNotFoundError, StateValidationError

_LARGEST = 5
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(slots=True)
class FolderSize:
    """One folder of the directory."""

    folder: str
    files: int = 0
    bytes: int = 0


@dataclass(slots=True)
class DirectorySizes:
    """The folders by name, the hidden ones last, and the largest files."""

    folders: list[FolderSize] = field(default_factory=list)
    largest: list[tuple[str, int]] = field(default_factory=list)
    """Paths below the directory, with their bytes."""

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(folder.bytes for folder in self.folders)

    @property
    def files(self) -> int:
        """The number of files."""
        return sum(folder.files for folder in self.folders)

    def to_dict(self) -> dict[str, Any]:
        """The sizes as JSON."""
        return {
            "bytes": self.bytes,
            "files": self.files,
            "folders": [asdict(folder) for folder in self.folders],
            "largest": [{"path": path, "bytes": size} for path, size in self.largest],
        }


def parse_size(text: str) -> int:
    """``500MB`` or ``2GiB`` in bytes. Raises ``StateValidationError``."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise StateValidationError(f"{text!r:.40} is not a size; write 500MB or 2GiB")
    power = " kmgt".index(found[2].lower()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def measure(root: Path) -> DirectorySizes:
    """The sizes of all files below ``root`` now; links are not followed.

    A file that goes while it is measured is left out. Raises ``StateNotFoundError``.
    """
    if not root.is_dir():
        raise StateNotFoundError("there is no such state directory", path=root)
    folders: dict[str, FolderSize] = {}
    largest: list[tuple[int, str]] = []
    for path, size in _files(str(root)):
        relative = os.path.relpath(path, root)
        top, inside, _ = relative.partition(os.sep)
        top = top if inside else "."
        folder = folders.setdefault(top, FolderSize(top))
        folder.files += 1
        folder.bytes += size
        heapq.heappush(largest, (size, relative))
        if len(largest) > _LARGEST:
            heapq.heappop(largest)
    ordered = sorted(folders.values(), key=lambda one: (one.folder.startswith("."), one.folder))
    return DirectorySizes(ordered, [(path, size) for size, path in sorted(largest, reverse=True)])


def _files(root: str) -> Iterator[tuple[str, int]]:
    waiting = [root]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                found = list(entries)
        except OSError:
            continue  # it went, or may not be read
        for entry in found:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    yield entry.path, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue


def show_sizes(root: Path, sizes: DirectorySizes) -> None:
    """Print the sizes for a person."""
    print_line(f"{root}: {readable(sizes.bytes)} in {counted(sizes.files, 'file')}")
    rows = [(one.folder, one.files, readable(one.bytes)) for one in sizes.folders]
    if rows:
        show_table(("folder", "files", "size"), rows)
        print_line("The largest files:")
        show_table(("file", "size"), [(path, readable(size)) for path, size in sizes.largest])


def list_sizes(root: Path, max_size: str | None, as_json: bool) -> int:
    """Print the sizes of a directory; the exit code."""
    found = measure(root)
    show_json({"state_dir": str(root), **found.to_dict()}) if as_json else show_sizes(root, found)
    return PROBLEM if max_size is not None and warn_above(found, max_size) else OK


def warn_above(sizes: DirectorySizes, limit: str) -> bool:
    """Report on stderr a directory that is larger than the limit; whether it is."""
    most = parse_size(limit)
    if sizes.bytes <= most:
        return False
    size, allowed = readable(sizes.bytes), readable(most)
    print_error(f"the directory has {size}, more than {allowed}; `agent-state cleanup` archives")
    return True


def readable(size: int) -> str:
    """A number of bytes for a person."""
    number, unit = float(size), 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{size} bytes"
