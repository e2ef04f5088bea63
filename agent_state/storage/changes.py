"""What a commit will do, worked out before anything is touched; the same for every store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from zlib import crc32

import orjson

from agent_state.errors import (
    InvalidKeyError,
    Key,
    RevisionConflictError,
    SchemaTooNewError,
    SerializationError,
    StateCorruptedError,
)
from agent_state.migrations import parse_schema
from agent_state.protocols import (
    Append,
    Change,
    Delete,
    Document,
    DocumentId,
    JsonObject,
    LogRecord,
    Notice,
    Put,
)
from agent_state.storage import logs, paths
from agent_state.storage.document import RESERVED


class StoredVersion(Protocol):
    """A stored document with its further reserved keys."""

    @property
    def document(self) -> Document: ...
    @property
    def meta(self) -> Mapping[str, str]: ...


class Base(Protocol):
    """What a store holds before the commit."""

    def current(self, kind: str, key: Key) -> StoredVersion | None:
        """The stored document."""

    def floor(self, kind: str, key: Key) -> int:
        """The highest revision that may not be given again; 0 when the stored one says it all."""

    def last_seq(self, kind: str, key: Key) -> int:
        """The last sequence number of a log; 0 for none."""

    def find(self, kind: str, key: Key, dedupe_key: str) -> int | None:
        """The number of the record with this id."""


def plan(changes: Sequence[Change], base: Base, now: str) -> tuple[list[int], list[ResolvedChange]]:
    """The number to return for each change, and what is to be done, in its final form.

    A later change of the same document builds on the earlier one. Raises
    ``RevisionConflictError``, and ``SchemaTooNewError`` for a put over a newer schema.
    """
    numbers: list[int] = []
    done: list[ResolvedChange] = []
    versions: dict[tuple[str, Key], StoredVersion | None] = {}
    floors: dict[tuple[str, Key], int] = {}
    ends: dict[tuple[str, Key], int] = {}
    ids: dict[tuple[str, Key, str], int] = {}
    for change in changes:
        place = (change.kind, change.key)
        if isinstance(change, Append):
            if change.dedupe_key is not None:
                known = ids.get((*place, change.dedupe_key)) or base.find(*place, change.dedupe_key)
                if known is not None:
                    numbers.append(known)
                    continue
            seq = (ends[place] if place in ends else base.last_seq(*place)) + 1
            ends[place] = seq
            if change.dedupe_key is not None:
                ids[*place, change.dedupe_key] = seq
            numbers.append(seq)
            done.append(ResolvedAppend(*place, LogRecord(seq, change.body, change.dedupe_key)))
            continue
        version = versions[place] if place in versions else base.current(*place)
        document = version.document if version is not None else None
        actual = document.revision if document is not None else 0
        if change.expected is not None and change.expected != actual:
            raise RevisionConflictError(
                expected=change.expected, actual=actual, kind=change.kind, key=change.key
            )
        if isinstance(change, Delete):
            numbers.append(actual)
            if document is not None:
                done.append(ResolvedDelete(*place, actual))
                versions[place], floors[place] = None, actual
            continue
        if document is not None and document.schema != change.schema:
            _refuse_older(change, document)
        if version is not None and _unchanged(change, version):
            numbers.append(actual)
            continue
        floor = max(actual, floors.get(place, 0), base.floor(*place))
        put = ResolvedPut(
            Document(change.kind, change.key, change.body, floor + 1, now, change.schema),
            dict(change.meta) if change.meta else {},
        )
        numbers.append(floor + 1)
        done.append(put)
        versions[place] = put
    return numbers, done


def _refuse_older(change: Put, document: Document) -> None:
    """What a newer version of the library has written is not for us to replace."""
    if not document.schema:
        return
    ours, number = parse_schema(change.schema)
    theirs, newer = parse_schema(document.schema)
    if ours == theirs and newer > number:
        raise SchemaTooNewError(
            f"{document.schema} is stored, and would be replaced by {change.schema}",
            kind=change.kind,
            key=change.key,
        )


def _unchanged(change: Put, version: StoredVersion) -> bool:
    document = version.document
    return (
        document.body == change.body
        and document.schema == change.schema
        and not document.edited
        and version.meta == change.meta
    )


def notice_of(change: ResolvedChange) -> Notice | None:
    """What watchers are told about a change of a document; nothing about logs."""
    if isinstance(change, ResolvedPut):
        document = change.document
        return Notice(document.kind, document.key, document.revision)
    if isinstance(change, ResolvedDelete):
        return Notice(change.kind, change.key, None)
    return None


_MAX_RECORD = logs.MAX_LINE - 64
_MAX_NUMBER = 2**63


@dataclass(frozen=True, slots=True)
class ResolvedPut:
    """A document in its new version."""

    document: Document
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ResolvedDelete:
    """A document that is no more; ``revision`` is the one that was removed."""

    kind: str
    key: Key
    revision: int


@dataclass(frozen=True, slots=True)
class ResolvedAppend:
    """A record with its number in a log."""

    kind: str
    key: Key
    record: LogRecord


ResolvedChange = ResolvedPut | ResolvedDelete | ResolvedAppend


def id_of(change: ResolvedChange) -> DocumentId:
    """The kind and key of a change."""
    if isinstance(change, ResolvedPut):
        return change.document.kind, change.document.key
    return change.kind, change.key


def encode_changes(changes: Sequence[ResolvedChange]) -> bytes:
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


def encode_record(changes: Sequence[ResolvedChange], batch: int | None = None) -> bytes:
    """One whole line. Raises ``SerializationError`` for one that is too large to be read."""
    return frame(encode_changes(changes), batch)


def decode_record(line: bytes) -> list[ResolvedChange]:
    """The changes in a line without its newline. Raises ``StateCorruptedError``."""
    return decode_batched(line)[0]


def decode_batched(line: bytes) -> tuple[list[ResolvedChange], int | None]:
    """The changes, and where the batch begins if that is said. Raises ``StateCorruptedError``."""
    if len(line) < 10 or line[8:9] != b" " or line[:8] != b"%08x" % crc32(line[9:]):
        raise StateCorruptedError("the checksum of a journal record does not fit")
    try:
        record = _only(dict, orjson.loads(line[9:]))
        batch = _offset(record["batch"]) if "batch" in record else None
        return [_decode(change) for change in record["changes"]], batch
    except (orjson.JSONDecodeError, KeyError, TypeError, InvalidKeyError) as error:
        raise StateCorruptedError(f"not a journal record: {error!r}") from error


def _encode(change: ResolvedChange) -> bytes:
    if isinstance(change, ResolvedPut):
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
    if isinstance(change, ResolvedDelete):
        return orjson.dumps(
            {"key": change.key, "kind": change.kind, "op": "delete", "revision": change.revision}
        )
    record = change.record
    head = {"key": change.key, "kind": change.kind, "op": "append", "seq": record.seq}
    if record.dedupe_key is not None:
        head["dedupe_id"] = record.dedupe_key
    return orjson.dumps(head)[:-1] + b',"body":' + record.body + b"}"


def _decode(change: JsonObject) -> ResolvedChange:
    kind, key = _only(str, change["kind"]), tuple(_only(list, change["key"]))
    paths.relative(kind, key, "")
    match change["op"]:
        case "put":
            document = Document(
                kind,
                key,
                _body(change["body"], RESERVED),
                _number(change["revision"]),
                _only(str, change["saved_at"]),
                _only(str, change["schema"]),
            )
            meta = _only(dict, change.get("meta", {}))
            return ResolvedPut(document, {name: _only(str, value) for name, value in meta.items()})
        case "delete":
            return ResolvedDelete(kind, key, _number(change["revision"]))
        case "append":
            body = _body(change["body"], logs.RESERVED)
            dedupe_key = change.get("dedupe_id")
            if dedupe_key is not None:
                _only(str, dedupe_key)
            return ResolvedAppend(kind, key, LogRecord(_number(change["seq"]), body, dedupe_key))
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
