"""The commands that check a state directory and tidy it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from agent_state.cleanup import clean
from agent_state.cli import display
from agent_state.cli.options import (
    OK,
    PROBLEM,
    STATE,
    DryRunOption,
    JsonOption,
    StateOption,
    given_keyring,
)
from agent_state.cli.output import Advance, progress, show_json
from agent_state.codec import StoredState
from agent_state.errors import Key, StateNotFoundError
from agent_state.legacy import import_legacy
from agent_state.manager import StatePersistenceManager
from agent_state.runtime.recovery import plan_restore
from agent_state.storage import ReadOnlyStateStore, paths
from agent_state.verify import verify as verify_directory

_SCANNED = ("agents", "tasks", "sleep", "mail")


def verify(state: StateOption = STATE, as_json: JsonOption = False) -> None:
    """Check every document, log and journal record; exit 1 if one cannot be used.

    Works while a server runs or on the directory of a dead one, and changes nothing. The
    check uses the built-in models, not the validator of an application.

    Example: agent-state verify --json
    """
    with progress("checking") as advance:
        report = asyncio.run(verify_directory(state, encryption=given_keyring(), progress=advance))
    show_json(report.to_dict()) if as_json else display.show_verified(report)
    raise typer.Exit(OK if report.ok else PROBLEM)


def restore(
    state: StateOption = STATE, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Recover a directory after a crash, as a starting server does.

    Completes the journal, moves damaged files to the quarantine and restores their last good
    versions, and brings over what an ancestor of this library has left. No agent runs; tasks
    and sleepers are only reported. Exit 1 if a file was damaged.

    Example: agent-state restore --dry-run
    """

    async def work(advance: Advance) -> Any:
        async with _opened(state, dry_run, advance, exclusive=True) as manager:
            legacy = await import_legacy(manager, state, dry_run=dry_run)
            report = await plan_restore(manager, clock=manager.clock)
            report.legacy = legacy
            return report

    with progress("restoring") as advance:
        report = asyncio.run(work(advance))
    if as_json:
        show_json({"dry_run": dry_run, **report.to_dict()})
    else:
        display.show_restored(report, dry_run=dry_run)
    raise typer.Exit(PROBLEM if report.contained else OK)


def cleanup(
    state: StateOption = STATE,
    max_age_hours: Annotated[
        float, typer.Option(help="Keep documents that were saved more recently.", min=0)
    ] = 24,
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="Move dead tasks, too, which else stay.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move finished, old documents into archive logs; keep those that are still needed.

    Finished are completed and cancelled tasks, mail that was read and awaits no reply,
    the sleep of awake agents, and stopped agents with nothing left to do. Nothing is lost:
    `show tasks/alice/archive` shows it. Refused while a server owns the directory.

    Example: agent-state cleanup --max-age-hours 72 --dry-run
    """

    async def work(advance: Advance) -> Any:
        async with _opened(state, dry_run, advance) as manager:
            report = await clean(manager, max_age_hours, dead_letters=dead_letters, dry_run=dry_run)
            return report, manager.incidents()

    with progress("cleaning up") as advance:
        report, unusable = asyncio.run(work(advance))
    if as_json:
        show_json({**report.to_dict(), "unusable": [asdict(one) for one in unusable]})
    else:
        display.show_cleaned(report, unusable)
    raise typer.Exit(PROBLEM if unusable else OK)


@asynccontextmanager
async def _opened(
    state_dir: Path, dry_run: bool, advance: Advance, *, exclusive: bool = False
) -> AsyncIterator[StatePersistenceManager]:
    """A manager that reports its progress; a dry run opens it for reading only.

    Raises ``StateNotFoundError``, and ``StateDirectoryInUseError`` while a server runs there.
    """
    # A store that writes would create the directory; a misspelt path must not.
    path = paths.resolve_root(state_dir)
    if not os.path.isdir(path):  # noqa: ASYNC240, PTH112  # once, before anything runs
        raise StateNotFoundError("there is no such state directory", path=path)
    if dry_run:
        manager = _ProgressManager(store=ReadOnlyStateStore(state_dir), encryption=given_keyring())
    else:
        manager = _ProgressManager(state_dir, exclusive=exclusive, encryption=given_keyring())
    async with manager:
        await manager.report_to(advance)
        yield manager


class _ProgressManager(StatePersistenceManager):
    """Reports how many of the scanned documents are done."""

    async def report_to(self, advance: Advance) -> None:
        """Count the documents that are going to be scanned."""
        self._advance = advance
        self._done = 0
        self._total = sum([len(await self.keys(kind)) for kind in _SCANNED])

    async def scan(
        self, kind: str, prefix: Key | str = (), **where: Any
    ) -> AsyncGenerator[StoredState, None]:
        async for stored in super().scan(kind, prefix, **where):
            self._done += 1
            self._advance(self._done, self._total)
            yield stored
