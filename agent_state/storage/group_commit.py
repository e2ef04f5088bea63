"""Group commit: saves of many tasks become durable together, one write and one fdatasync.

Saves that are ready in the same turn of the event loop share a batch; saves that arrive while a
batch is being written share the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from agent_state.errors import DurabilityUnknownError, StorageError
from agent_state.storage.executor import Batcher, Executor
from agent_state.storage.journal import Journal, JournalSyncError
from agent_state.storage.records import Done


class _Save(NamedTuple):
    record: bytes
    done: Sequence[Done]


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
        self._saves: Batcher[_Save, None] = Batcher(
            self._write, settled=self._settled, retry=self._retry, ordered=True
        )

    def submit(self, record: bytes, done: Sequence[Done]) -> asyncio.Future[None]:
        """Queue a record, as ``encode_changes`` gives it; await the outcome.

        An empty record waits for those before it.
        """
        return self._saves.submit(_Save(record, done))

    async def seal(self) -> list[str]:
        """Close the open segment; the paths of all segments. The next record begins a new one."""
        return await self._writer.run(self.journal.seal)

    async def close(self) -> None:
        """Wait for what was submitted. Nothing may be submitted after."""
        await self._saves.ended()
        await self._writer.run(self.journal.close)
        self._writer.close()

    def _write(self, saves: list[_Save]) -> Awaitable[list[None]]:
        records = [save.record for save in saves if save.record]
        return self._writer.run(partial(self._append, records, len(saves)))

    def _append(self, records: list[bytes], count: int) -> list[None]:
        if records:
            self.journal.append(records)
        return [None] * count

    def _retry(self, saves: list[_Save], error: BaseException) -> Awaitable[list[None]] | None:
        """Write a batch once more, into a new segment that repeats what the old one vouched for."""
        if not isinstance(error, JournalSyncError):
            return None
        records = self._vouched() + [save.record for save in saves if save.record]
        return self._writer.run(partial(self._append_again, records, len(saves)))

    def _append_again(self, records: list[bytes], count: int) -> list[None]:
        try:
            return self._append(records, count)
        except StorageError as error:
            raise DurabilityUnknownError(
                f"the disk confirmed neither the journal nor a new one: {error}",
                number=error.errno,
                path=error.path,
            ) from error

    def _settled(self, saves: Sequence[_Save], error: BaseException | None) -> None:
        settle = self._durable if error is None else self._failed
        for save in saves:
            settle(save.done)
