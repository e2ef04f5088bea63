"""The command ``agent-state``: finding the command that is asked for, and the exit code.

Exit codes: 0 success, 1 a problem was found, 2 the command could not be carried out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, cast

import typer
from typer.core import TyperCommand, TyperGroup

from agent_state import __version__
from agent_state.cli.options import (
    MISUSE,
    OK,
    STATE,
    JsonOption,
    KeyOptions,
    KeyringOption,
    MasterKeysOption,
    StateOption,
    given_keyring,
    is_given,
)
from agent_state.cli.output import STOPPED, did_you_mean, fail, print_error
from agent_state.errors import AgentStateError, MissingExtraError

COMMANDS = "agent_state.commands"
"""The group of entry points by which installed packages add commands.

Each is a ``Typer``, or a function with the annotations of one; the entry point's name is the
command's.
"""

_CORE = {
    name: EntryPoint(name, f"agent_state.cli.{value}", COMMANDS)
    for name, value in {
        "ls": "nouns:list_states",
        "show": "nouns:show_state",
        "agents": "agents:agents",
        "tasks": "tasks:tasks",
        "mail": "agents:mail",
        "sleep": "nouns:sleep",
        "sessions": "nouns:sessions",
        "conversations": "nouns:conversations",
        "logs": "nouns:logs",
        "quarantine": "quarantine:quarantine",
        "verify": "directory:verify",
        "restore": "directory:restore",
        "cleanup": "directory:cleanup",
        "import": "app:imports",
        "keys": "encryption:keys",
        "mirror": "mirror:mirror",
        "rekey": "encryption:rekey",
        "serve": "serve:serve",
    }.items()
}

IMPORTS = "agent_state.imports"
"""The group of entry points by which packages add commands to ``agent-state import``."""

_COMPLETION = ("install_completion", "show_completion")

# Every error in the arguments (an unknown option, text for a number) is an instance of this class;
# the versions of typer share no public name for it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class CommandGroup(TyperGroup):
    """The commands of the core and of installed packages; each is imported when it is needed.

    A command that cannot be imported is still listed; calling it raises the error.
    """

    core: ClassVar[dict[str, EntryPoint]] = _CORE
    group: ClassVar[str] = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands, those of the core first."""
        core = dict.fromkeys([*self.core, *super().list_commands(ctx)])
        return [*core, *sorted(_added(self.group).keys() - core.keys())]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name; the error for an unknown one names similar ones."""
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            wrong = cast("Any", error)
            wrong.message = wrong.message.rstrip(".") + did_you_mean(
                args[0] if args else "", self.list_commands(ctx)
            )
            raise

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; None if it is unknown."""
        if cmd_name not in self.commands:
            entry = self.core.get(cmd_name) or _added(self.group).get(cmd_name)
            if entry is not None:
                self.add_command(_loaded(entry), cmd_name)
        return super().get_command(ctx, cmd_name)


class ImportGroup(CommandGroup):
    """``agent-state import``: what brings over the states of other programs."""

    core: ClassVar = {"legacy": EntryPoint("legacy", "agent_state.cli.legacy:legacy", IMPORTS)}
    group: ClassVar = IMPORTS


imports = typer.Typer(
    cls=ImportGroup, no_args_is_help=True, help="Bring over the states of other programs."
)


@imports.callback()
def _imports() -> None: ...


def _added(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def _loaded(entry: EntryPoint) -> Any:
    try:
        found = entry.load()
        if isinstance(found, typer.Typer):
            command = typer.main.get_command(found)
        else:
            single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            single.command()(found)
            command = typer.main.get_command(single)
    except Exception as error:  # noqa: BLE001  # another package's module may raise anything
        return _unavailable(entry.name, _reason(entry, error))
    command.name = entry.name
    # Completion is installed for the whole command.
    command.params = [each for each in command.params if each.name not in _COMPLETION]
    return command


def _reason(entry: EntryPoint, error: Exception) -> AgentStateError:
    if isinstance(error, MissingExtraError):
        return error
    what = f"{type(error).__name__}: {error}"
    reason = AgentStateError(f"the command {entry.name!r} cannot be loaded: {what}")
    reason.__cause__ = error
    return reason


def _unavailable(name: str, reason: AgentStateError) -> Any:
    """A command that takes any arguments, and raises the reason why it is not available."""
    from rich.markup import escape  # the help is markup, which an extra's brackets are not

    def fail() -> None:
        raise reason

    return TyperCommand(
        name,
        callback=fail,
        help=f"Not available: {escape(str(reason))}",
        add_help_option=False,  # --help is an argument like any other
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )


app = typer.Typer(
    cls=CommandGroup,
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Durable state of async agents: look at it, check it, change it, and serve it.\n\n"
    "Without a command: the state directory at a glance.\n\n"
    "Example: agent-state --state /srv/app/state",
    epilog="Exit codes: 0 success, 1 a problem was found, 2 the command could not be carried out.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    state: StateOption = STATE,
    as_json: JsonOption = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    keyring: KeyringOption = None,
    master_keys: MasterKeysOption = None,
) -> None:
    KeyOptions.keyring, KeyOptions.master_keys = keyring, master_keys
    if version:
        typer.echo(f"agent-state {__version__}")
        return
    given = [name for name in ("state", "as_json") if is_given(context, name)]
    if context.invoked_subcommand is not None:
        if given:
            raise typer.BadParameter("write --state and --json behind the command")
        return
    if not given and not state.is_dir() and "AGENT_STATE_DIR" not in os.environ:
        typer.echo(context.get_help())
        raise typer.Exit(MISUSE)
    from agent_state.cli.glance import glance  # --version needs none of it

    raise typer.Exit(glance(state, as_json, given_keyring()))


def run(args: Sequence[str]) -> int:
    """Carry out the command; the exit code. An error is one line on stderr."""
    command = typer.main.get_command(app)
    try:
        code = command(list(args), prog_name="agent-state", standalone_mode=False)
    except typer.Abort:
        print_error("stopped")
        return STOPPED
    except _UsageError as error:
        wrong = cast("Any", error)
        formatted = wrong.format_message().replace(". Did you mean", "; did you mean")  # typer's
        if likely := getattr(wrong, "possibilities", None):  # of an unknown option
            formatted = wrong.message.rstrip(".") + did_you_mean(wrong.option_name, likely)
        # The text is empty after the help of a group that was called without a command.
        if formatted:
            print_error(formatted)
        return MISUSE
    except SystemExit as left:  # typer's answer to a reader that leaves before the end
        if isinstance(left.__context__, BrokenPipeError):
            return MISUSE
        raise
    except (AgentStateError, OSError) as error:
        return fail(error)
    return code if isinstance(code, int) else OK
