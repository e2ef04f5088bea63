"""Which files were written without fsync, and how they become durable together."""

from __future__ import annotations

import os

from agent_state.errors import storage_error
from agent_state.storage import syscalls

MANY = 256
"""From this many files on, one ``syncfs`` is cheaper than an ``fsync`` for each."""
MANY_FOUND = 16
"""The same for files that are clean most likely: there is little for a ``syncfs`` to write."""


class Unsynced:
    """Files and folders of one directory that a power cut could still undo."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._files: dict[str, None] = {}
        self._folders: dict[str, None] = {}
        self._file_system = -1
        self.doubtful: set[str] = set()
        """Files whose fsync failed. Asked again, the kernel might say yes with pages dropped."""

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
            if len(self._files) >= MANY_FOUND:
                self.watch_errors()
            self.sync(many=MANY_FOUND)
        finally:
            self.close()

    def sync(self, *, many: int = MANY) -> None:
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
            self.doubtful.update(files)  # it does not say which
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
            self.doubtful.add(path)
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
