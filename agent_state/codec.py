"""States to changes, and documents to states: check, serialise, migrate, build the model.

One place decides what a document of a kind may hold, so that a save and a load never disagree.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from agent_state import conversation_log
from agent_state.collection import COLLECTIONS
from agent_state.conversation_log import OFFSET, AgentPut
from agent_state.errors import (
    EncryptionKeyError,
    Key,
    SchemaTooNewError,
    SerializationError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.migrations import VERSIONS, migrate, parse_schema
from agent_state.models import ARCHIVE, SCHEMAS, OpenModel
from agent_state.protocols import (
    Append,
    Change,
    Check,
    Delete,
    Document,
    JsonObject,
    Put,
    StateSerializer,
    StateValidator,
)
from agent_state.serializers import (
    ApartJson,
    CheckedList,
    JSONStateSerializer,
    count_lines,
    dumps_apart,
    parse_object,
)
from agent_state.storage import fileio, logs
from agent_state.storage.document import (
    REFUSED,
    SEALED,
    SMALL_BODY,
    check_reserved,
    check_size,
)
from agent_state.storage.lru_cache import LRUCache

State = Mapping[str, Any] | OpenModel
"""A state as a caller gives it."""

_ID_FIELDS = {
    "agents": "agent_id",
    "tasks": "task_id",
    "sleep": "agent_id",
    "mail": "message_id",
    "task_queues": "agent_id",
    "mailboxes": "agent_id",
}
"""The field that repeats the last segment of a document's key."""

_SCHEMAS_OF = {kind: frozenset({kind}) for kind in ("agents", "sleep", "system")} | {
    kind: frozenset({kind, collection.schema, collection.item_schema})
    for kind, collection in COLLECTIONS.items()
}
"""The schemas that documents of these kinds may have. Other kinds may have any schema."""

PACKED = "_gzip"
"""The field of an archived record that holds its large fields: an object, gzip, base64."""
PACKED_OVER = 64 * 1024
"""Archived records that are larger, in bytes, are packed."""
_LARGE_FIELD = 1024
_REFUSED_IN_RECORDS = logs.RESERVED | {SEALED, PACKED}
_MAX_NAMED_FIELDS = 20


class ModelStateValidator:
    """The default validator: the pydantic model of a schema.

    A schema without a model may hold anything. ``models`` adds to the built-in models, or
    replaces them.
    """

    def __init__(self, models: Mapping[str, type[BaseModel]] | None = None) -> None:
        self._models = dict(models or {})

    def validate(self, kind: str, state: Mapping[str, Any]) -> BaseModel | None:
        """The model built from the state; None for a schema without a model.

        Raises ``StateValidationError`` that names each invalid field.
        """
        model = self._models.get(kind) or SCHEMAS.get(kind)
        if model is None:
            return None
        try:
            return model.model_validate(state if isinstance(state, dict) else dict(state))
        except ValidationError as error:
            raise StateValidationError(format_validation_error(error), kind=kind) from error


class StoredState(NamedTuple):
    """A state as it was read, with the revision and times of its document."""

    key: Key
    state: OpenModel
    revision: int
    saved_at: str
    schema: str
    edited: bool
    """A person, or another program, wrote this version."""


class Codec:
    """Converts between states and documents, with one serializer and one validator."""

    def __init__(
        self, serializer: StateSerializer | None = None, validator: StateValidator | None = None
    ) -> None:
        self.serializer: StateSerializer = serializer or JSONStateSerializer()
        self.validator: StateValidator = validator or ModelStateValidator()
        self._checked: LRUCache[str, CheckedList] = LRUCache(
            conversation_log.CACHED, conversation_log.CACHED_BYTES
        )
        """The conversation of each agent as it was saved last."""

    # -- states to changes -----------------------------------------------------------------

    def plain(self, state: State) -> JsonObject:
        """The state as a dict; a model is dumped as it is stored.

        Raises ``StateValidationError`` for anything but a mapping or a model.
        """
        if isinstance(state, OpenModel):
            # The validator reports a field of the wrong type; pydantic need not warn about it.
            return state.model_dump(warnings=False)
        if not isinstance(state, Mapping):
            raise StateValidationError(
                f"a state is a mapping or a model, not {type(state).__name__}"
            )
        return state if type(state) is dict else dict(state)

    def put(
        self,
        kind: str,
        key: Key,
        state: State,
        expected: int | None,
        *,
        schema: str | None = None,
        append_only: bool = False,
    ) -> Put:
        """The change that saves a state. ``schema``: its schema's name; None for the kind's own.

        ``append_only``: nobody changes a message of an agent's conversation in place. Raises
        ``StateValidationError`` or ``SerializationError``.
        """
        body = state if type(state) is dict else self.plain(state)
        item, schema = schema is not None, schema or kind
        if schema not in _SCHEMAS_OF.get(kind, (schema,)):
            raise StateValidationError(f"{schema} is not a schema of {kind}", kind=kind, key=key)
        try:
            if not REFUSED.isdisjoint(body):
                check_reserved(body, kind, key)
            start = conversation_log.offset_of(body) if kind == conversation_log.KIND else 0
            apart = self._apart(kind, key, body, start, append_only)
            if apart is not None:
                data = b""
                check_size(apart.head, kind, key)
            else:
                data = self.serializer.dumps(body)
            if apart is None and len(data) > SMALL_BODY:
                check_size(data, kind, key, count_lines(body) if self.splits else None)
            # An item of a collection may have its id only in its key, as when it is loaded.
            named = _with_id(schema, body, key) if item else body
            self.validator.validate(schema, named)
        except (SerializationError, StateValidationError) as error:
            error.kind, error.key = kind, key
            raise
        meta = {"_session_id": key[0]} if kind == "agents" else {}
        stated = f"{schema}/{VERSIONS.get(schema, 1)}"
        if apart is not None:
            return AgentPut(kind, key, data, stated, expected, meta, apart, start)
        return Put(kind, key, data, stated, expected, meta)

    @property
    def splits(self) -> bool:
        """Whether long conversations are logs; with a serializer of one's own they are not."""
        return type(self.serializer).dumps is JSONStateSerializer.dumps

    def _apart(
        self, kind: str, key: Key, body: JsonObject, start: int, append_only: bool
    ) -> ApartJson | None:
        """An agent with a long conversation, in two parts; None for all else. Raises as ``put``."""
        context = body.get("context") if kind == conversation_log.KIND and len(key) == 1 else None
        history = context.get("conversation_history") if type(context) is dict else None
        if start and (type(history) is not list or not self.splits):
            why = f"context.{OFFSET}: {start} turns are said to be in a log, which is not possible"
            raise StateValidationError(why)
        if type(context) is not dict or type(history) is not list or not self.splits:
            return None
        if not start and len(history) < conversation_log.MIN_MESSAGES:
            return None
        if OFFSET in context:
            context = {name: value for name, value in context.items() if name != OFFSET}
            body = {**body, "context": context}
        apart = dumps_apart(
            body,
            "context",
            "conversation_history",
            0 if start else conversation_log.MIN_BYTES,
            self._checked.get(key[0], CheckedList()),
            append_only=append_only,
        )
        if apart is not None:
            checked = CheckedList(apart.items, history[:] if append_only else ())
            self._checked.set(key[0], checked, apart.items.size)
        return apart

    def append(
        self, kind: str, key: Key, record: Mapping[str, Any], dedupe_key: str | None
    ) -> Append:
        """The change that appends a record to a log. Raises as ``put``."""
        body = record if type(record) is dict else self.plain(record)
        if not _REFUSED_IN_RECORDS.isdisjoint(body):
            names = ", ".join(sorted(_REFUSED_IN_RECORDS.intersection(body)))
            raise StateValidationError(f"reserved for the library: {names}", kind=kind, key=key)
        try:
            data = self.serializer.dumps(body)
            logs.check_record(data, dedupe_key)
        except SerializationError as error:
            error.kind, error.key = kind, key
            raise
        return Append(kind, key, data, dedupe_key)

    def append_json(self, kind: str, key: Key, body: bytes, dedupe_key: str | None) -> Append:
        """``append`` for a record in canonical JSON, which is not parsed and written again.

        A serializer of one's own is given the record all the same.
        """
        if type(self.serializer).dumps is not JSONStateSerializer.dumps:
            return self.append(kind, key, parse_object(body), dedupe_key)
        try:
            logs.check_record(body, dedupe_key)
        except SerializationError as error:
            error.kind, error.key = kind, key
            raise
        return Append(kind, key, body, dedupe_key)

    def pack(self, change: Append, hidden: JsonObject) -> Append:
        """The change with the large fields of its record compressed, if that makes it smaller.

        The small ones, such as ids, status and times, stay for people and for git to read.
        ``hidden``: fields of the record that have a name of the library's own in a log.
        """
        small, large = self.serializer.loads(change.body), dict(hidden)
        for name in [*small]:
            if len(self.serializer.dumps({name: small[name]})) > _LARGE_FIELD:
                large[name] = small.pop(name)
        packed = gzip.compress(self.serializer.dumps(large), 6, mtime=0)
        data = self.serializer.dumps({**small, PACKED: b64encode(packed).decode()})
        return replace(change, body=data) if hidden or len(data) < len(change.body) else change

    # -- documents to states ---------------------------------------------------------------

    def load(self, document: Document) -> StoredState:
        """The state in a document.

        Raises ``SchemaTooNewError``, ``StateValidationError``, ``StateCorruptedError``, and
        ``EncryptionKeyError`` for one that is encrypted.
        """
        schema, body = self._migrated(document)
        try:
            state = self.build(schema, _with_id(schema, body, document.key))
        except StateValidationError as error:
            error.kind, error.key = document.kind, document.key
            raise
        return StoredState(
            document.key, state, document.revision, document.saved_at, schema, document.edited
        )

    def body(self, document: Document) -> JsonObject:
        """The body in the current schema, as it is stored. Raises as ``load``."""
        schema, body = self._migrated(document)
        self.validator.validate(schema, _with_id(schema, body, document.key))
        return body

    def record(self, kind: str, key: Key, body: bytes) -> JsonObject:
        """A record of a log, with the fields that ``pack`` has compressed.

        Raises ``EncryptionKeyError`` for one that is encrypted, and ``StateCorruptedError`` for
        one that others wrote under the names for it, or have damaged.
        """
        record = self.serializer.loads(body)
        if len(record) == 1:
            refuse_sealed(record, kind, key)
        elif SEALED in record:  # no sealed record looks like that: others wrote it
            raise StateCorruptedError(f"{SEALED} is reserved for the library", kind=kind, key=key)
        if PACKED in record and key[-1] == ARCHIVE:
            record.update(self.serializer.loads(_unpacked(record.pop(PACKED), kind, key)))
        return record

    def check(self, document: Document) -> None:
        """Refuse a document that must not be used. Raises as ``load``.

        An agent is checked without the conversation that a log has.
        """
        self.load(conversation_log.without_log(document))

    def build(self, schema: str, body: JsonObject) -> OpenModel:
        """The model of a schema, built from a body that the validator accepts.

        Raises ``StateValidationError``.
        """
        model = SCHEMAS.get(schema, OpenModel)
        validated = self.validator.validate(schema, body)
        if type(validated) is model:
            return validated
        try:
            return model.model_validate(body)
        except ValidationError as error:
            raise StateValidationError(format_validation_error(error), kind=schema) from error

    def _migrated(self, document: Document) -> tuple[str, JsonObject]:
        """The name of a document's schema, and its body in the current version of that schema."""
        body = self.serializer.loads(document.body)
        refuse_sealed(body, document.kind, document.key)
        stated = _stated_schema(document, body)
        schema, _ = parse_schema(stated)
        return schema, migrate(stated, body)


@dataclass(slots=True)
class Group:
    """Changes that are committed together. Each state is taken as it is when it is added."""

    _codec: Codec
    changes: list[Change] = field(default_factory=list)
    """The changes so far, in order."""

    def save(
        self,
        kind: str,
        key: Key | str,
        state: State,
        *,
        expected: int | None = None,
        append_only: bool = False,
    ) -> None:
        """Save a state, as ``StatePersistenceManager.save`` does.

        ``append_only``: of an agent; no message of its conversation is ever changed in place, so
        that saving it costs what was added.
        """
        key = key if isinstance(key, tuple) else as_key(key)
        put = self._codec.put(kind, key, state, expected, append_only=append_only)
        self.changes.append(put)

    def put(
        self, kind: str, key: Key, body: JsonObject, *, schema: str, expected: int | None = None
    ) -> None:
        """Save a body under another schema than the one of its kind."""
        self.changes.append(self._codec.put(kind, key, body, expected, schema=schema))

    def delete(self, kind: str, key: Key | str, *, expected: int | None = None) -> None:
        """Remove a state; a no-op when nothing is stored."""
        self.changes.append(Delete(kind, as_key(key), expected))

    def append(
        self, kind: str, key: Key | str, record: Mapping[str, Any], *, dedupe_key: str | None = None
    ) -> None:
        """Append a record to a log; a no-op when the log already has this ``dedupe_key``."""
        self.changes.append(self._codec.append(kind, as_key(key), record, dedupe_key))

    def append_json(
        self, kind: str, key: Key | str, body: bytes, *, dedupe_key: str | None = None
    ) -> None:
        """``append`` for a record that the caller has made into canonical JSON.

        That is compact, with sorted keys, and without the names that ``append`` refuses.
        """
        self.changes.append(self._codec.append_json(kind, as_key(key), body, dedupe_key))

    async def archive(self, stored: StoredState, kind: str) -> None:
        """Move a state into its folder's archive log, unless it has changed."""
        key, dedupe_key = (*stored.key[:-1], ARCHIVE), f"{stored.key[-1]}@{stored.revision}"
        record = stored.state.model_dump()
        hidden = {name: record.pop(name) for name in _REFUSED_IN_RECORDS if name in record}
        change = self._codec.append(kind, key, record, dedupe_key)
        if hidden or len(change.body) > PACKED_OVER:
            change = await asyncio.to_thread(self._codec.pack, change, hidden)
        self.delete(kind, stored.key, expected=stored.revision)
        self.changes.append(change)

    def check(self, kind: str, key: Key | str, expected: int) -> None:
        """Refuse the group unless this revision is stored; 0: unless nothing is stored."""
        self.changes.append(Check(kind, as_key(key), expected))


def refuse_sealed(body: JsonObject, kind: str, key: Key) -> None:
    """Raise ``EncryptionKeyError`` for an encrypted body, which no key has opened."""
    if SEALED in body:
        raise EncryptionKeyError("it is encrypted, and was read without keys", kind=kind, key=key)


def _unpacked(packed: object, kind: str, key: Key) -> bytes:
    try:
        unpacking = zlib.decompressobj(wbits=31)
        text = unpacking.decompress(b64decode(str(packed), validate=True), fileio.MAX_BYTES)
    except (ValueError, zlib.error) as error:
        why = "what is compressed in a record is damaged"
        raise StateCorruptedError(why, kind=kind, key=key) from error
    if not unpacking.eof:
        why = "what is compressed in a record is cut off, or too large"
        raise StateCorruptedError(why, kind=kind, key=key)
    return text


def as_key(key: Key | str) -> Key:
    """An id as a key of one segment."""
    return (key,) if isinstance(key, str) else tuple(key)


def format_validation_error(error: ValidationError) -> str:
    """The invalid fields and their faults, without the values, which may be private."""
    faults = [
        f"{'.'.join(str(part) for part in fault['loc']) or 'the state':.200}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False)
    ]
    more = len(faults) - _MAX_NAMED_FIELDS
    rest = f"; and {more} more" if more > 0 else ""
    return "not a valid state: " + "; ".join(faults[:_MAX_NAMED_FIELDS]) + rest


def _stated_schema(document: Document, body: JsonObject) -> str:
    """The schema a document names; without one, the schema that its kind and key imply."""
    if document.schema:
        name, _ = parse_schema(document.schema)
        if name in _SCHEMAS_OF.get(document.kind, (name,)):
            return document.schema
        why = f"{document.schema!r:.80} is not a schema of {document.kind}"
        if name in SCHEMAS:
            raise StateCorruptedError(why, kind=document.kind, key=document.key)
        raise SchemaTooNewError(f"{why} that this version knows", kind=document.kind)
    collection = COLLECTIONS.get(document.kind)
    is_header = collection is not None and len(document.key) == 1
    name = collection.schema if collection is not None and is_header else document.kind
    return f"{name}/{0 if '_version' in body else VERSIONS.get(name, 1)}"


def _with_id(schema: str, body: JsonObject, key: Key) -> JsonObject:
    """The body with its id: a file written by a person may have its id only in its name."""
    field = _ID_FIELDS.get(schema)
    return body if field is None or field in body else {**body, field: key[-1]}
