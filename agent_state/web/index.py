"""What lists over all agents are made of: a few facts of every document, kept in memory.

An index is made at the first look, of what the start of a runtime has read where it may see that,
and follows the store from then on: a notice marks a document, and the next look reads those that
are marked. A list then reads only the documents of its page.
What is answered has every change that this process acknowledged before; changes that another
process made are seen with their files.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from agent_state.clock import sort_text
from agent_state.errors import (
    ErasedKeyError,
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    UnmergedStateError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import meaning_of
from agent_state.protocols import Document, NoticeStream, StateSerializer
from agent_state.runtime.recovery import garbage_collection_paused
from agent_state.storage.executor import end_task

Order = tuple[str, ...]
"""The place of a document in the list of its kind; it ends with the key."""

DAMAGED = "damaged"
"""The status of a document that cannot be read; a list names it as unusable."""
_LAST = "~"
"""Sorts behind every time: the end of a sleep that has none."""
_AT_ONCE = 64
MOST_WAITING = 100_000
"""An index is dropped when more documents have changed since the last look (and than it has)."""
_LENGTHS = {"agents": 1, "tasks": 2, "mail": 2, "sleep": 1, "sessions": 1}
"""The kinds that are listed, and the length of their documents' keys."""


@dataclass(frozen=True, slots=True)
class DocumentEntry:
    """A few facts of a stored document."""

    key: Key
    order: Order
    status: str
    """The status in our words; another program's word as it is."""
    name: str
    """The name of a task, the type of an agent, the sender of mail, the user of a session."""
    text: str
    """What a search looks in: the error of a task, the subject of mail, the name of an agent."""
    created_at: str | None
    due: str
    """When a task may begin, a sleeper wakes, a session expires."""

    @property
    def agent_id(self) -> str:
        return self.key[0]

    @property
    def error(self) -> str:
        return self.text


class DocumentIndex:
    """The entries of one kind, by key and in order."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.is_filled = False
        self.entries: dict[Key, DocumentEntry] = {}
        self.statuses: Counter[str] = Counter()
        self.waiting: set[Key] = set()
        """Documents that have changed since they were read."""
        self._order: list[tuple[Order, Key]] = []
        self._by_status: dict[str, dict[str, list[tuple[str, Key]]]] = {}

    def put(self, entry: DocumentEntry) -> None:
        """Take in what a document is now."""
        self.drop(entry.key)
        self.entries[entry.key] = entry
        self.statuses[entry.status] += 1
        insort(self._places(entry), (entry.due, entry.key))
        insort(self._order, (entry.order, entry.key))

    def drop(self, key: Key) -> None:
        """Forget a document that is not there any more."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.statuses[entry.status] -= 1
        places = self._places(entry)
        del places[bisect_left(places, (entry.due, key))]
        if not places:
            del self._by_status[entry.status][entry.agent_id]
        del self._order[bisect_left(self._order, (entry.order, key))]

    def fill(self, entries: list[DocumentEntry]) -> None:
        """Take in all documents, at the beginning."""
        self.is_filled = True
        self.entries = {entry.key: entry for entry in entries}
        self._order = sorted((entry.order, entry.key) for entry in entries)
        self.statuses = Counter(entry.status for entry in entries)
        for entry in sorted(entries, key=lambda one: (one.due, one.key)):
            self._places(entry).append((entry.due, entry.key))

    def of_status(self, *statuses: str) -> Iterator[DocumentEntry]:
        """The entries of these statuses, in no order."""
        for status in statuses:
            for places in self._by_status.get(status, {}).values():
                yield from (self.entries[key] for _, key in places)

    def by_agent(self, status: str) -> Mapping[str, list[tuple[str, Key]]]:
        """What is due when, and the keys: the documents of a status, by their agents, in order."""
        return self._by_status.get(status, {})

    def _places(self, entry: DocumentEntry) -> list[tuple[str, Key]]:
        return self._by_status.setdefault(entry.status, {}).setdefault(entry.agent_id, [])

    def page(
        self,
        wanted: Callable[[DocumentEntry], bool],
        *,
        statuses: tuple[str, ...] = (),
        after: Order | None,
        limit: int,
        backwards: bool,
    ) -> list[DocumentEntry]:
        """The wanted entries behind a place, in order; ``statuses``: only of these, if any."""
        order = self._order
        if statuses and sum(self.statuses[one] for one in statuses) * 8 < len(order):
            order = sorted((entry.order, entry.key) for entry in self.of_status(*statuses))
        if backwards:
            end = len(order) if after is None else bisect_left(order, (after,))
            places: Iterator[int] = iter(range(end - 1, -1, -1))
        else:
            start = 0 if after is None else bisect_right(order, after, key=lambda one: one[0])
            places = iter(range(start, len(order)))
        found: list[DocumentEntry] = []
        for place in places:
            entry = self.entries[order[place][1]]
            if (not statuses or entry.status in statuses) and wanted(entry):
                found.append(entry)
                if len(found) == limit:
                    break
        return found


class StateIndexes:
    """The indexes of one application's state, each made when it is first asked for.

    It is a ``RestoreReader``: what a start reads is not read again at the first look.
    """

    def __init__(
        self, watch: Callable[[], Awaitable[NoticeStream]], *, most_waiting: int = MOST_WAITING
    ) -> None:
        self._watch = watch
        self._most_waiting = most_waiting
        self._indexes: dict[str, DocumentIndex] = {}
        self._locks = {kind: asyncio.Lock() for kind in _LENGTHS}
        self._starting = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self._serializer: StateSerializer | None = None

    async def aclose(self) -> None:
        """Follow the store no longer."""
        task, self._following = self._following, None
        if task is not None:
            await end_task(task)

    def have_filled(self, kinds: Iterable[str]) -> bool:
        """Whether the indexes of these kinds are made, so that a look reads few documents."""
        return all(kind in self._indexes and self._indexes[kind].is_filled for kind in kinds)

    async def get(self, kind: str, manager: StatePersistenceManager) -> DocumentIndex:
        """The index of a kind as it is now; ``manager`` reads what it lacks.

        Raises as ``StatePersistenceManager.scan``.
        """
        await self._start()
        async with self._locks[kind]:
            index = self._indexes.get(kind)
            if index is None or not index.is_filled:
                index = self._indexes.setdefault(kind, DocumentIndex(kind))
                try:
                    await _fill(index, manager)
                except BaseException:
                    self._indexes.pop(kind, None)
                    raise
            await asyncio.sleep(0)  # the follower takes what has been committed
            await _refresh(index, manager)
            return index

    async def begin(self, manager: StatePersistenceManager) -> None:
        """Follow the store before a start reads it; forget what was known."""
        await self.aclose()
        await self._start()
        self._serializer = manager.serializer
        self._indexes = {kind: DocumentIndex(kind) for kind in _LENGTHS}

    def take(self, document: Document) -> None:
        """Keep the facts of a document that a start has read."""
        kind, key = document.kind, document.key
        index = self._indexes.get(kind)
        if self._serializer is None or index is None or index.is_filled:
            return
        if len(key) == _LENGTHS[kind]:
            with suppress(StateCorruptedError):  # the look finds that it is damaged
                index.entries[key] = entry_of(kind, key, self._serializer.loads(document.body))

    async def _start(self) -> None:
        async with self._starting:
            if self._following is None or self._following.done():
                self._indexes.clear()  # changes may have been missed
                notices = await self._watch()
                self._following = asyncio.create_task(self._follow(notices))

    async def _follow(self, notices: NoticeStream) -> None:
        async with aclosing(notices):
            async for notice in notices:
                index = self._indexes.get(notice.kind)
                if index is not None and len(notice.key) == _LENGTHS[notice.kind]:
                    index.waiting.add(notice.key)
                    if len(index.waiting) > max(self._most_waiting, len(index.entries)):
                        del self._indexes[notice.kind]  # nobody has looked for long


async def _fill(index: DocumentIndex, manager: StatePersistenceManager) -> None:
    kind, loads = index.kind, manager.serializer.loads
    keys = [key for key in await manager.store.keys(kind) if len(key) == _LENGTHS[kind]]
    known = index.entries
    found = {key: known[key] for key in keys if key in known}
    with garbage_collection_paused():
        if found:
            unread = [key for key in keys if key not in found]
            for start in range(0, len(unread), _AT_ONCE):
                some = unread[start : start + _AT_ONCE]
                read = await _read_all(kind, some, manager)
                found |= {entry.key: entry for entry in read if entry is not None}
        else:
            async for document in manager.store.scan(kind):
                if len(document.key) == _LENGTHS[kind]:
                    with suppress(StateCorruptedError):
                        found[document.key] = entry_of(kind, document.key, loads(document.body))
        for key in keys:
            if key not in found:
                found[key] = entry_of(kind, key, {"status": DAMAGED})
        index.fill([*found.values()])


async def _refresh(index: DocumentIndex, manager: StatePersistenceManager) -> None:
    """Read the documents that have changed."""
    while index.waiting:
        some = [index.waiting.pop() for _ in range(min(_AT_ONCE, len(index.waiting)))]
        try:
            read = await _read_all(index.kind, some, manager)
        except BaseException:
            index.waiting.update(some)
            raise
        for key, entry in zip(some, read, strict=True):
            index.drop(key)
            if entry is not None:
                index.put(entry)


async def _read_all(
    kind: str, keys: Iterable[Key], manager: StatePersistenceManager
) -> list[DocumentEntry | None]:
    return await asyncio.gather(*(_read(kind, key, manager) for key in keys))


async def _read(kind: str, key: Key, manager: StatePersistenceManager) -> DocumentEntry | None:
    try:
        document = await manager.store.get(kind, key)
        if document is None:
            return None
        return entry_of(kind, key, manager.serializer.loads(document.body))
    except (ErasedKeyError, StateCorruptedError, UnmergedStateError):
        return None


def entry_of(kind: str, key: Key, body: Mapping[str, Any]) -> DocumentEntry:
    """The facts of a document that its list is ordered, filtered and counted by."""
    status, name, text, due = str(body.get("status", "")), "", "", None
    created = body.get("created_at")
    if kind == "tasks":
        status = meaning_of(status or "pending")
        name, text = str(body.get("name", "")), str(body.get("error") or "")
        due = body.get("not_before") or created
    elif kind == "mail":
        created = body.get("timestamp")
        status = meaning_of(status or "unread")
        name, text = str(body.get("from_agent", "")), str(body.get("subject", ""))
    elif kind == "agents":
        status = meaning_of(status or "idle")
        name, text = str(body.get("agent_type") or ""), str(body.get("agent_name") or "")
    elif kind == "sleep":
        status = "sleeping" if body.get("is_sleeping", True) else "awake"
        text, due = str(body.get("reason") or ""), body.get("sleep_until")
    elif kind == "sessions":
        name, due = str(body.get("user_id") or ""), body.get("expires_at")
        created = body.get("last_activity") or created
    time = created if isinstance(created, (str, int, float)) else None
    shown, end = None if time is None else str(time), sort_text(due)
    first = (end or _LAST) if kind == "sleep" else sort_text(time)
    order = key if kind == "agents" else (first, *key)
    return DocumentEntry(key, order, status, name, text, shown, end)


async def load_entries(
    manager: StatePersistenceManager, index: DocumentIndex, entries: list[DocumentEntry]
) -> tuple[list[Any], list[str]]:
    """The documents of a page, and the ids of those that cannot be read."""
    found, unusable = [], []
    for entry in entries:
        try:
            state = await manager.load(index.kind, entry.key)
        except (ErasedKeyError, SchemaTooNewError, StateCorruptedError, UnmergedStateError):
            unusable.append("/".join(entry.key))
            continue
        if state is not None:
            found.append(state)
            continue
        index.waiting.add(entry.key)  # it is gone, or in quarantine by now
        if entry.status == DAMAGED:
            unusable.append("/".join(entry.key))
    return found, unusable
