"""Every system call the stores make, and nothing else.

Storage modules call these through the module (``syscalls.fsync(fd)``), so that a test can
make the n-th call fail, tear, or be the last one of the process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# A FIFO in the place of a document would block an open for ever.
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)

READ = os.O_RDONLY | _CLOEXEC | _NOFOLLOW | _NONBLOCK | _BINARY
CREATE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC | _NOFOLLOW | _BINARY
APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | _CLOEXEC | _NOFOLLOW | _NONBLOCK | _BINARY
DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOEXEC | _NOFOLLOW
LOCK = os.O_RDWR | os.O_CREAT | _CLOEXEC | _NOFOLLOW | _NONBLOCK


def open(path: str, flags: int, mode: int = FILE_MODE) -> int:
    return os.open(path, flags, mode)


def close(fd: int) -> None:
    os.close(fd)


def read(fd: int, size: int) -> bytes:
    return os.read(fd, size)


def pread(fd: int, size: int, offset: int) -> bytes:
    return os.pread(fd, size, offset)


def write(fd: int, data: bytes | memoryview) -> int:
    return os.write(fd, data)


def ftruncate(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


def fsync(fd: int) -> None:
    _sync_file(fd)


def fdatasync(fd: int) -> None:
    _sync_data(fd)


def fsync_directory(path: str) -> None:
    """Make the names in a directory durable. Windows does that with the file itself."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
    try:
        _sync_file(fd)
    finally:
        os.close(fd)


@functools.cache
def _syncfs() -> Callable[[int], int] | None:
    """The C library's ``syncfs``; None where it is missing or does not report errors.

    It reports them since Linux 5.8 (man 2 syncfs).
    """
    if sys.platform != "linux":
        return None
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or (int(release[1]), int(release[2])) < (5, 8):
        return None
    import ctypes  # only a directory with much to sync pays for it

    return getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)


# ext4 (and ext2, ext3), xfs, btrfs, f2fs, overlayfs: linux/magic.h
_SYNCFS_IS_DONE_BY = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x794C7630})


def can_syncfs(path: str) -> bool:
    """Whether ``syncfs`` makes the files there durable.

    On FUSE it succeeds without asking the server (``fuse_sync_fs`` in Linux), so it is only
    used on file systems that are known to implement it.
    """
    if _syncfs() is None:
        return False
    import ctypes

    about = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), about) != 0:
        return False
    return ctypes.c_long.from_buffer(about).value & 0xFFFFFFFF in _SYNCFS_IS_DONE_BY


def syncfs(fd: int) -> None:
    """Make everything in the file system of ``fd`` durable."""
    import ctypes

    call = _syncfs()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def rename(source: str, target: str) -> None:
    os.replace(source, target)


def link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)


def utime(path: str, time_ns: int) -> None:
    os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


def unlink(path: str) -> None:
    os.unlink(path)


def mkdir(path: str) -> None:
    os.mkdir(path, DIRECTORY_MODE)


def rmdir(path: str) -> None:
    os.rmdir(path)


def stat(path: str) -> os.stat_result:
    return os.stat(path, follow_symlinks=False)


def fstat(fd: int) -> os.stat_result:
    return os.fstat(fd)


@contextlib.contextmanager
def scandir(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    with os.scandir(path) as entries:
        yield entries


if sys.platform == "darwin":  # fsync leaves the data in the drive's cache there
    import fcntl

    def _sync_file(fd: int) -> None:
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError:  # a file system without it (a network share): the next best
            os.fsync(fd)

    _sync_data = _sync_file
else:
    _sync_file = os.fsync
    _sync_data = getattr(os, "fdatasync", os.fsync)
