"""Reads a state directory for the stores that own one: threads, listings, logs, and watching.

A store adds what it alone knows, such as changes that are in no file yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from functools import partial
from typing import Any, NamedTuple, TypeVar

import aiofiles

from agent_state.errors import (
    AgentStateError,
    Key,
    LockTimeoutError,
    StateCorruptedError,
    StorageError,
    UnmergedStateError,
    storage_error,
)
from agent_state.protocols import Append, Document, DocumentId, Incident, LogRecord
from agent_state.storage import fileio, log_index, logs, paths, syscalls
from agent_state.storage.changes import ResolvedPut
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document_files import StoredDocument
from agent_state.storage.executor import Executor
from agent_state.storage.paths import DocumentPath
from agent_state.storage.tree import is_forbidden
from agent_state.storage.watch import DirectoryWatcher, Subscription
from agent_state.storage.worktree import has_conflict_markers

_logger = logging.getLogger("agent_state.storage")

T = TypeVar("T")

SCAN_BATCH = 256
"""Documents that are read in one hop to a thread."""
THREADS = 8
_READ_BYTES = 256 * 1024
_REPORTED_LINES = 100
"""Damaged lines of one log that are reported one by one; a log may have millions."""


class FileReader:
    """The threads of a store, and what they read from its ``directory``."""

    def __init__(self, directory: StateDirectory) -> None:
        self.directory = directory
        self.watcher = DirectoryWatcher(directory)
        self._executor: Executor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._reported_lines: dict[str, set[str]] = {}

    @property
    def is_open(self) -> bool:
        """Whether the threads run."""
        return self._executor is not None

    async def open(self, prepare: Callable[[], None]) -> None:
        """Start the threads and do ``prepare`` in one of them.

        If it fails the threads end. A caller that is cancelled has an open reader.
        """
        self._executor = Executor("files", THREADS)
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        try:
            await self._executor.run(prepare)
        except asyncio.CancelledError:
            raise
        except BaseException:
            executor, self._executor = self._executor, None
            if executor is not None:
                executor.close()
            raise

    async def close(
        self, release: Callable[[], None], before: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Await ``before``, end all reading, then do ``release`` in a thread. Twice is a no-op."""
        executor = self._executor
        if executor is None:
            return
        try:
            try:
                await self.watcher.close()
            finally:
                if before is not None:
                    await before()
                self._executor = None  # a scan that goes on finds the store closed
                await executor.ended()
                await executor.run(release)
        finally:
            await executor.ended()
            self._executor = None
            executor.close()

    @property
    def is_elsewhere(self) -> bool:
        """Whether it was opened in another event loop, or before a fork."""
        if self._executor is None:
            return False
        return self._loop is not asyncio.get_running_loop() or self._pid != os.getpid()

    async def close_elsewhere(
        self, close: Callable[[], Coroutine[Any, Any, None]], release: Callable[[], None]
    ) -> None:
        """Close in the loop that it was opened in; if that has ended, end the threads only.

        ``release`` is done in a thread then. A child made by fork leaves all to its parent.
        """
        loop, executor = self._loop, self._executor
        if self._pid != os.getpid() or loop is None or executor is None:
            self._executor = None
        elif not loop.is_closed():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(close(), loop))
        else:
            self._executor = None
            self.watcher.abandon()
            await asyncio.to_thread(executor.close)
            await asyncio.to_thread(release)

    @property
    def executor(self) -> Executor:
        """The threads. Raises ``AgentStateError`` when the store is not open here."""
        if self._executor is None:
            raise AgentStateError("the store is not open", path=self.directory.root)
        self.refuse_elsewhere()
        return self._executor

    def refuse_elsewhere(self) -> None:
        """Raises ``AgentStateError`` when it was opened in another event loop."""
        if self.is_elsewhere:
            what = "the store was opened in another event loop, or before a fork; open one here"
            raise AgentStateError(what, path=self.directory.root)

    async def run(self, work: Callable[[], T]) -> T:
        """Do blocking work in a thread. Raises ``AgentStateError`` when the store is not open."""
        return await self.executor.run(work)

    # -- documents -----------------------------------------------------------------------

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        """The sorted keys of the documents that have a file."""
        return await self.run(partial(self.directory.tree.keys, kind, prefix))

    async def is_removed(self, kind: str, key: Key) -> bool:
        """As ``TrackedStore.is_removed``."""
        path = self.directory.locate(kind, key).path
        return await self.run(partial(self.directory.worktree.is_removed, path))

    async def check_merged(self, kind: str, key: Key, *, reads: bool) -> None:
        """As ``TrackedStore.check_merged``."""
        at, worktree = self.directory.locate(kind, key), self.directory.worktree
        await self.run(worktree.refresh)
        if at.path in worktree.marked:
            found = await self.run(partial(fileio.read_file, at.path))
            if found is None or not has_conflict_markers(found[0]):
                worktree.note_resolved(at.path)
        worktree.check(at, unread=not reads)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        """The sorted keys of the logs that have a file."""
        return await self.run(partial(self.directory.tree.keys, kind, prefix, paths.LOG))

    def readable(
        self, places: Iterable[DocumentPath], get: Callable[[DocumentPath], Document | None]
    ) -> list[Document]:
        """The documents that ``get`` returns, without damaged and forbidden ones. Blocks.

        ``get`` has reported a damaged one; a forbidden one is reported here.
        """
        found = []
        for at in places:
            try:
                document = get(at)
            except (StateCorruptedError, UnmergedStateError):
                continue
            except StorageError as error:
                if not is_forbidden(error):
                    raise
                self.directory.tree.report_forbidden(at.kind, at.key, error)
                continue
            if document is not None:
                found.append(document)
        return found

    # -- logs ----------------------------------------------------------------------------

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        """The records of a log's file, as ``StateStore.read_log``."""
        at = self.directory.locate(kind, key, paths.LOG)
        found = await self.run(partial(self._seek, at, after, last))
        if isinstance(found, list):
            for record in found:
                yield record
            return
        after, offset, previous, end = found
        if offset >= end:
            return
        splitter = logs.Splitter()
        async for piece in self._pieces(at.path, offset, end):
            offset += len(piece)
            for line in splitter.feed(piece) if offset < end else splitter.feed_last(piece):
                try:
                    record = logs.decode_line(line, previous)
                except StateCorruptedError as error:
                    if line.strip():  # an editor leaves empty ones
                        self._report_line(at, previous, error)
                    continue
                previous = record.seq
                if record.seq > after:
                    yield record

    def _seek(
        self, at: DocumentPath, after: int, last: int | None
    ) -> tuple[int, int, int, int] | list[LogRecord]:
        fileio.has_folders(self.directory.root, at.path)
        self.directory.tree.take_by_hand(at, paths.LOG)
        if (ours := self._our_side(at)) is not None:
            records = [*_decode_lines(ours)]
            if last is not None and records:
                after = max(after, records[-1].seq - last)
            return [record for record in records if record.seq > after]
        if last is not None:
            after = max(after, logs.last_seq(at.path) - last)
        return after, *logs.seek(at.path, after=after)

    def _our_side(self, at: DocumentPath) -> bytes | None:
        """What git has as our side of a log that is unmerged: the file has both sides."""
        worktree = self.directory.worktree
        worktree.refresh()
        conflict = worktree.conflict(at.path)
        if conflict is None:
            return None
        self.directory.report_unmerged(
            UnmergedStateError(conflict, kind=at.kind, key=at.key, path=at.path)
        )
        return next(iter(worktree.last_good(at.path)), b"")

    async def keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        """The records of a log's file, as ``IndexedLogs.keyed_records``."""
        return await self.run(partial(self._keyed_records, kind, key, prefix))

    def _keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        at = self.directory.locate(kind, key, paths.LOG)
        fileio.has_folders(self.directory.root, at.path)
        if self._our_side(at) is not None:
            return None
        try:
            return log_index.find_records(self.directory.root, at.path, prefix)
        except OSError as error:
            raise storage_error(error, "reading a log", path=at.path) from error

    async def _pieces(self, path: str, offset: int, end: int) -> AsyncGenerator[bytes, None]:
        """The bytes between two offsets. Raises ``StorageError``, ``StateCorruptedError``."""
        try:
            threads = self.executor
            file = await aiofiles.open(
                path, "rb", opener=_open_for_reading, executor=threads.threads
            )
            try:
                await file.seek(offset)
                while offset < end and self.executor is threads:
                    piece = await file.read(min(_READ_BYTES, end - offset))
                    if not piece:
                        return
                    offset += len(piece)
                    yield piece
            finally:
                if self._executor is threads:
                    await file.close()
                else:
                    file.raw.close()  # the store was closed, and its threads have ended
        except AgentStateError:
            raise
        except FileNotFoundError:
            return  # it was erased since it was found
        except OSError as error:
            raise storage_error(error, "reading a log", path=path) from error

    def _report_line(self, at: DocumentPath, previous: int, error: AgentStateError) -> None:
        path = self.directory.tree.relative(at.path)
        reported = self._reported_lines.setdefault(path, set())
        what = f"the line after record {previous} cannot be read: {error.message}"
        if what in reported or len(reported) > _REPORTED_LINES:
            return
        reported.add(what)
        if len(reported) > _REPORTED_LINES:
            what = f"more than {_REPORTED_LINES} lines cannot be read"
        _logger.warning("%s: %s", at.path, what)
        self.directory.incidents.append(Incident(what, at.kind, at.key, path))

    async def watch(self) -> Subscription:
        """Begin to watch, as ``StateStore.watch``."""
        await self.watcher.start(self.executor)
        return self.watcher.subscribe()


def _decode_lines(data: bytes) -> Iterator[LogRecord]:
    """The readable records of a whole log."""
    previous = 0
    for line in logs.Splitter().feed_last(data):
        with contextlib.suppress(StateCorruptedError):
            yield (record := logs.decode_line(line, previous))
            previous = record.seq


def _open_for_reading(name: str, _: int) -> int:
    return fileio.open_regular(name, syscalls.READ)[0]


# -- in a thread -------------------------------------------------------------------------------


def read_documents(
    directory: StateDirectory, places: Iterable[DocumentId]
) -> dict[DocumentId, StoredDocument | AgentStateError | None]:
    """The files of these documents; a damaged one is left where it is."""
    found: dict[DocumentId, StoredDocument | AgentStateError | None] = {}
    verified_dirs: set[str] = set()
    directory.worktree.refresh()
    for place in places:
        at = paths.locate(directory.root, *place)
        try:
            found[place] = directory.documents.read(at, verified_dirs=verified_dirs)
        except (StateCorruptedError, UnmergedStateError, LockTimeoutError) as error:
            found[place] = error
    return found


class LogEnd(NamedTuple):
    """How a log ends, and its dedupe keys where an append has one."""

    last: int
    name: str | None
    """``logs.end_name``, in a worktree of git."""
    ids: dict[str, int | None] | None = None
    is_complete: bool = True
    """Whether these are all keys."""


def log_ends(directory: StateDirectory, appends: Iterable[Append]) -> dict[DocumentId, LogEnd]:
    """How each log ends."""
    found = dict[DocumentId, LogEnd]()
    for change in appends:
        place = (change.kind, change.key)
        log = directory.logs.writer(directory.locate(*place, paths.LOG))
        if place not in found:
            end = log.tail().seq
            name = logs.end_name(log.path) if directory.worktree.is_there() else None
            found[place] = LogEnd(end, name)
        end, name, ids, complete = found[place]
        if change.dedupe_key is not None:
            all_ids = log.ids() if complete and ids is None else None
            if all_ids is not None:
                ids = {**all_ids}
            elif ids is None or not complete:
                ids, complete = ids or {}, False
                ids[change.dedupe_key] = log.find(change.dedupe_key)
            if ids is not None:
                ids.setdefault(change.dedupe_key, None)
        found[place] = LogEnd(end, name, ids, complete)
    return found


def repair_document(
    directory: StateDirectory, place: DocumentId, good: object, damage: StateCorruptedError
) -> ResolvedPut | AgentStateError | None:
    """Read again; quarantine a file that is still damaged, and write the last good version.

    ``good`` is that version, if it is known; else a snapshot may have one.
    """
    at, documents = directory.locate(*place), directory.documents
    try:
        stored = documents.read(at)
    except StateCorruptedError as error:
        if isinstance(good, ResolvedPut):
            documents.quarantine_and_replace(at, error.message, good.document, good.meta)
            return good
        stored = documents.quarantine_and_restore(at, error.message)
        if stored is None:
            return damage
    return stored and ResolvedPut(stored.document, stored.meta)
