"""``agent-state export`` and ``agent-state import archive``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agent_state.cli.options import OK, PROBLEM, STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, print_line, progress, show_json
from agent_state.cli.sizes import parse_size, readable
from agent_state_integrations.operator.archive import (
    MOST_BYTES,
    TransferReport,
    export_archive,
    import_archive,
)

_SHOWN = 20

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there with other content.")
]


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new archive, a zip.")],
    agent: Annotated[
        str | None, typer.Argument(metavar="[AGENT]", help="This agent alone.", show_default=False)
    ] = None,
    state: StateOption = STATE,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a directory, or one agent with its tasks, mail and sleep, to one file.

    The files as one moment had them, with their checksums; a running server is held for that
    moment. What is encrypted stays encrypted. Changes nothing in the directory.

    Example: agent-state export state.zip
    """
    with progress("exporting") as advance:
        report = export_archive(state, file, agent, overwrite=overwrite, advance=advance)
    if as_json:
        show_json(_as_dict(report))
    else:
        print_line(f"{report.file}: {_counts(report)}")
        if report.keyring:
            print_line(f"encrypted with keyring {report.keyring}, which is not in the archive")


def archive(  # noqa: PLR0917  # typer gives them by name
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive of `export`.")],
    state: StateOption = STATE,
    overwrite: OverwriteOption = False,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Refuse an archive whose files have more together, such as 2GiB.",
            show_default=False,
        ),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put the files of an archive into a directory, which is made if it is missing.

    Everything is checked first: names, sizes, checksums, each document by its model. Files that
    are there with other content stay, and the exit code is then 1. Refused while a server owns the
    directory.

    Example: agent-state import archive state.zip --state moved
    """
    limit = MOST_BYTES if max_size is None else parse_size(max_size)
    with progress("importing") as advance:
        report = import_archive(
            state, file, overwrite=overwrite, dry_run=dry_run, most_bytes=limit, advance=advance
        )
    if as_json:
        show_json({"dry_run": dry_run, **_as_dict(report)})
    else:
        print_line(f"{state}: {_counts(report)}" + (" would be imported" if dry_run else ""))
        if report.unchanged:
            print_line(f"{counted(len(report.unchanged), 'file')} the same as in the archive")
        for name in report.kept[:_SHOWN]:
            print_line(f"kept, with other content: {name}", "yellow")
        if len(report.kept) > _SHOWN:
            print_line(f"… and {len(report.kept) - _SHOWN} more (--overwrite replaces them)")
    raise typer.Exit(PROBLEM if report.kept else OK)


def _as_dict(report: TransferReport) -> dict[str, object]:
    return asdict(report)


def _counts(report: TransferReport) -> str:
    parts = [counted(report.documents, "document"), counted(report.logs, "log")]
    parts += [counted(report.others, "other file")] if report.others else []
    return f"{', '.join(parts)}, {readable(report.bytes)}"
