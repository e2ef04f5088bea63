"""States to canonical JSON bytes and back; values that JSON would change are refused."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import orjson

from agent_state.errors import SerializationError, StateCorruptedError
from agent_state.protocols import JsonObject

MAX_DEPTH = 200
"""The most levels of nesting. orjson writes 254 and reads 1,024."""

_OPTIONS = (
    orjson.OPT_SORT_KEYS
    | orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
)
_LARGE = 1024 * 1024
_MAX_PARTS = 256
_INT_RANGE = range(-(2**63), 2**64)


class JSONStateSerializer:
    """The default serializer: orjson, sorted keys, no conversion that loses a type.

    Refused, naming the field: NaN and infinity, integers outside -2**63 … 2**64-1, bytes,
    sets, keys that are not text, lone surrogates, objects of any other class (datetimes and
    enums among them), and nesting deeper than 200 levels. A tuple is stored as an array.
    """

    def dumps(self, state: Mapping[str, Any]) -> bytes:
        """Canonical JSON of the state. Raises ``SerializationError``."""
        if not isinstance(state, dict):
            state = dict(state)
        if not _is_plain(state, MAX_DEPTH):
            raise _refusal(state)
        try:
            return shrink(orjson.dumps(state, option=_OPTIONS))
        except orjson.JSONEncodeError as error:
            raise _refusal(state, str(error)) from error

    def loads(self, data: bytes) -> JsonObject:
        """The JSON object in the bytes. Raises ``StateCorruptedError``."""
        return parse_object(data)


class JsonList:
    """Canonical JSON of a list, which is joined when somebody needs the whole."""

    __slots__ = ("_array", "_parts", "count", "size")

    def __init__(self, array: bytes = b"[]", count: int = 0) -> None:
        self._array: bytes | None = array
        self._parts: Sequence[bytes] = ()
        """The array but for its last bracket, until it is joined."""
        self.count = count
        """How many items it has."""
        self.size = len(array)
        """How many bytes."""

    @property
    def array(self) -> bytes:
        """The whole."""
        if self._array is None:
            self._array, self._parts = b"".join((*self._parts, b"]")), ()
        return self._array

    @property
    def text(self) -> memoryview:
        """The whole but for its last bracket."""
        return memoryview(self.array)[:-1]

    def begins_with(self, other: JsonList) -> bool:
        """Whether its first items are those of the other list."""
        if not other.count:
            return True
        return self.array.startswith(other.text) and self.array[other.size - 1] in b",]"

    def extended(self, items: Sequence[bytes]) -> JsonList:
        """This list with these items behind its own."""
        if not items:
            return self
        more = JsonList(count=self.count + len(items))
        behind = self.behind(items)
        parts = self._parts if 0 < len(self._parts) < _MAX_PARTS else (self.array[:-1],)
        more._parts = (*parts, behind)
        more._array, more.size = None, self.size + len(behind)
        return more

    def behind(self, items: Sequence[bytes]) -> bytes:
        """What stands behind this list when these items do."""
        return (b"," if self.count and items else b"") + b",".join(items)

    def items(self) -> list[bytes]:
        """Canonical JSON of each item."""
        found = orjson.loads(self.array)
        return [orjson.dumps(item, option=orjson.OPT_SORT_KEYS) for item in found]


class ApartJson(NamedTuple):
    """A state in two parts: without one of its lists, and that list."""

    head: bytes
    """Canonical JSON of the state, where ``null`` stands for the list."""
    start: int
    """The offset of ``null``."""
    items: JsonList
    """The list."""
    earlier: JsonList | None = None
    """The list that it begins with, as far as that is known."""
    added: Sequence[bytes] = ()
    """Canonical JSON of each item behind those."""

    def whole(self) -> bytes:
        """Canonical JSON of the state."""
        rest = self.head[self.start + 4 :]
        return b"".join((self.head[: self.start], self.items.array, rest))


class CheckedList(NamedTuple):
    """A list that ``dumps_apart`` has accepted."""

    json: JsonList = JsonList()  # it never changes
    items: Sequence[Any] = ()
    """Its items, if none of them is ever changed in place."""


def dumps_apart(
    state: JsonObject,
    field: str,
    name: str,
    min_bytes: int,
    checked: CheckedList,
    *,
    append_only: bool = False,
) -> ApartJson | None:
    """What ``JSONStateSerializer.dumps`` gives, with the list ``state[field][name]`` by itself.

    None for a list of fewer bytes. ``checked``: an earlier list that this has accepted; what is the
    same in this one is not checked again. ``append_only``: no item is ever changed in place, so
    that the very same items are not read again. Raises as ``dumps``.
    """
    parent = state[field]
    items = parent[name]
    head = {**state, field: {**parent, name: None}}
    earlier, known = checked
    count = earlier.count
    items_json = None
    goes_on = append_only and 0 < count == len(known) <= len(items) and all(map(is_, known, items))
    try:
        if not goes_on:
            items_json = JsonList(orjson.dumps(items, option=_OPTIONS), len(items))
            if items_json.size < min_bytes:
                return None
            goes_on = count > 0 and items_json.begins_with(earlier)
        new = items[count:] if goes_on else items
        if not _is_plain(head, MAX_DEPTH) or not _is_plain(new, MAX_DEPTH - 2):
            raise _refusal(state)
        text = orjson.dumps(head, option=_OPTIONS)
        head[field] = {**parent, name: True}
        start = _first_difference(text, orjson.dumps(head, option=_OPTIONS))
        added = [orjson.dumps(item, option=_OPTIONS) for item in new] if goes_on else []
    except orjson.JSONEncodeError as error:
        raise _refusal(state, str(error)) from error
    items_json = items_json or earlier.extended(added)
    return ApartJson(text, start, items_json, earlier if goes_on else None, added)


def _first_difference(one: bytes, other: bytes) -> int:
    """The offset of the first byte that differs; there is one."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high) // 2
        if one[low : middle + 1] == other[low : middle + 1]:
            low = middle + 1
        else:
            high = middle
    return low


def canonical_json(value: JsonObject) -> bytes:
    """Canonical JSON of a value that was parsed from JSON, as the checksum needs it.

    Raises ``StateCorruptedError`` for nesting that can be read and not be written again.
    """
    try:
        return shrink(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))
    except orjson.JSONEncodeError as error:
        raise StateCorruptedError(f"nesting is deeper than {MAX_DEPTH} levels") from error


def shrink(data: bytes) -> bytes:
    """The same bytes in a buffer of their size; orjson allocates at least 4 KiB for any result."""
    return bytes(memoryview(data)) if len(data) < _LARGE else data


def count_lines(state: Mapping[str, Any]) -> int:
    """How many lines the JSON of a state has at most, with one member a line."""
    lines = 1
    level: list[Any] = [state]
    while level:
        deeper: list[Any] = []
        for container in level:
            lines += len(container) + 1
            items = container.values() if isinstance(container, Mapping) else container
            deeper += [item for item in items if type(item) in _CONTAINERS]
        level = deeper
    return lines


def parse_object(data: bytes) -> JsonObject:
    """One JSON object. Raises ``StateCorruptedError``, with the line and the column."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise StateCorruptedError(f"not JSON: {error}") from error
    if type(value) is not dict:
        raise StateCorruptedError(f"a JSON object was expected, not {_name(value)}")
    return value


def parse_file(data: bytes) -> JsonObject:
    """``parse_object`` for files, which editors write too.

    A byte order mark, and NULs around the object, are skipped.
    """
    try:
        return parse_object(data)
    except StateCorruptedError:
        bare = strip_foreign(data)
        if bare == data:
            raise
        return parse_object(bare)


def parse_line(data: bytes) -> JsonObject:
    """``parse_file`` for lines of logs, in which half a surrogate pair becomes U+FFFD."""
    value, _ = parse_foreign(data)
    if type(value) is not dict:
        raise StateCorruptedError(f"a JSON object was expected, not {_name(value)}")
    return value


def parse_foreign(data: bytes) -> tuple[Any, bool]:
    """The value in JSON of another program, and whether half a surrogate pair became U+FFFD.

    A byte order mark, and NULs around the value, are skipped. Raises ``StateCorruptedError``.
    """
    try:
        return orjson.loads(data), False
    except orjson.JSONDecodeError as error:
        reason = str(error)  # not the error, which would keep the frames of all callers alive
    bare = strip_foreign(data)
    if bare != data:
        try:
            return orjson.loads(bare), False
        except orjson.JSONDecodeError as error:
            reason = str(error)
    if any(half in bare for half in (b"\\ud", b"\\uD", b"\xed")):
        try:
            return orjson.loads(_without_surrogates(bare)), True
        except (ValueError, RecursionError):
            pass  # the first error says what is wrong
    raise StateCorruptedError(f"not JSON: {reason}")


def strip_foreign(data: bytes) -> bytes:
    """JSON as UTF-8 without a byte order mark, and without NULs around it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16").strip("\0").encode()
        except UnicodeError:
            return data
    data = data.lstrip(b"\0").removeprefix(codecs.BOM_UTF8).lstrip(b"\0")
    bare = data.rstrip(b"\0\r\n\t ")  # a newline may stand behind the NULs
    return bare if b"\0" in data[len(bare) :] else data


def _without_surrogates(data: bytes) -> bytes:
    """JSON with U+FFFD for half a surrogate pair. Raises ``ValueError`` for no JSON."""

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    value = json.loads(data.decode("utf-8", "surrogatepass"), parse_constant=refuse)
    return replace_surrogates(json.dumps(value, ensure_ascii=False)).encode()


def replace_surrogates(text: str) -> str:
    """The text with its surrogate pairs joined, and U+FFFD for each half of one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def replace_surrogates_in(value: Any, levels: int = MAX_DEPTH) -> Any:
    """``replace_surrogates`` in each text and key of a value of JSON's types."""
    if levels and type(value) is dict:
        return {
            replace_surrogates(key) if type(key) is str else key: replace_surrogates_in(
                item, levels - 1
            )
            for key, item in value.items()
        }
    if levels and type(value) in (list, tuple):
        return [replace_surrogates_in(item, levels - 1) for item in value]
    return replace_surrogates(value) if type(value) is str else value


def check_strict_json(data: bytes) -> None:
    """Refuse JSON that a person can write and that ``parse_object`` would change silently.

    That is a key given twice, and an integer beyond 64 bits (orjson makes it a float).
    Slower than ``parse_object`` and only for what has passed it. Raises ``StateCorruptedError``.
    """

    def integer(digits: str) -> int:
        if len(digits) > 20 or int(digits) not in _INT_RANGE:
            raise StateCorruptedError(f"the integer {digits[:24]} is beyond 64 bits")
        return int(digits)

    def pairs(items: list[tuple[str, Any]]) -> JsonObject:
        value = dict(items)
        if len(value) != len(items):
            twice = next(key for key, _ in items if sum(key == other for other, _ in items) > 1)
            raise StateCorruptedError(f"the key {twice!r} is given twice")
        return value

    text = strip_foreign(data).decode("utf-8", "surrogatepass")
    try:
        value = json.loads(text, parse_int=integer, object_pairs_hook=pairs)
    except RecursionError as error:
        raise StateCorruptedError(f"nesting is deeper than {MAX_DEPTH} levels") from error
    if not _is_plain(value, MAX_DEPTH):
        raise StateCorruptedError(f"{_refusal(value)}")


_LEAVES = frozenset({str, int, bool, type(None)})
_CONTAINERS = frozenset({dict, list, tuple})


def _is_plain(value: dict[Any, Any] | list[Any] | tuple[Any, ...], levels: int) -> bool:
    """Whether the value has only the types of JSON, within that many levels.

    Every save passes here, so it goes level by level without a call, answers yes or no, and
    leaves the naming to ``_faults``. orjson refuses integers beyond 64 bits, keys that are not
    text, and surrogates by itself.
    """
    level: list[Any] = [value]
    while level:
        levels -= 1
        if levels < 0:
            return False
        deeper = []
        for container in level:
            for item in container.values() if type(container) is dict else container:
                kind = type(item)
                if kind in _LEAVES:
                    continue
                if kind is dict or kind is list or kind is tuple:
                    deeper.append(item)
                elif kind is not float or item - item != 0.0:  # NaN and infinity do not cancel
                    return False
        level = deeper
    return True


def _refusal(state: Mapping[str, Any], said: str = "it is not JSON") -> SerializationError:
    field, why = next(_faults(state, "", 1), ("", said))
    if len(field) > 200:
        field = f"{field[:80]}…{field[-80:]}"
    return SerializationError(
        f"cannot be stored at {field or 'the top level'!r}: {why}", field=field
    )


def _faults(value: object, field: str, depth: int) -> Iterator[tuple[str, str]]:
    """The paths in the value that JSON cannot hold, each with the reason."""
    if type(value) in (dict, list, tuple) and depth > MAX_DEPTH:
        yield field, f"nesting is deeper than {MAX_DEPTH} levels"
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                yield field, f"the key {key!r:.80} is {_name(key)}; JSON keys are text"
            elif _has_surrogate(key):
                yield field, "a key holds a lone surrogate, which is not Unicode text"
            else:
                yield from _faults(item, f"{field}.{key}" if field else key, depth + 1)
    elif type(value) is list or type(value) is tuple:
        for index, item in enumerate(value):
            yield from _faults(item, f"{field}[{index}]", depth + 1)
    elif (why := _fault_of_leaf(value)) is not None:
        yield field, why


def _fault_of_leaf(value: object) -> str | None:
    if type(value) is str:
        return "a lone surrogate is not Unicode text" if _has_surrogate(value) else None
    if type(value) is int:
        return None if value in _INT_RANGE else "the integer is beyond 64 bits"
    if type(value) is float:
        return None if value - value == 0.0 else f"{value} is not JSON"
    if value is None or type(value) is bool:
        return None
    return f"{_name(value)} is not JSON"


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _name(value: object) -> str:
    return "a list" if isinstance(value, list) else f"a value of type {type(value).__name__}"
