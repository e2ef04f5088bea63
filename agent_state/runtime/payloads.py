"""The payload and the result of a handler by name: typed by its annotations, and migrated.

A payload is stored as JSON with the version of its layout, where that is not 1. A task that an
older deploy queued is migrated, step by step, each time it is attempted; what is stored of it
stays as it was queued.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, get_type_hints

import orjson
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from agent_state.codec import format_validation_error
from agent_state.errors import InvalidPayloadError, StateValidationError
from agent_state.models import Task, detached
from agent_state.runtime.results import as_json

PayloadMigration = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Takes a payload of one version and returns the payload of the next."""

_ANY = TypeAdapter[Any](Any)


class HandlerSignature:
    """What a handler by name takes after its context, and what it returns.

    ``version``: the version of the payload's layout; ``migrations``: by version, the step to the
    next one. ``names``: the local names that annotations may use.
    Raises ``TypeError`` for a function that a handler cannot be, and ``ValueError`` for a
    migration that leads nowhere.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        version: int = 1,
        migrations: Mapping[int, PayloadMigration] | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> None:
        self.version = version
        self._migrations = dict(migrations or {})
        if version < 1:
            raise ValueError(f"the version of a payload is 1 or more, not {version}")
        for step in self._migrations:
            if not 1 <= step < version:
                raise ValueError(f"there is no step from version {step} to version {version}")
        parameters = [*inspect.signature(function).parameters.values()]
        if not 1 <= len(parameters) <= 2:
            raise TypeError("a handler takes its context, and its payload or its task if it likes")
        self._takes_argument = len(parameters) == 2
        given = parameters[1].annotation if self._takes_argument else Task
        annotation = _resolved(function, given, names)
        self._payload = None if annotation in (Task, inspect.Parameter.empty) else _type(annotation)
        returned = _resolved(function, inspect.signature(function).return_annotation, names)
        untyped = returned in (inspect.Parameter.empty, Any)
        self._result = _ANY if untyped else _type(returned)

    # -- payloads ----------------------------------------------------------------------------

    def to_stored(self, payload: object) -> dict[str, Any]:
        """Return a payload as it is stored. Raises ``InvalidPayloadError`` for another type."""
        if self._payload is None:
            return as_object(payload)
        if not isinstance(payload, Mapping):
            try:
                instance = self._payload.validate_python(payload)
            except ValidationError as error:
                text = f"the payload is not valid: {_faults(error)}"
                raise InvalidPayloadError(text) from error
            payload = self._payload.dump_python(instance, mode="json", by_alias=True)
        stored = as_object(payload)
        self._typed(stored)
        return stored

    def knows_version(self, task: Task) -> bool:
        """Whether the task was not queued by a newer deploy."""
        return task.payload_version <= self.version

    def arguments(self, task: Task) -> tuple[Any, ...]:
        """Return what the handler is given after its context.

        Raises ``InvalidPayloadError`` when the payload cannot be migrated, or is of another type.
        """
        if not self._takes_argument:
            return ()
        try:
            payload = self._migrated(task)
            if self._payload is None:
                return (task.model_copy(update={"payload": payload}),)
            return (self._typed(payload),)
        except InvalidPayloadError as error:
            error.kind, error.key = "tasks", (task.agent_id, task.task_id)
            raise

    def _migrated(self, task: Task) -> dict[str, Any]:
        payload = task.payload
        for version in range(task.payload_version, self.version):
            step = self._migrations.get(version)
            if step is None:
                raise InvalidPayloadError(f"there is no migration from version {version}")
            try:
                payload = dict(step(detached(payload)))
            except Exception as error:
                text = f"the migration from version {version} failed: {error!r}"
                raise InvalidPayloadError(text) from error
        return payload

    def _typed(self, payload: dict[str, Any]) -> Any:
        if self._payload is None:
            return payload
        try:
            return self._payload.validate_json(orjson.dumps(payload))
        except ValidationError as error:
            text = f"the payload is not valid: {_faults(error)}"
            raise InvalidPayloadError(text) from error
        except TypeError as error:
            raise InvalidPayloadError(f"the payload is not JSON: {error}") from error

    # -- results -----------------------------------------------------------------------------

    def result_to_json(self, result: Any) -> Any:
        """Return what is stored of a result.

        Raises ``StateValidationError`` unless it is of the type that the handler says.
        """
        if self._result is _ANY:
            return as_json(result)
        try:
            return self._result.dump_python(result, mode="json", by_alias=True, warnings="error")
        except PydanticSerializationError:
            pass  # it may be JSON that stands for the type
        try:
            checked = self._result.validate_python(result)
        except ValidationError as error:
            text = f"the handler returned another type than it says: {_faults(error)}"
            raise StateValidationError(text) from error
        return self._result.dump_python(checked, mode="json", by_alias=True)

    def result_from_json(self, stored: Any) -> Any:
        """Return a stored result as its type. Raises ``StateValidationError``."""
        try:
            return self._result.validate_json(orjson.dumps(stored))
        except ValidationError as error:
            text = f"the result is not what the handler returns: {_faults(error)}"
            raise StateValidationError(text) from error


def as_object(payload: object) -> dict[str, Any]:
    """Return a payload as a JSON object. Raises ``InvalidPayloadError`` for anything else."""
    plain = as_json({} if payload is None else payload)
    if isinstance(plain, Mapping):
        return dict(plain)
    raise InvalidPayloadError(f"a payload is a JSON object, and not {type(payload).__name__}")


def _resolved(
    function: Callable[..., Any], annotation: Any, names: Mapping[str, Any] | None
) -> Any:
    """Return an annotation as a type, also where ``from __future__ import annotations`` holds."""
    if not isinstance(annotation, str):
        return annotation
    holder = SimpleNamespace(__annotations__={"it": annotation})
    inner = inspect.unwrap(function)
    try:
        return get_type_hints(
            holder, getattr(inner, "__globals__", {}), dict(names or {}), include_extras=True
        )["it"]
    except NameError as error:
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(f"{annotation!r}, an annotation of {name}, is unknown: {error}") from error


def _faults(error: ValidationError) -> str:
    return format_validation_error(error).partition(": ")[2]


def _type(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation)
    except PydanticUserError as error:
        raise TypeError(f"{annotation!r} is no type that pydantic knows: {error}") from error
