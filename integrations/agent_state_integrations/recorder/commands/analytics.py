"""``agent-state analytics``: counts and scores of a log of messages."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import print_error, print_line, printable, show_json
from agent_state.errors import AgentStateError
from agent_state_integrations.recorder.commands.emptiness import stop_on_empty

if TYPE_CHECKING:
    from agent_state_integrations.recorder.analytics.analysis import LogAnalysis
    from agent_state_integrations.recorder.analytics.schedule import ScoreAlert


class Scores(StrEnum):
    """The values of ``--score``."""

    NONE = "none"
    SPREAD = "spread"
    FLAT = "legacy-flat"
    NESTED = "legacy-nested"


def analytics(
    context: typer.Context,
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A log file or a folder of logs; by default what the state directory recorded.",
            show_default=False,
        ),
    ] = None,
    scheduled: Annotated[
        Path | None,
        typer.Argument(
            metavar="[LOG]", help="After `install`: what its reports are of.", show_default=False
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
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TOML table of what a million tokens of each model cost.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Again and again: 30m, 6h, 1d.", show_default=False),
    ] = None,
    alert_below: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE",
            help="An alert when the score is lower; of spread, unless --score says which.",
            show_default=False,
        ),
    ] = None,
    alert_command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="It gets the report as JSON.", show_default=False),
    ] = None,
    alert_webhook: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The report is posted there.", show_default=False),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Remove reports older than 30d.", show_default=False),
    ] = None,
    units: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where `install` writes the units of systemd."),
    ] = Path("~/.config/systemd/user"),
    state: StateOption = Path("state"),
) -> None:
    """Count who said what about what and when, and what it took.

    Writes analytics_report_YYYYMMDD_HHMMSS.json, .md and .html, and prints a summary; or prints
    one of them. Metadata that messages already have is used unchanged. `analytics install --every
    6h …` writes a timer of systemd with the other options, and starts nothing. Exit 1 where there
    is nothing to read, or an alert could not be given.

    Example: agent-state analytics conversations.jsonl --json
    """
    from agent_state_integrations.recorder.analytics import schedule

    if as_json + markdown + html > 1:
        raise typer.BadParameter("--json, --markdown and --html: only one can be printed")
    again = None if every is None else schedule.span(every)
    if (alert_command or alert_webhook) and alert_below is None:
        raise typer.BadParameter("--alert-command and --alert-webhook need --alert-below")
    if path is not None and str(path) == "install" and not path.exists():
        _install(_options_given(context), scheduled, again, units)
        return
    if scheduled is not None:
        raise typer.BadParameter(f"one log at a time, and not {scheduled} too")
    if alert_below is not None and score is Scores.NONE:
        score = Scores.SPREAD
    run = _Run(
        path=state if path is None else path,
        rules=rules,
        score=score,
        prices=prices,
        out=out,
        shown="json" if as_json else "markdown" if markdown else "html" if html else None,
        alert=None
        if alert_below is None
        else schedule.ScoreAlert(alert_below, alert_command, alert_webhook),
        keep=None if keep is None else schedule.span(keep),
    )
    if again is None:
        stop_on_empty(run.path)
        if not run.once():
            raise typer.Exit(_PROBLEM)
        return
    stopped = Event()
    with suppress(KeyboardInterrupt):
        schedule.repeat(run.once_of_many, again, stopped.wait)


_PROBLEM = 1


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One report, or one of many: what is read, how, and what happens to it."""

    path: Path
    rules: str
    score: Scores
    prices: Path | None
    out: Path | None
    shown: str | None
    alert: ScoreAlert | None
    keep: timedelta | None

    def once(self) -> bool:
        """Make the report; False when its alert could not be given."""
        from agent_state_integrations.recorder.analytics import report as reports
        from agent_state_integrations.recorder.analytics import schedule
        from agent_state_integrations.recorder.analytics.analysis import analyse
        from agent_state_integrations.recorder.analytics.tokens import Prices
        from agent_state_integrations.recorder.rules import Rules

        analysis = analyse(
            self.path,
            rules=Rules.load(self.rules),
            score_name=self.score.value,
            prices=None if self.prices is None else Prices.load(self.prices),
        )
        folder = self.out or Path("reports")
        paths = reports.write(analysis, folder) if self.out or self.shown is None else []
        if self.shown == "json":
            show_json(analysis.report())
        elif self.shown is not None:
            _print((reports.to_html if self.shown == "html" else reports.to_markdown)(analysis))
        else:
            for line in (*reports.to_lines(analysis), *map(str, paths)):
                print_line(line)
        if paths and paths[-1].suffix != ".html":
            print_error("the HTML page needs Jinja2: pip install 'agent-state[recorder]'")
        if self.keep is not None:
            gone = schedule.prune(folder, self.keep, analysis.made_at)
            if gone and self.shown is None:
                print_line(f"{len(gone)} old reports removed")
        return self._warned(analysis)

    def _warned(self, analysis: LogAnalysis) -> bool:
        from agent_state_integrations.recorder.analytics.schedule import AlertFailedError

        alert, score = self.alert, analysis.score
        if alert is None or not alert.is_due(analysis):
            return True
        print_error(f"the score {score.name} is {score.value}, below {alert.below}")
        try:
            alert.give(analysis)
        except AlertFailedError as error:
            print_error(str(error))
            return False
        return True

    def once_of_many(self) -> None:
        """Make the report; what fails is said, and tried again the next time."""
        try:
            self.once()
        except AgentStateError as error:
            print_error(str(error))
        sys.stdout.flush()


_OF_INSTALL = frozenset({"path", "scheduled", "every", "units"})


def _options_given(context: typer.Context) -> list[str]:
    """The options that were given, without those of ``install``, as they can be given again."""
    words: list[str] = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in _OF_INSTALL or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[option.name or ""]
        words.append(option.opts[0])
        if value is not True:
            words.append(str(value.value if isinstance(value, Scores) else value))
    return words


def _install(options: list[str], log: Path | None, again: timedelta | None, units: Path) -> None:
    from agent_state_integrations.recorder.analytics import schedule

    if again is None:
        raise typer.BadParameter("install needs --every")
    arguments = [*options, *([] if log is None else ["--", str(log)])]
    for written in schedule.install(arguments, again, units.expanduser(), Path.cwd()):
        print_line(str(written))
    print_line(f"start it: systemctl --user enable --now {schedule.TIMER}")


def _print(text: str) -> None:
    """The text as UTF-8, whatever the encoding; on a terminal control characters are escaped."""
    if sys.stdout.isatty():
        text = "\n".join(map(printable, text.split("\n")))
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()
