"""Looking at a state directory that may belong to a running server, or to a dead one.

Takes no lock, changes nothing, and sees what recovery would bring: the journal is laid over
the files.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from agent_state.clock import Clock
from agent_state.errors import (
    AgentStateError,
    Key,
    StateCorruptedError,
    StateNotFoundError,
)
from agent_state.protocols import Change, Document, DocumentId, Incident, LogRecord
from agent_state.storage import locks, paths, redo, wal
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    id_of,
)
from agent_state.storage.directory import JOURNAL, StateDirectory
from agent_state.storage.file_store import FileStateStore

T = TypeVar("T")


class ReadOnlyStateStore(FileStateStore):
    """The documents and logs of a directory, as they would be after a restart.

    Raises ``StateNotFoundError`` at ``open`` when there is no such directory, and
    ``AgentStateError`` for every change.
    """

    def __init__(self, root: str | os.PathLike[str], *, clock: Clock | None = None) -> None:
        super().__init__(root, clock=clock)
        self._newer: dict[DocumentId, ResolvedPut | ResolvedDelete] = {}
        self._deleted: dict[DocumentId, int] = {}
        self._damaged: dict[DocumentId, str] = {}
        self._more: dict[DocumentId, list[LogRecord]] = {}

    def _open(self) -> None:
        if not os.path.isdir(self.root):
            raise StateNotFoundError("there is no such state directory", path=self.root)
        for path in wal.segments(f"{self.root}/{JOURNAL}"):
            try:
                segment = wal.read_segment(path)
            except StateCorruptedError as error:
                self._note(Incident(error.message, path=self._directory.relative(path)))
                continue
            for record in segment.records:
                self._lay_over(record)
            if segment.damaged:
                what = f"{segment.damaged} damaged records in the journal"
                self._note(Incident(what, path=self._directory.relative(path)))
        for intent in redo.recorded(self._directory):
            self._lay_over(intent.done)
            if intent.damage:
                what = f"an intent was damaged: {intent.damage}"
                self._note(Incident(what, path=self._directory.relative(intent.path)))

    def _lay_over(self, record: Iterable[ResolvedChange]) -> None:
        for change in record:
            place = id_of(change)
            last = self._newer.get(place)
            if isinstance(change, ResolvedAppend):
                self._lay_after(self._more.setdefault(place, []), change.record)
            elif isinstance(change, ResolvedDelete):
                self._newer[place] = change
                self._deleted[place] = max(change.revision, self._deleted.get(place, 0))
            elif (
                not isinstance(last, ResolvedPut)
                or last.document.revision < change.document.revision
            ):
                self._newer[place] = change

    def _lay_after(self, records: list[LogRecord], record: LogRecord) -> None:
        """Add a record where its number belongs; two segments may both say it."""
        at = bisect_left(records, record.seq, key=lambda other: other.seq)
        if at == len(records) or records[at].seq != record.seq:
            records.insert(at, record)

    def owner(self) -> int | None:
        """The pid of the process that owns the directory; None when nobody does."""
        return locks.owner_of(self._locks)

    async def look(self, work: Callable[[StateDirectory], T]) -> T:
        """Do work that only reads, in a thread of the store's own."""
        return await self._running().run(partial(work, self._directory))

    async def kinds(self) -> list[str]:
        """The kinds that have a folder, or will have one when the journal is settled."""
        filed = await self.look(StateDirectory.kinds)
        return sorted({*filed, *(kind for kind, _ in self._newer), *(k for k, _ in self._more)})

    def damage(self, kind: str, key: Key) -> str | None:
        """What is wrong with the file of a document that was read; None when nothing is."""
        return self._damaged.get((kind, key))

    def _get(self, kind: str, key: Key) -> Document | None:
        newer = self._newer.get((kind, key))
        try:
            stored = self._directory.read(kind, key)
        except StateCorruptedError as error:
            self._damaged[kind, key] = error.message
            self._note(Incident(error.message, kind, key, error.path and self._relative(error)))
            if isinstance(newer, ResolvedPut):
                return newer.document
            raise
        document = stored.document if stored else None
        if isinstance(newer, ResolvedDelete):
            return None if document is None or document.revision <= newer.revision else document
        if newer is not None:
            revision = document.revision if document is not None else 0
            # A document deleted and made anew counts its revisions from 1 again.
            reborn = revision <= self._deleted.get((kind, key), 0)
            if revision < newer.document.revision or reborn:
                return newer.document
        return document

    async def get_each(
        self, kind: str, keys: Sequence[Key]
    ) -> list[Document | AgentStateError | None]:
        """``get`` for many in one thread; an error stands in its document's place."""
        return await self._running().run(lambda: [self._get_or_error(kind, key) for key in keys])

    def _get_or_error(self, kind: str, key: Key) -> Document | AgentStateError | None:
        try:
            return self._get(kind, key)
        except AgentStateError as error:
            return error

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        found = set(await super().keys(kind, prefix))
        for (other, key), change in self._newer.items():
            if other == kind and paths.is_below(key, prefix):
                if isinstance(change, ResolvedPut):
                    found.add(key)
                else:
                    found.discard(key)
        return sorted(found)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        found = set(await super().logs(kind, prefix))
        found.update(key for k, key in self._more if k == kind and paths.is_below(key, prefix))
        return sorted(found)

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        more = self._more.get((kind, key), [])
        if last is not None and more:
            after, last = max(after, more[-1].seq - last), None
        async for record in super().read_log(kind, key, after=after, last=last):
            after = record.seq
            yield record
        for record in more:
            if record.seq > after:
                after = record.seq
                yield record

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        raise AgentStateError("the store was opened for reading only", path=self.root)

    async def erase(self, kind: str, key: Key) -> int:
        raise AgentStateError("the store was opened for reading only", kind=kind, key=key)

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        raise AgentStateError("the store was opened for reading only", kind=kind, key=key)
        yield

    async def quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        """Only notes the incident; the file stays where it is."""
        self._note(
            Incident(reason, kind, key, self._directory.relative(self._directory.path(kind, key)))
        )
        return None

    def _note(self, incident: Incident) -> None:
        if incident not in self._directory.incidents:
            self._directory.incidents.append(incident)

    def _relative(self, error: AgentStateError) -> str | None:
        return self._directory.relative(error.path) if error.path else None
