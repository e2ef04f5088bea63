"""Exports: messages in one file for other programs, by its ending.

- ``.json``: the shape of a checkpoint, which ``read`` reads back::

    {"checkpoint_id": …, "label": …, "timestamp": …, "messages":[
    {…},
    …
    ], "message_count": 2, "size_bytes": 512}

- ``.jsonl``, ``.csv``: a row for each message, with the columns of ``parquet.SHOWN``. In CSV, lists
  and objects are JSON.
- ``.parquet``, ``.feather`` and ``.arrow`` (the same: Arrow's file format): these columns, typed.

After ``.json``, ``.jsonl`` and ``.csv`` may stand ``.gz``. An export of any size is written in
bounded memory. Nothing is ever overwritten.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from os import PathLike
from pathlib import Path

import orjson

from agent_state.errors import QueryError, StorageError, storage_error
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.files import AtomicFile, writing_failed
from agent_state_integrations.recorder.formats import HEAD, GzipWriter, SupportsWrite
from agent_state_integrations.recorder.lazy_imports import arrow
from agent_state_integrations.recorder.lines import LineParser, Numbered, SkippedLines
from agent_state_integrations.recorder.parquet import (
    LINE,
    SHOWN,
    ParquetLogWriter,
    batch_of_rows,
    row_of,
    schema,
)

_BATCH = 1000
ENDINGS = (".json", ".parquet", ".jsonl", ".csv", ".feather", ".arrow")
_PACKABLE = (".json", ".jsonl", ".csv")


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
    """Write messages, as ``read_records`` gives them, to a new file in the format of its ending.

    ``timestamp``: the time of the export as UTC text. The file is complete and durable, or absent.
    Raises ``QueryError`` for another ending, ``StorageError`` when there is such a file already,
    or it cannot be written, and what reading the messages raises.
    """
    path = Path(target).absolute()
    packed = path.suffix == ".gz"
    ending = (path.with_suffix("") if packed else path).suffix
    if ending not in (_PACKABLE if packed else ENDINGS):
        raise QueryError(
            f"{path.name!r:.80} is not what exports are called: {' or '.join(ENDINGS)}, and "
            f"{', '.join(_PACKABLE)} with .gz"
        )
    if path.exists():  # fail early; the end checks again
        raise storage_error(FileExistsError(17, "File exists"), "exporting", path=path)
    try:
        with AtomicFile(path) as out:
            with _packing(out, packed) as target_file:
                if ending == ".json":
                    head = {"checkpoint_id": export_id, "label": label, "timestamp": timestamp}
                    count, size = _write_json(target_file, messages, head)
                elif ending == ".parquet":
                    count, size = _write_parquet(out, messages)
                elif ending in (".feather", ".arrow"):
                    count, size = _write_arrow(out, messages)
                else:
                    write = _write_csv if ending == ".csv" else _write_lines
                    count, size = write(target_file, messages)
            out.publish(replace=False)
    except StorageError:
        raise
    except OSError as error:
        raise writing_failed(error, path) from error
    return ExportReport(str(path), count, size)


@contextmanager
def _packing(out: AtomicFile, packed: bool) -> Iterator[SupportsWrite]:
    """The file, or gzip into it; equal messages give equal bytes."""
    if not packed:
        yield out
        return
    packer = GzipWriter(out)
    yield packer
    packer.close()


def _batches(messages: Iterable[Numbered]) -> Iterator[tuple[list[Numbered], list[bytes]]]:
    """The messages a thousand at a time, and each as a line."""
    found = iter(messages)
    while batch := list(islice(found, _BATCH)):
        yield batch, [_line(seq, record) for seq, record in batch]


def _line(seq: int, record: JsonObject) -> bytes:
    return orjson.dumps({**record, "_seq": seq}, option=orjson.OPT_SORT_KEYS)


def _write_json(
    out: SupportsWrite, messages: Iterable[Numbered], head: dict[str, str]
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


def _rows(messages: Iterable[Numbered]) -> Iterator[tuple[list[JsonObject], int]]:
    """The messages a thousand at a time as rows, and the bytes of their lines."""
    for batch, lines in _batches(messages):
        yield [row_of(*numbered) for numbered in batch], sum(map(len, lines)) + len(lines)


def _write_lines(out: SupportsWrite, messages: Iterable[Numbered]) -> tuple[int, int]:
    count = size = 0
    for rows, length in _rows(messages):
        out.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        count, size = count + len(rows), size + length
    return count, size


def _write_csv(out: SupportsWrite, messages: Iterable[Numbered]) -> tuple[int, int]:
    count = size = 0
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, SHOWN)
    writer.writeheader()
    for rows, length in _rows(messages):
        for row in rows:
            tags = {name: orjson.dumps(row[name]).decode() for name in ("shl_tags", "keywords")}
            writer.writerow({**row, **tags})
        out.write(text.getvalue().encode("utf-8", "surrogatepass"))
        text.seek(0)
        text.truncate()
        count, size = count + len(rows), size + length
    out.write(text.getvalue().encode())
    return count, size


def _write_arrow(out: AtomicFile, messages: Iterable[Numbered]) -> tuple[int, int]:
    count = size = 0
    columns = schema()
    columns = columns.remove(columns.get_field_index(LINE)).with_metadata(None)
    with (
        arrow().PythonFile(out, mode="w") as file,
        arrow().ipc.new_file(file, columns) as writer,
    ):
        for batch, lines in _batches(messages):
            rows = batch_of_rows(batch, lines)
            writer.write_batch(rows.select(columns.names).replace_schema_metadata(None))
            count += len(lines)
            size += sum(map(len, lines)) + len(lines)
    return count, size
