"""Sessions of the OpenAI Agents SDK: each conversation is one log of JSON records.

Needs the extra ``openai-agents``. See ``docs/integrations/openai-agents.md``.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import typer

from agent_state import (
    AgentStateError,
    RevisionConflictError,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.access import StateAccess, StateLocation, as_segment, from_segment
from agent_state.cli.options import STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, print_line, show_import
from agent_state.clock import instant, stamp
from agent_state.errors import Key, needs_extra
from agent_state.manager import LogEntry
from agent_state.protocols import Durability, JsonObject

with needs_extra("openai-agents", "agents"):
    from agents import Agent, RunState
    from agents.items import TResponseInputItem
    from agents.memory.session_settings import (
        SessionSettings,
        coerce_session_settings,
        resolve_session_limit,
    )

KIND = "openai_sessions"
"""The kind of the conversations and of what is known of each."""
_WINDOW = 64
"""Records that are read at once from the end of a log."""
_ITEMS_AT_ONCE = 500
"""Items of an imported session that are one record."""


class AgentStateSession:
    """One conversation of the OpenAI Agents SDK, kept in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.
    ``session_settings``: the SDK's, or their fields; ``limit`` holds where ``get_items`` has none.
    ``ttl``: the seconds after the last added items in which the session lives; None for ever.

    Items that are added together are stored together. Any number of sessions, processes and tasks
    may add to one conversation. After ``close`` every method raises ``RuntimeError``.
    """

    def __init__(
        self,
        state: StateLocation,
        session_id: str,
        session_settings: SessionSettings | dict[str, Any] | None = None,
        *,
        ttl: float | None = None,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        if ttl is not None and not ttl > 0:
            raise ValueError(f"ttl is a positive number of seconds, not {ttl!r}")
        self.session_id = session_id
        self.session_settings = coerce_session_settings(session_settings or {})
        self._ttl = timedelta(seconds=ttl) if ttl is not None else None
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._key: Key = (as_segment(session_id),)
        self._log: Key = (*self._key, "items")
        self._closed = False

    # -- life ----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._open_access().open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the use of this object, and close a directory that was opened for it."""
        self._closed = True
        await self._access.close()

    def close(self) -> None:
        """``aclose`` for a caller that cannot await."""
        self._closed = True
        self._access.close_blocking()

    def _open_access(self) -> StateAccess:
        if self._closed:
            raise RuntimeError(f"the session {self.session_id!r} is closed")
        return self._access

    # -- the SDK's protocol ------------------------------------------------------------------------

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The items in order; with a limit, the last so many. 0 or less: none."""
        wanted = resolve_session_limit(limit, self.session_settings)
        if wanted is not None and wanted <= 0:
            self._open_access()
            return []
        return await self._open_access().run(lambda m: self._read(m, wanted))

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Add items, all or none. Raises ``SerializationError`` for what is not JSON."""
        access = self._open_access()
        if items:
            added = [dict(item) for item in items]
            await access.run(lambda m: self._add(m, {"items": added}))

    async def pop_item(self) -> TResponseInputItem | None:
        """Remove the last item and return it; None if there is none."""
        return await self._open_access().run(self._pop)

    async def clear_session(self) -> None:
        """Remove all items, and the saved run; what they were is gone from the disk."""
        await self._open_access().run(self._clear)

    # -- more than the SDK asks for --------------------------------------------------------------

    async def metadata(self) -> JsonObject:
        """What was kept with ``update_metadata``."""
        return await self._open_access().run(lambda m: _metadata(m, (*self._key, "metadata")))

    async def update_metadata(self, **fields: Any) -> None:
        """Keep fields beside the conversation, such as a title; others stay as they are."""
        key = (*self._key, "metadata")
        await self._open_access().run(lambda m: _update(m, key, fields))

    async def save_run_state(self, run_state: RunState[Any]) -> None:
        """Keep an interrupted run beside the conversation, in place of the one before."""
        body = {"run": run_state.to_json()}
        await self._open_access().run(lambda m: m.save(KIND, (*self._key, "run"), body))

    async def load_run_state(self, agent: Agent[Any]) -> RunState[Any] | None:
        """The run that was kept, to go on with; None if there is none."""
        found = await self._open_access().run(lambda m: _metadata(m, (*self._key, "run")))
        return await RunState.from_json(agent, found["run"]) if found else None

    async def delete_run_state(self) -> None:
        """Forget the run that was kept; a no-op if there is none."""
        await self._open_access().run(lambda m: m.delete(KIND, (*self._key, "run")))

    # -- on the loop of the state ----------------------------------------------------------------

    async def _add(self, manager: StatePersistenceManager, record: JsonObject) -> None:
        if self._ttl is not None:
            record["at"] = stamp(manager.clock.now())
            await self._remove_expired(manager)
        await manager.append(KIND, self._log, record)

    async def _read(
        self, manager: StatePersistenceManager, limit: int | None
    ) -> list[TResponseInputItem]:
        """The last items, from the end of the log, as far back as they reach."""
        if await self._is_expired(manager):
            return []
        window = _WINDOW if limit is not None else None
        while True:
            records = await self._records(manager, window)
            items, complete = _remaining(records, limit)
            if complete or window is None or len(records) < window or records[0].seq == 1:
                return items
            window *= 4

    async def _pop(self, manager: StatePersistenceManager) -> TResponseInputItem | None:
        async with manager.lock(KIND, self._log):
            last = await self._read(manager, 1)
            if not last:
                return None
            await manager.append(KIND, self._log, {"pop": 1})
            return last[0]

    async def _clear(self, manager: StatePersistenceManager) -> None:
        await manager.erase(KIND, self._log)
        await manager.delete(KIND, (*self._key, "run"))

    async def _records(
        self, manager: StatePersistenceManager, last: int | None
    ) -> Sequence[LogEntry]:
        async with aclosing(manager.read_log(KIND, self._log, last=last)) as records:
            return [record async for record in records]

    async def _is_expired(self, manager: StatePersistenceManager) -> bool:
        if self._ttl is None:
            return False
        for record in await self._records(manager, 1):
            at = record.record.get("at")
            if at is not None:
                return instant(at) + self._ttl <= manager.clock.now()
        return False

    async def _remove_expired(self, manager: StatePersistenceManager) -> None:
        if await self._is_expired(manager):
            async with manager.lock(KIND, self._log):
                if await self._is_expired(manager):  # and no other was first
                    await self._clear(manager)


async def list_sessions(state: StateLocation) -> list[str]:
    """The ids of the sessions that have items, sorted."""
    async with StateAccess(state) as access:
        return await access.run(_session_ids)


async def delete_session(state: StateLocation, session_id: str) -> bool:
    """Remove a session with all that is kept beside it; True if there was one."""
    async with StateAccess(state) as access:
        return await access.run(lambda m: _erase(m, as_segment(session_id)))


async def _erase(manager: StatePersistenceManager, segment: str) -> bool:
    return await manager.erase(KIND, (segment,)) > 0


async def _session_ids(manager: StatePersistenceManager) -> list[str]:
    return sorted(from_segment(key[0]) for key in await manager.store.logs(KIND) if len(key) == 2)


async def _metadata(manager: StatePersistenceManager, key: Key) -> JsonObject:
    found = await manager.load(KIND, key)
    return found.model_dump() if found is not None else {}


async def _update(manager: StatePersistenceManager, key: Key, fields: Mapping[str, Any]) -> None:
    while True:
        stored = await manager.load_with_revision(KIND, key)
        before = stored.state.model_dump() if stored is not None else {}
        revision = stored.revision if stored is not None else 0
        try:
            await manager.save(KIND, key, {**before, **fields}, expected=revision)
        except RevisionConflictError:
            await asyncio.sleep(0)
            continue
        return


def _remaining(
    records: Sequence[LogEntry], limit: int | None
) -> tuple[list[TResponseInputItem], bool]:
    """The items that were not popped, read from the end; whether that is all that is wanted."""
    found: list[TResponseInputItem] = []
    popped = 0
    for entry in reversed(records):
        popped += entry.record.get("pop", 0)
        items = entry.record.get("items", [])
        kept = items[: max(len(items) - popped, 0)]
        popped -= len(items) - len(kept)
        found += reversed(kept)
        if limit is not None and len(found) >= limit:
            return found[limit - 1 :: -1], True
    return found[::-1], limit is None


# -- agent-state import openai -------------------------------------------------------------------


@dataclass(slots=True)
class ItemImport:
    """What was brought over from the database of ``SQLiteSession``."""

    sessions: int = 0
    items: int = 0
    unreadable: int = 0
    """Rows that are no JSON; the SDK leaves them out when it reads, too."""
    refused: dict[str, str] = field(default_factory=dict)
    """Sessions that could not be brought over whole, with the reason."""


async def import_items(
    database: Path, state: StateLocation, *, dry_run: bool = False, table: str = "agent_messages"
) -> ItemImport:
    """Bring over the sessions of a ``SQLiteSession``, and read them back.

    ``table``: the session's ``messages_table``. A session that is stored here with the beginning of
    its items is completed, so a second run goes on with the first; one with other items is refused.
    ``dry_run``: only count. Raises ``StateNotFoundError`` for a file without the table.
    """
    report = ItemImport()
    for session_id, rows in await asyncio.to_thread(_rows, database, table):
        items = []
        for row in rows:
            try:
                items.append(json.loads(row))
            except ValueError:
                report.unreadable += 1
        report.sessions += 1
        report.items += len(items)
        if dry_run:
            continue
        async with AgentStateSession(state, session_id) as session:
            try:
                await _complete(session, items)
            except AgentStateError as error:
                report.refused[session_id] = error.message
    return report


async def _complete(session: AgentStateSession, items: list[TResponseInputItem]) -> None:
    before = await session.get_items()
    if before != items[: len(before)]:
        raise StateValidationError(f"session {session.session_id!r} has other items already")
    for start in range(len(before), len(items), _ITEMS_AT_ONCE):
        await session.add_items(items[start : start + _ITEMS_AT_ONCE])
    if await session.get_items() != items:
        raise StateValidationError(f"session {session.session_id!r} does not come back as it was")


def _rows(database: Path, table: str) -> list[tuple[str, list[str]]]:
    """The rows of each session in their order. The database is opened for reading only."""
    quoted = '"' + table.replace('"', '""') + '"'
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as found:
            rows = found.execute(
                f"SELECT session_id, message_data FROM {quoted} ORDER BY session_id, id"  # noqa: S608  # it is quoted
            ).fetchall()
    except sqlite3.Error as error:
        raise StateNotFoundError(f"no sessions can be read: {error}", path=database) from error
    return [(name, [row for _, row in each]) for name, each in groupby(rows, lambda row: row[0])]


def import_openai(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The database of SQLiteSession.")],
    state: StateOption = STATE,
    table: Annotated[
        str, typer.Option("--table", help="The table of the messages.")
    ] = "agent_messages",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over the sessions of an SQLiteSession of the OpenAI Agents SDK, and compare both sides.

    What is stored in --state already is not changed; a second run goes on with the first. Exit 1
    if a session could not be brought over whole.

    Example: agent-state import openai sessions.db --state state --dry-run
    """
    report = asyncio.run(import_items(file, state, dry_run=dry_run, table=table))
    if report.unreadable and not as_json:
        print_line(f"{counted(report.unreadable, 'row')} could not be read, and were left out")
    what = f"{counted(report.sessions, 'session')} with {counted(report.items, 'item')}"
    raise typer.Exit(show_import(report, what, dry_run=dry_run, as_json=as_json))
