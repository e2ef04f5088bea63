r"""A group of changes as one line: what an intent and the write-ahead journal are made of.

A line is ``<crc32 hex> <json>\n``, the JSON ``{"batch": <offset>, "changes": [...]}`` with each
change in its final form: new revisions, sequence numbers and times are in it, so that replaying it
twice changes nothing. ``batch`` is where in its segment the batch of the record begins: everything
before was durable when it was written. An intent has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from zlib import crc32

import orjson

from agent_state.errors import InvalidKeyError, Key, SerializationError, StateCorruptedError
from agent_state.protocols import Document, JsonObject, LogRecord
from agent_state.storage import envelope, logs, paths

_MAX_RECORD = logs.MAX_LINE - 64
_MAX_NUMBER = 2**63


@dataclass(frozen=True, slots=True)
class PutDone:
    """A document in its new version."""

    document: Document
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeleteDone:
    """A document that is no more; ``revision`` is the one that was removed."""

    kind: str
    key: Key
    revision: int


@dataclass(frozen=True, slots=True)
class AppendDone:
    """A record with its number in a log."""

    kind: str
    key: Key
    record: LogRecord


Done = PutDone | DeleteDone | AppendDone


def encode_changes(changes: Sequence[Done]) -> bytes:
    """A journal line but for its frame. Raises ``SerializationError`` when it is too large."""
    # Bodies are canonical JSON already; joining bytes here keeps a save from being parsed twice.
    payload = b'"changes":[' + b",".join([_encode(change) for change in changes]) + b"]}"
    if len(payload) > _MAX_RECORD:
        raise SerializationError(
            f"a group of {len(payload)} bytes is over the limit of {_MAX_RECORD}"
        )
    return payload


def frame(payload: bytes, batch: int | None = None) -> bytes:
    """The line of what ``encode_changes`` gave; ``batch``: the offset where its batch begins."""
    line = b"{" + payload if batch is None else b'{"batch":%d,%b' % (batch, payload)
    return b"%08x %b\n" % (crc32(line), line)


def encode_record(changes: Sequence[Done], batch: int | None = None) -> bytes:
    """One whole line. Raises ``SerializationError`` for one that is too large to be read."""
    return frame(encode_changes(changes), batch)


def decode_record(line: bytes) -> list[Done]:
    """The changes in a line without its newline. Raises ``StateCorruptedError``."""
    return decode_batched(line)[0]


def decode_batched(line: bytes) -> tuple[list[Done], int | None]:
    """The changes, and where the batch begins if that is said. Raises ``StateCorruptedError``."""
    if len(line) < 10 or line[8:9] != b" " or line[:8] != b"%08x" % crc32(line[9:]):
        raise StateCorruptedError("the checksum of a journal record does not fit")
    try:
        record = _only(dict, orjson.loads(line[9:]))
        batch = _offset(record["batch"]) if "batch" in record else None
        return [_decode(change) for change in record["changes"]], batch
    except (orjson.JSONDecodeError, KeyError, TypeError, InvalidKeyError) as error:
        raise StateCorruptedError(f"not a journal record: {error!r}") from error


def _encode(change: Done) -> bytes:
    if isinstance(change, PutDone):
        document = change.document
        head: JsonObject = {
            "key": document.key,
            "kind": document.kind,
            "op": "put",
            "revision": document.revision,
            "saved_at": document.saved_at,
            "schema": document.schema,
        }
        if change.meta:
            head["meta"] = change.meta
        return orjson.dumps(head)[:-1] + b',"body":' + document.body + b"}"
    if isinstance(change, DeleteDone):
        return orjson.dumps(
            {"key": change.key, "kind": change.kind, "op": "delete", "revision": change.revision}
        )
    record = change.record
    head = {"key": change.key, "kind": change.kind, "op": "append", "seq": record.seq}
    if record.dedupe_key is not None:
        head["dedupe_id"] = record.dedupe_key
    return orjson.dumps(head)[:-1] + b',"body":' + record.body + b"}"


def _decode(change: JsonObject) -> Done:
    kind, key = _only(str, change["kind"]), tuple(_only(list, change["key"]))
    paths.relative(kind, key, "")
    match change["op"]:
        case "put":
            document = Document(
                kind,
                key,
                _body(change["body"], envelope.RESERVED),
                _number(change["revision"]),
                _only(str, change["saved_at"]),
                _only(str, change["schema"]),
            )
            meta = _only(dict, change.get("meta", {}))
            return PutDone(document, {name: _only(str, value) for name, value in meta.items()})
        case "delete":
            return DeleteDone(kind, key, _number(change["revision"]))
        case "append":
            body = _body(change["body"], logs.RESERVED)
            dedupe_key = change.get("dedupe_id")
            if dedupe_key is not None:
                _only(str, dedupe_key)
            return AppendDone(kind, key, LogRecord(_number(change["seq"]), body, dedupe_key))
        case other:
            raise StateCorruptedError(f"a journal record asks for {other!r:.80}")


T = TypeVar("T")


def _only(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return value


def _number(value: Any) -> int:
    if not 0 < _only(int, value) <= _MAX_NUMBER:
        raise TypeError(f"{value} is no revision or number")
    return int(value)


def _offset(value: Any) -> int:
    if not 0 <= _only(int, value) <= _MAX_NUMBER:
        raise TypeError(f"{value} is no offset")
    return int(value)


def _body(value: Any, reserved: frozenset[str]) -> bytes:
    if not reserved.isdisjoint(_only(dict, value)):
        raise TypeError("a body uses a reserved key")
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
