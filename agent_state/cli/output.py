"""Output to the terminal: tables and lines for people on stdout, JSON alone for scripts.

Ids and states are text from outside: it must not move the cursor or colour the line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.json import JSON
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000
_FEW = 50

Advance = Callable[[int, int], None]
"""Called with the amount that is done and the total amount."""


def out() -> Console:
    """Standard output. Lines are wrapped only on a terminal."""
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if watched else _UNLIMITED)


def print_line(line: str = "", style: str = "") -> None:
    """Print one line for a person."""
    out().print(Text(printable(line), style), soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """``1 message``, ``2 messages``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def print_error(line: str) -> None:
    """Print one line on stderr."""
    print(f"agent-state: {printable(line)}", file=sys.stderr)


def show_json(value: object) -> None:
    """Print JSON on stdout."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not utf8) + "\n")


def show_state(state: dict[str, Any]) -> None:
    """Print a state as JSON, in colour on a terminal."""
    text = json.dumps(state, indent=2, ensure_ascii=False)
    shown = "\n".join(printable(line, json_escapes=True) for line in text.split("\n"))
    console = out()
    if console.is_terminal:
        console.print(JSON(shown), soft_wrap=True)
    else:
        print(shown)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, most: int = 0) -> None:
    """Print a table; None is an empty cell, and a column of empty cells is left out.

    ``most``: show only so many rows and count the others; 0 for all.
    """
    shown = [[_cell(value) for value in row] for row in rows]
    rest = max(0, len(shown) - most) if most else 0
    del shown[len(shown) - rest :]
    used = [
        index
        for index in range(len(columns))
        if index == 0 or any(row[index].plain for row in shown)
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index in used:
        table.add_column(columns[index], overflow="fold")
    for row in shown:
        table.add_row(*(row[index] for index in used))
    out().print(table)
    if rest:
        print_line(f"… and {rest} more")


def _cell(value: object) -> Text:
    if value is None:
        return Text("")
    if isinstance(value, Text):
        return value
    return Text(printable(str(value)), justify="right" if isinstance(value, int) else "left")


def printable(text: str, *, json_escapes: bool = False) -> str:
    """The text with each control character of a terminal written as an escape."""
    if text.isprintable():
        return text

    def written(char: str) -> str:
        if char.isprintable():
            return char
        if json_escapes:
            return json.dumps(char)[1:-1]
        return char.encode("unicode_escape", "backslashreplace").decode()

    return "".join(map(written, text))


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A progress bar on stderr for long work; nothing if stderr is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(what, total=None, visible=False)

        def advance(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total, visible=total > _FEW)

        yield advance
