"""A large file written durably in pieces: whole under its name, or not there."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent_state.errors import StorageError, storage_error
from agent_state.storage import fileio, syscalls


class Staged(io.RawIOBase):
    """A temporary file beside ``path``, written to like any file.

    ``publish`` gives it its name, durably. Left without that, as on any error, the file is gone.
    The directory must exist. Raises ``OSError``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.size = 0
        name = f"{fileio.TEMPORARY}{secrets.token_hex(8)}"
        self._temporary = os.fspath(path.parent / name)
        self._fd = syscalls.open(self._temporary, syscalls.CREATE_NEW)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Every byte of what is given."""
        view = memoryview(data).cast("B")
        fileio.write_all(self._fd, view)
        self.size += len(view)
        return len(view)

    def publish(self, *, replace: bool) -> None:
        """Sync it and give it its name. Raises ``FileExistsError`` unless it may ``replace``."""
        syscalls.fdatasync(self._fd)
        self._close()
        target = os.fspath(self.path)
        if replace:
            syscalls.rename(self._temporary, target)
        else:
            _rename_anew(self._temporary, target)
        fileio.sync_directory(os.fspath(self.path.parent))

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            syscalls.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._close()
        if os.path.lexists(self._temporary):
            fileio.discard(self._temporary)


def _rename_anew(temporary: str, target: str) -> None:
    """A rename that never replaces. Two names for one file are what makes it sure."""
    try:
        syscalls.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(f"there is {target} already") from error
        syscalls.rename(temporary, target)
        return
    syscalls.unlink(temporary)


def writing_failed(error: OSError, path: Path) -> StorageError:
    """What is raised when a large file could not be written."""
    if isinstance(error, StorageError):
        return error
    return storage_error(error, "writing a file", path=path)
