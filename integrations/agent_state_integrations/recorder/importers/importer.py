"""An import: files in, batches to a writer, a report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import orjson

from agent_state.clock import instant, stamp
from agent_state.errors import (
    AgentStateError,
    StateCorruptedError,
    UnreadableMessageError,
)
from agent_state.protocols import JsonObject
from agent_state.serializers import MAX_DEPTH, parse_foreign, parse_line
from agent_state.storage.logs import RESERVED
from agent_state_integrations.recorder.copies import LEFT_OUT, CopyIndex
from agent_state_integrations.recorder.importers import recorded, registry
from agent_state_integrations.recorder.importers.ledger import (
    Fingerprint,
    ImportLedger,
    fingerprint_of,
)
from agent_state_integrations.recorder.importers.registry import FoundFormat, LogFile
from agent_state_integrations.recorder.importers.transcript import (
    Outcome,
    SkippedLineError,
    TranscriptFile,
    TranscriptFormat,
    TranscriptReader,
    digest_id,
)
from agent_state_integrations.recorder.lines import uncollected
from agent_state_integrations.recorder.normalize import (
    BOM,
    NormalRecord,
    normalize_parsed,
    parse_timestamp,
    record_of,
)
from agent_state_integrations.recorder.writer import MessageWriter

_EXAMPLES = 20


@dataclass(slots=True)
class FileReport:
    """One file. Its lines are ``recorded + duplicates + skipped`` and the empty ones."""

    path: str
    shape: str | None = None
    """The name of its format; None when the file was not read."""
    mark: str | None = None
    """What shows the format: something that only one tool writes, and where it is."""
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
    replaced: int = 0
    """Lines in which half a surrogate pair became U+FFFD."""
    unchanged: bool = False
    """Whether it was not read, as it is the file that was imported before."""

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

    def restore(self, before: JsonObject) -> None:
        """Take over what an earlier import found in the same file: all of it is there already."""
        self.shape, self.mark, self.lines = before["shape"], before["mark"], before["lines"]
        self.duplicates = before["recorded"] + before["duplicates"]
        self.reasons = Counter(before["reasons"])
        self.examples = [(each["line"], each["reason"]) for each in before["examples"]]
        self.unchanged = True

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "shape": self.shape,
            "mark": self.mark,
            "lines": self.lines,
            "recorded": self.recorded,
            "duplicates": self.duplicates,
            "skipped": self.skipped,
            "reasons": dict(self.reasons.most_common()),
            "examples": [{"line": line, "reason": reason} for line, reason in self.examples],
            "replaced": self.replaced,
            "left_out": self.left_out,
            "error": self.error,
            "unchanged": self.unchanged,
        }


@dataclass(slots=True)
class ImportReport:
    """All files of an import, in the order in which they were read."""

    files: list[FileReport] = field(default_factory=list)
    dry_run: bool = False

    @property
    def ok(self) -> bool:
        """Whether there were files, and each could be read, whatever lines were left out."""
        return any(file.shape for file in self.files) and all(
            file.error is None for file in self.files
        )

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
    shape: str | None = None,
    advance: Callable[[int, int], None] = lambda _done, _total: None,
    ledger: ImportLedger | None = None,
) -> ImportReport:
    """Record the messages of these files and folders. Blocks; memory is bounded.

    ``writer`` has to know every id that is there, so that nothing comes twice: give it a
    ``dedupe_window`` as large as the recording. None is a dry run. ``shape``: the name of a format;
    None: found out for each file by what only one tool writes. A message without an id gets a hash
    of its content. ``advance`` is called with the number of files that are done, and of all files.

    Copies of a message that stand in several of the files are one message, with the metadata of
    all. A file that cannot be read, or whose messages no format knows, is in the report, and the
    others are still imported. Raises ``StateNotFoundError`` for a path with nothing there, before
    anything is recorded, ``StateValidationError`` for an unknown ``shape``, and what ``writer``
    raises: what was recorded before stays, and the next import goes on from there.
    """
    asked = registry.named(shape) if shape is not None else None
    found = [file for path in paths for file in registry.find(Path(path))]
    report = ImportReport(dry_run=writer is None)
    batch = _ImportBatch(writer)
    imports = [_FileImport(file, batch, asked) for file in found]
    report.files.extend(each.report for each in imports)
    for each in imports:
        each.look(ledger)
    ordered = [each for each in _arranged(imports) if not each.report.unchanged]
    copies = _copies(ordered)
    with uncollected():
        for number, each in enumerate(ordered):
            advance(number, len(ordered))
            each.run(copies)
        batch.flush()
    if ledger is not None and writer is not None:
        for each in ordered:
            if each.report.error is None and each.fingerprint is not None:
                ledger.note(each.path, each.fingerprint, each.report.to_dict())
        ledger.save()
    return report


def _copies(imports: Iterable[_FileImport]) -> CopyIndex:
    """Copies among recorded logs; transcripts have none but those that ``arrange`` knows of."""
    logs = [each for each in imports if each.format is recorded.FORMAT]
    try:
        return CopyIndex.of((each.path, each.source.batches) for each in logs)
    except AgentStateError:
        return CopyIndex()  # reading that file once more says why


def _arranged(imports: Iterable[_FileImport]) -> Iterator[_FileImport]:
    """Those that can be read, format by format, what others refer to first."""
    by_format: dict[str, list[_FileImport]] = {}
    for each in imports:
        if each.format is not None:
            by_format.setdefault(each.format.name, []).append(each)
    for group in by_format.values():
        if all(each.report.unchanged for each in group):
            continue
        arrange = group[0].format.arrange if group[0].format is not None else None
        if arrange is None:
            yield from group
            continue
        of = {each.path: each for each in group}
        for file in arrange(list(of)):
            each = of[file.path]
            each.about = file.about
            yield each


_TOO_DEEP = f"nesting is deeper than {MAX_DEPTH} levels"
_NO_TIME = datetime(1, 1, 1, tzinfo=UTC)
_NO_STAMP = stamp(_NO_TIME)
_Each = TypeVar("_Each")


class _ReadFailedError(Exception):
    """Reading, not recording, failed."""

    def __init__(self, error: AgentStateError) -> None:
        self.error = error


def _reading(found: Iterator[_Each]) -> Iterator[_Each]:
    try:
        yield from found
    except AgentStateError as error:
        raise _ReadFailedError(error) from error


class _ImportBatch:
    """Messages of several files that are written together; each file's report gets its share."""

    def __init__(self, writer: MessageWriter | None) -> None:
        self._writer = writer
        self._waiting: list[tuple[FileReport, int, JsonObject]] = []
        self._bytes = 0

    def add(self, report: FileReport, number: int, record: JsonObject) -> None:
        self._waiting.append((report, number, record))
        self._bytes += len(record["Message"])
        if len(self._waiting) >= BATCH or self._bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if self._writer is None:
            for report, _, _ in waiting:
                report.recorded += 1
            return
        if not waiting:
            return
        paths = dict.fromkeys(report.path for report, _, _ in waiting)
        source = f"{next(iter(paths))}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"
        outcomes = self._writer.write([record for _, _, record in waiting], source=source)
        for (report, number, _), outcome in zip(waiting, outcomes, strict=True):
            if outcome.outcome == "recorded":
                report.recorded += 1
            elif outcome.outcome == "duplicate":
                report.duplicates += 1
            else:
                report.skip(number, outcome.reason or "refused")


class _FileImport:
    """The import of one file."""

    def __init__(self, file: LogFile, batch: _ImportBatch, asked: TranscriptFormat | None) -> None:
        self._file = file
        self._batch = batch
        self.source = file.source
        self.path = file.source.path
        self.about: JsonObject = {}
        self.report = FileReport(str(self.path), left_out=file.left_out, error=file.error)
        self.format = asked
        self._timeless: dict[str, int] = {}
        self._torn = 0
        self.fingerprint: Fingerprint | None = None
        self._first_time: datetime | None = None
        self._latest = stamp(datetime.fromtimestamp(0, UTC))

    def look(self, ledger: ImportLedger | None) -> None:
        """Find out what wrote the file, unless that was said; ``format`` None: it is not read."""
        report = self.report
        if ledger is not None and not self._file.ours and report.left_out is None:
            self.fingerprint = fingerprint_of(self.path)
            before = ledger.known(self.path, self.fingerprint)
            if before is not None and before["shape"] in registry.known():
                report.restore(before)
                self.format = registry.named(before["shape"])
                return
        if report.left_out is not None or report.error is not None:
            self.format = None
            return
        try:
            found = self._found()
        except AgentStateError as unread:
            report.error = str(unread)
            self.format = None
            return
        self.format = None if found is None else found.format
        if found is not None:
            report.shape, report.mark = found.format.name, found.mark

    def _found(self) -> FoundFormat | None:
        if self._file.ours:
            return FoundFormat(registry.named("recorded"), "a recording of this library")
        document = registry.document_of(self.path)
        if document is not None and self.format in (None, document.format):
            return document
        first, found = _first_of(self.source.batches())
        self._first_time = _first_time(first)
        if self.format is not None:
            return FoundFormat(self.format, "as it was said")
        if found is not None:
            return found
        if first and (self._file.asked or registry.may_hold_messages(first)):
            self.report.error = (
                "no known format: no line has what only one tool writes "
                f"({', '.join(registry.known())}); --from says which it is"
            )
        else:
            self.report.left_out = "no messages in it" if first else "empty"
        return None

    def run(self, copies: CopyIndex) -> None:
        """Read the file and record its messages."""
        shape = self.format
        assert shape is not None  # noqa: S101 - only files with a format are run
        self._latest = stamp(self._first_time or self.source.received)
        reader = shape.reader(TranscriptFile(self.path, self.about))
        try:
            if shape.lines is not None:
                for line in _reading(shape.lines(self.path)):
                    self.report.lines += 1
                    self._take(reader, line)
            else:
                batches = copies.without_copies(self.path, self.source.batches())
                for batch in _reading(batches):
                    for raw in batch:
                        self._take_raw(shape, reader, raw)
        except _ReadFailedError as unread:
            self.report.error = str(unread.error)
        self._add(reader.rest())
        if self._torn and self._torn == self.report.lines:
            self.report.count_repair("not JSON", "the last line is torn")

    def _take_raw(
        self,
        shape: TranscriptFormat,
        reader: TranscriptReader,
        raw: bytes,
    ) -> None:
        report = self.report
        report.lines += 1
        number = report.lines
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw is LEFT_OUT:
            report.duplicates += 1
            return
        if (ignored := shape.ignores(raw)) is not None:
            if ignored not in report.reasons:  # one of each kind is looked at
                with suppress(StateCorruptedError):
                    self._look_for_others(parse_line(raw), number)
            report.skip(number, ignored, expected=True)
            return
        if not raw.strip():
            report.skip(number, "empty, or too long", expected=True)
            return
        try:
            line, replaced = _parsed(raw)
        except StateCorruptedError:
            self._torn = number
            report.skip(number, "not JSON")
            return
        if type(line) is not dict:
            report.skip(number, "not a JSON object")
            return
        for name in RESERVED:
            line.pop(name, None)
        report.replaced += replaced
        self._take(reader, line)

    def _take(self, reader: TranscriptReader, line: JsonObject) -> None:
        number = self.report.lines
        try:
            self._add(reader.messages(line, number))
        except SkippedLineError as why:
            self.report.skip(number, str(why), expected=True)
            self._look_for_others(line, number)

    def _look_for_others(self, line: JsonObject, number: int) -> None:
        """Say so where a line without a message for this format is another tool's."""
        if self.report.error is None and (other := registry.other_than(self.format, line)):
            self.report.error = (
                f"line {number} is of {other.format.name} ({other.mark}): what another tool wrote "
                "has to be in a file of its own"
            )

    def _add(self, outcomes: Iterable[Outcome]) -> None:
        for number, outcome in self._made(outcomes):
            if type(outcome) is str:
                self.report.skip(number, outcome, expected=True)
                continue
            assert type(outcome) is dict  # noqa: S101 - a message is an object
            try:
                record = self._record(outcome)
            except UnreadableMessageError as why:
                self.report.skip(number, why.message)
                continue
            self._latest = record["Timestamp"]
            self._batch.add(self.report, number, record)

    def _made(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        try:
            yield from outcomes
        except orjson.JSONEncodeError:  # a reader writes parts of a line as text
            yield self.report.lines, _TOO_DEEP

    def _record(self, message: JsonObject) -> JsonObject:
        made = ""

        def new_id() -> str:
            nonlocal made
            try:
                made = digest_id("recorded", message)
            except orjson.JSONEncodeError as error:
                raise UnreadableMessageError(_TOO_DEEP) from error
            return made

        if self.format is not recorded.FORMAT:
            try:
                return record_of(message)
            except (KeyError, ValueError):
                pass  # without a time, or with one that is none
            if message.get("Message", "")[:1] == "{":
                message.setdefault("Content", {"text": message["Message"]})  # text, not a message
        record = NormalRecord(normalize_parsed(message, received=_NO_TIME, new_id=new_id))
        if record["Timestamp"] != _NO_STAMP:
            return record
        record["Timestamp"] = self._latest
        if made:
            # Without an id and a time, the same words again are another message.
            count = self._timeless[made] = self._timeless.get(made, 0) + 1
            if count > 1:
                record["Id"] = digest_id(made, count)
        return record


def _parsed(raw: bytes) -> tuple[Any, bool]:
    """The value on a line, and whether U+FFFD stands for what is no Unicode.

    Raises ``StateCorruptedError``.
    """
    try:
        return parse_foreign(raw)
    except StateCorruptedError:
        text = raw.decode(errors="replace").encode()
        if text == raw:
            raise
        return parse_foreign(text)[0], True


def _first_of(batches: Iterator[list[bytes]]) -> tuple[list[bytes], FoundFormat | None]:
    """The lines up to the batch that shows the format, and it; not many where none does."""
    first: list[bytes] = []
    for batch in batches:
        first += batch
        if (found := registry.format_of(first)) is not None:
            return first, found
        if len(first) >= registry.LOOKED_AT or sum(map(len, first)) > _BATCH_BYTES:
            break
    return first, None


def _first_time(lines: list[bytes]) -> datetime | None:
    """The first time in the lines; earlier lines without a time are hardly much later."""
    for line in lines:
        try:
            content = parse_line(line)
            return instant(parse_timestamp(content.get("timestamp") or content["Timestamp"]))
        except (StateCorruptedError, KeyError, ValueError):
            continue
    return None
