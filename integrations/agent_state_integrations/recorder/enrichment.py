"""Enrichment: facts about a message that rules derive from its text. Pure functions."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.message import ENRICHED, REDACTED
from agent_state_integrations.recorder.rules import (
    HashRule,
    RuleCondition,
    Rules,
    TermMatches,
    words_of,
)

_REDACTIONS = re.compile(r"\[redacted:[\w-]{1,64}\]")
"""Replacements of secrets; they have no meaning of their own."""
_HASHES = {"md5": hashlib.md5, "sha1": hashlib.sha1, "sha256": hashlib.sha256}
_ENRICHED = frozenset(ENRICHED)


def enrich(record: JsonObject, rules: Rules) -> None:
    """Add the missing fields of ``ENRICHED`` to ``record["Metadata"]``, in their order.

    A field that the record has is kept: in ``Metadata``, or at the top level as in older logs, from
    where it is copied. None counts as missing. A ``Metadata`` that is not an object becomes
    ``{"original": …}``. ``chain_type``, ``ace_tier``, ``shl_tags`` and ``keywords`` come from
    ``Message``, the tier also from ``SpeakerRole``, and a role of
    what nobody said has none of them; ``word_count`` counts runs of non-blank
    characters, ``char_count`` code points; the rules define ``content_hash``.
    """
    metadata = record.get("Metadata")
    if type(metadata) is not dict:
        metadata = {} if metadata is None else {"original": metadata}
        record["Metadata"] = metadata
    elif metadata.keys() >= _ENRICHED and None not in metadata.values():
        return
    if not _ENRICHED.isdisjoint(record):
        for name in ENRICHED:
            if metadata.get(name) is None and record.get(name) is not None:
                metadata[name] = record[name]
    text, role = record.get("Message"), record.get("SpeakerRole")
    found = enrichment(
        text if type(text) is str else "",
        rules,
        role=role if type(role) is str else "",
        chain=metadata.get("chain_type"),
    )
    for name, value in found.items():
        if metadata.get(name) is None:
            metadata[name] = value


def enrichment(
    text: str, rules: Rules, *, role: str = "", chain: object | None = None
) -> dict[str, Any]:
    """All fields that the rules derive from a text. ``chain``: its domain, if that is known."""
    lowered = text.lower()
    parts = lowered.split()
    enriched: dict[str, Any]
    if role and role.lower() in rules.unspoken:
        enriched = {
            "chain_type": rules.chain_default if chain is None else chain,
            "ace_tier": rules.tier_default,
            "shl_tags": [],
        }
        if rules.keywords.source != "none":
            enriched["keywords"] = []
    else:
        enriched = _meaning(text, lowered, rules, role, chain)
    enriched["word_count"] = len(parts)
    enriched["char_count"] = len(text)
    content = " ".join(parts) if rules.hash.text == "normalised" else text
    enriched["content_hash"] = _digest(content, rules.hash)
    return enriched


def _meaning(
    text: str, lowered: str, rules: Rules, role: str, chain: object | None
) -> dict[str, Any]:
    """The domain, tier, tags and keywords of what somebody said."""
    if REDACTED in lowered:
        lowered = _REDACTIONS.sub(" ", lowered)
    found = rules.matcher.find(lowered)
    if chain is None:
        chain = _chain(found.terms, rules)
    enriched: dict[str, Any] = {
        "chain_type": chain,
        "ace_tier": _tier(found, role, rules),
        "shl_tags": _tags(found, text, chain, rules),
    }
    if rules.keywords.source != "none":
        enriched["keywords"] = _keywords(found, lowered, rules)
    return enriched


def keywords(text: str, rules: Rules) -> list[str]:
    """The keywords of a text; empty where the rules define no keywords."""
    if rules.keywords.source == "none":
        return []
    lowered = _REDACTIONS.sub(" ", text.lower())
    if rules.keywords.source == "words":
        return _frequent(words_of(lowered), rules)
    return _keywords(rules.matcher.find(lowered), lowered, rules)


def _keywords(found: TermMatches, lowered: str, rules: Rules) -> list[str]:
    if rules.keywords.source == "words":
        return _frequent(found.words or words_of(lowered), rules)
    return sorted(found.terms & rules.chains_of.keys())[: rules.keywords.limit]


def _chain(terms: AbstractSet[str], rules: Rules) -> str:
    """The chain with the most different terms; of equal ones the first in the rules."""
    counts: dict[int, int] = {}
    chains_of = rules.chains_of
    for term in terms:
        if term in rules.chain_unless and not rules.chain_unless[term].isdisjoint(terms):
            continue
        for number in chains_of.get(term, ()):
            counts[number] = counts.get(number, 0) + 1
    if not counts:
        return rules.chain_default
    return rules.chains[min(counts, key=lambda number: (-counts[number], number))]


def _tier(found: TermMatches, role: str, rules: Rules) -> str:
    terms, leads = found.terms, found.leads
    if terms or role:
        for rule in rules.tiers:
            if _holds(rule, terms, leads) or (
                rule.role and any(part in role.lower() for part in rule.role)
            ):
                return rule.tier
    return rules.tier_default


def _tags(found: TermMatches, text: str, chain: object, rules: Rules) -> list[str]:
    terms, leads = found.terms, found.leads
    tags = [
        rule.tag
        for rule in rules.tags
        if (terms and _holds(rule, terms, leads)) or (rule.pattern and rule.pattern.search(text))
    ]
    if rules.chain_tag and chain != "none":
        tags.append(rules.chain_tag.replace("{chain}", str(chain)))
    return tags


def _holds(rule: RuleCondition, terms: AbstractSet[str], leads: AbstractSet[str]) -> bool:
    if rule.any.isdisjoint(terms) and rule.lead.isdisjoint(leads):
        return False
    if rule.also and rule.also.isdisjoint(terms):
        return False
    return not rule.unless or rule.unless.isdisjoint(terms)


def _frequent(words: list[str], rules: Rules) -> list[str]:
    """The most frequent words; of equally frequent ones the first."""
    stop, shortest, limit = rules.keywords.stop, rules.keywords.shortest, rules.keywords.limit
    kept = [word for word in words if word not in stop and len(word) >= shortest]
    distinct = list(dict.fromkeys(kept))
    if len(distinct) < len(kept):
        counts = Counter(kept)
        distinct.sort(key=counts.__getitem__, reverse=True)  # stable: equal ones stay in order
    return list(islice((word for word in distinct if not word.isdigit()), limit))


def _digest(text: str, rule: HashRule) -> str:
    # A Python text may hold lone surrogates, which UTF-8 cannot; they are hashed as they are.
    content = text.encode("utf-8", "surrogatepass")
    return _HASHES[rule.algorithm](content, usedforsecurity=False).hexdigest()[: rule.length]
