"""The text in what a message says, which may be an object, a list of blocks, or JSON in a text."""

from __future__ import annotations

from typing import Any

import orjson

from agent_state.errors import UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state.serializers import MAX_DEPTH

_IN_ORDER = ("message", "text", "content", "body", "msg", "summary", "description")
"""Where the text of an object is, the first of them that has one."""
_FIELDS = frozenset(_IN_ORDER)
_DEEPEST = 16
"""Levels at which a text is looked for; what is farther down is no longer what was said."""


def read(value: object, content: object, field: str) -> tuple[str, JsonObject | None]:
    """The text that is said, and the object it is from when that says more.

    ``content`` is the object of a record that has been understood before: it is left as it is.
    Raises ``UnreadableMessageError``.
    """
    if type(value) is str:
        if type(content) is dict:
            return value, content
        found = as_object(value)
        return (value, None) if found is None else _of_object(found)
    if type(value) is dict:
        return _of_object(value)
    if type(value) is list:
        return _of_object({field: value}) if value else ("", None)
    return orjson.dumps(value).decode(), None


def as_object(text: str) -> JsonObject | None:
    """The JSON object that a text is; None when it is only a text."""
    if text[:1] != "{":
        return None
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return found if type(found) is dict else None


def _of_object(value: JsonObject) -> tuple[str, JsonObject | None]:
    text = _text_in(value, _DEEPEST)
    more = _says_more(value, text)
    if not text:
        return (_compact(value), value) if more else ("", None)
    if (found := as_object(text)) is None:
        return text, value if more else None
    # The text of this object is again JSON: what is innermost has been said.
    inner, content = _of_object(found)
    return inner, value if more else content


def _text_in(value: object, levels: int) -> str:
    if type(value) is str:
        return value
    if levels and type(value) is dict:
        for field in _IN_ORDER:
            if field in value and (text := _text_in(value[field], levels - 1)):
                return text
    elif levels and type(value) is list:
        found = [text for item in value if (text := _text_in(item, levels - 1))]
        return "\n".join(found)
    return ""


def _says_more(value: object, text: str) -> bool:
    """Whether there is anything in the value beside this text and the fields it is in."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        if not level:
            return False
        deeper: list[Any] = []
        for item in level:
            if type(item) is dict:
                if len(item) > 1 or not _FIELDS.issuperset(item):
                    return True
                deeper.extend(item.values())
            elif item not in ("", None, text):
                return True
        level = deeper
    return True


def _compact(value: JsonObject) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError as error:
        raise UnreadableMessageError(
            f"content: nesting is deeper than {MAX_DEPTH} levels"
        ) from error
