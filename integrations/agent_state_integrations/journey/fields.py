"""Models whose fields can be read as those of a mapping, and what a caller may give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ValidationError

from agent_state.codec import format_validation_error
from agent_state.errors import StateValidationError
from agent_state.manager import StatePersistenceManager

KIND = "journeys"
M = TypeVar("M", bound=BaseModel)

_REDIS = "write cache=RedisConversationCache(…), which copies live sessions to Redis"
_INSTEAD = {
    "redis_host": _REDIS,
    "redis_port": _REDIS,
    "redis_db": _REDIS,
    "ttl_days": "write ttl_seconds=86400 * days",
    "max_message_window": "write window=",
}
"""What is to be written in the place of the arguments of the first design."""


class MappingModel(BaseModel):
    """A model whose fields can also be read as those of a mapping, as the first design has them."""

    former_names: ClassVar[Mapping[str, str]] = {}
    """Fields by the names that they had in the first design."""

    def __getitem__(self, name: str) -> Any:
        """The value of a field. Raises ``KeyError``."""
        name = self.former_names.get(name, name)
        if name in type(self).model_fields or name in (self.model_extra or {}):
            return getattr(self, name)
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or ``default`` if there is no such field."""
        try:
            return self[name]
        except KeyError:
            return default

    def keys(self) -> list[str]:
        """The names of the fields, so that ``dict`` and ``**`` take a model."""
        return [*type(self).model_fields, *(self.model_extra or {})]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """The fields as JSON."""
        return self.model_dump_json()

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Self:
        """A model of these fields. Raises ``StateValidationError``."""
        return validated(cls, body, f"a {cls.__name__}")

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """A model of the fields of a JSON object. Raises ``StateValidationError``."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise StateValidationError(f"it is not JSON: {error}", kind=KIND) from error


def validated(model: type[M], given: M | Mapping[str, Any], what: str) -> M:
    """The caller's object as a model of its own. Raises ``StateValidationError``."""
    if isinstance(given, BaseModel):
        given = given.model_dump(warnings=False)
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise StateValidationError(
            f"{what} is {format_validation_error(error)}", kind=KIND
        ) from error
    except (TypeError, ValueError) as error:
        raise StateValidationError(f"{what} is not a mapping", kind=KIND) from error


def check_arguments(manager: object, former: Mapping[str, object]) -> None:
    """Raise ``TypeError`` for arguments of the first design, with what is to be written instead."""
    for name in former:
        raise TypeError(f"there is no argument {name!r}; {_INSTEAD.get(name, 'see its help')}")
    if manager is not None and not isinstance(manager, StatePersistenceManager):
        raise TypeError(f"manager is a StatePersistenceManager, not {type(manager).__name__}")
