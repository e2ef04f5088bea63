"""``agent-state import legacy``: bring over what this library's ancestors have stored."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from agent_state.cli.options import OK, PROBLEM, JsonOption, StateOption, given_keyring
from agent_state.cli.output import print_line, show_json
from agent_state.legacy import LegacyReport, import_legacy
from agent_state.manager import StatePersistenceManager
from agent_state.storage import MemoryStateStore, ReadOnlyStateStore


def legacy(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What an ancestor has written; it may be --state.")
    ],
    state: StateOption = Path("state"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only report what would be brought over.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over agents, tasks, sleep and mail from DIR, each file once.

    Known are the files of the first StatePersistenceManager (`tasks/<agent>_tasks.json`,
    `sleep/<agent>_sleep.json`, `agents/<session>.json`), its planned layout (`mail/mailboxes.json`,
    `mail/mail_history.json`, `system/active_sessions.json`), and whole queues and mailboxes. What
    is stored in --state already is not changed. Exit 1 if a file was not brought over. A server
    does the same with its own directory when it starts.

    Example: agent-state import legacy old --state new --dry-run
    """

    async def work() -> LegacyReport:
        async with _opened(state, dry_run=dry_run) as manager:
            return await import_legacy(manager, directory, dry_run=dry_run)

    report = asyncio.run(work())
    if as_json:
        show_json(report.to_dict())
    else:
        for line in report.lines() or ["there was nothing to bring over"]:
            print_line(line)
        if dry_run:
            print_line("This is what would be brought over; nothing was changed.")
    raise typer.Exit(PROBLEM if report.kept else OK)


def _opened(state: Path, *, dry_run: bool) -> StatePersistenceManager:
    """A manager of the state directory; a dry run makes and changes none."""
    if not dry_run:
        return StatePersistenceManager(state, encryption=given_keyring())
    store = ReadOnlyStateStore(state) if state.is_dir() else MemoryStateStore()
    return StatePersistenceManager(store=store, encryption=given_keyring())
