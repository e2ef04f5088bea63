"""``agent-state analytics``: counts and scores of a log of messages."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import print_error, print_line


class Scores(StrEnum):
    """The values of ``--score``."""

    NONE = "none"
    SPREAD = "spread"
    FLAT = "legacy-flat"
    NESTED = "legacy-nested"


def analytics(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A log file or a folder of logs; by default what the state directory recorded.",
            show_default=False,
        ),
    ] = None,
    *,
    rules: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="What enriches messages that lack it: standard, legacy, legacy-broker, or your "
            "TOML file.",
        ),
    ] = "standard",
    score: Annotated[
        Scores, typer.Option(help="A score to add; the report says what it cannot say.")
    ] = Scores.NONE,
    as_json: JsonOption = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the report as Markdown, and nothing else.")
    ] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Print the report as a page, and nothing else.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the files go: reports/ unless something is printed.",
            show_default=False,
        ),
    ] = None,
    state: StateOption = Path("state"),
) -> None:
    """Count who said what about what and when, and score how they work together.

    Writes analytics_report_YYYYMMDD_HHMMSS.json, .md and .html, and prints a summary; or prints
    one of them. Metadata that messages already have is used unchanged.
    """
    from agent_state_integrations.recorder.analytics import report as reports
    from agent_state_integrations.recorder.analytics.analysis import analyse
    from agent_state_integrations.recorder.rules import Rules

    if as_json + markdown + html > 1:
        raise typer.BadParameter("--json, --markdown and --html: only one can be printed")
    analysis = analyse(
        state if path is None else path, rules=Rules.load(rules), score_name=score.value
    )
    printed = as_json or markdown or html
    paths = reports.write(analysis, out or Path("reports")) if out or not printed else []
    if as_json:
        _print(reports.to_json(analysis))
    elif markdown:
        _print(reports.to_markdown(analysis))
    elif html:
        _print(reports.to_html(analysis))
    else:
        for line in reports.to_lines(analysis):
            print_line(line)
        for written in paths:
            print_line(str(written))
    if paths and paths[-1].suffix != ".html":
        print_error("the HTML page needs Jinja2: pip install 'agent-state[recorder]'")


def _print(text: str) -> None:
    """The text as UTF-8, whatever the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()
