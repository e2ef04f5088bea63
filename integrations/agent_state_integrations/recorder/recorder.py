"""Recording in process: what many tasks say at once shares one write and one fdatasync."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any, Self

import orjson

from agent_state.clock import Clock, SystemClock
from agent_state.errors import AgentStateError, UnreadableMessageError
from agent_state.protocols import Incident
from agent_state.storage.executor import Executor, UncancellableFuture, shielded
from agent_state_integrations.recorder.checkpoint import Checkpoint
from agent_state_integrations.recorder.writer import (
    DeadLetter,
    RawMessage,
    RecordResult,
    RecordWriter,
)

CHECKPOINT_SECONDS = 300.0

logger = logging.getLogger("agent_state_integrations.recorder")

_Part = tuple[list[RawMessage | DeadLetter], UncancellableFuture[list[RecordResult]]]


class Recorder:
    """Records messages into ``<state_dir>/record/``, beside whoever else works there.

    ``checkpoint_every``: seconds between checkpoints, if anything came; None for none. A last one
    is made at the end. ``options`` are those of ``RecordWriter``, such as ``rotate_bytes``.

    What is recorded is a message in one of the forms that ``understanding`` names: a mapping, or
    JSON text or bytes. It is taken as it is at the call, and may be changed afterwards.
    """

    def __init__(
        self,
        state_dir: str | PathLike[str] = "state",
        *,
        checkpoint_every: float | None = CHECKPOINT_SECONDS,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        self._clock = clock or SystemClock()
        self.writer = RecordWriter(state_dir, clock=self._clock, **options)
        self._every = checkpoint_every
        self._pool: Executor | None = None
        self._closing = False
        self._queue: list[_Part] = []
        self._writing = False
        self._checkpointing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Make ready. Twice is a no-op. Raises ``StorageError``."""
        if self._pool is not None:
            return
        pool = Executor("recorder", 1)
        try:
            await pool.run(self.writer.open)
        except BaseException:
            pool.close()
            raise
        self._pool = pool
        if self._every is not None:
            self._checkpointing = asyncio.create_task(self._checkpoint_often(self._every))

    async def close(self) -> None:
        """Take nothing more, wait for what was handed over, make the last checkpoint.

        Twice is a no-op. Being cancelled does not shorten it.
        """
        if self._pool is not None and not self._closing:
            self._closing = True
            await shielded(self._close(self._pool))

    async def _close(self, pool: Executor) -> None:
        checkpointing, self._checkpointing = self._checkpointing, None
        try:
            if checkpointing is not None:
                checkpointing.cancel()
                await asyncio.wait([checkpointing])
            while self._queue or self._writing:
                await pool.run(lambda: None)
            if self._every is not None:
                await pool.run(partial(self.writer.checkpoint, "final"))
        finally:
            await pool.run(self.writer.close)
            self._pool, self._closing = None, False
            pool.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def record(self, message: RawMessage) -> RecordResult:
        """Record one message; it is durable when this returns.

        Raises ``UnreadableMessageError`` when it is none: it is in ``dead-letter.jsonl`` then.
        ``StorageError`` when it could not be stored.
        """
        [recorded] = await self.record_many([message])
        if recorded.reason is not None:
            raise UnreadableMessageError(recorded.reason)
        return recorded

    async def record_many(self, messages: Sequence[RawMessage]) -> list[RecordResult]:
        """Record messages in order, all with one write; what became of each.

        One that cannot be understood is a dead letter, and the others are recorded.
        """
        return await self.submit(messages)

    def submit(self, messages: Sequence[RawMessage]) -> UncancellableFuture[list[RecordResult]]:
        """Hand messages over, and await their outcome later; ``close`` waits for it too."""
        self._opened()
        outcome: UncancellableFuture[list[RecordResult]] = UncancellableFuture()
        self._queue.append(([_as_it_is(message) for message in messages], outcome))
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self._write)
        return outcome

    async def checkpoint(self, label: str = "manual") -> Checkpoint | None:
        """Write down what has come since the last checkpoint; None when nothing has."""
        return await self._opened().run(partial(self.writer.checkpoint, label))

    def incidents(self) -> list[Incident]:
        """What was found and contained, such as a torn line."""
        return self.writer.incidents()

    def _opened(self) -> Executor:
        if self._pool is None or self._closing:
            raise RuntimeError("the recorder is not open; use `async with`")
        return self._pool

    def _write(self) -> None:
        batch, self._queue = self._queue, []
        pool = self._pool
        if pool is None or not batch:
            self._writing = False
            return
        messages = [message for part, _ in batch for message in part]
        writing = pool.run(partial(self.writer.write, messages, "recorder"))
        writing.add_done_callback(partial(self._written, batch))

    def _written(self, batch: Sequence[_Part], writing: asyncio.Future[list[RecordResult]]) -> None:
        error = writing.exception()
        begin = 0
        for part, outcome in batch:
            if error is not None:
                outcome.fail(error)
            else:
                outcome.set_result(writing.result()[begin : begin + len(part)])
                begin += len(part)
        self._write()

    async def _checkpoint_often(self, seconds: float) -> None:
        while True:
            await self._clock.sleep(seconds)
            try:
                await self.checkpoint("auto")
            except AgentStateError:
                # What it would cover is durable without it, and the next one covers it too.
                logger.exception("no checkpoint could be made")


def _as_it_is(message: RawMessage) -> RawMessage | DeadLetter:
    """The message as it is now: its caller may change it as soon as it waits."""
    if isinstance(message, bytes | str):
        return message
    try:
        return orjson.dumps(message if type(message) is dict else dict(message))
    except (TypeError, ValueError) as error:
        return DeadLetter(repr(message), f"not JSON: {error}")
