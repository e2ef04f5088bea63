"""Sums up lines of a log, a batch at a time: by columns where all lines are plain, else one by one.

What is not plain takes the way that reading takes. What rules tell is added to what lacks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import orjson

from agent_state.errors import UnreadableMessageError
from agent_state_integrations.recorder.analysis.plain import (
    COUNTED,
    NOT_PLAIN,
    TOLD,
    Carried,
    Columns,
    by_columns,
    counted_in,
)
from agent_state_integrations.recorder.analysis.summary import (
    LONGEST_NAME,
    NOTHING,
    OPEN,
    SETTLED,
    Said,
    Summary,
    essences,
    ranks,
)
from agent_state_integrations.recorder.enriching.enrichment import enrich
from agent_state_integrations.recorder.enriching.rules import Rules
from agent_state_integrations.recorder.messages import UNKNOWN
from agent_state_integrations.recorder.past.parsing import Parser

SETTLING = frozenset({"@Decision-Made", "@Status-Ready"})
OPENING = frozenset({"@Question-Open", "@Status-Blocked"})
_AT_ONCE = 200
"""Records that are objects at one time. More of them no longer fit into a processor's cache."""


class Fold:
    """Sums up one part of a log.

    ``number`` is its place among the parts; ``limit`` a rank above which no text need be kept,
    as the parts before it have enough with lower ones.
    """

    def __init__(self, rules: Rules, parser: Parser, number: int, limit: int) -> None:
        self.summary = Summary()
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
            lines = [line for line in lines if self._is_readable(line)]
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
        said = essences(columns.texts)
        ranked = ranks(said)
        summary.empty += sum(map(said.count, NOTHING))
        self._sample(columns, said, ranked)
        self._position += len(said)

    def _add_carried(self, carried: Carried) -> None:
        summary = self.summary
        summary.with_metadata += carried.metadata
        summary.with_hash += carried.hashes
        summary.consolidated += carried.consolidated
        summary.enriched += carried.lacking
        summary.tagged_nested += carried.tagged
        summary.chains_flat.add({UNKNOWN: carried.chains.total()})
        for name, count in carried.chains.items():
            summary.chains_nested.add({str(name or UNKNOWN): count})

    def _is_readable(self, line: bytes) -> bool:
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            self._skip("not JSON" if line else "empty, or too long")
            return False
        return True

    def _skip(self, reason: str) -> None:
        self.summary.skipped.add({reason: 1})

    def _sample(self, columns: Columns, essences: list[bytes], ranked: list[int]) -> None:
        sample, limit = self.summary.sample, self.summary.sample.limit
        for index in [index for index, rank in enumerate(ranked) if rank <= limit]:
            tags = columns.tags[index]
            said = Said(
                self._position + index,
                columns.speakers[index][:LONGEST_NAME],
                columns.contexts[index][:LONGEST_NAME],
                columns.chains[index][:LONGEST_NAME],
                columns.tiers[index][:LONGEST_NAME],
                (0 if SETTLING.isdisjoint(tags) else SETTLED)
                | (0 if OPENING.isdisjoint(tags) else OPEN),
            )
            sample.add(ranked[index], essences[index], said)

    def _one_by_one(self, records: Iterable[Any]) -> Columns:
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
        columns = zip(*rows, strict=True) if rows else repeat((), len(Columns._fields))
        return Columns(*columns)

    def _row(self, record: Any) -> tuple[Any, ...] | None:
        """One message; None if it is none."""
        if type(record) is not dict:
            self._skip("not a JSON object")
            return None
        top = record.get("chain_type"), record.get("shl_tags")
        given = record.get("Metadata")
        carried = given if type(given) is dict else {}
        inner = carried.get("chain_type") or top[0], carried.get("shl_tags") or top[1]
        carries = bool(given)
        try:
            _, record = self._parser.record(orjson.dumps(record))
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
        if any(metadata.get(name) is None for name in TOLD):
            enrich(record, self._rules)
            summary.enriched += 1
        return (
            record["Timestamp"],
            record["SpeakerName"],
            record["ConversationType"],
            record["ContextId"],
            record["Message"],
            str(metadata["chain_type"]),
            str(metadata["ace_tier"]),
            _texts(metadata["shl_tags"]),
            _texts(metadata.get("keywords")),
        )


def _texts(value: object) -> list[str]:
    return [item for item in value if type(item) is str] if type(value) is list else []


def _messages_within(record: Any) -> list[Any] | None:
    """The messages of a thread, where a line is one and no message."""
    if type(record) is dict and "thread_id" in record and type(record.get("messages")) is list:
        messages: list[Any] = record["messages"]
        return messages
    return None
