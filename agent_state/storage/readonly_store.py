"""Reads a state directory that may belong to a running server, or to a dead one.

Takes no lock, changes nothing, and sees the state after a restart: the changes of the write-ahead
log and of redo records are laid over the files.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from agent_state.errors import (
    AgentStateError,
    Key,
    LockTimeoutError,
    StateCorruptedError,
    StateNotFoundError,
    UnmergedStateError,
    storage_error,
)
from agent_state.protocols import Change, Document, DocumentId, Incident, LogRecord, Origin
from agent_state.storage import fileio, group_writer, locks, logs, syscalls, wal
from agent_state.storage.changes import (
    Overlay,
    ResolvedAppend,
    ResolvedPut,
    decode_journal_record,
    id_of,
    keys_over,
    read_over,
)
from agent_state.storage.directory import StateDirectory
from agent_state.storage.executor import shielded
from agent_state.storage.patches import Patched, SegmentVersions
from agent_state.storage.paths import DocumentPath
from agent_state.storage.reader import SCAN_BATCH, FileReader
from agent_state.storage.watch import Subscription

T = TypeVar("T")


class ReadOnlyStateStore:
    """The documents and logs of a directory, as they would be after a restart.

    Raises ``StateNotFoundError`` at ``open`` when the directory is missing, and
    ``AgentStateError`` for every change.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._directory = StateDirectory(os.fspath(root), sync=False, now=str)
        self._reader = FileReader(self._directory)
        self.overlay = Overlay()
        """The changes that are in no file yet."""
        self._damaged: dict[DocumentId, str] = {}
        self._unmerged: dict[DocumentId, str] = {}

    @property
    def root(self) -> str:
        """The state directory, as an absolute path."""
        return self._directory.root

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if not self._reader.is_open:
            try:
                await self._reader.open(self.prepare)
            except asyncio.CancelledError:
                await shielded(self._reader.close(lambda: None))  # by now it has been opened
                raise

    async def close(self) -> None:
        await shielded(self._reader.close(lambda: None))

    def prepare(self) -> None:
        """What ``open`` does in a thread; all that ``read`` needs."""
        if not os.path.isdir(self.root):
            raise StateNotFoundError("there is no such state directory", path=self.root)
        self._directory.worktree.refresh()
        self.overlay = unsettled_changes(self._directory, self._report)

    # -- the directory -------------------------------------------------------------------------

    def owner(self) -> int | None:
        """The pid of the process that owns the directory; 0 when unknown, None for no owner."""
        return locks.owner_of(self._directory.locks)

    async def look(self, work: Callable[[StateDirectory], T]) -> T:
        """Do work that only reads, in a thread of the store."""
        return await self._reader.run(partial(work, self._directory))

    async def kinds(self) -> list[str]:
        """The kinds that have a folder, or will have one after a restart."""
        overlay = self.overlay
        filed = await self._reader.run(self._directory.tree.kinds)
        return sorted({*filed, *(kind for kind, _ in (*overlay.documents, *overlay.records))})

    def damage(self, kind: str, key: Key) -> str | None:
        """The damage of a document's file that was read; None when it has none."""
        return self._damaged.get((kind, key))

    def unmerged(self, kind: str, key: Key) -> str | None:
        """Why a document that was read is left alone: a merge of it is not resolved."""
        return self._unmerged.get((kind, key))

    async def origin(self) -> Origin:
        return await asyncio.to_thread(self._directory.origin)

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        at = self._directory.locate(kind, key)
        return await self._reader.run(partial(self.read, at))

    def read(self, at: DocumentPath) -> Document | None:
        """``get`` for who blocks."""
        place = (at.kind, at.key)
        try:
            stored = self._directory.documents.read(at)
        except StateCorruptedError as error:
            self._damaged[place] = error.message
            self._report(error.message, error.path, at.kind, at.key)
            newer = self.overlay.documents.get(place)
            if isinstance(newer, ResolvedPut):
                return newer.document
            raise
        except (UnmergedStateError, LockTimeoutError) as error:
            if isinstance(error, UnmergedStateError):
                self._unmerged[place] = error.message
                self._report(error.message, error.path, at.kind, at.key)
            stored = self._directory.documents.last_good(at)
            if stored is None and place not in self.overlay.documents:
                raise
        return self.overlay.over(place, stored.document if stored else None)

    async def get_each(
        self, kind: str, keys: Sequence[Key]
    ) -> list[Document | AgentStateError | None]:
        """``get`` for many in one thread; an error takes its document's place."""
        return await self._reader.run(lambda: [self._get_or_error(kind, key) for key in keys])

    def _get_or_error(self, kind: str, key: Key) -> Document | AgentStateError | None:
        try:
            return self.read(self._directory.locate(kind, key))
        except AgentStateError as error:
            return error

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        found = await self._reader.keys(kind, prefix)
        return keys_over(self.overlay.documents, found, kind, prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return self.overlay.logs_over(await self._reader.logs(kind, prefix), kind, prefix)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        keys = await self.keys(kind, prefix)
        for start in range(0, len(keys), SCAN_BATCH):
            places = [self._directory.locate(kind, key) for key in keys[start : start + SCAN_BATCH]]
            work = partial(self._reader.readable, places, self.read)
            for document in await self._reader.run(work):
                yield document

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        waiting = self.overlay.records.get((kind, key), [])
        return read_over(waiting, partial(self._reader.read_log, kind, key), after, last)

    async def keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        """The records whose dedupe keys begin so, as ``IndexedLogs``."""
        if self.overlay.records.get((kind, key)):
            return None
        return await self._reader.keyed_records(kind, key, prefix)

    async def watch(self) -> Subscription:
        return await self._reader.watch()

    def incidents(self) -> list[Incident]:
        return list(self._directory.incidents)

    def _report(
        self, what: str, path: str | None, kind: str | None = None, key: Key | None = None
    ) -> None:
        relative = self._directory.tree.relative(path) if path else None
        incident = Incident(what, kind, key, relative)
        if incident not in self._directory.incidents:
            self._directory.incidents.append(incident)

    # -- changes are refused ---------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        raise AgentStateError("the store was opened for reading only", path=self.root)

    async def flush(self) -> None:
        """Nothing is outstanding."""

    async def erase(self, kind: str, key: Key) -> int:
        raise AgentStateError("the store was opened for reading only", kind=kind, key=key)

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        raise AgentStateError("the store was opened for reading only", kind=kind, key=key)
        yield

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        """Only reports the incident; the file stays where it is."""
        self._report(reason, self._directory.tree.path(kind, key), kind, key)
        return None


def unsettled_changes(
    directory: StateDirectory, report: Callable[[str, str | None], None]
) -> Overlay:
    """The changes of the journal and of redo records; ``report`` is given damage and its path."""
    overlay = Overlay()

    for path in wal.segments(directory.journal):
        try:
            segment = wal.read_segment(path)
        except StateCorruptedError as error:
            report(error.message, path)
            continue
        for record in segment.records:
            overlay.add_record(record)
        if segment.damaged:
            report(f"{segment.damaged} damaged records in the journal", path)
    for group in group_writer.read_records(directory):
        overlay.add_record(group.changes)
        if group.damage:
            report(f"an intent was damaged: {group.damage}", group.path)
    return overlay


@dataclass(slots=True)
class _FollowedSegment:
    """A segment of the journal of which so many bytes were read, and the changes in them."""

    offset: int = 0
    overlay: Overlay = field(default_factory=Overlay)
    versions: SegmentVersions = field(default_factory=SegmentVersions)


class JournalFollower:
    """The changes that the owner of a directory adds to its journal. Its methods block.

    They are here as soon as they are durable, and in their files up to half a second later.
    """

    def __init__(self, directory: StateDirectory) -> None:
        self._folder = directory.journal
        self._segments: dict[str, _FollowedSegment] = {}

    def read(self) -> list[tuple[DocumentId, Document | None]]:
        """The documents since the last call, in order; None for one that was removed.

        A record that is not complete is read by a later call; one that is damaged is left out.
        Raises ``StorageError``.
        """
        found: list[tuple[DocumentId, Document | None]] = []
        former, self._segments = self._segments, {}
        for path in wal.segments(self._folder):
            segment = self._segments[path] = former.get(path) or _FollowedSegment()
            for line in _lines_after(path, segment.offset):
                segment.offset += len(line) + 1
                with suppress(StateCorruptedError):
                    for change in segment.versions.take(decode_journal_record(line).changes):
                        whole = change.put() if isinstance(change, Patched) else change
                        segment.overlay.add(whole)
                        if not isinstance(whole, ResolvedAppend):
                            found.append((id_of(whole), getattr(whole, "document", None)))
        return found

    def over(self, place: DocumentId, stored: Document | None) -> Document | None:
        """The document, from the journal or from its file, whichever is newer."""
        for segment in self._segments.values():
            stored = segment.overlay.over(place, stored)
        return stored


def _lines_after(path: str, offset: int) -> Iterator[bytes]:
    """The complete lines from an offset on; none of a file that was removed."""
    stamp = fileio.stat_file(path)
    if stamp is None or stamp.size <= offset:
        return
    try:
        fd, _ = fileio.open_regular(path, syscalls.READ)
        try:
            splitter = logs.Splitter()
            while piece := logs.pread(fd, offset, logs.BLOCK):
                offset += len(piece)
                yield from splitter.feed(piece)
        finally:
            syscalls.close(fd)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(error, "reading the journal", path=path) from error
