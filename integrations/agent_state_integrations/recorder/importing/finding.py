"""Which files there are to import, and what each of them is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importing import claude_code, codex, recorded
from agent_state_integrations.recorder.importing.shapes import SHAPES, Shape, ShapeName
from agent_state_integrations.recorder.past import formats, sources
from agent_state_integrations.recorder.past.sources import Source
from agent_state_integrations.recorder.receiving.understanding import BOM

LIVE_LOG = "current_session.jsonl"
_COPIES = frozenset({"recovery", "checkpoints"})
"""Folders beside the live log of an older recorder, whose files repeat it."""
LOOKED_AT = 50
"""Lines of a file that tell what it is."""

_IS_LINE: dict[ShapeName, Callable[[JsonObject], bool]] = {
    "claude-code": claude_code.is_line,
    "codex": codex.is_line,
    "recorded": recorded.is_line,
}
_READERS: dict[ShapeName, Callable[[Path], Shape]] = {
    "recorded": recorded.Recorded,
    "claude-code": claude_code.ClaudeCode,
    "codex": codex.Codex,
}


@dataclass(frozen=True, slots=True)
class Found:
    """One file. ``left_out``: why it is not read; ``asked``: it was named, not come upon.

    ``error``: it is a folder that cannot be looked into, and why.
    """

    source: Source
    left_out: str | None = None
    error: str | None = None
    asked: bool = False
    ours: bool = False
    """It is of a recording of this library."""


def find(path: Path) -> Iterator[Found]:
    """The logs that a path means: a file, a recording of ours, or a folder at any depth.

    Raises ``StateNotFoundError`` when there is nothing.
    """
    if path.is_dir() and sources.recording_at(path.resolve()) is None:
        yield from _in_folder(path)
        return
    with sources.sources(path) as found:
        for source in found:
            if path.is_dir():
                yield Found(replace(source, live=None), ours=True)  # opened when its turn comes
            else:
                # As it was named: a session's name may be in it.
                yield Found(Source(path, source.format), asked=True)


def _in_folder(top: Path) -> Iterator[Found]:
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
            yield Found(Source(path, kind), _why_not(path, is_copy))
    for error in closed:
        path = Path(os.fsdecode(error.filename))
        yield Found(Source(path, "jsonl"), error=f"cannot be looked into: {error.strerror}")


def _why_not(path: Path, is_copy: bool) -> str | None:
    if is_copy:
        return f"a copy of {LIVE_LOG}"
    if path.name == "dead-letter.jsonl":
        return "it holds dead letters"
    if path.name == "history.jsonl":
        return "a list of prompts, which the sessions hold too"
    return None


def shape_of(first: list[bytes]) -> ShapeName | None:
    """What most of the first lines of a file are; None when no line is of a known shape."""
    votes = dict.fromkeys(SHAPES, 0)
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
    best = max(SHAPES, key=lambda name: votes[name])
    return best if votes[best] else None


def reader(name: ShapeName, path: Path) -> Shape:
    """What reads a file of this shape."""
    return _READERS[name](path)
