"""The summary of a log, or of a part of it: sums of bounded size that can be merged.

The parts of a log are summed up one by one and merged in their order, so that the result does
not depend on how many processes did the work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any, NamedTuple
from zlib import crc32

BOUND = 65_536
"""Different names that one counter holds. Past it the rarer half is put together as "other"."""
LONGEST_NAME = 200
"""Characters of a name that are kept."""
SAMPLE = 4_096
"""Different texts that the default score looks at; of a longer log, so many chosen by hash."""

_SPACES_AND_MARKS = bytes(byte for byte in range(1, 128) if not chr(byte).isalnum())
_AND_NUL = _SPACES_AND_MARKS + b"\0"
_has_content = re.compile(r"[^\W_]").search
NOTHING = (b"", b"null")
"""The normalized forms of texts without content."""


class BoundedCounter:
    """Counts names, and of more than ``bound`` different ones the frequent ones.

    ``other`` is how much was counted under names that were dropped; a name that comes again
    after that counts from there on.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, other: int = 0) -> None:
        self.counts = dict(counts or {})
        self.other = other

    def add(self, counts: Mapping[str, int]) -> None:
        """Add what was counted elsewhere."""
        mine = self.counts
        for name, count in counts.items():
            mine[name] = mine.get(name, 0) + count

    def trim(self) -> None:
        """Reduce the counter to its bounds, which ``add`` may exceed."""
        if max(map(len, self.counts), default=0) > LONGEST_NAME:
            names, self.counts = self.counts, {}
            for name, count in names.items():
                self.add({name[:LONGEST_NAME]: count})
        if len(self.counts) > BOUND:
            kept = dict(self.ranked(BOUND // 2))
            self.other += self.total() - sum(kept.values())
            self.counts = kept

    def total(self) -> int:
        """All that is counted by name."""
        return sum(self.counts.values())

    def ranked(self, most: int | None = None) -> list[tuple[str, int]]:
        """Names with their counts, the largest first, equal ones by name."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ranked if most is None else ranked[:most]


class SampledText(NamedTuple):
    """The first message with a text. ``tags``: 1 decided, 2 open, 3 both."""

    position: int
    speaker: str
    context: str
    chain: str
    tier: str
    tags: int


SETTLED, OPEN = 1, 2
SEPARATOR = "\x1f"


LARGEST = 2**32 - 1


def normalized_texts(texts: Sequence[str]) -> list[bytes]:
    """Each text as it is compared with others; empty for a text without content.

    Texts that differ only in case, white space or punctuation have the same form. A text without a
    letter or a digit (so also ``{}``), and ``null``, has no content.
    """
    joined = "\0".join(texts)
    if joined.isascii():  # all at once, in half the time
        found = joined.lower().encode().translate(None, _SPACES_AND_MARKS).split(b"\0")
        if len(found) == len(texts):
            return found
    return [
        text.lower().encode().translate(None, _AND_NUL) if text.isascii() else _beyond_ascii(text)
        for text in texts
    ]


def ranks(normalized_texts: Iterable[bytes]) -> list[int]:
    """For each text a stable number of 32 bits, by which the sample is chosen: its CRC."""
    return list(map(crc32, normalized_texts))


def _beyond_ascii(text: str) -> bytes:
    if _has_content(text) is None:
        return b""
    # Upper case first: the dotless i and the long s have a capital in common with another letter.
    joined = "".join(text.upper().casefold().split())
    return joined.encode("utf-8", "surrogatepass").translate(None, _AND_NUL)


class TextSample:
    """Different texts, each as it was said first: all of them, or those with the lowest ranks.

    Which of them are kept depends on the texts alone. To add one again changes nothing. A text is
    known by its rank and 64 more bits.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[int, bytes], SampledText] = {}
        self._times: dict[tuple[int, bytes], int] = {}
        self.limit = LARGEST
        """No text of a higher rank is kept."""
        self.full = False
        """Whether texts were left out."""

    def add(self, rank: int, essence: bytes, said: SampledText) -> None:
        """Add a text, unless it has no content or is known already."""
        if rank <= self.limit and essence not in NOTHING:
            self._keep((rank, blake2b(essence, digest_size=8).digest()), said, 1)

    def merge(self, other: TextSample) -> None:
        """Add what another part of the log has."""
        self.limit = min(self.limit, other.limit)
        self.full = self.full or other.full
        for key, said in other._said.items():
            self._keep(key, said, other._times[key])

    def _keep(self, key: tuple[int, bytes], said: SampledText, times: int) -> None:
        known = self._said.get(key)
        self._times[key] = self._times.get(key, 0) + times
        if known is None or said.position < known.position:
            self._said[key] = said
            if len(self._said) >= 2 * SAMPLE:
                self._trim()

    def _trim(self) -> None:
        """Keep those with the lowest ranks: ``SAMPLE``, and what shares the last one's rank."""
        if len(self._said) > SAMPLE:
            limit = sorted(self._said)[SAMPLE - 1][0]
            kept = {key: said for key, said in self._said.items() if key[0] <= limit}
            self.full = self.full or len(kept) < len(self._said)
            self._said, self.limit = kept, min(self.limit, limit)
            self._times = {key: self._times[key] for key in kept}

    def said(self) -> list[SampledText]:
        """The sampled texts, in the order of the log."""
        self._trim()
        return sorted(self._said.values())

    def distinct(self, messages: int) -> int:
        """The number of different texts among this number of messages with content.

        If texts were left out, this is an estimate from the repetitions of those that are kept.
        """
        self._trim()
        if not self.full:
            return len(self._said)
        return round(messages * len(self._said) / sum(self._times.values()))

    def to_object(self) -> dict[str, Any]:
        """As JSON can hold it."""
        self._trim()
        said = [[key[0], key[1].hex(), self._times[key], *said] for key, said in self._said.items()]
        return {"limit": self.limit, "full": self.full, "said": said}

    @classmethod
    def from_object(cls, content: Mapping[str, Any]) -> TextSample:
        """The inverse of ``to_object``."""
        sample = cls()
        sample.limit = content["limit"]
        sample.full = content["full"]
        for rank, digest, times, *said in content["said"]:
            key = rank, bytes.fromhex(digest)
            sample._said[key], sample._times[key] = SampledText(*said), times
        return sample


@dataclass(slots=True)
class LogSummary:
    """The counts of a log, or of a part of it."""

    messages: int = 0
    threads: int = 0
    """Objects that held messages, where the log was of conversations."""
    in_threads: int = 0
    copies: int = 0
    """Messages that were left out, as others are copies of them."""
    empty: int = 0
    with_metadata: int = 0
    with_hash: int = 0
    consolidated: int = 0
    enriched: int = 0
    """Messages that lacked a field of enrichment."""
    tagged_flat: int = 0
    tagged_nested: int = 0
    speakers: BoundedCounter = field(default_factory=BoundedCounter)
    message_types: BoundedCounter = field(default_factory=BoundedCounter)
    chain_types: BoundedCounter = field(default_factory=BoundedCounter)
    chains_flat: BoundedCounter = field(default_factory=BoundedCounter)
    chains_nested: BoundedCounter = field(default_factory=BoundedCounter)
    ace_tiers: BoundedCounter = field(default_factory=BoundedCounter)
    shl_tags: BoundedCounter = field(default_factory=BoundedCounter)
    keywords: BoundedCounter = field(default_factory=BoundedCounter)
    days: BoundedCounter = field(default_factory=BoundedCounter)
    contexts: BoundedCounter = field(default_factory=BoundedCounter)
    tokens: BoundedCounter = field(default_factory=BoundedCounter)
    """Tokens by day, speaker, model and kind, joined by ``SEPARATOR``."""
    skipped: BoundedCounter = field(default_factory=BoundedCounter)
    """Why lines were left out."""
    sample: TextSample = field(default_factory=TextSample)

    def merge(self, other: LogSummary) -> None:
        """Add the part of the log that comes next."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _COUNTERS:
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.other += theirs.other
            mine.add(theirs.counts)
        self.sample.merge(other.sample)
        self.trim()

    def trim(self) -> None:
        """Keep to the bounds of all that is counted."""
        for name in _COUNTERS:
            getattr(self, name).trim()

    def to_object(self) -> dict[str, Any]:
        """As JSON can hold it, to hand it from one process to another."""
        content: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        for name in _COUNTERS:
            counter = getattr(self, name)
            content[name] = [counter.counts, counter.other]
        return content | {"sample": self.sample.to_object()}

    @classmethod
    def from_object(cls, content: Mapping[str, Any]) -> LogSummary:
        """The inverse of ``to_object``."""
        summary = cls(sample=TextSample.from_object(content["sample"]))
        for name in _COUNTS:
            setattr(summary, name, content[name])
        for name in _COUNTERS:
            setattr(summary, name, BoundedCounter(*content[name]))
        return summary


_COUNTERS = tuple(field.name for field in fields(LogSummary) if field.type == "BoundedCounter")
_COUNTS = tuple(field.name for field in fields(LogSummary) if field.type == "int")
