"""The exclusive store: write-ahead log first, files just after.

One process owns the directory. Saves of all its tasks are committed together (one write, one
fdatasync); the JSON files follow within about 50 ms.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import filterfalse, repeat
from operator import attrgetter

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import (
    AgentStateError,
    Key,
    LockTimeoutError,
    RevisionConflictError,
    StateCorruptedError,
    StorageError,
    UnmergedStateError,
    concerning,
)
from agent_state.metrics import JournalLag
from agent_state.protocols import (
    Append,
    Change,
    Check,
    Document,
    DocumentId,
    Incident,
    LogRecord,
    Notice,
    Origin,
)
from agent_state.storage import fileio, locks, paths, wal
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedPut,
    check_group,
    id_of,
    keys_over,
    notice_of,
    read_over,
    resolve,
)
from agent_state.storage.checkpoint import Accept, Checkpointer, CheckpointScheduler
from agent_state.storage.directory import ERASED_AT_ONCE, Erased, StateDirectory, erase
from agent_state.storage.document_locks import lock_of, locks_of
from agent_state.storage.executor import Batcher, shielded
from agent_state.storage.locks import TaskLocks
from agent_state.storage.memtable import FileId, MemTable
from agent_state.storage.reader import (
    SCAN_BATCH,
    FileReader,
    log_ends,
    read_documents,
    repair_document,
)
from agent_state.storage.tree import is_forbidden
from agent_state.storage.wal import GroupCommit, LogSave, WriteAheadLog
from agent_state.storage.watch import Subscription

LOCK_SECONDS = 10.0
_DOCUMENT_ID = attrgetter("kind", "key")


class _LogsChangedError(AgentStateError):
    """Others have added lines to these logs since their ends were learnt; nothing was written."""

    def __init__(self, places: Iterable[DocumentId]) -> None:
        super().__init__("others have added lines to a log")
        self.places = sorted(places)


Found = ResolvedPut | AgentStateError | None
"""The version in the file of a document, or why there is none; None for no file."""


class WALStateStore:
    """Documents and logs of which this process is the only writer.

    ``durability``: ``"fsync"`` survives power loss, ``"os"`` only the death of the process.
    ``lock_timeout_seconds``: how long a ``lock``, and a change under another task's, waits.
    ``accept`` raises an ``AgentStateError`` for a hand-edited document that must not be used.
    ``segment_bytes``: a longer segment of the log is written back and removed. Raises
    ``StateDirectoryInUseError`` at ``open`` while another process owns the directory or writes to
    it.
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
        if durability not in ("fsync", "os"):
            raise ValueError(f"durability is 'fsync' or 'os', not {durability!r}")
        self._clock: Clock = clock or SystemClock()
        self._durable = durability == "fsync"
        # The log makes each change durable, not the file.
        self._directory = StateDirectory(
            os.fspath(root), sync=False, now=self._now, durable=self._durable
        )
        self._directory.tree.renames = True
        self._reader = FileReader(self._directory)
        self._task_locks = TaskLocks(lock_timeout_seconds)
        self._checkpointer = Checkpointer(
            self._directory, durable=self._durable, accept=accept, stand=self._stand
        )
        self._segment_bytes = segment_bytes
        self._memtable = MemTable()
        self._commits: GroupCommit | None = None
        self._checkpoints: CheckpointScheduler | None = None
        self._erasures: Batcher[DocumentId, Erased] | None = None
        self._ownership: locks.Standing | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._learning: dict[DocumentId, asyncio.Future[None]] = {}
        """For each place the last commit that learns, or waits behind those that do."""

    @property
    def root(self) -> str:
        """The state directory, as an absolute path."""
        return self._directory.root

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._reader.is_open:
            return
        self._memtable = MemTable()  # while it was closed, any process could write
        try:
            await self._reader.open(self._open)
        except asyncio.CancelledError:
            await shielded(self._reader.close(self._release))  # by now it has been opened
            raise
        self._commits = GroupCommit(
            WriteAheadLog(
                self._directory.journal,
                sync=self._durable,
                in_place=self._in_place,
                prepare=self._make_folders,
            ),
            check=self._refuse_changed_logs,
            finished=self._finished,
            unflushed=self._memtable.unflushed,
        )
        self._checkpoints = CheckpointScheduler(
            self._checkpointer,
            self._memtable,
            self._commits,
            self._reader.run,
            segment_bytes=self._segment_bytes,
            edited=self._notify_of_edit,
        )
        self._checkpoints.start()
        self._erasures = Batcher(self._erase, max_items=ERASED_AT_ONCE)

    def _open(self) -> None:
        self._directory.prepare()
        self._directory.worktree.refresh()
        self._ownership = locks.acquire_exclusive(self._directory.locks)
        try:
            self._checkpointer.recover()
            self._directory.remove_leftovers()
        except BaseException:
            self._release()
            raise

    async def close(self) -> None:
        if self._reader.is_elsewhere:
            await self._reader.close_elsewhere(self.close, self._abandon)
            self._commits = self._erasures = None
            return
        if self._erasures is not None:
            await self._erasures.ended()
        commits, self._commits, self._erasures = self._commits, None, None
        if commits is not None:
            await shielded(self._close(commits))

    async def _close(self, commits: GroupCommit) -> None:
        """Finish the commits, write everything back, remove the log, release the directory."""
        checkpoints = self._writing()
        try:
            await checkpoints.stop()
        finally:
            try:
                await commits.close()
                async with checkpoints.lock:
                    listing = partial(wal.segments, self._directory.journal)
                    await checkpoints.checkpoint(await self._reader.run(listing))
            finally:
                await self._reader.close(self._release)

    def _abandon(self) -> None:
        """Release the directory as it is: the next owner recovers it from the log."""
        if self._commits is not None:
            self._commits.abandon()
        self._release()

    def _in_place(self) -> bool:
        return self._ownership is None or self._ownership.seems_in_place

    def _stand(self) -> None:
        """Look whether the directory is still ours; make folders and locks that were removed.

        Raises ``StateDirectoryInUseError`` when another process owns the one at its path.
        """
        if self._ownership is not None:
            self._ownership.renew(self._directory.prepare)

    def _make_folders(self) -> None:
        self._stand()
        if fileio.stat_file(self._directory.journal) is None:
            self._directory.prepare()

    def _release(self) -> None:
        self._checkpointer.close()
        if self._ownership is not None:
            self._ownership.release()
            self._ownership = None

    def _writing(self) -> CheckpointScheduler:
        if self._checkpoints is None:
            raise AgentStateError("the store is not open", path=self.root)
        return self._checkpoints

    def _committing(self) -> GroupCommit:
        if self._commits is None:
            raise AgentStateError("the store is not open", path=self.root)
        return self._commits

    def journal_lag(self) -> JournalLag:
        """How far the files are behind the write-ahead log."""
        return self._writing().lag() if self._commits is not None else JournalLag(0, 0.0)

    # -- committing: resolve, add to the log, fsync; the files follow ----------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if not changes:
            return []
        self._reader.refuse_elsewhere()
        try:
            return await self._commit(changes, [*map(_DOCUMENT_ID, changes)])
        except (StorageError, LockTimeoutError):
            with concerning(changes[0].kind, changes[0].key):
                raise

    async def _commit(self, changes: Sequence[Change], places: Sequence[DocumentId]) -> list[int]:
        while True:
            try:
                return await self._commit_once(changes, places)
            except _LogsChangedError as changed:
                async with self._writing().lock:
                    await self._writing().take_in(changed.places)

    async def _commit_once(
        self, changes: Sequence[Change], places: Sequence[DocumentId]
    ) -> list[int]:
        memtable, worktree = self._memtable, self._directory.worktree
        learned = looked = False
        while True:
            is_looking = self._refreshing is not None or worktree.is_stale()
            if is_looking or worktree.unmerged or worktree.marked:
                await self._refuse_unmerged(changes)
            if self._task_locks.held and self._task_locks.taken(wanted := locks_of(places)):
                async with self._task_locks.hold(wanted):
                    return await self._commit(changes, places)
            behind = not learned and not self._learning.keys().isdisjoint(places)
            if behind or not all(map(memtable.knows, changes)):
                await self._learn(changes, places)
                learned = True
                continue
            commits = self._committing()
            # From here to ``submit`` nothing awaits: the commit is made on what it was resolved on.
            try:
                resolution = resolve(changes, places, memtable, self._clock)
            except RevisionConflictError as conflict:
                if (conflict.kind, conflict.key) in memtable.in_flight:
                    # Readers see that version only when it is durable; until then a caller that
                    # tries again at once would starve it.
                    await commits.submit(LogSave())
                raise
            if len(resolution.changes) == len(changes):
                break
            if not looked and worktree.is_there():
                looked = True
                await self._look_at_logs(changes)
            elif memtable.maybe_unsynced(changes, resolution.changes):
                await self._sync_found(changes, places, resolution.changes)
            else:
                break
        if resolution.changes:
            check_group(resolution.changes)
            memtable.begin(resolution.changes)
            await commits.submit(LogSave(resolution.changes))
        elif not memtable.in_flight.keys().isdisjoint(places):
            await commits.submit(LogSave())  # unchanged, but not durable yet
        return resolution.numbers

    async def _refresh(self) -> None:
        """Look at what git has in work; who commits meanwhile waits, and keeps its turn."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._look_at_git())
        await asyncio.shield(self._refreshing)

    async def _look_at_git(self) -> None:
        try:
            await self._reader.run(self._directory.worktree.refresh)
        finally:
            self._refreshing = None

    async def _refuse_unmerged(self, changes: Sequence[Change]) -> None:
        """Raises ``UnmergedStateError`` for a change of what a merge has left unresolved."""
        worktree = self._directory.worktree
        await self._refresh()
        for change in changes:
            ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
            at = self._directory.locate(change.kind, change.key, ending)
            if at.path in worktree.marked:
                await self._read([(change.kind, change.key)])  # it may be resolved by now
            if not isinstance(change, Check):
                worktree.check(at)

    async def _drain(self, commits: GroupCommit) -> None:
        """Wait for everything that was submitted."""
        while True:
            try:
                return await commits.submit(LogSave())
            except _LogsChangedError:
                continue  # its callers submit again

    def _refuse_changed_logs(self, saves: Sequence[LogSave]) -> None:
        """Look, in the thread of the log, whether others have added lines since.

        Not where records are to be written back: then the write-back looks, within moments.
        """
        changes = (change for save in saves for change in save.changes)
        self._refuse_changed({id_of(each) for each in changes if type(each) is ResolvedAppend})

    async def _look_at_logs(self, changes: Sequence[Change]) -> None:
        """Look whether git has put logs there that lack the ids which are known."""
        if logs := {(each.kind, each.key) for each in changes if isinstance(each, Append)}:
            await self._reader.run(partial(self._refuse_changed, logs))

    def _refuse_changed(self, places: set[DocumentId]) -> None:
        logs, locate = self._directory.logs, self._directory.locate
        places = {each for each in places if each not in self._memtable.dirty.records}
        if changed := {each for each in places if not logs.unchanged(locate(*each, paths.LOG))}:
            raise _LogsChangedError(changed)

    def _finished(self, saves: Sequence[LogSave], error: BaseException | None) -> None:
        """Take the outcome of a batch of the log, before the callers are woken."""
        watcher = self._reader.watcher
        if isinstance(error, _LogsChangedError):
            self._memtable.withdraw([change for save in saves for change in save.changes])
            return
        for (changes,) in saves:
            if error is not None:
                self._memtable.failed(changes)
                continue
            self._memtable.became_durable(changes)
            if watcher.subscriptions:
                for change in changes:
                    watcher.notify(notice_of(change))
        if error is None and self._checkpoints is not None:
            self._checkpoints.dirty.set()

    async def _sync_found(
        self,
        changes: Sequence[Change],
        places: Sequence[DocumentId],
        resolved: Sequence[ResolvedChange],
    ) -> None:
        """Fsync files that another process wrote, before a commit relies on them."""
        with self._memtable.pinned(places):
            async with self._writing().lock:
                unsynced = self._memtable.maybe_unsynced(changes, resolved)
                if unsynced:  # and no other commit was first
                    await self._reader.run(partial(self._ensure_synced, unsynced))
                    self._memtable.mark_synced(unsynced)

    def _ensure_synced(self, files: Iterable[FileId]) -> None:
        locate = self._directory.locate
        self._directory.documents.ensure_synced([locate(*place, ending) for place, ending in files])

    # -- learning what the files have ------------------------------------------------------------

    async def _learn(self, changes: Sequence[Change], places: Sequence[DocumentId]) -> None:
        """Read what the mem table needs to know of the changes, until all is known.

        Commits to one place leave in the order they came, also if one is cancelled meanwhile.
        """
        ahead = {self._learning[place] for place in places if place in self._learning}
        learned = asyncio.get_running_loop().create_future()
        self._learning.update(dict.fromkeys(places, learned))

        def leave(_: object = None) -> None:
            for place in places:
                if self._learning.get(place) is learned:
                    del self._learning[place]
            learned.set_result(None)

        try:
            if ahead:
                await asyncio.wait(ahead)
            with self._memtable.pinned(places):
                while unknown := [*filterfalse(self._memtable.knows, changes)]:
                    await self._learn_once(unknown)
        finally:
            if waiting := [each for each in ahead if not each.done()]:
                asyncio.gather(*waiting).add_done_callback(leave)
            else:
                leave()

    async def _learn_once(self, changes: Sequence[Change]) -> None:
        """Read documents and the ends of logs."""
        appends = []
        documents = set()
        for change in changes:
            if isinstance(change, Append):
                appends.append(change)
            else:
                documents.add((change.kind, change.key))
        if documents:
            await self._read(sorted(documents))
        if appends:
            found = await self._reader.run(partial(log_ends, self._directory, appends))
            for place, (end, name, ids, complete) in found.items():
                self._memtable.learn_log(place, end, ids, partial=not complete, name=name)

    async def _read(self, places: Sequence[DocumentId]) -> dict[DocumentId, Found]:
        """Read the files of these documents; a damaged one is quarantined and repaired."""
        memtable = self._memtable
        with memtable.pinned(places):
            before = dict(zip(places, map(memtable.clean, places), strict=True))
            read = await self._reader.run(partial(read_documents, self._directory, places))
            found: dict[DocumentId, Found] = {}
            for place, stored in read.items():
                if isinstance(stored, StateCorruptedError):
                    found[place] = await self._repair(place, stored)
                    continue
                if isinstance(stored, AgentStateError):
                    found[place] = await self._last_good(place, stored)
                    continue
                version = stored and ResolvedPut(stored.document, stored.meta)
                found[place] = version
                is_news = memtable.learn(place, version, known := before[place])
                if is_news and stored is not None:
                    at = self._directory.locate(*place)
                    self._directory.documents.seen.set(at.path, stored.stamp)
                    if stored.document.edited and isinstance(known, ResolvedPut):
                        keep = self._directory.documents.keep_edited
                        await self._reader.run(partial(keep, at, known.document, known.meta))
        return found

    async def _last_good(self, place: DocumentId, error: AgentStateError) -> Found:
        """The version that is read while a file is left alone; the error if none is known."""
        if isinstance(error, UnmergedStateError):
            self._directory.report_unmerged(error)
        known = self._memtable.clean(place)
        if isinstance(known, ResolvedPut):
            return known
        at = self._directory.locate(*place)
        stored = await self._reader.run(partial(self._directory.documents.last_good, at))
        good = stored and ResolvedPut(stored.document, stored.meta)
        self._memtable.keep(place, good)
        return good or error

    async def _repair(self, place: DocumentId, damage: StateCorruptedError) -> Found:
        """Quarantine a damaged file and write the last good version, with no write-back running."""
        memtable = self._memtable
        async with self._writing().lock:
            if place in memtable.dirty.documents:
                return memtable.current(place)[0]  # the write-back will find the damage itself
            good = memtable.clean(place)
            work = partial(repair_document, self._directory, place, good, damage)
            repaired = await self._reader.run(work)
            memtable.keep(place, repaired if isinstance(repaired, ResolvedPut) else None)
            return repaired

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        self._reader.refuse_elsewhere()
        place = (kind, key)
        dirty = self._memtable.dirty.documents
        change = dirty.get(place)
        if change is None:
            found = (await self._read([place]))[place]
            if isinstance(found, AgentStateError):
                raise found
            change = dirty.get(place) or found
            self._directory.worktree.note_read(self._directory.locate(kind, key).path)
        return change.document if isinstance(change, ResolvedPut) else None

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        # Before and after: a change that is written back in between may be in neither listing.
        before = dict(self._memtable.dirty.documents)
        found = await self._reader.keys(kind, prefix)
        found = keys_over(before, found, kind, prefix)
        return keys_over(self._memtable.dirty.documents, found, kind, prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        dirty = self._memtable.dirty
        before = dirty.logs_over((), kind, prefix)
        found = await self._reader.logs(kind, prefix)
        return dirty.logs_over([*found, *before], kind, prefix)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        dirty = self._memtable.dirty.documents
        keys = await self.keys(kind, prefix)
        for start in range(0, len(keys), SCAN_BATCH):
            places = [*zip(repeat(kind), keys[start : start + SCAN_BATCH])]
            waiting = {place: dirty[place] for place in dirty.keys() & places} if dirty else {}
            found = await self._read_permitted([*filterfalse(waiting.__contains__, places)])
            for place in places:
                change = dirty.get(place) or waiting.get(place) or found.get(place)
                if isinstance(change, ResolvedPut):
                    yield change.document

    async def _read_permitted(self, places: Sequence[DocumentId]) -> dict[DocumentId, Found]:
        """``_read``, without the documents that may not be read; those are reported."""
        try:
            return await self._read(places)
        except StorageError as error:
            if not is_forbidden(error):
                raise
        found: dict[DocumentId, Found] = {}
        for place in places:
            try:
                found.update(await self._read([place]))
            except StorageError as error:
                if not is_forbidden(error):
                    raise
                self._directory.tree.report_forbidden(*place, error)
        return found

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        waiting = list(self._memtable.dirty.records.get((kind, key), ()))
        return read_over(waiting, partial(self._reader.read_log, kind, key), after, last)

    async def keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        """The records whose dedupe keys begin so, as ``IndexedLogs``."""
        waiting = [*self._memtable.dirty.records.get((kind, key), ())]
        found = await self._reader.keyed_records(kind, key, prefix)
        if found is None or any(record.dedupe_key is None for record in waiting):
            return None
        there = {record.seq for record in found}
        recent = (record for record in waiting if record.seq not in there)
        return [*found, *(each for each in recent if (each.dedupe_key or "").startswith(prefix))]

    def incidents(self) -> list[Incident]:
        return list(self._directory.incidents)

    async def watch(self) -> Subscription:
        return await self._reader.watch()

    async def is_removed(self, kind: str, key: Key) -> bool:
        return await self._reader.is_removed(kind, key)

    @property
    def is_merging(self) -> bool:
        return self._directory.worktree.is_merging

    async def check_merged(self, kind: str, key: Key, *, reads: bool = False) -> None:
        await self._reader.check_merged(kind, key, reads=reads)

    def _notify_of_edit(self, document: Document) -> None:
        notice = Notice(document.kind, document.key, document.revision, outside=True)
        self._reader.watcher.notify(notice)

    async def origin(self) -> Origin:
        return replace(await asyncio.to_thread(self._directory.origin), exclusive=True)

    # -- flush, lock, erase, quarantine ----------------------------------------------------------

    async def flush(self) -> None:
        if (checkpoints := self._checkpoints) is not None:
            async with checkpoints.lock:
                if self._commits is not None:
                    await checkpoints.checkpoint()

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        commits, in_flight = self._committing(), self._memtable.in_flight
        async with self._task_locks.hold(lock_of(kind, key)):
            if any(k == kind and other[: len(key)] == key for k, other in in_flight):
                await self._drain(commits)  # readers see no version that is on its way
            yield

    async def erase(self, kind: str, key: Key) -> int:
        with concerning(kind, key):
            async with self._task_locks.hold(lock_of(kind, key)):
                if self._erasures is None:
                    raise AgentStateError("the store is not open", path=self.root)
                documents, logs = await self._erasures.submit((kind, key))
        for erased in documents:
            self._reader.watcher.notify(Notice(kind, erased, None))
        return len(documents) + logs

    async def _erase(self, targets: Sequence[DocumentId]) -> list[Erased | AgentStateError]:
        """Erase after a checkpoint, so that no segment has a change of these any more."""
        commits, checkpoints, memtable = self._committing(), self._writing(), self._memtable
        await self._drain(commits)
        async with checkpoints.lock:
            await checkpoints.checkpoint()
            known = [place for target in targets for place in memtable.below(*target)]
            work = partial(erase, self._directory, targets, durable=self._durable)
            outcomes = await self._reader.run(work)
            memtable.erase(known)
            for (kind, _), erased in zip(targets, outcomes, strict=True):
                if not isinstance(erased, AgentStateError):
                    memtable.erase((kind, gone) for gone in erased[0])
        return outcomes

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        place, memtable, checkpoints = (kind, key), self._memtable, self._writing()
        at = self._directory.locate(kind, key)
        with concerning(kind, key):
            async with self._task_locks.hold(lock_of(kind, key)):
                while True:
                    if place in memtable.in_flight and self._commits is not None:
                        await self._drain(self._commits)
                    async with checkpoints.lock:
                        if place in memtable.dirty.documents:
                            await checkpoints.write_back([place])
                        if place in memtable.in_flight or place in memtable.dirty.documents:
                            continue  # it was saved meanwhile
                        restore = self._directory.documents.quarantine_and_restore
                        stored = await self._reader.run(partial(restore, at, reason, version))
                        memtable.keep(place, stored and ResolvedPut(stored.document, stored.meta))
                        return stored.document if stored else None

    def _now(self) -> str:
        return stamp(self._clock.now())
