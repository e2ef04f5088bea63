"""One state directory: its documents, its logs, its quarantine, and its own hidden folders.

The file stores call this from their threads. It takes no locks and orders nothing.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Sequence
from typing import TypeVar

from agent_state.errors import (
    AgentStateError,
    Key,
    StateCorruptedError,
    StorageError,
    UnmergedStateError,
    storage_error,
)
from agent_state.protocols import DocumentId, Incident, Origin
from agent_state.serializers import canonical_json, parse_object
from agent_state.storage import fileio, logs, paths, syscalls
from agent_state.storage.changes import ResolvedAppend, ResolvedChange, ResolvedPut, id_of
from agent_state.storage.document import encode_document
from agent_state.storage.document_files import SNAPSHOTS, DocumentFiles
from agent_state.storage.document_locks import DocumentLocks
from agent_state.storage.fileio import TEMPORARY
from agent_state.storage.locks import WRITERS
from agent_state.storage.log_index import INDEX, folder_of, remove_orphans
from agent_state.storage.log_writer import LogWriters
from agent_state.storage.paths import DocumentPath
from agent_state.storage.quarantine import QUARANTINE, Quarantine, quarantined
from agent_state.storage.tree import DocumentTree
from agent_state.storage.worktree import Worktree

GITIGNORE = """\
# Written by agent_state: what a running process needs, and nothing to commit.
.index/
.journal/
.locks/
.quarantine/
.runtime/
.snapshots/
.tmp-*
"""
_IGNORE_ALL = b"*\n"
"""For a folder's own ``.gitignore``: ``git clean`` and ``stash -u`` leave all in it alone."""
_MOST_ATTEMPTS = 10

_BEFORE_INDEX = GITIGNORE.replace(".index/\n", "").encode()
_OLDER_GITIGNORES = (_BEFORE_INDEX, _BEFORE_INDEX.replace(b".runtime/\n", b""))

T = TypeVar("T")

_logger = logging.getLogger("agent_state.storage")

JOURNAL, LOCKS = ".journal", ".locks"


class StateDirectory:
    """The files below ``root``.

    ``sync``: every write is fsynced before it returns. Without it the caller makes documents
    durable by other means; the quarantine and repairs are fsynced with ``durable`` (by default as
    ``sync``) all the same. ``now`` gives the time as it is written into files.
    """

    def __init__(
        self, root: str, *, sync: bool, now: Callable[[], str], durable: bool | None = None
    ) -> None:
        self._durable = sync if durable is None else durable
        self.sync = sync
        self.tree = DocumentTree(root)
        self.root = self.tree.root
        self.incidents = self.tree.incidents
        """Damage that was found since the directory was opened."""
        self.journal = f"{self.root}/{JOURNAL}"
        self.locks = f"{self.root}/{LOCKS}"
        self.quarantine = Quarantine(self.tree, sync=self._durable, now=now)
        self.worktree = Worktree(self.root)
        self.documents = DocumentFiles(
            self.tree, self.quarantine, self.worktree, sync=sync, durable=self._durable
        )
        self.logs = LogWriters(self.tree, self.quarantine, self.worktree, durable=self._durable)

    def locate(self, kind: str, key: Key, ending: str = paths.DOCUMENT) -> DocumentPath:
        """Where a document, or with ``paths.LOG`` a log, is. Raises ``InvalidKeyError``."""
        return paths.locate(self.root, kind, key, ending)

    def new_locks(self) -> DocumentLocks:
        """A holder of locks that has none yet."""
        return DocumentLocks(self.root, self.locks, sync=self.sync)

    def origin(self) -> Origin:
        """The identity and the contents of the directory, for a mirror."""
        damaged = (kept for kept in quarantined(self.tree) if kept.kind is not None)
        return Origin(
            read_instance(self.root),
            tuple(kind for kind in self.tree.kinds() if kind not in paths.RECORDED),
            frozenset((str(kept.kind), kept.key) for kept in damaged),
            self.root,
        )

    def prepare(self) -> None:
        """Make the root and its own folders. Raises ``StorageError``.

        Others who open it at the same moment tidy up, and remove unfinished files there.
        """
        for attempt in range(_MOST_ATTEMPTS):
            try:
                return self._prepare()
            except StorageError as error:
                if error.errno != errno.ENOENT or attempt + 1 == _MOST_ATTEMPTS:
                    raise
        return None

    def _prepare(self) -> None:
        parent, name = os.path.split(self.root)
        try:
            os.makedirs(parent, exist_ok=True)
        except OSError as error:
            raise storage_error(error, "making a directory", path=parent) from error
        # A journal that is durable in a folder that is not would be lost with the folder.
        fileio.make_directories(parent, name, sync=self._durable)
        for folder in (JOURNAL, LOCKS, QUARANTINE, SNAPSHOTS):
            fileio.make_directories(self.root, folder, sync=self._durable)
            self._ignore(folder, _IGNORE_ALL)
        fileio.make_directories(self.root, f"{LOCKS}/{WRITERS}", sync=self._durable)
        if fileio.stat_file(f"{self.root}/{paths.RUN}/.gitignore") is None:
            self._take_over_run()
            self._ignore(paths.RUN, _IGNORE_ALL)
        ignore = f"{self.root}/.gitignore"
        stamp = fileio.stat_file(ignore)
        older = (text for text in _OLDER_GITIGNORES if stamp and stamp.size == len(text))
        if stamp is None or any(_has(ignore, text) for text in older):
            fileio.replace_file(ignore, GITIGNORE.encode(), sync=self.sync)

    def _ignore(self, folder: str, patterns: bytes) -> None:
        """Write a folder's ``.gitignore``, unless it has one."""
        path = os.path.join(self.root, folder, ".gitignore")
        if fileio.stat_file(path) is None:
            fileio.replace_file(path, patterns, sync=self.sync)

    def _take_over_run(self) -> None:
        """Link what an older version kept of its run in ``system`` into the working folder.

        The old files stay as they are: git may have them. Nothing reads them again.
        """
        fileio.make_directories(self.root, paths.RUN, sync=self._durable)
        for entry in self.tree.walk(f"{self.root}/system"):
            below = self.tree.relative(entry.path).removeprefix("system/")
            name = below.partition("/")[0].removesuffix(paths.DOCUMENT)
            if name in paths.RUN_NAMES and below.endswith(paths.DOCUMENT):
                new = f"{paths.RUN}/{below}"
                fileio.make_directories(self.root, os.path.dirname(new), sync=self._durable)
                try:
                    syscalls.link(entry.path, f"{self.root}/{new}")
                except FileExistsError:
                    continue  # another process was first
                except OSError as error:
                    raise storage_error(error, "moving a document", path=entry.path) from error

    def remove_leftovers(self, *, before_ns: float = math.inf) -> int:
        """Remove temporary files of dead writers, and what is beside that which is gone.

        That is the snapshots of documents and the indexes of logs.

        Returns how many there were. ``before_ns``: a file with a later mtime may belong to a living
        writer, and stays.
        """
        removed = 0
        for entry in self.tree.walk(self.root, hidden=True):
            if entry.name.startswith(fileio.TEMPORARY):
                stamp = fileio.stat_file(entry.path)
                if stamp and stamp.mtime_ns < before_ns:
                    fileio.discard(entry.path)
                    removed += 1
        removed += remove_orphans(self.root, self.tree.walk(f"{self.root}/{INDEX}", hidden=True))
        return removed + self.documents.snapshots.remove_orphans(self.tree)

    def keep_out(self, change: ResolvedChange, reason: str) -> None:
        """Keep a change that must not be written to its file: in the quarantine, and reported."""
        kind, key = id_of(change)
        if isinstance(change, ResolvedAppend):
            data, ending = logs.encode_lines(key, [change.record]), paths.LOG
        elif isinstance(change, ResolvedPut):
            data, ending = encode_document(change.document, change.meta), paths.DOCUMENT
        else:
            data, ending = b"", paths.DOCUMENT
            reason = f"the deletion of revision {change.revision} was not made: {reason}"
        path = self.locate(kind, key, ending).path
        kept = self.quarantine.keep(path, data, reason, kind, key) if data else None
        self.quarantine.report(self.tree.relative(path), reason, kind, key, kept)

    def report_unmerged(self, error: UnmergedStateError) -> None:
        """Report a document or log that is read-only until a merge is resolved, once."""
        path = self.tree.relative(error.path) if error.path else None
        incident = Incident(error.message, error.kind, error.key, path)
        if incident not in self.incidents:
            self.incidents.append(incident)
            _logger.warning("%s", error)

    def retry_after_clearing_path(self, work: Callable[[], T]) -> T:
        """Run ``work``; quarantine any file that blocks a folder it needs, and retry.

        For changes that were acknowledged before.
        """
        while True:
            try:
                return work()
            except StorageError as error:
                path = error.path or ""
                inside = path.startswith(f"{self.root}/")
                hidden = self.tree.relative(path).startswith(".")
                if error.errno not in (errno.EEXIST, errno.ELOOP) or not inside or hidden:
                    raise
                self.quarantine.move(path, "it stood where a folder must be")


# -- the instance -------------------------------------------------------------------------
#
# An id of the directory's own, for a mirror that keeps a copy of it. It is in
# ``.mirror/instance.json``, which git ignores: a clone of a directory is another instance.

_INSTANCE_FOLDER = ".mirror"
_INSTANCE_FILE = f"{_INSTANCE_FOLDER}/instance.json"


def read_instance(root: str) -> str | None:
    """The id of a directory; None when it has none. Raises ``StateCorruptedError``. Blocks."""
    path = f"{root}/{_INSTANCE_FILE}"
    found = fileio.read_file(path)
    if found is None:
        return None
    ident = parse_object(found[0]).get("instance")
    if type(ident) is not str or not ident:
        raise StateCorruptedError("it does not name an instance", path=path)
    return ident


def write_instance(root: str, ident: str) -> None:
    """Give a directory this id. Raises ``StorageError``. Blocks."""
    fileio.make_directories(root, _INSTANCE_FOLDER, sync=True)
    ignore = f"{root}/{_INSTANCE_FOLDER}/.gitignore"
    if fileio.stat_file(ignore) is None:
        fileio.replace_file(ignore, b"*\n", sync=True)
    data = canonical_json({"instance": ident}) + b"\n"
    fileio.replace_file(f"{root}/{_INSTANCE_FILE}", data, sync=True)


def ensure_instance(root: str) -> str:
    """The id of a directory, made now if it has none. Blocks."""
    ident = read_instance(root)
    if ident is None:
        ident = secrets.token_hex(8)
        write_instance(root, ident)
        ident = read_instance(root) or ident  # of two processes that made one, the last wins
    return ident


def is_fresh(root: str) -> bool:
    """Whether a directory has no documents and no id, so that a copy may be put there. Blocks."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return read_instance(root) is None and all(name.startswith(".") for name in names)


# -- erasing ---------------------------------------------------------------------------------
#
# Called under the lock of the key, when no redo record and no journal could restore it. A segment
# or a redo record in the quarantine is not searched: it holds changes of many keys.


def _has(path: str, data: bytes) -> bool:
    try:
        found = fileio.read_file(path)
    except AgentStateError:
        return False
    return found is not None and found[0] == data


ERASED_AT_ONCE = 256
"""The most keys of one pass."""
Erased = tuple[list[Key], int]
"""The keys of the documents there were, and the number of logs."""


def erase(
    directory: StateDirectory, targets: Sequence[DocumentId], *, durable: bool | None = None
) -> list[Erased | AgentStateError]:
    """Remove documents, their logs, everything below them, and what was kept of them.

    An error does not keep the others from being erased. ``durable``: whether the removal is
    synced; None for as the directory syncs its writes. Raises ``DurabilityUnknownError``.
    """
    removal = _Removal(directory)
    erased: list[Erased | AgentStateError] = []
    for kind, key in targets:
        try:
            erased.append(removal.remove(kind, key))
        except AgentStateError as error:
            erased.append(error)
    if directory.sync if durable is None else durable:
        for folder in removal.changed:
            fileio.sync_directory(folder)
    return erased


class _Removal:
    """One pass that erases: each folder of the quarantine is listed once."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory
        self._quarantined: dict[str, dict[str, list[str]]] = {}
        """By folder and by the name of the file that they were: the paths."""
        self.changed: dict[str, None] = {}
        """The folders from which something was removed."""

    def remove(self, kind: str, key: Key) -> Erased:
        directory = self._directory
        documents = _existing(directory, kind, key, paths.DOCUMENT)
        logs = _existing(directory, kind, key, paths.LOG)
        found = bool(documents or logs)
        for at in documents:
            directory.documents.delete(at, sync=False)
        for at in logs:
            directory.logs.forget(at)
        [folder] = paths.directories(key[-1:])
        for at in logs:
            _remove_tree(directory.tree, folder_of(directory.root, at.path))
        for hidden in ("", f"/{SNAPSHOTS}", f"/{QUARANTINE}", f"/{INDEX}"):
            parent = "/".join(
                (directory.root + hidden, paths.folder_of(kind, key), *paths.directories(key[:-1]))
            )
            if fileio.has_folders(directory.root, f"{parent}/"):
                for path in self._files_of(key, parent, in_quarantine=hidden.endswith(QUARANTINE)):
                    found = fileio.remove_file(path, sync=False) or found
                if _remove_tree(directory.tree, f"{parent}/{folder}") or found:
                    self.changed[parent] = None
            found = False
        return [at.key for at in documents], len(logs)

    def _files_of(self, key: Key, parent: str, *, in_quarantine: bool) -> list[str]:
        """The paths at which the document, the log, or what was kept of them may be."""
        names = [paths.encode(key[-1]) + ending for ending in (paths.DOCUMENT, paths.LOG)]
        if in_quarantine:
            kept = self._kept_in(parent)
            return [path for name in names for path in kept.get(name, ())]
        return [f"{parent}/{temporary}{name}" for name in names for temporary in ("", TEMPORARY)]

    def _kept_in(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._quarantined:
            named = self._quarantined[folder] = {}
            for entry in self._directory.tree.entries(folder):
                kept = _NUMBERED.fullmatch(entry.name)
                if kept is not None and not entry.is_dir(follow_symlinks=False):
                    named.setdefault(kept[1], []).append(entry.path)
        return self._quarantined[folder]


_NUMBERED = re.compile(r"(.+?)(?:\.\d+(?:\.reason\.json)?)?")


def _existing(directory: StateDirectory, kind: str, key: Key, ending: str) -> list[DocumentPath]:
    keys = directory.tree.keys(kind, key, ending)
    found = [directory.locate(kind, each, ending) for each in keys]
    at = directory.locate(kind, key, ending)
    if fileio.has_folders(directory.root, at.path) and fileio.stat_file(at.path) is not None:
        found.insert(0, at)
    return found


def _remove_tree(tree: DocumentTree, folder: str) -> bool:
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
    for path in folders:  # which grows inside the loop
        for entry in tree.entries(path):
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
