"""``agent-state record conversations``: who spoke, from when to when, and how it ended."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import complain, say, show_json, show_table
from agent_state_integrations.recorder.commands.query import (
    DayOption,
    PathArgument,
    SinceOption,
    UntilOption,
    period,
    rules_named,
)

_SHOWN = 50


def conversations(
    path: PathArgument = None,
    *,
    since: SinceOption = None,
    until: UntilOption = None,
    day: DayOption = None,
    speaker: Annotated[
        str | None, typer.Option(metavar="NAME", help="What this one said.", show_default=False)
    ] = None,
    gap: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="A longer silence ends one that names no context.", min=0.0
        ),
    ] = 300.0,
    fewest: Annotated[int, typer.Option(help="Leave out those of fewer messages.", min=1)] = 2,
    shortest: Annotated[
        float, typer.Option(metavar="SECONDS", help="Leave out shorter ones.", min=0.0)
    ] = 5.0,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="RULES",
            help="Enrich what lacks it: standard, legacy, legacy-broker, or a file.",
            show_default=False,
        ),
    ] = None,
    messages: Annotated[
        bool, typer.Option("--messages", help="With --json: their messages, too.")
    ] = False,
    as_json: JsonOption = False,
    state: StateOption = Path("state"),
) -> None:
    """List the conversations: the messages of one context, or those between two silences."""
    from agent_state_integrations.recorder.past.conversations import conversations as find
    from agent_state_integrations.recorder.past.parsing import Skipped
    from agent_state_integrations.recorder.past.query import Query
    from agent_state_integrations.recorder.past.reading import read_records

    first, end = period(since, until, day)
    skipped = Skipped()
    asked = Query(since=first, until=end, speaker=speaker)
    found = find(
        read_records(path or state, asked, rules=rules_named(rules), skipped=skipped),
        gap=timedelta(seconds=gap),
        fewest=fewest,
        shortest=timedelta(seconds=shortest),
        with_messages=messages and as_json,
    )
    if as_json:
        show_json([one.to_dict() for one in found])
    elif not found:
        say("no conversation")
    else:
        rows = [
            (
                one.thread_id,
                one.start_time[:16].replace("T", " "),
                _duration(one.duration_seconds),
                one.message_count,
                ", ".join(one.participants),
                one.final_status,
                len(one.context_shifts) or None,
            )
            for one in found
        ]
        show_table(
            (
                "conversation",
                "began (UTC)",
                "took",
                "messages",
                "participants",
                "status",
                "shifts",
            ),
            rows,
            most=_SHOWN,
        )
    if skipped.lines:
        complain(str(skipped))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
