r"""The changes of a commit in their final form, how they are resolved, and their bytes.

``resolve`` works out what a commit will do before anything is touched, the same for every store.

A group of resolved changes is one line of a redo record or of the write-ahead log. The line is
``<crc32 hex> <json>\n``, the JSON ``{"batch": <offset>, "changes": [...]}`` with each change in its
final form: new revisions, sequence numbers and times are in it, so that replaying it twice changes
nothing. ``batch`` is where in its segment the batch of the record begins: everything before was
durable when it was written. A redo record has none; it has ``checked``, the documents that the
group relied on and did not change, if there are any. A line of the write-ahead log may have a patch
in the place of a put, see ``patches``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from zlib import crc32

import orjson

from agent_state.clock import Clock, stamp
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
    Check,
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

_MAX_RECORD = logs.MAX_LINE - 64
_MAX_HEAD = 64 * 1024
"""More than anything of a change but its body takes, whatever its key."""
_MAX_NUMBER = 2**63

T = TypeVar("T")
P = TypeVar("P", bound=Hashable)
P_contra = TypeVar("P_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class ResolvedPut:
    """A document in its new version."""

    document: Document
    meta: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    """``version_name`` of the version that it replaces; None if an old record names none."""


@dataclass(frozen=True, slots=True)
class ResolvedDelete:
    """A removed document; ``revision`` is the one that was removed."""

    kind: str
    key: Key
    revision: int
    base: str | None = None
    """As in ``ResolvedPut``."""


@dataclass(frozen=True, slots=True)
class ResolvedAppend:
    """A record with its number in a log."""

    kind: str
    key: Key
    record: LogRecord
    base: str | None = None
    """``logs.end_name`` of the log before it; None if it is not known."""


ResolvedChange = ResolvedPut | ResolvedDelete | ResolvedAppend

Edit = tuple[int, int, str]
"""An offset in a body, how many bytes there go, and the text that takes their place."""


@dataclass(frozen=True, slots=True)
class BodyPatch:
    """A put as the edits of an earlier version. One that was read has no body in ``document``."""

    document: Document
    meta: Mapping[str, str]
    base: str | None
    of: tuple[int, int]
    """The revision of the version that is edited, and the CRC-32 of its body."""
    crc: int
    """The CRC-32 of the body that the edits make."""
    edits: Sequence[Edit]


@dataclass(frozen=True, slots=True)
class Superseded:
    """A version in a journal that a later record of the same segment has replaced."""

    kind: str
    key: Key
    name: str
    """Its ``version_name``."""
    base: str | None


def id_of(change: ResolvedChange | BodyPatch | Superseded) -> DocumentId:
    """The kind and key of a change."""
    if isinstance(change, ResolvedPut | BodyPatch):
        return change.document.kind, change.document.key
    return change.kind, change.key


def version_name(document: Document | None) -> str:
    """The name of a version, by which a record knows its file; empty for no document."""
    if document is None:
        return ""
    name = f"{document.revision}@{document.saved_at}"
    return f"{name}#{crc32(document.body):08x}" if document.edited else name


def notice_of(change: ResolvedChange) -> Notice | None:
    """The notice for watchers about a changed document; None for a log."""
    if isinstance(change, ResolvedPut):
        document = change.document
        return Notice(document.kind, document.key, document.revision)
    if isinstance(change, ResolvedDelete):
        return Notice(change.kind, change.key, None)
    return None


# -- resolving -------------------------------------------------------------------------------


class StoredVersion(Protocol):
    """A stored document with its further reserved keys."""

    @property
    def document(self) -> Document: ...
    @property
    def meta(self) -> Mapping[str, str]: ...


class CommitView(Protocol[P_contra]):
    """The documents and logs that a store holds before a commit, by its own kind of place."""

    def current(self, place: P_contra) -> tuple[StoredVersion | None, int]:
        """The stored document, if there is one, and the lowest revision of a new version.

        A new revision is above the stored one anyway.
        """

    def last_seq(self, place: P_contra) -> int:
        """The last sequence number of a log; 0 for none."""

    def end_name(self, place: P_contra) -> str | None:
        """The name of the last record of a log; None if it has none, or it is not known."""

    def find(self, place: P_contra, dedupe_key: str) -> int | None:
        """The sequence number of the record with this dedupe key."""


@dataclass(slots=True)
class Resolution(Generic[P]):
    """The outcome of resolving: a number for each change, and the changes to make.

    ``places`` has the place of each of ``changes``.
    """

    view: CommitView[P]
    now: str
    numbers: list[int] = field(default_factory=list)
    changes: list[ResolvedChange] = field(default_factory=list)
    places: list[P] = field(default_factory=list)
    _versions: dict[P, tuple[StoredVersion | None, int]] = field(default_factory=dict)
    _ends: dict[P, int] = field(default_factory=dict)
    _ids: dict[tuple[P, str], int] = field(default_factory=dict)

    def add_document_change(self, change: Put | Delete | Check, place: P) -> None:
        """Resolve a put, a delete or a check. Raises as ``resolve``."""
        versions = self._versions
        version, lowest = versions.get(place) or self.view.current(place)
        document = version.document if version is not None else None
        actual = document.revision if document is not None else 0
        if change.expected is not None and change.expected != actual:
            raise RevisionConflictError(
                expected=change.expected, actual=actual, kind=change.kind, key=change.key
            )
        if isinstance(change, Check):
            self.numbers.append(actual)
            return
        if isinstance(change, Delete):
            self.numbers.append(actual)
            if document is not None:
                versions[place] = None, actual + 1
                base = version_name(document)
                self.changes.append(ResolvedDelete(change.kind, change.key, actual, base))
                self.places.append(place)
            return
        if version is not None and document is not None:
            if document.schema != change.schema:
                _check_schema(change, document)
            elif (
                document.body == change.body and not document.edited and version.meta == change.meta
            ):
                self.numbers.append(actual)
                return
        revision = max(actual + 1, lowest)
        new = Document(change.kind, change.key, change.body, revision, self.now, change.schema)
        put = ResolvedPut(new, dict(change.meta) if change.meta else {}, version_name(document))
        versions[place] = put, 1
        self.numbers.append(revision)
        self.changes.append(put)
        self.places.append(place)

    def add_append(self, change: Append, place: P) -> None:
        """Resolve an append. Raises ``RevisionConflictError`` for another number."""
        dedupe_key = change.dedupe_key
        if dedupe_key is not None:
            known = self._ids.get((place, dedupe_key)) or self.view.find(place, dedupe_key)
            if known is not None:
                self.numbers.append(known)
                return
        is_first = place not in self._ends
        seq = (self.view.last_seq(place) if is_first else self._ends[place]) + 1
        if change.expected not in (None, seq):
            raise RevisionConflictError(
                expected=change.expected or 0, actual=seq, kind=change.kind, key=change.key
            )
        self._ends[place] = seq
        if dedupe_key is not None:
            self._ids[place, dedupe_key] = seq
        self.numbers.append(seq)
        record = LogRecord(seq, change.body, dedupe_key)
        base = self.view.end_name(place) if is_first else None
        self.changes.append(ResolvedAppend(change.kind, change.key, record, base))
        self.places.append(place)


def resolve(
    changes: Sequence[Change], places: Sequence[P], view: CommitView[P], clock: Clock
) -> Resolution[P]:
    """Work out what a commit will do. A later change of a document builds on an earlier one.

    ``places`` has the place of each change, which the view is asked for. Raises
    ``RevisionConflictError``, and ``SchemaTooNewError`` for a put over a newer schema.
    """
    resolution = Resolution(view, stamp(clock.now()))
    for change, place in zip(changes, places, strict=True):
        if isinstance(change, Append):
            resolution.add_append(change, place)
        else:
            resolution.add_document_change(change, place)
    return resolution


def _check_schema(change: Put, document: Document) -> None:
    """Refuse to replace a document that a newer version of the library has written."""
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


# -- changes that are in no file yet ---------------------------------------------------------


class Overlay:
    """Changes that no file has yet, over the documents and logs that the files have."""

    def __init__(self) -> None:
        self.documents: dict[DocumentId, ResolvedPut | ResolvedDelete] = {}
        """The last change of each document; its base is the first one's: what its file has."""
        self.records: dict[DocumentId, list[LogRecord]] = {}
        """The records of each log, in order."""
        self.bases: dict[DocumentId, dict[int, str]] = {}
        """By log and number, the ``base`` of the appends that have one."""
        self._deleted: dict[DocumentId, int] = {}

    def add(self, change: ResolvedChange) -> None:
        """Add a change; adding it twice, or an older one of a document, changes nothing."""
        place = id_of(change)
        if isinstance(change, ResolvedAppend):
            records = self.records.setdefault(place, [])
            if change.base is not None:
                self.bases.setdefault(place, {})[change.record.seq] = change.base
            if not records or records[-1].seq < change.record.seq:
                records.append(change.record)
                return
            at = bisect_left(records, change.record.seq, key=lambda record: record.seq)
            if records[at].seq != change.record.seq:
                records.insert(at, change.record)
            return
        last = self.documents.get(place)
        if last is not None and last.base != change.base:
            if isinstance(change, ResolvedPut):
                change = ResolvedPut(change.document, change.meta, last.base)
            else:
                change = replace(change, base=last.base)
        if isinstance(change, ResolvedDelete):
            self.documents[place] = change
            self._deleted[place] = max(change.revision, self._deleted.get(place, 0))
        # After a failed batch a revision is never given twice, so the higher one is later.
        elif not isinstance(last, ResolvedPut) or (
            last.document.revision < change.document.revision
        ):
            self.documents[place] = change

    def add_record(self, changes: Iterable[ResolvedChange | Superseded]) -> None:
        """Add the changes of a journal's record."""
        for change in changes:
            if not isinstance(change, Superseded):
                self.add(change)

    def remove(self, place: DocumentId) -> None:
        """The document's file is as new as its change."""
        del self.documents[place]
        self._deleted.pop(place, None)

    def remove_records(self, place: DocumentId, count: int) -> None:
        """The log's file has so many of the first records."""
        records = self.records[place]
        bases = self.bases.get(place, {})
        for record in records[:count] if bases else ():
            bases.pop(record.seq, None)
        del records[:count]
        if not records:
            del self.records[place]
            self.bases.pop(place, None)

    def is_newer(self, change: ResolvedPut, stored: Document | None) -> bool:
        """Whether a put is newer than the stored document.

        A document that was deleted and created again counts its revisions from 1 again.
        """
        if stored is None or stored.revision < change.document.revision:
            return True
        return stored.revision <= self._deleted.get((stored.kind, stored.key), 0)

    def over(self, place: DocumentId, stored: Document | None) -> Document | None:
        """The document, from the change or from its file, whichever is newer."""
        change = self.documents.get(place)
        if isinstance(change, ResolvedPut):
            return change.document if self.is_newer(change, stored) else stored
        if change is not None and stored is not None and stored.revision <= change.revision:
            return None
        return stored

    def logs_over(self, found: Iterable[Key], kind: str, prefix: Key) -> list[Key]:
        """The keys of logs that files were found to have, and of those that have no file yet."""
        more = (key for k, key in self.records if k == kind and paths.is_below(key, prefix))
        return sorted({*found, *more})


def keys_over(
    changes: Mapping[DocumentId, ResolvedPut | ResolvedDelete],
    found: Iterable[Key],
    kind: str,
    prefix: Key,
) -> list[Key]:
    """The keys of documents that files were found to have, updated with the changes."""
    keys = set(found)
    for (other, key), change in changes.items():
        if other == kind and paths.is_below(key, prefix):
            if isinstance(change, ResolvedPut):
                keys.add(key)
            else:
                keys.discard(key)
    return sorted(keys)


async def read_over(
    waiting: Sequence[LogRecord],
    read: Callable[..., AsyncIterator[LogRecord]],
    after: int,
    last: int | None,
) -> AsyncIterator[LogRecord]:
    """The records of a log's file, with those that it does not have yet in their places.

    ``read(after=…, last=…)`` reads the file, as ``StateStore.read_log``. Lines of others that have
    taken the number of a waiting record come behind, as in the file after the next write-back.
    """
    if last is not None and waiting:
        after, last = max(after, waiting[-1].seq - last), None
    behind: list[LogRecord] = []
    async for record in read(after=after, last=last):
        if waiting and record.seq >= waiting[0].seq:
            behind.append(record)
            continue
        after = record.seq
        yield record
    known = {record.seq: record for record in waiting}
    behind = [each for each in behind if not logs.same(each, known.get(each.seq))]
    for record in waiting:
        if record.seq > after:
            after = record.seq
            yield record
    for record in behind:
        after = max(record.seq, after + 1)
        yield replace(record, seq=after)


# -- bytes -----------------------------------------------------------------------------------


def encode_changes(
    changes: Sequence[ResolvedChange | BodyPatch], checked: Sequence[DocumentId] = ()
) -> bytes:
    """A line without its frame. Raises ``SerializationError`` when it is too large."""
    # Bodies are canonical JSON already; joining bytes here keeps a save from being parsed twice.
    payload = b'"changes":[' + b",".join(map(_encode, changes)) + b"]}"
    if checked:
        payload = b'"checked":%b,%b' % (orjson.dumps(checked), payload)
    if len(payload) > _MAX_RECORD:
        raise SerializationError(
            f"a group of {len(payload)} bytes is over the limit of {_MAX_RECORD}"
        )
    return payload


def check_group(changes: Sequence[ResolvedChange]) -> None:
    """Raises ``SerializationError`` when a group is too large for a line."""
    size = 0
    for change in changes:
        if isinstance(change, ResolvedPut):
            size += len(change.document.body)
        elif isinstance(change, ResolvedAppend):
            size += len(change.record.body)
    if size + _MAX_HEAD * len(changes) > _MAX_RECORD // 2:
        encode_changes(changes)


def frame(payload: bytes, batch: int | None = None) -> bytes:
    """A payload of ``encode_changes`` as a line; ``batch``: the offset where its batch begins."""
    line = b"{" + payload if batch is None else b'{"batch":%d,%b' % (batch, payload)
    return b"%08x %b\n" % (crc32(line), line)


class Record(NamedTuple):
    """The contents of a line: its changes, the offset of its batch, the documents it relied on."""

    changes: list[ResolvedChange]
    batch: int | None = None
    checked: Sequence[DocumentId] = ()


class JournalRecord(NamedTuple):
    """The contents of a line of the write-ahead log, as ``Record``; some of it may be patches."""

    changes: list[ResolvedChange | BodyPatch]
    batch: int | None = None
    checked: Sequence[DocumentId] = ()


def decode_record(line: bytes) -> Record:
    """The contents of a line without its newline. Raises ``StateCorruptedError``."""
    decoded, batch, checked = decode_journal_record(line)
    changes = [change for change in decoded if not isinstance(change, BodyPatch)]
    if len(changes) != len(decoded):
        raise StateCorruptedError("a record builds on one before it, and stands alone")
    return Record(changes, batch, checked)


def decode_journal_record(line: bytes) -> JournalRecord:
    """The contents of a line of a segment, as ``decode_record``."""
    if len(line) < 10 or line[8:9] != b" " or line[:8] != b"%08x" % crc32(line[9:]):
        raise StateCorruptedError("the checksum of a journal record does not fit")
    try:
        record = _only(dict, orjson.loads(line[9:]))
        batch = _offset(record["batch"]) if "batch" in record else None
        checked = [*map(_document_id, record.get("checked", ()))]
        changes = [_decode(change) for change in record["changes"]]
        return JournalRecord(changes, batch, checked)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, InvalidKeyError) as error:
        raise StateCorruptedError(f"not a journal record: {error!r}") from error


def _encode(change: ResolvedChange | BodyPatch) -> bytes:
    if isinstance(change, ResolvedPut | BodyPatch):
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
        if change.base is not None:
            head["base"] = change.base
        if isinstance(change, BodyPatch):
            head |= {"op": "patch", "of": change.of, "crc": change.crc, "edits": change.edits}
            return orjson.dumps(head)
        return orjson.dumps(head)[:-1] + b',"body":' + document.body + b"}"
    if isinstance(change, ResolvedDelete):
        head = {"key": change.key, "kind": change.kind, "op": "delete", "revision": change.revision}
        if change.base is not None:
            head["base"] = change.base
        return orjson.dumps(head)
    record = change.record
    head = {"key": change.key, "kind": change.kind, "op": "append", "seq": record.seq}
    if record.dedupe_key is not None:
        head["dedupe_id"] = record.dedupe_key
    if change.base is not None:
        head["base"] = change.base
    return orjson.dumps(head)[:-1] + b',"body":' + record.body + b"}"


def _decode(change: JsonObject) -> ResolvedChange | BodyPatch:
    kind, key = _document_id((change["kind"], change["key"]))
    base = change.get("base")
    if base is not None:
        _only(str, base)
    match change["op"]:
        case "put" | "patch" as op:
            document = Document(
                kind,
                key,
                _body(change["body"], RESERVED) if op == "put" else b"",
                _number(change["revision"]),
                _only(str, change["saved_at"]),
                _only(str, change["schema"]),
            )
            meta = _only(dict, change.get("meta", {}))
            meta = {name: _only(str, value) for name, value in meta.items()}
            if op == "put":
                return ResolvedPut(document, meta, base)
            revision, crc = change["of"]
            edits = [_edit(*edit) for edit in change["edits"]]
            of = (_number(revision), _offset(crc))
            return BodyPatch(document, meta, base, of, _offset(change["crc"]), edits)
        case "delete":
            return ResolvedDelete(kind, key, _number(change["revision"]), base)
        case "append":
            body = _body(change["body"], logs.RESERVED)
            dedupe_key = change.get("dedupe_id")
            if dedupe_key is not None:
                _only(str, dedupe_key)
            record = LogRecord(_number(change["seq"]), body, dedupe_key)
            return ResolvedAppend(kind, key, record, base)
        case other:
            raise StateCorruptedError(f"a journal record asks for {other!r:.80}")


def _document_id(value: Sequence[Any]) -> DocumentId:
    kind, key = value
    found = _only(str, kind), tuple(_only(list, key))
    paths.relative(*found, "")
    return found


def _only(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return value


def _number(value: Any) -> int:
    if not 0 < _only(int, value) <= _MAX_NUMBER:
        raise TypeError(f"{value} is not a revision or number")
    return int(value)


def _edit(at: Any, removed: Any, added: Any) -> Edit:
    return _offset(at), _offset(removed), _only(str, added)


def _offset(value: Any) -> int:
    if not 0 <= _only(int, value) <= _MAX_NUMBER:
        raise TypeError(f"{value} is not an offset")
    return int(value)


def canonical_body(data: bytes) -> bytes:
    """The body of a document, as it must be. Raises ``StateCorruptedError`` for no body."""
    try:
        return _body(orjson.loads(data), RESERVED)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, TypeError) as error:
        raise StateCorruptedError(f"not a document: {error!r:.200}") from error


def _body(value: Any, reserved: frozenset[str]) -> bytes:
    if not reserved.isdisjoint(_only(dict, value)):
        raise TypeError("a body uses a reserved key")
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
