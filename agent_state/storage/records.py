r"""A group of changes as one line: what an intent and the write-ahead journal are made of.

A line is ``<crc32 hex> <json>\n``, the JSON ``{"changes": [...]}`` with each change in its
final form: new revisions, sequence numbers and times are in it, so that replaying it twice
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

import orjson

from agent_state.errors import Key, StateCorruptedError
from agent_state.protocols import Document, JsonObject, LogRecord


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


def encode_record(changes: Sequence[Done]) -> bytes:
    """One journal line."""
    # Bodies are canonical JSON already; joining bytes here keeps a save from being parsed twice.
    line = b'{"changes":[' + b",".join([_encode(change) for change in changes]) + b"]}"
    return b"%08x %b\n" % (crc32(line), line)


def decode_record(line: bytes) -> list[Done]:
    """The changes in a line without its newline. Raises ``StateCorruptedError``."""
    if len(line) < 10 or line[8:9] != b" " or line[:8] != b"%08x" % crc32(line[9:]):
        raise StateCorruptedError("the checksum of a journal record does not fit")
    try:
        return [_decode(change) for change in orjson.loads(line[9:])["changes"]]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
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
    if record.dedupe_id is not None:
        head["dedupe_id"] = record.dedupe_id
    return orjson.dumps(head)[:-1] + b',"body":' + record.body + b"}"


def _decode(change: JsonObject) -> Done:
    kind, key = change["kind"], tuple(change["key"])
    match change["op"]:
        case "put":
            document = Document(
                kind,
                key,
                orjson.dumps(change["body"], option=orjson.OPT_SORT_KEYS),
                change["revision"],
                change["saved_at"],
                change["schema"],
            )
            return PutDone(document, change.get("meta", {}))
        case "delete":
            return DeleteDone(kind, key, change["revision"])
        case "append":
            body = orjson.dumps(change["body"], option=orjson.OPT_SORT_KEYS)
            return AppendDone(kind, key, LogRecord(change["seq"], body, change.get("dedupe_id")))
        case other:
            raise StateCorruptedError(f"a journal record asks for {other!r}")
