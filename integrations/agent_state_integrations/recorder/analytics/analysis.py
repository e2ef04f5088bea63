"""Analytics of a log in one pass and bounded memory: the counts and the score."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import StateNotFoundError, storage_error
from agent_state.storage import logs
from agent_state_integrations.recorder.analytics.score import Score, ScoreName, score
from agent_state_integrations.recorder.analytics.summary import BOUND, BoundedCounter, LogSummary
from agent_state_integrations.recorder.analytics.tokens import Prices, tokens_of
from agent_state_integrations.recorder.analytics.workers import LogPart, summarise
from agent_state_integrations.recorder.copies import CopyIndex
from agent_state_integrations.recorder.message import UNKNOWN
from agent_state_integrations.recorder.reader import LogSource, copies_among, sources
from agent_state_integrations.recorder.rules import Rules

RANGE = 16 * 1024 * 1024
"""Bytes of a plain file that are summed up as one part."""
ALONE = 4 * RANGE
"""Up to so many bytes one process is faster than starting others."""
TOP_KEYWORDS, TOP_TAGS, TOP_SESSIONS = 20, 10, 20


@dataclass(frozen=True, slots=True)
class LogAnalysis:
    """The result of analysing a log: when, and with which rules."""

    path: Path
    made_at: datetime
    rules: str
    summary: LogSummary
    score: Score
    prices: Prices | None = None

    def report(self) -> dict[str, Any]:
        """The report as an object of JSON values; every field is there for an empty log, too."""
        return _report(self)


def analyse(
    path: str | PathLike[str],
    *,
    rules: Rules | None = None,
    score_name: ScoreName = "none",
    prices: Prices | None = None,
    workers: int | None = None,
    clock: Clock | None = None,
) -> LogAnalysis:
    """Read a log or a folder of logs, and sum it up. Blocks.

    ``path`` is what ``reading.read`` takes; a folder in which there is nothing is an empty log.
    ``prices``: what tokens cost; without it they are only counted. ``rules`` enrich messages that
    lack it (by default ``standard``). ``workers``: processes, by default one for each processor
    where the log is large; the result does not depend on it.
    Raises as ``reading.read``.
    """
    rules = rules or Rules.load()
    clock = clock or SystemClock()
    with ExitStack() as stack:
        try:
            found = stack.enter_context(sources(path))
        except StateNotFoundError:
            if not Path(path).is_dir():
                raise
            found = []
        count = _workers(found) if workers is None else workers
        copies = copies_among(found)
        total = summarise(_parts(found, copies), rules, count)
        total.copies = sum(copies.count(source.path) for source in found)
    return LogAnalysis(Path(path), clock.now(), rules.name, total, score(total, score_name), prices)


def _workers(found: Sequence[LogSource]) -> int:
    size = 0
    for source in found:
        try:
            size += source.path.stat().st_size
        except OSError:  # moved in the meantime; reading it finds its new place
            continue
    return 1 if size <= ALONE else os.cpu_count() or 1


def _parts(found: Sequence[LogSource], copies: CopyIndex) -> Iterator[LogPart]:
    """The parts of all files, in order. How they are cut depends on nothing but the files."""
    number = 0
    for source in found:
        for part in _parts_of(source, number, copies):
            number += 1
            yield part


def _parts_of(source: LogSource, number: int, copies: CopyIndex) -> Iterator[LogPart]:
    opened = source.opened()
    if opened is None:
        return
    file, path, kind = opened
    received = source.received
    if kind != "jsonl" or path in copies:
        changed = copies if path in copies else None
        yield LogPart(number, path, kind, received, file, copies=changed)
        return
    with file:
        try:
            fd = file.fileno()
            size = os.fstat(fd).st_size
            start = 0
            while start < size:
                end = logs.next_line(fd, min(size, start + RANGE), size)
                own = os.fdopen(os.dup(fd), "rb", buffering=0)
                yield LogPart(number, path, kind, received, own, start, end)
                start, number = end, number + 1
        except OSError as error:
            raise storage_error(error, "reading a log", path=path) from error


def _report(analysis: LogAnalysis) -> dict[str, Any]:
    summary, total = analysis.summary, analysis.summary.messages
    return {
        "timestamp": stamp(analysis.made_at),
        "total_messages": total,
        "total_items": total - summary.in_threads + summary.threads,
        "total_messages_within_threads": summary.in_threads if summary.threads else total,
        "is_defragmented": summary.threads > 0,
        "collaboration_score": analysis.score.value,
        "speakers": _counts(summary.speakers),
        "message_types": _counts(summary.message_types),
        "chain_types": _without_none(_counts(summary.chain_types)),
        "ace_tiers": _counts(summary.ace_tiers),
        "keywords": [list(pair) for pair in summary.keywords.ranked(TOP_KEYWORDS)],
        "timeline": dict(sorted(summary.days.counts.items())),
        "metadata_insights": {
            "shl_tags_frequency": dict(summary.shl_tags.ranked(TOP_TAGS)),
            "consolidation_ratio": {
                "consolidated_count": summary.consolidated,
                "total_count": total,
                "consolidation_percentage": _percentage(summary.consolidated, total),
            },
            "content_hash_coverage": _percentage(summary.with_hash, total),
            "content_hash_count": summary.with_hash,
            "content_hash_percentage": _percentage(summary.with_hash, total),
        },
        "sessions": _sessions(summary),
        "tokens": tokens_of(summary.tokens.counts, analysis.prices),
        "copies_left_out": summary.copies,
        "source": str(analysis.path),
        "rules": analysis.rules,
        "score": analysis.score.to_object(),
        "enriched_messages": summary.enriched,
        "empty_messages": summary.empty,
        "distinct_messages": (distinct := summary.sample.distinct(total - summary.empty)),
        "repeated_messages": total - summary.empty - distinct,
        "distinct_is_estimate": summary.sample.full,
        "skipped_lines": {
            "count": summary.skipped.total() + summary.skipped.other,
            "reasons": _counts(summary.skipped),
        },
    }


def _without_none(counts: dict[str, int]) -> dict[str, int]:
    """Domains as in the first recorder's report: ``unknown`` counts the messages without one."""
    none = counts.pop("none", 0) + counts.pop("unknown", 0)
    if not none:
        return counts
    return dict(sorted({**counts, "unknown": none}.items(), key=lambda each: (-each[1], each[0])))


def _sessions(summary: LogSummary) -> dict[str, Any]:
    """How many contexts there are, and the messages of the largest of them."""
    counts = {name: n for name, n in summary.contexts.ranked() if name not in ("", UNKNOWN)}
    largest = dict(list(counts.items())[:TOP_SESSIONS])
    return {"session_count": len(counts), "messages_by_session": largest}


def _counts(counter: BoundedCounter) -> dict[str, int]:
    """Names with their counts, the largest first; ``other`` counts names over the bound."""
    counts = dict(counter.ranked(BOUND))
    if counter.other:
        counts["other"] = counts.get("other", 0) + counter.other
    return counts


def _percentage(part: int, total: int) -> float:
    return round(part / total * 100, 2) if total else 0.0
