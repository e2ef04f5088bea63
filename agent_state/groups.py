"""Changes that are made together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_state.codec import Codec
from agent_state.models import OpenModel
from agent_state.protocols import Change, Delete, JsonObject, Key

State = Mapping[str, Any] | OpenModel


class Group:
    """Changes that will be made together. Each state is taken as it is when it is handed over."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.changes: list[Change] = []

    def save(self, kind: str, key: Key | str, state: State, *, expected: int | None = None) -> None:
        """Save a state, as ``StatePersistenceManager.save`` does."""
        self.changes.append(self._codec.put(kind, as_key(key), state, expected))

    def put(self, kind: str, key: Key, body: JsonObject, *, schema: str) -> None:
        """Save a body under a schema that is not its kind's."""
        self.changes.append(self._codec.put(kind, key, body, None, schema=schema))

    def delete(self, kind: str, key: Key | str, *, expected: int | None = None) -> None:
        """Remove a state; no-op when there is none."""
        self.changes.append(Delete(kind, as_key(key), expected))

    def append(
        self, kind: str, key: Key | str, record: Mapping[str, Any], *, dedupe_key: str | None = None
    ) -> None:
        """Add a record to a log."""
        self.changes.append(self._codec.append(kind, as_key(key), record, dedupe_key))


def as_key(key: Key | str) -> Key:
    """An id as a key of one segment."""
    return (key,) if isinstance(key, str) else tuple(key)
