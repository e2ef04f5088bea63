"""The report as one HTML page, with SVG charts, by a Jinja2 template that escapes all data."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from functools import lru_cache
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from agent_state_integrations.recorder.lazy_imports import jinja2

_MAX_COLUMNS = 120


def page(report: Mapping[str, Any]) -> str:
    """The page of a report of ``LogAnalysis.report``. Raises ``MissingExtraError``."""
    return str(_macros().page(report))


def bars(title: str, counts: Mapping[str, int], total: int, *, color: str = "a") -> str:
    """A chart with a bar for each name, in the order of ``counts``."""
    return str(_macros().bars(title, counts, total, color))


def columns(title: str, days: Mapping[str, int]) -> str:
    """A chart with a column for each day, or for several days each if there are many."""
    return str(_macros().columns(title, days))


@lru_cache(maxsize=1)
def _macros() -> Any:
    environment = jinja2().Environment(
        autoescape=True, undefined=jinja2().StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {
        "axis": _axis,
        "by_day": _by_day,
        "named": lambda counts, names: {names.get(key, key): n for key, n in counts.items()},
        "number": "{:,}".format,
        "share": lambda part, total, digits=0: f"{part / max(total, 1):.{digits}%}",
        "short": _short,
        "shown": _shown,
    }
    template = Path(__file__).parent / "templates" / "page.html.j2"
    return environment.from_string(template.read_text("utf-8")).module


def _shown(text: str, most: int = 26) -> str:
    """Data of other programs as a line: printable, and cut to a length."""
    printable = "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text
    )
    return printable if len(printable) <= most else f"{printable[: most - 1]}…"


class _Days(NamedTuple):
    first: date
    last: date
    messages: int


def _by_day(days: Mapping[str, int]) -> list[_Days]:
    """All days from the first to the last; several together if there are too many."""
    dated = sorted((date.fromisoformat(day), count) for day, count in days.items())
    if not dated:
        return []
    begin, end = dated[0][0], dated[-1][0]
    width = ceil(((end - begin).days + 1) / _MAX_COLUMNS)
    sums = {
        index: sum(count for _, count in group)
        for index, group in groupby(dated, key=lambda item: (item[0] - begin).days // width)
    }
    series = []
    for index in range(max(sums) + 1):
        first = begin + timedelta(days=index * width)
        last = min(end, first + timedelta(days=min(width - 1, (end - first).days)))
        series.append(_Days(first, last, sums.get(index, 0)))
    return series


def _axis(series: list[_Days]) -> int:
    """The end of the axis: a round multiple of four that is not below any count."""
    largest = max((days.messages for days in series), default=0) or 1
    power: int = 10 ** (len(str(largest)) - 1)
    for factor in (1, 2, 4, 5, 8, 10):
        if factor * power >= largest:
            return max(4, ceil(factor * power / 4) * 4)
    return 4 * power


def _short(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1_000_000:g}M"
    return f"{value / 1_000:g}k" if value >= 10_000 else f"{value:,.0f}"
