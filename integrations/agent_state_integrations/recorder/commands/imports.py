"""``agent-state record import``: logs of other programs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import print_error, print_line, progress, show_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent_state_integrations.recorder.importers import FileReport, ImportReport
    from agent_state_integrations.recorder.writer import (
        DeadLetter,
        RawMessage,
        RecordResult,
        RecordWriter,
    )


FINE, WRONG = 0, 1
_SHOWN = 10
_EVERY_ID = 1 << 40
"""A window that no recording fills: an import has to know everything that is there."""


def import_(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Log files, or folders with them.")
    ],
    state: StateOption = Path("state"),
    *,
    origin: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="What wrote them: auto, recorded, claude-code, codex, gemini, qwen, opencode, pi, "
            "or a format of your own.",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and report; record nothing.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Read files that have not changed since, too.")
    ] = False,
    rules: Annotated[
        str,
        typer.Option(
            "--rules", metavar="RULES", help="standard, legacy, legacy-broker, or a file."
        ),
    ] = "standard",
    redact: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Further rules of secrets, such as a gitleaks.toml.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Record the messages of other logs: recorded logs, and sessions of agents' tools.

    The files stay as they are, and importing them again adds nothing. Exit 1 when a file could
    not be read, has messages in no known format, or there is none.

    Example: agent-state record import session.jsonl
    """
    from agent_state_integrations.recorder.importers import ImportLedger, import_logs
    from agent_state_integrations.recorder.redact import SecretRedactor
    from agent_state_integrations.recorder.rules import Rules
    from agent_state_integrations.recorder.writer import RecordWriter

    shape = None if origin == "auto" else origin
    with progress("importing") as advance:
        if dry_run:
            report = import_logs(paths, None, shape=shape, advance=advance)
        else:
            writer = RecordWriter(
                state,
                rules=Rules.load(rules),
                redactor=SecretRedactor.default(redact),
                dedupe_window=_EVERY_ID,
            )
            with closing(writer):
                ledger = None if again else ImportLedger(state)
                opened = _OpenedWhenNeeded(writer)
                report = import_logs(paths, opened, shape=shape, advance=advance, ledger=ledger)
    if as_json:
        show_json(report.to_dict())
    elif report.files:
        _show(report)
    else:
        print_error(f"there is no recording and no log here [{', '.join(map(str, paths))}]")
    raise typer.Exit(FINE if report.ok else WRONG)


class _OpenedWhenNeeded:
    """A writer that is opened, and so reads every id, when there is something to write."""

    def __init__(self, writer: RecordWriter) -> None:
        self._writer = writer
        self._is_open = False

    def write(
        self, messages: Sequence[RawMessage | DeadLetter], source: str = ""
    ) -> list[RecordResult]:
        if not self._is_open:
            self._writer.open()
            self._is_open = True
        return self._writer.write(messages, source)


def _show(report: ImportReport) -> None:
    for file in report.files:
        _show_file(file)
    what = "would be recorded" if report.dry_run else "recorded"
    print_line(
        f"{report.lines} lines read: {report.recorded} messages {what}, "
        f"{report.duplicates} there already, {report.skipped} lines left out"
    )
    for reason, count in report.reasons.most_common(_SHOWN):
        print_line(f"  {count}: {reason}")
    if replaced := sum(file.replaced for file in report.files):
        print_line(f"  {replaced} kept with U+FFFD for half a surrogate pair")


def _show_file(file: FileReport) -> None:
    if file.error is not None:
        print_line(f"{file.path}: {file.error}", "red")
    if file.left_out is not None:
        print_line(f"{file.path}: not read: {file.left_out}")
    elif file.shape is not None:
        print_line(f"{file.path}: {file.shape}, {file.recorded} of {file.lines} lines; {file.mark}")
    for line, reason in file.examples:
        print_line(f"  line {line}: {reason}")
