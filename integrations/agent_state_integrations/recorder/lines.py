"""One line of a log as a record: our own lines, a person's, and those of older logs."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from os import PathLike, fspath
from typing import Any

from agent_state.errors import StateCorruptedError, UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_foreign
from agent_state.storage import logs
from agent_state_integrations.recorder.normalize import mark_replaced, normalize_parsed

Numbered = tuple[int, JsonObject]
"""A record, and its number in the recording: 0 where it has none."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for cycles: records make none, and their number makes it look often."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(slots=True)
class SkippedLines:
    """The lines that were left out while reading, since they hold no message.

    Files and parts of files that a query need not look at are not looked at for this either.
    """

    lines: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    """How many lines were left out of which file."""

    def note(self, path: str, reason: str) -> None:
        """One more."""
        self.lines += 1
        self.reasons[reason] += 1
        self.files[path] += 1

    def __str__(self) -> str:
        if not self.lines:
            return "every line was read"
        reasons = ", ".join(f"{count} {why}" for why, count in self.reasons.most_common(5))
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        count = "one line was" if self.lines == 1 else f"{self.lines} lines were"
        return f"{count} left out of {next(iter(self.files))}{more}: {reasons}"


class LineParser:
    """Reads the lines of one file, in order, or backwards from the last one.

    ``received`` is for lines that name no time. Backwards, a number that came twice stays so.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        received: datetime,
        skipped: SkippedLines,
        *,
        backwards: bool = False,
    ) -> None:
        self._path = fspath(path)
        self._received = received
        self._skipped = skipped
        self._backwards = backwards
        self._previous = 0
        self._unnamed = 0

    def records(self, lines: Iterable[bytes]) -> list[Numbered]:
        """The records in the lines; lines without one are counted."""
        found = []
        for line in lines:
            try:
                found.append(self.record(line))
            except UnreadableMessageError as error:
                self.skip(error.message)
        return found

    def skip(self, reason: str) -> None:
        """Count a line that holds no message."""
        self._skipped.note(self._path, reason)

    def record(self, line: bytes) -> Numbered:
        """The record in a line without its newline. Raises ``UnreadableMessageError``."""
        try:
            record, replaced = parse_foreign(line)
        except StateCorruptedError as error:
            # An empty line is also what is left of one that is too long to be read.
            raise UnreadableMessageError("not JSON" if line else "empty, or too long") from error
        if type(record) is not dict:
            raise UnreadableMessageError("not a JSON object")
        seq, record = self.parsed(record)
        if replaced:
            mark_replaced(record)
        return seq, record

    def parsed(self, record: JsonObject) -> Numbered:
        """The record in an object that was read from JSON, which it may become a part of.

        Raises ``UnreadableMessageError``.
        """
        pop = record.pop
        said = pop("_seq", None)
        pop("_crc", None)
        pop("_dedupe", None)
        pop("_id", None)
        # A line that a person wrote counts on from the one before, as in every log of the core; so
        # does one whose number has come before: git merged two logs.
        seq = said if logs.is_seq(said) and (self._backwards or said > self._previous) else 0
        if not seq and self._previous:
            seq = self._previous + 1
        if said is None or not _is_ours(record):
            record = normalize_parsed(record, received=self._received, new_id=self._new_id)
        self._previous = seq
        return seq, record

    def _new_id(self) -> str:
        """Reading a file twice gives the same ids."""
        self._unnamed += 1
        return f"unnamed-{self._unnamed}"


def _is_ours(record: JsonObject) -> bool:
    """Whether a record has the form in which this library writes one."""
    try:
        moment: Any = record["Timestamp"]
        if len(moment) != 27 or moment[26] != "Z":
            return False
        datetime.fromisoformat(moment)
        return (
            type(record["Message"]) is str
            and type(record["Id"]) is str
            and type(record["SpeakerName"]) is str
            and type(record["SpeakerRole"]) is str
            and type(record["ContextId"]) is str
            and type(record["ConversationType"]) in (int, str)
            and type(record["Metadata"]) is dict
        )
    except (KeyError, TypeError, ValueError):
        return False
