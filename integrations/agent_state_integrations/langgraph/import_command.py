"""``agent-state import langgraph``: the checkpoints of a SqliteSaver, in a state directory."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from agent_state import MemoryStateStore
from agent_state.cli.options import OK, PROBLEM, STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, print_error, print_line, show_json
from agent_state.errors import AgentStateError, StateNotFoundError, needs_extra

with needs_extra("langgraph-sqlite", "langgraph", "langchain_core"):
    from langgraph.checkpoint.sqlite import SqliteSaver

    from agent_state_integrations.langgraph.migration import import_checkpoints
    from agent_state_integrations.langgraph.saver import AgentStateSaver


@dataclass(slots=True)
class CheckpointImport:
    """What was brought over from a database of ``SqliteSaver``."""

    threads: int = 0
    checkpoints: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Threads that could not be brought over whole, with the reason."""


def import_database(
    database: Path, saver: AgentStateSaver, *, dry_run: bool = False
) -> CheckpointImport:
    """Bring over every thread of a database, and compare each checkpoint with what it was.

    The database is opened for reading only. One thread at a time is held in memory. ``dry_run``:
    only count. Raises ``StateNotFoundError`` for a file that is no such database.
    """
    report = CheckpointImport()
    where = f"{database.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(where, uri=True, check_same_thread=False)) as connection:
            theirs = SqliteSaver(connection)
            theirs.is_setup = True  # its tables are there, and may not be written
            query = "SELECT thread_id, count(*) FROM checkpoints GROUP BY thread_id ORDER BY 1"
            for thread, count in connection.execute(query).fetchall():
                report.threads += 1
                report.checkpoints += count
                if dry_run:
                    continue
                try:
                    import_checkpoints(theirs.list({"configurable": {"thread_id": thread}}), saver)
                except AgentStateError as error:
                    report.refused[thread] = str(error)
    except sqlite3.Error as error:
        raise StateNotFoundError(f"no checkpoints can be read: {error}", path=database) from error
    return report


def import_langgraph(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The database of a SqliteSaver.")],
    state: StateOption = STATE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over the checkpoints of a SqliteSaver of LangGraph, and compare both sides.

    What is stored in --state already stays; a second run changes nothing. Exit 1 if a thread
    could not be brought over whole.

    Example: agent-state import langgraph checkpoints.db --state state --dry-run
    """
    with AgentStateSaver(MemoryStateStore() if dry_run else state) as saver:
        report = import_database(file, saver, dry_run=dry_run)
    if as_json:
        show_json(asdict(report))
    else:
        what = counted(report.checkpoints, "checkpoint")
        done = "would be" if dry_run else "are"
        print_line(f"{what} of {counted(report.threads, 'thread')} {done} brought over")
        for name, why in report.refused.items():
            print_error(f"not brought over: {name}: {why}")
    raise typer.Exit(PROBLEM if report.refused else OK)
