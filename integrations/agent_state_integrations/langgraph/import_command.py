"""``agent-state import langgraph``: checkpoints and items of LangGraph's SQLite databases."""

from __future__ import annotations

import asyncio
import sqlite3
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import orjson
import typer

from agent_state import AgentStateError, MemoryStateStore, StateNotFoundError
from agent_state.access import StateAccess, StateLocation
from agent_state.cli.options import STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, show_import
from agent_state.errors import needs_extra

with needs_extra("langgraph-sqlite", "langgraph", "langchain_core"):
    from langgraph.checkpoint.sqlite import SqliteSaver

    from agent_state_integrations.langgraph.migration import (
        StoredItem,
        import_checkpoints,
        import_item,
    )
    from agent_state_integrations.langgraph.saver import AgentStateSaver


@dataclass(slots=True)
class DatabaseImport:
    """What was brought over from a database of ``SqliteSaver``, ``SqliteStore`` or both."""

    threads: int = 0
    checkpoints: int = 0
    items: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Threads and items that could not be brought over whole, with the reason."""


def import_database(
    database: Path, state: StateLocation, *, dry_run: bool = False
) -> DatabaseImport:
    """Bring over every thread and item of a database, and compare each with what it was.

    The database is opened for reading only. One thread at a time is held in memory. ``dry_run``:
    only count. Raises ``StateNotFoundError`` for a file that is no such database.
    """
    report = DatabaseImport()
    where = f"{database.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(where, uri=True, check_same_thread=False)) as connection:
            query = "SELECT name FROM sqlite_master WHERE type = 'table'"
            tables = {name for (name,) in connection.execute(query)}
            if not tables & {"checkpoints", "store"}:
                raise StateNotFoundError("it has neither checkpoints nor items", path=database)
            if "checkpoints" in tables:
                _bring_threads(connection, state, report, dry_run)
            if "store" in tables:
                items = _items(connection, with_vectors="store_vectors" in tables)
                asyncio.run(_bring_items(items, state, report, dry_run))
    except sqlite3.Error as error:
        raise StateNotFoundError(f"no checkpoints can be read: {error}", path=database) from error
    return report


def _bring_threads(
    connection: sqlite3.Connection, state: StateLocation, report: DatabaseImport, dry_run: bool
) -> None:
    theirs = SqliteSaver(connection)
    theirs.is_setup = True  # its tables are there, and may not be written
    query = "SELECT thread_id, count(*) FROM checkpoints GROUP BY thread_id ORDER BY 1"
    with AgentStateSaver(MemoryStateStore() if dry_run else state) as saver:
        for thread, count in connection.execute(query).fetchall():
            report.threads += 1
            report.checkpoints += count
            if dry_run:
                continue
            try:
                import_checkpoints(theirs.list({"configurable": {"thread_id": thread}}), saver)
            except AgentStateError as error:
                report.refused[thread] = str(error)


async def _bring_items(
    items: Iterator[StoredItem], state: StateLocation, report: DatabaseImport, dry_run: bool
) -> None:
    async with StateAccess(MemoryStateStore() if dry_run else state) as access:
        for item in items:
            report.items += 1
            if dry_run:
                continue
            try:
                await access.run(partial(import_item, item=item))
            except AgentStateError as error:
                report.refused["/".join((*item.namespace, item.key))] = str(error)


def _items(connection: sqlite3.Connection, *, with_vectors: bool) -> Iterator[StoredItem]:
    vectors = "SELECT field_name, embedding FROM store_vectors WHERE prefix = ? AND key = ?"
    query = (
        "SELECT prefix, key, value, created_at, updated_at, expires_at, ttl_minutes FROM store"
        " ORDER BY prefix, key"
    )
    for prefix, key, value, created, updated, expires, minutes in connection.execute(query):
        item = StoredItem(
            tuple(prefix.split(".")),
            key,
            orjson.loads(value),
            _time(created),
            _time(updated),
            _time(expires) if expires is not None else None,
            minutes,
        )
        if with_vectors:
            for name, blob in connection.execute(vectors, (prefix, key)):
                item.vectors[name] = array("f", blob).tolist()
        yield item


def _time(text: str) -> datetime:
    """A time as SQLite or Python wrote it, in UTC either way."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def import_langgraph(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The database of a SqliteSaver or SqliteStore.")
    ],
    state: StateOption = STATE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over the checkpoints and items of LangGraph's SQLite database, and compare both sides.

    What is stored in --state already stays; a second run changes nothing. Exit 1 if a thread or
    an item could not be brought over whole.

    Example: agent-state import langgraph checkpoints.db --state state --dry-run
    """
    report = import_database(file, state, dry_run=dry_run)
    checkpoints = counted(report.checkpoints, "checkpoint")
    what = f"{checkpoints} of {counted(report.threads, 'thread')}"
    if report.items:
        what += f" and {counted(report.items, 'item')}"
    raise typer.Exit(show_import(report, what, dry_run=dry_run, as_json=as_json))
