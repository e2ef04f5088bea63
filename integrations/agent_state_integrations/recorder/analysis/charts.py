"""Charts as SVG, drawn by hand: bars with names, and columns over time. Everything is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from html import escape
from itertools import groupby
from math import ceil

WIDE, NARROW = 980, 470
"""Widths at which text has its natural size."""
_ROW = 30
_NAME = 196
_VALUE = 92
_HEIGHT, _BASE, _LEFT = 220, 190, 52
_MOST_COLUMNS = 120
_TO = " to "


def shown(text: str, most: int = 26) -> str:
    """Other people's text, safe in a page and cut to a length."""
    printable = "".join(char if char.isprintable() else "�" for char in text)
    return escape(printable if len(printable) <= most else f"{printable[: most - 1]}…")


def bars(title: str, counts: Mapping[str, int], total: int, *, color: str = "a") -> str:
    """A bar for each name, the largest first, with its count and share."""
    largest = max(counts.values(), default=0) or 1
    room = NARROW - _NAME - _VALUE
    rows = []
    for index, (name, count) in enumerate(counts.items()):
        top = index * _ROW
        length = max(2.0, room * count / largest)
        rows.append(
            f"<g><title>{shown(name, 200)}: {count:,} ({count / max(total, 1):.1%})</title>"
            f'<text class="name" x="{_NAME - 12}" y="{top + 19}">{shown(name)}</text>'
            f'<rect class="track" x="{_NAME}" y="{top + 5}" width="{room}" height="20" rx="4"/>'
            f'<rect class="{color}" x="{_NAME}" y="{top + 5}" width="{length:.1f}" height="20" '
            f'rx="4"/>'
            f'<text class="value" x="{_NAME + room + 12}" y="{top + 19}">{count:,}'
            f'<tspan class="share" dx="6">{count / max(total, 1):.0%}</tspan></text></g>'
        )
    height = max(1, len(rows)) * _ROW
    return _svg(title, NARROW, height, "".join(rows))


def columns(title: str, days: Mapping[str, int]) -> str:
    """A column for each day, or where they are many for some days together; without gaps."""
    series = _series(days)
    largest = max((count for _, count in series), default=0) or 1
    top = _nice(largest)
    step = (WIDE - _LEFT - 8) / max(1, len(series))
    parts = []
    for quarter in range(5):
        y = _BASE - (_BASE - 14) * quarter / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}">{_short(top * quarter / 4)}</text>'
        )
    for index, (name, count) in enumerate(series):
        height = (_BASE - 14) * count / top
        x = _LEFT + index * step
        parts.append(
            f"<g><title>{escape(name)}: {count:,}</title>"
            f'<rect class="a" x="{x + step * 0.1:.2f}" y="{_BASE - height:.1f}" '
            f'width="{step * 0.8:.2f}" height="{height:.1f}" rx="{min(3.0, step * 0.3):.1f}"/></g>'
        )
    if series:
        first, last = series[0][0].split(_TO)[0], series[-1][0].rsplit(_TO, maxsplit=1)[-1]
        parts.append(f'<text class="day" x="{_LEFT}" y="{_HEIGHT - 8}">{first}</text>')
        if last != first:
            parts.append(f'<text class="day last" x="{WIDE}" y="{_HEIGHT - 8}">{last}</text>')
    return _svg(title, WIDE, _HEIGHT, "".join(parts))


def _svg(title: str, width: int, height: int, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg>"
    )


def _series(days: Mapping[str, int]) -> Sequence[tuple[str, int]]:
    """Each day from the first to the last; some together, where there are too many of them."""
    dated = sorted((date.fromisoformat(day), count) for day, count in days.items())
    if not dated:
        return []
    first, last = dated[0][0], dated[-1][0]
    width = ceil(((last - first).days + 1) / _MOST_COLUMNS)
    sums = {
        index: sum(count for _, count in group)
        for index, group in groupby(dated, key=lambda item: (item[0] - first).days // width)
    }
    series = []
    for index in range(max(sums) + 1):
        begin = first + timedelta(days=index * width)
        end = min(last, begin + timedelta(days=min(width - 1, (last - begin).days)))
        name = str(begin) if begin == end else f"{begin}{_TO}{end}"
        series.append((name, sums.get(index, 0)))
    return series


def _nice(largest: int) -> int:
    """A round number, no smaller than the largest, that is a multiple of four."""
    power: int = 10 ** max(0, len(str(largest)) - 1)
    for factor in (1, 2, 4, 5, 8, 10):
        if factor * power >= largest:
            return max(4, ceil(factor * power / 4) * 4)
    return 4 * power


def _short(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1_000_000:g}M"
    return f"{value / 1_000:g}k" if value >= 10_000 else f"{value:,.0f}"
