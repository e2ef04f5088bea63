"""The history of each schema, as pure functions read from top to bottom.

A document names its schema and version (``agents/1``). A step takes the body of one version
and gives the body of the next; it never sees a file. Old documents are migrated when they
are read and written in today's form at their next save.
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
    "sessions": 1,
    "session_lives": 1,
    "session_states": 1,
    "session_tokens": 1,
    "session_users": 1,
    "journeys": 1,
    "record_checkpoints": 1,
}
"""Today's version of each schema; a schema that is not here is at 1."""

_STEPS: dict[tuple[str, int], Migration] = {}


def migration(kind: str, version: int) -> Callable[[Migration], Migration]:
    """Register the step from ``version`` to the next. One step for each version."""

    def register(step: Migration) -> Migration:
        if (kind, version) in _STEPS:
            raise ValueError(f"{kind}/{version} has a migration already")
        _STEPS[kind, version] = step
        return step

    return register


def schema_of(kind: str) -> str:
    """Today's schema of a kind: ``agents/1``."""
    return f"{kind}/{VERSIONS.get(kind, 1)}"


def migrate(schema: str, body: JsonObject) -> JsonObject:
    """The body in today's version of its schema.

    Raises ``SchemaTooNewError`` for a version newer than the code knows, and
    ``StateCorruptedError`` for a schema that is no schema, or a version with no way on.
    """
    kind, version = parse_schema(schema)
    today = VERSIONS.get(kind, 1)
    if version > today:
        raise SchemaTooNewError(
            f"{schema} is newer than {kind}/{today}, the newest this version knows", kind=kind
        )
    while version < today:
        step = _STEPS.get((kind, version))
        if step is None:
            raise StateCorruptedError(f"no migration leads on from {kind}/{version}", kind=kind)
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


# Version 0 is the layout that came before this library: metadata was `_version: "1.0"` beside
# `_saved_at` and `_session_id`, and nothing else told one kind from another.


@migration("agents", 0)
@migration("sleep", 0)
@migration("system", 0)
def m001_drop_version(body: JsonObject) -> JsonObject:
    """``_version`` gave way to ``_schema``."""
    body.pop("_version", None)
    return body


@migration("task_queues", 0)
def m001_name_the_lists(body: JsonObject) -> JsonObject:
    """A queue kept only the lists it needed; all three are there now."""
    body.pop("_version", None)
    for name in ("pending_tasks", "in_progress_tasks", "completed_tasks"):
        body.setdefault(name, [])
    return body
