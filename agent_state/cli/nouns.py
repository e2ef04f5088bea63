"""The commands of each noun that look: ``ls`` and ``show`` of agents, mail, sessions, logs, ….

``agent-state show ID`` finds anything by its id. All of them work while a server runs, and change
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from agent_state.cli import display
from agent_state.cli.glance import list_agents, report_unusable
from agent_state.cli.inspector import Inspector, open_inspector
from agent_state.cli.options import (
    STATE,
    JsonOption,
    LimitOption,
    RecordsOption,
    StateOption,
    given_keyring,
)
from agent_state.cli.output import did_you_mean, progress, show_json
from agent_state.cli.sizes import list_sizes
from agent_state.errors import StateNotFoundError

_RECORDS = 20

_LIST = "List {what}.\n\nExample: agent-state {noun} ls --limit 10"
_SHOW = """Show one document, or the newest records of one log.

It is named by its id, as `ls` shows it, or by its file below the folder.

Example: agent-state {noun} show {example}"""


def new_noun(kind: str, what: str, example: str) -> typer.Typer:
    """The commands ``ls`` and ``show`` of a kind; ``what`` says what its documents are."""
    noun = typer.Typer(help=f"{what[:1].upper()}{what[1:]}.", no_args_is_help=True)

    @noun.command("ls", help=_LIST.format(what=what, noun=kind))
    def list_them(
        state: StateOption = STATE, limit: LimitOption = None, as_json: JsonOption = False
    ) -> None:
        raise typer.Exit(list_kind(state, kind, as_json, limit, expected=True))

    @noun.command("show", help=_SHOW.format(noun=kind, example=example))
    def show_one(
        ident: Annotated[str, typer.Argument(metavar="ID", help="Its id.")],
        state: StateOption = STATE,
        limit: RecordsOption = _RECORDS,
        as_json: JsonOption = False,
    ) -> None:
        raise typer.Exit(show_by_id(state, f"{kind}/{ident}", limit, as_json))

    return noun


def list_states(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="agents, tasks, sleep, mail, system, or another kind of the directory.",
            show_default=False,
        ),
    ] = None,
    state: StateOption = STATE,
    as_json: JsonOption = False,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="The bytes of each folder, and the largest files.")
    ] = False,
    max_size: Annotated[
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

    Example: agent-state ls tasks --json
    """
    if max_size is not None and not sizes:
        raise typer.BadParameter("--max-size belongs to --sizes")
    if sizes:
        raise typer.Exit(list_sizes(state, max_size, as_json))
    if kind is not None:
        raise typer.Exit(list_kind(state, kind, as_json))
    raise typer.Exit(list_agents(state, as_json, given_keyring()))


sleep = new_noun("sleep", "the sleep of agents: until when, and what wakes them", "alice")
sessions = new_noun("sessions", "the sessions of people", "4f1c09ab")
conversations = new_noun(
    "conversations", "the conversations of sessions with agents", "4f1c09ab/writer --limit 5"
)
logs = typer.Typer(help="The logs of all kinds.", no_args_is_help=True)


@logs.command("ls")
def list_logs(
    state: StateOption = STATE, limit: LimitOption = None, as_json: JsonOption = False
) -> None:
    """List the logs of all kinds, with the number of their last record.

    Example: agent-state logs ls
    """

    async def work(inspector: Inspector) -> int:
        found: list[dict[str, Any]] = []
        for kind in await inspector.kinds():
            found += [{"kind": kind, **log} for log in await inspector.logs(kind)]
        found = found[:limit]
        if as_json:
            show_json({"state_dir": inspector.store.root, "logs": found})
        else:
            display.show_logs(found)
        return report_unusable(inspector.unusable(), as_json=as_json)

    raise typer.Exit(run_inspection(state, work))


@logs.command("show")
def show_log(
    ident: Annotated[str, typer.Argument(metavar="KIND/ID", help="Such as system/events.")],
    state: StateOption = STATE,
    limit: RecordsOption = _RECORDS,
    as_json: JsonOption = False,
) -> None:
    """Show the newest records of a log.

    Example: agent-state logs show system/events --limit 5
    """

    async def work(inspector: Inspector) -> int:
        kind, key, is_log = await inspector.locate(ident)
        if not is_log:
            raise StateNotFoundError(f"{ident!r:.200} is a document, and no log")
        return await _show_log(inspector, kind, key, limit, as_json)

    raise typer.Exit(run_inspection(state, work))


def show_state(
    ident: Annotated[
        str, typer.Argument(metavar="ID", help="An agent's id, or KIND/ID such as tasks/alice/42.")
    ],
    state: StateOption = STATE,
    limit: RecordsOption = _RECORDS,
    as_json: JsonOption = False,
) -> None:
    """Show an agent with its tasks, mail and logs; or one document; or the end of a log.

    Works while a server runs, and changes nothing.

    Example: agent-state show tasks/alice/42
    """
    raise typer.Exit(show_by_id(state, ident, limit, as_json, agents=True))


# -- what they do ------------------------------------------------------------------------------


def run_inspection(state: Path, work: Callable[[Inspector], Awaitable[int]]) -> int:
    """Do work on a directory that is open for reading; the exit code."""

    async def inspect() -> int:
        async with open_inspector(state) as inspector:
            return await work(inspector)

    return asyncio.run(inspect())


def list_kind(
    state: Path, kind: str, as_json: bool, limit: int | None = None, *, expected: bool = False
) -> int:
    """Print the documents and logs of a kind; the exit code. An ``expected`` one may be empty."""

    async def work(inspector: Inspector) -> int:
        kinds = await inspector.kinds()
        if kind not in kinds and not expected:
            hint = did_you_mean(kind, kinds)
            message = f"there is no kind {kind!r:.80}; there are {', '.join(kinds)}{hint}"
            raise StateNotFoundError(message)
        with progress("reading") as advance:
            documents = (await inspector.documents(kind, advance))[:limit]
        logs = await inspector.logs(kind)
        if as_json:
            origin = {"state_dir": inspector.store.root, "owner": await inspector.owner()}
            show_json({**origin, "kind": kind, "documents": documents, "logs": logs[:limit]})
        else:
            display.show_documents(kind, documents, logs[:limit])
        return report_unusable(inspector.unusable(), as_json=as_json)

    return run_inspection(state, work)


def show_by_id(state: Path, ident: str, limit: int, as_json: bool, *, agents: bool = False) -> int:
    """Print one document, the end of one log, or, if ``agents``, all of an agent."""

    async def work(inspector: Inspector) -> int:
        agent = await inspector.agent(ident) if agents and ident else None
        if agent is not None:
            show_json(agent) if as_json else display.show_agent(agent)
            return report_unusable(inspector.unusable(), as_json=as_json)
        kind, key, is_log = await inspector.locate(ident)
        if is_log:
            return await _show_log(inspector, kind, key, limit, as_json)
        document = await inspector.document(kind, key)
        show_json(document) if as_json else display.show_document(document)
        return report_unusable(inspector.unusable(), as_json=as_json)

    return run_inspection(state, work)


async def _show_log(
    inspector: Inspector, kind: str, key: tuple[str, ...], limit: int, as_json: bool
) -> int:
    records = await inspector.tail(kind, key, limit)
    if as_json:
        show_json({"kind": kind, "key": key, "records": records})
    else:
        display.show_records("/".join((kind, *key)), records)
    return report_unusable(inspector.unusable(), as_json=as_json)
