"""Group commit: saves of many tasks become durable together, one write and one fdatasync.

Whoever is ready in the same turn of the event loop shares a batch; what arrives while a batch
is being written shares the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from agent_state.errors import DurabilityUnknownError
from agent_state.storage.executor import Executor, UncancellableFuture
from agent_state.storage.journal import Journal, JournalSyncError
from agent_state.storage.records import Done


@dataclass(slots=True)
class _Save:
    record: bytes
    done: Sequence[Done]
    outcome: UncancellableFuture[None]


class GroupCommit:
    """Writes records to the journal in the order they were submitted.

    ``durable(done)`` is called for each save once it is, before its caller is woken.
    ``failed(done)`` is called for each save that is not, after which nothing is outstanding.
    ``vouched()`` gives the records that a new segment must repeat when the old one is in doubt.
    """

    def __init__(
        self,
        open_journal: Journal,
        *,
        durable: Callable[[Sequence[Done]], None],
        failed: Callable[[Sequence[Done]], None],
        vouched: Callable[[], list[bytes]],
    ) -> None:
        self.journal = open_journal
        self._durable = durable
        self._failed = failed
        self._vouched = vouched
        self._writer = Executor("journal", 1)
        self._queue: list[_Save] = []
        self._in_flight: list[_Save] = []
        self._scheduled = False
        self._loop = asyncio.get_running_loop()

    def submit(self, record: bytes, done: Sequence[Done]) -> UncancellableFuture[None]:
        """Queue a record, as ``encode_changes`` gives it; await the outcome.

        An empty record waits for those before it.
        """
        outcome: UncancellableFuture[None] = UncancellableFuture(loop=self._loop)
        self._queue.append(_Save(record, done, outcome))
        if not self._scheduled and not self._in_flight:
            self._scheduled = True
            self._loop.call_soon(self._start)
        return outcome

    async def seal(self) -> list[str]:
        """Close the open segment; the paths of all segments. The next record begins a new one."""
        return await self._writer.run(self.journal.seal)

    async def close(self) -> None:
        """Wait for what was submitted. Nothing may be submitted after."""
        while self._queue or self._in_flight:
            await self._writer.run(lambda: None)
        await self._writer.run(self.journal.close)
        self._writer.close()

    def _start(self) -> None:
        self._scheduled = False
        batch, self._queue = self._queue, []
        self._in_flight = batch
        self._write([save.record for save in batch if save.record], self._written)

    def _write(
        self, records: list[bytes], then: Callable[[list[bytes], asyncio.Future[None]], None]
    ) -> None:
        work = partial(self.journal.append, records) if records else lambda: None
        self._writer.run(work).add_done_callback(partial(then, records))

    def _written(self, records: list[bytes], writing: asyncio.Future[None]) -> None:
        error = writing.exception()
        if error is None:
            self._acknowledge()
        elif isinstance(error, JournalSyncError):
            # Once more in a new segment, with all that only the fsync_failed one vouches for.
            self._write(self._vouched() + records, self._rewritten)
        else:
            self._refuse(error)

    def _rewritten(self, _: list[bytes], writing: asyncio.Future[None]) -> None:
        error = writing.exception()
        if error is None:
            self._acknowledge()
            return
        unknown = DurabilityUnknownError(
            f"the disk confirmed neither the journal nor a new one: {error}",
            number=getattr(error, "errno", None),
            path=getattr(error, "path", None),
        )
        unknown.__cause__ = error
        self._refuse(unknown)

    def _acknowledge(self) -> None:
        batch, self._in_flight = self._in_flight, []
        for save in batch:
            self._durable(save.done)
            save.outcome.set_result(None)
        if self._queue and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._start)

    def _refuse(self, error: BaseException) -> None:
        """Fail the batch, and all that was planned on top of it."""
        refused = [*self._in_flight, *self._queue]
        self._in_flight, self._queue = [], []
        for save in refused:
            self._failed(save.done)
        for save in refused:
            save.outcome.fail(error)
