"""From the journal to the files: each changed document brought to its readable place.

The journal has made the changes durable; here they are written without fsync, and ``sync``
makes all of them durable together before a segment may go. A file that somebody else has
changed in the meantime is read first. Everything here blocks and runs in one thread at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from agent_state.clock import Clock, stamp
from agent_state.errors import AgentStateError, Key, StateCorruptedError, StorageError
from agent_state.protocols import Document, DocumentId, Incident, LogRecord
from agent_state.storage import fileio, locks, paths, redo, wal
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    id_of,
)
from agent_state.storage.directory import JOURNAL, LOCKS, StateDirectory, StoredDocument
from agent_state.storage.document import encode_document
from agent_state.storage.fileio import PendingSync, Stamp
from agent_state.storage.memtable import MemTable
from agent_state.storage.wal import GroupCommit

Accept = Callable[[Document], None]
"""Raises an ``AgentStateError`` when a document that somebody else wrote must not be used."""


class Checkpointer:
    """Writes what the journal holds, and knows which files are not yet durable."""

    def __init__(self, directory: StateDirectory, *, durable: bool, accept: Accept | None) -> None:
        self.journal = f"{directory.root}/{JOURNAL}"
        self._directory = directory
        self.durable = durable
        self._accept = accept
        self.unsynced = PendingSync(directory.root)
        self._recovering = False

    def put(self, change: ResolvedPut) -> StoredDocument | None:
        """Write the document; the edit that won instead, if somebody made one that is newer."""
        document = change.document
        path = self._directory.path(document.kind, document.key)
        stamp = fileio.stat_file(path)
        known = self._directory.seen.get(path)
        if stamp is not None and stamp != known:
            theirs, stamp = self._theirs(change, expected=known is not None)
            if theirs is not None:
                self.unsynced.note_file(path)
                return theirs
        self._directory.write(document, change.meta, stamp)
        self.unsynced.note_file(path)
        return None

    def delete(self, change: ResolvedDelete) -> StoredDocument | None:
        """Remove the document; the edit that is newer than what was deleted, if there is one."""
        path = self._directory.path(change.kind, change.key)
        stamp = fileio.stat_file(path)
        if stamp is not None and stamp != self._directory.seen.get(path):
            try:
                stored = self._directory.read(change.kind, change.key)
            except StateCorruptedError as error:
                if not self._is_unfinished(path, b""):
                    kind, key = change.kind, change.key
                    self._directory.put_aside(kind, key, error.message, restored=False)
                    return None
                stored = None
            if stored is not None and stored.document.revision > change.revision:
                self._directory.mark_seen(path, stored.stamp)
                self.unsynced.note_file(path)
                return stored
            if stored is not None and stored.document.edited:
                reason = f"changed outside, while revision {change.revision} was being deleted"
                self._directory.put_aside(change.kind, change.key, reason, restored=False)
                self.unsynced.note_folder(os.path.dirname(path))
                return None
        self._directory.remove(change.kind, change.key)
        self.unsynced.note_folder(os.path.dirname(path))
        return None

    def append(self, place: DocumentId, records: Sequence[LogRecord]) -> None:
        """Add those records that the log does not hold yet."""
        log = self._directory.log(*place)
        seq = log.tail().seq
        # After a segment in doubt the next one says again what the first has said.
        fresh = {record.seq: record for record in records if record.seq > seq}
        if fresh:
            self._directory.make_parent(log.path)
            log.append([fresh[number] for number in sorted(fresh)], sync=False)
        self.unsynced.note_file(log.path)

    def sync(self) -> None:
        """Make everything written so far durable. Raises ``StorageError``; then all stays due."""
        if self.durable:
            self.unsynced.sync()
        else:
            self.unsynced.forget()

    def rewrite_doubtful(self) -> None:
        """Write the files whose fsync failed once more, from the journal that still has them."""
        fsync_failed = self.unsynced.fsync_failed
        if not fsync_failed:
            return
        for path in fsync_failed:
            if path.endswith(paths.LOG):
                fileio.rewrite(path)  # what the kernel has dropped, the journal has
        for segment in wal.segments(self.journal):
            for record in wal.read_segment(segment).records:
                for change in record:
                    if isinstance(change, ResolvedPut):
                        self._rewrite(change)
                    elif isinstance(change, ResolvedAppend):
                        self._rewrite_record(change)
        fsync_failed.clear()

    def _rewrite(self, change: ResolvedPut) -> None:
        document = change.document
        path = self._directory.path(document.kind, document.key)
        if path in self.unsynced.fsync_failed:
            stored = self._directory.read(document.kind, document.key)
            if stored is not None and stored.document.revision <= document.revision:
                self._directory.write(document, change.meta)
                self.unsynced.note_file(path)

    def _rewrite_record(self, change: ResolvedAppend) -> None:
        if self._directory.log(change.kind, change.key).path in self.unsynced.fsync_failed:
            self.append((change.kind, change.key), [change.record])

    def recover(self) -> list[str]:
        """Replay all segments into the files; the segments that may be removed after ``sync``."""
        found = wal.segments(self.journal)
        if self.durable:
            wal.make_durable(found, self.journal)
        gone = []
        replay = Replay(self, self._directory)
        for path in found:
            try:
                segment = wal.read_segment(path)
            except StateCorruptedError as error:  # no file at all
                replay.later.append((path, error.message))
                continue
            for record in segment.records:
                for change in record:
                    replay.add(change)
            if segment.damaged:
                reason = f"{segment.damaged} records cannot be read; the others were replayed"
                replay.later.append((path, reason))
            else:
                gone.append(path)
        self._recovering = True
        try:
            replay.finish()
        finally:
            self._recovering = False
        return gone

    def _theirs(
        self, change: ResolvedPut, *, expected: bool
    ) -> tuple[StoredDocument | None, Stamp | None]:
        """Somebody else's version of the file, if it wins; if it loses, it is put aside.

        And which version of the file may be replaced then; None for none.
        """
        document = change.document
        path = self._directory.path(document.kind, document.key)
        self._directory.forget(document.kind, document.key)
        try:
            stored = self._directory.read(document.kind, document.key)
            if stored is None:
                return None, None
            if stored.document.revision >= document.revision:
                if stored.document.body == document.body:
                    self._directory.mark_seen(path, stored.stamp)
                    return stored, stored.stamp
                if self._accept is not None:
                    self._accept(stored.document)
                self._directory.mark_seen(path, stored.stamp)
                return stored, stored.stamp
            if not expected and not stored.document.edited:
                return None, stored.stamp  # an earlier version of ours, from before this process
            reason = (
                f"changed outside at revision {stored.document.revision}, "
                f"while revision {document.revision} was being saved"
            )
        except StateCorruptedError as error:
            if self._is_unfinished(path, encode_document(document, change.meta)):
                return None, fileio.stat_file(path)
            reason = error.message
        except StorageError:
            raise  # a disk that cannot be read says nothing about what is on it
        except AgentStateError as error:
            reason = f"changed outside, and not usable: {error.message}"
        self._directory.put_aside(document.kind, document.key, reason, restored=True)
        return None, None

    def _is_unfinished(self, path: str, ours: bytes) -> bool:
        """Whether a power cut left nothing, NULs, or the beginning of our own unsynced file."""
        if not self._recovering:
            return False
        try:
            found = fileio.read_file(path)
        except StateCorruptedError:
            return False
        return found is not None and ours.startswith(found[0].rstrip(b"\0"))


class Replay:
    """The journal's changes, brought together to the last of each document."""

    def __init__(self, checkpointer: Checkpointer, directory: StateDirectory) -> None:
        self._settler = checkpointer
        self._directory = directory
        self._last: dict[DocumentId, ResolvedPut | ResolvedDelete] = {}
        self._deleted: dict[DocumentId, int] = {}
        self._records: dict[DocumentId, list[LogRecord]] = {}
        self.later: list[tuple[str, str]] = []

    def add(self, change: ResolvedChange) -> None:
        if isinstance(change, ResolvedAppend):
            self._records.setdefault((change.kind, change.key), []).append(change.record)
        elif isinstance(change, ResolvedPut):
            document = change.document
            place = (document.kind, document.key)
            last = self._last.get(place)
            # After a failed batch a revision is never given twice, so the higher one is later.
            if not isinstance(last, ResolvedPut) or last.document.revision < document.revision:
                self._last[place] = change
        else:
            place = (change.kind, change.key)
            self._last[place] = change
            self._deleted[place] = max(change.revision, self._deleted.get(place, 0))

    def finish(self) -> None:
        retry_after_clearing_path = self._directory.retry_after_clearing_path
        for place, change in self._last.items():
            if isinstance(change, ResolvedPut):
                retry_after_clearing_path(partial(self._put, place, change))
            else:
                retry_after_clearing_path(partial(self._settler.delete, change))
        for place, records in self._records.items():
            retry_after_clearing_path(partial(self._append, place, records))
        for path, reason in self.later:
            kept = self._directory.quarantine_dir.move(path, reason)
            self._directory.incidents.append(
                Incident(reason, path=self._directory.relative(path), kept=kept)
            )

    def _put(self, place: DocumentId, change: ResolvedPut) -> None:
        try:
            stored = self._directory.read(*place)
        except StateCorruptedError:
            stored = None  # the checkpointer puts it aside and writes ours
        if stored is not None and not stored.document.edited:
            # A document deleted and made anew counts its revisions from 1 again.
            reborn = stored.document.revision <= self._deleted.get(place, 0)
            path = self._directory.path(*place)
            if stored.document.revision >= change.document.revision and not reborn:
                # Written by a process that died, which may not have come to its fsync.
                self._settler.unsynced.note_file(path)
                return
            self._directory.mark_seen(path, stored.stamp)
        self._settler.put(change)

    def _append(self, place: DocumentId, records: Sequence[LogRecord]) -> None:
        """Add what the log does not hold, or holds torn: nothing of this had to be synced."""
        first = min(record.seq for record in records)
        behind = self._directory.log(*place).cut_damage(first - 1)
        self._settler.append(place, [*behind, *records])


def settle(
    checkpointer: Checkpointer, changes: Iterable[ResolvedPut | ResolvedDelete]
) -> dict[DocumentId, StoredDocument | AgentStateError | None]:
    """Settle documents one after another: for each the edit that won, or why it could not be done.

    One that finds something in its way does not keep the others from their files.
    """
    results: dict[DocumentId, StoredDocument | AgentStateError | None] = {}
    for change in changes:
        place = id_of(change)
        try:
            if isinstance(change, ResolvedPut):
                results[place] = checkpointer.put(change)
            else:
                results[place] = checkpointer.delete(change)
        except AgentStateError as error:
            results[place] = error
    return results


def recover(directory: StateDirectory, checkpointer: Checkpointer) -> None:
    """Complete what a crash left, as the directory's owner. Doing it twice changes nothing."""
    sync, directory.sync = directory.sync, checkpointer.durable
    try:
        redo.complete_dead(directory)  # no journal vouches for these
    finally:
        directory.sync = sync
    if checkpointer.durable:
        checkpointer.unsynced.watch_errors()
    replayed = checkpointer.recover()
    checkpointer.sync()
    wal.remove_segments(replayed, checkpointer.journal, sync=checkpointer.durable)


SETTLE_SECONDS = 0.05
SETTLE_SECONDS_MAX = 0.5
IDLE_SECONDS = 1.0
_RETRY_SECONDS = 1.0
_SETTLE_BATCH = 64

_logger = logging.getLogger("agent_state.storage")

T = TypeVar("T")


class Run(Protocol):
    """Does blocking work in a thread of the store's own."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class CheckpointScheduler:
    """Settles what is durable in the journal alone.

    ``edited(document)`` is called for each edit by somebody else that won over a change of ours.
    ``segment_bytes``: a segment that is longer is sealed, settled and removed.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        versions: MemTable,
        commits: GroupCommit,
        run: Run,
        *,
        segment_bytes: int,
        edited: Callable[[Document], None],
    ) -> None:
        self.lock = asyncio.Lock()
        """Held by whoever writes files."""
        self._settler = checkpointer
        self._versions = versions
        self._commits = commits
        self._run = run
        self._segment_bytes = segment_bytes
        self._edited = edited
        self._stirred = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Settle from now on: 50 ms after a change, under load a fifth of the time at most."""
        self._task = asyncio.create_task(self._settle_forever(), name="agent-state-settle")

    def stir(self) -> None:
        """There is something to settle."""
        self._stirred.set()

    async def stop(self) -> None:
        """Settle no more in the background."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def checkpoint(self, segments: list[str] | None = None) -> None:
        """Bring all that the journal holds to durable files, and remove its segments.

        Called under ``lock``, from sealing to removing: else another one could remove a new
        segment by an old one's name, or call a file durable that was written since.
        ``segments``: all there are, once the journal is closed.
        """
        sealed = await self._commits.seal() if segments is None else segments
        await self.settle_all()
        await self._run(partial(self._sync_and_remove, sealed))

    def _sync_and_remove(self, sealed: list[str]) -> None:
        checkpointer = self._settler
        checkpointer.rewrite_doubtful()
        checkpointer.sync()
        wal.remove_segments(sealed, checkpointer.journal, sync=checkpointer.durable)

    async def settle_all(self) -> None:
        """Bring everything unsettled to its file. Raises the first error, after all others."""
        failed: list[AgentStateError] = []
        changes = list(self._versions.dirty.values())
        for start in range(0, len(changes), _SETTLE_BATCH):
            batch = changes[start : start + _SETTLE_BATCH]
            results = await self._run(partial(settle, self._settler, batch))
            for change in batch:
                result = results[id_of(change)]
                if isinstance(result, AgentStateError):
                    failed.append(result)
                else:
                    self._became_clean(change, result)
        for place, waiting in list(self._versions.records.items()):
            records = list(waiting)
            try:
                await self._run(partial(self._settler.append, place, records))
            except AgentStateError as error:
                failed.append(error)
            else:
                self._versions.settled_records(place, len(records))
        if failed:
            raise failed[0]

    def _became_clean(
        self, change: ResolvedPut | ResolvedDelete, won: StoredDocument | None
    ) -> None:
        theirs = won and ResolvedPut(won.document, won.meta)
        if self._versions.became_clean(change, theirs) and theirs is not None:
            self._edited(theirs.document)

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
            began = time.monotonic()
            try:
                async with self.lock:
                    await self.settle_all()
                    if self._commits.journal.size > (0 if idle else self._segment_bytes):
                        await self.checkpoint()
                # Under load a fifth of the time at most: saves of a document settle as one.
                took = time.monotonic() - began
                pause = min(max(SETTLE_SECONDS, 4 * took), SETTLE_SECONDS_MAX)
            except AgentStateError as error:
                # The journal holds everything; the files follow when the disk allows it again.
                _logger.warning("files could not be brought up to date: %s", error)
                pause = _RETRY_SECONDS
                self._stirred.set()


class Restorer:
    """Owns the directory from ``open`` to ``close``; what a journal still holds is settled first.

    Raises ``StateDirectoryInUseError`` while anybody else has it open, and ``StorageError``.
    """

    def __init__(self, root: str, clock: Clock) -> None:
        self._directory = StateDirectory(root, sync=False, now=lambda: stamp(clock.now()))
        self._settler = Checkpointer(self._directory, durable=True, accept=None)
        self._owner: locks.FileLock | None = None

    @property
    def root(self) -> str:
        return self._directory.root

    def open(self) -> None:
        self._directory.prepare()
        self._owner = locks.acquire_exclusive(f"{self.root}/{LOCKS}")
        try:
            recover(self._directory, self._settler)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go, with nothing more made durable than ``sync`` has."""
        self._settler.unsynced.close()
        if self._owner is not None:
            self._owner.release()
            self._owner = None

    def put_back(self, document: Document, meta: Mapping[str, str]) -> bool:
        """Write this version, unless the file is as new, newer, or edited by hand.

        Whether it was written. A file that cannot be read goes to the quarantine.
        """
        kind, key = document.kind, document.key
        try:
            stored = self._directory.read(kind, key)
        except StateCorruptedError as error:
            self._directory.put_aside(kind, key, error.message, restored=True)
            stored = None
        if stored is not None:
            there = stored.document
            older = there.revision < document.revision and there.saved_at <= document.saved_at
            if there.edited or not older:
                return False
        self._directory.write(document, dict(meta))
        self._settler.unsynced.note_file(self._directory.path(kind, key))
        return True

    def append(self, kind: str, key: Key, records: Sequence[LogRecord]) -> None:
        """Add those records that the log does not hold yet."""
        self._settler.append((kind, key), records)

    def last(self, kind: str, key: Key) -> int:
        """The number of a log's last record; 0 for none."""
        return self._directory.log(kind, key).tail().seq

    def sync(self) -> None:
        """Make everything that was put back durable."""
        self._settler.sync()
