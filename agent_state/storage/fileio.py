"""Reads files of any content, replaces them atomically and durably, syncs many at once.

A durable replacement is a new temporary file in the same directory, all bytes, fsync, rename,
fsync of the directory. Each step that was left out once lost acknowledged data.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat as stat_module
import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from agent_state.errors import (
    DurabilityUnknownError,
    StateCorruptedError,
    StorageError,
    storage_error,
)
from agent_state.storage import syscalls

_NAME = attrgetter("name")
TEMPORARY = ".tmp-"
MAX_BYTES = 256 * 1024 * 1024
"""A larger file is refused unread: a sparse file must not take the memory of the process."""


class Stamp(NamedTuple):
    """Which version of a file was seen. Two equal stamps may still be two versions."""

    mtime_ns: int
    size: int
    inode: int


def stat_file(path: str) -> Stamp | None:
    """The stamp of a file; None if it is missing. A symlink is not followed."""
    try:
        status = syscalls.stat(path)
        return Stamp(status.st_mtime_ns, status.st_size, status.st_ino)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, "looking at a file", path=path) from error


def open_regular(path: str, flags: int) -> tuple[int, os.stat_result]:
    """Open a regular file; its descriptor, and its ``fstat``.

    Raises ``StateCorruptedError`` for a symlink, a directory, a FIFO or a device in its place,
    which nothing may wait for, follow, or mistake for a disk; ``OSError`` as ``open`` does.
    """
    try:
        fd = syscalls.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise StateCorruptedError(
                "a symlink stands where a file should be", path=path
            ) from error
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.EISDIR):
            raise StateCorruptedError("this is not a regular file", path=path) from error
        raise
    try:
        status = syscalls.fstat(fd)
    except BaseException:
        syscalls.close(fd)
        raise
    if stat_module.S_ISREG(status.st_mode):
        return fd, status
    syscalls.close(fd)
    raise StateCorruptedError("this is not a regular file", path=path)


def read_file(path: str, *, limit: int = MAX_BYTES) -> tuple[bytes, Stamp] | None:
    """All bytes of a regular file and its stamp; None if it is missing.

    Raises ``StateCorruptedError`` for a symlink, a directory, a FIFO or a device in its place,
    and for a file over ``limit`` bytes; ``StorageError`` when it cannot be read.
    """
    try:
        fd, status = open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, "opening a file", path=path) from error
    try:
        if status.st_size > limit:
            raise StateCorruptedError(
                f"{status.st_size} bytes is over the limit of {limit}", path=path
            )
        data = syscalls.read(fd, status.st_size + 1)
        if len(data) != status.st_size:
            data = _read_rest(fd, data, path, limit)
        return data, Stamp(status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError as error:
        raise storage_error(error, "reading a file", path=path) from error
    finally:
        syscalls.close(fd)


def _read_rest(fd: int, data: bytes, path: str, limit: int) -> bytes:
    """Read on: a read may return fewer bytes, and an editor may be writing."""
    parts, size = [data], len(data)
    while part := syscalls.read(fd, 1 << 20):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise StateCorruptedError(f"over the limit of {limit} bytes", path=path)
    return b"".join(parts)


def read_pieces(path: str) -> Iterator[bytes]:
    """The bytes of a regular file, however large; no bytes if it is missing.

    Raises as ``read_file`` does.
    """
    try:
        fd, _ = open_regular(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise storage_error(error, "opening a file", path=path) from error
    try:
        while piece := syscalls.read(fd, 1 << 20):
            yield piece
    except OSError as error:
        raise storage_error(error, "reading a file", path=path) from error
    finally:
        syscalls.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Every byte; a short write is continued, and one that cannot go on raises ``OSError``."""
    done = syscalls.write(fd, data)
    if done == len(data):
        return
    view = memoryview(data)
    while done < len(data):
        count = syscalls.write(fd, view[done:])
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count


def write_temp(path: str, data: bytes) -> tuple[str, int, Stamp]:
    """Write the bytes to a new temporary file in the folder of ``path``; leave it open, unsynced.

    Returns its name, its descriptor, and its stamp. The directory must exist. On any failure
    the temporary file is removed. Raises ``OSError``.
    """
    temporary = os.path.join(os.path.dirname(path), TEMPORARY + secrets.token_hex(8))
    fd = syscalls.open(temporary, syscalls.CREATE_NEW)
    try:
        write_all(fd, data)
        status = syscalls.fstat(fd)
        return temporary, fd, Stamp(status.st_mtime_ns, status.st_size, status.st_ino)
    except BaseException:
        discard(temporary)
        syscalls.close(fd)
        raise


def write_temp_synced(path: str, data: bytes, *, sync: bool) -> tuple[str, Stamp]:
    """``write_temp``, made durable and closed. Raises ``OSError``."""
    temporary, fd, stamp = write_temp(path, data)
    try:
        try:
            if sync:
                # A new file's size and blocks are what fdatasync must write to read it back.
                syscalls.fdatasync(fd)
        finally:
            syscalls.close(fd)
    except BaseException:
        discard(temporary)
        raise
    return temporary, stamp


def rename_into_place(temporary: str, path: str) -> None:
    """Rename a staged file to its final name. On failure it is removed. Raises ``OSError``."""
    try:
        syscalls.rename(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def discard(temporary: str) -> None:
    """Remove a temporary file on the way out of an error, which is the one worth raising."""
    with contextlib.suppress(OSError):
        syscalls.unlink(temporary)


def sync_directory(path: str) -> None:
    """Make names durable. Raises ``DurabilityUnknownError``: the change is visible already."""
    try:
        syscalls.fsync_directory(path)
    except OSError as error:
        raise DurabilityUnknownError(
            f"the change is visible, but the disk did not confirm it: {error.strerror}",
            number=error.errno,
            path=path,
        ) from error


def replace_file(path: str, data: bytes, *, sync: bool) -> Stamp:
    """Replace the file at ``path`` by ``data``, atomically; the stamp of the new file.

    Raises ``StorageError`` when nothing was changed, ``DurabilityUnknownError`` when the new
    file is in place and only its name may not survive a power cut.
    """
    try:
        temporary, stamp = write_temp_synced(path, data, sync=sync)
        rename_into_place(temporary, path)
    except OSError as error:
        raise storage_error(error, "writing a file", path=path) from error
    if sync:
        sync_directory(os.path.dirname(path))
    return stamp


def rewrite(path: str) -> tuple[Stamp, Stamp] | None:
    """Put the bytes of a file, if there is one, into a new one, durably, in its place.

    For a file whose fsync failed. Returns the stamps of both. Raises ``StorageError``.
    """
    found = read_file(path, limit=sys.maxsize)
    if found is None:
        return None
    return found[1], replace_file(path, found[0], sync=True)


def remove_file(path: str, *, sync: bool) -> bool:
    """Remove a file; whether there was one. Raises as ``replace_file`` does."""
    try:
        syscalls.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error(error, "removing a file", path=path) from error
    if sync:
        sync_directory(os.path.dirname(path))
    return True


def list_folder(folder: str) -> list[str]:
    """The names in a folder, sorted, without hidden ones; empty if it is missing.

    Raises ``StorageError``.
    """
    try:
        with syscalls.scandir(folder) as entries:
            return sorted(name for name in map(_NAME, entries) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(error, "listing a directory", path=folder) from error


def has_folders(root: str, path: str) -> bool:
    """Whether the folders between ``root`` and ``path`` exist.

    Raises ``StorageError`` for a symlink among them: what is behind it is not ours.
    """
    at = path.find("/", len(root) + 1)
    while at >= 0:
        try:
            mode = syscalls.stat(path[:at]).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise storage_error(error, "looking at a folder", path=path[:at]) from error
        if stat_module.S_ISLNK(mode):
            raise StorageError(
                "a symlink stands where a folder should be", number=errno.ELOOP, path=path[:at]
            )
        at = path.find("/", at + 1)
    return True


def make_directories(root: str, relative: str, *, sync: bool) -> None:
    """Make the directories of ``relative`` below ``root``, each durable in its parent.

    A symlink or a file in the place of a directory is refused: nothing leaves the root.
    Raises ``StorageError``.
    """
    path = root
    for name in relative.split("/") if relative else ():
        parent, path = path, f"{path}/{name}"
        try:
            try:
                syscalls.mkdir(path)
            except FileExistsError:
                if not stat_module.S_ISDIR(syscalls.stat(path).st_mode):
                    raise
                # The process that made it may have died before it was durable.
            if sync:
                syscalls.fsync_directory(parent)
        except OSError as error:
            raise storage_error(error, "making a directory", path=path) from error


SYNCFS_MIN_FILES = 256
"""From this many files on, one ``syncfs`` is cheaper than an ``fsync`` for each."""
SYNCFS_MIN_FOUND = 16
"""The same for files that are clean most likely: there is little for a ``syncfs`` to write."""


class PendingSync:
    """Files and folders of one directory that a power cut could still undo."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._files: dict[str, None] = {}
        self._folders: dict[str, None] = {}
        self._file_system = -1
        self.fsync_failed: set[str] = set()
        """Files whose fsync failed. A repeated fsync might succeed although pages were dropped."""

    def note_file(self, path: str) -> None:
        """A file was written, and its folders may be new."""
        self._files[path] = None
        folder = os.path.dirname(path)
        while len(folder) >= len(self._root) and folder not in self._folders:
            self._folders[folder] = None
            folder = os.path.dirname(folder)

    def note_folder(self, path: str) -> None:
        """A name in this folder has changed."""
        self._folders[path] = None

    def forget(self) -> None:
        """Nothing is to be made durable."""
        self._files.clear()
        self._folders.clear()

    def watch_errors(self) -> None:
        """From now on ``syncfs`` reports failures of the background writer too."""
        if self._file_system < 0 and syscalls.can_syncfs(self._root):
            try:
                self._file_system = syscalls.open(self._root, syscalls.DIRECTORY)
            except OSError as error:
                raise storage_error(error, "opening the directory", path=self._root) from error

    def close(self) -> None:
        if self._file_system >= 0:
            fd, self._file_system = self._file_system, -1
            syscalls.close(fd)

    def sync_found(self) -> None:
        """``sync`` for files that others wrote, and that are most likely on the disk already."""
        try:
            if len(self._files) >= SYNCFS_MIN_FOUND:
                self.watch_errors()
            self.sync(many=SYNCFS_MIN_FOUND)
        finally:
            self.close()

    def sync(self, *, many: int = SYNCFS_MIN_FILES) -> None:
        """Make everything noted durable. Raises ``StorageError``; then all of it stays due."""
        files, folders = list(self._files), list(self._folders)
        if len(files) >= many and self._file_system >= 0:
            self._sync_file_system(files)
        else:
            for path in files:
                self._sync_file(path)
            for folder in folders:
                self._sync_folder(folder)
        for path in files:
            self._files.pop(path, None)
        for folder in folders:
            self._folders.pop(folder, None)

    def _sync_file_system(self, files: list[str]) -> None:
        try:
            syscalls.syncfs(self._file_system)
        except OSError as error:
            self.fsync_failed.update(files)  # the kernel does not report which one
            raise storage_error(error, "syncing the file system", path=self._root) from error

    def _sync_file(self, path: str) -> None:
        try:
            fd = syscalls.open(path, syscalls.READ)
        except (FileNotFoundError, NotADirectoryError):
            return  # removed since; its folder is synced
        except OSError as error:
            raise storage_error(error, "opening a file to sync it", path=path) from error
        try:
            syscalls.fsync(fd)
        except OSError as error:
            self.fsync_failed.add(path)
            raise storage_error(error, "syncing a file", path=path) from error
        finally:
            syscalls.close(fd)

    def _sync_folder(self, path: str) -> None:
        try:
            syscalls.fsync_directory(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise storage_error(error, "syncing a directory", path=path) from error
