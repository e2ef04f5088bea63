"""A long conversation of an agent is a log beside its document, one message a line.

The document ``agents/alice`` then has in ``context.conversation_history`` no list, but where the
list is: ``{"log": "history", "ranges": [[1, 40], [43, 90]]}`` are the records 1 to 40 and 43 to 90
of the log ``agents/alice/history``, and ``rest``, if it is there, has the messages behind them. A
last range without its end, such as ``[43]``, goes on to the end of the log, as a merge leaves it.
``check`` is the CRC-32 of the whole list in canonical JSON but for its last bracket; it tells
versions of an agent apart, and nothing is refused for it: a line may be changed by hand.
Its schema is ``agents/2``; whoever reads it here gets ``agents/1`` with the list in its place.

What was added at the end of a conversation is appended, in the commit of the document, and what was
cut off at its beginning leaves a range. After another edit, what follows the first difference is
in ``rest`` until it stays as it is. A log of which little is in use is followed by a new one,
``history-90``; the one before it is kept, as an earlier version of the document may name it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import orjson

from agent_state.errors import Key, StateCorruptedError, StateValidationError
from agent_state.protocols import (
    Append,
    Change,
    Document,
    JsonObject,
    LogRecord,
    Put,
)
from agent_state.serializers import ApartJson, JsonList, canonical_json, parse_object
from agent_state.storage import logs, paths
from agent_state.storage.document import SEALED
from agent_state.storage.sealed_store import is_sealed

KIND = "agents"
SCHEMA, WHOLE_SCHEMA = "agents/2", "agents/1"
LOG = "history"
OFFSET = "conversation_history_offset"
"""The field of the context that says how many messages stand before those of a window."""
OPEN = 2**63 - 1
"""The last record of a range that goes on to the end of the log."""
MIN_MESSAGES = 2
MIN_BYTES = 4096
"""A shorter conversation stays in the document, as a list; so does one that has other messages than
objects, which are no records."""
MAX_BYTES = 16 * 1024 * 1024
"""What is longer is not moved at once: it stays in the document."""

_UNUSED = 100
"""So many records more than those in use may be in a log."""
_MOST_RANGES = 32
CACHED = 10_000
CACHED_BYTES = 64 * 1024 * 1024
_REFUSED = logs.RESERVED | {SEALED, "_gzip"}
_HISTORY = re.compile(f"{LOG}(-[0-9]+)?")
_NOTHING = ApartJson(b"null", 0, JsonList())


@dataclass(frozen=True, slots=True)
class AgentPut(Put):
    """A put of an agent with a long conversation, whose body is in two parts."""

    apart: ApartJson = _NOTHING
    start: int = 0
    """How many messages stand before those, and stay as they are."""


@dataclass(slots=True)
class Place:
    """Where the messages of a conversation are, as a document says it."""

    log: str = LOG
    ranges: list[list[int]] = field(default_factory=list)
    """The first and the last record of each part, in order."""
    rest: list[bytes] = field(default_factory=list)
    """The messages behind those, in canonical JSON."""
    check: int | None = None
    """The CRC-32 of the whole list, in canonical JSON but for its last bracket."""

    @property
    def last(self) -> int:
        """The last record that must be there; 0 for none."""
        first, last = self.ranges[-1] if self.ranges else (0, 0)
        return first - 1 if last == OPEN else last

    @property
    def count(self) -> int:
        """How many messages it has; ``OPEN`` at least if its end is not known."""
        return _count(self.ranges) + len(self.rest)

    def has(self, number: int) -> bool:
        """Whether it names this record."""
        return any(first <= number <= last for first, last in reversed(self.ranges))

    def behind(self, count: int) -> Place:
        """Where those behind the first ``count`` messages are."""
        rest = self.rest[max(count - _count(self.ranges), 0) :]
        return Place(self.log, _without_first(self.ranges, count), rest, self.check)

    def end_at(self, end: int) -> None:
        """Name no record behind ``end``, where the log ends."""
        self.ranges = [[first, min(last, end)] for first, last in self.ranges if first <= end]

    def encode(self) -> bytes:
        """What stands in the document."""
        check = f"{self.check or 0:08x}"
        head = orjson.dumps({"check": check, "log": self.log, "ranges": self.ranges})
        return head[:-1] + b',"rest":[' + b",".join(self.rest) + b"]}" if self.rest else head


@dataclass(slots=True)
class StoredAgent:
    """What is stored of an agent."""

    revision: int = 0
    body: bytes = b""
    """The document's body as it is stored."""
    place: Place = field(default_factory=Place)
    start: int = 0
    """How many messages stand before ``messages``."""
    messages: JsonList = field(default_factory=JsonList)
    """Those in the log and in ``rest``."""
    end: int = 0
    """The last record of the log."""


def place_of(body: JsonObject) -> Place | None:
    """Where the conversation of an ``agents/2`` is; None if it is in the body.

    Raises ``StateCorruptedError`` when it cannot be known.
    """
    context = body.get("context")
    found = context.get("conversation_history") if type(context) is dict else None
    if type(found) is not dict:
        return None
    try:
        return _decoded_place(**found)
    except (TypeError, ValueError) as error:
        why = "where the conversation of the agent is cannot be read"
        raise StateCorruptedError(f"{why}: {error}") from error


def _decoded_place(log: Any, ranges: Any, rest: Any = (), check: Any = None) -> Place:
    if type(ranges) is not list or type(rest) not in (list, tuple):
        raise TypeError("a list of ranges and a list of messages are needed")
    if _HISTORY.fullmatch(log) is None:
        raise ValueError(f"{log!r:.40} is no log of a conversation")
    decoded: list[list[int]] = []
    for index, each in enumerate(ranges):
        is_open = len(each) == 1 and index + 1 == len(ranges)
        first, last = (*each, OPEN) if is_open else each
        before = decoded[-1][1] if decoded else 0
        if type(first) is not int or type(last) is not int:
            raise TypeError("a range is a first and a last number")
        if not before < first <= last:
            raise ValueError(f"{each!r:.40} is not behind {before}")
        decoded.append([first, last])
    messages = [orjson.dumps(each, option=orjson.OPT_SORT_KEYS) for each in rest]
    return Place(log, decoded, messages, None if check is None else int(check, 16))


def offset_of(body: JsonObject) -> int:
    """How many messages stand before those in the body. Raises ``StateValidationError``."""
    context = body.get("context")
    start = context.get(OFFSET, 0) if type(context) is dict else 0
    if type(start) is not int or start < 0:
        raise StateValidationError(f"context.{OFFSET}: {start!r:.40} is no number of messages")
    return start


def join(
    document: Document, records: Iterable[LogRecord], *, start: int = 0
) -> tuple[Document, str | None]:
    """An agent with its conversation as a list, and what its log does not have, if there is such.

    ``records``: those of the log, in order. ``start``: how many messages are left out. Raises
    ``StateCorruptedError`` when it cannot be known where the conversation is.
    """
    body = parse_object(document.body)
    place = place_of(body)
    if place is None:
        return document, None  # of a newer library
    place = place.behind(start)
    end, messages = 0, list[bytes]()
    for record in records:
        if place.has(record.seq):
            end = record.seq
            messages.append(record.body)
    array = b"[" + b",".join([*messages, *place.rest]) + b"]"
    body["context"]["conversation_history"] = orjson.Fragment(array)
    body["context"].pop(OFFSET, None)
    if start:
        body["context"][OFFSET] = start
    whole = replace(document, body=canonical_json(body), schema=WHOLE_SCHEMA)
    if end >= place.last:
        return whole, None
    path = paths.relative(KIND, (*document.key, place.log), paths.LOG)
    return whole, f"{path} has {end} of the {place.last} records of the conversation"


def join_file(document: Document, log: Callable[[str], bytes]) -> tuple[Document, str | None]:
    """``join`` for a document that has a log, with what ``log`` gives for the path of the file.

    Any other document is returned as it is, and so is an encrypted one.
    """
    if document.kind != KIND or document.schema != SCHEMA or is_sealed(document.body):
        return document, None
    place = place_of(parse_object(document.body))
    if place is None:
        return document, None
    records: list[LogRecord] = []
    for line in log(paths.relative(KIND, (*document.key, place.log), paths.LOG)).split(b"\n"):
        with suppress(StateCorruptedError):  # an empty line, or one that is missed then
            records.append(logs.decode_line(line, records[-1].seq if records else 0))
    return join(document, records)


def without_log(document: Document) -> Document:
    """The document for a reader of all but the conversation: of that it has ``rest`` at most.

    Raises ``StateCorruptedError`` when it cannot be known where the conversation is.
    """
    if document.kind != KIND or document.schema != SCHEMA or is_sealed(document.body):
        return document
    body = parse_object(document.body)
    place = place_of(body)
    if place is None:
        return document  # of a newer library
    body["context"]["conversation_history"] = [orjson.loads(each) for each in place.rest]
    return replace(document, body=canonical_json(body), schema=WHOLE_SCHEMA)


@dataclass(slots=True)
class SplitPut:
    """An agent's put as it is committed, with its appends; what was known, and what is then."""

    agent_id: str
    before: StoredAgent
    after: StoredAgent
    changes: Sequence[Change]
    at: int = 0
    """Where the put is among the changes of the commit."""


def plan(agent_id: str, known: StoredAgent, put: AgentPut) -> SplitPut | None:
    """How an agent is stored over what is known; None if its conversation stays in the document.

    Of a put that has a part of the conversation: None if all of it is needed.
    """
    head, start, items, earlier, new = put.apart
    ranges = [[*each] for each in known.place.ranges]
    rest, added = known.place.rest, list[bytes]()
    goes_on = earlier is known.messages or items.begins_with(known.messages)
    if put.start and (not goes_on or put.start > known.place.count):
        return None
    if goes_on:
        if earlier is not known.messages:
            new = items.items()[known.messages.count :]
        if new:
            added, rest = [*rest, *new], []
    else:
        was, now = known.messages.items(), items.items()
        count = len(was) - len(rest)
        cut = was.index(now[0]) if now and now[0] in was else count
        if 0 < cut < count and was[cut:] == now[: len(was) - cut]:
            ranges = _without_first(ranges, cut)
            if new_ones := now[len(was) - cut :]:
                added, rest = [*rest, *new_ones], []
        else:
            pairs = enumerate(zip(was, now, strict=False))
            same = next((at for at, pair in pairs if pair[0] != pair[1]), min(len(was), len(now)))
            ranges = _first_of(ranges, min(same, count))
            rest = now[min(same, count) :]
    log, last = known.place.log, known.end
    used = _count(ranges) + len(added)
    if added and (len(ranges) > _MOST_RANGES or last + len(added) > 2 * used + _UNUSED):
        if put.start:
            return None
        log, last, ranges = f"{LOG}-{known.revision + 1}", 0, []
        added, rest = items.items(), []
    if not _can_be_records(added):
        return None
    if added:
        _extend(ranges, last + 1, last + len(added))
    begun = known.place.check if goes_on else None
    check = crc32(items.text) if begun is None else crc32(known.messages.behind(new), begun)
    place = Place(log, ranges, rest, check)
    body = b"".join((head[:start], place.encode(), head[start + 4 :]))
    changes: list[Change] = [_in_one_part(put, body, SCHEMA, known.revision)]
    for number, message in enumerate(added, last + 1):
        changes.append(Append(KIND, (agent_id, log), message, expected=number))
    after = StoredAgent(known.revision, body, place, put.start, items, last + len(added))
    return SplitPut(agent_id, known, after, changes)


def whole_put(put: Put) -> Put:
    """The put with its body in one part."""
    if not isinstance(put, AgentPut):
        return put
    return _in_one_part(put, put.apart.whole(), put.schema, put.expected)


def is_history(key: Key) -> bool:
    """Whether this is the key of a log that a conversation of an agent is in, or was."""
    return len(key) == 2 and _HISTORY.fullmatch(key[1]) is not None


def _in_one_part(put: Put, body: bytes, schema: str, expected: int | None) -> Put:
    return Put(KIND, put.key, body, schema, expected, put.meta)


def _can_be_records(messages: Iterable[bytes]) -> bool:
    """Whether a log can hold these messages as they are."""
    size = 0
    for message in messages:
        size += len(message)
        found = orjson.loads(message) if message.startswith(b"{") else None
        if found is None or not _REFUSED.isdisjoint(found):
            return False
    return size <= MAX_BYTES


def _count(ranges: Iterable[Sequence[int]]) -> int:
    return sum(last - first + 1 for first, last in ranges)


def _first_of(ranges: Iterable[Sequence[int]], count: int) -> list[list[int]]:
    """The ranges of the first ``count`` records."""
    found: list[list[int]] = []
    for first, last in ranges:
        if count > 0:
            found.append([first, min(last, first + count - 1)])
            count -= last - first + 1
    return found


def _without_first(ranges: Iterable[Sequence[int]], count: int) -> list[list[int]]:
    """The ranges without the first ``count`` records."""
    found: list[list[int]] = []
    for first, last in ranges:
        size = last - first + 1
        if count < size:
            found.append([first + max(count, 0), last])
        count -= size
    return found


def _extend(ranges: list[list[int]], first: int, last: int) -> None:
    if ranges and ranges[-1][1] + 1 == first:
        ranges[-1][1] = last
    else:
        ranges.append([first, last])
