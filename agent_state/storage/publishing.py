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
from typing import Generic, TypeVar

from agent_state.errors import AgentStateError, DurabilityUnknownError, storage_error
from agent_state.storage import envelope, fileio, syscalls
from agent_state.storage.directory import LookedAt, StateDirectory
from agent_state.storage.executor import Executor, UncancellableFuture
from agent_state.storage.fileio import Stamp
from agent_state.storage.records import PutDone

THREADS = 4
LARGEST = 16

T = TypeVar("T")
R = TypeVar("R")


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


class Batches(Generic[T, R]):
    """Work of many tasks, handed to a few threads several pieces at a time.

    ``work`` gives a result or an error for each piece, in order.
    """

    def __init__(
        self, pool: Executor, work: Callable[[Sequence[T]], Sequence[R | Exception]]
    ) -> None:
        self._pool = pool
        self._work = work
        self._queue: list[tuple[T, UncancellableFuture[R]]] = []
        self._busy = 0
        self._scheduled = False

    def submit(self, piece: T) -> UncancellableFuture[R]:
        """Queue a piece; await its outcome."""
        outcome: UncancellableFuture[R] = UncancellableFuture()
        self._queue.append((piece, outcome))
        if not self._scheduled and self._busy < THREADS:
            self._scheduled = True
            outcome.get_loop().call_soon(self._start)
        return outcome

    async def ended(self) -> None:
        """Wait until everything submitted has its outcome."""
        while self._queue or self._busy:
            await self._pool.run(lambda: None)

    def _start(self) -> None:
        self._scheduled = False
        while self._queue and self._busy < THREADS:
            fair = -(-len(self._queue) // (THREADS - self._busy))
            size = min(fair, LARGEST)
            batch, self._queue = self._queue[:size], self._queue[size:]
            self._busy += 1
            running = self._pool.run(partial(self._work, [piece for piece, _ in batch]))
            running.add_done_callback(partial(self._ended, [outcome for _, outcome in batch]))

    def _ended(
        self,
        outcomes: Sequence[UncancellableFuture[R]],
        ran: UncancellableFuture[Sequence[R | Exception]],
    ) -> None:
        self._busy -= 1
        failed = ran.exception()
        if failed is not None:
            for outcome in outcomes:
                outcome.fail(failed)
        else:
            for outcome, result in zip(outcomes, ran.result(), strict=True):
                if isinstance(result, Exception):
                    outcome.fail(result)
                else:
                    outcome.set_result(result)
        self._start()
