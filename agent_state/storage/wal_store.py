"""The exclusive store: journal first, files just after.

One process owns the directory. Saves of all its tasks are collected and committed together
(one write, one fdatasync), then everyone is told; the JSON files follow within about 50 ms.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from agent_state.clock import Clock
from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    StateCorruptedError,
    StorageError,
)
from agent_state.protocols import Append, Change, Document, DocumentId, LogRecord, Notice
from agent_state.storage import locks, paths, redo, wal
from agent_state.storage.changes import ResolvedChange, ResolvedPut, encode_changes, notice_of, plan
from agent_state.storage.checkpoint import (
    Accept,
    Checkpointer,
    CheckpointScheduler,
    recover,
)
from agent_state.storage.directory import StateDirectory, StoredDocument, erase
from agent_state.storage.executor import shielded
from agent_state.storage.file_store import LOCK_SECONDS, FileStateStore
from agent_state.storage.memtable import MemTable, lay_over
from agent_state.storage.tree import is_forbidden
from agent_state.storage.wal import GroupCommit, WriteAheadLog

_SCAN_BATCH = 256


class WALStateStore(FileStateStore):
    """Documents and logs of which this process is the only writer.

    Takes what ``FileStateStore`` takes. ``accept`` raises an ``AgentStateError`` for a document
    that a person wrote and that must not be used. Raises ``StateDirectoryInUseError`` at ``open``
    while another process owns the directory or writes to it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        durability: str = "fsync",
        clock: Clock | None = None,
        lock_timeout_seconds: float = LOCK_SECONDS,
        accept: Accept | None = None,
        segment_bytes: int = wal.SEGMENT_BYTES,
    ) -> None:
        super().__init__(
            root, durability=durability, clock=clock, lock_timeout_seconds=lock_timeout_seconds
        )
        self._durable = durability == "fsync"
        self._directory.sync = False  # the journal makes each change durable, not the file
        self._settler = Checkpointer(self._directory, durable=self._durable, accept=accept)
        self._segment_bytes = segment_bytes
        self._commits: GroupCommit | None = None
        self._versions = MemTable()
        self._checkpoints: CheckpointScheduler | None = None
        self._learning: dict[DocumentId, asyncio.Future[None]] = {}

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._pool is None:
            self._versions = MemTable()  # while it was closed, anybody could write
            await super().open()
            self._commits = GroupCommit(
                WriteAheadLog(self._settler.journal, sync=self._durable),
                durable=self._became_durable,
                failed=self._versions.failed,
                unflushed_records=self._versions.unflushed_records,
            )
            self._checkpoints = CheckpointScheduler(
                self._settler,
                self._versions,
                self._commits,
                self._running().run,
                segment_bytes=self._segment_bytes,
                edited=self._tell_of_edit,
            )
            self._checkpoints.start()

    async def close(self) -> None:
        commits, self._commits = self._commits, None
        if commits is not None:
            await shielded(self._end_journal(commits))

    async def _end_journal(self, commits: GroupCommit) -> None:
        checkpoints = self._writing()
        try:
            await checkpoints.stop()
        finally:
            try:
                await commits.close()
                async with checkpoints.lock:
                    listing = partial(wal.segments, self._settler.journal)
                    await checkpoints.checkpoint(await self._running().run(listing))
            finally:
                await self._end()

    def _writing(self) -> CheckpointScheduler:
        if self._checkpoints is None:
            raise AgentStateError("the store is not open", path=self.root)
        return self._checkpoints

    def _open(self) -> None:
        self._directory.prepare()
        self._membership = locks.acquire_exclusive(self._locks)
        try:
            recover(self._directory, self._settler)
            self._directory.remove_temporaries()
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
        place = (kind, key)
        change = self._versions.dirty.get(place)
        if change is None:
            paths.relative(kind, key, paths.DOCUMENT)
            found = (await self._look([place]))[place]
            if isinstance(found, StateCorruptedError):
                raise found
            change = self._versions.dirty.get(place) or found
        return change.document if isinstance(change, ResolvedPut) else None

    async def _look(self, places: Sequence[DocumentId]) -> dict[DocumentId, Found]:
        """What the files of these places hold; a damaged one is put aside and mended."""
        with self._versions.pinned(places):
            before = {place: self._versions.clean(place) for place in places}
            read = await self._running().run(partial(read_files, self._directory, places))
            seen: dict[DocumentId, Found] = {}
            for place, stored in read.items():
                if isinstance(stored, StateCorruptedError):
                    seen[place] = await self._repair(place, stored)
                    continue
                version = stored and ResolvedPut(stored.document, stored.meta)
                seen[place] = version
                news = self._versions.learn(place, version, before[place])
                if news and stored is not None:
                    self._directory.mark_seen(self._directory.path(*place), stored.stamp)
        return seen

    async def _look_at_all(self, places: Sequence[DocumentId]) -> dict[DocumentId, Found]:
        """``_look``, leaving out what we may not read."""
        try:
            return await self._look(places)
        except StorageError as error:
            if not is_forbidden(error):
                raise
        seen: dict[DocumentId, Found] = {}
        for place in places:
            try:
                seen.update(await self._look([place]))
            except StorageError as error:
                if not is_forbidden(error):
                    raise
                self._directory.report_forbidden(*place, error)
                seen[place] = None
        return seen

    async def _repair(self, place: DocumentId, found: StateCorruptedError) -> Found:
        """Put a damaged file aside and write the last good version, while nothing is settled."""
        async with self._writing().lock:
            if place in self._versions.dirty:
                return self._versions.current(
                    *place
                )  # the checkpointer will find the damage itself
            good = self._versions.clean(place)
            mended = await self._running().run(
                partial(repair_file, self._directory, place, good, found)
            )
            if not isinstance(mended, StateCorruptedError):
                self._versions.keep(place, mended)
            else:
                self._versions.keep(place, None)
            return mended

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        # Once before and once after: what is settled meanwhile may be in neither listing.
        waiting = dict(self._versions.dirty)
        found = set(await super().keys(kind, prefix))
        lay_over(found, waiting, kind, prefix)
        lay_over(found, self._versions.dirty, kind, prefix)
        return sorted(found)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        waiting = self._versions.logs(kind, prefix)
        found = await super().logs(kind, prefix)
        return sorted({*found, *waiting, *self._versions.logs(kind, prefix)})

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        unsettled = self._versions.dirty
        keys = await self.keys(kind, prefix)
        for start in range(0, len(keys), _SCAN_BATCH):
            places = [(kind, key) for key in keys[start : start + _SCAN_BATCH]]
            found: dict[DocumentId, ResolvedChange | StateCorruptedError | None] = {
                place: unsettled[place] for place in places if place in unsettled
            }
            filed = [place for place in places if place not in found]
            found.update(await self._look_at_all(filed))
            for place in places:
                change = unsettled.get(place) or found[place]
                if isinstance(change, ResolvedPut):
                    yield change.document

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        waiting = list(self._versions.records.get((kind, key), ()))
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

    async def _commit(self, changes: Sequence[Change]) -> list[int]:
        if self._gates and self._closed_to_me(changes):
            names = [redo.lock_name(change.kind, change.key) for change in changes]
            async with self._gates.hold(names):
                return await self._commit_now(changes)
        return await self._commit_now(changes)

    def _closed_to_me(self, changes: Sequence[Change]) -> bool:
        """Whether another task holds a lock of what is to be changed."""
        names = (redo.lock_name(change.kind, change.key) for change in changes)
        return any(self._gates.held_by_other(name) for name in names)

    async def _commit_now(self, changes: Sequence[Change]) -> list[int]:
        versions = self._versions
        while True:
            if not all(map(versions.knows, changes)):
                await self._know(changes)
            commits = self._commits
            if commits is None:
                raise AgentStateError("the store is not open", path=self.root)
            if self._gates and self._closed_to_me(changes):  # since we began
                return await self._commit(changes)
            # Since they were known nothing has awaited, and until the queue nothing does: what is
            # planned on is what is committed on.
            try:
                numbers, done = plan(changes, versions, self._now())
            except RevisionConflictError as conflict:
                if (conflict.kind, conflict.key) in versions.in_flight:
                    # Readers see it only then; a caller that tries again at once would starve it.
                    await commits.submit(b"", ())
                raise
            if not versions.maybe_unsynced(changes, done):
                break
            with versions.pinned([(change.kind, change.key) for change in changes]):
                async with self._writing().lock:
                    if unsure := versions.maybe_unsynced(
                        changes, done
                    ):  # and nobody has come before us
                        await self._running().run(
                            partial(self._directory.ensure_all_synced, unsure)
                        )
                        versions.mark_synced(unsure)
        if done:
            record = encode_changes(done)
            versions.expect(done)
            await commits.submit(record, done)
        elif any((change.kind, change.key) in versions.in_flight for change in changes):
            await commits.submit(b"", ())  # unchanged, but not durable yet
        return numbers

    async def _know(self, changes: Sequence[Change]) -> None:
        """See to it that the changes can be planned, until the next await."""
        with self._versions.pinned([(change.kind, change.key) for change in changes]):
            while unknown := [each for each in changes if not self._versions.knows(each)]:
                await self._learn(unknown)

    async def _learn(self, changes: Sequence[Change]) -> None:
        """Read what the plan needs to know and memory does not hold.

        One reader a place: those who come meanwhile wait, and go on in the order they came.
        """
        places = sorted({(change.kind, change.key) for change in changes})
        if others := [self._learning[place] for place in places if place in self._learning]:
            await asyncio.wait(others)
            return
        learned = asyncio.get_running_loop().create_future()
        self._learning.update(dict.fromkeys(places, learned))
        try:
            documents = {(c.kind, c.key) for c in changes if not isinstance(c, Append)}
            if documents:
                await self._look(sorted(documents))
            appends = [change for change in changes if isinstance(change, Append)]
            if appends:
                ends, ids = await self._running().run(partial(log_ends, self._directory, appends))
                for place, end in ends.items():
                    self._versions.learn_log(place, end, ids.get(place))
        finally:
            for place in places:
                del self._learning[place]
            learned.set_result(None)

    def _became_durable(self, done: Sequence[ResolvedChange]) -> None:
        self._versions.became_durable(done)
        if self._watching.has_listeners:
            for change in done:
                self._watching.tell(notice_of(change))
        self._writing().stir()

    # -- the files: they follow the journal ------------------------------------------------

    async def flush(self) -> None:
        checkpoints = self._checkpoints
        if checkpoints is not None:
            async with checkpoints.lock:
                if self._commits is not None:
                    await checkpoints.checkpoint()

    def _tell_of_edit(self, document: Document) -> None:
        self._watching.tell(Notice(document.kind, document.key, document.revision, outside=True))

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        self._running()
        async with self._gates.hold([redo.lock_name(kind, key)]):
            yield

    async def _erase(self, kind: str, key: Key, name: str) -> tuple[list[Key], int]:
        """Once everything is settled, so that no journal has it any more."""
        commits = self._commits
        if commits is None:
            raise AgentStateError("the store is not open", path=self.root)
        await commits.submit(b"", ())
        async with self._writing().lock:
            await self._writing().checkpoint()
            known = self._versions.below(kind, key)
            erased = await self._running().run(
                partial(erase, self._directory, kind, key, durable=self._durable)
            )
            self._versions.erased([*known, *((kind, gone) for gone in erased[0])])
        return erased

    async def _quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        place = (kind, key)
        async with self._gates.hold([redo.lock_name(kind, key)]):
            async with self._writing().lock:
                if place not in self._versions.dirty and place not in self._versions.in_flight:
                    contain = partial(self._directory.quarantine_and_restore, kind, key, reason)
                    stored = await self._running().run(contain)
                    self._versions.keep(place, stored and ResolvedPut(stored.document, stored.meta))
                    return stored.document if stored else None
            return await self.get(kind, key)


Found = ResolvedPut | StateCorruptedError | None
"""What the file of a document was found to hold."""


def read_files(
    directory: StateDirectory, places: Iterable[DocumentId]
) -> dict[DocumentId, StoredDocument | StateCorruptedError | None]:
    """The files of these places, each as it is; a damaged one is left where it is."""
    found: dict[DocumentId, StoredDocument | StateCorruptedError | None] = {}
    verified_dirs: set[str] = set()
    for place in places:
        try:
            found[place] = directory.read(*place, verified_dirs=verified_dirs)
        except StateCorruptedError as error:
            found[place] = error
    return found


def repair_file(
    directory: StateDirectory, place: DocumentId, good: object, found: StateCorruptedError
) -> Found:
    """Look again; put a file that is still damaged aside, and write the last good version.

    ``good`` is that version, if it is known here; else a snapshot may have one.
    """
    try:
        stored = directory.read(*place)
    except StateCorruptedError as error:
        if isinstance(good, ResolvedPut):
            directory.put_aside(*place, error.message, restored=True)
            directory.write(good.document, good.meta)
            directory.ensure_synced(*place)  # no journal has this version any more
            return good
        stored = directory.quarantine_and_restore(*place, error.message)
        if stored is None:
            return found
    return stored and ResolvedPut(stored.document, stored.meta)


def log_ends(
    directory: StateDirectory, appends: Iterable[Append]
) -> tuple[dict[DocumentId, int], dict[DocumentId, dict[str, int]]]:
    """The last number of each log, and its dedupe ids where one of the records has such an id."""
    last, ids = {}, {}
    for change in appends:
        place = (change.kind, change.key)
        log = directory.log(*place)
        last[place] = log.tail().seq
        if change.dedupe_key is not None and place not in ids:
            ids[place] = dict(log.ids())
    return last, ids
