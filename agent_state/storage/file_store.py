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
from operator import attrgetter
from typing import TypeVar, cast

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    LockTimeoutError,
    StateCorruptedError,
    StorageError,
    concerning,
    storage_error,
)
from agent_state.protocols import (
    Append,
    Change,
    Check,
    Document,
    Incident,
    LogRecord,
    Notice,
    Origin,
)
from agent_state.storage import fileio, group_writer, locks, paths, wal
from agent_state.storage.changes import (
    Resolution,
    ResolvedAppend,
    ResolvedPut,
    notice_of,
    resolve,
)
from agent_state.storage.checkpoint import Checkpointer
from agent_state.storage.directory import StateDirectory, erase
from agent_state.storage.document_files import StagedFile, StoredDocument
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
_LOCK_NAME = attrgetter("lock_name")
_POLL_SECONDS, _POLL_SECONDS_MAX = 0.001, 0.016


@dataclass(slots=True, eq=False)
class CommitJob:
    """One commit in progress: its changes, their places, and its stage."""

    changes: Sequence[Change]
    places: Sequence[DocumentPath]
    resolution: Resolution[DocumentPath] | None = None
    staged: StagedFile | None = None
    error: Exception | None = None

    @property
    def to_change(self) -> set[DocumentPath]:
        """The places of all changes but checks."""
        pairs = zip(self.changes, self.places, strict=True)
        return {place for change, place in pairs if not isinstance(change, Check)}


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
        self._reader = FileReader(self._directory)
        self._task_locks = TaskLocks(lock_timeout_seconds)
        self._take_lock = partial(
            locks.acquire_at_once,
            self._directory.root,
            self._directory.locks,
            sync=self._directory.sync,
        )
        self._commits: Batcher[CommitJob, Resolution[DocumentPath]] | None = None
        self._held: dict[str, locks.FileLock] = {}
        """Locks that tasks of this process hold by ``lock``, by name."""
        self._membership: locks.FileLock | None = None

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
                partial(self._reader.executor.run, self._commit_batch),  # type: ignore[call-arg]
                max_items=BATCH_COMMITS,
                workers=WRITERS,
            )

    async def close(self) -> None:
        await shielded(self._close())

    async def _close(self) -> None:
        commits, self._commits = self._commits, None
        await self._reader.close(self._release, before=commits.close if commits else None)

    def _open(self) -> None:
        self._directory.prepare()
        if wal.segments(self._directory.journal):
            self._recover_wal()
        self._membership = locks.acquire_shared(self._directory.locks)
        try:
            group_writer.complete_all(self._directory)
            alone_since = locks.only_writer_since(self._membership)
            if alone_since is not None:
                self._directory.remove_temporaries(before_ns=alone_since)
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

    def _release(self) -> None:
        while self._held:
            self._held.popitem()[1].release()
        if self._membership is not None:
            locks.release_shared(self._membership)
            self._membership = None

    # -- committing: lock, resolve, stage, fsync, rename, fsync the folders, unlock ---------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if not changes:
            return []
        commits = self._commits
        if commits is None:
            raise AgentStateError("the store is not open", path=self.root)
        places = []
        for change in changes:
            ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
            places.append(paths.locate(self._directory.root, change.kind, change.key, ending))
        job = CommitJob(changes, places)
        try:
            async with self._task_locks.hold(map(_LOCK_NAME, places)):
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
        with ExitStack() as stack:
            self._lock_all(stack, jobs)
            try:
                for job in jobs:
                    if job.error is None:
                        self._prepare(job)
                self._place(jobs)
            finally:
                for job in jobs:
                    if job.staged is not None and not job.staged.placed:
                        job.staged.discard()
                    outcomes.append(job.error or job.resolution)
        return cast("list[Resolution[DocumentPath] | Exception]", outcomes)

    def _lock_all(self, stack: ExitStack, jobs: Sequence[CommitJob]) -> None:
        """Lock each job's places, and complete the groups of dead writers there.

        The ``error`` of a job whose lock is taken is a ``LockTimeoutError``.
        """
        directory = self._directory
        while True:
            with ExitStack() as attempt:
                locked: set[str] = set()
                for job in jobs:
                    job.resolution = job.staged = job.error = None
                    names = {*map(_LOCK_NAME, job.places)}
                    try:
                        for name in sorted(names - self._held.keys()):
                            attempt.callback(self._take_lock(name).release)
                        locked |= names
                    except AgentStateError as error:
                        job.error = error
                listing = fileio.list_folder(directory.journal)
                unfinished = group_writer.records_of(directory, locked) if listing else []
                if not unfinished:
                    stack.push(attempt.pop_all())
                    return
            for record in unfinished:
                group_writer.complete(directory, record, held=locked & self._held.keys())

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
                    message = f"not free within {self._timeout:g} s"
                    raise LockTimeoutError(message, path=error.path) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS_MAX)

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        at = self._directory.locate(kind, key)
        return await self._until_free(partial(self._reader.run, partial(self._get, at)))

    def _get(self, at: DocumentPath) -> Document | None:
        """The document, after the groups of dead writers. Raises ``StateCorruptedError``."""
        directory = self._directory
        listing = fileio.list_folder(directory.journal)
        for record in group_writer.records_of(directory, [at.lock_name]) if listing else ():
            with contextlib.suppress(LockTimeoutError):  # its writer lives, or another is at it
                group_writer.complete(self._directory, record)
        try:
            stored = self._directory.documents.read(at)
        except StateCorruptedError as error:
            stored = self._repair(at, error)
        return stored.document if stored else None

    def _repair(self, at: DocumentPath, found: StateCorruptedError) -> StoredDocument | None:
        """Read again under the lock; quarantine what is still damaged, restore its snapshot."""
        with self._locked(at.lock_name):
            try:
                return self._directory.documents.read(at)
            except StateCorruptedError as error:
                stored = self._directory.documents.quarantine_and_restore(at, error.message)
        if stored is None:
            raise found
        return stored

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock in a thread. Raises ``LockTimeoutError`` at once when it is taken."""
        lock = None if name in self._held else self._take_lock(name)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._reader.keys(kind, prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._reader.logs(kind, prefix)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        keys = await self._reader.keys(kind, prefix)
        for start in range(0, len(keys), SCAN_BATCH):
            places = [self._directory.locate(kind, key) for key in keys[start : start + SCAN_BATCH]]
            work = partial(self._reader.readable, places, self._get)
            for document in await self._until_free(partial(self._reader.run, work)):
                yield document

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        return self._reader.read_log(kind, key, after=after, last=last)

    def incidents(self) -> list[Incident]:
        return list(self._directory.incidents)

    async def watch(self) -> Subscription:
        return await self._reader.watch()

    async def origin(self) -> Origin:
        return await asyncio.to_thread(self._directory.origin)

    # -- locking, erasing, quarantine ------------------------------------------------------------

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        executor = self._reader.executor
        name = paths.lock_name(kind, key)
        async with self._task_locks.hold([name]):
            if name in self._held:
                yield
                return
            try:
                hold = partial(self._reader.run, partial(self._hold, name))
                await self._until_free(hold)
                yield
            finally:
                # Cancelled while it was being taken, it is held all the same.
                lock = self._held.pop(name, None)
                if lock is not None:
                    await executor.run(lock.release)

    def _hold(self, name: str) -> None:
        """Take a lock, with the groups of dead writers completed, and keep it in ``_held``."""
        while True:
            lock = self._take_lock(name)
            try:
                unfinished = group_writer.records_of(self._directory, [name])
            except BaseException:
                lock.release()
                raise
            if not unfinished:
                self._held[name] = lock
                return
            lock.release()
            for record in unfinished:
                group_writer.complete(self._directory, record)

    async def flush(self) -> None:
        """Nothing is outstanding: each commit brings its files to their place."""

    async def erase(self, kind: str, key: Key) -> int:
        name = paths.lock_name(kind, key)
        with concerning(kind, key):
            async with self._task_locks.hold([name]):
                work = partial(self._reader.run, partial(self._erase, kind, key, name))
                documents, logs = await self._until_free(work)
        for erased in documents:
            self._reader.watcher.notify(Notice(kind, erased, None))
        return len(documents) + logs

    def _erase(self, kind: str, key: Key, name: str) -> tuple[list[Key], int]:
        with self._locked(name):
            return erase(self._directory, kind, key)

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        at = self._directory.locate(kind, key)
        with concerning(kind, key):
            async with self._task_locks.hold([at.lock_name]):
                work = partial(self._reader.run, partial(self._quarantine, at, reason, version))
                return await self._until_free(work)

    def _quarantine(
        self, at: DocumentPath, reason: str, version: Document | None
    ) -> Document | None:
        with self._locked(at.lock_name):
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

    def find(self, place: DocumentPath, dedupe_key: str) -> int | None:
        return self.directory.logs.writer(place).find(dedupe_key)
