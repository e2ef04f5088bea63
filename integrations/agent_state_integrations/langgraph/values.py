"""Values of channels as JSON: as they are where they are JSON, as typed bytes where they are not.

A value is one *element*, ``{"json": …}`` or ``{"typed": [type, base64]}``, in canonical JSON. A
list is many elements, so that a list that has grown shares those it had. JSON is stored with its
keys sorted; ``"order"`` has the order of the keys where that differs.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agent_state.protocols import JsonObject

_MAX_DEPTH = 64
"""A document nests the value a few levels deeper, and may be 200 levels deep."""
_INTEGERS = range(-(2**63), 2**63)
_LEAVES = frozenset({str, bool, type(None)})
_KEYS = frozenset({str})
_NESTED = frozenset({dict, list})
_WHOLE_EVERY = 4096
"""A grown list is stored whole when it has grown by as much as it was, and by these bytes."""


@dataclass(frozen=True, slots=True)
class WholeValue:
    """A value that is stored as one element."""

    element: bytes


@dataclass(frozen=True, slots=True)
class ListValue:
    """A list: the first ``count`` of ``elements``, which longer versions of the list share."""

    elements: list[bytes]
    count: int
    whole: int
    """The bytes of the version that was last stored whole."""
    grown: int
    """The bytes that were appended since."""

    def starts(self, elements: Sequence[bytes]) -> bool:
        """Whether a list begins with this one, and is worth storing as what was appended."""
        if not 0 < self.count <= len(elements) or self.grown > max(self.whole, _WHOLE_EVERY):
            return False
        return self.elements[: self.count] == elements[: self.count]

    def extended(self, keep: int, appended: Sequence[bytes]) -> ListValue:
        """The list of its first ``keep`` elements and the appended ones."""
        elements = self.elements
        if keep != len(elements):  # another version has gone on from here
            elements = elements[:keep]
        elements.extend(appended)
        return ListValue(elements, len(elements), self.whole, self.grown + _size(appended))


StoredValue: TypeAlias = WholeValue | ListValue
EncodedValue: TypeAlias = bytes | list[bytes]
"""An element, or the elements of a list."""


def list_value(elements: list[bytes]) -> ListValue:
    """A list that is stored whole."""
    return ListValue(elements, len(elements), _size(elements), 0)


def encoded(value: StoredValue) -> EncodedValue:
    """The elements of a stored value."""
    return value.element if isinstance(value, WholeValue) else value.elements[: value.count]


class _PackedElements(dict[bytes, bytes]):
    """The MessagePack of each element that was asked for; empty for one that has none."""

    def __missing__(self, element: bytes) -> bytes:
        kind, data = orjson.loads(element).get("typed", ("", ""))
        packed = self[element] = b64decode(data) if kind == "msgpack" else b""
        return packed


class ValueCodec:
    """Encodes values with a serializer of LangGraph's, where they are not JSON.

    With any other serializer than LangGraph's own, such as one that encrypts, every value goes
    through it. One codec for many values reads an element that they share once.
    """

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde
        self._plain = type(serde) is JsonPlusSerializer
        self._packed = _PackedElements()

    def encode(self, value: Any) -> EncodedValue:
        """The element of a value; the elements of a list. Raises what the serializer raises."""
        if self._plain and type(value) is list:
            return [self.element(item) for item in value]
        return self.element(value)

    def decode(self, value: StoredValue) -> Any:
        """A new copy of the value."""
        if isinstance(value, WholeValue):
            return self.decode_element(value.element)
        elements = value.elements[: value.count]
        items = [self._packed[element] for element in elements] if self._plain else []
        if not items or not all(items):
            return [self.decode_element(element) for element in elements]
        array = b"\xdd" + len(items).to_bytes(4, "big")  # read at once
        return self._serde.loads_typed(("msgpack", array + b"".join(items)))

    def element(self, value: Any, *, ordered: bool = True) -> bytes:
        """The element of a value; without ``ordered`` the order of keys is not kept."""
        if self._plain and _is_json(value, _MAX_DEPTH):
            content: JsonObject = {"json": value}
            if ordered and type(value) in _NESTED:
                order: list[list[str] | None] = []
                _add_orders(value, order)
                if any(order):
                    content["order"] = order
        else:
            kind, data = self._serde.dumps_typed(value)
            content = {"typed": [kind, b64encode(data).decode()]}
        try:
            return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
        except orjson.JSONEncodeError:  # a lone surrogate
            kind, data = self._serde.dumps_typed(value)
            return orjson.dumps({"typed": [kind, b64encode(data).decode()]})

    def decode_element(self, element: bytes) -> Any:
        """A new copy of the value of an element."""
        content = orjson.loads(element)
        if "typed" in content:
            kind, data = content["typed"]
            return self._serde.loads_typed((kind, b64decode(data)))
        value = content["json"]
        return _reordered(value, iter(content["order"])) if "order" in content else value


def list_to_json(elements: Sequence[bytes]) -> JsonObject:
    """Elements as one object: JSON items in place, the others beside them, by position."""
    found: JsonObject = {"items": []}
    for index, element in enumerate(elements):
        content = orjson.loads(element)
        found["items"].append(content.pop("json", None))
        for name, rest in content.items():
            found.setdefault(name, {})[str(index)] = rest
    return found


def list_from_json(content: JsonObject) -> list[bytes]:
    """The elements of ``list_to_json``."""
    typed, order = content.get("typed", {}), content.get("order", {})
    elements = []
    for index, item in enumerate(content["items"]):
        at = str(index)
        element: JsonObject = {"typed": typed[at]} if at in typed else {"json": item}
        if at in order:
            element["order"] = order[at]
        elements.append(orjson.dumps(element, option=orjson.OPT_SORT_KEYS))
    return elements


def _size(elements: Sequence[bytes]) -> int:
    return sum(map(len, elements))


def _is_json(value: Any, levels: int) -> bool:
    """Whether JSON gives exactly this value back; subclasses, tuples and NaN do not come back."""
    level = [value]
    while level:
        deeper: list[Any] = []
        for item in level:
            kind = type(item)
            if kind in _LEAVES or (kind is int and item in _INTEGERS):
                continue
            if kind is list:
                deeper += item
            elif kind is dict:
                if not _KEYS.issuperset(map(type, item)):
                    return False
                deeper += item.values()
            elif kind is not float or item - item != 0.0:  # NaN and infinity do not cancel
                return False
        levels -= 1
        if levels < 0:
            return False
        level = deeper
    return True


def _add_orders(value: Any, found: list[list[str] | None]) -> None:
    """Add for each object in a dict or list, outermost first: its keys, or None if sorted."""
    if type(value) is dict:
        names = list(value)
        keys = sorted(names)
        found.append(None if keys == names else names)
        items = [value[key] for key in keys]
    else:
        items = value
    for item in items:
        if type(item) in _NESTED:
            _add_orders(item, found)


def _reordered(value: Any, orders: Iterator[list[str] | None]) -> Any:
    if type(value) is dict:
        keys = next(orders)
        items = {key: _reordered(value[key], orders) for key in sorted(value)}
        return items if keys is None else {key: items[key] for key in keys}
    if type(value) is list:
        return [_reordered(item, orders) for item in value]
    return value
