"""Batches of plain messages as columns, which are counted by functions that loop in C.

Plain are messages in the form that this library writes, and in the older one with enrichment in
``Metadata``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any, NamedTuple

from agent_state.clock import instant
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.enriching.enrichment import enrich, keywords
from agent_state_integrations.recorder.enriching.rules import Rules

TOLD = ("chain_type", "ace_tier", "shl_tags", "keywords")
_top: Callable[[JsonObject], tuple[Any, ...]] = itemgetter(
    "Timestamp", "SpeakerName", "ConversationType", "ContextId", "Message", "Metadata"
)
_ALL_TOLD, _BUT_KEYWORDS = frozenset(TOLD), frozenset(TOLD[:3])
_told: Callable[[JsonObject], tuple[Any, ...]] = itemgetter(*TOLD)
NOT_PLAIN = (KeyError, TypeError, ValueError, AttributeError)
"""What is raised for a batch that is not plain."""
_ALONE = frozenset({8})
"""Keys of a record that stands alone, without the log's own."""
_DIGITS_TO_NAUGHT = bytes.maketrans(b"123456789", b"000000000")
_OURS = len("2026-11-21T03:11:00.000000Z")
_OBJECTS = ("{", "[", '"')


class Columns(NamedTuple):
    """A batch of messages; what is at the same place belongs together."""

    stamps: Sequence[str]
    speakers: Sequence[str]
    types: Sequence[object]
    contexts: Sequence[str]
    texts: Sequence[str]
    chains: Sequence[str]
    tiers: Sequence[str]
    tags: Sequence[list[str]]
    keywords: Sequence[list[str]]


class Carried(NamedTuple):
    """How many messages of a plain batch carry what, before rules add to it."""

    metadata: int
    hashes: int
    consolidated: int
    tagged: int
    lacking: int
    chains: Counter[Any]


def by_columns(records: list[Any], rules: Rules) -> tuple[Columns, Carried]:
    """The batch. Raises one of ``NOT_PLAIN`` unless each record has what is asked for.

    What lacks enrichment has it then.
    """
    stamps, speakers, types, contexts, texts, metas = zip(*map(_top, records), strict=True)
    if set(map(type, contexts)) != {str} or set(map(type, texts)) != {str}:
        raise TypeError("a context and a message are text")
    if not all(map(contains, records, repeat("_seq"))):
        if set(map(len, records)) != _ALONE or any(map(str.startswith, texts, repeat(_OBJECTS))):
            raise ValueError("there is more to understand")
        if "" in speakers or "" in contexts:
            raise ValueError("there are no names")
    try:
        told = list(map(_told, metas))
        carried = None
    except KeyError:
        carried = _enriched(records, metas, rules)
        told = list(map(_told, metas))
    chains, tiers, tags, words = zip(*told, strict=True)
    if not _are_lists(tags) or not _are_lists(words):
        raise TypeError("tags and keywords are lists")
    columns = Columns(stamps, speakers, types, contexts, texts, chains, tiers, tags, words)
    return columns, carried or Carried(
        len(metas),
        sum(map(contains, metas, repeat("content_hash"))),
        _consolidated(metas),
        sum(map(bool, tags)),
        0,
        Counter(chains),
    )


def _enriched(records: list[Any], metas: Sequence[Any], rules: Rules) -> Carried:
    """Add what rules tell to the records that lack it."""
    carried = Carried(
        sum(map(bool, metas)),
        sum(map(contains, metas, repeat("content_hash"))),
        _consolidated(metas),
        sum(bool(meta.get("shl_tags")) for meta in metas),
        sum(not meta.keys() >= _ALL_TOLD for meta in metas),
        Counter(meta.get("chain_type") for meta in metas),
    )
    for record, meta in zip(records, metas, strict=True):
        if not meta.keys() >= _BUT_KEYWORDS:
            enrich(record, rules)
        if "keywords" not in meta:
            meta["keywords"] = keywords(record["Message"], rules)
    return carried


def _consolidated(metas: Iterable[JsonObject]) -> int:
    if not any(map(contains, metas, repeat("consolidated"))):
        return 0
    return sum(meta.get("consolidated") is True for meta in metas)


def _are_lists(column: Iterable[object]) -> bool:
    return set(map(type, column)) == {list}


COUNTED = (
    "days",
    "speakers",
    "message_types",
    "chain_types",
    "ace_tiers",
    "shl_tags",
    "keywords",
)


def counted_in(columns: Columns) -> tuple[Mapping[str, int], ...]:
    """The columns of ``COUNTED``. Raises one of ``NOT_PLAIN`` where one is odd."""
    types: Counter[str] = Counter()
    for kind, count in Counter(columns.types).items():
        if type(kind) not in {int, str}:
            raise TypeError("a type is a number or text")
        types[str(kind)] += count
    return (
        _days(columns.stamps),
        _named(columns.speakers),
        types,
        _named(columns.chains),
        _named(columns.tiers),
        _named(chain.from_iterable(columns.tags)),
        _named(chain.from_iterable(columns.keywords)),
    )


def _named(names: Iterable[object]) -> Counter[Any]:
    counts = Counter(names)
    if not set(map(type, counts)) <= {str}:
        raise TypeError("a name is text")
    return counts


def _days(stamps: Sequence[str]) -> Counter[str]:
    """How many stamps are of which UTC day. Raises ``ValueError`` where their text does not tell.

    Stamps with an offset do not: reading turns them into UTC.
    """
    if not stamps:
        return Counter()
    joined, count = "".join(stamps), len(stamps)
    ours = set(map(len, stamps)) == {_OURS}
    if not (ours and joined[10::_OURS] == "T" * count and joined[26::_OURS] == "Z" * count):
        shapes = "\n".join(stamps).encode().translate(_DIGITS_TO_NAUGHT).split(b"\n")
        if len(shapes) != count or not all(map(_tells_its_day, set(shapes))):
            raise ValueError("a text does not tell its day")
    days = Counter(map(_first_ten, stamps))
    for day in days:
        instant(day)
    return days


_first_ten: Callable[[str], str] = itemgetter(slice(10))


def _tells_its_day(shape: bytes) -> bool:
    """``0000-00-00T00:00:00``, with any fraction, as UTC or without a zone."""
    head, _, fraction = shape.removesuffix(b"Z").partition(b".")
    plain = head.replace(b" ", b"T", 1) == b"0000-00-00T00:00:00"
    return plain and not fraction.strip(b"0") and len(fraction) <= 9
