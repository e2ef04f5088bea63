"""Results of steps and tasks: as JSON values, and back in the type of an annotation.

A step gives the same at once and after a restart: the stored value, or, where its function says
what it returns, that type built from the stored value.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import is_dataclass
from functools import lru_cache, partial
from typing import Any, get_args, get_origin, get_type_hints

import orjson
from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from agent_state.models import detached

_JSON_TYPES = frozenset({str, int, float, bool, type(None)})


def as_json(value: Any) -> Any:
    """Return the value as the store gives it back: a model as an object, a tuple as a list.

    What has no such form is returned as it is; the serializer refuses it, by name.
    """
    try:
        return _json(value)
    except RecursionError:
        return value


def _json(value: Any) -> Any:
    kind = type(value)
    if kind in _JSON_TYPES:
        return value
    if kind is dict:
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return TypeAdapter(kind).dump_python(value, mode="json")
    return detached(value)


class ResultType:
    """The type that a step's function says it returns, if it says one that pydantic knows."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._adapter = _adapter_of(function)

    def to_json(self, result: Any) -> Any:
        """Return what is stored of a result."""
        if self._adapter is not None:
            try:
                return self._adapter.dump_python(result, mode="json", warnings="error")
            except PydanticSerializationError:
                pass  # the function returned something else than it says
        return as_json(result)

    def from_json(self, stored: Any) -> Any:
        """Return the result that was stored, as a copy."""
        if self._adapter is not None:
            try:
                return self._adapter.validate_json(orjson.dumps(stored), strict=True)
            except (ValidationError, orjson.JSONEncodeError):
                pass
        return detached(stored)


def _adapter_of(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    while isinstance(function, partial):
        function = function.func
    try:
        given = get_type_hints(inspect.unwrap(function)).get("return", Any)
        if get_origin(given) in (Awaitable, Coroutine):
            given = get_args(given)[-1]
        return None if given in (Any, type(None)) else _adapter(given)
    except (AttributeError, NameError, TypeError, ValueError, PydanticUserError):
        return None  # not annotated, or with what only a type checker understands


@lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)
