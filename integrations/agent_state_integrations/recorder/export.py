"""Exports: messages in one file for other programs, JSON in the shape of a checkpoint, or Parquet.

    {"checkpoint_id": …, "label": …, "timestamp": …, "messages":[
    {…},
    …
    ], "message_count": 2, "size_bytes": 512}

A message a line, so that an export of any size is written, and read back, in bounded memory. A
Parquet file has the columns of ``columns``. Nothing is ever overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from os import PathLike
from pathlib import Path

import orjson

from agent_state.errors import QueryError, StorageError, storage_error
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.files import AtomicFile, writing_failed
from agent_state_integrations.recorder.formats import HEAD
from agent_state_integrations.recorder.lines import LineParser, Numbered, SkippedLines
from agent_state_integrations.recorder.parquet import ParquetLogWriter

_BATCH = 1000


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The file that was written."""

    path: str
    message_count: int
    size_bytes: int
    """Of the messages, a line each."""

    def to_dict(self) -> JsonObject:
        return asdict(self)


def export(
    messages: Iterable[Numbered],
    target: str | PathLike[str],
    *,
    export_id: str,
    label: str,
    timestamp: str,
) -> ExportReport:
    """Write messages, as ``read_records`` gives them, to a new ``.json`` or ``.parquet`` file.

    ``timestamp``: the time of the export as UTC text. The file is complete and durable, or absent.
    Raises ``QueryError`` for another ending, ``StorageError`` when there is such a file already,
    or it cannot be written, and what reading the messages raises.
    """
    path = Path(target).absolute()
    if path.suffix not in (".json", ".parquet"):
        raise QueryError(f"{path.name!r:.80} is not what exports are called: .json or .parquet")
    if path.exists():  # fail early; the end checks again
        raise storage_error(FileExistsError(17, "File exists"), "exporting", path=path)
    try:
        with AtomicFile(path) as out:
            if path.suffix == ".json":
                head = {"checkpoint_id": export_id, "label": label, "timestamp": timestamp}
                count, size = _write_json(out, messages, head)
            else:
                count, size = _write_parquet(out, messages)
            out.publish(replace=False)
    except StorageError:
        raise
    except OSError as error:
        raise writing_failed(error, path) from error
    return ExportReport(str(path), count, size)


def _batches(messages: Iterable[Numbered]) -> Iterator[tuple[list[Numbered], list[bytes]]]:
    """The messages a thousand at a time, and each as a line."""
    found = iter(messages)
    while batch := list(islice(found, _BATCH)):
        yield batch, [_line(seq, record) for seq, record in batch]


def _line(seq: int, record: JsonObject) -> bytes:
    return orjson.dumps({**record, "_seq": seq}, option=orjson.OPT_SORT_KEYS)


def _write_json(
    out: AtomicFile, messages: Iterable[Numbered], head: dict[str, str]
) -> tuple[int, int]:
    out.write(orjson.dumps(head)[:-1] + b"," + HEAD)
    count = size = 0
    for _, lines in _batches(messages):
        out.write((b",\n" if count else b"\n") + b",\n".join(lines))
        count += len(lines)
        size += sum(map(len, lines)) + len(lines)
    out.write(b'\n],"message_count":%d,"size_bytes":%d}\n' % (count, size))
    return count, size


def _write_parquet(out: AtomicFile, messages: Iterable[Numbered]) -> tuple[int, int]:
    count = size = 0
    parser = LineParser(out.path, datetime.fromtimestamp(0, UTC), SkippedLines())
    with ParquetLogWriter(out, parser) as writer:
        for batch, lines in _batches(messages):
            writer.add_records(batch, lines)
            count += len(lines)
            size += sum(map(len, lines)) + len(lines)
    return count, size
