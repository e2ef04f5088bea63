"""The commands that inspect a state directory, check it and tidy it."""

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
from agent_state.cli.inspector import Inspector, open_inspector
from agent_state.cli.options import OK, PROBLEM, JsonOption, StateOption, given_keyring
from agent_state.cli.output import Advance, progress, show_json
from agent_state.cli.sizes import measure, show_sizes, warn_above
from agent_state.codec import StoredState
from agent_state.errors import Key, StateNotFoundError
from agent_state.legacy import import_legacy
from agent_state.manager import StatePersistenceManager
from agent_state.runtime.recovery import plan_restore
from agent_state.storage import ReadOnlyStateStore, paths
from agent_state.verify import verify as verify_directory

_STATE = Path("state")
_SCANNED = ("agents", "tasks", "sleep", "mail")
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only report what would change; change nothing.")
]

# -- inspecting --------------------------------------------------------------------------------


def list_states(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="agents, tasks, sleep, mail, system, or another kind of the directory.",
            show_default=False,
        ),
    ] = None,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="The bytes of each folder, and the largest files.")
    ] = False,
    limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --sizes: warn, and exit 1, above this size, such as 500MB or 2GiB.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the agents with their tasks, mail and sleep; or all documents of one KIND.

    Below the agents are the files that were set aside, such as a hand edit with a syntax error.
    Works while a server runs, and changes nothing.
    """
    if sizes:
        raise typer.Exit(_list_sizes(state, limit, as_json))
    if limit is not None:
        raise typer.BadParameter("--limit belongs to --sizes")

    async def work() -> int:
        async with open_inspector(state) as inspector:
            if kind is None:
                await _list_agents(inspector, as_json)
            else:
                await _list_kind(inspector, kind, as_json)
            return display.report_unusable(inspector.unusable(), as_json=as_json)

    raise typer.Exit(asyncio.run(work()))


def _list_sizes(state: Path, limit: str | None, as_json: bool) -> int:
    found = measure(state)
    show_json({"state_dir": str(state), **found.to_dict()}) if as_json else show_sizes(state, found)
    return PROBLEM if limit is not None and warn_above(found, limit) else OK


async def _list_agents(inspector: Inspector, as_json: bool) -> None:
    with progress("reading") as advance:
        agents = await inspector.overview(advance)
    owner, kept = await inspector.owner(), await inspector.kept_aside()
    if as_json:
        listed = [agent.to_dict() for agent in agents]
        aside = [asdict(each) for each in kept]
        show_json({**_origin(inspector, owner), "agents": listed, "quarantine": aside})
    else:
        display.show_overview(inspector.store.root, owner, agents)
        display.show_kept_aside(kept)


async def _list_kind(inspector: Inspector, kind: str, as_json: bool) -> None:
    kinds = await inspector.kinds()
    if kind not in kinds:
        raise StateNotFoundError(f"there is no kind {kind!r:.80}; there are {', '.join(kinds)}")
    with progress("reading") as advance:
        documents = await inspector.documents(kind, advance)
    logs = await inspector.logs(kind)
    if as_json:
        found = {"kind": kind, "documents": documents, "logs": logs}
        show_json({**_origin(inspector, await inspector.owner()), **found})
    else:
        display.show_documents(kind, documents, logs)


def show_state(
    ident: Annotated[
        str, typer.Argument(metavar="ID", help="An agent's id, or KIND/ID such as tasks/alice/42.")
    ],
    state: StateOption = _STATE,
    last: Annotated[int, typer.Option(help="The number of newest records of a log.", min=1)] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show an agent with its tasks, mail and logs; or one document; or the end of a log.

    Works while a server runs, and changes nothing.
    """

    async def work() -> int:
        async with open_inspector(state) as inspector:
            return await _show(inspector, ident, last, as_json)

    raise typer.Exit(asyncio.run(work()))


async def _show(inspector: Inspector, ident: str, last: int, as_json: bool) -> int:
    agent = await inspector.agent(ident) if ident else None
    if agent is not None:
        show_json(agent) if as_json else display.show_agent(agent)
        return display.report_unusable(inspector.unusable(), as_json=as_json)
    kind, key, is_log = await inspector.locate(ident)
    if not is_log:
        document = await inspector.document(kind, key)
        show_json(document) if as_json else display.show_document(document)
        return OK
    records = await inspector.tail(kind, key, last)
    if as_json:
        show_json({"kind": kind, "key": key, "records": records})
    else:
        display.show_records("/".join((kind, *key)), records)
    return display.report_unusable(inspector.unusable(), as_json=as_json)


def _origin(inspector: Inspector, owner: int | None) -> dict[str, Any]:
    return {"state_dir": inspector.store.root, "owner": owner}


# -- checking and tidying ----------------------------------------------------------------------


def verify(state: StateOption = _STATE, as_json: JsonOption = False) -> None:
    """Check every document, log and journal record; exit 1 if one cannot be used.

    Works while a server runs or on the directory of a dead one, and changes nothing. The
    check uses the built-in models, not the validator of an application.
    """
    with progress("checking") as advance:
        report = asyncio.run(verify_directory(state, encryption=given_keyring(), progress=advance))
    show_json(report.to_dict()) if as_json else display.show_verified(report)
    raise typer.Exit(OK if report.ok else PROBLEM)


def restore(
    state: StateOption = _STATE, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Recover a directory after a crash, as a starting server does.

    Completes the journal, moves damaged files to the quarantine and restores their last good
    versions, and brings over what an ancestor of this library has left. No agent runs; tasks
    and sleepers are only reported. Exit 1 if a file was damaged.
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
    state: StateOption = _STATE,
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

    async def scan(self, kind: str, prefix: Key | str = ()) -> AsyncGenerator[StoredState, None]:
        async for stored in super().scan(kind, prefix):
            self._done += 1
            self._advance(self._done, self._total)
            yield stored
