"""Transcripts of the Claude Agent SDK: each is one log, with a document that lists the session.

Needs the extra ``claude-agent-sdk``. See ``docs/integrations/claude-agent-sdk.md``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

from agent_state import StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, as_segment, from_segment
from agent_state.errors import Key, needs_extra
from agent_state.protocols import Durability, JsonObject

with needs_extra("claude-agent-sdk", "claude_agent_sdk"):
    from claude_agent_sdk import (
        SessionKey,
        SessionStore,
        SessionStoreEntry,
        SessionStoreListEntry,
        SessionSummaryEntry,
        fold_session_summary,
    )

KIND = "claude_sessions"
"""The kind of the transcripts and of the documents that list the sessions."""
_SUBPATHS = "subpaths"
_TRANSCRIPTS_IN_MEMORY = 256


@dataclass(slots=True)
class _KnownTranscript:
    """Which entries a transcript has, up to a record of its log."""

    seq: int = 0
    uuids: set[str] = field(default_factory=set)


class AgentStateSessionStore(SessionStore):
    """Keeps transcripts of the Claude Agent SDK in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.

    A batch is stored whole or not at all; an entry whose ``uuid`` the transcript has is left out,
    so the SDK's retries double nothing. An append goes on to its end when the SDK has given up
    waiting for it. Any number of processes may write. Entries come back with sorted keys.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._known: OrderedDict[Key, _KnownTranscript] = OrderedDict()

    async def __aenter__(self) -> Self:
        await self._access.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close a directory that was opened here."""
        await self._access.close()

    # -- the SDK's protocol ------------------------------------------------------------------------

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Append entries in order; none is a no-op. Raises as a manager's ``append``."""
        if entries:
            batch = [dict(entry) for entry in entries]
            await self._access.run(lambda m: self._append(m, key, batch))

    async def load(self, key: SessionKey) -> list[SessionStoreEntry] | None:
        entries = await self._access.run(lambda m: _entries(m, _log_of(key)))
        return cast("list[SessionStoreEntry]", entries) if entries else None

    async def list_sessions(self, project_key: str) -> list[SessionStoreListEntry]:
        listed = await self._access.run(lambda m: _listed(m, project_key))
        return [{"session_id": name, "mtime": found["mtime"]} for name, found in listed]

    async def list_session_summaries(self, project_key: str) -> list[SessionSummaryEntry]:
        listed = await self._access.run(lambda m: _listed(m, project_key))
        return [
            cast("SessionSummaryEntry", {**found["summary"], "mtime": found["mtime"]})
            for _, found in listed
        ]

    async def delete(self, key: SessionKey) -> None:
        """Erase a session with its sub-agents' transcripts, or one of these; no copy is kept."""
        gone = _log_of(key) if key.get("subpath") else _session_of(key)
        await self._access.run(lambda m: m.erase(KIND, gone))

    async def list_subkeys(self, key: Any) -> list[str]:
        prefix = (*_session_of(key), _SUBPATHS)
        logs = await self._access.run(lambda m: m.store.logs(KIND, prefix))
        return [from_segment(log[-1]) for log in logs]

    # -- on the loop of the state ----------------------------------------------------------------

    async def _append(
        self, manager: StatePersistenceManager, key: SessionKey, entries: list[JsonObject]
    ) -> None:
        session, log = _session_of(key), _log_of(key)
        async with manager.lock(KIND, session):
            known = await self._refreshed(manager, log)
            new = [*_without_repeats(entries, known.uuids)]
            if not new:
                return
            group = manager.new_group()
            for entry in new:
                group.append(KIND, log, {"entry": entry})
            if not key.get("subpath"):
                group.save(KIND, session, await _with_summary(manager, key, new))
            await manager.commit(group)

    async def _refreshed(self, manager: StatePersistenceManager, log: Key) -> _KnownTranscript:
        """What the transcript has now. Its log may have been erased, and begun again."""
        known = self._known.setdefault(log, _KnownTranscript())
        self._known.move_to_end(log)
        if len(self._known) > _TRANSCRIPTS_IN_MEMORY:
            self._known.popitem(last=False)
        ends_there = known.seq == 0
        async with aclosing(manager.read_log(KIND, log, after=max(known.seq - 1, 0))) as records:
            async for record in records:
                ends_there = ends_there or record.seq == known.seq
                known.seq = record.seq
                known.uuids.update(_uuids([record.record["entry"]]))
        if not ends_there:
            del self._known[log]
            return await self._refreshed(manager, log)
        return known


def _session_of(key: Any) -> Key:
    return (as_segment(key["project_key"]), as_segment(key["session_id"]))


def _log_of(key: SessionKey) -> Key:
    subpath = key.get("subpath")
    session = _session_of(key)
    return (*session, _SUBPATHS, subpath) if subpath else (*session, "transcript")


def _uuids(entries: Iterable[JsonObject]) -> Iterable[str]:
    return (entry["uuid"] for entry in entries if isinstance(entry.get("uuid"), str))


def _without_repeats(entries: Iterable[JsonObject], known: set[str]) -> Iterable[JsonObject]:
    seen = set(known)
    for entry in entries:
        uuid = entry.get("uuid")
        if isinstance(uuid, str):
            if uuid in seen:
                continue
            seen.add(uuid)
        yield entry


async def _entries(manager: StatePersistenceManager, log: Key) -> list[JsonObject]:
    async with aclosing(manager.read_log(KIND, log)) as records:
        return [record.record["entry"] async for record in records]


async def _with_summary(
    manager: StatePersistenceManager, key: SessionKey, entries: list[JsonObject]
) -> JsonObject:
    """The document of a session after these entries; its time is later than the one before."""
    stored = await manager.load(KIND, _session_of(key))
    before = stored.model_dump() if stored is not None else {}
    now = int(manager.clock.now().timestamp() * 1000)
    mtime = max(now, before.get("mtime", 0) + 1)
    batch = cast("list[SessionStoreEntry]", entries)
    summary = fold_session_summary(before.get("summary"), key, batch)
    return {"mtime": mtime, "summary": {**summary, "mtime": mtime}}


async def _listed(
    manager: StatePersistenceManager, project_key: str
) -> list[tuple[str, JsonObject]]:
    return [
        (from_segment(stored.key[1]), stored.state.model_dump())
        async for stored in manager.scan(KIND, as_segment(project_key))
        if len(stored.key) == 2
    ]
