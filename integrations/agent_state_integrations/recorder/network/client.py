"""The client with which an agent sends messages to the recording daemon."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self

import orjson

from agent_state.clock import Clock, IdFactory, SystemClock, new_id, stamp
from agent_state.errors import (
    AgentStateError,
    SerializationError,
    UnreadableMessageError,
)
from agent_state.storage.executor import Executor, shielded
from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.connection import (
    AckedSender,
    DaemonConnection,
    DaemonUnavailableError,
    PendingBatch,
    UnackedSender,
)
from agent_state_integrations.recorder.network.spool import Spool
from agent_state_integrations.recorder.network.wire import Context, Receipt, zmq
from agent_state_integrations.recorder.normalize import NAMES
from agent_state_integrations.recorder.redact import SecretRedactor

SPOOL = Path("state/.spool")

_CHUNK, _CHUNK_BYTES, _CHUNKS_AHEAD = 500, 4 * 1024 * 1024, 4
_CHECK_SECONDS = 0.05
_RETRY_SECONDS, _RETRY_MAX_SECONDS = 0.1, 5.0

_logger = logging.getLogger("agent_state_integrations.recorder")


class RecorderClient:
    """Sends messages to the recorder's daemon, from one event loop.

        async with RecorderClient(ack=True) as client:
            receipt = await client.record({"sender_id": "ada", "content": "hello"})

    With ``ack``, a call returns when the daemon has said that the message is durable. Without, it
    returns when the message is handed to the network (``sent``), and the daemon does not answer.

    No call waits for a daemon that is not running. Messages that it has not taken after
    ``timeout_seconds`` without progress, and without ``ack`` those that come when ``queue``
    messages are waiting, are written to the spool: durable when the call returns, with the receipt
    ``spooled``. They are delivered, with receipts, as soon as the daemon runs again: by this
    client, or by the next one with the same ``spool_dir`` (default ``state/.spool``), in any
    process. The folder is made when it is needed; clients share it. With ``ack``, ``queue`` is the
    number of messages that may be unanswered at a time; more wait for their turn.

    A message that has no id gets one, so that the daemon records once what is sent twice, and one
    that has no time gets that.

    ``sent`` is not a promise: messages in transit when the daemon is killed, or that it has not
    read when it ends, are lost, and so are those in ZeroMQ's buffers when this process is killed.
    ``ack`` prevents that.

    Cancelling a call is safe: its messages go on, to the daemon or into the spool.

    ``pull`` and ``acknowledge`` are the daemon's endpoints; the second is needed without ``ack``
    too, for what was spooled.
    """

    def __init__(
        self,
        pull: str = wire.PULL,
        acknowledge: str = wire.ACK,
        *,
        ack: bool = False,
        queue: int = 10_000,
        spool_dir: str | PathLike[str] | None = None,
        timeout_seconds: float = 5.0,
        redactor: SecretRedactor | None = None,
        clock: Clock | None = None,
        new_id: IdFactory = new_id,
    ) -> None:
        self._endpoints = pull, acknowledge
        self._ack = ack
        self._queue = queue
        self._timeout = timeout_seconds
        self._clock = clock or SystemClock()
        self._new_id = new_id
        self._spool = Spool(spool_dir or SPOOL, redactor=redactor, clock=clock, new_id=new_id)
        self._open = False
        self._held = 0
        self._to_spool: list[PendingBatch] = []
        self._spooling: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, whether the daemon is there or not.

        Raises ``EndpointError`` for an invalid endpoint, ``StorageError`` for a spool that
        cannot be read. Twice is a no-op; what was closed can be opened again.
        """
        if self._open:
            return
        self._idle, self._spooled = asyncio.Event(), asyncio.Event()
        self._pool = Executor("recorder", threads=2)
        self._context: Context = zmq.Context()
        self._links: list[DaemonConnection] = []
        pull, acknowledge = self._endpoints
        try:
            self._asking = AckedSender(
                self._context,
                acknowledge,
                window=self._queue,
                timeout_seconds=self._timeout,
                give_up=self._spool_undelivered,
            )
            self._links.append(self._asking)
            self._sending: DaemonConnection = self._asking
            if not self._ack:
                self._sending = UnackedSender(
                    self._context,
                    pull,
                    timeout_seconds=self._timeout,
                    give_up=self._spool_undelivered,
                )
                self._links.append(self._sending)
            if await self._pool.run(self._spool.waiting):
                self._spooled.set()
        except BaseException:
            await self._disconnect(0)
            raise
        self._open = True
        self._tasks = [asyncio.create_task(self._check()), asyncio.create_task(self._deliver())]

    async def close(self) -> None:
        """Wait for what is under way, at most ``timeout_seconds``, and spool the rest.

        Being cancelled does not shorten it.
        """
        if self._open:
            self._open = False
            await shielded(self._close())

    async def _close(self) -> None:
        while self._held:
            self._idle.clear()
            await self._idle.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._disconnect(self._timeout)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def record(self, message: Mapping[str, Any]) -> Receipt:
        """Record one message; see the class for when this returns.

        Raises ``UnreadableMessageError`` when the daemon has kept it as a dead letter,
        ``SerializationError`` when it cannot be written as JSON, ``StorageError`` when the daemon
        is away and the spool cannot be written: then the message is nowhere.
        """
        [receipt] = await self._sent([self._written(message)])
        if receipt.outcome == "dead-letter":
            raise UnreadableMessageError(receipt.reason or "the daemon gave no reason")
        return receipt

    async def record_many(self, messages: Iterable[Mapping[str, Any]]) -> list[Receipt]:
        """Record several messages in order; returns a receipt for each, dead letters too.

        Raises as ``record`` does; then some of them may be recorded, and may be sent again as
        they are if they have ids.
        """
        waiting: deque[PendingBatch] = deque()
        receipts: list[Receipt] = []
        try:
            for some in _chunks(self._written(message) for message in messages):
                waiting.append(self._sent(some))
                if len(waiting) >= _CHUNKS_AHEAD:
                    receipts += await waiting.popleft()
                await asyncio.sleep(0)  # or a long run of sends would block the loop
            while waiting:
                receipts += await waiting.popleft()
        finally:
            for batch in waiting:
                batch.abandon()
        return receipts

    # -- on the way out ----------------------------------------------------------------------

    def _written(self, message: Mapping[str, Any]) -> tuple[str, bytes]:
        """The id and the bytes of a message, which has an id and a time from here on."""
        content = dict(message)
        within = content.get("message")
        inner = within if isinstance(within, Mapping) else {}
        own_id = _first(content, NAMES["id"])
        if own_id is None:
            own_id = content["message_id"] = _first(inner, NAMES["id"]) or self._new_id()
        if _first(content, NAMES["time"]) is None and _first(inner, NAMES["time"]) is None:
            content["timestamp"] = stamp(self._clock.now())
        try:
            data = orjson.dumps(content)
        except orjson.JSONEncodeError as error:
            raise SerializationError(f"a message cannot be written as JSON: {error}") from error
        if len(data) > wire.MAX_MESSAGE:
            raise SerializationError(
                f"a message of {len(data)} bytes is over the limit of {wire.MAX_MESSAGE}"
            )
        return str(own_id), data

    def _sent(self, messages: Sequence[tuple[str, bytes]]) -> PendingBatch:
        if not self._open:
            raise AgentStateError("this recorder client is not open")
        ids, data = zip(*messages, strict=True)
        batch = PendingBatch(data, ids, ended=self._ended)
        self._held += len(data)
        if not self._ack and self._held > self._queue:
            self._spool_undelivered([batch], "the queue is full")
        else:
            self._sending.put(batch)
        return batch

    def _ended(self, batch: PendingBatch) -> None:
        self._held -= len(batch.messages)
        if not self._held:
            self._idle.set()

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            for link in self._links:
                link.check()

    # -- the spool ---------------------------------------------------------------------------

    def _spool_undelivered(self, batches: list[PendingBatch], reason: str) -> None:
        """Spool batches that a connection could not deliver."""
        for batch in batches:
            if batch.keep:
                self._to_spool.append(batch)
            else:
                batch.fail(DaemonUnavailableError(reason))
        if self._to_spool and self._spooling is None:
            self._spooling = asyncio.create_task(self._write_spool())

    async def _write_spool(self) -> None:
        while self._to_spool:
            batches, self._to_spool = self._to_spool, []
            messages = [message for batch in batches for message in batch.messages]
            try:
                await self._pool.run(partial(self._spool.append, messages))
            except Exception as error:  # noqa: BLE001  # raised in the callers
                _fail_all(batches, error)
            else:
                for batch in batches:
                    batch.settle_all("spooled")
                self._spooled.set()
        self._spooling = None

    async def _deliver(self) -> None:
        """Send what was spooled whenever the daemon is there, until the client is closed."""
        pause = _RETRY_SECONDS
        while True:
            await self._spooled.wait()
            await self._asking.connected.wait()
            trouble: AgentStateError | None = None
            done = False
            try:
                done = await self._deliver_all()
            except AgentStateError as error:
                trouble = error
            if done:
                pause = _RETRY_SECONDS
                continue
            if trouble is not None and not isinstance(trouble, DaemonUnavailableError):
                _logger.error("the spool cannot be delivered, and is tried again: %s", trouble)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _RETRY_MAX_SECONDS)

    async def _deliver_all(self) -> bool:
        """Whether the spool is empty now; False when another process delivers it."""
        self._spooled.clear()
        lock = await self._pool.run(self._spool.begin_delivery)
        try:
            while lock is not None and (path := await self._pool.run(self._spool.oldest)):
                batches = self._spool.batches(path)
                while messages := await self._pool.run(partial(next, batches, None)):
                    pending = PendingBatch(messages, keep=False)
                    self._asking.put(pending)
                    await pending
                await self._pool.run(partial(self._spool.remove, path))
        except BaseException:
            self._spooled.set()
            raise
        finally:
            if lock is not None:
                lock.release()
        if lock is None:
            self._spooled.set()
        return lock is not None

    # -- the end -----------------------------------------------------------------------------

    async def _disconnect(self, linger: float) -> None:
        for link in self._links:
            link.close(linger)
        await self._pool.run(self._context.term)  # waits until what was pushed is out
        await self._pool.ended()
        self._pool.close()


def _fail_all(batches: Sequence[PendingBatch], error: Exception) -> None:
    for batch in batches:
        if not batch.fail(copy.copy(error)):  # an error of its own for each who waits
            _logger.error("%d messages are lost: %s", len(batch.messages), error)


def _first(content: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value for name in names if (value := content.get(name)) not in (None, "")), None)


def _chunks(messages: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    chunk, size = list[tuple[str, bytes]](), 0
    for message in messages:
        if chunk and (len(chunk) >= _CHUNK or size + len(message[1]) > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(message)
        size += len(message[1])
    if chunk:
        yield chunk
