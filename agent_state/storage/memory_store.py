"""The store without a disk, for tests that are about something else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from agent_state.clock import Clock, SystemClock
from agent_state.errors import AgentStateError, Key
from agent_state.protocols import Change, Document, DocumentId, Incident, LogRecord, Notice, Origin
from agent_state.storage import paths
from agent_state.storage.changes import ResolvedAppend, ResolvedPut, notice_of, resolve
from agent_state.storage.document_locks import lock_of, locks_of
from agent_state.storage.locks import TaskLocks
from agent_state.storage.watch import Broadcast, Subscription


class MemoryStateStore:
    """Documents and logs in this process; nothing survives it."""

    def __init__(self, *, clock: Clock | None = None, lock_timeout_seconds: float = 10.0) -> None:
        self._clock: Clock = clock or SystemClock()
        self._documents: dict[DocumentId, ResolvedPut] = {}
        self._logs: dict[DocumentId, list[LogRecord]] = {}
        self._incidents: list[Incident] = []
        self._task_locks = TaskLocks(lock_timeout_seconds)
        self._broadcast = Broadcast()
        self._closed = False

    async def open(self) -> None:
        """Nothing to make ready; it need not be called before the first ``close``."""
        self._closed = False

    async def close(self) -> None:
        """Ends subscriptions; the documents stay for the next ``open``."""
        self._closed = True
        self._broadcast.end()

    async def get(self, kind: str, key: Key) -> Document | None:
        paths.relative(kind, key, paths.DOCUMENT)
        version = self._documents.get((kind, key))
        return version.document if version else None

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        for change in changes:
            paths.relative(change.kind, change.key, paths.DOCUMENT)
        places = [(change.kind, change.key) for change in changes]
        async with self._task_locks.hold(locks_of(places)):
            resolution = resolve(changes, places, self, self._clock)
            for made, place in zip(resolution.changes, resolution.places, strict=True):
                if isinstance(made, ResolvedPut):
                    self._documents[place] = made
                elif isinstance(made, ResolvedAppend):
                    self._logs.setdefault(place, []).append(made.record)
                else:
                    del self._documents[place]
                self._broadcast.notify(notice_of(made))
            return resolution.numbers

    def current(self, place: DocumentId) -> tuple[ResolvedPut | None, int]:
        return self._documents.get(place), 1

    def last_seq(self, place: DocumentId) -> int:
        return len(self._logs.get(place, ()))

    def end_name(self, _place: DocumentId) -> None:
        return None  # no other program has this store

    def find(self, place: DocumentId, dedupe_key: str) -> int | None:
        records = self._logs.get(place, ())
        return next((record.seq for record in records if record.dedupe_key == dedupe_key), None)

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return _below(self._documents, kind, prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return _below(self._logs, kind, prefix)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        for key in _below(self._documents, kind, prefix):
            version = self._documents.get((kind, key))
            if version is not None:
                yield version.document

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        paths.relative(kind, key, paths.LOG)
        records = list(self._logs.get((kind, key), ()))
        if last is not None:
            after = max(after, len(records) - last)
        for record in records[after:]:
            yield record

    async def watch(self) -> Subscription:
        if self._closed:
            raise AgentStateError("the store is not open")  # nobody would end it
        return self._broadcast.subscribe()

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        async with self._task_locks.hold(lock_of(kind, key)):
            yield

    async def flush(self) -> None:
        """Nothing is outstanding."""

    async def erase(self, kind: str, key: Key) -> int:
        async with self._task_locks.hold(lock_of(kind, key)):
            documents = [place for place in self._documents if _under(place, kind, key)]
            gone = [place for place in self._logs if _under(place, kind, key)]
            for place in gone:
                del self._logs[place]
            for place in documents:
                del self._documents[place]
                self._broadcast.notify(Notice(*place, None))
            return len(documents) + len(gone)

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        stored = await self.get(kind, key)
        if stored is None or (version is not None and stored != version):
            return stored
        del self._documents[kind, key]
        self._incidents.append(Incident(reason, kind, key))
        return None

    async def origin(self) -> Origin:
        return Origin(exclusive=True)

    def incidents(self) -> list[Incident]:
        return list(self._incidents)


def _below(places: Iterable[DocumentId], kind: str, prefix: Key) -> list[Key]:
    return sorted(key for k, key in places if k == kind and paths.is_below(key, prefix))


def _under(place: DocumentId, kind: str, key: Key) -> bool:
    return place[0] == kind and place[1][: len(key)] == key
