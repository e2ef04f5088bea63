"""The files follow the journal: in the background, and at a checkpoint.

A checkpoint brings everything that sealed segments hold to durable files and removes the segments.
Whoever writes files of the directory meanwhile does so under the same lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

from agent_state.errors import AgentStateError
from agent_state.protocols import Document
from agent_state.storage import intents, journal
from agent_state.storage.directory import Stored
from agent_state.storage.group_commit import GroupCommit
from agent_state.storage.records import DeleteDone, PutDone
from agent_state.storage.settling import Settler, settle
from agent_state.storage.versions import Versions

SETTLE_SECONDS = 0.05
SETTLE_SECONDS_MAX = 0.5
IDLE_SECONDS = 1.0
_RETRY_SECONDS = 1.0
_SETTLE_BATCH = 64

_logger = logging.getLogger("agent_state.storage")

T = TypeVar("T")


class Run(Protocol):
    """Does blocking work in a thread of the store's own."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class Checkpoints:
    """Settles what is durable in the journal alone.

    ``edited(document)`` is called for each edit by somebody else that won over a change of ours.
    ``segment_bytes``: a segment that is longer is sealed, settled and removed.
    """

    def __init__(
        self,
        settler: Settler,
        versions: Versions,
        commits: GroupCommit,
        run: Run,
        *,
        segment_bytes: int,
        edited: Callable[[Document], None],
    ) -> None:
        self.lock = asyncio.Lock()
        """Held by whoever writes files."""
        self._settler = settler
        self._versions = versions
        self._commits = commits
        self._run = run
        self._segment_bytes = segment_bytes
        self._edited = edited
        self._stirred = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Settle from now on: 50 ms after a change, under load a fifth of the time at most."""
        self._task = asyncio.create_task(self._settle_forever(), name="agent-state-settle")

    def stir(self) -> None:
        """There is something to settle."""
        self._stirred.set()

    async def stop(self) -> None:
        """Settle no more in the background."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def checkpoint(self, segments: list[str] | None = None) -> None:
        """Bring all that the journal holds to durable files, and remove its segments.

        Called under ``lock``, from sealing to removing: else another one could remove a new
        segment by an old one's name, or call a file durable that was written since.
        ``segments``: all there are, once the journal is closed.
        """
        sealed = await self._commits.seal() if segments is None else segments
        await self.settle_all()
        await self._run(partial(self._sync_and_remove, sealed))

    def _sync_and_remove(self, sealed: list[str]) -> None:
        settler = self._settler
        settler.rewrite_doubtful()
        settler.sync()
        journal.remove_segments(sealed, settler.journal, sync=settler.durable)

    async def settle_all(self) -> None:
        """Bring everything unsettled to its file. Raises the first error, after all others."""
        failed: list[AgentStateError] = []
        changes = list(self._versions.unsettled.values())
        for start in range(0, len(changes), _SETTLE_BATCH):
            batch = changes[start : start + _SETTLE_BATCH]
            results = await self._run(partial(settle, self._settler, batch))
            for change in batch:
                result = results[intents.place_of(change)]
                if isinstance(result, AgentStateError):
                    failed.append(result)
                else:
                    self._became_clean(change, result)
        for place, waiting in list(self._versions.records.items()):
            records = list(waiting)
            try:
                await self._run(partial(self._settler.append, place, records))
            except AgentStateError as error:
                failed.append(error)
            else:
                self._versions.settled_records(place, len(records))
        if failed:
            raise failed[0]

    def _became_clean(self, change: PutDone | DeleteDone, won: Stored | None) -> None:
        theirs = won and PutDone(won.document, won.meta)
        if self._versions.became_clean(change, theirs) and theirs is not None:
            self._edited(theirs.document)

    async def _settle_forever(self) -> None:
        pause = SETTLE_SECONDS
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._stirred.wait()
            except TimeoutError:
                pass
            idle = not self._stirred.is_set()
            self._stirred.clear()
            await asyncio.sleep(0 if idle else pause)
            began = time.monotonic()
            try:
                async with self.lock:
                    await self.settle_all()
                    if self._commits.journal.size > (0 if idle else self._segment_bytes):
                        await self.checkpoint()
                # Under load a fifth of the time at most: saves of a document settle as one.
                took = time.monotonic() - began
                pause = min(max(SETTLE_SECONDS, 4 * took), SETTLE_SECONDS_MAX)
            except AgentStateError as error:
                # The journal holds everything; the files follow when the disk allows it again.
                _logger.warning("files could not be brought up to date: %s", error)
                pause = _RETRY_SECONDS
                self._stirred.set()
