"""Counts what a store does: system calls, and the entries of the folders that it lists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from agent_state.storage import syscalls
from agent_state.testing import FaultyDisk


class CountedDisk:
    """A context in which every system call of the stores, and every entry listed, is counted."""

    def __init__(self) -> None:
        self._disk = FaultyDisk()
        self.entries = 0
        """The entries of folders that were listed."""
        self.bytes_read = 0

    @property
    def calls(self) -> int:
        """The number of system calls."""
        return self._disk.count()

    def count(self, name: str) -> int:
        """The number of system calls of this name."""
        return self._disk.count(name)

    def about(self, name: str) -> list[str]:
        """The paths, or the descriptors, that calls of this name were about."""
        return [about for called, about in self._disk.calls if called == name]

    def __enter__(self) -> Self:
        self._disk.__enter__()
        listed, read, pread = syscalls.scandir, syscalls.read, syscalls.pread

        @contextlib.contextmanager
        def scandir(path: str) -> Iterator[Iterator[Any]]:
            with listed(path) as entries:
                yield map(self._count_entry, entries)

        def read_counted(fd: int, size: int) -> bytes:
            return self._count_bytes(read(fd, size))

        def pread_counted(fd: int, size: int, offset: int) -> bytes:
            return self._count_bytes(pread(fd, size, offset))

        syscalls.scandir, syscalls.read = scandir, read_counted
        syscalls.pread = pread_counted
        return self

    def _count_entry(self, entry: Any) -> Any:
        self.entries += 1
        return entry

    def _count_bytes(self, data: bytes) -> bytes:
        self.bytes_read += len(data)
        return data

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._disk.__exit__(kind, error, traceback)
