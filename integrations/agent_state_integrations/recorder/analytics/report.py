"""Reports of an analysis: JSON, Markdown, lines for a terminal, and the files they go to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC
from os import PathLike
from pathlib import Path
from typing import Any

import orjson

from agent_state.errors import MissingExtraError, storage_error
from agent_state_integrations.recorder.analytics.analysis import LogAnalysis
from agent_state_integrations.recorder.analytics.page import page
from agent_state_integrations.recorder.analytics.tokens import KINDS

Report = Mapping[str, Any]
_DAYS = 10
_SHOWN = 20


def to_json(analysis: LogAnalysis) -> str:
    """The report as JSON, with its newline."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(analysis.report(), option=options).decode()


def to_html(analysis: LogAnalysis) -> str:
    """The report as one page that needs nothing else."""
    return page(analysis.report())


def to_markdown(analysis: LogAnalysis) -> str:
    """The report for people, in the sections of the first recorder's report."""
    report = analysis.report()
    total = report["metadata_insights"]["consolidation_ratio"]["total_count"]
    sections = [
        "# Conversation Analytics Report",
        f"Generated: {report['timestamp']}",
        "## Overview",
        _overview(report),
        "## Speaker Activity",
        _table(("Speaker", "Messages", "Share"), _shares(report["speakers"], total)),
        "## Sessions",
        _table(
            ("Session", "Messages", "Share"),
            _shares(report["sessions"]["messages_by_session"], total),
        ),
        "## Domain Focus",
        _table(("Domain", "Messages", "Share"), _shares(report["chain_types"], total)),
        "## ACE Tier Distribution",
        _table(("Tier", "Messages", "Share"), _shares(report["ace_tiers"], total)),
        "## Top Keywords",
        _table(("Keyword", "Count"), [(word, f"{n:,}") for word, n in report["keywords"]]),
        f"## Timeline (Last {_DAYS} Days)",
        _table(
            ("Day (UTC)", "Messages"),
            [(day, f"{n:,}") for day, n in list(report["timeline"].items())[-_DAYS:]],
        ),
        "## Tokens",
        *_tokens(report),
        "## Metadata Insights",
        *_metadata(report),
        "## Collaboration Metrics",
        *_score(report),
        "## Key Findings",
        "\n".join(f"{n}. {_escaped(line)}" for n, line in enumerate(findings(report), 1)),
    ]
    return "\n\n".join(sections) + "\n"


def _overview(report: Report) -> str:
    skipped = report["skipped_lines"]
    return _list(
        [
            f"**Total items**: {report['total_items']:,}",
            f"**Total messages**: {report['total_messages']:,}",
            f"**Sessions**: {report['sessions']['session_count']:,}",
            f"**Collaboration score**: {_of_100(report)}",
            f"**Different texts**: {_about(report)}{report['distinct_messages']:,}",
            f"**Empty messages**: {report['empty_messages']:,}",
            f"**Lines left out**: {skipped['count']:,}{_reasons(skipped['reasons'])}",
        ]
    )


def _metadata(report: Report) -> tuple[str, str]:
    insights = report["metadata_insights"]
    ratio = insights["consolidation_ratio"]
    count, total = ratio["consolidated_count"], ratio["total_count"]
    lines = [
        f"**Consolidated**: {count:,} of {total:,} ({ratio['consolidation_percentage']} %)",
        f"**Content hashes**: {insights['content_hash_coverage']} % of messages",
        (
            f"**Enriched for this report**: {report['enriched_messages']:,} "
            f"with the rules `{report['rules']}`"
        ),
    ]
    tags = [(tag, f"{n:,}") for tag, n in insights["shl_tags_frequency"].items()]
    return _list(lines), _table(("Tag", "Messages"), tags)


def _score(report: Report) -> tuple[str, str]:
    score = report["score"]
    rows = [
        (part["name"], f"{part['points']:.2f}", f"{part['most']:.0f}", part["reason"])
        for part in score["parts"]
    ]
    return (
        f"Score `{score['name']}`: {_of_100(report)}. {score['limits']}",
        _table(("Part", "Points", "Of", "Reason"), rows),
    )


def _of_100(report: Report) -> str:
    value = report["collaboration_score"]
    return "none" if value is None else f"**{value}** of 100"


def _tokens(report: Report) -> Iterator[str]:
    tokens = report["tokens"]
    if not tokens["by_model"]:
        yield "No message says what it used."
        return
    priced = tokens["currency"] is not None
    cost = (f"Cost ({tokens['currency']})",) if priced else ()
    for title, name in (("Model", "by_model"), ("Agent", "by_agent"), ("Day (UTC)", "by_day")):
        heads = (title, "Input", "Output", "Cache read", "Cache written", *cost)
        rows = [
            (
                name_of,
                *(f"{used[f'{kind}_tokens']:,}" for kind in KINDS),
                *((f"{used['cost']:,.4f}",) if priced else ()),
            )
            for name_of, used in list(tokens[name].items())[:_SHOWN]
        ]
        yield _table(heads, rows)
    if tokens["models_without_price"]:
        names = ", ".join(map(_escaped, tokens["models_without_price"]))
        yield f"Without a price, and so not in the cost: {names}."


def findings(report: Report) -> list[str]:
    """Four sentences with the main results."""
    total = report["metadata_insights"]["consolidation_ratio"]["total_count"]
    if not total:
        return [
            "There are no messages.",
            "There are no speakers.",
            "No domain was touched.",
            "There is nothing more to say.",
        ]
    speaker, said = _first(report["speakers"])
    named = {name: n for name, n in report["chain_types"].items() if name != "unknown"}
    domain, touched = _first(named or {"none": total})
    return [
        f"{speaker} says most: {said:,} of {total:,} messages ({said / total:.1%}).",
        f"The main domain is {domain}, with {touched:,} messages ({touched / total:.1%}).",
        (
            f"{_about(report)}{report['repeated_messages']:,} messages repeat others, and "
            f"{report['empty_messages']:,} are empty."
        ),
        _score_in_words(report),
    ]


def _score_in_words(report: Report) -> str:
    score = report["score"]
    if score["value"] is None:
        used = report["tokens"]["total"]
        return f"{used['output_tokens']:,} tokens were written, {used['input_tokens']:,} read."
    weakest = min(score["parts"], key=lambda part: part["points"] / part["most"])
    return (
        f"The score {score['name']} is {score['value']} of 100; least of it comes from "
        f"{weakest['name']}: {weakest['reason']}."
    )


def to_lines(analysis: LogAnalysis) -> list[str]:
    """A summary for a terminal."""
    report = analysis.report()
    total = report["metadata_insights"]["consolidation_ratio"]["total_count"]
    lines = [
        f"{total:,} messages, {len(report['speakers'])} speakers, {len(report['timeline'])} days",
        *(
            [f"score {analysis.score.name}: {analysis.score.value} of 100"]
            if analysis.score.value is not None
            else []
        ),
        *(
            f"  {part['name']:<20} {part['points']:5.2f}  {part['reason']}"
            for part in report["score"]["parts"]
        ),
    ]
    for what, counts in (
        ("speakers", report["speakers"]),
        ("domains", report["chain_types"]),
        ("tiers", report["ace_tiers"]),
        ("keywords", dict(report["keywords"])),
    ):
        shown = ", ".join(f"{name} {n:,}" for name, n in list(counts.items())[:5])
        lines.append(f"{what}: {shown or 'none'}")
    if report["tokens"]["by_model"]:
        lines.append(f"tokens: {_tokens_in_short(report['tokens'])}")
    if report["copies_left_out"]:
        lines.append(f"copies left out: {report['copies_left_out']:,}")
    skipped = report["skipped_lines"]
    if skipped["count"]:
        reasons = ", ".join(f"{n:,} {why}" for why, n in skipped["reasons"].items())
        lines.append(f"lines left out: {reasons}")
    return lines


def _tokens_in_short(tokens: Mapping[str, Any]) -> str:
    used = tokens["total"]
    parts = [f"{used[f'{kind}_tokens']:,} {kind.replace('_', ' ')}" for kind in KINDS]
    cost = [f"{used['cost']:,.2f} {tokens['currency']}"] if "cost" in used else []
    return ", ".join([*parts, *cost])


def write(analysis: LogAnalysis, folder: str | PathLike[str]) -> list[Path]:
    """Write JSON, Markdown and HTML as ``analytics_report_YYYYMMDD_HHMMSS`` (UTC) into a folder.

    The folder is made. Where such a report is there already, the name gets ``_2``, ``_3``, ….
    The HTML page is left out if Jinja2 is not installed. Raises ``StorageError``.
    """
    where = Path(folder)
    texts = {".json": to_json(analysis), ".md": to_markdown(analysis)}
    with suppress(MissingExtraError):
        texts[".html"] = to_html(analysis)
    stem = f"analytics_report_{analysis.made_at.astimezone(UTC):%Y%m%d_%H%M%S}"
    try:
        where.mkdir(parents=True, exist_ok=True)
        number, paths = 1, [where / f"{stem}{ending}" for ending in texts]
        while not _taken(paths):
            number += 1
            paths = [where / f"{stem}_{number}{ending}" for ending in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise storage_error(error, "writing a report", path=where) from error
    return paths


def _taken(paths: Iterable[Path]) -> bool:
    """Make all of these files; or none, when there is one of them."""
    made: list[Path] = []
    for path in paths:
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            for mine in made:
                mine.unlink()
            return False
        made.append(path)
    return True


def _first(counts: Mapping[str, int]) -> tuple[str, int]:
    return next(iter(counts.items()))


def _about(report: Report) -> str:
    return "about " if report["distinct_is_estimate"] else ""


def _reasons(reasons: Mapping[str, int]) -> str:
    shown = ", ".join(f"{n:,}: {reason}" for reason, n in list(reasons.items())[:3])
    return f" ({_escaped(shown)})" if shown else ""


def _shares(counts: Mapping[str, int], total: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]]
    rows = [(name, f"{n:,}", f"{n / total:.1%}") for name, n in list(counts.items())[:_SHOWN]]
    rest = sum(list(counts.values())[_SHOWN:])
    if rest:
        rows.append((f"{len(counts) - _SHOWN:,} more", f"{rest:,}", f"{rest / total:.1%}"))
    return rows


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    if not rows:
        return "Nothing."
    lines = [heads, tuple("---" if n == 0 else "---:" for n in range(len(heads))), *rows]
    if heads[-1] == "Reason":
        lines[1] = ("---", "---:", "---:", "---")
    first, rule, *others = lines
    return "\n".join(
        f"| {' | '.join(cells)} |"
        for cells in (first, rule, *(tuple(map(_escaped, row)) for row in others))
    )


_MARKS = {ord(mark): f"\\{mark}" for mark in "\\`*_[]<>|#~"} | {10: " ", 13: " "}


def _escaped(text: str) -> str:
    """Data of other programs, with Markdown's own characters escaped."""
    return "".join(c if c.isprintable() else " " for c in text).translate(_MARKS)
