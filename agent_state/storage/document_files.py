"""Documents as files: read, written, deleted, restored after damage. Everything here blocks.

A write is a temporary file in its folder, fsync, rename, fsync of the folder. Before the
rename the earlier version is kept as a snapshot, and an edit made since the file was read goes to
the quarantine. There are no locks here: the stores hold them.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from agent_state.errors import AgentStateError, LockTimeoutError, StateCorruptedError, storage_error
from agent_state.protocols import Document, DocumentId
from agent_state.storage import fileio, syscalls
from agent_state.storage.document import decode_document, encode_document
from agent_state.storage.fileio import PendingSync, Stamp
from agent_state.storage.lru_cache import LRUCache
from agent_state.storage.paths import DocumentPath
from agent_state.storage.quarantine import Quarantine
from agent_state.storage.tree import DocumentTree
from agent_state.storage.worktree import Worktree, has_conflict_markers

SNAPSHOTS = ".snapshots"
SNAPSHOT_SECONDS = 60.0
"""The snapshot of a document is renewed at most this often."""
_COMPRESSED_OVER = 64 * 1024
_GZIP = b"\x1f\x8b"

RACY_NS = 100_000_000
"""A file that was read this soon after its mtime may have changed since with the same mtime."""
CACHE_BYTES = 32 * 1024 * 1024
STAMPS_MAX = 200_000
ANY_VERSION = Stamp(-1, -1, -1)
"""As the ``base`` of a write: replace the file, whatever it holds."""
_ENTRY_BYTES = 1024
"""The memory of a cached document besides its body."""
_HALF_WRITTEN_SECONDS = 0.05
"""An editor that writes in place needs about this long."""
REST_SECONDS = 3.0
"""A file that ends too early, in the middle of a git command, is judged when nobody has written to
it for so long."""
_EDITED_REST_SECONDS = 0.3
"""The same without a git command."""


class StoredDocument(NamedTuple):
    """A document as its file holds it."""

    document: Document
    meta: Mapping[str, str]
    stamp: Stamp
    read_ns: int = 0
    """When it was read or written; 0 for never trust the stamp."""


@dataclass(slots=True)
class StagedFile:
    """The new file of a document: written, and not yet in its place.

    ``base``: the version of the file that it replaces; None for no file, or ``ANY_VERSION``.
    """

    at: DocumentPath
    document: Document
    meta: Mapping[str, str]
    base: Stamp | None
    temporary: str
    fd: int
    stamp: Stamp
    placed: bool = False

    def finish(self, *, sync: bool) -> None:
        """Close the file, with ``sync`` made durable. Raises ``OSError``."""
        fd, self.fd = self.fd, -1
        try:
            if sync:
                # A new file's size and blocks are what fdatasync must write to read it back.
                syscalls.fdatasync(fd)
        finally:
            syscalls.close(fd)

    def discard(self) -> None:
        """Remove the file, unless it is in its place; no-op then."""
        if self.placed:
            return
        fileio.discard(self.temporary)
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # nothing of it is needed any more
                self.finish(sync=False)


class DocumentFiles:
    """The documents below ``root``, with their snapshots.

    ``sync``: every write is fsynced before it returns. Without it the caller makes documents
    durable by other means; repairs are fsynced with ``durable`` all the same.
    """

    def __init__(
        self,
        tree: DocumentTree,
        quarantine: Quarantine,
        worktree: Worktree,
        *,
        sync: bool,
        durable: bool,
    ) -> None:
        self._tree = tree
        self.root = root = tree.root
        self.sync = sync
        self.snapshots = Snapshots(root, durable=durable)
        self.seen: LRUCache[str, Stamp | None] = LRUCache(STAMPS_MAX)
        """The version of each file that was last read or written here; None for a removed one."""
        self._quarantine = quarantine
        self._worktree = worktree
        self._durable = durable
        self._own_writes: LRUCache[str, tuple[Stamp | None, ...]] = LRUCache(STAMPS_MAX)
        """The last two versions that were written here, noted before; None for a removal."""
        self._cache: LRUCache[str, StoredDocument] = LRUCache(STAMPS_MAX, CACHE_BYTES)
        self.half_written: dict[str, DocumentId] = {}
        """By path the documents that were being written when they were read."""
        self.found_half_written: Callable[[], None] = lambda: None
        """Called when there is another one, in any thread."""
        self._durable_folders: set[str] = set()
        self._fsync_failed: set[str] = set()

    # -- reading -------------------------------------------------------------------------

    def read(
        self, at: DocumentPath, *, verified_dirs: set[str] | None = None
    ) -> StoredDocument | None:
        """The document, from the cache if the file is certainly the same.

        ``verified_dirs``: folders that were checked just now for symlinks, for a caller that reads
        many files. Raises ``StateCorruptedError`` when the document is damaged,
        ``UnmergedStateError`` while a merge of it is not resolved, ``LockTimeoutError`` when
        another program seems to be writing it and an earlier version is known, ``StorageError``.
        """
        if at.path in self._worktree.unmerged:
            self._worktree.check(at)
        if verified_dirs is None or at.parent not in verified_dirs:
            if not fileio.has_folders(self.root, at.path):
                return self._read_missing(at)
            if verified_dirs is not None:
                verified_dirs.add(at.parent)
        cached = self._cache.get(at.path)
        if (
            cached is not None
            and cached.read_ns - cached.stamp.mtime_ns >= RACY_NS
            and fileio.stat_file(at.path) == cached.stamp
        ):
            return cached
        deadline = time.monotonic() + 4 * _HALF_WRITTEN_SECONDS
        while (found := fileio.read_file(at.path)) is not None:
            data, stamp = found
            try:
                document, meta = decode_document(at.kind, at.key, data)
            except StateCorruptedError as error:
                if has_conflict_markers(data):
                    self._worktree.marked.add(at.path)
                    self._worktree.check(at)
                age = time.time_ns() - stamp.mtime_ns
                # Written in place, as git does: what an editor renames into its place is complete.
                busy = self._worktree.is_busy()
                in_place = cached is not None and (cached.stamp.inode == stamp.inode or busy)
                rest = REST_SECONDS if busy else _EDITED_REST_SECONDS
                if in_place and age < rest * 1e9 and ends_too_early(data):
                    self.half_written[at.path] = (at.kind, at.key)
                    self.found_half_written()
                    what = "another program seems to be writing it"
                    raise LockTimeoutError(what, kind=at.kind, key=at.key, path=at.path) from error
                if age >= 1_000_000_000 or time.monotonic() > deadline:
                    raise StateCorruptedError(
                        error.message, kind=at.kind, key=at.key, path=at.path
                    ) from error
                time.sleep(_HALF_WRITTEN_SECONDS)
                continue
            stored = StoredDocument(document, meta, stamp, time.time_ns())
            self._keep_replaced(at, cached, stored)
            self._cache.set(at.path, stored, stamp.size + _ENTRY_BYTES)
            if at.path in self._worktree.marked:
                self._worktree.note_resolved(at.path)
            return stored
        self._worktree.marked.discard(at.path)
        return self._read_missing(at)

    def _read_missing(self, at: DocumentPath) -> StoredDocument | None:
        """None; git removes a file before it writes another one, so its command is outlasted.

        A file that a person named by the id as it is, with its capitals, gets the id's name.
        """
        if at.path in self._cache and self._worktree.outlast():
            return self.read(at)
        if self._tree.take_by_hand(at):
            return self.read(at)
        self._cache.drop(at.path)
        return None

    def keep_edited(self, at: DocumentPath, known: Document, meta: Mapping[str, str]) -> None:
        """Keep the version in memory, whose file has an edit now, should that be unusable."""
        if not known.edited:
            self.snapshots.keep_version(at.path, encode_document(known, meta))

    def _keep_replaced(
        self, at: DocumentPath, ours: StoredDocument | None, found: StoredDocument
    ) -> None:
        """Keep what was saved here when git put an older version in its place, and lacks ours.

        It does so where a save comes between its reading (for a stash) and its ``reset --hard``.
        """
        now = found.document
        if ours is None or ours.stamp == found.stamp:
            return
        if now.edited:
            self.keep_edited(at, ours.document, ours.meta)
            return
        was_saved_here = ours.stamp in self._own_writes.get(at.path, ())
        if now.revision > ours.document.revision or not was_saved_here:
            return
        data = encode_document(ours.document, ours.meta)
        if not self._worktree.is_there() or self._worktree.has(data):
            return
        reason = (
            f"git replaced revision {ours.document.revision}, which no commit has, "
            f"by revision {now.revision} of {now.saved_at}"
        )
        kept = self._quarantine.keep(at.path, data, reason, at.kind, at.key)
        self._quarantine.report(at.path[len(self.root) + 1 :], reason, at.kind, at.key, kept)

    def last_good(self, at: DocumentPath) -> StoredDocument | None:
        """The last good version of a document that cannot be read now; None if none is known.

        It is the version that was read or written last; else what git has of it, or the snapshot.
        """
        cached = self._cache.get(at.path)
        if cached is not None:
            return cached
        snapshot = self.snapshots.bytes_of(at.path)
        kept = [] if snapshot is None else [snapshot]
        for data in self._worktree.last_good(at.path) or kept:
            with contextlib.suppress(StateCorruptedError):
                document, meta = decode_document(at.kind, at.key, data)
                return StoredDocument(document, meta, ANY_VERSION)
        return None

    def forget(self, at: DocumentPath) -> None:
        """Read the file the next time, whatever its stamp is."""
        cached = self._cache.get(at.path)
        if cached is not None:
            self._cache.set(at.path, cached._replace(read_ns=0), cached.stamp.size + _ENTRY_BYTES)

    # -- writing -------------------------------------------------------------------------

    def make_parent(self, at: DocumentPath, *, sync: bool | None = None) -> None:
        """Make the folders above a document or log, durably with ``sync``. Raises ``StorageError``.

        None of them may be a symlink. ``sync``: None for the directory's.
        """
        if at.parent not in self._durable_folders or not fileio.has_folders(self.root, at.path):
            sync = self.sync if sync is None else sync
            fileio.make_directories(self.root, at.parent[len(self.root) + 1 :], sync=sync)
            self._durable_folders.add(at.parent)

    def stage(
        self,
        at: DocumentPath,
        document: Document,
        meta: Mapping[str, str],
        base: Stamp | None,
        *,
        verified: bool = False,
        finish: bool = False,
    ) -> StagedFile:
        """Write a document's bytes to a temporary file in its folder.

        ``verified``: the folders were checked for symlinks just now. ``finish``: fsync the file as
        the directory does, instead of leaving that to the caller. Raises ``StorageError``.
        """
        data = encode_document(document, meta)
        try:
            if not verified or at.parent not in self._durable_folders:
                self.make_parent(at)
            try:
                temporary, fd, stamp = fileio.write_temp(at.path, data)
            except FileNotFoundError:  # its folder was removed
                self.make_parent(at)
                temporary, fd, stamp = fileio.write_temp(at.path, data)
            staged = StagedFile(at, document, meta, base, temporary, fd, stamp)
            if finish:
                try:
                    staged.finish(sync=self.sync)
                except BaseException:
                    staged.discard()
                    raise
        except AgentStateError:
            raise
        except OSError as error:
            raise storage_error(
                error, "writing a file", kind=at.kind, key=at.key, path=at.path
            ) from error
        return staged

    def place(self, staged: StagedFile, *, snapshot: bool = True) -> None:
        """Rename a staged file into its place. Raises ``OSError``.

        The replaced version is kept: as a snapshot, and in the quarantine if it is not ``base``.
        ``snapshot``: False for a version that is no good one. Raises ``UnmergedStateError``.
        """
        at = staged.at
        self._worktree.check(at)
        if snapshot:
            self.snapshots.keep(at.path)
        found = fileio.stat_file(at.path)
        if found is not None and staged.base not in (found, ANY_VERSION):
            reason = f"changed outside, just before revision {staged.document.revision} replaced it"
            self._quarantine.link(at.path, reason, at.kind, at.key)
        self._own_writes.set(
            at.path, (staged.stamp, *self._own_writes.get(at.path, ())[:1])
        )  # before the rename, so that no watcher takes the file for another process's
        syscalls.rename(staged.temporary, at.path)
        staged.placed = True
        self.seen.set(at.path, staged.stamp)
        stored = StoredDocument(staged.document, staged.meta, staged.stamp, time.time_ns())
        self._cache.set(at.path, stored, staged.stamp.size + _ENTRY_BYTES)

    def write(
        self,
        at: DocumentPath,
        document: Document,
        meta: Mapping[str, str],
        base: Stamp | None = ANY_VERSION,
        *,
        sync: bool | None = None,
        snapshot: bool = True,
    ) -> Stamp:
        """Replace a document atomically and (with ``sync``) durably; its file's stamp.

        ``sync``: None for the directory's. ``snapshot`` as in ``place``. Raises ``StorageError``,
        ``DurabilityUnknownError``.
        """
        sync = self.sync if sync is None else sync
        self.make_parent(at, sync=sync)
        staged = self.stage(at, document, meta, base, verified=True)
        try:
            staged.finish(sync=sync)
            self.place(staged, snapshot=snapshot)
        except AgentStateError:
            raise
        except OSError as error:
            raise storage_error(error, "writing a file", path=at.path) from error
        finally:
            staged.discard()
        if sync:
            fileio.sync_directory(at.parent)
        return staged.stamp

    def delete(self, at: DocumentPath, *, sync: bool | None = None) -> bool:
        """Remove a document; whether there was one. ``sync``: None for the directory's.

        Its snapshot goes first: a process that dies in between leaves none without its document.
        Raises ``UnmergedStateError``.
        """
        self._worktree.check(at)
        self._cache.drop(at.path)
        self.snapshots.drop(at.path)
        self._own_writes.set(at.path, (None, *self._own_writes.get(at.path, ())[:1]))
        self.seen.set(at.path, None)
        return fileio.remove_file(at.path, sync=self.sync if sync is None else sync)

    # -- whose version a file is -----------------------------------------------------------

    def forget_own_write(self, path: str, stamp: Stamp | None) -> None:
        """Another process has replaced or removed this version of a file."""
        ours = self._own_writes.get(path)
        if ours is not None:
            self._own_writes.set(path, tuple(own for own in ours if own != stamp))

    def changed_externally(self, path: str) -> tuple[Stamp | None, bool]:
        """The stamp of a file (None if missing), and whether another process wrote it."""
        stamp = fileio.stat_file(path)
        if path not in self._own_writes:  # where each write of ours is noted before it begins
            return stamp, True
        while stamp not in self._own_writes.get(path, ()):
            # Two writes of ours may have passed since the stat.
            again = fileio.stat_file(path)
            if again == stamp:
                return stamp, True
            stamp = again
        return stamp, False

    # -- damage --------------------------------------------------------------------------

    def ensure_synced(self, files: Iterable[DocumentPath]) -> None:
        """Fsync files that may have been written by a process that died before its fsync.

        Also their folders, for files that were removed. Raises ``StorageError``.
        """
        if not self._durable:
            return
        pending = PendingSync(self.root)
        for at in files:
            if at.path in self._fsync_failed:
                self._rewrite(at.path)
                self._fsync_failed.discard(at.path)
            pending.note_file(at.path)
        try:
            pending.sync_found()
        finally:
            self._fsync_failed |= pending.fsync_failed

    def _rewrite(self, path: str) -> None:
        """Write a file anew; it is the version that it was, and whose it was."""
        stamps = fileio.rewrite(path)
        if stamps is None:
            return
        before, after = stamps
        if self.seen.get(path) == before:
            self.seen.set(path, after)
        ours = self._own_writes.get(path, ())
        if before in ours:
            self._own_writes.set(path, (after, *ours[:1]))

    def quarantine(self, at: DocumentPath, reason: str, *, restored: bool) -> None:
        """Move a document's file to the quarantine, and report it.

        ``restored``: the caller writes a good version in its place, which readers find elsewhere.
        Raises ``UnmergedStateError``.
        """
        self._worktree.check(at)
        self._cache.drop(at.path)
        self._quarantine.move(at.path, reason, at.kind, at.key, restored=restored)

    def quarantine_and_replace(
        self, at: DocumentPath, reason: str, document: Document, meta: Mapping[str, str]
    ) -> StoredDocument:
        """Quarantine an unusable document, and durably write a good version in its place.

        Readers find one of them all the time. Raises ``StorageError`` and ``UnmergedStateError``;
        then the file is as it was.
        """
        self._worktree.check(at)
        self._cache.drop(at.path)
        self._quarantine.link(at.path, reason, at.kind, at.key)
        stored = StoredDocument(document, meta, self.write(at, document, meta, snapshot=False))
        self.ensure_synced([at])  # no log has this version any more
        return stored

    def quarantine_and_restore(
        self, at: DocumentPath, reason: str, version: Document | None = None
    ) -> StoredDocument | None:
        """Quarantine an unusable document; its snapshot is written in its place and returned.

        ``version``: the unusable one; a newer one stays, and is returned. None if no snapshot is
        intact. Raises ``StorageError``.
        """
        if version is not None:
            try:
                newer = self.read(at)
            except StateCorruptedError as error:
                reason = error.message
            else:
                if newer is not None and newer.document != version:
                    return newer
        if fileio.stat_file(at.path) is None:
            self.ensure_synced([at])
            return None  # it was quarantined, or deleted, before
        known = self._cache.get(at.path)
        if known is not None and known.stamp != fileio.stat_file(at.path):
            self.keep_edited(at, known.document, known.meta)
        good, data = None, self.snapshots.bytes_of(at.path)
        if data is not None:
            try:
                good = decode_document(at.kind, at.key, data)
            except StateCorruptedError as error:
                reason = f"{reason}; its snapshot is damaged too: {error.message}"
        if good is None:
            self.quarantine(at, reason, restored=False)
            return None
        reason = f"{reason}; revision {good[0].revision} of {good[0].saved_at} is back"
        stored = self.quarantine_and_replace(at, reason, *good)
        # Should this version be damaged too, it is not restored once more.
        self.snapshots.drop(at.path)
        return stored


def ends_too_early(data: bytes) -> bool:
    """Whether the bytes are the beginning of a JSON document, which an editor may go on writing."""
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return error.pos >= len(data)
    return False


def _unpacked(data: bytes) -> bytes | None:
    """What was kept; None for one that is cut off, or too large. Raises ``zlib.error``."""
    if not data.startswith(_GZIP):
        return data
    unpacking = zlib.decompressobj(wbits=31)
    text = unpacking.decompress(data, fileio.MAX_BYTES)
    return text if unpacking.eof and not unpacking.unused_data else None


class Snapshots:
    """``.snapshots/``: an earlier version of each document, kept just before it is replaced.

    It is a link; that of a document over 64 KiB is compressed (gzip), under the same name.
    """

    def __init__(self, root: str, *, durable: bool) -> None:
        self._root = root
        self._durable = durable
        self._folder = f"{root}/{SNAPSHOTS}"
        self._renewed: LRUCache[str, float] = LRUCache(100_000)

    def keep(self, path: str) -> None:
        """Keep the version that is about to be replaced.

        A snapshot is a second copy: where a link is refused (by a file system without them), the
        document is saved all the same, and ``bytes_of`` finds none.
        """
        now = time.monotonic()
        if now - self._renewed.get(path, float("-inf")) < SNAPSHOT_SECONDS:
            return
        stamp = fileio.stat_file(path)
        if stamp is None:
            return
        self._renewed.set(path, now)
        target = self._folder + path[len(self._root) :]
        folder, name = os.path.split(target)
        temporary = f"{folder}/{fileio.TEMPORARY}{name}"
        try:
            fileio.has_folders(self._root, target)
        except AgentStateError:
            return
        try:
            try:
                syscalls.link(path, temporary)
            except FileNotFoundError:
                fileio.make_directories(self._root, folder[len(self._root) + 1 :], sync=False)
                syscalls.link(path, temporary)
            syscalls.rename(temporary, target)
            if stamp.size > _COMPRESSED_OVER:
                self._compress(target)
        except (OSError, AgentStateError):
            fileio.discard(temporary)

    def keep_version(self, path: str, data: bytes) -> None:
        """Keep a version that an edit has replaced in its file, so that memory alone has it."""
        target = self._folder + path[len(self._root) :]
        folder = os.path.dirname(target)[len(self._root) + 1 :]
        with contextlib.suppress(OSError, AgentStateError):
            fileio.make_directories(self._root, folder, sync=False)
            temporary, _ = fileio.write_temp_synced(target, data, sync=self._durable)
            fileio.rename_into_place(temporary, target)

    def _compress(self, target: str) -> None:
        found = fileio.read_file(target)
        packed = gzip.compress(found[0], 1, mtime=0) if found is not None else b""
        if found is not None and len(packed) < len(found[0]):
            # Synced first, as the file was that the link is of: a power cut leaves one of both.
            temporary, _ = fileio.write_temp_synced(target, packed, sync=self._durable)
            fileio.rename_into_place(temporary, target)

    def bytes_of(self, path: str) -> bytes | None:
        """The earlier version of the document at ``path``; None if it is missing."""
        place = self._folder + path[len(self._root) :]
        try:
            found = fileio.read_file(place) if fileio.has_folders(self._root, place) else None
            return _unpacked(found[0]) if found is not None else None
        except (AgentStateError, zlib.error):
            return None

    def remove_orphans(self, tree: DocumentTree) -> int:
        """Remove what is kept of documents that have no file any more; how many there were.

        Only names are compared. What cannot be listed stays.
        """
        removed, folders = 0, [""]
        for folder in folders:  # which grows inside the loop
            with contextlib.suppress(AgentStateError):
                kept = tree.entries(f"{self._folder}{folder}")
                there = {entry.name for entry in tree.entries(f"{self._root}{folder}")}
                for entry in kept:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}/{entry.name}")
                    elif entry.name not in there:
                        fileio.discard(entry.path)
                        removed += 1
        for folder in folders[:0:-1]:  # the deepest first; one that is not empty stays
            with contextlib.suppress(OSError):
                syscalls.rmdir(f"{self._folder}{folder}")
        return removed

    def drop(self, path: str) -> None:
        """Remove the earlier version; the next save keeps a new one."""
        self._renewed.pop(path, None)
        place = self._folder + path[len(self._root) :]
        with contextlib.suppress(AgentStateError):
            if fileio.has_folders(self._root, place):
                fileio.discard(place)
