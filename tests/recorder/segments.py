"""Recordings made by hand: segments, archives and a live log with lines as the writer has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from agent_state.clock import stamp
from agent_state.protocols import JsonObject, LogRecord
from agent_state.serializers import canonical_json
from agent_state.storage.logs import encode_lines
from agent_state_integrations.recorder import archiver
from agent_state_integrations.recorder.archive_index import (
    read_index,
    write_index,
)
from agent_state_integrations.recorder.archiver import ArchiveReport, RetentionPolicy
from agent_state_integrations.recorder.files import Format, Recording

BEGAN = datetime(2026, 11, 1, 8, tzinfo=UTC)
FORMATS: tuple[Format, ...] = ("jsonl", "parquet", "zst", "gz")


def message(number: int, **other: Any) -> JsonObject:
    """A record; those that ``other`` does not say differ by number. One each hour."""
    meta: JsonObject = {
        "chain_type": ("ui_ux", "testing_validation", "data_management")[number % 3],
        "ace_tier": "ACE"[number % 3],
        "shl_tags": ["@Status-Ready"] if number % 2 else [],
        "keywords": ["plan"],
        "word_count": 2,
        "char_count": 9,
        "content_hash": f"{number:032x}",
    }
    record: JsonObject = {
        "Id": f"m{number}",
        "Timestamp": stamp(BEGAN + timedelta(hours=number)),
        "SpeakerName": f"agent{number % 4}",
        "SpeakerRole": "Planner" if number % 5 == 0 else "Agent",
        "Message": f"Message {number} says: café",
        "ConversationType": number % 2,
        "ContextId": f"ctx{number % 2}",
        "Metadata": meta,
    }
    meta.update(other.pop("Metadata", {}))
    return {**record, **other}


def line(seq: int, record: JsonObject | None = None) -> bytes:
    """A line of the log, with its newline."""
    return encode_lines(("current",), [LogRecord(seq, canonical_json(record or message(seq)))])


def lines(first: int, last: int) -> list[bytes]:
    return [line(seq) for seq in range(first, last + 1)]


def segment(recording: Recording, first: int, content: Iterable[bytes], day: str = "") -> Path:
    """A rotated segment with these bytes."""
    day = day or f"{BEGAN + timedelta(hours=first):%Y-%m-%d}"
    path = recording.segment_path(day, first)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(content))
    return path


def live(recording: Recording, content: Iterable[bytes]) -> Path:
    recording.folder.mkdir(parents=True, exist_ok=True)
    recording.current.write_bytes(b"".join(content))
    return recording.current


def pack(recording: Recording, path: Path, kind: Format) -> Path:
    """A segment as an archive, in the index, and the segment gone."""
    if kind == "jsonl":
        return path
    [found] = [one for one in recording.segments() if one.path == path]
    directory = recording.directory()
    (recording.archive).mkdir(exist_ok=True)
    entry = archiver.pack(recording, found, kind)
    write_index(directory, read_index(directory).with_entry(entry), stamp(BEGAN))
    path.unlink()
    return recording.archive_path(entry.stem, entry.format)


def mixed(state: Path, each: int = 10, kinds: Sequence[Format] = FORMATS) -> Recording:
    """A segment in each of these formats, and a live log; numbers from 1 on."""
    recording = Recording(state)
    for place, kind in enumerate(sorted(kinds, key=lambda kind: kind == "jsonl")):
        first = place * each + 1
        pack(recording, segment(recording, first, lines(first, first + each - 1)), kind)
    first = len(kinds) * each + 1
    live(recording, lines(first, first + each - 1))
    return recording


def archive_all(state: Path, kind: Format = "parquet") -> ArchiveReport:
    """Archive every segment."""
    past = timedelta(days=-100_000)
    if kind == "parquet":
        return archiver.archive(state, RetentionPolicy(parquet_past=0))
    return archiver.archive(state, RetentionPolicy(parquet_past=10**12, compress_past=past))
