"""From the write-ahead log to the files: write-back, checkpoints, recovery.

The log has made the changes durable. Here they are written to their files without fsync; a
checkpoint makes all of them durable together and removes the segments. A file that another process
has changed in the meantime is read first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from agent_state.errors import (
    AgentStateError,
    LockTimeoutError,
    StateCorruptedError,
    StorageError,
    UnmergedStateError,
)
from agent_state.metrics import JournalLag
from agent_state.protocols import Document, DocumentId, LogRecord
from agent_state.storage import barrier, fileio, group_writer, logs, paths, wal
from agent_state.storage.changes import (
    Overlay,
    ResolvedAppend,
    ResolvedDelete,
    ResolvedPut,
    id_of,
)
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document import encode_document
from agent_state.storage.document_files import StoredDocument
from agent_state.storage.executor import end_task, shielded
from agent_state.storage.fileio import PendingSync, Stamp
from agent_state.storage.lineage import FileId, Lineage, bring_records, keep_records
from agent_state.storage.memtable import MemTable
from agent_state.storage.paths import DocumentPath
from agent_state.storage.wal import GroupCommit
from agent_state.storage.worktree import BUSY_SECONDS

Accept = Callable[[Document], None]
"""Raises an ``AgentStateError`` when a document that another process wrote must not be used."""

WRITE_BACK_SECONDS = 0.05
WRITE_BACK_SECONDS_MAX = 0.5
IDLE_SECONDS = 1.0
_RETRY_SECONDS = 1.0
_SHARE_SECONDS = 0.01
_WRITE_BACK_BATCH = 64
_LARGE_BODY = 64 * 1024
_LARGE_BYTES_PER_SECOND = 1024 * 1024
_LARGE_SECONDS_MAX = 2.0

_logger = logging.getLogger("agent_state.storage")

T = TypeVar("T")


class Checkpointer:
    """Writes changes of the log to their files, and knows which files are not yet durable.

    ``durable``: whether anything is fsynced. ``stand()`` raises what keeps this process from
    writing: another may own the directory at its path. Everything here blocks, in one thread at a
    time.
    """

    def __init__(
        self,
        directory: StateDirectory,
        *,
        durable: bool,
        accept: Accept | None,
        stand: Callable[[], None] = lambda: None,
    ) -> None:
        self.durable = durable
        self.stand = stand
        self._directory = directory
        self._documents = directory.documents
        self._accept = accept
        self.share = barrier.Share(directory.locks)
        self._unsynced = PendingSync(directory.root)
        self._recovering = False

    def is_awaiting_git(self) -> bool:
        """Whether a git command is at work in the worktree."""
        return self._directory.worktree.is_busy()

    def close(self) -> None:
        """Close the file system, with nothing more made durable than ``sync`` has."""
        self.share.leave()
        self._unsynced.close()

    # -- one document or log ---------------------------------------------------------------

    def write_back(
        self, changes: Iterable[ResolvedPut | ResolvedDelete]
    ) -> dict[DocumentId, StoredDocument | AgentStateError | None]:
        """Write documents to their files, one after another.

        For each the edit of another process that was newer, or the error; an error does not keep
        the others from their files.
        """
        self._directory.worktree.refresh()
        results: dict[DocumentId, StoredDocument | AgentStateError | None] = {}
        for change in changes:
            place = id_of(change)
            try:
                if not results:
                    self.stand()
                results[place] = self.apply(change)
            except AgentStateError as error:
                results[place] = error
        return results

    def apply(self, change: ResolvedPut | ResolvedDelete) -> StoredDocument | None:
        """Write or remove a document; the edit that was newer instead, if there was one.

        A change of a document whose merge is not resolved, and of one that git has removed, is
        kept in the quarantine.
        """
        at = self._directory.locate(*id_of(change))
        try:
            if isinstance(change, ResolvedPut):
                return self._put(at, change)
            return self._delete(at, change)
        except UnmergedStateError as error:
            self._directory.keep_out(change, f"not written: {error.message}")
            return None

    def _put(self, at: DocumentPath, change: ResolvedPut) -> StoredDocument | None:
        base = fileio.stat_file(at.path)
        known = self._documents.seen.get(at.path)
        edit = None
        if base is None and self._is_removed(at, change):
            self._directory.keep_out(change, "git has removed the document since it was read")
            self._unsynced.note_folder(at.parent)
            return None
        if base is not None and base != known:
            edit, base = self._resolve_edit(at, change, expected=known is not None)
        if edit is None:
            self._documents.write(at, change.document, change.meta, base)
        self._unsynced.note_file(at.path)
        return edit

    def _is_removed(self, at: DocumentPath, change: ResolvedPut) -> bool:
        """Whether git has removed the version that a change replaces; recovery asked before."""
        replaces = change.base != "" and not self._recovering
        return replaces and self._directory.worktree.is_removed(at.path)

    def _delete(self, at: DocumentPath, change: ResolvedDelete) -> StoredDocument | None:
        found = fileio.stat_file(at.path)
        if found is not None and found != self._documents.seen.get(at.path):
            try:
                stored = self._documents.read(at)
            except StateCorruptedError as error:
                if not self._is_unfinished(at.path, b""):
                    self._documents.quarantine(at, error.message, restored=True)
                    return None
                stored = None
            if stored is not None and stored.document.revision > change.revision:
                self._documents.seen.set(at.path, stored.stamp)
                self._unsynced.note_file(at.path)
                return stored
            if stored is not None and stored.document.edited:
                reason = f"changed outside, while revision {change.revision} was being deleted"
                self._documents.quarantine(at, reason, restored=True)
                self._unsynced.note_folder(at.parent)
                return None
        self._documents.delete(at)
        self._unsynced.note_folder(at.parent)
        return None

    def _resolve_edit(
        self, at: DocumentPath, change: ResolvedPut, *, expected: bool
    ) -> tuple[StoredDocument | None, Stamp | None]:
        """The version of another process, if it is newer; an older one is quarantined.

        Else None, and the version of the file that may be replaced; None for no file.
        """
        document = change.document
        self._documents.forget(at)
        try:
            stored = self._documents.read(at)
            if stored is None:
                return None, None
            # A version that was not typed, and is not ours, is a checkout's: the latest word. So is
            # the outcome of a merge that nobody has read: each change is older.
            unread = self._directory.worktree.is_unread(at.path)
            checkout = unread or (expected and not stored.document.edited)
            if checkout or stored.document.revision >= document.revision:
                if stored.document.body != document.body:
                    if self._accept is not None:
                        self._accept(stored.document)
                    if checkout:
                        was = f"revision {stored.document.revision} of {stored.document.saved_at}"
                        self._directory.keep_out(change, f"the file was replaced by {was}")
                self._documents.seen.set(at.path, stored.stamp)
                return stored, stored.stamp
            if not expected and not stored.document.edited:
                return None, stored.stamp  # an earlier version of ours, from before this process
            reason = (
                f"changed outside at revision {stored.document.revision}, "
                f"while revision {document.revision} was being saved"
            )
        except StateCorruptedError as error:
            if self._is_unfinished(at.path, encode_document(document, change.meta)):
                return None, fileio.stat_file(at.path)
            reason = error.message
        except (StorageError, UnmergedStateError, LockTimeoutError):
            raise  # an unreadable disk does not mean a damaged document
        except AgentStateError as error:
            reason = f"changed outside, and not usable: {error.message}"
        self._documents.quarantine(at, reason, restored=True)
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

    def append(
        self,
        place: DocumentId,
        records: Sequence[LogRecord],
        bases: Mapping[int, str] | None = None,
    ) -> tuple[int, str | None] | None:
        """Append those records that the log's file does not have yet.

        ``records`` are ordered; ``bases`` names the lines that some of them, by number, follow.
        After a segment in doubt the next one repeats its records. They are kept in the quarantine
        while a merge of the log is not resolved, or where git has put another branch's log in its
        place. Returns None if the last record ends the log; else its last number, and in a worktree
        its ``logs.end_name``. Without records it raises ``UnmergedStateError``.
        """
        at = self._directory.locate(*place, paths.LOG)
        try:
            return self._append(at, records, bases or {})
        except UnmergedStateError as error:
            if not records:
                raise
            keep_records(self._directory, place, records, f"not written: {error.message}")
            return None

    def _append(
        self, at: DocumentPath, records: Sequence[LogRecord], bases: Mapping[int, str]
    ) -> tuple[int, str | None] | None:
        log = self._directory.logs.writer(at)
        self._unsynced.note_file(log.path)
        ours = bring_records(self._directory, at, records, bases)
        end = log.tail().seq
        if ours and len(ours) == len(records) and end == records[-1].seq:
            return None
        return end, logs.end_name(at.path) if self._directory.worktree.is_there() else None

    def ids(self, place: DocumentId) -> dict[str, int] | None:
        """The dedupe ids of a log, with the numbers of their records; None for a long one."""
        return self._directory.logs.writer(self._directory.locate(*place, paths.LOG)).ids()

    # -- durable ---------------------------------------------------------------------------

    def note_written(self, at: DocumentPath) -> None:
        """Another caller wrote this file; ``sync`` makes it durable."""
        self._unsynced.note_file(at.path)

    def sync(self) -> None:
        """Make everything written so far durable. Raises ``StorageError``; then all stays due."""
        if self.durable:
            self._unsynced.sync()
        else:
            self._unsynced.forget()

    def sync_and_remove(self, segments: list[str]) -> None:
        """Make all files durable, then remove the segments that hold the same changes."""
        self.stand()
        self._rewrite_failed()
        self.sync()
        wal.remove_segments(segments, self._directory.journal, sync=self.durable)

    def _rewrite_failed(self) -> None:
        """Write the files whose fsync failed once more, from the log that still has them."""
        failed = self._unsynced.fsync_failed
        if not failed:
            return
        for path in failed:
            if path.endswith(paths.LOG):
                fileio.rewrite(path)  # what the kernel has dropped, the log has
        appended = Overlay()
        for segment in wal.segments(self._directory.journal):
            for record in wal.read_segment(segment).records:
                for change in record:
                    if isinstance(change, ResolvedPut):
                        self._rewrite(change, failed)
                    elif isinstance(change, ResolvedAppend) and self._log_path(change) in failed:
                        appended.add(change)
        for place, records in appended.records.items():
            self.append(place, records)
        failed.clear()

    def _log_path(self, change: ResolvedAppend) -> str:
        return self._directory.locate(*id_of(change), paths.LOG).path

    def _rewrite(self, change: ResolvedPut, failed: set[str]) -> None:
        at = self._directory.locate(*id_of(change))
        if at.path in failed:
            stored = self._documents.read(at)
            if stored is not None and stored.document.revision <= change.document.revision:
                self._documents.write(at, change.document, change.meta)
                self._unsynced.note_file(at.path)

    # -- after a crash ---------------------------------------------------------------------

    def recover(self) -> None:
        """Complete what a crash left, as the directory's owner. Doing it twice changes nothing.

        1. Complete the redo records of groups. 2. Replay all segments into the files. 3. Fsync the
        files. 4. Remove the segments.
        """
        if self.durable:
            self._unsynced.watch_errors()
        if not fileio.list_folder(self._directory.journal):
            return  # the last owner closed the directory
        # No log has the changes of groups, so they are fsynced one by one.
        group_writer.complete_all(self._directory, sync=self.durable)
        replayed = self._replay_segments()
        self.sync()
        wal.remove_segments(replayed, self._directory.journal, sync=self.durable)

    def _replay_segments(self) -> list[str]:
        """Replay all segments; those that may be removed after ``sync``.

        A damaged segment is quarantined after its intact records were replayed.
        """
        found = wal.segments(self._directory.journal)
        if self.durable:
            wal.make_durable(found, self._directory.journal)
        replayed: list[str] = []
        damaged: list[tuple[str, str]] = []
        overlay, lineage = Overlay(), Lineage()
        for path in found:
            try:
                segment = wal.read_segment(path)
            except StateCorruptedError as error:  # no regular file
                damaged.append((path, error.message))
                continue
            for record in segment.records:
                lineage.add(record)
                overlay.add_record(record)
            if segment.damaged:
                reason = f"{segment.damaged} records cannot be read; the others were replayed"
                damaged.append((path, reason))
            else:
                replayed.append(path)
        self._recovering = True
        try:
            # Where a record is missing, no file is known to be foreign.
            self._replay(overlay, {} if damaged else lineage.foreign(self._directory))
        finally:
            self._recovering = False
        for path, reason in damaged:
            self._directory.quarantine.move(path, reason)
        return replayed

    def _replay(self, overlay: Overlay, foreign: Mapping[FileId, str]) -> None:
        retry = self._directory.retry_after_clearing_path
        for place, change in overlay.documents.items():
            if reason := foreign.get((place, paths.DOCUMENT)):
                self._directory.keep_out(change, reason)
            elif isinstance(change, ResolvedPut):
                retry(partial(self._replay_put, change, overlay))
            else:
                retry(partial(self.apply, change))
        for place, records in overlay.records.items():
            if reason := foreign.get((place, paths.LOG)):
                keep_records(self._directory, place, records, reason)
            else:
                retry(partial(self._replay_records, place, records))

    def _replay_put(self, change: ResolvedPut, overlay: Overlay) -> None:
        at = self._directory.locate(*id_of(change))
        try:
            stored = self._documents.read(at)
        except (StateCorruptedError, UnmergedStateError):
            stored = None  # ``apply`` quarantines it and writes ours, or keeps ours out
        if stored is not None and not stored.document.edited:
            if not overlay.is_newer(change, stored.document):
                # Written by a process that died, maybe before its fsync.
                self._unsynced.note_file(at.path)
                return
            self._documents.seen.set(at.path, stored.stamp)
        self.apply(change)

    def _replay_records(self, place: DocumentId, records: Sequence[LogRecord]) -> None:
        """Append records that the log's file lacks, or has torn: none of it was synced."""
        first = min(record.seq for record in records)
        at = self._directory.locate(*place, paths.LOG)
        numbers = {record.seq: record for record in records}
        behind: list[LogRecord] = []
        with contextlib.suppress(UnmergedStateError):  # ``append`` keeps the records
            behind = self._directory.logs.writer(at).cut_damage(first - 1)
        self.append(place, records)
        others = [each for each in behind if not logs.same(each, numbers.get(each.seq))]
        if others:  # lines of others, which no segment has
            self._directory.logs.writer(at).append(others, sync=False)


class Run(Protocol):
    """Does blocking work in a thread of the store."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class CheckpointScheduler:
    """Writes dirty changes of the mem table back: in the background, and at checkpoints.

    ``edited(document)`` is called for each edit of another process that was newer than a change.
    ``segment_bytes``: a longer segment is sealed, written back and removed.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        memtable: MemTable,
        commits: GroupCommit,
        run: Run,
        *,
        segment_bytes: int,
        edited: Callable[[Document], None],
    ) -> None:
        self.lock = asyncio.Lock()
        """Held by every task that writes files."""
        self.dirty = asyncio.Event()
        """Set when there is something to write back."""
        self._checkpointer = checkpointer
        self._memtable = memtable
        self._commits = commits
        self._run = run
        self._segment_bytes = segment_bytes
        self._edited = edited
        self._task: asyncio.Task[None] | None = None
        self._written_until = time.monotonic()
        """Changes that became durable before are in their files."""
        self._large_bytes = 0
        """The bytes of large documents that the last write-back has written."""

    def start(self) -> None:
        """Write back from now on: 50 ms after a change, under load a fifth of the time at most.

        After large documents everything waits: else their files would take more than the log, which
        has only what changed. All wait together, so that the files have whole groups.
        """
        self._task = asyncio.create_task(self._write_back_forever(), name="agent-state-checkpoints")

    async def stop(self) -> None:
        """End the writing in the background."""
        task, self._task = self._task, None
        if task is not None:
            await end_task(task)

    def lag(self) -> JournalLag:
        """How far the files are behind the log."""
        dirty = self._memtable.dirty
        waiting = len(dirty.documents) + len(dirty.records)
        return JournalLag(waiting, time.monotonic() - self._written_until if waiting else 0.0)

    async def checkpoint(self, segments: list[str] | None = None) -> None:
        """Bring everything in the log to durable files, and remove its segments.

        Called under ``lock``, from sealing to removing: else another task could remove a new
        segment by an old one's name, or take a file for durable that was written since.
        ``segments``: all there are, once the log is closed.
        """
        sealed = await self._commits.seal() if segments is None else segments
        await self._write_back_all()
        await self._run(partial(self._checkpointer.sync_and_remove, sealed))

    async def _write_back_all(self) -> None:
        """Write back, waiting for files that another program seems to be writing."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return await self.write_back()
            except LockTimeoutError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(WRITE_BACK_SECONDS)

    async def write_back(self, documents: Iterable[DocumentId] | None = None) -> None:
        """Bring every dirty change to its file; ``documents``: only theirs. Called under ``lock``.

        Raises the first error, after all others. A caller that is cancelled waits for the files
        that are being written: else the next write-back would write them again.
        """
        dirty = self._memtable.dirty
        if not (dirty.documents or dirty.records or self._commits.log.size):
            self._written_until = time.monotonic()
            return  # the log is empty: nothing is touched, and nobody waits for a note
        try:
            await self._join()
            began, began_ns = time.monotonic(), time.time_ns()
            failed = await self._write_dirty(documents)
            if documents is None and not failed:
                self._written_until = began
                await self._run(partial(self._checkpointer.share.note_settled, began_ns))
        finally:
            await shielded(self._leave())
        if failed:
            raise failed[0]

    async def _write_dirty(self, documents: Iterable[DocumentId] | None) -> list[AgentStateError]:
        """Write one set of complete groups to their files; the errors."""
        failed: list[AgentStateError] = []
        dirty = self._memtable.dirty
        places = dirty.documents if documents is None else documents
        changes = [dirty.documents[place] for place in places]
        sizes = map(_size_of, changes)
        self._large_bytes = sum(size for size in sizes if size >= _LARGE_BODY)
        # Records first: who reads the files has each record that a document names.
        if documents is None and dirty.records:
            await self._run(self._checkpointer.stand)
            for place, waiting in list(dirty.records.items()):
                failed += await shielded(self._write_records(place, list(waiting)))
        for start in range(0, len(changes), _WRITE_BACK_BATCH):
            batch = changes[start : start + _WRITE_BACK_BATCH]
            failed += await shielded(self._write_documents(batch))
        return failed

    async def _join(self) -> None:
        """Join the barrier, after a git command; wait for either for a limited time."""
        deadline = time.monotonic() + BUSY_SECONDS
        while await self._run(self._checkpointer.is_awaiting_git):
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(_SHARE_SECONDS)
        deadline = time.monotonic() + barrier.HOLD_SECONDS
        while not await shielded(self._take_share()):
            if time.monotonic() >= deadline:
                await self._run(self._checkpointer.share.go_on)
                return
            await asyncio.sleep(_SHARE_SECONDS)

    async def _take_share(self) -> bool:
        return await self._run(self._checkpointer.share.join)

    async def _leave(self) -> None:
        await self._run(self._checkpointer.share.leave)

    async def _write_documents(
        self, changes: Sequence[ResolvedPut | ResolvedDelete]
    ) -> list[AgentStateError]:
        failed: list[AgentStateError] = []
        results = await self._run(partial(self._checkpointer.write_back, changes))
        for change in changes:
            result = results[id_of(change)]
            if isinstance(result, AgentStateError):
                failed.append(result)
            else:
                self._became_clean(change, result)
        return failed

    async def _write_records(
        self, place: DocumentId, records: Sequence[LogRecord]
    ) -> list[AgentStateError]:
        bases = {**self._memtable.dirty.bases.get(place, {})}
        try:
            end = await self._run(partial(self._checkpointer.append, place, records, bases))
        except AgentStateError as error:
            return [error]
        if records:
            self._memtable.dirty.remove_records(place, len(records))
        if end is not None:  # others have added lines
            ids: dict[str, int] | None = {}
            if self._memtable.knows_ids(place):
                ids = await self._run(partial(self._checkpointer.ids, place))
            self._memtable.take_in(place, end[0], ids, end[1])
        return []

    async def take_in(self, places: Iterable[DocumentId]) -> None:
        """Learn how these logs end, to which others have added lines. Called under ``lock``."""
        for place in places:
            waiting = list(self._memtable.dirty.records.get(place, ()))
            for error in await shielded(self._write_records(place, waiting)):
                raise error

    def _became_clean(
        self, change: ResolvedPut | ResolvedDelete, edit: StoredDocument | None
    ) -> None:
        newer = edit and ResolvedPut(edit.document, edit.meta)
        if self._memtable.became_clean(change, newer) and newer is not None:
            self._edited(newer.document)

    async def _write_back_forever(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SECONDS):
                    await self.dirty.wait()
            idle = not self.dirty.is_set()
            self.dirty.clear()
            if not idle:
                await self._wait_until(due)
            began = time.monotonic()
            try:
                async with self.lock:
                    await self.write_back()
                    log = self._commits.log
                    if log.incomplete or log.is_longer(0 if idle else self._segment_bytes):
                        await self.checkpoint()
                    elif idle:
                        await self._run(self._checkpointer.stand)
                # Under load a fifth of the time at most: saves of a document share one write.
                took = time.monotonic() - began
                large = min(self._large_bytes / _LARGE_BYTES_PER_SECOND, _LARGE_SECONDS_MAX)
                due = loop.time() + max(large, min(4 * took, WRITE_BACK_SECONDS_MAX))
            except AgentStateError as error:
                # The log has everything; the files follow when the disk allows it again.
                _logger.warning("files could not be updated: %s", error)
                due = loop.time() + _RETRY_SECONDS
                self.dirty.set()
            except Exception:  # without write-back the log would grow for ever, unnoticed
                _logger.exception("files could not be updated")
                due = loop.time() + _RETRY_SECONDS
                self.dirty.set()

    async def _wait_until(self, due: float) -> None:
        """Let changes gather; not as long while another program waits for the files."""
        await asyncio.sleep(WRITE_BACK_SECONDS)
        while (left := due - asyncio.get_running_loop().time()) > 0:
            if await self._run(self._checkpointer.share.is_wanted):
                return
            await asyncio.sleep(min(left, WRITE_BACK_SECONDS))


def _size_of(change: ResolvedPut | ResolvedDelete) -> int:
    return len(change.document.body) if isinstance(change, ResolvedPut) else 0
