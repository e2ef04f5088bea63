"""Locks of documents between processes: one file has a byte for every document.

A lock covers everything below its key. So a change takes the lock of its document, and shares the
locks of all keys above it. A process that is stopped in the middle of a commit holds only these;
when it dies, the kernel releases them. No file is made for a document.

These are the locks of an open file, which Linux has. Elsewhere a lock is a file in ``.locks/``, and
documents whose keys begin with the same id share it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b

from agent_state.errors import Key, LockTimeoutError, StorageError, storage_error
from agent_state.protocols import DocumentId
from agent_state.storage import locks, paths
from agent_state.storage.locks import PER_DOCUMENT, FileLock

if PER_DOCUMENT:
    import fcntl

FILE = "documents.lock"

Wanted = Mapping[DocumentId, bool]
"""Locks by document; True: exclusive, False: shared."""
Taken = list[tuple[DocumentId, bool | None]]
"""Locks that were taken, in order, each with what its holder had of it before."""

FLOCK = struct.Struct("hhqqi0q")
"""``struct flock``: type, whence, start, length, pid."""


def locks_of(changed: Iterable[DocumentId], checked: Iterable[DocumentId] = ()) -> Wanted:
    """The locks for a change of documents or logs that relies on the checked ones."""
    changed, wanted = tuple(changed), dict[DocumentId, bool]()
    if not PER_DOCUMENT:
        return {(kind, key[:1]): True for kind, key in (*changed, *checked)}
    for kind, key in (*changed, *checked):
        for end in range(1, len(key) + 1):
            wanted[kind, key[:end]] = False
    wanted.update(dict.fromkeys(changed, True))
    return wanted


def lock_of(kind: str, key: Key) -> Wanted:
    """The lock of a key and of everything below it. Raises ``InvalidKeyError``."""
    paths.relative(kind, key, paths.DOCUMENT)
    return locks_of([(kind, key)])


def conflict(ours: Wanted, theirs: Wanted) -> bool:
    """Whether two holders cannot have these locks at once."""
    return any(exclusive or ours[name] for name, exclusive in theirs.items() if name in ours)


class DocumentLocks:
    """The locks of one holder, a task or a thread, in the folder of locks of a directory.

    Its methods do not wait for a lock.
    """

    def __init__(self, root: str, folder: str, *, sync: bool) -> None:
        self._root, self._folder, self._sync = root, folder, sync
        self.path = f"{folder}/{FILE}"
        self._held: dict[DocumentId, bool] = {}
        self._files: dict[DocumentId, FileLock] = {}
        self._file: FileLock | None = None

    def holds(self, name: DocumentId) -> bool:
        """Whether it has this lock, exclusive or shared."""
        return name in self._held

    @property
    def in_place(self) -> bool:
        """Whether others find its locks: the file is at its path. Raises ``StorageError``."""
        return self._file is None or locks.is_current(self._file)

    def check_in_place(self) -> None:
        """Raises ``StorageError`` when others no longer find a lock that it has."""
        if self._held and not self.in_place:
            raise StorageError("the lock file was removed while the lock was held", path=self.path)

    def take(self, wanted: Wanted) -> Taken:
        """Take all these locks, or none, for ``give_back``.

        A lock that the holder shares becomes exclusive if that is wanted. Raises
        ``LockTimeoutError`` when one is not free, ``StorageError``.
        """
        taken: Taken = []
        if self._file is None and PER_DOCUMENT:
            self._file = locks.open_below(self._root, self.path, sync=self._sync)
        try:
            for name, exclusive in wanted.items():
                before = self._held.get(name)
                if before is None or (exclusive and not before):
                    self._set(name, exclusive)
                    self._held[name] = exclusive
                    taken.append((name, before))
        except BaseException:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, taken: Taken) -> bool:
        """Make the locks that ``take`` returned as they were before; whether any is left."""
        for name, before in reversed(taken):
            if name not in self._held:
                continue  # the store was closed meanwhile, which gave back all
            self._set(name, before)
            if before is None:
                self._held.pop(name, None)  # or it was closed just now
            else:
                self._held[name] = before
        return bool(self._held)

    def release(self) -> None:
        """Give back all."""
        self._held.clear()
        while self._files:
            self._files.popitem()[1].release()
        if self._file is not None:
            self._file.release()
            self._file = None

    def _set(self, name: DocumentId, exclusive: bool | None) -> None:
        """Lock one document, or unlock it (None). Raises as ``take``."""
        if self._file is None:
            self._set_file(name, exclusive)
            return
        mode = {True: fcntl.F_WRLCK, False: fcntl.F_RDLCK, None: fcntl.F_UNLCK}[exclusive]
        try:
            request = FLOCK.pack(mode, 0, byte_of(name), 1, 0)
            fcntl.fcntl(self._file.fileno(), fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _not_free(name, self.path) from None
            raise storage_error(error, "locking a document", path=self.path) from error

    def _set_file(self, name: DocumentId, exclusive: bool | None) -> None:
        if not exclusive:
            self._files.pop(name).release()
            return
        path = f"{self._folder}/{paths.relative(*name, '.lock')}"
        lock = locks.open_below(self._root, path, sync=self._sync)
        if not lock.lock():
            lock.release()
            raise _not_free(name, path)
        self._files[name] = lock


def _not_free(name: DocumentId, path: str) -> LockTimeoutError:
    return LockTimeoutError("not free", kind=name[0], key=name[1], path=path)


@lru_cache(maxsize=65536)
def byte_of(name: DocumentId) -> int:
    """The byte of a document in the lock file; two of 2**62 documents may share one."""
    digest = blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2
