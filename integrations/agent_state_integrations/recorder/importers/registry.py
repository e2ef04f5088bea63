"""The formats that are known: which files there are to import, and what wrote each of them.

``register`` adds a format of your own for this process, and a package adds one for every process by
an entry point in the group ``agent_state.transcripts`` that names a ``TranscriptFormat``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from agent_state.errors import StateCorruptedError, StateValidationError
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_line, strip_foreign
from agent_state_integrations.recorder import formats as files
from agent_state_integrations.recorder import reader as sources
from agent_state_integrations.recorder.importers import (
    claude_code,
    codex,
    gemini,
    opencode,
    pi,
    qwen,
    recorded,
)
from agent_state_integrations.recorder.importers.transcript import TranscriptFormat
from agent_state_integrations.recorder.reader import LogSource

GROUP = "agent_state.transcripts"
"""The group of entry points in which packages name their formats."""
LIVE_LOG = "current_session.jsonl"
_COPIES = frozenset({"recovery", "checkpoints"})
"""Folders next to the live log of an older recorder, whose files repeat it."""
LOOKED_AT = 50
"""Lines of a file in which the mark of a tool is looked for."""
_HEAD = 4096
"""Bytes of a document in which its mark is looked for."""
_SAYING = frozenset(
    {"role", "content", "message", "messages", "text", "parts", "prompt", "response"}
)
"""A line with one of these names may hold a message, whatever wrote it."""

_REGISTERED: dict[str, TranscriptFormat] = {
    each.name: each
    for each in (
        *(claude_code.FORMAT, codex.FORMAT, gemini.FORMAT, qwen.FORMAT, opencode.FORMAT, pi.FORMAT),
        recorded.FORMAT,
    )
}


def register(transcript: TranscriptFormat) -> None:
    """Add a format, or replace the one with this name. It is asked before the others."""
    others = {name: each for name, each in _REGISTERED.items() if name != transcript.name}
    _REGISTERED.clear()
    _REGISTERED.update({transcript.name: transcript, **others})


def known() -> dict[str, TranscriptFormat]:
    """All formats by name, in the order in which they are asked: those of other packages first."""
    return {**_of_packages(), **_REGISTERED}


def named(name: str) -> TranscriptFormat:
    """The format with this name. Raises ``StateValidationError``."""
    try:
        return known()[name]
    except KeyError:
        raise StateValidationError(f"no format {name!r:.60}; known: {', '.join(known())}") from None


@cache
def _of_packages() -> dict[str, TranscriptFormat]:
    found = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        loaded = entry.load()
        if not isinstance(loaded, TranscriptFormat):
            raise StateValidationError(f"{GROUP}: {entry.value} is no TranscriptFormat")
        found[loaded.name] = loaded
    return found


# -- which files -----------------------------------------------------------------------------------


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
            kind = files.format_of(path)
            if kind == "parquet" or not path.is_file():
                continue
            # One JSON document is a log where an older recorder puts its checkpoints. Others, and
            # files with other names, are one if a format knows them.
            if kind is None or (kind == "json" and where.name != "checkpoints"):
                if document_of(path) is not None:
                    yield LogFile(LogSource(path, kind or "jsonl"))
                continue
            yield LogFile(LogSource(path, kind), _exclusion_reason(path, is_copy))
    for error in closed:
        path = Path(os.fsdecode(error.filename))
        yield LogFile(LogSource(path, "jsonl"), error=f"cannot be looked into: {error.strerror}")


def _exclusion_reason(path: Path, is_copy: bool) -> str | None:
    if is_copy:
        return f"a copy of {LIVE_LOG}"
    return sources.NO_LOGS.get(path.name)


# -- what wrote it ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoundFormat:
    """The format of a file, and what shows it."""

    format: TranscriptFormat
    mark: str


def format_of(first: list[bytes]) -> FoundFormat | None:
    """What wrote these first lines of a file: by the first of them that only one tool writes."""
    asked = known().values()
    for number, line in enumerate(first[:LOOKED_AT], 1):
        value = _object(line)
        for each in asked if value is not None else ():
            if (mark := each.mark(value or {})) is not None:
                return FoundFormat(each, f"{mark} (line {number})")
    return None


def other_than(found: TranscriptFormat | None, line: JsonObject) -> FoundFormat | None:
    """Which other tool wrote a line; None where no tool shows, or the line is one of a log."""
    for each in known().values():
        if each is not found and each is not recorded.FORMAT and (mark := each.mark(line)):
            return FoundFormat(each, mark)
    return None


def document_of(path: Path) -> FoundFormat | None:
    """What wrote a file that is not JSON lines; None when no format knows it."""
    asked = [each for each in known().values() if each.document is not None]
    try:
        with path.open("rb") as file:
            head = strip_foreign(file.read(_HEAD))
    except OSError:
        return None  # reading it says why
    for each in asked:
        if each.document is not None and (mark := each.document(path, head)) is not None:
            return FoundFormat(each, mark)
    return None


def may_hold_messages(first: list[bytes]) -> bool:
    """Whether any of the first lines looks like a message, or the envelope of one."""
    for line in first[:LOOKED_AT]:
        value = _object(line)
        if value is not None and not _SAYING.isdisjoint(value):
            return True
    return False


def _object(line: bytes) -> JsonObject | None:
    try:
        return parse_line(line)
    except StateCorruptedError:
        return None
