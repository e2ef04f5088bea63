"""Scores from 0 to 100, of five parts of 20, each with its reason in words. The default is none.

No formula here tells collaboration from chance. ``spread`` says how evenly speakers, domains and
tiers share what is said: it looks at different texts, each as it was said first, so that nothing is
gained by repeating or by saying nothing; but sentences put together at random, by speakers chosen
at random, are spread evenly, too. ``legacy-flat`` and ``legacy-nested`` are the formula of the
first recorder, which measures how much there is::

    0.2 · min(speakers / 3 · 100, 100)  + 0.2 · min(domains / 10 · 100, 100)
  + 0.2 · min(messages / 100 · 100, 100)
  + 0.2 · percentage with metadata      + 0.2 · percentage with tags
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import exp, log
from typing import Any, Literal, get_args

from agent_state_integrations.recorder.analytics.summary import (
    OPEN,
    SETTLED,
    LogSummary,
    SampledText,
)

ScoreName = Literal["none", "spread", "legacy-flat", "legacy-nested"]
SCORES: tuple[ScoreName, ...] = get_args(ScoreName)

LIMITS: dict[ScoreName, str] = {
    "none": "A number that says how well a team works together is not known.",
    "spread": (
        "It says how evenly speakers, domains and tiers share what is said. It does not say "
        "whether anybody took up what another said: random sentences by random speakers reach 70 "
        "and more. Compare it with the same team's score of another week, and with nothing else."
    ),
    "legacy-flat": "It says how much there is: 100 empty messages with tags reach 100.",
    "legacy-nested": "It says how much there is: 100 empty messages with tags reach 100.",
}
"""What each score says, and what it cannot say."""

NO_SPEAKERS = frozenset({"", "consolidated", "system", "unknown"})
"""Names that stand for no speaker. Compared in lower case."""
NO_VALUES = frozenset({"", "none", "unknown"})
"""Values that stand for no domain or tier."""
WEIGHT = 20.0
EVIDENCE = 20
"""From this many messages the score is trusted by half: n / (n + 20)."""
DOMAINS = 5
"""Evenly used domains that make the breadth full."""


@dataclass(frozen=True, slots=True)
class ScorePart:
    """One part of a score: ``points`` of ``most``, and why."""

    name: str
    points: float
    most: float
    reason: str


@dataclass(frozen=True, slots=True)
class Score:
    """A score from 0 to 100, the sum of its parts, to two decimals; None: there is none."""

    name: ScoreName
    value: float | None
    parts: tuple[ScorePart, ...]

    def to_object(self) -> dict[str, Any]:
        """The part of a report."""
        return {
            "name": self.name,
            "value": self.value,
            "limits": LIMITS[self.name],
            "parts": [asdict(part) for part in self.parts],
        }


def score(summary: LogSummary, name: ScoreName = "none") -> Score:
    """The score of this name; 0 for an empty log."""
    if name == "none":
        return Score(name, None, ())
    if name == "spread":
        return _spread(summary)
    return _legacy(summary, name)


# -- the formula of the first recorder -----------------------------------------------------------


def _legacy(summary: LogSummary, name: ScoreName) -> Score:
    """Of what the records carry, not of what rules add.

    ``legacy-flat`` looks up domain and tags at the top level of a record, ``legacy-nested`` in
    ``Metadata``, and at the top level what is not there. No domain counts as the domain
    ``unknown``, as every name counts as a speaker.
    """
    flat = name == "legacy-flat"
    speakers = len(summary.speakers.counts)
    domains = len((summary.chains_flat if flat else summary.chains_nested).counts)
    count = summary.messages
    tagged = summary.tagged_flat if flat else summary.tagged_nested
    shares = (
        ("Speaker Diversity", min(speakers / 3 * 100, 100), f"{speakers} speakers, 3 are enough"),
        ("Domain Coverage", min(domains / 10 * 100, 100), f"{domains} domains of 10"),
        ("Message Consistency", min(count / 100 * 100, 100), f"{count} messages, 100 are enough"),
        (
            "Metadata Enrichment",
            _percentage(summary.with_metadata, count),
            f"{summary.with_metadata} of {count} messages have metadata",
        ),
        (
            "SHL Tagging",
            _percentage(tagged, count),
            f"{tagged} of {count} messages have tags",
        ),
    )
    value = 0.0
    for _, percentage, _ in shares:
        value += 0.2 * percentage
    parts = (ScorePart(what, round(0.2 * share, 2), WEIGHT, why) for what, share, why in shares)
    return Score(name, round(value, 2), tuple(parts))


def _percentage(part: int, total: int) -> float:
    return part / total * 100 if total else 0.0


# -- how evenly it is spread -----------------------------------------------------------------------


def _spread(summary: LogSummary) -> Score:
    said = summary.sample.said()
    parts = (_balance(said), _exchange(said), _breadth(said), _tiers(said), _resolution(said))
    return Score("spread", round(sum(part.points for part in parts), 2), parts)


def _part(name: str, share: float, evidence: int, reason: str) -> ScorePart:
    believed = evidence / (evidence + EVIDENCE)
    points = round(WEIGHT * min(1.0, max(0.0, share)) * believed, 2)
    return ScorePart(
        name, points, WEIGHT, f"{reason} ({_counted(evidence)}, believed to {believed:.0%})"
    )


def _counted(count: int) -> str:
    return f"{count:,} different message{'' if count == 1 else 's'}"


def _is_speaker(speaker: str) -> bool:
    return speaker.strip().lower() not in NO_SPEAKERS


def _balance(said: Iterable[SampledText]) -> ScorePart:
    """How evenly the speakers share what is said: the entropy, of what it could be."""
    shares = Counter(one.speaker for one in said if _is_speaker(one.speaker))
    if len(shares) < 2:
        why = "no speakers" if not shares else "only one speaker"
        return _part("Balance", 0.0, shares.total(), why)
    share = _entropy(shares) / log(len(shares))
    most, count = min(shares.items(), key=lambda item: (-item[1], item[0]))
    why = (
        f"{len(shares)} speakers, as even as {share:.0%}; "
        f"{most} says most, {count / shares.total():.0%}"
    )
    return _part("Balance", share, shares.total(), why)


def _exchange(said: Iterable[SampledText]) -> ScorePart:
    """How likely two messages of one context are by different speakers; two in turns are 1/2."""
    contexts: dict[str, Counter[str]] = {}
    for one in said:
        if _is_speaker(one.speaker):
            contexts.setdefault(one.context, Counter())[one.speaker] += 1
    count, chances, shared = 0, 0.0, 0
    for speakers in contexts.values():
        total = speakers.total()
        count += total
        shared += len(speakers) > 1
        if total > 1:
            alike = sum(n * (n - 1) for n in speakers.values())
            chances += total * (1 - alike / (total * (total - 1)))
    share = 2 * chances / count if count else 0.0
    why = f"in {shared:,} of {len(contexts):,} contexts more than one speaks"
    return _part("Exchange", share, count, why)


def _breadth(said: Iterable[SampledText]) -> ScorePart:
    """How many domains there are in effect: exp of the entropy."""
    domains = Counter(one.chain for one in said if one.chain not in NO_VALUES)
    effective = exp(_entropy(domains)) if domains else 0.0
    why = f"{len(domains)} domains, which count as {effective:.1f} evenly used; {DOMAINS} are full"
    return _part("Breadth", effective / DOMAINS, domains.total(), why)


def _tiers(said: Iterable[SampledText]) -> ScorePart:
    """How well decisions, dialogue and execution are mixed: the entropy, of what it could be."""
    tiers = Counter(one.tier for one in said if one.tier in {"A", "C", "E"})
    share = _entropy(tiers) / log(3) if tiers else 0.0
    why = ", ".join(f"{tiers[tier]:,} {tier}" for tier in "ACE")
    return _part("Dialogue", share, tiers.total(), f"of the tiers {why}")


def _resolution(said: Iterable[SampledText]) -> ScorePart:
    """The share of messages that are decided or ready, against open or blocked ones."""
    decided = still_open = either = 0
    for one in said:
        decided += bool(one.tags & SETTLED)
        still_open += bool(one.tags & OPEN)
        either += bool(one.tags)
    total = decided + still_open
    why = f"{decided:,} are decided or ready, {still_open:,} open or blocked"
    return _part("Resolution", decided / total if total else 0.0, either, why)


def _entropy(counts: Counter[str]) -> float:
    total = counts.total()
    # Sorted, for floats add up differently in another order.
    return sum(-n / total * log(n / total) for n in sorted(counts.values())) if total else 0.0
