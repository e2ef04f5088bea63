"""Our Parquet files: the lines of a segment as typed columns, and each line as it was written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias

import orjson

from agent_state.errors import StateCorruptedError, UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.lazy_imports import (
    arrow,
    arrow_compute,
    arrow_dataset,
    arrow_parquet,
)
from agent_state_integrations.recorder.lines import LineParser, Numbered
from agent_state_integrations.recorder.query import Query, has_tag, spellings

Arrow: TypeAlias = Any
"""An object of ``pyarrow``, which has no type hints."""

MARK = b"agent_state.record"
"""The key in a Parquet file's metadata that marks it as ours; its value is the schema version."""
VERSION = b"1"
LINE = "line"
SHOWN = (
    "seq",
    "id",
    "timestamp",
    "speaker",
    "role",
    "type",
    "context",
    "text",
    "chain_type",
    "ace_tier",
    "shl_tags",
    "keywords",
    "word_count",
    "char_count",
    "content_hash",
    "metadata",
    "content",
)
"""All columns except ``line``; ``metadata`` and ``content`` are JSON."""

FEW_VALUES = ["speaker", "role", "type", "context", "chain_type", "ace_tier"]
MEASURED = ["seq", "timestamp", *FEW_VALUES]
"""Columns whose smallest and largest value each row group stores."""


def schema() -> Arrow:
    """The columns. ``line`` is the line of the log as it was written, without its newline.

    For a line without a message the other columns are null. Raises ``MissingExtraError``.
    """
    pa = arrow()
    text, number = pa.string(), pa.int64()
    types: dict[str, Any] = dict.fromkeys(SHOWN, text)
    types |= dict.fromkeys(("seq", "word_count", "char_count"), number)
    types |= dict.fromkeys(("shl_tags", "keywords"), pa.list_(text))
    types["timestamp"] = pa.timestamp("us", tz="UTC")
    types[LINE] = pa.binary()
    return pa.schema(list(types.items()), metadata={MARK: VERSION})


def batch_of(lines: Sequence[bytes], parser: LineParser) -> Arrow:
    """The lines as rows, in order. The parser counts lines without a message."""
    rows: list[Numbered | None] = []
    for line in lines:
        try:
            rows.append(parser.record(line))
        except UnreadableMessageError as error:
            parser.skip(error.message)
            rows.append(None)
    return batch_of_rows(rows, lines)


def batch_of_rows(rows: Sequence[Numbered | None], lines: Sequence[bytes]) -> Arrow:
    """Numbered records and their lines as rows; None for a line without a message."""
    pa = arrow()
    wanted = schema()
    values = [_NOTHING if row is None else _values(*row) for row in rows]
    arrays = [
        _array(name, column, wanted.field(name).type)
        for name, column in zip(SHOWN, zip(*values, strict=True), strict=True)
    ]
    arrays.append(pa.array(lines, pa.binary()))
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


def row_of(seq: int, record: JsonObject) -> JsonObject:
    """A record as a row with the columns of ``SHOWN``; ``metadata`` and ``content`` are JSON."""
    row: JsonObject = dict(zip(SHOWN, _values(seq, record), strict=True))
    return {name: value.decode() if type(value) is bytes else value for name, value in row.items()}


_NOTHING = (None,) * len(SHOWN)


def _values(seq: int, record: JsonObject) -> tuple[object, ...]:
    meta = record["Metadata"]
    get = meta.get
    content = record.get("Content")
    return (
        seq,
        record["Id"],
        record["Timestamp"],
        record["SpeakerName"],
        record["SpeakerRole"],
        str(record["ConversationType"]),
        record["ContextId"],
        record["Message"],
        get("chain_type"),
        get("ace_tier"),
        tags if type(tags := get("shl_tags")) is list else None,
        words if type(words := get("keywords")) is list else None,
        get("word_count"),
        get("char_count"),
        get("content_hash"),
        orjson.dumps(meta),
        None if content is None else orjson.dumps(content),
    )


def _array(name: str, values: Sequence[Any], kind: object) -> Arrow:
    pa = arrow()
    if name == "timestamp":  # `…Z` with microseconds, as records have it
        return pa.array(values, pa.string()).cast(kind)
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, OverflowError):
        # Metadata may hold any value; one that does not fit its column is in `metadata` only.
        fitting = _FITTING.get(name, _text)
        return pa.array([fitting(value) for value in values], kind)


def _text(value: object) -> str | None:
    return value if type(value) is str else None


def _number(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None


def _texts(value: object) -> list[str] | None:
    return [item for item in value if type(item) is str] if type(value) is list else None


_FITTING = {
    "shl_tags": _texts,
    "keywords": _texts,
    "word_count": _number,
    "char_count": _number,
}


ROWS = 50_000
GROUP_BYTES = 64 * 1024 * 1024
"""A row group is closed at this many rows, or bytes of lines."""

_SLICE = 500
"""Rows that exist as Python objects at a time; more would slow down the garbage collector."""


class ParquetLogWriter:
    """Writes lines as a Parquet file to ``out``, in row groups. A context manager."""

    def __init__(self, out: io.RawIOBase, parser: LineParser, *, with_lines: bool = True) -> None:
        self._parser = parser
        columns = schema()
        self._kept = [name for name in columns.names if with_lines or name != LINE]
        columns = columns if with_lines else columns.remove(columns.get_field_index(LINE))
        self._writer = arrow_parquet().ParquetWriter(
            arrow().PythonFile(out, mode="w"),
            columns,
            compression="zstd" if with_lines else "snappy",
            use_dictionary=[*FEW_VALUES, "shl_tags.list.element", "keywords.list.element"],
            write_statistics=MEASURED,
            write_page_checksum=True,
        )
        self._lines: list[bytes] = []
        self._batches: list[Arrow] = []
        self._rows = self._bytes = 0

    def change_parser(self, parser: LineParser) -> None:
        """The lines added from now on are of another file."""
        self._end_slice()
        self._parser = parser

    def add(self, lines: list[bytes]) -> None:
        """Add lines, which are given without their newlines."""
        for line in lines:
            self._lines.append(line)
            self._bytes += len(line)
            if len(self._lines) >= _SLICE or self._bytes >= GROUP_BYTES:
                self._end_slice()
                if self._rows >= ROWS or self._bytes >= GROUP_BYTES:
                    self._end_group()

    def add_records(self, records: Sequence[Numbered], lines: Sequence[bytes]) -> None:
        """Add parsed records with their lines, some hundred at a time."""
        self._end_slice()
        self._bytes += sum(map(len, lines))
        self._keep(batch_of_rows(records, lines))
        if self._rows >= ROWS or self._bytes >= GROUP_BYTES:
            self._end_group()

    def _end_slice(self) -> None:
        if self._lines:
            self._keep(batch_of(self._lines, self._parser))
            self._lines = []

    def _keep(self, batch: Arrow) -> None:
        self._batches.append(batch.select(self._kept))
        self._rows += len(batch)

    def _end_group(self) -> None:
        self._end_slice()
        if self._batches:
            table = arrow().Table.from_batches(self._batches)
            self._writer.write_table(table, row_group_size=max(1, len(table)))
            self._batches, self._rows, self._bytes = [], 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end_group()
            self._writer.close()
        else:
            self._writer.is_open = False  # the file is discarded


def open_fragment(file: BinaryIO, path: Path) -> Arrow:
    """An open Parquet file of ours. Raises ``StateCorruptedError`` for any other."""
    pa, ds = arrow(), arrow_dataset()
    # Prefetching would hold a complete row group of every column in memory.
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True, pre_buffer=False)
    format_ = ds.ParquetFileFormat(default_fragment_scan_options=options)
    with _damage_named(path):
        fragment = format_.make_fragment(pa.PythonFile(file, mode="r"))
        ours = MARK in (fragment.physical_schema.metadata or {})
    if not ours:
        raise StateCorruptedError("this Parquet file holds no recording", path=path)
    return fragment


def check(file: BinaryIO, path: Path) -> None:
    """Read every column. Raises ``StateCorruptedError`` naming a damaged file."""
    with file, _damage_named(path):
        for group in open_fragment(file, path).split_by_row_group():
            group.to_table(use_threads=False)


def is_ours(file: BinaryIO, path: Path) -> bool:
    """Whether a file is one of ours. Closes the file."""
    with file:
        try:
            open_fragment(file, path)
        except StateCorruptedError:
            return False
        return True


def batches(
    file: BinaryIO, path: Path, query: Query | None, *, backwards: bool
) -> Iterator[list[bytes]]:
    """The lines of a Parquet file that may match a query, a row group in memory at a time."""
    query = query or Query()
    with _damage_named(path):
        groups = open_fragment(file, path).split_by_row_group(_expression(query))
        for group in reversed(groups) if backwards else groups:
            lines = _matching(group, query, LINE).to_pylist()
            if backwards:
                lines.reverse()
            for start in range(0, len(lines), _SLICE):
                yield lines[start : start + _SLICE]


def lines_between(file: BinaryIO, path: Path, first: int, last: int) -> Iterator[list[bytes]]:
    """The lines of the row groups that have numbers in this range."""
    seq = arrow_compute().field("seq")
    with file, _damage_named(path):
        numbers = ((seq >= first) & (seq <= last)) | seq.is_null()
        for group in open_fragment(file, path).split_by_row_group(numbers):
            yield group.to_table(columns=[LINE], use_threads=False).column(0).to_pylist()


def count(file: BinaryIO, path: Path, query: Query) -> int:
    """The number of messages that match a query (without its limit), from the columns alone."""
    with file, _damage_named(path):
        groups = open_fragment(file, path).split_by_row_group(_expression(query))
        numbers = (_matching(group, query, "seq") for group in groups)
        return sum(len(column) - column.null_count for column in numbers)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Arrow's errors as ``StateCorruptedError``; those of the operating system as they are."""
    try:
        yield
    except (arrow().ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise StateCorruptedError(f"this archive is damaged: {error}", path=path) from error


def _expression(query: Query) -> Arrow | None:
    """The conditions that Arrow tests, on the statistics of row groups too; None without any."""
    pa, pc = arrow(), arrow_compute()
    conditions = [
        pc.field(name) == str(value)
        for name, value in (
            ("speaker", query.speaker),
            ("role", query.role),
            ("type", query.message_type),
            ("context", query.context),
            ("chain_type", query.chain_type),
            ("ace_tier", query.ace_tier),
        )
        if value is not None
    ]
    if query.since is not None:
        conditions.append(
            pc.field("timestamp") >= pa.scalar(query.since, pa.timestamp("us", "UTC"))
        )
    if query.until is not None:
        conditions.append(pc.field("timestamp") < pa.scalar(query.until, pa.timestamp("us", "UTC")))
    expression = None
    for condition in conditions:
        expression = condition if expression is None else expression & condition
    return expression


def _matching(group: Arrow, query: Query, name: str) -> Arrow:
    """A column of the rows of a row group that match a query.

    Tags and text are tested here: Arrow cannot test the members of a list, and lowers the case of
    text in another way than Python.
    """
    names = [name]
    names += ["shl_tags"] if query.tag is not None else []
    names += ["text"] if query.text is not None else []
    table = group.to_table(columns=names, filter=_expression(query), use_threads=False)
    if len(names) > 1:
        mask = [True] * len(table)
        if query.tag is not None:
            wanted = spellings(query.tag)
            mask = [has_tag(tags, wanted) for tags in table["shl_tags"].to_pylist()]
        if query.text is not None:
            words = query.text.lower()
            texts = table["text"].to_pylist()
            mask = [
                kept and text is not None and words in text.lower()
                for kept, text in zip(mask, texts, strict=True)
            ]
        table = table.filter(arrow().array(mask, arrow().bool_()))
    return table.column(0)
