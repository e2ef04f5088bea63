"""Recording from an event loop: messages of many tasks share one write and one fdatasync."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Literal, Self, TypedDict, Unpack

import orjson

from agent_state.clock import Clock, IdFactory, SystemClock
from agent_state.errors import AgentStateError, UnreadableMessageError
from agent_state.protocols import Incident
from agent_state.storage.executor import Batcher, Executor, shielded
from agent_state_integrations.recorder.checkpoint import Checkpoint
from agent_state_integrations.recorder.redact import SecretRedactor
from agent_state_integrations.recorder.rules import Rules
from agent_state_integrations.recorder.writer import (
    DeadLetter,
    RawMessage,
    RecordResult,
    RecordWriter,
)

CHECKPOINT_SECONDS = 300.0

logger = logging.getLogger("agent_state_integrations.recorder")


class WriterOptions(TypedDict, total=False):
    """The options of ``RecordWriter``."""

    durability: Literal["fsync", "os"]
    rules: Rules | None
    redactor: SecretRedactor | None
    rotate_bytes: int
    max_bytes: int
    dedupe_content: bool
    dedupe_window: int
    new_id: IdFactory


class Recorder:
    """Records messages into ``<state_dir>/record/``; other processes may record there too.

    ``checkpoint_seconds``: how often a checkpoint is made if messages have come; None for never. A
    last one is made on closing. ``options`` are those of ``RecordWriter``.

    A message is a mapping, or JSON text or bytes, in one of the forms that ``normalize`` reads. It
    is copied at the call and may be changed afterwards.
    """

    def __init__(
        self,
        state_dir: str | PathLike[str] = "state",
        *,
        checkpoint_seconds: float | None = CHECKPOINT_SECONDS,
        clock: Clock | None = None,
        **options: Unpack[WriterOptions],
    ) -> None:
        self._clock = clock or SystemClock()
        self.writer = RecordWriter(state_dir, clock=self._clock, **options)
        self._checkpoint_seconds = checkpoint_seconds
        self._executor: Executor | None = None
        self._closing = False
        self._batcher: Batcher[list[RawMessage | DeadLetter], list[RecordResult]] = Batcher(
            self._write
        )
        self._checkpointing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the recording. A no-op when it is open. Raises ``StorageError``."""
        if self._executor is not None:
            return
        executor = Executor("recorder", 1)
        try:
            await executor.run(self.writer.open)
        except BaseException:
            executor.close()
            raise
        self._executor = executor
        if self._checkpoint_seconds is not None:
            work = self._make_checkpoints(self._checkpoint_seconds)
            self._checkpointing = asyncio.create_task(work)

    async def close(self) -> None:
        """Write all submitted messages and a last checkpoint, and close.

        A no-op when it is closed. Cancelling the caller does not shorten it.
        """
        if self._executor is not None and not self._closing:
            self._closing = True
            await shielded(self._close(self._executor))

    async def _close(self, executor: Executor) -> None:
        checkpointing, self._checkpointing = self._checkpointing, None
        try:
            if checkpointing is not None:
                checkpointing.cancel()
                await asyncio.wait([checkpointing])
            await self._batcher.ended()
            if self._checkpoint_seconds is not None:
                await executor.run(partial(self.writer.checkpoint, "final"))
        finally:
            await executor.run(self.writer.close)
            self._executor, self._closing = None, False
            executor.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def record(self, message: RawMessage) -> RecordResult:
        """Record one message; it is durable when this returns.

        Raises ``UnreadableMessageError`` for a message that cannot be read, which is then in
        ``dead-letter.jsonl``, and ``StorageError`` when it could not be stored.
        """
        [result] = await self.record_many([message])
        if result.reason is not None:
            raise UnreadableMessageError(result.reason)
        return result

    async def record_many(self, messages: Sequence[RawMessage]) -> list[RecordResult]:
        """Record messages in order with one write; returns a result for each.

        A message that cannot be read becomes a dead letter, and the others are recorded. Raises
        ``StorageError`` when they could not be stored.
        """
        return await self.submit(messages)

    def submit(self, messages: Sequence[RawMessage]) -> asyncio.Future[list[RecordResult]]:
        """``record_many``, whose results may be awaited later; ``close`` waits for them too."""
        self._require_open()
        return self._batcher.submit([_copied(message) for message in messages])

    async def checkpoint(self, label: str = "manual") -> Checkpoint | None:
        """Make a checkpoint of the messages since the last one; None if there are none."""
        return await self._require_open().run(partial(self.writer.checkpoint, label))

    def incidents(self) -> list[Incident]:
        """Damage that was found and contained, such as a torn line."""
        return self.writer.incidents()

    def _require_open(self) -> Executor:
        if self._executor is None or self._closing:
            raise RuntimeError("the recorder is not open; use `async with`")
        return self._executor

    def _write(
        self, batch: list[list[RawMessage | DeadLetter]]
    ) -> asyncio.Future[list[list[RecordResult] | Exception]]:
        assert self._executor is not None  # noqa: S101 - `close` waits for the last batch
        return self._executor.run(partial(self._write_now, batch))

    def _write_now(
        self, batch: list[list[RawMessage | DeadLetter]]
    ) -> list[list[RecordResult] | Exception]:
        results = iter(self.writer.write([one for part in batch for one in part], "recorder"))
        return [[next(results) for _ in part] for part in batch]

    async def _make_checkpoints(self, seconds: float) -> None:
        while True:
            await self._clock.sleep(seconds)
            try:
                await self.checkpoint("auto")
            except AgentStateError:
                # Its messages are durable without it, and the next checkpoint covers them too.
                logger.exception("no checkpoint could be made")


def _copied(message: RawMessage) -> RawMessage | DeadLetter:
    """The message as it is now, since the caller may change it while it waits."""
    if isinstance(message, bytes | str):
        return message
    try:
        return orjson.dumps(message if type(message) is dict else dict(message))
    except (TypeError, ValueError) as error:
        return DeadLetter(repr(message), f"not JSON: {error}")
