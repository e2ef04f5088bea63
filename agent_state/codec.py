"""Between states and documents: check, serialise, migrate, and build the model.

One place decides what a document of a kind is, so that a save and a load never disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from agent_state.errors import (
    Key,
    SchemaTooNewError,
    SerializationError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.migrations import migrate, parse_schema, schema_of
from agent_state.models import SCHEMAS, OpenModel
from agent_state.protocols import (
    Append,
    Document,
    JsonObject,
    Put,
    StateSerializer,
    StateValidator,
)
from agent_state.serializers import JSONStateSerializer
from agent_state.storage import logs
from agent_state.storage.document import check_reserved, check_size
from agent_state.validators import ModelStateValidator, format_validation_error
from agent_state.views import VIEWS

_ID_FIELDS = {
    "agents": "agent_id",
    "tasks": "task_id",
    "sleep": "agent_id",
    "mail": "message_id",
    "task_queues": "agent_id",
    "mailboxes": "agent_id",
}


_SCHEMAS_OF = {
    kind: frozenset({kind, view.schema, view.item_schema}) if (view := VIEWS.get(kind)) else {kind}
    for kind in ("agents", "tasks", "sleep", "mail", "system")
}
"""What a document of these kinds may be. A document of another kind may be anything."""


class StoredState(NamedTuple):
    """A state as it was read. ``edited``: a person, or another program, wrote this version."""

    key: Key
    state: OpenModel
    revision: int
    saved_at: str
    schema: str
    edited: bool


class Codec:
    """What a document of each kind is."""

    def __init__(
        self, serializer: StateSerializer | None = None, validator: StateValidator | None = None
    ) -> None:
        self.serializer: StateSerializer = serializer or JSONStateSerializer()
        self.validator: StateValidator = validator or ModelStateValidator()

    def plain(self, state: Mapping[str, Any] | OpenModel) -> JsonObject:
        """A state as an object of its own, models dumped as they are stored."""
        if isinstance(state, OpenModel):
            # A field of the wrong type is the validator's to name, not a warning's.
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
        state: Mapping[str, Any] | OpenModel,
        expected: int | None,
        *,
        schema: str | None = None,
    ) -> Put:
        """The change that saves a state. Raises before anything is touched."""
        body = self.plain(state)
        schema = schema or kind
        if schema not in _SCHEMAS_OF.get(kind, (schema,)):
            raise StateValidationError(f"{schema} is no schema of {kind}", kind=kind, key=key)
        try:
            check_reserved(body, kind, key)
            data = self.serializer.dumps(body)
            check_size(data, kind, key)
            self.validator.validate(schema, body)
        except (SerializationError, StateValidationError) as error:
            error.kind, error.key = kind, key
            raise
        meta = {"_session_id": key[0]} if kind == "agents" else {}
        return Put(kind, key, data, schema_of(schema), expected, meta)

    def append(
        self, kind: str, key: Key, record: Mapping[str, Any], dedupe_key: str | None
    ) -> Append:
        """The change that adds a record to a log."""
        body = self.plain(record)
        if not logs.RESERVED.isdisjoint(body):
            names = ", ".join(sorted(logs.RESERVED.intersection(body)))
            raise StateValidationError(f"reserved for the library: {names}", kind=kind, key=key)
        try:
            data = self.serializer.dumps(body)
            logs.check_record(data, dedupe_key)
        except SerializationError as error:
            error.kind, error.key = kind, key
            raise
        return Append(kind, key, data, dedupe_key)

    def load(self, document: Document) -> StoredState:
        """The state in a document.

        Raises ``SchemaTooNewError``, ``StateValidationError``, ``StateCorruptedError``.
        """
        schema, body = self._migrated(document)
        try:
            state = self.build(schema, _with_id(schema, body, document.key))
        except StateValidationError as error:
            error.kind, error.key = document.kind, document.key
            raise
        return StoredState(
            document.key,
            state,
            document.revision,
            document.saved_at,
            schema,
            document.edited,
        )

    def body(self, document: Document) -> JsonObject:
        """The body in the current schema, checked as ``load`` does, without an id filled in."""
        schema, body = self._migrated(document)
        self.validator.validate(schema, _with_id(schema, body, document.key))
        return body

    def build(self, schema: str, body: JsonObject) -> OpenModel:
        """Ask the validator about a body, and build its model from it.

        Raises ``StateValidationError``.
        """
        model = SCHEMAS.get(schema, OpenModel)
        built = self.validator.validate(schema, body)
        if type(built) is model:
            return built
        try:
            return model.model_validate(body)
        except ValidationError as error:
            raise StateValidationError(format_validation_error(error), kind=schema) from error

    def check(self, document: Document) -> None:
        """Raise when a document that somebody else wrote must not be used."""
        self.load(document)

    def _migrated(self, document: Document) -> tuple[str, JsonObject]:
        """The name of a document's schema, and its body in the current version of that schema."""
        body = self.serializer.loads(document.body)
        stated = _schema(document, body)
        schema, _ = parse_schema(stated)
        return schema, migrate(stated, body)


def _with_id(schema: str, body: JsonObject, key: Key) -> JsonObject:
    """The body with its id: a file that a person put there may have it only as its name."""
    field = _ID_FIELDS.get(schema)
    return body if field is None or field in body else {**body, field: key[-1]}


def _schema(document: Document, body: JsonObject) -> str:
    """The schema a document names; for one that names none, what its place says."""
    if document.schema:
        name, _ = parse_schema(document.schema)
        if name in _SCHEMAS_OF.get(document.kind, (name,)):
            return document.schema
        why = f"{document.schema!r:.80} is no schema of {document.kind}"
        if name in SCHEMAS:
            raise StateCorruptedError(why, kind=document.kind, key=document.key)
        raise SchemaTooNewError(f"{why} that this version knows", kind=document.kind)
    view = VIEWS.get(document.kind)
    name = view.schema if view is not None and len(document.key) == 1 else document.kind
    return f"{name}/0" if "_version" in body else schema_of(name)
