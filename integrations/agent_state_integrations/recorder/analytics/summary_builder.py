"""Batches of plain messages as columns, which are counted by functions that loop in C.

Plain are messages in the form that this library writes, and in the older one with enrichment in
``Metadata``.


Sums up lines of a log, a batch at a time: by columns where all lines are plain, else one by one.

Other lines are parsed as in reading. Rules enrich messages that lack it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any, NamedTuple

import orjson

from agent_state.clock import instant
from agent_state.errors import StateCorruptedError, UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_foreign
from agent_state_integrations.recorder.analytics.summary import (
    LONGEST_NAME,
    NOTHING,
    OPEN,
    SEPARATOR,
    SETTLED,
    LogSummary,
    SampledText,
    normalized_texts,
    ranks,
)
from agent_state_integrations.recorder.enrichment import enrich, keywords
from agent_state_integrations.recorder.lines import LineParser
from agent_state_integrations.recorder.message import UNKNOWN
from agent_state_integrations.recorder.rules import Rules

DERIVED = ("chain_type", "ace_tier", "shl_tags", "keywords")
_top: Callable[[JsonObject], tuple[Any, ...]] = itemgetter(
    "Timestamp", "SpeakerName", "ConversationType", "ContextId", "Message", "Metadata"
)
_ALL_DERIVED, _BUT_KEYWORDS = frozenset(DERIVED), frozenset(DERIVED[:3])
_derived: Callable[[JsonObject], tuple[Any, ...]] = itemgetter(*DERIVED)
NOT_PLAIN = (KeyError, TypeError, ValueError, AttributeError)
"""The errors that a batch raises which is not plain."""
_ALONE = frozenset({8})
"""The number of keys of a record without those of the log."""
_DIGITS_TO_NAUGHT = bytes.maketrans(b"123456789", b"000000000")
_OURS = len("2026-11-21T03:11:00.000000Z")
_OBJECTS = ("{", "[", '"')


TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
"""The kinds of tokens in ``Metadata.usage``, as the importers write it."""
_PART = 60
"""Characters of a speaker or model under which tokens are counted."""


class MessageColumns(NamedTuple):
    """A batch of messages; values at the same index belong to the same message."""

    stamps: Sequence[str]
    speakers: Sequence[str]
    types: Sequence[object]
    contexts: Sequence[str]
    texts: Sequence[str]
    chains: Sequence[str]
    tiers: Sequence[str]
    tags: Sequence[list[str]]
    keywords: Sequence[list[str]]
    metas: Sequence[JsonObject]


class EnrichmentCounts(NamedTuple):
    """How many messages of a plain batch carry what, before rules add to it."""

    metadata: int
    hashes: int
    consolidated: int
    tagged: int
    lacking: int
    chains: Counter[Any]


def by_columns(records: list[Any], rules: Rules) -> tuple[MessageColumns, EnrichmentCounts]:
    """The batch. Raises one of ``NOT_PLAIN`` unless each record has what is asked for.

    Messages that lack enrichment are enriched.
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
        derived = list(map(_derived, metas))
        carried = None
    except KeyError:
        carried = _enriched(records, metas, rules)
        derived = list(map(_derived, metas))
    chains, tiers, tags, words = zip(*derived, strict=True)
    if not _are_lists(tags) or not _are_lists(words):
        raise TypeError("tags and keywords are lists")
    columns = MessageColumns(
        stamps, speakers, _types(types, metas), contexts, texts, chains, tiers, tags, words, metas
    )
    return columns, carried or EnrichmentCounts(
        len(metas),
        sum(map(contains, metas, repeat("content_hash"))),
        _consolidated(metas),
        sum(map(bool, tags)),
        0,
        Counter(chains),
    )


def _types(types: Sequence[object], metas: Sequence[JsonObject]) -> Sequence[object]:
    """What each message says that it is: its ``message_type``, or else its ``ConversationType``."""
    if not any(map(contains, metas, repeat("message_type"))):
        return types
    return [_type(kind, meta) for kind, meta in zip(types, metas, strict=True)]


def _type(kind: object, meta: JsonObject) -> object:
    named = meta.get("message_type")
    return named if kind in (0, "0", "") and type(named) is str else kind


def tokens_in(columns: MessageColumns) -> Counter[str]:
    """The tokens by day, speaker, model and kind."""
    counts: Counter[str] = Counter()
    if not any(map(contains, columns.metas, repeat("usage"))):
        return counts
    for stamp, speaker, meta in zip(columns.stamps, columns.speakers, columns.metas, strict=True):
        usage, model = meta.get("usage"), str(meta.get("model") or UNKNOWN)
        if type(usage) is not dict:
            continue
        for kind in TOKENS:
            if type(count := usage.get(kind)) is int and count > 0:
                name = SEPARATOR.join((stamp[:10], speaker[:_PART], model[:_PART], kind))
                counts[name] += count
    return counts


def _enriched(records: list[Any], metas: Sequence[Any], rules: Rules) -> EnrichmentCounts:
    """Enrich the records that lack it."""
    carried = EnrichmentCounts(
        sum(map(bool, metas)),
        sum(map(contains, metas, repeat("content_hash"))),
        _consolidated(metas),
        sum(bool(meta.get("shl_tags")) for meta in metas),
        sum(not meta.keys() >= _ALL_DERIVED for meta in metas),
        Counter(meta.get("chain_type") for meta in metas),
    )
    for record, meta in zip(records, metas, strict=True):
        if not meta.keys() >= _BUT_KEYWORDS:
            enrich(record, rules, counts=False)
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
    "contexts",
)


def counted_in(columns: MessageColumns) -> tuple[Mapping[str, int], ...]:
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
        _named(columns.contexts),
    )


def _named(names: Iterable[object]) -> Counter[Any]:
    counts = Counter(names)
    if not set(map(type, counts)) <= {str}:
        raise TypeError("a name is text")
    return counts


def _days(stamps: Sequence[str]) -> Counter[str]:
    """The number of stamps per UTC day. Raises ``ValueError`` if their text does not show the day.

    Stamps with an offset do not: reading turns them into UTC.
    """
    if not stamps:
        return Counter()
    joined, count = "".join(stamps), len(stamps)
    ours = set(map(len, stamps)) == {_OURS}
    if not (ours and joined[10::_OURS] == "T" * count and joined[26::_OURS] == "Z" * count):
        shapes = "\n".join(stamps).encode().translate(_DIGITS_TO_NAUGHT).split(b"\n")
        if len(shapes) != count or not all(map(_is_iso_timestamp, set(shapes))):
            raise ValueError("a text does not show its day")
    days = Counter(map(_first_ten, stamps))
    for day in days:
        instant(day)
    return days


_first_ten: Callable[[str], str] = itemgetter(slice(10))


def _is_iso_timestamp(shape: bytes) -> bool:
    """``0000-00-00T00:00:00``, with any fraction, as UTC or without a zone."""
    head, _, fraction = shape.removesuffix(b"Z").partition(b".")
    plain = head.replace(b" ", b"T", 1) == b"0000-00-00T00:00:00"
    return plain and not fraction.strip(b"0") and len(fraction) <= 9


SETTLING = frozenset({"@Decision-Made", "@Status-Ready"})
OPENING = frozenset({"@Question-Open", "@Status-Blocked"})
_AT_ONCE = 200
"""Records that are objects at one time. More of them no longer fit into a processor's cache."""


class SummaryBuilder:
    """Sums up one part of a log.

    ``number`` is its place among the parts; ``limit`` a rank above which no text need be kept,
    as the parts before it have enough with lower ones.
    """

    def __init__(self, rules: Rules, parser: LineParser, number: int, limit: int) -> None:
        self.summary = LogSummary()
        self.summary.sample.limit = limit
        self._rules = rules
        self._parser = parser
        self._position = number << 40

    def add(self, lines: Sequence[bytes]) -> None:
        """Sum up these lines, which come next."""
        for start in range(0, len(lines), _AT_ONCE):
            self._add(lines[start : start + _AT_ONCE])
        self.summary.trim()

    def _add(self, lines: Sequence[bytes]) -> None:
        try:
            records = list(map(orjson.loads, lines))
        except orjson.JSONDecodeError:
            lines = [text for line in lines if (text := self._readable(line))]
            records = list(map(orjson.loads, lines))
        try:
            columns, carried = by_columns(records, self._rules)
            counted = counted_in(columns)
        except NOT_PLAIN:
            columns = self._one_by_one(map(orjson.loads, lines))
            counted = counted_in(columns)
        else:
            self._add_carried(carried)
        summary = self.summary
        summary.messages += len(columns.texts)
        for name, counts in zip(COUNTED, counted, strict=True):
            getattr(summary, name).add(counts)
        summary.tokens.add(tokens_in(columns))
        said = normalized_texts(columns.texts)
        ranked = ranks(said)
        summary.empty += sum(map(said.count, NOTHING))
        self._sample(columns, said, ranked)
        self._position += len(said)

    def _add_carried(self, carried: EnrichmentCounts) -> None:
        summary = self.summary
        summary.with_metadata += carried.metadata
        summary.with_hash += carried.hashes
        summary.consolidated += carried.consolidated
        summary.enriched += carried.lacking
        summary.tagged_nested += carried.tagged
        summary.chains_flat.add({UNKNOWN: carried.chains.total()})
        for name, count in carried.chains.items():
            summary.chains_nested.add({str(name or UNKNOWN): count})

    def _readable(self, line: bytes) -> bytes | None:
        """The line, if it is JSON; without what other programs put around it."""
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            try:
                return orjson.dumps(parse_foreign(line)[0])
            except (StateCorruptedError, orjson.JSONEncodeError):
                self._skip("not JSON" if line else "empty, or too long")
                return None
        return line

    def _skip(self, reason: str) -> None:
        self.summary.skipped.add({reason: 1})

    def _sample(
        self, columns: MessageColumns, normalized_texts: list[bytes], ranked: list[int]
    ) -> None:
        sample, limit = self.summary.sample, self.summary.sample.limit
        for index in [index for index, rank in enumerate(ranked) if rank <= limit]:
            tags = columns.tags[index]
            said = SampledText(
                self._position + index,
                columns.speakers[index][:LONGEST_NAME],
                columns.contexts[index][:LONGEST_NAME],
                columns.chains[index][:LONGEST_NAME],
                columns.tiers[index][:LONGEST_NAME],
                (0 if SETTLING.isdisjoint(tags) else SETTLED)
                | (0 if OPENING.isdisjoint(tags) else OPEN),
            )
            sample.add(ranked[index], normalized_texts[index], said)

    def _one_by_one(self, records: Iterable[Any]) -> MessageColumns:
        rows: list[tuple[Any, ...]] = []
        for record in records:
            messages = _messages_within(record)
            if messages is not None:
                self.summary.threads += 1
            for message in [record] if messages is None else messages:
                row = self._row(message)
                if row is not None:
                    self.summary.in_threads += messages is not None
                    rows.append(row)
        columns = zip(*rows, strict=True) if rows else repeat((), len(MessageColumns._fields))
        return MessageColumns(*columns)

    def _row(self, record: Any) -> tuple[Any, ...] | None:
        """One message as a row; None if it is not a message."""
        if type(record) is not dict:
            self._skip("not a JSON object")
            return None
        top = record.get("chain_type"), record.get("shl_tags")
        given = record.get("Metadata")
        carried = given if type(given) is dict else {}
        inner = carried.get("chain_type") or top[0], carried.get("shl_tags") or top[1]
        carries = bool(given)
        try:
            _, record = self._parser.parsed(record)
        except UnreadableMessageError as error:
            self._skip(error.message)
            return None
        metadata, summary = record["Metadata"], self.summary
        summary.chains_flat.add({str(top[0] or UNKNOWN): 1})
        summary.chains_nested.add({str(inner[0] or UNKNOWN): 1})
        summary.tagged_flat += bool(top[1])
        summary.tagged_nested += bool(inner[1])
        summary.with_metadata += carries
        summary.with_hash += bool(metadata.get("content_hash"))
        summary.consolidated += metadata.get("consolidated") is True
        if any(metadata.get(name) is None for name in DERIVED):
            enrich(record, self._rules, counts=False)
            summary.enriched += 1
        return (
            record["Timestamp"],
            record["SpeakerName"],
            _type(record["ConversationType"], metadata),
            record["ContextId"],
            record["Message"],
            str(metadata["chain_type"]),
            str(metadata["ace_tier"]),
            _texts(metadata["shl_tags"]),
            _texts(metadata.get("keywords")),
            metadata,
        )


def _texts(value: object) -> list[str]:
    return [item for item in value if type(item) is str] if type(value) is list else []


def _messages_within(record: Any) -> list[Any] | None:
    """The messages of a thread, where a line is one and no message."""
    if type(record) is dict and "thread_id" in record and type(record.get("messages")) is list:
        messages: list[Any] = record["messages"]
        return messages
    return None
