"""Python values as JSON that says their types, without pickle.

JSON is stored as it is. Any other value is an object with ``$type``, the ``module:qualname`` of its
class, and what it is made of: the parts that the class itself gives to ``copy``, as JSON. Reading
it back makes an instance of that class with ``__new__`` and gives it its state. It calls no
function, and makes no class that is not allowed. A class of the application that says of itself
with which arguments it is called is called so.
"""

from __future__ import annotations

import copyreg
import math
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from importlib import import_module
from types import GenericAlias, NoneType, UnionType
from typing import Any, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

from agent_state.protocols import JsonObject

TYPE = "$type"
"""The member that tells a typed value from an object of JSON."""
_UNION, _ALIAS = "int | str", "list[int]"
"""What stands in the place of a class's name for types that are no classes."""
_MOST_LEVELS = 100
_INTEGERS = range(-(2**63), 2**63)
_MOMENTS = (datetime, date, time)
_SEQUENCES = (tuple, set, frozenset)
_TEXTS = (UUID, Decimal, Fraction)
_SCALARS = frozenset({NoneType, bool, str, int, float, bytes, bytearray, *_TEXTS, ZoneInfo})
_CALLED = (timedelta, timezone, complex, range, slice, deque, OrderedDict, defaultdict, Counter)
"""Classes of Python that say of themselves with which arguments they are called."""
_PLAIN = (
    *(object, NoneType, bool, int, float, str, bytes, bytearray, list, dict, type),
    *(*_MOMENTS, *_SEQUENCES, *_TEXTS, *_CALLED, ZoneInfo),
)


IsAllowed: TypeAlias = Callable[[str], bool]
"""Whether a class may be made, by its ``module:qualname``."""


def type_name(kind: type) -> str:
    """The ``module:qualname`` of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


PLAIN_TYPES = frozenset(type_name(each) for each in _PLAIN)
"""The classes of Python whose values need nobody's permission."""


class TypedJsonCodec:
    """Encodes values as JSON with types, and decodes them.

    ``is_allowed`` decides about every class that is not in ``PLAIN_TYPES``, in both directions;
    ``is_called`` about those that are allowed, whether they may be made by calling them. None: no
    class. Raises ``TypeError`` for a value that cannot be encoded, ``ValueError``
    for what cannot be decoded. Objects that a value refers to twice come back as two; a value
    that contains itself is refused.
    """

    def __init__(
        self, is_allowed: IsAllowed | None = None, is_called: IsAllowed | None = None
    ) -> None:
        self._is_allowed: IsAllowed = is_allowed or frozenset[str]().__contains__
        self._is_called: IsAllowed = is_called or frozenset[str]().__contains__

    # -- encoding ------------------------------------------------------------------------------

    def encode(self, value: Any) -> Any:
        """The value as JSON. The order of its keys is kept."""
        return self._encode(value, 0)

    def _encode(self, value: Any, level: int) -> Any:
        if level > _MOST_LEVELS:
            raise TypeError(f"a value is deeper than {_MOST_LEVELS} levels, or contains itself")
        kind, deeper = type(value), level + 1
        if kind in _SCALARS:
            return _encode_scalar(value)
        if kind is list:
            return [self._encode(item, deeper) for item in value]
        if kind is dict:
            return self._encode_dict(value, deeper)
        if kind in _SEQUENCES:
            return _typed(kind, items=[self._encode(item, deeper) for item in value])
        if kind in _MOMENTS:
            return self._encode_moment(value, deeper)
        if isinstance(value, GenericAlias | UnionType):
            return self._encode_alias(value, deeper)
        if isinstance(value, type):
            return _typed(type, value=self._checked(value))
        return self._encode_object(value, deeper)

    def _encode_dict(self, value: dict[Any, Any], deeper: int) -> JsonObject:
        if any(type(key) is not str for key in value) or TYPE in value:
            return _typed(dict, pairs=self._encode_pairs(value.items(), deeper))
        fields = {key: self._encode(item, deeper) for key, item in value.items()}
        keys = list(value)
        return fields if keys == sorted(keys) else _typed(dict, value=fields, order=keys)

    def _encode_pairs(self, pairs: Iterable[Any], deeper: int) -> list[Any]:
        return [[self._encode(key, deeper), self._encode(item, deeper)] for key, item in pairs]

    def _encode_moment(self, value: Any, deeper: int) -> JsonObject:
        kind, text = type(value), value.isoformat()
        if repr(kind.fromisoformat(text)) == repr(value):
            return _typed(kind, value=text)
        zone = self._encode(value.tzinfo, deeper)  # it has a name, or the hour is there twice
        bare = value.replace(tzinfo=None).isoformat()
        return _typed(kind, value=bare, zone=zone, fold=value.fold)

    def _encode_alias(self, value: GenericAlias | UnionType, deeper: int) -> JsonObject:
        arguments = [self._encode(each, deeper) for each in value.__args__]
        if isinstance(value, UnionType):
            return {TYPE: _UNION, "items": arguments}
        origin = self._encode(value.__origin__, deeper)
        return {TYPE: _ALIAS, "of": origin, "items": arguments}

    def _encode_object(self, value: Any, deeper: int) -> JsonObject:
        kind = type(value)
        found: JsonObject = {TYPE: self._checked(kind)}
        if isinstance(value, Enum):
            return found | {"value": self._encode(value.value, deeper)}
        reduced = value.__reduce_ex__(2)
        if isinstance(reduced, str):
            raise TypeError(f"{value!r:.80} is known by its name only")
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        if make is copyreg.__newobj__ and arguments[0] is kind:  # type: ignore[attr-defined]  # typeshed leaves it out
            name, arguments = "new", arguments[1:]
        elif make is kind and (_calls_itself(kind) or self._is_called(type_name(kind))):
            name = "call"
        else:
            raise TypeError(f"a {type_name(kind)} can be restored by a function only: {make!r:.80}")
        if arguments or name == "call":
            found[name] = [self._encode(each, deeper) for each in arguments]
        if state is not None:
            fields = type(state) is dict and all(type(key) is str for key in state)
            found["state"] = (
                {key: self._encode(item, deeper) for key, item in state.items()}
                if fields and TYPE not in state
                else self._encode(state, deeper)
            )
        if items is not None:
            found["items"] = [self._encode(each, deeper) for each in items]
        if pairs is not None:
            found["pairs"] = self._encode_pairs(pairs, deeper)
        return found

    # -- decoding ------------------------------------------------------------------------------

    def decode(self, value: Any) -> Any:
        """A new copy of what was encoded."""
        if type(value) is list:
            return [self.decode(item) for item in value]
        if type(value) is not dict:
            return value
        if TYPE not in value:
            return {key: self.decode(item) for key, item in value.items()}
        try:
            return self._decode_typed(value)
        except (ArithmeticError, AttributeError, ImportError, LookupError, TypeError) as error:
            raise ValueError(f"no {value[TYPE]} can be made of what is stored: {error}") from error

    def _decode_typed(self, value: JsonObject) -> Any:
        name = value[TYPE]
        items = [self.decode(each) for each in value.get("items", ())]
        if name == _UNION:
            union = items[0]
            for each in items[1:]:
                union |= each
            return union
        if name == _ALIAS:
            return GenericAlias(self.decode(value["of"]), tuple(items))
        kind = self._class(name)
        if kind is type:
            return self._class(value["value"])
        if kind is dict:
            if "pairs" in value:
                return dict(self.decode(value["pairs"]))
            return {key: self.decode(value["value"][key]) for key in value["order"]}
        if kind in _SEQUENCES:
            return kind(items)
        if kind is bytes or kind is bytearray:
            return kind(b64decode(value["base64"], validate=True))
        if kind in _MOMENTS:
            moment: Any = kind.fromisoformat(value["value"])
            if "zone" not in value:
                return moment
            return moment.replace(tzinfo=self.decode(value["zone"]), fold=value["fold"])
        if "value" in value:  # an enum, or what is made of one text
            return kind(self.decode(value["value"]))
        return self._decode_object(kind, value, items)

    def _decode_object(self, kind: type[Any], value: JsonObject, items: list[Any]) -> Any:
        arguments = self.decode(value.get("new", value.get("call", [])))
        if _calls_itself(kind) or ("call" in value and self._is_called(type_name(kind))):
            made = kind(*arguments)
        else:
            made = kind.__new__(kind, *arguments)
        if "state" in value:
            _set_state(made, self.decode(value["state"]))
        for item in items:
            made.append(item)
        for key, item in value.get("pairs", ()):
            made[self.decode(key)] = self.decode(item)
        return made

    def _checked(self, kind: type[Any]) -> str:
        name = type_name(kind)
        if name not in PLAIN_TYPES and not self._is_allowed(name):
            raise TypeError(f"the type {name} is not allowed")
        return name

    def _class(self, name: str) -> type[Any]:
        """The class of a name, imported only if it is allowed."""
        if name not in PLAIN_TYPES and not self._is_allowed(name):
            raise ValueError(f"the type {name} is not allowed")
        if name == type_name(NoneType):
            return NoneType
        module, _, path = name.partition(":")
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        if not isinstance(found, type) or type_name(found) != name:
            raise ValueError(f"{name} is no class")
        return found


def _calls_itself(kind: type[Any]) -> bool:
    """Whether instances of a class of Python, and exceptions, are made by calling their class."""
    return kind in _CALLED or issubclass(kind, BaseException)


def _encode_scalar(value: Any) -> Any:
    kind = type(value)
    if kind is bytes or kind is bytearray:
        return _typed(kind, base64=b64encode(value).decode())
    if kind in _TEXTS or kind is ZoneInfo:
        return _typed(kind, value=str(value))
    if (kind is int and value not in _INTEGERS) or (kind is float and not math.isfinite(value)):
        return _typed(kind, value=str(value))
    return value


def _typed(kind: type, **parts: Any) -> JsonObject:
    return {TYPE: type_name(kind), **parts}


def _set_state(made: Any, state: Any) -> None:
    """Give a new instance its state, as ``copy`` does."""
    if (setter := getattr(made, "__setstate__", None)) is not None:
        setter(state)
        return
    fields, slots = state if type(state) is tuple else (state, None)
    if fields:
        made.__dict__.update(fields)
    for name, item in (slots or {}).items():
        object.__setattr__(made, name, item)
