"""The commands. Exit codes: 0 fine, 1 found something wrong, 2 could not do what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from agent_state import __version__
from agent_state.cli import faces
from agent_state.cli.mirror import mirror
from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import complain, progress, say, show_json
from agent_state.cli.reading import Reader, reading
from agent_state.cli.serve import serve
from agent_state.cli.upkeep import cleanup as do_cleanup
from agent_state.cli.upkeep import restore as do_restore
from agent_state.errors import (
    AgentStateError,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
)
from agent_state.verify import verify as do_verify

FINE, WRONG, MISUSE = 0, 1, 2

COMMANDS = "agent_state.commands"
"""The entry points by which other packages add commands: a ``Typer``, or a function."""


class ExtensibleGroup(TyperGroup):
    """Our commands and those of other packages, which are loaded when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands, ours first."""
        return [*super().list_commands(ctx), *sorted(self._added())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; None when there is none."""
        command = super().get_command(ctx, cmd_name)
        if command is None and (added := self._added().get(cmd_name)) is not None:
            command = _command_of(added)
            command.name = cmd_name
            self.add_command(command, cmd_name)
        return command

    def _added(self) -> dict[str, EntryPoint]:
        return {each.name: each for each in entry_points(group=COMMANDS)}


def _command_of(added: EntryPoint) -> Any:
    found = added.load()
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(cast("Any", found))
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=ExtensibleGroup,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Durable state of async agents: look at it, check it, tidy it, and see it survive.",
    epilog="Exit codes: 0 fine, 1 found something wrong, 2 could not do what was asked.",
)

app.add_typer(mirror, name="mirror")
app.command()(serve)


# Every mistake of the user's (an unknown option, a word for a number) is one of these. The class
# has no public name that all versions of typer share.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run(args: Sequence[str]) -> int:
    """Do what the arguments ask for; the exit code. What goes wrong is one line on stderr."""
    command = typer.main.get_command(app)
    try:
        code = command(list(args), prog_name="agent-state", standalone_mode=False)
    except typer.Abort:
        complain("stopped")
        return 130
    except _UsageError as mistake:
        said = mistake.format_message() if hasattr(mistake, "format_message") else str(mistake)
        if said:  # none after the help of a command that was called without a sub-command
            complain(said)
        return MISUSE
    except (StateCorruptedError, SchemaTooNewError) as error:
        complain(str(error))
        return WRONG
    except (AgentStateError, OSError) as error:
        complain(str(error))
        return MISUSE
    return code if isinstance(code, int) else FINE


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        say(f"agent-state {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(MISUSE)


@app.command("ls")
def list_states(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="agents, tasks, sleep, mail, system, or another kind that is there.",
            show_default=False,
        ),
    ] = None,
    state: StateOption = Path("state"),
    as_json: JsonOption = False,
) -> None:
    """List the agents with their tasks, mail and sleep; or all documents of one KIND.

    Works beside a running server, and changes nothing.
    """
    raise typer.Exit(asyncio.run(_list(state, kind, as_json)))


async def _list(state: Path, kind: str | None, as_json: bool) -> int:
    async with reading(state) as reader:
        if kind is None:
            await _list_agents(reader, as_json)
        else:
            await _list_kind(reader, kind, as_json)
        return _told_of_unusable(reader, as_json)


async def _list_agents(reader: Reader, as_json: bool) -> None:
    with progress("reading") as advance:
        agents = await reader.overview(advance)
    owner = await reader.owner()
    if as_json:
        show_json({**_where(reader, owner), "agents": [agent.to_dict() for agent in agents]})
    else:
        faces.show_overview(reader.store.root, owner, agents)


async def _list_kind(reader: Reader, kind: str, as_json: bool) -> None:
    kinds = await reader.kinds()
    if kind not in kinds:
        raise StateNotFoundError(f"there is no kind {kind!r:.80}; there are {', '.join(kinds)}")
    with progress("reading") as advance:
        documents = await reader.documents(kind, advance)
    logs = await reader.logs(kind)
    if as_json:
        found = {"kind": kind, "documents": documents, "logs": logs}
        show_json({**_where(reader, await reader.owner()), **found})
    else:
        faces.show_documents(kind, documents, logs)


@app.command("show")
def show_state(
    ident: Annotated[
        str, typer.Argument(metavar="ID", help="An agent's id, or KIND/ID such as tasks/alice/42.")
    ],
    state: StateOption = Path("state"),
    last: Annotated[
        int, typer.Option(help="Of a log, show the newest so many records.", min=1)
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show an agent and all that is its own, or one document, or the end of a log.

    Works beside a running server, and changes nothing.
    """
    raise typer.Exit(asyncio.run(_show(state, ident, last, as_json)))


async def _show(state: Path, ident: str, last: int, as_json: bool) -> int:
    async with reading(state) as reader:
        agent = await reader.agent(ident) if ident else None
        if agent is not None:
            show_json(agent) if as_json else faces.show_agent(agent)
            return _told_of_unusable(reader, as_json)
        kind, key, is_log = await reader.place(ident)
        if is_log:
            records = await reader.tail(kind, key, last)
            path = "/".join((kind, *key))
            if as_json:
                show_json({"kind": kind, "key": key, "records": records})
            else:
                faces.show_records(path, records)
            return _told_of_unusable(reader, as_json)
        document = await reader.read(kind, key)
        show_json(document) if as_json else faces.show_document(document)
        return FINE


@app.command()
def verify(state: StateOption = Path("state"), as_json: JsonOption = False) -> None:
    """Check every document, log and journal record; exit 1 when something cannot be used.

    Works beside a running server or on a dead one's directory, and changes nothing.
    """
    with progress("checking") as advance:
        report = asyncio.run(do_verify(state, progress=advance))
    show_json(report.to_dict()) if as_json else faces.show_verified(report)
    raise typer.Exit(FINE if report.ok else WRONG)


@app.command()
def restore(
    state: StateOption = Path("state"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what a start would do; change nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a directory in order after a crash, as a starting server does.

    Completes the journal, puts damaged files aside and brings their last good versions back.
    No agent runs; tasks and sleepers are only reported. Exit 1 when something was damaged.
    """
    with progress("restoring") as advance:
        report = asyncio.run(do_restore(state, dry_run=dry_run, advance=advance))
    if as_json:
        show_json({"dry_run": dry_run, **report.to_dict()})
    else:
        faces.show_restored(report, dry_run=dry_run)
    raise typer.Exit(WRONG if report.contained else FINE)


@app.command()
def cleanup(
    state: StateOption = Path("state"),
    max_age_hours: Annotated[
        float, typer.Option(help="Spare what was saved more recently than this.", min=0)
    ] = 24,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would move; change nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Move what is finished and old into archive logs; spare what is still needed.

    Finished are completed, dead and cancelled tasks, mail that was read and awaits no answer,
    the sleep of awake agents, and stopped agents with nothing left to do. Nothing is lost:
    `show tasks/alice/archive` has it. Refused while a server owns the directory.
    """
    with progress("cleaning up") as advance:
        done = do_cleanup(state, max_age_hours, dry_run=dry_run, advance=advance)
        report, unusable = asyncio.run(done)
    if as_json:
        show_json({**report.to_dict(), "unusable": [asdict(one) for one in unusable]})
    else:
        faces.show_cleaned(report, unusable)
    raise typer.Exit(WRONG if unusable else FINE)


def _where(reader: Reader, owner: int | None) -> dict[str, Any]:
    return {"state_dir": reader.store.root, "owner": owner}


def _told_of_unusable(reader: Reader, as_json: bool) -> int:
    """Say what could not be used, on stderr when stdout is JSON's alone."""
    incidents = reader.unusable()
    if not incidents:
        return FINE
    if as_json:
        for incident in incidents:
            complain(f"not usable: {faces.place(incident)}: {incident.what}")
    else:
        faces.show_unusable(incidents)
    return WRONG
