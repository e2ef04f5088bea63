"""A change of a document in words: ``idle to sleeping``, ``until 14:00``, ``queued``.

Both versions of a document are given as the JSON of their states, None where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

State = Mapping[str, Any] | None
"""The fields of a document; its reserved ones may be among them."""

NOISE = frozenset(
    {
        "_checksum",
        "_id",
        "_revision",
        "_saved_at",
        "_schema",
        "_session_id",
        "last_active",
        "updated_at",
    }
)
"""Fields that change with every save and tell nothing."""

_SHORT = 48
_MOST_FIELDS = 6
_OF_TASK = {
    "pending": "queued",
    "in_progress": "begun",
    "completed": "completed",
    "failed": "failed",
    "dead": "dead",
    "cancelled": "cancelled",
}


class Absent:
    """No value: the field is not there."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = Absent()


def agent_words(before: State, after: State) -> list[str]:
    """What became of an agent; empty if nothing that a person wants to know."""
    if after is None:
        return ["removed"]
    if before is None:
        return [f"created ({after.get('agent_type') or 'no type'})"]
    said = []
    if before.get("status") != after.get("status"):
        said.append(f"{before.get('status', 'idle')} to {after.get('status', 'idle')}")
    return [*said, *field_words(_without_place(before), _without_place(after), ("status",))]


def _without_place(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The agent without the place of its conversation in a log: the log's lines tell of that."""
    context = state.get("context")
    if not isinstance(context, dict) or type(context.get("conversation_history")) is not dict:
        return state
    return {**state, "context": {**context, "conversation_history": []}}


def sleep_words(after: State) -> str:
    """Until when an agent sleeps, or that it woke."""
    if after is None or after.get("is_sleeping") is False:
        return "woke"
    until = after.get("sleep_until")
    return f"until {until}" if until else "until an event"


def task_words(before: State, after: State) -> str:
    """What became of a task: ``queued``, ``begun``, ``completed``, ``changed``."""
    if after is None:
        return "removed"
    status = str(after.get("status", "pending"))
    word = _OF_TASK.get(status, status)
    if before is None:
        return "queued" if status == "pending" else f"queued and {word}"
    return word if before.get("status", "pending") != status else "changed"


def field_words(before: State, after: State, but: Iterable[str] = ()) -> list[str]:
    """The fields that differ, with both values; ``but`` these and those that are noise."""
    if before is None or after is None:
        return ["removed" if after is None else "created"]
    left_out = NOISE.union(but)
    found = [
        f"{'.'.join(at)} {value_words(old)} to {value_words(new)}"
        for at, old, new in _differences((), before, after)
        if at[0] not in left_out
    ]
    more = len(found) - _MOST_FIELDS
    return [*found[:_MOST_FIELDS], *([f"{more} more fields"] if more > 0 else [])]


def _differences(
    at: tuple[str, ...], before: Any, after: Any
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in {**before, **after}:
            yield from _differences((*at, name), before.get(name, ABSENT), after.get(name, ABSENT))
    elif not is_same(before, after):
        yield at, before, after


def is_same(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same; ``True`` is not 1."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def value_words(value: Any) -> str:
    """A value as JSON, cut if it is long; of a list only the length."""
    if value is ABSENT:
        return "nothing"
    if isinstance(value, list):
        return f"{len(value)} item{'' if len(value) == 1 else 's'}"
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
