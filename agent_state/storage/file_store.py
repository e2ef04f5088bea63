"""The shared store: any number of processes write, one atomic file at a time.

The file is the truth and is visible when ``commit`` returns. A group writes an intent record
first; whoever comes next completes the intent of a process that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from os.path import dirname
from typing import TypeVar

import aiofiles

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
from agent_state.protocols import Append, Change, Document, Incident, LogRecord, Notice
from agent_state.storage import fileio, locks, logs, paths, redo, syscalls, wal
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedPut,
    id_of,
    notice_of,
    plan,
)
from agent_state.storage.checkpoint import Checkpointer, recover
from agent_state.storage.directory import (
    JOURNAL,
    LOCKS,
    BaseStamps,
    StateDirectory,
    StoredDocument,
    erase,
)
from agent_state.storage.document import encode_document
from agent_state.storage.executor import Batcher, Executor, shielded
from agent_state.storage.fileio import Stamp
from agent_state.storage.locks import TaskLocks
from agent_state.storage.tree import is_forbidden
from agent_state.storage.watch import DirectoryWatcher, Subscription

T = TypeVar("T")

LOCK_SECONDS = 10.0
WRITERS = 4
"""Threads that write at once."""
BATCH_COMMITS = 16
"""The most commits of one batch."""
_POLL_SECONDS, _POLL_SECONDS_MAX = 0.001, 0.016
_SCAN_BATCH = 256
_CHUNK = 256 * 1024
_LINES_TOLD = 100
"""So many bad lines of a log are told one by one; a log may have millions."""


class FileStateStore:
    """Documents and logs as files that several processes may write.

    ``durability``: ``"fsync"`` survives power loss, ``"os"`` only the death of processes.
    Raises ``StateDirectoryInUseError`` at ``open`` when another
    process owns the directory.
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
        self._locks = f"{self._directory.root}/{LOCKS}"
        self._gates = TaskLocks(lock_timeout_seconds)
        self._committer = Committer(self._directory, self._now)
        self._batches: Batcher[Job, Committed] | None = None
        self._watching = DirectoryWatcher(self._directory)
        self._pool: Executor | None = None
        self._membership: locks.FileLock | None = None
        self._lines_told: dict[str, set[str]] = {}

    @property
    def root(self) -> str:
        """The state directory, as an absolute path."""
        return self._directory.root

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._pool is None:
            self._pool = Executor("files", 8)
            try:
                await self._pool.run(self._open)
            except asyncio.CancelledError:
                await shielded(self._end())  # by now it has been opened
                raise
            except BaseException:
                self._drop_pool()
                raise
            self._batches = Batcher(self._start_batch, max_items=BATCH_COMMITS, workers=WRITERS)

    def _start_batch(self, jobs: list[Job]) -> Awaitable[list[Committed | Exception]]:
        return self._running().run(partial(self._committer.commit_all, jobs))

    async def close(self) -> None:
        await shielded(self._end())

    async def _end(self) -> None:
        pool = self._pool
        if pool is None:
            return
        try:
            try:
                await self._watching.close()
            finally:
                if self._batches is not None:
                    await self._batches.ended()
                self._pool = None  # who still reads begins nothing more
                await pool.ended()
                await pool.run(self._close)
        finally:
            await pool.ended()
            self._pool = None
            pool.close()

    def _open(self) -> None:
        self._directory.prepare()
        if wal.segments(f"{self.root}/{JOURNAL}"):
            self._recover_journal()
        self._membership = locks.acquire_shared(self._locks)
        try:
            redo.complete_dead(self._directory)
            alone_since = locks.only_writer_since(self._membership)
            if alone_since is not None:
                self._directory.remove_temporaries(before_ns=alone_since)
        except BaseException:
            self._close()
            raise

    def _recover_journal(self) -> None:
        """Bring the journal of an owner that died to the files, as the owner of a moment."""
        owner = locks.acquire_exclusive(self._locks)
        checkpointer = Checkpointer(self._directory, durable=self._directory.sync, accept=None)
        try:
            recover(self._directory, checkpointer)
        finally:
            checkpointer.unsynced.close()
            owner.release()

    def _close(self) -> None:
        self._committer.let_go()
        if self._membership is not None:
            locks.release_shared(self._membership)
            self._membership = None

    def _drop_pool(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.close()

    def _running(self) -> Executor:
        if self._pool is None:
            raise AgentStateError("the store is not open", path=self.root)
        return self._pool

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        paths.relative(kind, key, paths.DOCUMENT)
        return await self._run_patiently(partial(self._get, kind, key))

    def _get(self, kind: str, key: Key) -> Document | None:
        for intent in redo.touching(self._directory, [redo.lock_name(kind, key)]):
            with contextlib.suppress(LockTimeoutError):  # its writer lives, or somebody is at it
                redo.complete(self._directory, intent)
        try:
            stored = self._directory.read(kind, key)
        except StateCorruptedError as error:
            stored = self._contain(kind, key, error)
        return stored.document if stored else None

    def _contain(self, kind: str, key: Key, found: StateCorruptedError) -> StoredDocument | None:
        """Look again under the lock; if it is still damaged, put it aside."""
        with ExitStack() as stack:
            self._committer.lock(stack, [redo.lock_name(kind, key)])
            try:
                return self._directory.read(kind, key)
            except StateCorruptedError as error:
                stored = self._directory.quarantine_and_restore(kind, key, error.message)
        if stored is None:
            raise found
        return stored

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._running().run(partial(self._directory.keys, kind, prefix))

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._running().run(partial(self._directory.keys, kind, prefix, paths.LOG))

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        keys = await self.keys(kind, prefix)
        for start in range(0, len(keys), _SCAN_BATCH):
            batch = keys[start : start + _SCAN_BATCH]
            for document in await self._run_patiently(partial(self._load, kind, batch)):
                yield document

    def _load(self, kind: str, keys: Iterable[Key]) -> list[Document]:
        found = []
        for key in keys:
            try:
                document = self._get(kind, key)
            except StateCorruptedError:
                continue  # contained, and told in incidents()
            except StorageError as error:
                if not is_forbidden(error):
                    raise
                self._directory.report_forbidden(kind, key, error)
                continue
            if document is not None:
                found.append(document)
        return found

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        path = self._directory.path(kind, key, paths.LOG)
        work = partial(self._seek, path, after, last)
        after, offset, previous, end = await self._running().run(work)
        if offset >= end:
            return
        splitter = logs.Splitter()
        async for piece in _pieces(path, offset, end):
            for line in splitter.feed(piece):
                try:
                    record = logs.decode_line(line, previous)
                except StateCorruptedError as error:
                    self._report_line(kind, key, previous, error)
                    continue
                previous = record.seq
                if record.seq > after:
                    yield record

    def _seek(self, path: str, after: int, last: int | None) -> tuple[int, int, int, int]:
        fileio.has_folders(self.root, path)
        if last is not None:
            after = max(after, logs.last_seq(path) - last)
        return after, *logs.seek(path, after=after)

    def _report_line(self, kind: str, key: Key, previous: int, error: AgentStateError) -> None:
        path = paths.relative(kind, key, paths.LOG)
        told = self._lines_told.setdefault(path, set())
        what = f"the line after record {previous} cannot be read: {error.message}"
        if what in told or len(told) > _LINES_TOLD:
            return
        told.add(what)
        if len(told) > _LINES_TOLD:
            what = f"more than {_LINES_TOLD} lines cannot be read"
        self._directory.incidents.append(Incident(what, kind, key, path))

    def incidents(self) -> list[Incident]:
        return list(self._directory.incidents)

    async def watch(self) -> Subscription:
        await self._watching.start(self._running())
        return self._watching.listen()

    # -- writing -------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if not changes:
            return []
        with concerning(changes[0].kind, changes[0].key):
            return await self._commit(changes)

    async def _commit(self, changes: Sequence[Change]) -> list[int]:
        self._running()
        batches = self._batches
        if batches is None:
            raise AgentStateError("the store is not open", path=self.root)
        names = frozenset(redo.lock_name(change.kind, change.key) for change in changes)
        async with self._gates.hold(names):
            numbers, done = await self._patiently(lambda: batches.submit((changes, names)))
            for change in done:
                self._watching.tell(notice_of(change))
            return numbers

    async def _patiently(self, start: Callable[[], Awaitable[T]]) -> T:
        """Start work that gives up where a lock is taken, again until the lock is free."""
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

    async def _run_patiently(self, work: Callable[[], T]) -> T:
        return await self._patiently(lambda: self._running().run(work))

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        pool = self._running()
        name = redo.lock_name(kind, key)
        async with self._gates.hold([name]):
            if name in self._committer.held:
                yield
                return
            try:
                await self._run_patiently(partial(self._committer.hold, name))
                yield
            finally:
                # Cancelled while it was being taken, it is held all the same.
                lock = self._committer.held.pop(name, None)
                if lock is not None:
                    await pool.run(lock.release)

    async def flush(self) -> None:
        """Nothing is outstanding: each commit brings its files to their place."""

    async def erase(self, kind: str, key: Key) -> int:
        paths.relative(kind, key, paths.DOCUMENT)
        name = redo.lock_name(kind, key)
        with concerning(kind, key):
            async with self._gates.hold([name]):
                documents, logs = await self._erase(kind, key, name)
        for gone in documents:
            self._watching.tell(Notice(kind, gone, None))
        return len(documents) + logs

    async def _erase(self, kind: str, key: Key, name: str) -> tuple[list[Key], int]:
        def work() -> tuple[list[Key], int]:
            with ExitStack() as stack:
                self._committer.lock(stack, [name])
                return erase(self._directory, kind, key)

        return await self._run_patiently(work)

    async def quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        with concerning(kind, key):
            return await self._quarantine(kind, key, reason)

    async def _quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        name = redo.lock_name(kind, key)
        async with self._gates.hold([name]):
            return await self._run_patiently(partial(self._put_aside, kind, key, reason, name))

    def _put_aside(self, kind: str, key: Key, reason: str, name: str) -> Document | None:
        with ExitStack() as stack:
            self._committer.lock(stack, [name])
            stored = self._directory.quarantine_and_restore(kind, key, reason)
        return stored.document if stored else None

    def _now(self) -> str:
        return stamp(self._clock.now())


async def _pieces(path: str, offset: int, end: int) -> AsyncIterator[bytes]:
    """The bytes of a log between two offsets. Raises ``StorageError``, ``StateCorruptedError``."""
    try:
        async with aiofiles.open(path, "rb", opener=_open_for_reading) as file:
            await file.seek(offset)
            while offset < end and (piece := await file.read(min(_CHUNK, end - offset))):
                offset += len(piece)
                yield piece
    except AgentStateError:
        raise
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error


def _open_for_reading(name: str, _: int) -> int:
    return fileio.open_regular(name, syscalls.READ)[0]


Job = tuple[Sequence[Change], frozenset[str]]
"""A commit's changes and the names of the locks they need."""
Committed = tuple[list[int], list[ResolvedChange]]


class Committer:
    """Changes files under their locks. ``held``: the locks that this process keeps meanwhile."""

    def __init__(self, directory: StateDirectory, now: Callable[[], str]) -> None:
        self._directory = directory
        self._now = now
        self.held: dict[str, locks.FileLock] = {}

    def commit_all(self, jobs: Sequence[Job]) -> list[Committed | Exception]:
        """Each commit for itself, and what single documents need fsync for, together."""
        while True:
            with ExitStack() as stack:
                refused = [self._lock_job(stack, names) for _, names in jobs]
                locked = {
                    name
                    for (_, names), refusal in zip(jobs, refused, strict=True)
                    if refusal is None
                    for name in names
                }
                left = redo.touching(self._directory, locked)
                if not left:
                    return self._write_all(jobs, refused)
            for intent in left:
                redo.complete(self._directory, intent, held=locked & self.held.keys())

    def _lock_job(self, stack: ExitStack, names: Iterable[str]) -> Exception | None:
        try:
            self.lock(stack, names)
        except AgentStateError as error:
            return error
        return None

    def _write_all(
        self, jobs: Sequence[Job], refused: Sequence[Exception | None]
    ) -> list[Committed | Exception]:
        results: list[Committed | Exception] = []
        staged: dict[int, StagedFile] = {}
        try:
            for index, ((changes, _), refusal) in enumerate(zip(jobs, refused, strict=True)):
                if refusal is not None:
                    results.append(refusal)
                    continue
                try:
                    base = _OnDisk(self._directory)
                    numbers, done = plan(changes, base, self._now())
                    self._confirm(changes, done)
                    if len(done) == 1 and isinstance(done[0], ResolvedPut):
                        staged[index] = stage(self._directory, done[0], base.base_stamps)
                    elif done:
                        self._apply(done, base.base_stamps)
                    results.append((numbers, done))
                except Exception as error:  # noqa: BLE001  # that job's own; the others go on
                    results.append(error)
        except BaseException:
            discard(staged.values())
            raise
        publish(self._directory, list(staged.values()))
        for index, document in staged.items():
            if document.error is not None:
                results[index] = document.error
        return results

    def _confirm(self, changes: Sequence[Change], done: Sequence[ResolvedChange]) -> None:
        """What is found done already is made durable: an earlier try may not have come so far."""
        if len(done) < len(changes):
            to_do = {id_of(change) for change in done}
            for change in changes:
                if (change.kind, change.key) not in to_do:
                    ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
                    self._directory.ensure_synced(change.kind, change.key, ending)

    def _apply(self, done: Sequence[ResolvedChange], base_stamps: BaseStamps) -> None:
        if len(done) > 1:
            redo.apply_group(self._directory, done, base_stamps)
            return
        [change] = done
        if isinstance(change, ResolvedAppend):
            log = self._directory.log(change.kind, change.key)
            self._directory.make_parent(log.path)
            log.append([change.record], sync=self._directory.sync)
        elif not isinstance(change, ResolvedPut):
            self._directory.remove(change.kind, change.key)

    def lock(self, stack: ExitStack, names: Iterable[str]) -> None:
        """Take the locks that this process does not hold. Raises ``LockTimeoutError``."""
        for name in sorted(names):
            if name not in self.held:
                stack.callback(redo.take_lock(self._directory, name).release)

    def hold(self, name: str) -> None:
        """Take the lock and keep it, until it is taken out of ``held`` and released."""
        self.held[name] = self._take(name)

    def let_go(self) -> None:
        """Release what is still held: nobody can write any more."""
        while self.held:
            self.held.popitem()[1].release()

    def _take(self, name: str) -> locks.FileLock:
        """The lock, with nothing that a dead writer left half done behind it."""
        while True:
            lock = redo.take_lock(self._directory, name)
            try:
                left = redo.touching(self._directory, [name])
            except BaseException:
                lock.release()
                raise
            if not left:
                return lock
            lock.release()
            for intent in left:
                redo.complete(self._directory, intent)


class _OnDisk:
    """What the files hold, as the base of a commit. Called under the locks."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory
        self.base_stamps: BaseStamps = {}

    def current(self, kind: str, key: Key) -> StoredDocument | None:
        try:
            stored = self._directory.read(kind, key)
        except StateCorruptedError as error:
            stored = self._directory.quarantine_and_restore(kind, key, error.message)
        self.base_stamps[kind, key] = stored.stamp if stored is not None else None
        return stored

    def floor(self, kind: str, key: Key) -> int:
        return 0

    def last_seq(self, kind: str, key: Key) -> int:
        return self._directory.log(kind, key).tail().seq

    def find(self, kind: str, key: Key, dedupe_key: str) -> int | None:
        return self._directory.log(kind, key).find(dedupe_key)


@dataclass(slots=True)
class StagedFile:
    """A document's new file, written and not yet in its place. ``error``: why it never came."""

    change: ResolvedPut
    path: str
    temporary: str
    fd: int
    stamp: Stamp
    base_stamps: Stamp | None
    published: bool = False
    error: AgentStateError | None = None

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            syscalls.close(fd)


def stage(directory: StateDirectory, change: ResolvedPut, base_stamps: BaseStamps) -> StagedFile:
    """Write a document's bytes beside its place. Raises ``StorageError``."""
    document = change.document
    path = directory.path(document.kind, document.key)
    data = encode_document(document, change.meta)
    try:
        directory.make_parent(path)
        try:
            temporary, fd, stamp = fileio.write_temp(path, data)
        except FileNotFoundError:
            directory.make_parent(path)
            temporary, fd, stamp = fileio.write_temp(path, data)
    except OSError as error:
        raise storage_error(
            error, "writing a file", kind=document.kind, key=document.key, path=path
        ) from error
    return StagedFile(change, path, temporary, fd, stamp, base_stamps[document.kind, document.key])


def publish(directory: StateDirectory, batch: Sequence[StagedFile]) -> None:
    """Bring all of them to their places; one that fails says so and does not stop the others."""
    try:
        for staged in batch:
            _try(staged, partial(_finish, staged, sync=directory.sync))
        for staged in batch:
            _try(staged, partial(_rename, directory, staged))
    finally:
        discard(staged for staged in batch if not staged.published)
    if directory.sync:
        for folder in dict.fromkeys(dirname(staged.path) for staged in batch if not staged.error):
            try:
                fileio.sync_directory(folder)
            except DurabilityUnknownError as error:
                for staged in batch:
                    if dirname(staged.path) == folder:
                        staged.error = staged.error or error


def discard(batch: Iterable[StagedFile]) -> None:
    """Remove what was staged and will not be published."""
    for staged in batch:
        fileio.discard(staged.temporary)
        with contextlib.suppress(OSError):  # there is nothing in it that is still wanted
            staged.close()


def _try(staged: StagedFile, step: Callable[[], None]) -> None:
    if staged.error is None:
        try:
            step()
        except OSError as error:
            document = staged.change.document
            staged.error = storage_error(
                error, "writing a file", kind=document.kind, key=document.key, path=staged.path
            )
            staged.error.__cause__ = error


def _finish(staged: StagedFile, *, sync: bool) -> None:
    try:
        if sync:
            syscalls.fdatasync(staged.fd)
    finally:
        staged.close()


def _rename(directory: StateDirectory, staged: StagedFile) -> None:
    directory.snapshots.keep(staged.path)
    directory.keep_foreign_edit(staged.path, staged.change.document, staged.base_stamps)
    directory.expect(staged.path, staged.stamp)
    syscalls.rename(staged.temporary, staged.path)
    staged.published = True
    change = staged.change
    directory.note_document(staged.path, change.document, change.meta, staged.stamp)
