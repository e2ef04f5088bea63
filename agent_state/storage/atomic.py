"""Whole files or none: reading what may be anything, replacing durably.

The recipe, each step of which lost acknowledged data where it was left out: a new temporary
file in the same directory, all bytes, fsync, rename, fsync of the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat as stat_module
from collections.abc import Callable
from typing import NamedTuple

from agent_state.errors import (
    DurabilityUnknownError,
    StateCorruptedError,
    storage_error,
)
from agent_state.storage import syscalls

TEMPORARY = ".tmp-"
MAX_BYTES = 256 * 1024 * 1024
"""A larger file is refused unread: a sparse file must not take the memory of the process."""


class Stamp(NamedTuple):
    """Which version of a file was seen. Two equal stamps may still be two versions."""

    mtime_ns: int
    size: int
    inode: int


def stamp_of(result: os.stat_result) -> Stamp:
    return Stamp(result.st_mtime_ns, result.st_size, result.st_ino)


def stat_file(path: str) -> Stamp | None:
    """The stamp of a file; None when there is none. A symlink is what it is, not its target."""
    try:
        return stamp_of(syscalls.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, "looking at a file", path=path) from error


def read_file(path: str, *, limit: int = MAX_BYTES) -> tuple[bytes, Stamp] | None:
    """All bytes of a regular file and its stamp; None when there is no such file.

    Raises ``StateCorruptedError`` for a symlink, a directory, a FIFO or a device in its place,
    and for a file over ``limit`` bytes; ``StorageError`` when it cannot be read.
    """
    try:
        fd = syscalls.open(path, syscalls.READ)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise StateCorruptedError(
                "a symlink stands where a file should be", path=path
            ) from error
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise StateCorruptedError("this is not a regular file", path=path) from error
        raise storage_error(error, "opening a file", path=path) from error
    try:
        status = syscalls.fstat(fd)
        if not stat_module.S_ISREG(status.st_mode):
            raise StateCorruptedError("this is not a regular file", path=path)
        if status.st_size > limit:
            raise StateCorruptedError(
                f"{status.st_size} bytes is over the limit of {limit}", path=path
            )
        data = syscalls.read(fd, status.st_size + 1)
        if len(data) != status.st_size:
            data = _read_rest(fd, data, path, limit)
        return data, stamp_of(status)
    except OSError as error:
        raise storage_error(error, "reading a file", path=path) from error
    finally:
        syscalls.close(fd)


def _read_rest(fd: int, data: bytes, path: str, limit: int) -> bytes:
    """A read may give less than was asked for, and a person's editor may write meanwhile."""
    parts, size = [data], len(data)
    while part := syscalls.read(fd, 1 << 20):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise StateCorruptedError(f"over the limit of {limit} bytes", path=path)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
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


def begin(path: str, data: bytes) -> tuple[str, int, Stamp]:
    """Write the bytes to a new temporary file beside ``path``, and leave it open, unsynced.

    Its name, its descriptor, and the stamp to come. The directory must exist. On any failure
    the temporary file is gone. Raises ``OSError``.
    """
    temporary = os.path.join(os.path.dirname(path), TEMPORARY + secrets.token_hex(8))
    fd = syscalls.open(temporary, syscalls.CREATE_NEW)
    try:
        write_all(fd, data)
        return temporary, fd, stamp_of(syscalls.fstat(fd))
    except BaseException:
        discard(temporary)
        syscalls.close(fd)
        raise


def stage(path: str, data: bytes, *, sync: bool) -> tuple[str, Stamp]:
    """``begin``, made durable and closed. Raises ``OSError``."""
    temporary, fd, stamp = begin(path, data)
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


def publish(temporary: str, path: str) -> None:
    """Rename a staged file to its final name. On failure it is gone. Raises ``OSError``."""
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


def replace_file(
    path: str, data: bytes, *, sync: bool, announce: Callable[[Stamp], None] | None = None
) -> Stamp:
    """Put ``data`` in the place of ``path``, whole or not at all; the stamp of the new file.

    ``announce`` is told the stamp before anybody can see the file.

    Raises ``StorageError`` when nothing was changed, ``DurabilityUnknownError`` when the new
    file is in place and only its name may not survive a power cut.
    """
    try:
        temporary, stamp = stage(path, data, sync=sync)
        if announce is not None:
            announce(stamp)
        publish(temporary, path)
    except OSError as error:
        raise storage_error(error, "writing a file", path=path) from error
    if sync:
        sync_directory(os.path.dirname(path))
    return stamp


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
                if stat_module.S_ISDIR(syscalls.stat(path).st_mode):
                    continue
                raise
            if sync:
                syscalls.fsync_directory(parent)
        except OSError as error:
            raise storage_error(error, "making a directory", path=path) from error
