"""``agent-state quarantine``: what was set aside and why; put it back, or remove it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from agent_state.cli.glance import short_time
from agent_state.cli.options import (
    STATE,
    WAIT_SECONDS,
    JsonOption,
    LimitOption,
    StateOption,
    WaitOption,
    given_keyring,
)
from agent_state.cli.output import counted, print_line, printable, show_json, show_table
from agent_state.cli.overview import PlainReader
from agent_state.cli.owner import carry_out, end_with_report
from agent_state.runtime.requests import FileAction, QuarantineRequest
from agent_state.salvage import find_kept
from agent_state.storage import fileio

quarantine = typer.Typer(
    help="Files that were set aside: list and show them, put them back, or remove them.",
    no_args_is_help=True,
)
FilesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="Where it is kept, or where it was, as `ls` shows it.",
        show_default=False,
    ),
]


@quarantine.command("ls")
def list_files(
    state: StateOption = STATE, limit: LimitOption = None, as_json: JsonOption = False
) -> None:
    """List the files that were set aside, the newest first, with the reasons.

    Example: agent-state quarantine ls
    """
    reader = PlainReader(state, given_keyring())
    kept = reader.kept_aside()[:limit]
    if as_json:
        show_json({"state_dir": reader.root, "quarantine": kept})
        return
    print_line(f"{reader.root}: {counted(len(kept), 'file')} set aside")
    if kept:
        rows = ((each.path, each.was, short_time(each.at or ""), each.reason) for each in kept)
        show_table(("kept at", "was", "when", "why"), rows)


@quarantine.command("show")
def show_file(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where it is kept, or where it was.")],
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """Show a file that was set aside, and the reason.

    Example: agent-state quarantine show tasks/alice/papers.json
    """
    reader = PlainReader(state, given_keyring())
    kept = find_kept(reader.root, file)
    found = fileio.read_file(f"{reader.root}/{kept.path}")
    text = found[0].decode(errors="backslashreplace") if found is not None else None
    if as_json:
        show_json({**asdict(kept), "content": text})
        return
    print_line(f"{kept.path}: {kept.reason}", "yellow")
    print_line(
        f"was {kept.was or 'unknown'}, set aside {short_time(kept.at or 'at no known time')}"
    )
    for line in (text or "").splitlines():
        print_line(printable(line))


def _add_change(action: FileAction, done: str, text: str) -> None:
    """Add a command that changes files that were set aside."""

    @quarantine.command(action, help=text)
    def change(
        files: FilesArgument,
        wait: WaitOption = WAIT_SECONDS,
        state: StateOption = STATE,
        as_json: JsonOption = False,
    ) -> None:
        request = QuarantineRequest(action=action, files=files)
        end_with_report(carry_out(request, state, wait, "quarantine"), "file", done, done, as_json)


_add_change(
    "restore",
    "put back",
    """Put documents back that were set aside, as a new revision; mend the files first.

    A file that is still not usable stays where it is, and the exit code is 1. A running server
    takes the request from a file in its directory.

    Example: agent-state quarantine restore .quarantine/tasks/alice/papers.json.1""",
)
_add_change(
    "drop",
    "removed",
    """Remove files for good that were set aside, with their reasons.

    Example: agent-state quarantine drop .quarantine/tasks/alice/papers.json.1""",
)
