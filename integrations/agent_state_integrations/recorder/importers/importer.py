"""An import: files in, batches to a writer, a report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import orjson

from agent_state.clock import instant, stamp
from agent_state.errors import (
    AgentStateError,
    UnreadableMessageError,
)
from agent_state.protocols import JsonObject
from agent_state.storage.logs import RESERVED
from agent_state_integrations.recorder.importers import registry as finding
from agent_state_integrations.recorder.importers.registry import LogFile
from agent_state_integrations.recorder.importers.transcript import (
    LogFormat,
    SkippedLineError,
    TranscriptReader,
    digest_id,
)
from agent_state_integrations.recorder.normalize import BOM, normalize, parse_timestamp
from agent_state_integrations.recorder.writer import MessageWriter

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
        """Count a line that is left out; ``expected``: lines of its kind hold no message."""
        self.reasons[reason] += 1
        if not expected and len(self.examples) < _EXAMPLES:
            self.examples.append((line, reason))

    def count_repair(self, reason: str, better: str) -> None:
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


BATCH = 1000
_BATCH_BYTES = 16 * 1024 * 1024


def import_logs(
    paths: Iterable[str | PathLike[str]],
    writer: MessageWriter | None,
    *,
    shape: LogFormat | None = None,
    advance: Callable[[int, int], None] = lambda _done, _total: None,
) -> ImportReport:
    """Record the messages of these files and folders. Blocks; memory is bounded.

    ``writer`` has to know every id that is there, so that nothing comes twice: give it a
    ``dedupe_window`` as large as the recording. None is a dry run. ``shape`` None: found out for
    each file. A message without an id gets a hash of its content. ``advance`` is called with the
    number of files that are done, and of all files.

    A file that cannot be read is in the report, and the others are still imported. Raises
    ``StateNotFoundError`` for a path with nothing there, before anything is recorded, and what
    ``writer`` raises: what was recorded before stays, and the next import goes on from there.
    """
    found = [file for path in paths for file in finding.find(Path(path))]
    report = ImportReport(dry_run=writer is None)
    for number, file in enumerate(found):
        advance(number, len(found))
        report.files.append(_FileImport(file, writer, shape).run())
    return report


_NO_TIME = datetime(1, 1, 1, tzinfo=UTC)


class _ReadFailedError(Exception):
    """Reading, not recording, failed."""

    def __init__(self, error: AgentStateError) -> None:
        self.error = error


class _FileImport:
    """The import of one file."""

    def __init__(
        self, file: LogFile, writer: MessageWriter | None, shape: LogFormat | None
    ) -> None:
        self._file = file
        self._writer = writer
        self._asked = shape
        self._path = file.source.path
        self.report = FileReport(str(self._path), left_out=file.left_out, error=file.error)
        self._timeless: dict[str, int] = {}
        self._waiting: list[tuple[int, JsonObject]] = []
        self._waiting_bytes = 0
        self._torn = 0
        self._shape: TranscriptReader | None = None
        self._latest = datetime.fromtimestamp(0, UTC)

    def run(self) -> FileReport:
        if self.report.left_out is None and self.report.error is None:
            try:
                self._read()
            except _ReadFailedError as unread:
                self.report.error = str(unread.error)
            self._flush()
        return self.report

    def _read(self) -> None:
        report, batches = self.report, self._batches()
        first = _first_of(batches)
        name = self._asked or ("recorded" if self._file.ours else finding.shape_of(first))
        if name is None:
            if self._file.asked and first:
                report.error = "none of the known kinds of log"
            else:
                report.left_out = "no known kind of log" if first else "empty"
            return
        report.shape = name
        self._shape = finding.reader(name, self._path)
        self._latest = _first_time(first) or self._file.source.received
        for batch in chain([first], batches):
            for line in batch:
                report.lines += 1
                self._take(line)
        if self._torn == report.lines:
            report.count_repair("not JSON", "the last line is torn")

    def _batches(self) -> Iterator[list[bytes]]:
        try:
            yield from self._file.source.batches()
        except AgentStateError as error:
            raise _ReadFailedError(error) from error

    def _take(self, line: bytes) -> None:
        number = self.report.lines
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            self.report.skip(number, "empty, or too long", expected=True)
            return
        try:
            record = self._record(line, number)
        except SkippedLineError as why:
            self.report.skip(number, str(why), expected=True)
            return
        except UnreadableMessageError as why:
            self.report.skip(number, why.message)
            return
        self._latest = instant(record["Timestamp"])
        self._waiting.append((number, record))
        self._waiting_bytes += len(line)
        if len(self._waiting) >= BATCH or self._waiting_bytes >= _BATCH_BYTES:
            self._flush()

    def _record(self, line: bytes, number: int) -> JsonObject:
        try:
            content = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            self._torn = number
            raise UnreadableMessageError("not JSON") from error
        if type(content) is not dict:
            raise UnreadableMessageError("not a JSON object")
        for name in RESERVED:
            content.pop(name, None)
        assert self._shape is not None  # noqa: S101 - set before the first line
        made = ""

        def new_id() -> str:
            nonlocal made
            made = digest_id("recorded", content)
            return made

        message = self._shape.message(content, number)
        record = normalize(message, received=_NO_TIME, new_id=new_id)
        if record["Timestamp"] != stamp(_NO_TIME):
            return record
        record["Timestamp"] = stamp(self._latest)
        if made:
            # Without an id and a time, the same words again are another message.
            count = self._timeless[made] = self._timeless.get(made, 0) + 1
            if count > 1:
                record["Id"] = digest_id(made, count)
        return record

    def _flush(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if not waiting:
            return
        report = self.report
        if self._writer is None:
            report.recorded += len(waiting)
            return
        outcomes = self._writer.write([record for _, record in waiting], source=report.path)
        for (number, _), outcome in zip(waiting, outcomes, strict=True):
            if outcome.outcome == "recorded":
                report.recorded += 1
            elif outcome.outcome == "duplicate":
                report.duplicates += 1
            else:
                report.skip(number, outcome.reason or "refused")


def _first_of(batches: Iterator[list[bytes]]) -> list[bytes]:
    """The lines by which the format is detected, in not much more memory than a batch."""
    first: list[bytes] = []
    for batch in batches:
        first += batch
        if len(first) >= finding.LOOKED_AT or sum(map(len, first)) > _BATCH_BYTES:
            break
    return first


def _first_time(lines: list[bytes]) -> datetime | None:
    """The first time in the lines; earlier lines without a time are hardly much later."""
    for line in lines:
        try:
            content = orjson.loads(line)
            return instant(parse_timestamp(content.get("timestamp") or content["Timestamp"]))
        except (AttributeError, KeyError, ValueError):
            continue
    return None
