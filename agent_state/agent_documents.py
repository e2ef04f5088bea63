"""Agents with their conversations, as they are committed to a store and read from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zlib import crc32

import orjson

from agent_state.clock import Clock, SystemClock
from agent_state.conversation_log import (
    CACHED,
    CACHED_BYTES,
    KIND,
    OPEN,
    SCHEMA,
    AgentPut,
    SplitPut,
    StoredAgent,
    is_history,
    join,
    place_of,
    plan,
    whole_put,
)
from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    SchemaTooNewError,
    StateCorruptedError,
)
from agent_state.protocols import (
    Change,
    Delete,
    Document,
    Incident,
    LogRecord,
    Put,
    StateStore,
)
from agent_state.serializers import JsonList, parse_object
from agent_state.storage.lru_cache import LRUCache

_logger = logging.getLogger("agent_state.manager")

_KEPT = timedelta(minutes=2)
"""How long the log before the last is kept: a snapshot is a minute older than its document."""
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


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
        self._known: LRUCache[str, StoredAgent] = LRUCache(CACHED, CACHED_BYTES)
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
        self, changes: Sequence[Change], splits: Iterable[SplitPut], numbers: Sequence[int]
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
    ) -> tuple[list[Change], list[int], list[SplitPut]]:
        """The changes to make, where each of ``changes`` is among them, and what was split."""
        made: list[Change] = []
        at: list[int] = []
        splits: list[SplitPut] = []
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

    async def _plan(self, put: AgentPut) -> SplitPut | None:
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

    async def _look(self, agent_id: str, expected: int | None, start: int = 0) -> StoredAgent:
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

    async def _read_known(
        self, agent_id: str, document: Document | None, start: int
    ) -> StoredAgent:
        known = StoredAgent() if document is None else StoredAgent(document.revision, document.body)
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


def _was_late(
    error: RevisionConflictError, splits: Iterable[SplitPut], refused: dict[str, tuple[int, int]]
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


def _is_agent(change: Change) -> bool:
    return change.kind == KIND and len(change.key) == 1 and isinstance(change, Put | Delete)
