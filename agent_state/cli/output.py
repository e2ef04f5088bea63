"""Output to the terminal: tables and lines for people on stdout, JSON alone for scripts.

Ids and states are text from outside: it must not move the cursor or colour the line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.highlighter import JSONHighlighter
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
    """Print one line on stderr; nothing if nobody can read it there."""
    _say(f"agent-state: {printable(line)}\n", sys.stderr)


def announce(line: str) -> None:
    """Print one line of a server on stdout at once; nothing if nobody can read it there."""
    _say(f"{printable(line)}\n", sys.stdout)


def _say(text: str, stream: TextIO) -> None:
    """Write to a stream whose reader may have gone. A server goes on without it."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # a device
            os.dup2(nowhere.fileno(), stream.fileno())


def show_json(value: object) -> None:
    """Print JSON on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=not is_utf8(sys.stdout))
    sys.stdout.write("".join(f"{printable_json(line)}\n" for line in text.split("\n")))


def is_utf8(stream: TextIO) -> bool:
    """Whether a stream takes any text."""
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def show_state(state: dict[str, Any]) -> None:
    """Print a state as JSON, in colour on a terminal."""
    text = json.dumps(state, indent=2, ensure_ascii=False)
    shown = "\n".join(printable_json(line) for line in text.split("\n"))
    # rich.json.JSON would parse the text, and print what the escapes stand for.
    console = out()
    styled = JSONHighlighter()(Text(shown)) if console.is_terminal else Text(shown)
    console.print(styled, soft_wrap=True)


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


def printable(text: str) -> str:
    """The text with each control character of a terminal written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def printable_json(line: str) -> str:
    """A line of JSON in which each control character is written as an escape of JSON."""
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)


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
