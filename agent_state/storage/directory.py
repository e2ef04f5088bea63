"""One state directory as blocking functions: its documents, its logs, and what is found damaged.

Both file stores call this from their threads; it has no locks and no order of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from agent_state.errors import (
    AgentStateError,
    Key,
    StateCorruptedError,
    StorageError,
    storage_error,
)
from agent_state.protocols import Document, Incident
from agent_state.storage import fileio, paths, syscalls
from agent_state.storage.document import decode_document, encode_document
from agent_state.storage.fileio import PendingSync, Stamp
from agent_state.storage.locks import WRITERS
from agent_state.storage.log_writer import LogWriter
from agent_state.storage.tree import DocumentTree

GITIGNORE = """\
# Written by agent_state: what a running process needs, and nothing to commit.
.journal/
.locks/
.quarantine/
.snapshots/
.tmp-*
"""

T = TypeVar("T")

JOURNAL, LOCKS = ".journal", ".locks"

RACY_NS = 100_000_000
"""What was read this soon after its mtime may have changed since without a new mtime."""
CACHE_BYTES = 32 * 1024 * 1024
_ENTRY_BYTES = 1024
"""What a document in the cache takes beside its bytes, however small it is."""
STAMPS_MAX = 200_000
_SETTLE_SECONDS = 0.05


BaseStamps = dict[tuple[str, Key], Stamp | None]
"""Which version of each document's file a change builds on; None where there was none."""


class StoredDocument(NamedTuple):
    """A document as it is on disk."""

    document: Document
    meta: dict[str, str]
    stamp: Stamp


class StateDirectory(DocumentTree):
    """Files below ``root``.

    ``sync``: every write is fsynced before it returns. Without it the caller makes documents
    durable by other means; what is put aside is fsynced with ``durable`` all the same.
    """

    def __init__(
        self, root: str, *, sync: bool, now: Callable[[], str], durable: bool | None = None
    ) -> None:
        super().__init__(root)
        self.sync = sync
        self._durable = sync if durable is None else durable
        self._now = now
        self.quarantine_dir = Quarantine(self.root, sync=self._durable, now=now)
        self.snapshots = Snapshots(self.root)
        self.seen: OrderedDict[str, Stamp | None] = OrderedDict()
        self._ours: OrderedDict[str, tuple[Stamp | None, ...]] = OrderedDict()
        self._logs: dict[str, LogWriter] = {}
        self._known: set[str] = set()
        self._fsync_failed: set[str] = set()
        self._cache: OrderedDict[str, tuple[StoredDocument, int]] = OrderedDict()
        self._cache_bytes = 0
        self._mutex = threading.Lock()

    # -- the directory itself ------------------------------------------------------------

    def prepare(self) -> None:
        """Make the root and its own folders. Raises ``StorageError``."""
        parent, name = os.path.split(self.root)
        try:
            os.makedirs(parent, exist_ok=True)
        except OSError as error:
            raise storage_error(error, "making a directory", path=parent) from error
        # A journal that is durable in a folder that is not would be lost with the folder.
        fileio.make_directories(parent, name, sync=self._durable)
        for folder in (JOURNAL, LOCKS, f"{LOCKS}/{WRITERS}", QUARANTINE, SNAPSHOTS):
            fileio.make_directories(self.root, folder, sync=self._durable)
        ignore = f"{self.root}/.gitignore"
        if fileio.stat_file(ignore) is None:
            fileio.replace_file(ignore, GITIGNORE.encode(), sync=self.sync)

    def make_parent(self, path: str) -> None:
        """Make the directories above a document's or log's path, none of which may be a symlink."""
        folder = os.path.dirname(path)
        if folder not in self._known or not fileio.has_folders(self.root, path):
            fileio.make_directories(self.root, self.relative(folder), sync=self.sync)
            self._known.add(folder)

    def remove_temporaries(self, *, before_ns: float = math.inf) -> int:
        """Remove what dead writers left; what was written later than that has a living one."""
        removed = 0
        for entry in self.tree(self.root, hidden=True):
            if entry.name.startswith(fileio.TEMPORARY):
                stamp = fileio.stat_file(entry.path)
                if stamp and stamp.mtime_ns < before_ns:
                    fileio.discard(entry.path)
                    removed += 1
        return removed

    # -- documents -----------------------------------------------------------------------

    def read(
        self, kind: str, key: Key, *, verified_dirs: set[str] | None = None
    ) -> StoredDocument | None:
        """The document, from the cache if the file is surely the same.

        ``verified_dirs``: folders just found to be none
        but ours, for whoever reads many files at once. Raises ``StateCorruptedError`` when it
        cannot be read.
        """
        path = self.path(kind, key)
        folder = os.path.dirname(path)
        if verified_dirs is None or folder not in verified_dirs:
            if not fileio.has_folders(self.root, path):
                self._forget(path)
                return None
            if verified_dirs is not None:
                verified_dirs.add(folder)
        cached = self._cache.get(path)
        if cached is not None:
            stored, racy = cached
            if not racy and fileio.stat_file(path) == stored.stamp:
                return stored
        deadline = time.monotonic() + 4 * _SETTLE_SECONDS
        while True:
            found = fileio.read_file(path)
            if found is None:
                self._forget(path)
                return None
            data, stamp = found
            try:
                document, meta = decode_document(kind, key, data)
            except StateCorruptedError as error:
                # An editor that writes in place is seen half way; give it a moment.
                fresh = time.time_ns() - stamp.mtime_ns < 1_000_000_000
                if not fresh or time.monotonic() > deadline:
                    raise StateCorruptedError(
                        error.message, kind=kind, key=key, path=path
                    ) from error
                time.sleep(_SETTLE_SECONDS)
                continue
            stored = StoredDocument(document, meta, stamp)
            self._remember(path, stored, len(data))
            return stored

    def write(self, document: Document, meta: dict[str, str], *over: Stamp | None) -> Stamp:
        """Put a document in its place, whole and (with ``sync``) durable.

        ``over``: the version of the file that was verified_dirs at, and is replaced.
        """
        path = self.path(document.kind, document.key)
        data = encode_document(document, meta)
        self.make_parent(path)
        self.snapshots.keep(path)

        def announce(stamp: Stamp) -> None:
            for base_stamps in over:
                self.keep_foreign_edit(path, document, base_stamps)
            self.expect(path, stamp)

        stamp = fileio.replace_file(path, data, sync=self.sync, announce=announce)
        self.note_document(path, document, meta, stamp)
        return stamp

    def keep_foreign_edit(self, path: str, document: Document, base_stamps: Stamp | None) -> None:
        """Keep an edit made since ``base`` was read, just before the file is replaced."""
        stamp = fileio.stat_file(path)
        if stamp is None or stamp == base_stamps:
            return
        reason = f"changed outside, just before revision {document.revision} took its place"
        kind, key = document.kind, document.key
        kept = self.quarantine_dir.link(path, reason, kind, key)
        self.incidents.append(Incident(reason, kind, key, self.relative(path), kept, restored=True))

    def ensure_synced(self, kind: str, key: Key, ending: str = paths.DOCUMENT) -> None:
        """Make durable what is there already, or that nothing is there any more."""
        self.ensure_all_synced([((kind, key), ending)])

    def ensure_all_synced(self, places: Iterable[tuple[tuple[str, Key], str]]) -> None:
        """``confirm`` for many, each with the ending of its file. Raises ``StorageError``."""
        if not self._durable:
            return
        unsynced = PendingSync(self.root)
        for place, ending in places:
            path = self.path(*place, ending)
            if path in self._fsync_failed:
                fileio.rewrite(path)
                self._fsync_failed.discard(path)
            unsynced.note_file(path)
        try:
            unsynced.sync_found()
        finally:
            self._fsync_failed |= unsynced.fsync_failed

    def note_document(
        self, path: str, document: Document, meta: dict[str, str], stamp: Stamp
    ) -> None:
        """A document has come to its place."""
        self.mark_seen(path, stamp)
        self._remember(path, StoredDocument(document, meta, stamp), stamp.size)

    def remove(self, kind: str, key: Key, *, sync: bool | None = None) -> bool:
        """Remove a document; whether there was one."""
        path = self.path(kind, key)
        self._forget(path)
        self.expect(path, None)
        self.mark_seen(path, None)
        return fileio.remove_file(path, sync=self.sync if sync is None else sync)

    def mark_seen(self, path: str, stamp: Stamp | None) -> None:
        """Remember the version of a file that was read or written here."""
        with self._mutex:
            self.seen.pop(path, None)
            self.seen[path] = stamp
            if len(self.seen) > STAMPS_MAX:
                self.seen.popitem(last=False)

    def expect(self, path: str, stamp: Stamp | None) -> None:
        """This version of a file is about to come from us; None when it is about to go."""
        with self._mutex:
            earlier = self._ours.pop(path, ())
            self._ours[path] = (stamp, *earlier[:1])
            if len(self._ours) > STAMPS_MAX:
                self._ours.popitem(last=False)

    def forget_own_write(self, path: str, stamp: Stamp | None) -> None:
        """Somebody else has replaced or removed this version of a file."""
        if path not in self._ours:
            return
        with self._mutex:
            kept = tuple(ours for ours in self._ours.get(path, ()) if ours != stamp)
            if path in self._ours:
                self._ours[path] = kept

    def changed_externally(self, path: str) -> tuple[Stamp | None, bool]:
        """The stamp of a file (None: it is gone), and whether somebody else brought that about."""
        stamp = fileio.stat_file(path)
        if path not in self._ours:  # where every write of ours is told before it is begun
            return stamp, True
        while stamp not in self._ours.get(path, ()):
            # Two writes of ours may have passed since it was verified_dirs at.
            again = fileio.stat_file(path)
            if again == stamp:
                return stamp, True
            stamp = again
        return stamp, False

    def forget(self, kind: str, key: Key) -> None:
        self._forget(self.path(kind, key))

    def _remember(self, path: str, stored: StoredDocument, size: int) -> None:
        racy = time.time_ns() - stored.stamp.mtime_ns < RACY_NS
        with self._mutex:
            old = self._cache.pop(path, None)
            if old is not None:
                self._cache_bytes -= old[0].stamp.size + _ENTRY_BYTES
            self._cache[path] = (stored, racy)
            self._cache_bytes += size + _ENTRY_BYTES
            while self._cache_bytes > CACHE_BYTES and self._cache:
                _, (dropped, _) = self._cache.popitem(last=False)
                self._cache_bytes -= dropped.stamp.size + _ENTRY_BYTES

    def _forget(self, path: str) -> None:
        with self._mutex:
            old = self._cache.pop(path, None)
            if old is not None:
                self._cache_bytes -= old[0].stamp.size + _ENTRY_BYTES

    # -- logs ----------------------------------------------------------------------------

    def log(self, kind: str, key: Key) -> LogWriter:
        """The one writer of a log in this process."""
        path = self.path(kind, key, paths.LOG)
        fileio.has_folders(self.root, path)
        log = self._logs.get(path)
        if log is None:
            log = self._logs[path] = LogWriter(
                path,
                key,
                lambda torn, why: self._report_torn(kind, key, torn, why),
                lambda why: self._report_no_log(kind, key, why),
            )
        return log

    def forget_log(self, kind: str, key: Key) -> None:
        """The log is about to go; what is appended next begins a new one."""
        self._logs.pop(self.path(kind, key, paths.LOG), None)

    def _report_torn(self, kind: str, key: Key, torn: bytes, why: str) -> None:
        path = self.path(kind, key, paths.LOG)
        kept = self.quarantine_dir.keep(path, torn, why, kind, key)
        self.incidents.append(Incident(why, kind, key, self.relative(path), kept))

    def _report_no_log(self, kind: str, key: Key, why: str) -> None:
        path = self.path(kind, key, paths.LOG)
        kept = self.quarantine_dir.move(path, why, kind, key)
        self.incidents.append(Incident(why, kind, key, self.relative(path), kept))

    # -- damage --------------------------------------------------------------------------

    def retry_after_clearing_path(self, work: Callable[[], T]) -> T:
        """Do what was acknowledged already; what stands where a folder must be is put aside."""
        while True:
            try:
                return work()
            except StorageError as error:
                path = error.path or ""
                ours = path.startswith(f"{self.root}/") and not self.relative(path).startswith(".")
                if error.errno not in (errno.EEXIST, errno.ELOOP) or not ours:
                    raise
                reason = "it stood where a folder must be"
                kept = self.quarantine_dir.move(path, reason)
                self.incidents.append(Incident(reason, path=self.relative(path), kept=kept))

    def put_aside(self, kind: str, key: Key, reason: str, *, restored: bool) -> None:
        """Move a document's file to the quarantine, and say so."""
        path = self.path(kind, key)
        self._forget(path)
        kept = self.quarantine_dir.move(path, reason, kind, key)
        self.incidents.append(Incident(reason, kind, key, self.relative(path), kept, restored))

    def quarantine_and_restore(self, kind: str, key: Key, reason: str) -> StoredDocument | None:
        """Put a damaged document aside and bring the last good version back, if there is one."""
        path = self.path(kind, key)
        if fileio.stat_file(path) is None:
            self.ensure_synced(kind, key)
            return None  # it has been put aside, or deleted, before
        stored, good = None, self.snapshots.bytes_of(path)
        if good is not None:
            try:
                document, meta = decode_document(kind, key, good)
                stored = StoredDocument(document, meta, Stamp(0, 0, 0))
            except StateCorruptedError as error:
                reason = f"{reason}; its snapshot is damaged too: {error.message}"
        self.put_aside(kind, key, reason, restored=stored is not None)
        if stored is not None:
            stored = stored._replace(stamp=self.write(stored.document, stored.meta))
            self.ensure_synced(kind, key)  # no journal has this version any more
            # Should this version be no good either, it is not brought back once more.
            self.snapshots.drop(path)
        return stored


QUARANTINE, SNAPSHOTS = ".quarantine", ".snapshots"

SNAPSHOT_SECONDS = 60.0
"""The earlier version of a document is renewed at most this often."""
_REMEMBERED = 100_000


class Snapshots:
    """An earlier version of each document, kept by a link just before it is replaced."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._renewed: dict[str, float] = {}

    def keep(self, path: str) -> None:
        """Keep what is about to be replaced.

        A snapshot is a second line: where a link is refused (a file system without them, a
        full disk), the document is saved all the same, and ``bytes_of`` finds none.
        """
        now = time.monotonic()
        if now - self._renewed.get(path, float("-inf")) < SNAPSHOT_SECONDS:
            return
        if fileio.stat_file(path) is None:
            return
        if len(self._renewed) >= _REMEMBERED:
            self._renewed.clear()
        self._renewed[path] = now
        target = self._place(path)
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
        except (OSError, AgentStateError):
            fileio.discard(temporary)

    def bytes_of(self, path: str) -> bytes | None:
        """The earlier version of the document at ``path``; None when there is none."""
        place = self._place(path)
        try:
            found = fileio.read_file(place) if fileio.has_folders(self._root, place) else None
        except AgentStateError:
            return None
        return None if found is None else found[0]

    def drop(self, path: str) -> None:
        """The earlier version has been used; the next save keeps a new one."""
        self._renewed.pop(path, None)
        place = self._place(path)
        with contextlib.suppress(AgentStateError):
            if fileio.has_folders(self._root, place):
                fileio.discard(place)

    def _place(self, path: str) -> str:
        return f"{self._root}/{SNAPSHOTS}/{path[len(self._root) + 1 :]}"


class Quarantine:
    """Where damaged and defeated files go, each with its reason."""

    def __init__(self, root: str, *, sync: bool, now: Callable[[], str]) -> None:
        self._root = root
        self._sync = sync
        self._now = now

    def move(self, path: str, reason: str, kind: str | None = None, key: Key = ()) -> str:
        """Move a file there; its new place, relative to the root. Raises ``StorageError``."""
        kept = self._announce(path, reason, kind, key)
        try:
            syscalls.rename(path, kept)
        except OSError as error:
            raise storage_error(error, "putting a file aside", path=path) from error
        if self._sync:
            fileio.sync_directory(os.path.dirname(kept))
            fileio.sync_directory(os.path.dirname(path))
        return kept[len(self._root) + 1 :]

    def link(self, path: str, reason: str, kind: str | None = None, key: Key = ()) -> str:
        """Keep a file that is about to be replaced; readers find one all the time."""
        kept = self._announce(path, reason, kind, key)
        try:
            syscalls.link(path, kept)
        except OSError:  # a file system without links
            try:
                syscalls.rename(path, kept)
            except OSError as error:
                raise storage_error(error, "putting a file aside", path=path) from error
        if self._sync:
            fileio.sync_directory(os.path.dirname(kept))
        return kept[len(self._root) + 1 :]

    def keep(
        self, path: str, data: bytes, reason: str, kind: str | None = None, key: Key = ()
    ) -> str:
        """Keep bytes that were at ``path``; their new place, relative to the root."""
        kept = self._announce(path, reason, kind, key)
        fileio.replace_file(kept, data, sync=self._sync)
        return kept[len(self._root) + 1 :]

    def _announce(self, path: str, reason: str, kind: str | None, key: Key) -> str:
        """Write the reason, and give the place it speaks of."""
        was = path[len(self._root) + 1 :].replace(os.sep, "/")
        fileio.make_directories(self._root, f"{QUARANTINE}/{os.path.dirname(was)}", sync=self._sync)
        number = 1
        while os.path.lexists(kept := f"{self._root}/{QUARANTINE}/{was}.{number}"):
            number += 1
        note = {"at": self._now(), "key": list(key), "kind": kind, "reason": reason, "was": was}
        text = json.dumps(note, indent=2, ensure_ascii=False) + "\n"
        # A file's name need not be Unicode; its reason must be, to be read.
        data = text.encode(errors="replace")
        fileio.replace_file(f"{kept}.reason.json", data, sync=self._sync)
        return kept


def erase(
    directory: StateDirectory, kind: str, key: Key, *, durable: bool | None = None
) -> tuple[list[Key], int]:
    """The keys of the documents that there were, and how many logs. Raises ``StorageError``.

    ``durable``: whether the removal is synced; by default as the directory syncs its writes.
    """
    sync = directory.sync if durable is None else durable
    documents = _there(directory, kind, key, paths.DOCUMENT)
    logs = _there(directory, kind, key, paths.LOG)
    for each in documents:
        directory.remove(kind, each, sync=False)
    for each in logs:
        directory.forget_log(kind, each)
    for base in (directory.root, f"{directory.root}/{SNAPSHOTS}", f"{directory.root}/{QUARANTINE}"):
        _remove_all(directory, base, kind, key, sync=sync)
    for each in documents:
        directory.snapshots.drop(directory.path(kind, each))
    return documents, len(logs)


def _there(directory: StateDirectory, kind: str, key: Key, ending: str) -> list[Key]:
    found = directory.keys(kind, key, ending)
    if fileio.has_folders(directory.root, path := directory.path(kind, key, ending)):
        own = fileio.stat_file(path)
        if own is not None:
            found.insert(0, key)
    return found


def _remove_all(directory: StateDirectory, base: str, kind: str, key: Key, *, sync: bool) -> None:
    """Remove what one tree has of it: the files with its name, and its folder."""
    names = [paths.encode(key[-1]) + ending for ending in (paths.DOCUMENT, paths.LOG)]
    parent = "/".join((base, kind, *paths.directories(key[:-1])))
    if not fileio.has_folders(directory.root, f"{parent}/"):
        return
    numbered = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:\.\d+(?:\.reason\.json)?)?")
    removed = False
    for entry in directory.entries(parent):
        if numbered.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
            fileio.remove_file(entry.path, sync=False)
            removed = True
    [folder] = paths.directories(key[-1:])
    if _remove_tree(directory, f"{parent}/{folder}"):
        removed = True
    if removed and sync:
        fileio.sync_directory(parent)


def _remove_tree(directory: StateDirectory, folder: str) -> bool:
    """Remove a folder with everything in it; whether there was one. Symlinks are not followed."""
    try:
        mode = syscalls.stat(folder).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error(error, "looking at a folder", path=folder) from error
    if not stat.S_ISDIR(mode):
        return fileio.remove_file(folder, sync=False)
    folders = [folder]
    for path in folders:  # which grows meanwhile
        for entry in directory.entries(path):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                fileio.remove_file(entry.path, sync=False)
    for path in reversed(folders):
        try:
            syscalls.rmdir(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise storage_error(error, "removing a folder", path=path) from error
    return True
