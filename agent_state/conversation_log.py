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

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zlib import crc32

import orjson

from agent_state.clock import Clock, SystemClock
from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    SchemaTooNewError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.protocols import (
    Append,
    Change,
    Delete,
    Document,
    Incident,
    JsonObject,
    LogRecord,
    Put,
    StateStore,
)
from agent_state.serializers import ApartJson, JsonList, canonical_json, parse_object
from agent_state.storage import logs, paths
from agent_state.storage.document import SEALED
from agent_state.storage.lru_cache import LRUCache
from agent_state.storage.sealed_store import is_sealed

_logger = logging.getLogger("agent_state.manager")

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

_KEPT = timedelta(minutes=2)
"""A snapshot is a minute older than its document at most."""
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
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
class _Known:
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
class _Split:
    """An agent's put as it is committed, with its appends; what was known, and what is then."""

    agent_id: str
    before: _Known
    after: _Known
    changes: Sequence[Change]
    at: int = 0
    """Where the put is among the changes of the commit."""


class AgentDocuments:
    """Commits and reads documents of ``store``; those of agents with their conversations.

    All else is as the store does it, and raises what it raises. ``window``: how many messages of a
    conversation in a log are read with an agent; None for all.
    """

    def __init__(
        self, store: StateStore, clock: Clock | None = None, *, window: int | None = None
    ) -> None:
        self.store = store
        self._clock: Clock = clock or SystemClock()
        self._window = window
        self._ended: LRUCache[Key, datetime] = LRUCache(CACHED)
        """When a log was followed by another one."""
        self._known: LRUCache[str, _Known] = LRUCache(CACHED, CACHED_BYTES)
        self._incidents: list[Incident] = []
        self._removals: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait until the logs that are not used any more are removed."""
        while self._removals:
            await asyncio.wait(self._removals)
        self._known.clear()

    # -- writing -------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        """As ``StateStore.commit``."""
        if not any(map(_is_agent, changes)):
            return await self.store.commit(changes)
        whole: set[Key] = set()
        refused: dict[str, tuple[int, int]] = {}
        while True:
            made, at, splits = await self._split(changes, whole)
            try:
                numbers = await self.store.commit(made)
            except SchemaTooNewError as error:
                key = error.key or ()
                if key in whole or not await self._has_log(error.kind, key):
                    raise
                whole.add(key)  # a list takes the place of a log
            except RevisionConflictError as error:
                if not _was_late(error, splits, refused):
                    raise
                for each in splits:
                    if self._known.get(each.agent_id) is each.before:
                        self._known.drop(each.agent_id)
            else:
                self._note_made(changes, splits, numbers)
                return [numbers[index] for index in at]

    def _note_made(
        self, changes: Sequence[Change], splits: Iterable[_Split], numbers: Sequence[int]
    ) -> None:
        for change in changes:
            if _is_agent(change):
                self._known.drop(change.key[0])
                if isinstance(change, Delete):
                    self._remove_logs(change.key[0])
        for split in splits:
            split.after.revision = numbers[split.at]
            self._known.set(split.agent_id, split.after, split.after.messages.size)
            if split.after.place.log != split.before.place.log:
                before = split.before.place.log
                self._ended.set((split.agent_id, before), self._clock.now())
                self._remove_logs(split.agent_id, before, split.after.place.log)

    async def _split(
        self, changes: Sequence[Change], whole: set[Key]
    ) -> tuple[list[Change], list[int], list[_Split]]:
        """The changes to make, where each of ``changes`` is among them, and what was split."""
        made: list[Change] = []
        at: list[int] = []
        splits: list[_Split] = []
        for change in changes:
            at.append(len(made))
            if not _is_agent(change) or not isinstance(change, Put):
                made.append(change)
                continue
            split = None
            if isinstance(change, AgentPut) and change.key not in whole:
                if any(_is_agent(each) and each.key == change.key for each in made):
                    whole.add(change.key)  # the second change of this agent
                    return await self._split(changes, whole)
                split = await self._plan(change)
            if split is None:
                put, expected = change, change.expected
                if isinstance(change, AgentPut):
                    put = await self._completed(change)
                    expected = put.expected
                if change.key in whole:  # a version of another schema: the document begins anew
                    made.append(Delete(KIND, change.key, expected))
                    at[-1], expected = len(made), None
                made.append(replace(whole_put(put), expected=expected))
                continue
            split.at = len(made)
            splits.append(split)
            made += split.changes
        return made, at, splits

    async def _has_log(self, kind: str | None, key: Key) -> bool:
        """Whether the conversation of a stored agent is in a log."""
        document = await self.store.get(KIND, key) if kind == KIND and len(key) == 1 else None
        if document is None or document.schema != SCHEMA:
            return False
        return place_of(parse_object(document.body)) is not None

    async def _plan(self, put: AgentPut) -> _Split | None:
        """``plan`` with what is stored, of all of the conversation if a part is not enough."""
        agent_id = put.key[0]
        split = plan(agent_id, await self._look(agent_id, put.expected, put.start), put)
        while split is None and put.start:
            whole = await self._completed(put)
            try:
                known = await self._look(agent_id, whole.expected)
            except RevisionConflictError:
                if put.expected is not None:
                    raise
                continue  # it has changed meanwhile
            return plan(agent_id, known, whole)
        return split

    async def _completed(self, put: AgentPut) -> AgentPut:
        """The put of a part of a conversation as one of all of it, over what is stored."""
        if not put.start:
            return put
        stored = await self.store.get(KIND, put.key)
        history: object = None
        if stored is not None:
            context = parse_object((await self.whole(stored)).body).get("context")
            history = context.get("conversation_history") if type(context) is dict else None
        earlier = history[: put.start] if type(history) is list else []
        if stored is not None and len(earlier) < put.start:
            self._report(stored, f"{len(earlier)} of {put.start} earlier messages are stored")
        messages = [orjson.dumps(each, option=orjson.OPT_SORT_KEYS) for each in earlier]
        items = JsonList().extended([*messages, *put.apart.items.items()])
        apart = put.apart._replace(items=items, earlier=None, added=())
        expected = put.expected
        if expected is None:
            expected = 0 if stored is None else stored.revision
        return replace(put, apart=apart, start=0, expected=expected)

    async def _look(self, agent_id: str, expected: int | None, start: int = 0) -> _Known:
        """What is stored of an agent, with the messages behind the first ``start``.

        Raises ``RevisionConflictError`` if that is not expected.
        """
        document = await self.store.get(KIND, (agent_id,))
        known = self._known.get(agent_id)
        # A revision alone is no version: another branch of git may have the same.
        if (
            document is None
            or known is None
            or known.body != document.body
            or known.revision != document.revision
            or known.start > start
        ):
            known = await self._read_known(agent_id, document, start)
            self._known.set(agent_id, known, known.messages.size)
        elif known.start < start:
            messages = JsonList().extended(known.messages.items()[start - known.start :])
            known = replace(known, start=start, messages=messages)
            self._known.set(agent_id, known, known.messages.size)
        if expected not in (None, known.revision):
            actual = known.revision
            raise RevisionConflictError(
                expected=expected or 0, actual=actual, kind=KIND, key=(agent_id,)
            )
        return known

    async def _read_known(self, agent_id: str, document: Document | None, start: int) -> _Known:
        known = _Known() if document is None else _Known(document.revision, document.body)
        known.start = start
        if document is not None and document.schema == SCHEMA:
            place = place_of(parse_object(document.body))
            if place is None:
                raise SchemaTooNewError(f"{SCHEMA} without a log", kind=KIND, key=(agent_id,))
            known.place = place
        key, part = (agent_id, known.place.log), known.place.behind(start)
        messages: list[bytes] = []
        after = part.ranges[0][0] - 1 if start and part.ranges else 0
        async for record in self.store.read_log(KIND, key, after=after):
            known.end = record.seq
            if part.has(record.seq):
                messages.append(record.body)
        if after and not known.end:
            async for record in self.store.read_log(KIND, key, last=1):
                known.end = record.seq
        known.place.end_at(known.end)
        known.messages = JsonList().extended([*messages, *part.rest])
        if not start:
            known.place.check = crc32(known.messages.text)
        return known

    def _remove_logs(self, agent_id: str, *keep: str) -> None:
        """Remove all logs of an agent but two, the later in use, in the background.

        Without ``keep`` all, if it is deleted.
        """
        task = asyncio.create_task(self._remove_unused(agent_id, keep))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _remove_unused(self, agent_id: str, keep: Sequence[str]) -> None:
        try:
            found = await self.store.logs(KIND, (agent_id,))
            unused = [key for key in found if is_history(key) and key[1] not in keep]
            if keep:
                now, ended = self._clock.now(), self._ended
                unused = [key for key in unused if now - ended.get(key, _LONG_AGO) > _KEPT]
            if not unused:
                return
            async with self.store.lock(KIND, (agent_id,)):
                document = await self.store.get(KIND, (agent_id,))
                place = None
                if document is not None and document.schema == SCHEMA:
                    place = place_of(parse_object(document.body))
                if (place.log in keep[1:]) if place else (document is None and not keep):
                    for key in unused:
                        await self.store.erase(KIND, key)
        except AgentStateError as error:
            _logger.warning("an old conversation of %r was not removed: %s", agent_id, error)

    def forget(self, kind: str, key: Key) -> None:
        """It was erased."""
        if kind == KIND:
            self._known.drop(key[0])

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        """As ``StateStore.get``."""
        document = await self.store.get(kind, key)
        while document is not None:
            whole, missing = await self._joined(document, self._window)
            if missing is None:
                return whole
            again = await self.store.get(kind, key)
            if again == document:
                return self._report(whole, missing)
            document = again  # it was deleted meanwhile, or is in another log
        return None

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        """As ``StateStore.scan``."""
        async for document in self.store.scan(kind, prefix):
            yield await self._windowed(document) if document.schema == SCHEMA else document

    async def history(self, agent_id: str, start: int = 0) -> AsyncIterator[Any]:
        """The messages of an agent behind the first ``start``, read from the log piece by piece."""
        document = await self.store.get(KIND, (agent_id,))
        if document is None:
            return
        body = parse_object(document.body)
        place = place_of(body) if document.schema == SCHEMA else None
        if place is None:
            context = body.get("context")
            history = context.get("conversation_history") if type(context) is dict else None
            for message in (history or [])[start:]:
                yield message
            return
        place = place.behind(start)
        if place.ranges:
            key, after = (agent_id, place.log), place.ranges[0][0] - 1
            async for record in self.store.read_log(KIND, key, after=after):
                if record.seq > place.ranges[-1][1]:
                    break
                if place.has(record.seq):
                    yield parse_object(record.body)
        for each in place.rest:
            yield orjson.loads(each)

    async def whole(self, document: Document, *, strict: bool = False) -> Document:
        """The document with its conversation as a list.

        ``strict``: raise ``StateCorruptedError`` when the log has not all of it.
        """
        whole, missing = await self._joined(document, None, strict=strict)
        if missing is None:
            return whole
        if strict:
            raise StateCorruptedError(missing, kind=document.kind, key=document.key)
        return self._report(whole, missing)

    async def _windowed(self, document: Document) -> Document:
        """The document with the last messages of its conversation."""
        whole, missing = await self._joined(document, self._window)
        return whole if missing is None else self._report(whole, missing)

    async def _joined(
        self, document: Document, window: int | None, *, strict: bool = False
    ) -> tuple[Document, str | None]:
        """``join`` with what the log has; a document that cannot be read is quarantined."""
        if document.kind != KIND or document.schema != SCHEMA:
            return document, None
        try:
            place = place_of(parse_object(document.body))
        except StateCorruptedError as error:
            if strict:
                raise
            return await self._refuse(document, error), None
        start = 0
        if place is not None and window is not None and place.count < OPEN:
            start = max(place.count - window, 0)
            place = place.behind(start)
        records: list[LogRecord] = []
        if place is not None and place.ranges:
            key, last = (*document.key, place.log), place.ranges[-1][1]
            async for record in self.store.read_log(KIND, key, after=place.ranges[0][0] - 1):
                if record.seq > last:
                    break
                records.append(record)
        return join(document, records, start=start)

    def _report(self, document: Document, missing: str) -> Document:
        incident = Incident(missing, KIND, document.key)
        if incident not in self._incidents:
            _logger.warning("%s/%s: %s", KIND, document.key[0], missing)
            self._incidents.append(incident)
        return document

    async def _refuse(self, document: Document, error: StateCorruptedError) -> Document:
        """The earlier version that replaces a document in the quarantine."""
        kind, key = document.kind, document.key
        earlier = await self.store.quarantine(kind, key, error.message, version=document)
        if earlier is None or earlier == document:
            raise StateCorruptedError(error.message, kind=kind, key=key) from error
        return await self._windowed(earlier)

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document
    ) -> Document | None:
        """As ``StateStore.quarantine``."""
        stored = await self.store.get(kind, key)
        if stored is not None:
            whole = await self._windowed(stored)
            if whole != version:
                return whole  # it has replaced that version
            version = stored
        self.forget(kind, key)
        earlier = await self.store.quarantine(kind, key, reason, version=version)
        return None if earlier is None else await self._windowed(earlier)

    def incidents(self) -> list[Incident]:
        """Conversations whose logs are shorter than they should be."""
        return list(self._incidents)


def plan(agent_id: str, known: _Known, put: AgentPut) -> _Split | None:
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
    changes: list[Change] = [_plain(put, body, SCHEMA, known.revision)]
    for number, message in enumerate(added, last + 1):
        changes.append(Append(KIND, (agent_id, log), message, expected=number))
    after = _Known(known.revision, body, place, put.start, items, last + len(added))
    return _Split(agent_id, known, after, changes)


def whole_put(put: Put) -> Put:
    """The put with its body in one part."""
    if not isinstance(put, AgentPut):
        return put
    return _plain(put, put.apart.whole(), put.schema, put.expected)


def _was_late(
    error: RevisionConflictError, splits: Iterable[_Split], refused: dict[str, tuple[int, int]]
) -> bool:
    """Whether another writer was first since an agent was looked at.

    ``refused``: what was known at earlier attempts; the same twice is no reason to try again.
    """
    late = False
    for each in splits:
        if error.kind == KIND and error.key is not None and error.key[0] == each.agent_id:
            seen = each.before.revision, each.before.end
            if refused.get(each.agent_id) == seen:
                return False
            refused[each.agent_id] = seen
            late = True
    return late


def is_history(key: Key) -> bool:
    """Whether this is the key of a log that a conversation of an agent is in, or was."""
    return len(key) == 2 and _HISTORY.fullmatch(key[1]) is not None


def _is_agent(change: Change) -> bool:
    return change.kind == KIND and len(change.key) == 1 and isinstance(change, Put | Delete)


def _plain(put: Put, body: bytes, schema: str, expected: int | None) -> Put:
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
