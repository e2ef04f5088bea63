"""``agent-state record query``: find messages, by what is asked for or by SQL.

``agent-state record conversations``: who spoke, from when to when, and how it ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import (
    is_utf8,
    line_width,
    print_error,
    print_line,
    printable_json,
    show_json,
    show_table,
)
from agent_state.clock import check_duration
from agent_state_integrations.recorder.commands.emptiness import stop_on_empty

if TYPE_CHECKING:
    from agent_state_integrations.recorder.lines import Numbered
    from agent_state_integrations.recorder.query import Query


_SHOWN = 50
_LONGEST_SECONDS = 10**11
"""Three thousand years: a longer silence ends nothing."""
_WIDTH = 100
_AT_ONCE = 200
_ROOMY = 120
"""Columns of a terminal that has room for what enrichment found."""
_NARROW = 10
"""The least width of a column; in a narrower terminal each row becomes a table."""

PathArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="PATH",
        help="A log, an archive, an export or a folder of logs; by default what the state "
        "directory recorded.",
        show_default=False,
    ),
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="From then on: 2026-11-21T14:30 (UTC), or 24h ago.", show_default=False
    ),
]
UntilOption = Annotated[
    str | None, typer.Option(metavar="TIME", help="Before then.", show_default=False)
]
DayOption = Annotated[
    str | None,
    typer.Option(metavar="DATE", help="On this day, of UTC: 2026-11-21.", show_default=False),
]


class Order(StrEnum):
    """In which order messages are shown."""

    log = "log"
    time = "time"


def _text(metavar: str, help_text: str, *names: str) -> Any:
    # A name that is its metavar in small letters must be given: typer 0.27.0 has it in capitals.
    return typer.Option(*names, metavar=metavar, help=help_text, show_default=False)


def query(
    path: PathArgument = None,
    *,
    since: SinceOption = None,
    until: UntilOption = None,
    day: DayOption = None,
    speaker: Annotated[str | None, _text("NAME", "Who said it.")] = None,
    role: Annotated[str | None, _text("ROLE", "In which role.", "--role")] = None,
    context: Annotated[str | None, _text("ID", "In which context.")] = None,
    domain: Annotated[str | None, _text("NAME", "The domain, as enrichment found it.")] = None,
    tier: Annotated[str | None, _text("A|C|E", "The ACE tier.")] = None,
    tag: Annotated[str | None, _text("TAG", "An SHL tag, such as Status-Ready.", "--tag")] = None,
    text: Annotated[str | None, _text("WORDS", "What occurs in it, in any case.")] = None,
    type_: Annotated[str | None, _text("TYPE", "The message type.", "--type")] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="So many at most; a table shows 50.", min=0, show_default=False),
    ] = None,
    newest: Annotated[bool, typer.Option("--newest", help="The last ones first.")] = False,
    sort: Annotated[
        Order, typer.Option(help="As in the log, or by time; then all are held in memory.")
    ] = Order.log,
    count: Annotated[bool, typer.Option("--count", help="Only how many there are.")] = False,
    sql: Annotated[
        str | None,
        _text("SELECT", "Ask DuckDB instead; all messages are in the view `messages`."),
    ] = None,
    rules: Annotated[
        str | None,
        _text("RULES", "Enrich what lacks it: standard, legacy, legacy-broker, or a file."),
    ] = None,
    export_to: Annotated[
        Path | None,
        _text(
            "FILE",
            "Write them to a new .json, .jsonl, .csv (each also .gz), .parquet or .feather file.",
            "--out",
        ),
    ] = None,
    as_json: JsonOption = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print a JSON object a line.")] = False,
    state: StateOption = Path("state"),
) -> None:
    """Find recorded messages, wherever they are by now: live log, segments, archives.

    Works while a recorder runs, and changes nothing. Lines that hold no message are left out, and
    counted on standard error.

    Example: agent-state record query --text index --limit 5
    """
    from agent_state_integrations.recorder.lines import SkippedLines
    from agent_state_integrations.recorder.query import Query

    skipped, path = SkippedLines(), path or state
    stop_on_empty(path)
    first, end = period(since, until, day)
    asked = Query(
        since=first,
        until=end,
        speaker=speaker,
        role=role,
        context=context,
        chain_type=domain,
        ace_tier=tier,
        tag=tag,
        text=text,
        message_type=type_,
        limit=limit,
        newest_first=newest,
    )
    if sql is not None:
        if count or rules or export_to or sort is not Order.log or asked != Query(limit=limit):
            raise typer.BadParameter("of the others, --sql knows --limit, --json and --jsonl only")
        _run_sql(path, sql, limit, _Output(as_json, jsonl), skipped)
    elif count and rules is None:
        from agent_state_integrations.recorder import reader as reading

        _print_count(reading.count(path, asked, skipped=skipped), as_json or jsonl)
    else:
        found = _found(path, asked, sort, rules, skipped)
        if count:
            _print_count(sum(1 for _ in found), as_json or jsonl)
        elif export_to is not None:
            _export(found, export_to, as_json or jsonl)
        else:
            _show(found, limit, _Output(as_json, jsonl))
    _print_skipped(skipped)


def period(since: str | None, until: str | None, day: str | None) -> tuple[Any, Any]:
    """The times that options name. Raises ``QueryError``."""
    from agent_state.clock import SystemClock
    from agent_state_integrations.recorder import query as queries

    if day is not None:
        if since is not None or until is not None:
            raise typer.BadParameter("--day is a --since and an --until already")
        return queries.day(day)
    now = SystemClock().now()
    return (
        None if since is None else queries.moment(since, now),
        None if until is None else queries.moment(until, now),
    )


def _found(
    path: Path, asked: Query, sort: Order, rules: str | None, skipped: Any
) -> Iterable[Numbered]:
    from dataclasses import replace

    from agent_state_integrations.recorder.reader import read_records

    if sort is Order.log:
        return read_records(path, asked, rules=rules_named(rules), skipped=skipped)
    every = replace(asked, limit=None, newest_first=False)
    found = sorted(
        read_records(path, every, rules=rules_named(rules), skipped=skipped),
        key=lambda numbered: str(numbered[1]["Timestamp"]),
        reverse=asked.newest_first,
    )
    return found if asked.limit is None else found[: asked.limit]


def rules_named(name: str | None) -> Any:
    """The rules that ``--rules`` names; None without it."""
    if name is None:
        return None
    from agent_state_integrations.recorder.rules import Rules

    return Rules.load(name)


class _Output:
    """How rows are printed."""

    def __init__(self, as_json: bool, jsonl: bool) -> None:
        if as_json and jsonl:
            raise typer.BadParameter("--json is one array, --jsonl an object a line: choose one")
        self.as_json = as_json
        self.for_people = not as_json and not jsonl

    def objects(self, values: Iterable[object]) -> None:
        """Print one after another, as they come."""
        between = ",\n" if self.as_json else "\n"
        before, found = "[\n" if self.as_json else "", iter(values)
        while some := list(islice(found, _AT_ONCE)):
            sys.stdout.write(before + between.join(map(_compact, some)))
            before = between
        if before != between:
            sys.stdout.write("[]\n" if self.as_json else "")
        else:
            sys.stdout.write("\n]\n" if self.as_json else "\n")


def _compact(value: object) -> str:
    if is_utf8(sys.stdout):
        return printable_json(orjson.dumps(value).decode())
    return json.dumps(value, separators=(",", ":"))


def _show(found: Iterable[Numbered], limit: int | None, output: _Output) -> None:
    if not output.for_people:
        output.objects({"_seq": seq, **record} for seq, record in found)
        return
    most = _SHOWN if limit is None else limit
    roomy = line_width() >= _ROOMY
    rows = [_row(*numbered, enriched=roomy) for numbered in islice(found, most + 1)]
    if not rows:
        print_line("no message")
        return
    enriched = ("domain", "tier") if roomy else ()
    columns = ("number", "time (UTC)", "speaker", "context", *enriched, "message")
    show_table(columns, rows[:most])
    if len(rows) > most:
        print_line("… and more: --limit, --count, --jsonl")


def _row(seq: int, record: dict[str, Any], *, enriched: bool) -> tuple[object, ...]:
    meta = record["Metadata"]
    return (
        seq or None,
        record["Timestamp"][:19].replace("T", " "),
        record["SpeakerName"],
        record["ContextId"],
        *((meta.get("chain_type"), meta.get("ace_tier")) if enriched else ()),
        _cut(record["Message"]),
    )


def _cut(text: str) -> str:
    line = " ".join(text[: 2 * _WIDTH].split())
    return line if len(line) <= _WIDTH and len(text) <= 2 * _WIDTH else line[: _WIDTH - 1] + "…"


def _print_count(number: int, as_json: bool) -> None:
    if as_json:
        show_json({"count": number})
    else:
        print_line(str(number))


def _export(found: Iterable[Numbered], path: Path, as_json: bool) -> None:
    from agent_state.clock import SystemClock, stamp
    from agent_state_integrations.recorder.export import export

    now = stamp(SystemClock().now())
    written = export(found, path, export_id=f"query {now}", label="query", timestamp=now)
    if as_json:
        show_json(written.to_dict())
    else:
        print_line(f"{written.message_count} messages in {written.path}")


def _run_sql(path: Path, statement: str, limit: int | None, output: _Output, skipped: Any) -> None:
    from agent_state_integrations.recorder.sql import connect, plain

    with connect(path, skipped=skipped) as tables:
        answer = tables.select(statement)
        rows: Iterator[tuple[Any, ...]] = answer.rows
        if not output.for_people:
            if limit is not None:
                rows = islice(rows, limit)
            names = answer.columns
            output.objects(dict(zip(names, map(plain, row), strict=True)) for row in rows)
            return
        most = _SHOWN if limit is None else limit
        shown = list(islice(rows, most + 1))
    table = [[_cell(value) for value in map(plain, row)] for row in shown[:most]]
    if len(answer.columns) * _NARROW <= line_width():
        show_table(answer.columns, table)
    else:
        for number, row in enumerate(table, 1):
            show_table(("column", f"row {number}"), zip(answer.columns, row, strict=True))
    if len(shown) > most:
        print_line("… and more: --limit, --jsonl")


def _cell(value: object) -> object:
    """A cell of a table, short."""
    if value is None or isinstance(value, int | float):
        return value
    return _cut(value if isinstance(value, str) else _compact(value))


def _print_skipped(skipped: Any) -> None:
    if skipped.lines:
        print_error(str(skipped))


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
    """List the conversations: the messages of one context, or those between two silences.

    Example: agent-state record conversations --json
    """
    from agent_state_integrations.recorder.conversation import conversations as find
    from agent_state_integrations.recorder.lines import SkippedLines
    from agent_state_integrations.recorder.query import Query
    from agent_state_integrations.recorder.reader import read_records

    first, end = period(since, until, day)
    stop_on_empty(path or state)
    skipped = SkippedLines()
    asked = Query(since=first, until=end, speaker=speaker)
    found = find(
        read_records(path or state, asked, rules=rules_named(rules), skipped=skipped),
        gap=_span(gap, "--gap"),
        fewest=fewest,
        shortest=_span(shortest, "--shortest"),
        with_messages=messages and as_json,
    )
    if as_json:
        show_json([one.to_dict() for one in found])
    elif not found:
        print_line("no conversation")
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
        print_error(str(skipped))


def _span(seconds: float, option: str) -> timedelta:
    """The option's seconds; more than a span can have are the longest one."""
    check_duration(option, seconds)
    return timedelta(seconds=min(seconds, _LONGEST_SECONDS))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
