"""The known log formats: finds the files to import, and detects the format of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder import formats
from agent_state_integrations.recorder import reader as sources
from agent_state_integrations.recorder.importers import claude_code, codex
from agent_state_integrations.recorder.importers.transcript import (
    LOG_FORMATS,
    LogFormat,
    TranscriptReader,
)
from agent_state_integrations.recorder.normalize import BOM, CONTENT_NAMES
from agent_state_integrations.recorder.reader import LogSource


def is_recorded_line(line: JsonObject) -> bool:
    """Whether a line may be of a recorded log: it has content."""
    return not CONTENT_NAMES.isdisjoint(line)


class RecordedLog:
    """``normalize`` knows these forms; a line is left as it is."""

    name: LogFormat = "recorded"

    def __init__(self, path: Path) -> None:
        self.path = path

    def message(self, line: JsonObject, number: int) -> JsonObject:
        return line


LIVE_LOG = "current_session.jsonl"
_COPIES = frozenset({"recovery", "checkpoints"})
"""Folders next to the live log of an older recorder, whose files repeat it."""
LOOKED_AT = 50
"""Lines of a file by which its format is detected."""

_IS_LINE: dict[LogFormat, Callable[[JsonObject], bool]] = {
    "claude-code": claude_code.is_line,
    "codex": codex.is_line,
    "recorded": is_recorded_line,
}
_READERS: dict[LogFormat, Callable[[Path], TranscriptReader]] = {
    "recorded": RecordedLog,
    "claude-code": claude_code.ClaudeCode,
    "codex": codex.Codex,
}


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file. ``left_out``: why it is not read; ``asked``: it was named, not come upon.

    ``error``: it is a folder that cannot be looked into, and why.
    """

    source: LogSource
    left_out: str | None = None
    error: str | None = None
    asked: bool = False
    ours: bool = False
    """It is of a recording of this library."""


def find(path: Path) -> Iterator[LogFile]:
    """The logs that a path means: a file, a recording of ours, or a folder at any depth.

    Raises ``StateNotFoundError`` when there is nothing.
    """
    if path.is_dir() and sources.recording_at(path.resolve()) is None:
        yield from _in_folder(path)
        return
    with sources.sources(path) as found:
        for source in found:
            if path.is_dir():
                yield LogFile(replace(source, live=None), ours=True)  # opened when its turn comes
            else:
                # As it was named: a session's name may be in it.
                yield LogFile(LogSource(path, source.format), asked=True)


def _in_folder(top: Path) -> Iterator[LogFile]:
    closed: list[OSError] = []
    for folder, below, names in os.walk(top, onerror=closed.append):
        below.sort()
        where = Path(folder)
        is_copy = where.name in _COPIES and (where.parent / LIVE_LOG).is_file()
        for name in sorted(names):
            path = where / name
            kind = formats.format_of(path)
            # One JSON document is a log only where such a recorder puts its checkpoints.
            if kind is None or kind == "parquet" or not path.is_file():
                continue
            if kind == "json" and where.name != "checkpoints":
                continue
            yield LogFile(LogSource(path, kind), _exclusion_reason(path, is_copy))
    for error in closed:
        path = Path(os.fsdecode(error.filename))
        yield LogFile(LogSource(path, "jsonl"), error=f"cannot be looked into: {error.strerror}")


def _exclusion_reason(path: Path, is_copy: bool) -> str | None:
    if is_copy:
        return f"a copy of {LIVE_LOG}"
    if path.name == "dead-letter.jsonl":
        return "it holds dead letters"
    if path.name == "history.jsonl":
        return "a list of prompts, which the sessions hold too"
    return None


def shape_of(first: list[bytes]) -> LogFormat | None:
    """The format of most of the first lines of a file; None if no line has a known one."""
    votes = dict.fromkeys(LOG_FORMATS, 0)
    for line in first[:LOOKED_AT]:
        try:
            value = orjson.loads(line.removeprefix(BOM))
        except orjson.JSONDecodeError:
            continue
        if type(value) is not dict:
            continue
        for name, is_line in _IS_LINE.items():
            if is_line(value):
                votes[name] += 1
                break
    best = max(LOG_FORMATS, key=lambda name: votes[name])
    return best if votes[best] else None


def reader(name: LogFormat, path: Path) -> TranscriptReader:
    """The reader of a file in this format."""
    return _READERS[name](path)
