"""Messages as typed columns: the schema of our Parquet files, and lines turned into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from agent_state.errors import UnreadableMessageError
from agent_state_integrations.recorder.past.optional import arrow

if TYPE_CHECKING:
    from agent_state.protocols import JsonObject
    from agent_state_integrations.recorder.past.parsing import Parser

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


def batch_of(lines: Sequence[bytes], parser: Parser) -> Arrow:
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
