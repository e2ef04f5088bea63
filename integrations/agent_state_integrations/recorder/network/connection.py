"""The client's sockets on the event loop: queued batches, those in transit, and the connection.

A plain ZeroMQ socket is read when the loop reports its descriptor as ready, and written without
blocking. That takes a third of the CPU time of ``zmq.asyncio`` for small messages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

from agent_state.errors import AgentStateError
from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.wire import (
    Context,
    EndpointError,
    Receipt,
    connect,
    zmq,
)

AWAY_SECONDS = 0.5
"""A daemon that was not reached for this long is away: batches no longer wait for it."""
_HEARTBEAT_MS, _SILENT_MS = 1000, 5000
_RECONNECT_MS, _RECONNECT_MAX_MS = 50, 1000
_PUSHED_AHEAD = 100
"""Sends that ZeroMQ may hold for a daemon that is slow. They are lost when it dies."""
_IN_REQUEST, _IN_REQUEST_BYTES = 1000, 4 * 1024 * 1024


class DaemonUnavailableError(AgentStateError):
    """The daemon is away, or has sent nothing for too long, or could not store it."""


class PendingBatch:
    """Messages that travel together; awaited for their receipts.

    ``keep``: they go to the spool when they cannot be delivered. ``ended`` is called when it is
    decided, also if the caller was cancelled.
    """

    __slots__ = ("_done", "_ended", "ids", "keep", "messages", "since", "size")

    def __init__(
        self,
        messages: Sequence[bytes],
        ids: Sequence[str | None] = (),
        *,
        keep: bool = True,
        ended: Callable[[PendingBatch], None] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.messages = messages
        self.ids = ids
        self.size = sum(map(len, messages))
        self.since = loop.time()
        self.keep = keep
        self._ended = ended
        self._done: asyncio.Future[list[Receipt]] = loop.create_future()

    def __await__(self) -> Generator[Any, None, list[Receipt]]:
        return self._done.__await__()

    def resolve(self, receipts: list[Receipt]) -> None:
        if not self._done.done():  # else its caller was cancelled
            self._done.set_result(receipts)
        if self._ended is not None:
            self._ended(self)

    def settle_all(self, outcome: wire.Outcome) -> None:
        """The same became of every message."""
        self.resolve([Receipt(outcome, own_id) for own_id in self.ids])

    def fail(self, error: Exception) -> bool:
        """Raise the error in the caller; False if it was cancelled."""
        waiting = not self._done.done()
        if waiting:
            self._done.set_exception(error)
        if self._ended is not None:
            self._ended(self)
        return waiting

    def abandon(self) -> None:
        """The caller was cancelled; the messages are delivered all the same."""
        self._done.cancel()


GiveUp = Callable[[list[PendingBatch], str], None]
"""Called with batches that could not be delivered, and the reason."""


class DaemonConnection:
    """One socket that connects to the daemon. Made, used and closed on the event loop.

    ``give_up`` gets what could not be delivered within ``timeout_seconds``, or at once while the
    daemon is away.
    """

    kind: int
    """The type of the socket."""

    def __init__(
        self, context: Context, endpoint: str, *, timeout_seconds: float, give_up: GiveUp
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout_seconds
        self._give_up = give_up
        self._outgoing: deque[PendingBatch] = deque()
        self.connected = asyncio.Event()
        self._lost_at = self._progress = self._loop.time()
        self._socket = socket = context.socket(self.kind)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a daemon that is away
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        self._prepare()
        self._up = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._monitor = socket.get_monitor_socket(self._up | zmq.EVENT_DISCONNECTED)
        self._descriptors = [int(one.getsockopt(zmq.FD)) for one in (socket, self._monitor)]
        try:
            connect(socket, endpoint)
            self._loop.add_reader(self._descriptors[0], self._ready)
            self._loop.add_reader(self._descriptors[1], self._watch)
        except EndpointError:
            self.close(0)
            raise
        except NotImplementedError as error:
            self.close(0)
            raise AgentStateError(
                "this event loop cannot watch a socket; use asyncio.SelectorEventLoop"
            ) from error
        self._watch()

    def put(self, batch: PendingBatch) -> None:
        """Send it as soon as it can be."""
        self._outgoing.append(batch)
        if self.away:
            self._give_up_all("the daemon is away")

    def check(self) -> None:
        """Give up what has waited long enough. To be called now and then."""
        if self.away:
            self._give_up_all("the daemon is away")
        elif self._loop.time() - self._progress > self._timeout:
            self._give_up_old(self._loop.time() - self._timeout)

    def close(self, linger: float) -> None:
        """Close the socket; ZeroMQ has ``linger`` seconds to send its buffers."""
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(int(linger * 1000))

    @property
    def away(self) -> bool:
        if self.connected.is_set() or self._loop.time() - self._lost_at < AWAY_SECONDS:
            return False
        self._watch()  # the loop may have been busy with other things
        return not self.connected.is_set()

    # -- for the two kinds of links ----------------------------------------------------------

    def _prepare(self) -> None:
        """Set the socket's own options."""

    def _received(self, frames: list[bytes]) -> None:
        """A message came in."""

    def _flush(self) -> None:
        """Send what can be sent now."""
        raise NotImplementedError

    def _disconnected(self) -> None:
        """The connection was lost, and messages in transit may be too."""

    def _give_up_old(self, before: float) -> None:
        """Give up what has waited since then; nothing has gone on in the meantime."""
        old = [batch for batch in self._outgoing if batch.since < before]
        self._outgoing = deque(batch for batch in self._outgoing if batch.since >= before)
        if old:
            self._give_up(old, "the daemon takes nothing")

    def _send(self, frames: Sequence[bytes]) -> bool:
        """Whether ZeroMQ took the frames."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        # Sending may have read the descriptor's signal that something came in.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._ready)
        return True

    # -- what the loop calls -----------------------------------------------------------------

    def _ready(self) -> None:
        """The descriptor has signalled: read all there is, and see whether there is room."""
        while not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._received(frames)
        if self._outgoing:
            self._flush()

    def _watch(self) -> None:
        while not self._monitor.closed:
            try:
                event, _address = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if int.from_bytes(event[:2], "little") == self._up:
                self._progress = self._loop.time()
                self.connected.set()
                self._flush()
            else:
                self._lost_at = self._loop.time()
                self.connected.clear()
                self._disconnected()

    def _give_up_all(self, reason: str) -> None:
        batches, self._outgoing = list(self._outgoing), deque()
        if batches:
            self._give_up(batches, reason)


class UnackedSender(DaemonConnection):
    """A PUSH socket: a batch is resolved when ZeroMQ has accepted it."""

    kind = zmq.PUSH

    def _prepare(self) -> None:
        self._socket.setsockopt(zmq.SNDHWM, _PUSHED_AHEAD)

    def put(self, batch: PendingBatch) -> None:
        super().put(batch)
        self._flush()

    def _flush(self) -> None:
        while self._outgoing and self._send(self._outgoing[0].messages):
            self._progress = self._loop.time()
            self._outgoing.popleft().settle_all("sent")

    def _ready(self) -> None:
        # AckedSender for the events is what reads the descriptor's signal.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            self._flush()


class AckedSender(DaemonConnection):
    """A DEALER socket: the daemon's answer resolves a batch.

    Batches that are put in the same turn of the loop share a request. ``window`` messages may be
    unanswered at a time; when the connection is lost, they are sent again on the next one.
    """

    kind = zmq.DEALER

    def __init__(
        self,
        context: Context,
        endpoint: str,
        *,
        window: int,
        timeout_seconds: float,
        give_up: GiveUp,
    ) -> None:
        self._window = window
        self._number = 0
        self._under_way: dict[int, list[PendingBatch]] = {}
        self._unanswered = 0
        self._flushing = False
        super().__init__(context, endpoint, timeout_seconds=timeout_seconds, give_up=give_up)

    def _prepare(self) -> None:
        self._socket.setsockopt(zmq.SNDHWM, 0)  # the window is the bound

    def put(self, batch: PendingBatch) -> None:
        super().put(batch)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        while self._outgoing and self._unanswered < self._window and self.connected.is_set():
            batches, messages, size = list[PendingBatch](), list[bytes](), 0
            while self._outgoing and len(messages) < _IN_REQUEST and size < _IN_REQUEST_BYTES:
                batch = self._outgoing.popleft()
                batches.append(batch)
                messages.extend(batch.messages)
                size += batch.size
            self._number += 1
            if not self._send(wire.request(self._number, messages)):
                self._outgoing.extendleft(reversed(batches))
                return  # the descriptor signals a new connection
            if not self._under_way:
                self._progress = self._loop.time()
            self._under_way[self._number] = batches
            self._unanswered += len(messages)

    def _received(self, frames: list[bytes]) -> None:
        try:
            number, said = wire.parse_answer(frames)
        except wire.WireFormatError:
            return  # not from our daemon; without an answer it is sent again
        batches = self._under_way.pop(number, None)
        if batches is None:  # its batches were given up
            return
        self._progress = self._loop.time()
        count = sum(len(batch.messages) for batch in batches)
        self._unanswered -= count
        if isinstance(said, str):
            self._give_up(batches, said)
        elif len(said) != count:
            self._give_up(batches, f"{len(said)} receipts for {count} messages")
        else:
            at = 0
            for batch in batches:
                at, start = at + len(batch.messages), at
                batch.resolve(said[start:at])

    def _disconnected(self) -> None:
        self._outgoing.extendleft(
            batch for batches in reversed(self._under_way.values()) for batch in reversed(batches)
        )
        self._under_way.clear()
        self._unanswered = 0

    def _give_up_old(self, before: float) -> None:
        old = [number for number, batches in self._under_way.items() if batches[0].since < before]
        for number in old:
            batches = self._under_way.pop(number)
            self._unanswered -= sum(len(batch.messages) for batch in batches)
            self._give_up(batches, f"no answer for {self._timeout:g} s")
        super()._give_up_old(before)
