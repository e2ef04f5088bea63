"""What an import read, what it recorded, and what it left out and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES = 20


@dataclass(slots=True)
class FileReport:
    """One file. Its lines are ``recorded + duplicates + skipped`` and the empty ones."""

    path: str
    shape: str | None = None
    """``recorded``, ``claude-code`` or ``codex``; None when the file was not read."""
    lines: int = 0
    recorded: int = 0
    """In a dry run: what would be recorded, if it is not there already."""
    duplicates: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why lines were left out, and how many each time."""
    examples: list[tuple[int, str]] = field(default_factory=list)
    """The first lines that were left out though they should hold a message: number, reason."""
    left_out: str | None = None
    """Why the file was not looked into."""
    error: str | None = None
    """Why the file, or what is left of it, could not be read."""

    @property
    def skipped(self) -> int:
        """Lines that were left out."""
        return self.reasons.total()

    def skip(self, line: int, reason: str, *, expected: bool = False) -> None:
        """Count a line that is left out; ``expected``: it is of a kind that says nothing."""
        self.reasons[reason] += 1
        if not expected and len(self.examples) < _EXAMPLES:
            self.examples.append((line, reason))

    def mend(self, reason: str, better: str) -> None:
        """The last line that was left out for the one reason was left out for the other."""
        self.reasons[reason] -= 1
        self.reasons += Counter()  # drops what is zero
        self.reasons[better] += 1
        if self.examples and self.examples[-1] == (self.lines, reason):
            self.examples[-1] = (self.lines, better)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "shape": self.shape,
            "lines": self.lines,
            "recorded": self.recorded,
            "duplicates": self.duplicates,
            "skipped": self.skipped,
            "reasons": dict(self.reasons.most_common()),
            "examples": [{"line": line, "reason": reason} for line, reason in self.examples],
            "left_out": self.left_out,
            "error": self.error,
        }


@dataclass(slots=True)
class ImportReport:
    """All files of an import, in the order in which they were read."""

    files: list[FileReport] = field(default_factory=list)
    dry_run: bool = False

    @property
    def ok(self) -> bool:
        """Whether every file could be read. Lines that were left out do not count."""
        return all(file.error is None for file in self.files)

    @property
    def lines(self) -> int:
        return sum(file.lines for file in self.files)

    @property
    def recorded(self) -> int:
        return sum(file.recorded for file in self.files)

    @property
    def duplicates(self) -> int:
        return sum(file.duplicates for file in self.files)

    @property
    def skipped(self) -> int:
        return sum(file.skipped for file in self.files)

    @property
    def reasons(self) -> Counter[str]:
        """Why lines were left out, over all files."""
        return sum((file.reasons for file in self.files), Counter())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "dry_run": self.dry_run,
            "ok": self.ok,
            "lines": self.lines,
            "recorded": self.recorded,
            "duplicates": self.duplicates,
            "skipped": self.skipped,
            "reasons": dict(self.reasons.most_common()),
            "files": [file.to_dict() for file in self.files],
        }
