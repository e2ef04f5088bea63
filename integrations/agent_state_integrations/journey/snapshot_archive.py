"""Snapshots of journeys in a vector store, to be searched by what they are about.

The stored sessions are the truth; an archive is a copy of their snapshots, which
``archive_snapshots`` brings up to date as often as it is called. ``SnapshotArchive`` is what a
vector store has to do; ``chroma_archive.ChromaSnapshotArchive`` is the first one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from agent_state.manager import StatePersistenceManager
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.fields import KIND

_BATCH = 100
_TEXTS = ("current_theme", "therapeutic_focus", "client_state_summary", "session_notes")


@dataclass(frozen=True, slots=True)
class ArchivedSnapshot:
    """One snapshot of a session."""

    archive_id: str
    """``if://archive/<session>/<id>``, as ``snapshot_session_state`` returns it."""
    user_id: str
    session_id: str
    timestamp: str
    """The time at which it was taken."""
    emotion: str
    """The client's emotion at that time."""
    text: str
    """The theme, the focus, the client's state, the notes and the hypotheses, a line for each."""


class SnapshotArchive(Protocol):
    """A vector store that holds snapshots."""

    async def missing(self, archive_ids: Sequence[str]) -> set[str]:
        """Those of these ids that are not stored."""

    async def add(self, snapshots: Sequence[ArchivedSnapshot]) -> None:
        """Store these snapshots; one that is stored already is replaced."""

    async def search(self, user_id: str, text: str, *, limit: int = 5) -> list[ArchivedSnapshot]:
        """The user's snapshots whose texts are nearest to this one, the nearest first."""

    async def sessions(self, user_id: str | None = None) -> set[tuple[str, str]]:
        """The user and session of every snapshot; of one user's, if one is given."""

    async def erase(self, user_id: str, session_id: str) -> None:
        """Remove every snapshot of a session; a no-op when there is none."""


async def archive_snapshots(
    manager: StatePersistenceManager, archive: SnapshotArchive, user_id: str | None = None
) -> int:
    """Store the snapshots of all sessions, or of one user's, that the archive lacks; how many.

    What the archive has of sessions that were erased, it erases. Sessions off the record are in no
    manager, and never archived. After an error, call it again.
    """
    added = 0
    prefix = () if user_id is None else (user_id,)
    archived = await archive.sessions(user_id)
    stored = {key for key in await manager.keys(KIND, prefix) if len(key) == 2}
    for gone in sorted(archived - stored):
        await archive.erase(*gone)
    for key in sorted(stored):
        waiting: list[ArchivedSnapshot] = []
        async with aclosing(_snapshots(manager, *key)) as snapshots:
            async for snapshot in snapshots:
                waiting.append(snapshot)
                if len(waiting) == _BATCH:
                    added += await _add_missing(archive, waiting)
                    waiting = []
        added += await _add_missing(archive, waiting)
    return added


async def _add_missing(archive: SnapshotArchive, snapshots: list[ArchivedSnapshot]) -> int:
    if not snapshots:
        return 0
    lacking = await archive.missing([each.archive_id for each in snapshots])
    new = [each for each in snapshots if each.archive_id in lacking]
    if new:
        await archive.add(new)
    return len(new)


async def _snapshots(
    manager: StatePersistenceManager, user_id: str, session_id: str
) -> AsyncGenerator[ArchivedSnapshot, None]:
    entries = manager.read_log(KIND, (user_id, session_id, "events"))
    async with aclosing(entries):
        async for entry in entries:
            event = entry.record
            archive_id = event.get("tracking_id")
            if isinstance(archive_id, str) and archive_id.startswith("if://archive/"):
                emotion = _object(event.get("emotion")).get("emotion")
                yield ArchivedSnapshot(
                    archive_id,
                    user_id,
                    session_id,
                    str(event.get("timestamp") or event.get("at") or ""),
                    str(emotion or ""),
                    _text_of(_object(event.get("context_snapshot"))),
                )


def _text_of(context: JsonObject) -> str:
    lines = [context.get(name) for name in _TEXTS]
    hypotheses = context.get("working_hypotheses")
    lines += hypotheses if isinstance(hypotheses, list) else []
    return "\n".join(str(line) for line in lines if line)


def _object(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}
