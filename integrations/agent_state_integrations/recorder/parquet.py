"""Messages as typed columns: the schema of our Parquet files, and lines turned into it.

Our Parquet files: written in row groups, read back as the lines they were made of.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeAlias

import orjson

from agent_state.clock import instant
from agent_state.errors import StateCorruptedError, UnreadableMessageError
from agent_state_integrations.recorder.lazy_imports import arrow, arrow_compute, arrow_parquet
from agent_state_integrations.recorder.lines import LineParser, Numbered
from agent_state_integrations.recorder.query import Query, spellings

if TYPE_CHECKING:
    from agent_state.protocols import JsonObject
    from agent_state_integrations.recorder.lines import LineParser


Arrow: TypeAlias = Any
"""An object of ``pyarrow``, which comes without types."""

Row: TypeAlias = "tuple[int, JsonObject] | None"

MARK = b"agent_state.record"
"""The key in a Parquet file's metadata that says it is ours, with the version of its columns."""
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
"""All columns but ``line``; ``metadata`` and ``content`` are JSON."""

FEW_VALUES = ["speaker", "role", "type", "context", "chain_type", "ace_tier"]
MEASURED = ["seq", "timestamp", *FEW_VALUES]
"""Columns whose smallest and largest value are kept for each row group."""


def schema() -> Arrow:
    """The columns. ``line`` is the line of the log as it stood there, without its newline.

    A line that holds no message has a ``line`` and nothing else. Raises ``MissingExtraError``.
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
    """The lines as rows, in their order. What holds no message is counted by the parser."""
    rows: list[Row] = []
    for line in lines:
        try:
            rows.append(parser.record(line))
        except UnreadableMessageError as error:
            parser.skip(error.message)
            rows.append(None)
    return batch_of_rows(rows, lines)


def batch_of_rows(rows: Sequence[Row], lines: Sequence[bytes]) -> Arrow:
    """Records, each with its number and its line, as rows; None for a line that holds none."""
    pa = arrow()
    wanted = schema()
    values = [_NOTHING if row is None else _values(*row) for row in rows]
    arrays = [
        _array(name, column, wanted.field(name).type)
        for name, column in zip(SHOWN, zip(*values, strict=True), strict=True)
    ]
    arrays.append(pa.array(lines, pa.binary()))
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


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
        # In metadata there may be anything; what does not fit its column is in `metadata` alone.
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
"""A row group is closed at so many rows, or bytes of lines."""

_SLICE = 500
"""Rows that are objects of Python at a time; more would keep its garbage collector busy."""


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
        """What is added from now on is another file's."""
        self._end_slice()
        self._parser = parser

    def add(self, lines: list[bytes]) -> None:
        """Add lines, which come without their newlines."""
        for line in lines:
            self._lines.append(line)
            self._bytes += len(line)
            if len(self._lines) >= _SLICE or self._bytes >= GROUP_BYTES:
                self._end_slice()
                if self._rows >= ROWS or self._bytes >= GROUP_BYTES:
                    self._end_group()

    def add_records(self, records: Sequence[Numbered], lines: Sequence[bytes]) -> None:
        """Add records that are known already, some hundred at a time, with their lines."""
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
            self._writer.is_open = False  # nothing more is written to a file that goes


def opened(file: BinaryIO, path: Path) -> Arrow:
    """An open Parquet file of ours. Raises ``StateCorruptedError`` for any other."""
    pa = arrow()
    try:
        found = arrow_parquet().ParquetFile(
            pa.PythonFile(file, mode="r"), page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise StateCorruptedError(f"this archive is damaged: {error}", path=path) from error
    if MARK not in (found.schema_arrow.metadata or {}):
        raise StateCorruptedError("this Parquet file holds no recording", path=path)
    return found


def check(file: BinaryIO, path: Path) -> None:
    """Read every column. Raises ``StateCorruptedError`` naming a file that is damaged."""
    pa = arrow()
    with file:
        found = opened(file, path)
        try:
            for group in range(found.num_row_groups):
                found.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise StateCorruptedError(f"this archive is damaged: {error}", path=path) from error


def is_ours(file: BinaryIO, path: Path) -> bool:
    """Whether a file is one of ours; the file is closed."""
    with file:
        try:
            opened(file, path)
        except StateCorruptedError:
            return False
        return True


def batches(
    file: BinaryIO, path: Path, query: Query | None, *, backwards: bool
) -> Iterator[list[bytes]]:
    """The lines of a Parquet file, a row group at a time; those that a query may mean."""
    pa = arrow()
    found = opened(file, path)
    groups = range(found.num_row_groups)
    sieve = None if query is None else PushdownFilter(query, found)
    try:
        for group in reversed(groups) if backwards else groups:
            if sieve is not None and not sieve.may_be_in(group):
                continue
            lines = _lines(found, group, sieve)
            if backwards:
                lines.reverse()
            for start in range(0, len(lines), _SLICE):
                yield lines[start : start + _SLICE]
    except pa.ArrowException as error:
        raise StateCorruptedError(f"this archive is damaged: {error}", path=path) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise StateCorruptedError(f"this archive is damaged: {error}", path=path) from error


def lines_between(file: BinaryIO, path: Path, first: int, last: int) -> Iterator[list[bytes]]:
    """The lines of the row groups that have numbers in this range."""
    with file:
        found = opened(file, path)
        for group in range(found.num_row_groups):
            low, high = _measured(found, group, "seq")
            if low is None or high is None or (low <= last and high >= first):
                yield _lines(found, group, None)


def count(file: BinaryIO, path: Path, query: Query) -> int:
    """How many messages a query means (its limit apart), from the columns alone."""
    pc = arrow_compute()
    with file:
        found = opened(file, path)
        sieve = PushdownFilter(query, found)
        total = 0
        for group in range(found.num_row_groups):
            if sieve.may_be_in(group):
                mask = sieve.mask(group)
                if mask is None:
                    ids = found.read_row_group(group, columns=["seq"], use_threads=False)
                    mask = pc.is_valid(ids.column(0))
                total += pc.sum(mask).as_py() or 0
        return total


def _lines(found: Arrow, group: int, sieve: PushdownFilter | None) -> list[bytes]:
    mask = None if sieve is None else sieve.mask(group)
    if mask is not None and not arrow_compute().any(mask).as_py():
        return []
    column = found.read_row_group(group, columns=[LINE], use_threads=False)
    if mask is not None:
        column = column.filter(mask)
    lines: list[bytes] = column.column(0).to_pylist()
    return lines


def _measured(found: Arrow, group: int, name: str) -> tuple[int | None, int | None]:
    """The smallest and largest value of a column in a row group; times in microseconds."""
    index = found.schema_arrow.get_field_index(name)
    statistics = found.metadata.row_group(group).column(index).statistics
    if statistics is None or not statistics.has_min_max:
        return None, None
    return statistics.min_raw, statistics.max_raw


class PushdownFilter:
    """What a query asks of columns: whole row groups are left out first, then rows."""

    def __init__(self, query: Query, found: Arrow) -> None:
        self._found = found
        self._since = None if query.since is None else _microseconds(query.first_stamp)
        self._until = None if query.until is None else _microseconds(query.end_stamp)
        self._equal = {
            name: str(value)
            for name, value in (
                ("speaker", query.speaker),
                ("role", query.role),
                ("type", query.message_type),
                ("context", query.context),
                ("chain_type", query.chain_type),
                ("ace_tier", query.ace_tier),
            )
            if value is not None
        }
        self._tags = spellings(query.tag) if query.tag is not None else None
        self._words = query.text.lower() if query.text is not None else None

    def may_be_in(self, group: int) -> bool:
        """Whether the smallest and largest values leave room for a row."""
        if self._since is not None or self._until is not None:
            low, high = _measured(self._found, group, "timestamp")
            if self._since is not None and high is not None and high < self._since:
                return False
            if self._until is not None and low is not None and low >= self._until:
                return False
        return True

    def mask(self, group: int) -> Arrow:
        """Which rows are meant; None when that is all of them."""
        pc, pa = arrow_compute(), arrow()
        names = [*self._equal]
        if self._since is not None or self._until is not None:
            names.append("timestamp")
        names += ["shl_tags"] if self._tags else []
        names += ["text"] if self._words is not None else []
        if not names:
            return None
        table = self._found.read_row_group(group, columns=names, use_threads=False)
        masks = [pc.equal(table[name], pa.scalar(value)) for name, value in self._equal.items()]
        if "timestamp" in names:
            times = table["timestamp"].cast(pa.int64())
            if self._since is not None:
                masks.append(pc.greater_equal(times, self._since))
            if self._until is not None:
                masks.append(pc.less(times, self._until))
        if self._tags:
            tags = self._tags
            masks.append(_where(table["shl_tags"], lambda of: not tags.isdisjoint(of)))
        if self._words is not None:
            words = self._words
            masks.append(_where(table["text"], lambda text: words in text.lower()))
        mask = masks[0]
        for other in masks[1:]:
            mask = pc.and_(mask, other)
        return pc.fill_null(mask, False)


def _where(column: Arrow, test: Callable[[Any], bool]) -> Arrow:
    pa = arrow()
    found = [value is not None and test(value) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(found, pa.bool_())])


def _microseconds(text: str | None) -> int:
    moment = instant(text or "")
    epoch = instant("1970-01-01T00:00:00Z")
    since = moment - epoch
    return (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds
