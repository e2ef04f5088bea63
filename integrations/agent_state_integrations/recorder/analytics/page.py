"""Charts as SVG, drawn by hand: bars with names, and columns over time. Everything is escaped.

The report as one HTML page: no script, nothing from elsewhere, light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from html import escape
from itertools import groupby
from math import ceil
from typing import Any

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


_BARS = 12

_STYLE = """
:root{color-scheme:light dark;--ground:#f7f7f4;--card:#fff;--ink:#1c2024;--soft:#5b636b;
--line:#e3e4df;--track:#f0f0ec;--a:#2f6fb3;--b:#3d8b6d;--c:#b0692b;--d:#7a5ea8}
@media(prefers-color-scheme:dark){:root{--ground:#14171a;--card:#1c2024;--ink:#e8eaec;
--soft:#a2abb3;--line:#2d3339;--track:#262b30;--a:#6ba6e4;--b:#68b997;--c:#dd9a5c;--d:#ab93d6}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:1.05rem;margin:0 0 14px}
p{margin:0 0 8px}.soft{color:var(--soft)}header .soft{overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:22px 24px;margin-top:20px}
.grid2{display:grid;gap:0 20px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:18px;margin:0}
.figures div{min-width:0}.figures dt{color:var(--soft);font-size:.85rem}
.figures dd{margin:0;font-size:1.6rem;font-weight:650;font-variant-numeric:tabular-nums}
.score{display:flex;flex-wrap:wrap;gap:28px;align-items:flex-start}
.score figure{margin:0;text-align:center;flex:none}.score svg{width:150px;height:150px}
.score ul{list-style:none;margin:0;padding:0;flex:1;min-width:min(100%,320px)}
.score li{margin-bottom:12px}.score b{font-weight:600}
.score .of{float:right;font-variant-numeric:tabular-nums}
.meter{height:8px;border-radius:4px;background:var(--track);margin:4px 0}
.meter i{display:block;height:100%;border-radius:4px;background:var(--b);min-width:2px}
small{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;font:13px system-ui,sans-serif}
.chart{overflow-x:auto}svg[viewBox^="0 0 980"]{min-width:600px}
svg text{fill:var(--ink)}svg .name,svg .tick{text-anchor:end}svg .last{text-anchor:end}
svg .name{font-size:12px}
svg .tick,svg .day,svg .share{fill:var(--soft);font-size:12px}svg .value{font-weight:600}
svg .grid{stroke:var(--line)}svg .track{fill:var(--track)}
svg .a{fill:var(--a)}svg .b{fill:var(--b)}svg .c{fill:var(--c)}svg .d{fill:var(--d)}
svg g:hover rect:last-of-type{opacity:.8}
details{margin-top:14px}summary{cursor:pointer;color:var(--soft);font-size:.9rem}
summary:focus-visible{outline:2px solid var(--a);outline-offset:3px;border-radius:4px}
.scroll{overflow-x:auto;max-height:340px}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin-top:8px}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}td:nth-child(n+2),th:nth-child(n+2){text-align:right;
font-variant-numeric:tabular-nums;white-space:nowrap}
.words{display:flex;flex-wrap:wrap;gap:8px;margin:0;padding:0;list-style:none}
.words li{background:var(--track);border-radius:99px;padding:3px 12px;overflow-wrap:anywhere}
@media print{body{background:#fff}section{break-inside:avoid}}
"""


def page(report: Mapping[str, Any]) -> str:
    """The page of a report, as ``LogAnalysis.report`` makes it."""
    insights = report["metadata_insights"]
    total = insights["consolidation_ratio"]["total_count"]
    sections = [
        _figures(report, total),
        _score(report["score"]),
        _section(
            "Messages over time",
            columns("Messages by day", report["timeline"]),
            "Day (UTC)",
            report["timeline"],
            total,
        ),
        '<div class="grid2">',
        _bars("Speakers", "Speaker", report["speakers"], total, "a"),
        _bars("Domains", "Domain", report["chain_types"], total, "b"),
        _bars("Tiers", "Tier", _tiers(report["ace_tiers"]), total, "c"),
        _bars("Tags", "Tag", insights["shl_tags_frequency"], total, "d"),
        "</div>",
        _keywords(report["keywords"]),
        _notes(report, insights),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "
        "style-src 'unsafe-inline'\">\n"
        f"<title>Conversation analytics</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        "<main>\n<header><h1>Conversation analytics</h1>"
        f'<p class="soft">{shown(report["source"], 300)} · {escape(report["timestamp"])}</p>'
        "</header>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )  # fmt: skip


def _figures(report: Mapping[str, Any], total: int) -> str:
    about = "≈ " if report["distinct_is_estimate"] else ""
    figures = (
        ("Messages", f"{total:,}"),
        ("Speakers", f"{len(report['speakers']):,}"),
        ("Days", f"{len(report['timeline']):,}"),
        ("Different texts", f"{about}{report['distinct_messages']:,}"),
        ("Empty", f"{report['empty_messages']:,}"),
        ("Lines left out", f"{report['skipped_lines']['count']:,}"),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<section aria-label="Overview"><dl class="figures">{items}</dl></section>'


def _score(score: Mapping[str, Any]) -> str:
    parts = "".join(
        f'<li><b>{escape(part["name"])}</b><span class="of">{part["points"]:.1f} of '
        f'{part["most"]:.0f}</span><div class="meter"><i style="width:'
        f'{100 * part["points"] / part["most"]:.1f}%"></i></div>'
        f"<small>{shown(part['reason'], 300)}</small></li>"
        for part in score["parts"]
    )
    value = score["value"]
    around = 326.7  # 2π · 52
    return (
        '<section><h2>Collaboration score</h2><div class="score"><figure>'
        f'<svg viewBox="0 0 120 120" role="img" aria-label="{value} of 100">'
        '<circle cx="60" cy="60" r="52" fill="none" stroke="var(--track)" stroke-width="11"/>'
        '<circle cx="60" cy="60" r="52" fill="none" stroke="var(--b)" stroke-width="11" '
        f'stroke-linecap="round" stroke-dasharray="{around * value / 100:.1f} {around}" '
        'transform="rotate(-90 60 60)"/>'
        f'<text x="60" y="68" text-anchor="middle" font-size="25" font-weight="650">{value:g}'
        f"</text></svg><small>{escape(score['name'])}, of 100</small></figure>"
        f"<ul>{parts}</ul></div></section>"
    )


def _section(
    title: str, chart: str, head: str, counts: Mapping[str, int], total: int, *, note: str = ""
) -> str:
    if not counts:
        return f'<section><h2>{title}</h2><p class="soft">Nothing yet.</p></section>'
    rows = ((name, f"{n:,}", f"{n / max(total, 1):.1%}") for name, n in counts.items())
    return (
        f'<section><h2>{title}</h2><div class="chart">{chart}</div>{note}'
        "<details><summary>As a table</summary>"
        f'<div class="scroll">{_table((head, "Messages", "Share"), rows)}</div>'
        "</details></section>"
    )


def _bars(title: str, head: str, counts: Mapping[str, int], total: int, color: str) -> str:
    few = dict(list(counts.items())[:_BARS])
    rest = len(counts) - len(few)
    note = f'<p class="soft"><small>and {rest:,} more</small></p>' if rest else ""
    chart = bars(title, few, total, color=color)
    return _section(title, chart, head, counts, total, note=note)


def _tiers(counts: Mapping[str, int]) -> dict[str, int]:
    names = {"A": "A architectural", "C": "C collaborative", "E": "E execution"}
    return {names.get(tier, tier): count for tier, count in counts.items()}


def _keywords(keywords: Iterable[tuple[str, int]]) -> str:
    words = "".join(f"<li>{shown(word, 60)} <small>{n:,}</small></li>" for word, n in keywords)
    content = f'<ul class="words">{words}</ul>' if words else '<p class="soft">Nothing yet.</p>'
    return f"<section><h2>Keywords</h2>{content}</section>"


def _notes(report: Mapping[str, Any], insights: Mapping[str, Any]) -> str:
    ratio = insights["consolidation_ratio"]
    rows = [
        ("Consolidated messages", f"{ratio['consolidated_count']:,}",
         f"{ratio['consolidation_percentage']} %"),
        ("Content hashes", "", f"{insights['content_hash_coverage']} %"),
        ("Repeated messages", f"{report['repeated_messages']:,}", ""),
        (f"Enriched by the rules {report['rules']}", f"{report['enriched_messages']:,}", ""),
        *((f"Left out: {reason}", f"{count:,}", "")
          for reason, count in report["skipped_lines"]["reasons"].items()),
    ]  # fmt: skip
    return f"<section><h2>Data</h2>{_table(('What', 'Count', 'Share'), rows)}</section>"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{shown(cell, 200)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
