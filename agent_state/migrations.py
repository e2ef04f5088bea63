"""The migrations of each schema, as pure functions in order.

A document names its schema and version (``agents/1``). A step takes the body of one version
and returns the body of the next; it never sees a file. An old document is migrated when it is
read, and written in the current version at its next save.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from agent_state.errors import SchemaTooNewError, StateCorruptedError
from agent_state.protocols import JsonObject

Migration = Callable[[JsonObject], JsonObject]

VERSIONS: dict[str, int] = {
    "agents": 1,
    "tasks": 1,
    "task_queues": 1,
    "sleep": 1,
    "mail": 1,
    "mailboxes": 1,
    "system": 1,
}
"""The current version of each schema; a schema without an entry is at 1."""

_STEPS: dict[tuple[str, int], Migration] = {}


def migration(kind: str, version: int) -> Callable[[Migration], Migration]:
    """Register the step from ``version`` to the next. One step for each version."""

    def register(step: Migration) -> Migration:
        if (kind, version) in _STEPS:
            raise ValueError(f"{kind}/{version} has a migration already")
        _STEPS[kind, version] = step
        return step

    return register


def schema_of(name: str) -> str:
    """The current version of a schema: ``agents/1``."""
    return f"{name}/{VERSIONS.get(name, 1)}"


def migrate(schema: str, body: JsonObject) -> JsonObject:
    """The body in the current version of its schema.

    Raises ``SchemaTooNewError`` for a version newer than the current one, and
    ``StateCorruptedError`` for a malformed schema, or a version without a migration.
    """
    kind, version = parse_schema(schema)
    current = VERSIONS.get(kind, 1)
    if version > current:
        raise SchemaTooNewError(
            f"{schema} is newer than {kind}/{current}, the newest this version knows", kind=kind
        )
    while version < current:
        step = _STEPS.get((kind, version))
        if step is None:
            raise StateCorruptedError(f"there is no migration from {kind}/{version}", kind=kind)
        body = step(dict(body))
        version += 1
    return body


@lru_cache(maxsize=1024)
def parse_schema(schema: str) -> tuple[str, int]:
    """``agents/1`` as its name and number. Raises ``StateCorruptedError``."""
    name, _, number = schema.rpartition("/")
    if not name or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise StateCorruptedError(f"{schema!r:.80} is not a schema such as agents/1")
    return name, int(number)


# Version 0 is the layout from before this library: its metadata was `_version: "1.0"`, with
# `_saved_at` and `_session_id`, and the kind was not stored.


@migration("agents", 0)
@migration("sleep", 0)
@migration("system", 0)
def m001_drop_version(body: JsonObject) -> JsonObject:
    """``_schema`` replaced ``_version``."""
    body.pop("_version", None)
    return body


@migration("task_queues", 0)
def m001_name_the_lists(body: JsonObject) -> JsonObject:
    """A queue had only the lists it needed; now it has all three."""
    body.pop("_version", None)
    for name in ("pending_tasks", "in_progress_tasks", "completed_tasks"):
        body.setdefault(name, [])
    return body
