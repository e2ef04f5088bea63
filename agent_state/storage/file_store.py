"""The shared store: any number of processes write, each document its own atomic file.

The file is the truth, and is visible when ``commit`` returns. A group of changes is recorded
first; the next writer completes the record of a process that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    LockTimeoutError,
    StateCorruptedError,
    StorageError,
    UnmergedStateError,
    concerning,
    storage_error,
)
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
from agent_state.storage import barrier, fileio, group_writer, locks, logs, paths, wal
from agent_state.storage.changes import Resolution, ResolvedAppend, ResolvedPut, notice_of, resolve
from agent_state.storage.checkpoint import Checkpointer
from agent_state.storage.directory import ERASED_AT_ONCE, Erased, StateDirectory, erase
from agent_state.storage.document_files import StagedFile, StoredDocument
from agent_state.storage.document_locks import (
    DocumentLocks,
    Taken,
    Wanted,
    byte_of,
    lock_of,
    locks_of,
)
from agent_state.storage.executor import Batcher, shielded
from agent_state.storage.fileio import Stamp
from agent_state.storage.locks import TaskLocks
from agent_state.storage.paths import DocumentPath
from agent_state.storage.reader import SCAN_BATCH, FileReader
from agent_state.storage.watch import Subscription

T = TypeVar("T")

LOCK_SECONDS = 10.0
WRITERS = 4
"""Threads that write at once."""
BATCH_COMMITS = 16
"""The most commits of one batch."""
_POLL_SECONDS, _POLL_SECONDS_MAX = 0.001, 0.016


@dataclass(slots=True, eq=False)
class CommitJob:
    """One commit in progress: its changes, their places, and its stage."""

    changes: Sequence[Change]
    places: Sequence[DocumentPath]
    wanted: Wanted
    holder: DocumentLocks | None
    """The locks that its task has, if it has any."""
    resolution: Resolution[DocumentPath] | None = None
    staged: StagedFile | None = None
    error: Exception | None = None

    @property
    def to_change(self) -> set[DocumentPath]:
        """The places of all changes but checks."""
        pairs = zip(self.changes, self.places, strict=True)
        return {place for change, place in pairs if not isinstance(change, Check)}


@dataclass(frozen=True, slots=True, eq=False)
class EraseJob:
    """A key to erase, and the locks that the caller has, if it has any."""

    kind: str
    key: Key
    holder: DocumentLocks | None


class FileStateStore:
    """Documents and logs as files that several processes may write.

    ``durability``: ``"fsync"`` survives power loss, ``"os"`` only the death of processes.
    ``lock_timeout_seconds``: how long a change or a ``lock`` waits for another process or task.
    Raises ``StateDirectoryInUseError`` at ``open`` when another process owns the directory.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        durability: str = "fsync",
        clock: Clock | None = None,
        lock_timeout_seconds: float = LOCK_SECONDS,
    ) -> None:
        if durability not in ("fsync", "os"):
            raise ValueError(f"durability is 'fsync' or 'os', not {durability!r}")
        self._clock: Clock = clock or SystemClock()
        self._timeout = lock_timeout_seconds
        self._directory = StateDirectory(os.fspath(root), sync=durability == "fsync", now=self._now)
        self._directory.tree.renames = True
        self._reader = FileReader(self._directory)
        self._task_locks = TaskLocks(lock_timeout_seconds)
        self._commits: Batcher[CommitJob, Resolution[DocumentPath]] | None = None
        self._erasures: Batcher[EraseJob, Erased] | None = None
        self._held: dict[asyncio.Task[object] | None, DocumentLocks] = {}
        """The locks that tasks hold by ``lock``."""
        self._membership: locks.Standing | None = None

    @property
    def root(self) -> str:
        """The state directory, as an absolute path."""
        return self._directory.root

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if not self._reader.is_open:
            try:
                await self._reader.open(self._open)
            except asyncio.CancelledError:
                await shielded(self._close())  # by now it has been opened
                raise
            self._commits = Batcher(
                # mypy does not follow a ParamSpec through partial
                partial(self._reader.executor.run, self._commit_batch),  # type: ignore[call-arg]  # as above
                max_items=BATCH_COMMITS,
                workers=WRITERS,
            )
            self._erasures = Batcher(
                partial(self._reader.executor.run, self._erase_batch),  # type: ignore[call-arg]  # as above
                max_items=ERASED_AT_ONCE,
            )

    async def close(self) -> None:
        if self._reader.is_elsewhere:
            await self._reader.close_elsewhere(self.close, self._release)
            self._commits = self._erasures = None
            return
        await shielded(self._close())

    async def _close(self) -> None:
        commits, self._commits, self._erasures = self._commits, None, None
        await self._reader.close(self._release, before=commits.close if commits else None)

    def _open(self) -> None:
        self._directory.prepare()
        self._directory.worktree.refresh()
        if wal.segments(self._directory.journal):
            self._recover_wal()
        self._membership = locks.acquire_shared(self._directory.locks)
        try:
            group_writer.complete_all(self._directory)
            alone_since = locks.only_writer_since(self._membership)
            if alone_since is not None:
                self._directory.remove_leftovers(before_ns=alone_since)
        except BaseException:
            self._release()
            raise

    def _recover_wal(self) -> None:
        """Replay the log of an owner that died into the files, as the owner for a moment."""
        owner = locks.acquire_exclusive(self._directory.locks)
        checkpointer = Checkpointer(self._directory, durable=self._directory.sync, accept=None)
        try:
            checkpointer.recover()
        finally:
            checkpointer.close()
            owner.release()

    def _stand(self) -> None:
        """Look whether the directory is still this one; make folders and locks that were removed.

        Raises ``StateDirectoryInUseError`` when another process owns the one at its path.
        """
        if self._membership is not None:
            self._membership.renew(self._directory.prepare)

    def _release(self) -> None:
        while self._held:
            self._held.popitem()[1].release()
        if self._membership is not None:
            self._membership.release()
            self._membership = None

    # -- committing: lock, resolve, stage, fsync, rename, fsync the folders, unlock ---------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if not changes:
            return []
        commits = self._commits
        self._reader.refuse_elsewhere()
        if commits is None:
            raise AgentStateError("the store is not open", path=self.root)
        places, changed, checked = [], list[DocumentId](), list[DocumentId]()
        for change in changes:
            ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
            places.append(paths.locate(self._directory.root, change.kind, change.key, ending))
            (checked if isinstance(change, Check) else changed).append((change.kind, change.key))
        wanted = locks_of(changed, checked)
        job = CommitJob(changes, places, wanted, self._holder)
        try:
            async with self._task_locks.hold(wanted):
                resolution = await self._until_free(partial(commits.submit, job))
                if self._reader.watcher.subscriptions:
                    for made in resolution.changes:
                        self._reader.watcher.notify(notice_of(made))
                return resolution.numbers
        except (StorageError, LockTimeoutError):
            with concerning(changes[0].kind, changes[0].key):
                raise

    def _commit_batch(
        self, jobs: Sequence[CommitJob]
    ) -> list[Resolution[DocumentPath] | Exception]:
        """Commit each job by itself; their single documents share the fsyncs of folders. Blocks.

        A lock that is taken is not waited for in a thread: those who wait could take up all
        threads, and the one that is to release the lock would find none.
        """
        outcomes = []
        self._directory.worktree.refresh()
        self._stand()
        with ExitStack() as stack:
            share = barrier.Share(self._directory.locks)
            stack.callback(share.leave)
            share.wait()
            ours = self._lock_all(stack, jobs)
            try:
                for job in jobs:
                    if job.error is None:
                        self._prepare(job)
                if (moved := _moved(ours)) is not None:
                    for job in jobs:  # what is not staged has been made
                        if job.error is None and job.staged is not None:
                            job.error = moved
                self._place(jobs)
            finally:
                for job in jobs:
                    if job.staged is not None and not job.staged.placed:
                        job.staged.discard()
                    outcomes.append(job.error or job.resolution)
        return cast("list[Resolution[DocumentPath] | Exception]", outcomes)

    def _lock_all(self, stack: ExitStack, jobs: Sequence[CommitJob]) -> DocumentLocks:
        """Lock each job's places, and complete the groups of dead writers there.

        The ``error`` of a job whose lock is taken is a ``LockTimeoutError``. Returns the locks of
        the jobs that have no holder.
        """
        directory = self._directory
        while True:
            with ExitStack() as attempt:
                ours = directory.new_locks()
                attempt.callback(ours.release)
                locked: dict[DocumentId, bool] = {}
                for job in jobs:
                    job.resolution = job.staged = job.error = None
                    holder = job.holder or ours
                    try:
                        holder.check_in_place()
                        attempt.callback(holder.give_back, holder.take(job.wanted))
                    except AgentStateError as error:
                        job.error = error
                        continue
                    for name, exclusive in job.wanted.items():
                        locked[name] = exclusive or locked.get(name, False)
                listing = fileio.list_folder(directory.journal)
                unfinished = group_writer.records_of(directory, locked) if listing else []
                if not unfinished and ours.in_place:
                    stack.push(attempt.pop_all())
                    return ours
            holders = [job.holder for job in jobs if job.holder is not None]
            for record in unfinished:
                group_writer.complete(directory, record, holders=holders)

    def _prepare(self, job: CommitJob) -> None:
        """Resolve a job, and stage its document; a group, an append or a delete is made here."""
        directory = self._directory
        view = _DirectoryView(directory)
        try:
            job.resolution = resolution = resolve(job.changes, job.places, view, self._clock)
            changes, places = resolution.changes, resolution.places
            checked = [each for each in job.changes if isinstance(each, Check)]
            if len(changes) + len(checked) < len(job.changes):
                # An earlier attempt may have written an unchanged document without an fsync.
                directory.documents.ensure_synced(job.to_change.difference(places))
            if len(changes) > 1:
                relied_on = [(each.kind, each.key) for each in checked]
                group_writer.write_group(directory, changes, places, view.base_stamps, relied_on)
            elif changes:
                [change], [at] = changes, places
                if isinstance(change, ResolvedPut):
                    job.staged = directory.documents.stage(
                        at, change.document, change.meta, view.base_stamps[at], verified=True
                    )
                elif isinstance(change, ResolvedAppend):
                    directory.documents.make_parent(at)
                    directory.logs.writer(at).append([change.record], sync=directory.sync)
                else:
                    directory.documents.delete(at)
        except Exception as error:  # noqa: BLE001  # this job's own; the others go on
            job.error = error

    def _place(self, jobs: Sequence[CommitJob]) -> None:
        """Make the staged files durable and rename them; one that fails does not stop the others.

        The order is that of one file: all bytes, fsync, rename, fsync of the folder.
        """
        documents, sync = self._directory.documents, self._directory.sync
        folders: dict[str, list[CommitJob]] = {}
        for step in (partial(StagedFile.finish, sync=sync), documents.place):
            for job in jobs:
                if job.error is None and job.staged is not None:
                    at = job.staged.at
                    try:
                        step(job.staged)
                    except OSError as error:
                        job.error = storage_error(
                            error, "writing a file", kind=at.kind, key=at.key, path=at.path
                        )
                        job.error.__cause__ = error
                    if job.staged.placed:
                        folders.setdefault(at.parent, []).append(job)
        if sync:
            for folder, placed in folders.items():
                try:
                    fileio.sync_directory(folder)
                except DurabilityUnknownError as error:
                    for job in placed:
                        job.error = error

    async def _until_free(self, start: Callable[[], Awaitable[T]]) -> T:
        """Start work that raises ``LockTimeoutError`` for a taken lock, until the lock is free."""
        deadline = time.monotonic() + self._timeout
        pause = _POLL_SECONDS
        while True:
            try:
                return await start()
            except LockTimeoutError as error:
                if time.monotonic() >= deadline:
                    raise await self._reader.run(partial(self._timed_out, error)) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS_MAX)

    def _timed_out(self, error: LockTimeoutError) -> LockTimeoutError:
        """The error, with the process that holds the lock, if it is known."""
        path, byte = error.path or "", None
        if error.kind is not None and isinstance(error.key, tuple):
            byte = byte_of((error.kind, error.key))
        pid = locks.holder_of(path, byte)
        held = f"; process {pid} holds it" if pid else ""
        return LockTimeoutError(
            f"not free within {self._timeout:g} s{held}",
            kind=error.kind,
            key=error.key,
            path=error.path,
        )

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        at = self._directory.locate(kind, key)
        work = partial(self._get, self._holder, at)
        return await self._until_free(partial(self._reader.run, work))

    def _get(self, holder: DocumentLocks | None, at: DocumentPath) -> Document | None:
        """The document, after the groups of dead writers. Raises ``StateCorruptedError``."""
        directory = self._directory
        listing = fileio.list_folder(directory.journal)
        wanted = {(at.kind, at.key): False}
        for record in group_writer.records_of(directory, wanted) if listing else ():
            with contextlib.suppress(LockTimeoutError):  # its writer lives, or another is at it
                group_writer.complete(self._directory, record)
        directory.worktree.refresh()
        try:
            stored = directory.documents.read(at)
            directory.worktree.note_read(at.path)
        except StateCorruptedError as error:
            stored = self._repair(holder, at, error)
        except (UnmergedStateError, LockTimeoutError) as error:
            if isinstance(error, UnmergedStateError):
                directory.report_unmerged(error)
            stored = directory.documents.last_good(at)
            if stored is None:
                raise
        return stored.document if stored else None

    def _repair(
        self, holder: DocumentLocks | None, at: DocumentPath, found: StateCorruptedError
    ) -> StoredDocument | None:
        """Read again under the lock; quarantine what is still damaged, restore its snapshot."""
        with self._locked(holder, lock_of(at.kind, at.key)):
            try:
                return self._directory.documents.read(at)
            except StateCorruptedError as error:
                stored = self._directory.documents.quarantine_and_restore(at, error.message)
        if stored is None:
            raise found
        return stored

    @property
    def _holder(self) -> DocumentLocks | None:
        """The locks that the current task holds."""
        return self._held.get(asyncio.current_task())

    @contextlib.contextmanager
    def _locked(self, holder: DocumentLocks | None, wanted: Wanted) -> Iterator[None]:
        """Hold locks in a thread. Raises ``LockTimeoutError`` at once when one is taken."""
        ours = holder or self._directory.new_locks()
        taken: Taken = []
        try:
            self._take(ours, wanted, taken)
            yield
        finally:
            if not ours.give_back(taken):
                ours.release()

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._reader.keys(kind, prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._reader.logs(kind, prefix)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        keys = await self._reader.keys(kind, prefix)
        for start in range(0, len(keys), SCAN_BATCH):
            places = [self._directory.locate(kind, key) for key in keys[start : start + SCAN_BATCH]]
            work = partial(self._reader.readable, places, partial(self._get, self._holder))
            for document in await self._until_free(partial(self._reader.run, work)):
                yield document

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        return self._reader.read_log(kind, key, after=after, last=last)

    async def keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        """The records whose dedupe keys begin so, as ``IndexedLogs``."""
        return await self._reader.keyed_records(kind, key, prefix)

    def incidents(self) -> list[Incident]:
        return list(self._directory.incidents)

    async def is_removed(self, kind: str, key: Key) -> bool:
        return await self._reader.is_removed(kind, key)

    @property
    def is_merging(self) -> bool:
        return self._directory.worktree.is_merging

    async def check_merged(self, kind: str, key: Key, *, reads: bool = False) -> None:
        await self._reader.check_merged(kind, key, reads=reads)

    async def watch(self) -> Subscription:
        return await self._reader.watch()

    async def origin(self) -> Origin:
        return await asyncio.to_thread(self._directory.origin)

    # -- locking, erasing, quarantine ------------------------------------------------------------

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        executor, me = self._reader.executor, asyncio.current_task()
        wanted = lock_of(kind, key)
        async with self._task_locks.hold(wanted):
            holder = self._held.setdefault(me, self._directory.new_locks())
            taken: Taken = []  # cancelled while it was being taken, a lock is held all the same
            try:
                take = partial(self._take, holder, wanted, taken)
                await self._until_free(partial(self._reader.run, take))
                yield
            finally:
                if self._held.get(me) is holder:  # it was not closed
                    await executor.run(partial(self._leave, me, holder, taken))

    def _take(self, holder: DocumentLocks, wanted: Wanted, taken: Taken) -> None:
        """Take locks, with the groups of dead writers completed; add them to ``taken``."""
        while True:
            found = holder.take(wanted)
            try:
                unfinished = group_writer.records_of(self._directory, wanted)
            except BaseException:
                holder.give_back(found)
                raise
            if not unfinished:
                taken += found
                return
            holder.give_back(found)
            for record in unfinished:
                group_writer.complete(self._directory, record, holders=[holder])

    def _leave(
        self, task: asyncio.Task[object] | None, holder: DocumentLocks, taken: Taken
    ) -> None:
        if not holder.give_back(taken):
            holder.release()
            self._held.pop(task, None)

    async def flush(self) -> None:
        """Nothing is outstanding: each commit brings its files to their place."""

    async def erase(self, kind: str, key: Key) -> int:
        wanted = lock_of(kind, key)
        with concerning(kind, key):
            async with self._task_locks.hold(wanted):
                job = EraseJob(kind, key, self._holder)
                documents, logs = await self._until_free(partial(self._erasing().submit, job))
        for erased in documents:
            self._reader.watcher.notify(Notice(kind, erased, None))
        return len(documents) + logs

    def _erasing(self) -> Batcher[EraseJob, Erased]:
        self._reader.refuse_elsewhere()
        if self._erasures is None:
            raise AgentStateError("the store is not open", path=self.root)
        return self._erasures

    def _erase_batch(self, jobs: Sequence[EraseJob]) -> list[Erased | AgentStateError]:
        """Erase what can be locked now, in one pass. Blocks."""
        outcomes: dict[EraseJob, Erased | AgentStateError] = {}
        with ExitStack() as stack:
            free = []
            for job in jobs:
                try:
                    stack.enter_context(self._locked(job.holder, lock_of(job.kind, job.key)))
                    free.append(job)
                except AgentStateError as error:
                    outcomes[job] = error
            targets = [(job.kind, job.key) for job in free]
            outcomes.update(zip(free, erase(self._directory, targets), strict=True))
        return [outcomes[job] for job in jobs]

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        at = self._directory.locate(kind, key)
        with concerning(kind, key):
            async with self._task_locks.hold(lock_of(kind, key)):
                work = partial(self._quarantine, self._holder, at, reason, version)
                return await self._until_free(partial(self._reader.run, work))

    def _quarantine(
        self, holder: DocumentLocks | None, at: DocumentPath, reason: str, version: Document | None
    ) -> Document | None:
        with self._locked(holder, lock_of(at.kind, at.key)):
            stored = self._directory.documents.quarantine_and_restore(at, reason, version)
        return stored.document if stored else None

    def _now(self) -> str:
        return stamp(self._clock.now())


@dataclass(slots=True)
class _DirectoryView:
    """A ``CommitView`` of the files, by their paths. Its reader holds their locks."""

    directory: StateDirectory
    base_stamps: dict[DocumentPath, Stamp | None] = field(default_factory=dict)
    """The version of each document's file that was read; None where there was none."""

    def current(self, place: DocumentPath) -> tuple[StoredDocument | None, int]:
        documents = self.directory.documents
        try:
            stored = documents.read(place)
        except StateCorruptedError as error:
            stored = documents.quarantine_and_restore(place, error.message)
        self.base_stamps[place] = stored.stamp if stored is not None else None
        return stored, 1

    def last_seq(self, place: DocumentPath) -> int:
        return self.directory.logs.writer(place).tail().seq

    def end_name(self, place: DocumentPath) -> str | None:
        return logs.end_name(place.path) if self.directory.worktree.is_there() else None

    def find(self, place: DocumentPath, dedupe_key: str) -> int | None:
        return self.directory.logs.writer(place).find(dedupe_key)


def _moved(ours: DocumentLocks) -> AgentStateError | None:
    """Why nothing may be written under these locks; a ``LockTimeoutError`` is tried again."""
    try:
        return None if ours.in_place else LockTimeoutError("not free", path=ours.path)
    except StorageError as error:
        return error
