"""Enrichment: facts about a message that rules derive from its text. Pure functions."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import filterfalse, islice
from typing import Any

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.message import ENRICHED, REDACTED
from agent_state_integrations.recorder.rules import HashRule, Rules
from agent_state_integrations.recorder.terms import TermMatches, words_of

_REDACTIONS = re.compile(r"\[redacted:[\w-]{1,64}\]")
"""Replacements of secrets; they have no meaning of their own."""
_HASHES = {"md5": hashlib.md5, "sha1": hashlib.sha1, "sha256": hashlib.sha256}
_ENRICHED = frozenset(ENRICHED)


def enrich(record: JsonObject, rules: Rules, *, counts: bool = True) -> None:
    """Add the missing fields of ``ENRICHED`` to ``record["Metadata"]``, in their order.

    Without ``counts`` only those that say what the message is about: not its length and hash.

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
        counts=counts,
    )
    for name, value in found.items():
        if metadata.get(name) is None:
            metadata[name] = value


def enrichment(
    text: str,
    rules: Rules,
    *,
    role: str = "",
    chain: object | None = None,
    counts: bool = True,
) -> dict[str, Any]:
    """The fields that the rules derive from a text. ``chain``: its domain, if that is known."""
    lowered = text.lower()
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
    if not counts:
        return enriched
    parts = lowered.split()
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
    means = rules.meaning(found.terms, found.leads, role.lower())
    if chain is None:
        chain = means.chain
    tags = [tag for tag, pattern in means.tags if pattern is None or pattern.search(text)]
    if rules.chain_tag and chain != "none":
        tags.append(rules.chain_tag.replace("{chain}", str(chain)))
    enriched: dict[str, Any] = {"chain_type": chain, "ace_tier": means.tier, "shl_tags": tags}
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
    ours = (term for term, bit in rules.chain_terms.items() if found.terms & bit)
    return list(islice(ours, rules.keywords.limit))


def _frequent(words: list[str], rules: Rules) -> list[str]:
    """The most frequent words; of equally frequent ones the first."""
    stop, shortest, limit = rules.keywords.stop, rules.keywords.shortest, rules.keywords.limit
    counts = Counter(words)  # in the order in which they come first
    kept = [word for word in counts if word not in stop and len(word) >= shortest]
    if len(counts) < len(words):
        kept.sort(key=counts.__getitem__, reverse=True)  # stable: equal ones stay in order
    return list(islice(filterfalse(str.isdigit, kept), limit))


def _digest(text: str, rule: HashRule) -> str:
    # A Python text may hold lone surrogates, which UTF-8 cannot; they are hashed as they are.
    content = text.encode("utf-8", "surrogatepass")
    return _HASHES[rule.algorithm](content, usedforsecurity=False).hexdigest()[: rule.length]
