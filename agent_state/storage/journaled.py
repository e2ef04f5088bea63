"""The exclusive store: journal first, files just after.

One process owns the directory. Saves of all its tasks are collected and committed together
(one write, one fdatasync), then everyone is told; the JSON files follow within about 50 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from agent_state.clock import Clock
from agent_state.errors import AgentStateError, Key, StateCorruptedError
from agent_state.protocols import Append, Change, Document, Incident, LogRecord, Notice
from agent_state.storage import intents, journal, locks, paths
from agent_state.storage.directory import JOURNAL, Stored
from agent_state.storage.files import LOCK_SECONDS, FileStateStore
from agent_state.storage.group_commit import GroupCommit
from agent_state.storage.journal import Journal
from agent_state.storage.planning import notice_of, plan
from agent_state.storage.records import AppendDone, Done, PutDone, encode_record
from agent_state.storage.settling import Accept, Place, Settler, recover, settle

SETTLE_SECONDS = 0.05
IDLE_SECONDS = 1.0
CLEAN_BYTES = 64 * 1024 * 1024
_CLEAN_MAX = 200_000
_RETRY_SECONDS = 1.0
_SETTLE_BATCH = 64

_logger = logging.getLogger("agent_state.storage")


class JournaledStateStore(FileStateStore):
    """Documents and logs of which this process is the only writer.

    Takes what ``FileStateStore`` takes. ``accept`` raises an ``AgentStateError`` for a document
    that a person wrote and that must not be used. Raises ``StateDirectoryInUse`` at ``open``
    while another process owns the directory or writes to it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        durability: str = "fsync",
        clock: Clock | None = None,
        lock_timeout: float = LOCK_SECONDS,
        accept: Accept | None = None,
        segment_bytes: int = journal.SEGMENT_BYTES,
    ) -> None:
        super().__init__(root, durability=durability, clock=clock, lock_timeout=lock_timeout)
        self._durable = durability == "fsync"
        self._directory.sync = False  # the journal makes each change durable, not the file
        self._settler = Settler(self._directory, durable=self._durable, accept=accept)
        self._folder = f"{self.root}/{JOURNAL}"
        self._segment_bytes = segment_bytes
        self._commits: GroupCommit | None = None
        # A version of a document is, one after the other: pending (on its way to the journal),
        # unsettled (durable, its file not yet written), clean (as its file is).
        self._pending: dict[Place, Done] = {}
        self._unsettled: dict[Place, Done] = {}
        self._records: dict[Place, list[LogRecord]] = {}
        self._clean: OrderedDict[Place, PutDone | None] = OrderedDict()
        self._clean_bytes = 0
        self._ends: dict[Place, int] = {}
        self._ids: dict[Place, dict[str, int]] = {}
        self._floors: dict[Place, int] = {}
        self._settling: asyncio.Task[None] | None = None
        self._settle_lock = asyncio.Lock()
        self._stirred = asyncio.Event()

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._pool is None:
            await super().open()
            self._commits = GroupCommit(
                Journal(self._folder, sync=self._durable),
                durable=self._became_durable,
                failed=self._failed,
                vouched=self._vouched,
            )
            self._settling = asyncio.create_task(self._settle_forever(), name="agent-state-settle")

    async def close(self) -> None:
        commits, self._commits = self._commits, None
        if commits is None:
            return
        if self._settling is not None:
            task, self._settling = self._settling, None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        try:
            await commits.close()
            await self._checkpoint(journal.segments(self._folder))
        finally:
            await super().close()

    def _open(self) -> None:
        self._directory.prepare()
        self._membership = locks.own_directory(self._locks)
        try:
            recover(self._directory, self._settler, self._timeout)
            self._directory.remove_temporaries(all_of_them=True)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        self._settler.unsynced.close()
        if self._membership is not None:
            self._membership.release()
            self._membership = None

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        change = self._unsettled.get((kind, key))
        if change is not None:
            return change.document if isinstance(change, PutDone) else None
        paths.relative(kind, key, paths.DOCUMENT)
        stored = await self._running().run(partial(self._read, kind, key))
        change = self._unsettled.get((kind, key))  # saved while the file was read
        if change is not None:
            return change.document if isinstance(change, PutDone) else None
        self._learn_clean((kind, key), stored)
        return stored.document if stored else None

    def _get(self, kind: str, key: Key) -> Document | None:
        stored = self._read(kind, key)
        return stored.document if stored else None

    def _learn_clean(self, place: Place, stored: Stored | None) -> None:
        """What a reader has seen is what the next save of it builds on."""
        if place in self._pending:
            return
        known = self._clean.get(place)
        if place not in self._clean or (known and known.document) != (stored and stored.document):
            self._keep_clean(place, stored and PutDone(stored.document, stored.meta))

    def _read(self, kind: str, key: Key) -> Stored | None:
        """The document as its file is; a damaged one is put aside and the last good one written."""
        place = (kind, key)
        path = self._directory.path(kind, key)
        try:
            stored = self._directory.read(kind, key)
        except StateCorruptedError as error:
            good = self._clean.get(place)
            if good is None:
                stored = self._directory.contain(kind, key, error.message)
                if stored is None:
                    raise
                return stored
            kept = self._directory.aside.move(path, error.message, kind, key)
            self._directory.incidents.append(
                Incident(error.message, kind, key, self._directory.relative(path), kept, True)
            )
            stamp = self._directory.write(good.document, good.meta)
            return Stored(good.document, good.meta, stamp)
        if stored is not None:
            self._directory.note_seen(path, stored.stamp)
        return stored

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        found = set(await super().keys(kind, prefix))
        for (other, key), change in self._unsettled.items():
            if other == kind and key[: len(prefix)] == prefix:
                if isinstance(change, PutDone):
                    found.add(key)
                else:
                    found.discard(key)
        return sorted(found)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        found = set(await super().logs(kind, prefix))
        found.update(key for k, key in self._records if k == kind and key[: len(prefix)] == prefix)
        return sorted(found)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        keys = await self.keys(kind, prefix)
        for start in range(0, len(keys), 256):
            batch = keys[start : start + 256]
            filed = [key for key in batch if (kind, key) not in self._unsettled]
            loaded = await self._running().run(partial(self._load, kind, filed))
            found = {document.key: document for document in loaded}
            for key in batch:
                change = self._unsettled.get((kind, key))
                if change is None and key in found:
                    yield found[key]
                elif isinstance(change, PutDone):
                    yield change.document

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        waiting = list(self._records.get((kind, key), ()))
        if last is not None and waiting:
            after = max(after, waiting[-1].seq - last)
            last = None
        async for record in super().read_log(kind, key, after=after, last=last):
            after = record.seq
            yield record
        for record in waiting:
            if record.seq > after:
                yield record

    # -- writing: to the journal -----------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if self._gates:
            names = [intents.lock_name(change.kind, change.key) for change in changes]
            if any(self._gates.closed_to_me(name) for name in names):
                async with self._gates.passing(names):
                    return await self._commit_now(changes)
        return await self._commit_now(changes)

    async def _commit_now(self, changes: Sequence[Change]) -> list[int]:
        unknown = [change for change in changes if not self._knows(change)]
        if unknown:
            await self._learn(unknown)
        commits = self._commits
        if commits is None:
            raise AgentStateError("the store is not open", path=self.root)
        # From here to the queue nothing awaits: what was planned on is what is committed on.
        numbers, done = plan(changes, self, self._now())
        if done:
            record = encode_record(done)
            for change in done:
                self._expect(change)
            await commits.submit(record, done)
        elif any((change.kind, change.key) in self._pending for change in changes):
            await commits.submit(b"", ())  # unchanged, but not durable yet
        return numbers

    def _knows(self, change: Change) -> bool:
        place = (change.kind, change.key)
        if isinstance(change, Append):
            return place in self._ends and (change.dedupe_id is None or place in self._ids)
        return place in self._unsettled or place in self._clean or place in self._pending

    async def _learn(self, changes: Iterable[Change]) -> None:
        """Read what the plan needs to know and memory does not hold."""
        documents = {(c.kind, c.key) for c in changes if not isinstance(c, Append)}
        appends = {(c.kind, c.key): False for c in changes if isinstance(c, Append)}
        for change in changes:
            if isinstance(change, Append) and change.dedupe_id is not None:
                appends[change.kind, change.key] = True

        def look() -> None:
            for place in documents:
                try:
                    stored = self._read(*place)
                except StateCorruptedError:
                    stored = None  # contained, and told in incidents()
                found[place] = stored
            for place, with_ids in appends.items():
                log = self._directory.log(*place)
                ends[place] = log.tail().seq
                if with_ids:
                    ids[place] = dict(log.ids())

        found: dict[Place, Stored | None] = {}
        ends: dict[Place, int] = {}
        ids: dict[Place, dict[str, int]] = {}
        await self._running().run(look)
        for place, stored in found.items():
            if place not in self._unsettled:
                self._learn_clean(place, stored)
        for place, seq in ends.items():
            self._ends.setdefault(place, seq)
        for place, known in ids.items():
            if place not in self._ids:
                waiting = self._records.get(place, ())
                known.update((r.dedupe_id, r.seq) for r in waiting if r.dedupe_id is not None)
                self._ids[place] = known

    def current(self, kind: str, key: Key) -> PutDone | None:
        place = (kind, key)
        change = self._pending.get(place) or self._unsettled.get(place) or self._clean.get(place)
        return change if isinstance(change, PutDone) else None

    def floor(self, kind: str, key: Key) -> int:
        return self._floors.get((kind, key), 0)

    def last_seq(self, kind: str, key: Key) -> int:
        return self._ends[kind, key]

    def find(self, kind: str, key: Key, dedupe_id: str) -> int | None:
        return self._ids[kind, key].get(dedupe_id)

    def _expect(self, change: Done) -> None:
        if isinstance(change, AppendDone):
            place, record = (change.kind, change.key), change.record
            self._ends[place] = record.seq
            if record.dedupe_id is not None:
                self._ids[place][record.dedupe_id] = record.seq
        else:
            self._pending[intents.place_of(change)] = change

    def _became_durable(self, done: Sequence[Done]) -> None:
        for change in done:
            place = intents.place_of(change)
            if isinstance(change, AppendDone):
                self._records.setdefault(place, []).append(change.record)
                continue
            if self._pending.get(place) is change:
                del self._pending[place]
            self._unsettled[place] = change
            self._watching.tell(notice_of(change))
        self._stirred.set()

    def _failed(self, done: Sequence[Done]) -> None:
        """Forget what was planned. Its numbers may be on the disk and are never given again."""
        for change in done:
            place = intents.place_of(change)
            if isinstance(change, PutDone):
                self._floors[place] = change.document.revision
            elif isinstance(change, AppendDone) and change.record.dedupe_id is not None:
                self._ids[place].pop(change.record.dedupe_id, None)
            self._pending.pop(place, None)

    def _vouched(self) -> bytes:
        changes: list[Done] = list(self._unsettled.values())
        for (kind, key), waiting in self._records.items():
            changes.extend(AppendDone(kind, key, record) for record in waiting)
        return b"".join(encode_record([change]) for change in changes)

    def _keep_clean(self, place: Place, version: PutDone | None) -> None:
        self._drop_clean(place)
        self._clean[place] = version
        if version is not None:
            self._clean_bytes += len(version.document.body)
        while self._clean_bytes > CLEAN_BYTES or len(self._clean) > _CLEAN_MAX:
            self._drop_clean(next(iter(self._clean)))

    def _drop_clean(self, place: Place) -> None:
        dropped = self._clean.pop(place, None)
        if dropped is not None:
            self._clean_bytes -= len(dropped.document.body)

    # -- settling: from the journal to the files -------------------------------------------

    async def flush(self) -> None:
        if self._commits is not None:
            await self._checkpoint(await self._commits.seal())

    async def _settle_forever(self) -> None:
        pause = SETTLE_SECONDS
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._stirred.wait()
            except TimeoutError:
                pass
            idle = not self._stirred.is_set()
            self._stirred.clear()
            await asyncio.sleep(0 if idle else pause)
            commits = self._commits
            if commits is None:
                return
            try:
                await self._settle_all()
                if commits.journal.size > (0 if idle else self._segment_bytes):
                    await self._checkpoint(await commits.seal())
                pause = SETTLE_SECONDS
            except AgentStateError as error:
                # The journal holds everything; the files follow when the disk allows it again.
                _logger.warning("files could not be brought up to date: %s", error)
                pause = _RETRY_SECONDS
                self._stirred.set()

    async def _checkpoint(self, sealed: list[str]) -> None:
        """Bring all that the sealed segments hold to durable files, and remove them."""
        await self._settle_all()
        await self._running().run(partial(self._sync_and_remove, sealed))

    def _sync_and_remove(self, sealed: list[str]) -> None:
        self._settler.rewrite_doubtful()
        self._settler.sync()
        journal.remove_segments(sealed, self._folder, sync=self._durable)

    async def _settle_all(self) -> None:
        async with self._settle_lock:
            changes = list(self._unsettled.values())
            for start in range(0, len(changes), _SETTLE_BATCH):
                batch = changes[start : start + _SETTLE_BATCH]
                won = await self._running().run(partial(settle, self._settler, batch))
                for change in batch:
                    self._became_clean(change, won.get(intents.place_of(change)))
            for place, waiting in list(self._records.items()):
                records = list(waiting)
                await self._running().run(partial(self._settler.append, place, records))
                del waiting[: len(records)]
                if not waiting:
                    del self._records[place]

    def _became_clean(self, change: Done, won: Stored | None) -> None:
        place = intents.place_of(change)
        if self._unsettled.get(place) is not change:
            return  # saved again meanwhile; that version is settled next
        del self._unsettled[place]
        if won is not None:
            self._keep_clean(place, PutDone(won.document, won.meta))
            self._watching.tell(Notice(*place, won.document.revision, outside=True))
        else:
            self._keep_clean(place, change if isinstance(change, PutDone) else None)

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        self._running()
        async with self._gates.passing([intents.lock_name(kind, key)]):
            yield

    async def quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        place = (kind, key)
        async with self._gates.passing([intents.lock_name(kind, key)]), self._settle_lock:
            if place in self._unsettled or place in self._pending:
                return await self.get(kind, key)
            stored = await self._running().run(partial(self._directory.contain, kind, key, reason))
            self._keep_clean(place, stored and PutDone(stored.document, stored.meta))
            return stored.document if stored else None
