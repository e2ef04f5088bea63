"""Documents of several commits made durable together: every file for itself, one fsync a folder.

The order is that of one file: all bytes, fsync, rename, fsync of the folder, and only then is
anybody told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import dirname

from agent_state.errors import AgentStateError, DurabilityUnknownError, storage_error
from agent_state.storage import envelope, fileio, syscalls
from agent_state.storage.directory import LookedAt, StateDirectory
from agent_state.storage.fileio import Stamp
from agent_state.storage.records import PutDone


@dataclass(slots=True)
class Staged:
    """A document's new file, written and not yet in its place. ``error``: why it never came."""

    change: PutDone
    path: str
    temporary: str
    fd: int
    stamp: Stamp
    looked_at: Stamp | None
    published: bool = False
    error: AgentStateError | None = None

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            syscalls.close(fd)


def stage(directory: StateDirectory, change: PutDone, looked_at: LookedAt) -> Staged:
    """Write a document's bytes beside its place. Raises ``StorageError``."""
    document = change.document
    path = directory.path(document.kind, document.key)
    data = envelope.encode_document(document, change.meta)
    try:
        directory.make_parent(path)
        try:
            temporary, fd, stamp = fileio.write_temp(path, data)
        except FileNotFoundError:
            directory.make_parent(path)
            temporary, fd, stamp = fileio.write_temp(path, data)
    except OSError as error:
        raise storage_error(
            error, "writing a file", kind=document.kind, key=document.key, path=path
        ) from error
    return Staged(change, path, temporary, fd, stamp, looked_at[document.kind, document.key])


def publish(directory: StateDirectory, batch: Sequence[Staged]) -> None:
    """Bring all of them to their places; one that fails says so and does not stop the others."""
    try:
        for staged in batch:
            _try(staged, partial(_finish, staged, sync=directory.sync))
        for staged in batch:
            _try(staged, partial(_rename, directory, staged))
    finally:
        discard(staged for staged in batch if not staged.published)
    if directory.sync:
        for folder in dict.fromkeys(dirname(staged.path) for staged in batch if not staged.error):
            try:
                fileio.sync_directory(folder)
            except DurabilityUnknownError as error:
                for staged in batch:
                    if dirname(staged.path) == folder:
                        staged.error = staged.error or error


def discard(batch: Iterable[Staged]) -> None:
    """Remove what was staged and will not be published."""
    for staged in batch:
        fileio.discard(staged.temporary)
        with contextlib.suppress(OSError):  # there is nothing in it that is still wanted
            staged.close()


def _try(staged: Staged, step: Callable[[], None]) -> None:
    if staged.error is None:
        try:
            step()
        except OSError as error:
            document = staged.change.document
            staged.error = storage_error(
                error, "writing a file", kind=document.kind, key=document.key, path=staged.path
            )
            staged.error.__cause__ = error


def _finish(staged: Staged, *, sync: bool) -> None:
    try:
        if sync:
            syscalls.fdatasync(staged.fd)
    finally:
        staged.close()


def _rename(directory: StateDirectory, staged: Staged) -> None:
    directory.snapshots.keep(staged.path)
    directory.spare(staged.path, staged.change.document, staged.looked_at)
    directory.expect(staged.path, staged.stamp)
    syscalls.rename(staged.temporary, staged.path)
    staged.published = True
    change = staged.change
    directory.note_document(staged.path, change.document, change.meta, staged.stamp)
