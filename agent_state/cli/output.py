"""Output to the terminal: tables and lines for people on stdout, JSON alone for scripts.

Ids and states are text from outside: it must not move the cursor or colour the line. Where nobody
looks (a pipe, a file) there are no colours and lines are not wrapped; rich is then not loaded.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import orjson

from agent_state.errors import SchemaTooNewError, StateCorruptedError

if TYPE_CHECKING:
    from rich.console import Console

OK, PROBLEM, MISUSE, STOPPED = 0, 1, 2, 130
"""Exit codes: success; a problem was found; it could not be carried out; Ctrl-C."""

_AFTER_SECONDS = 1.0
"""Work that takes longer shows a progress bar."""
_DECLARED = ("COLUMNS", "FORCE_COLOR")
_UNPRINTABLE = re.compile(rb"[^\n -~]")

Advance = Callable[[int, int], None]
"""Called with the amount that is done and the total amount; 0 if that is unknown."""


def is_watched() -> bool:
    """Whether a person looks at stdout: a terminal, or what the environment declares to be one."""
    return sys.stdout.isatty() or not os.environ.keys().isdisjoint(_DECLARED)


def console() -> Console:
    """Standard output for a person."""
    from rich.console import Console  # only who is watched waits for it

    return Console(highlight=False)


def line_width() -> int:
    """How many characters a line may have: those of a terminal; a million for a pipe."""
    return console().width if is_watched() else 1_000_000


def print_line(line: str = "", style: str = "") -> None:
    """Print one line for a person."""
    if not is_watched():
        sys.stdout.write(f"{printable(line)}\n")
        return
    from rich.text import Text

    console().print(Text(printable(line), style), soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """``1 message``, ``2 messages``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def print_error(line: str) -> None:
    """Print one line on stderr; nothing if nobody can read it there."""
    _say(f"agent-state: {printable(line)}\n", sys.stderr)


def fail(error: Exception) -> int:
    """Print an error in one line, unless the reader of the output has left; the exit code."""
    if not isinstance(error, BrokenPipeError):
        print_error(str(error))
    return PROBLEM if isinstance(error, StateCorruptedError | SchemaTooNewError) else MISUSE


def announce(line: str) -> None:
    """Print one line of a server on stdout at once; nothing if nobody can read it there."""
    _say(f"{printable(line)}\n", sys.stdout)


def _say(text: str, stream: TextIO) -> None:
    """Write to a stream whose reader may have gone. A server goes on without it."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Let what a stream holds, and all that is written to it from now on, go nowhere."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # a device
        os.dup2(nowhere.fileno(), stream.fileno())


def show_json(value: object) -> None:
    """Print JSON on stdout."""
    try:
        data = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    except TypeError:  # an integer of more than 64 bits, or half a surrogate pair
        data = b"\xff"
    if not _UNPRINTABLE.search(data):
        sys.stdout.write(f"{data.decode()}\n")
        return
    import json

    ascii_only = not is_utf8(sys.stdout)
    text = json.dumps(value, indent=2, ensure_ascii=ascii_only, default=asdict)
    sys.stdout.write("".join(f"{printable_json(line)}\n" for line in text.split("\n")))


def is_utf8(stream: TextIO) -> bool:
    """Whether a stream takes any text."""
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def show_import(report: Any, what: str, *, dry_run: bool, as_json: bool) -> int:
    """Print what was brought over from another program; the exit code.

    ``report``: a dataclass whose ``refused`` has the reason for each name. ``what``: its counts.
    """
    if as_json:
        show_json(asdict(report))
    else:
        print_line(f"{what} {'would be' if dry_run else 'are'} brought over")
        for name, why in report.refused.items():
            print_error(f"not brought over: {name}: {why}")
    return PROBLEM if report.refused else OK


def show_state(state: dict[str, Any]) -> None:
    """Print a state as JSON, in colour on a terminal."""
    import json

    text = json.dumps(state, indent=2, ensure_ascii=False)
    shown = "\n".join(printable_json(line) for line in text.split("\n"))
    if not is_watched():
        sys.stdout.write(f"{shown}\n")
        return
    from rich.highlighter import JSONHighlighter
    from rich.text import Text

    # rich.json.JSON would parse the text, and print what the escapes stand for.
    out = console()
    styled = JSONHighlighter()(Text(shown)) if out.is_terminal else Text(shown)
    out.print(styled, soft_wrap=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, most: int = 0) -> None:
    """Print a table; None is an empty cell, and a column of empty cells is left out.

    ``most``: show only so many rows and count the others; 0 for all.
    """
    shown: list[list[str]] = []
    numbers, words = set[int](), set[int]()
    rest = 0
    for row in rows:
        if most and len(shown) >= most:
            rest += 1
            continue
        for index, value in enumerate(row):
            if value is not None:
                (numbers if isinstance(value, int) else words).add(index)
        shown.append(["" if value is None else printable(str(value)) for value in row])
    used = [
        index for index in range(len(columns)) if index == 0 or any(row[index] for row in shown)
    ]
    head = [columns[index] for index in used]
    cells = [[row[index] for index in used] for row in shown]
    right = {place for place, index in enumerate(used) if index in numbers - words}
    (_show_watched if is_watched() else _write_table)(head, cells, right)
    if rest:
        print_line(f"… and {rest} more")


def _show_watched(head: Sequence[str], rows: Iterable[Sequence[str]], right: set[int]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            *(
                Text(cell, justify="right" if place in right else "left")
                for place, cell in enumerate(row)
            )
        )
    console().print(table)


def _write_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> None:
    """The same table for a pipe: as wide as it needs to be."""
    columns = [*zip(head, *rows, strict=True)]
    widths = [max(map(_width, column)) for column in columns]
    lines = ["", _aligned(head, widths, set()), " " + "─" * (sum(widths) + 3 * len(widths) - 3)]
    lines += [_aligned(row, widths, right) for row in rows]
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in [*lines, ""]))


def _aligned(row: Sequence[str], widths: Sequence[int], right: set[int]) -> str:
    cells = []
    for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
        space = " " * (width - _width(cell))
        cells.append(space + cell if place in right else cell + space)
    return " " + "   ".join(cells)


def _width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


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
    import json

    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)


class LogFormatter(logging.Formatter):
    """Log lines for a terminal: nothing in them moves its cursor, or looks like another line."""

    def format(self, record: logging.LogRecord) -> str:
        """The message and its traceback; the lines after the first are indented."""
        return "\n  ".join(map(printable, super().format(record).split("\n")))


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A progress bar on stderr for work of more than a second; nothing if that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from threading import Timer

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(what, total=None, visible=False)
        shown = Timer(_AFTER_SECONDS, lambda: bars.update(bar, visible=True))
        shown.daemon = True
        shown.start()
        try:
            yield lambda done, total: bars.update(bar, completed=done, total=total or None)
        finally:
            shown.cancel()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'alice'?``, or nothing when no known word is like it."""
    from difflib import get_close_matches

    close = get_close_matches(word, [*known], n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
