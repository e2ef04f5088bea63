"""The daemon that records what agents send: one thread, one write and one fdatasync a round.

A round takes the messages that have arrived on all sockets, records them, and sends the receipts.
Messages that arrive in the meantime wait in ZeroMQ for the next round; when its queues are full, so
are the senders', which spool. While the disk cannot be written, requests are refused with the
reason, and messages without a request are held and tried again; no more of these are read until
they are stored.
"""

from __future__ import annotations

import socket as os_sockets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Self

from agent_state.errors import AgentStateError
from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.wire import Context, Socket, bind, connect, zmq
from agent_state_integrations.recorder.recorder import CHECKPOINT_SECONDS
from agent_state_integrations.recorder.writer import (
    CheckpointWriter,
    DeadLetter,
    RawMessage,
    RecordResult,
)


class Broker:
    """What any agent publishes reaches every subscriber: XSUB and XPUB sockets, and a thread.

    Publishers connect a PUB socket to the front, subscribers a SUB socket to the back. It keeps
    nothing: who subscribes later has missed it, and a subscriber that is too slow misses messages.
    ``front`` and ``back`` are where it listens; once started, as others reach it (``tcp://…:*``
    takes any free port).
    """

    def __init__(self, front: str = wire.FRONT, back: str = wire.BACK) -> None:
        self.front = front
        self.back = back
        self._context: Context | None = None

    def start(self) -> None:
        """Listen, and pass on. Raises ``EndpointError``."""
        self._context = context = zmq.Context()
        front, back = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
        try:
            for socket in (front, back):
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME)
            self.front, self.back = bind(front, self.front), bind(back, self.back)
        except BaseException:
            context.destroy(0)
            self._context = None
            raise

        def forward() -> None:
            try:
                zmq.proxy(front, back)
            except zmq.ContextTerminated:
                front.close()
                back.close()

        threading.Thread(target=forward, name="agent-state-broker", daemon=True).start()

    def stop(self) -> None:
        """Stop at once; messages not passed on are lost. A no-op when it is stopped."""
        if self._context is not None:
            self._context.term()  # ends the proxy, and waits until its sockets are closed
            self._context = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


ROUND, ROUND_BYTES = 10_000, 16 * 1024 * 1024
"""A round ends its reading at so many messages, or bytes, of one socket."""

_QUIET_MS = 100
"""When nothing has come for so long after ``stop``, all that was sent has been read …"""
_DRAIN_ROUNDS = 1_000
"""… and who goes on sending is waited for so many rounds: a busy machine makes them no more."""
_LONGEST_WAIT = 3600.0
"""In seconds; ZeroMQ takes at most 24 days."""
_RETRY_SECONDS, _RETRY_MAX_SECONDS = 0.1, 5.0
_LINGER_MS = 1000
_ANSWERS = 100_000


@dataclass(slots=True)
class DaemonCounts:
    """The messages that a daemon has handled so far."""

    recorded: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    refused: int = 0
    """Messages of requests that could not be stored; their senders have been answered so."""
    rounds: int = 0


@dataclass(slots=True)
class _ReceivedRound:
    """The messages of one round: those with receipts, and those without."""

    requests: list[wire.Request] = field(default_factory=list)
    malformed: list[tuple[list[bytes], str]] = field(default_factory=list)
    messages: list[RawMessage | DeadLetter] = field(default_factory=list)


class RecorderDaemon:
    """Records what arrives on its sockets until ``stop``.

    ``pull`` and ``ack`` are where it listens (see ``wire``); ``subscribe`` is the broker to listen
    to, if any. Once opened, these are the endpoints as others reach them. A checkpoint is made
    every ``checkpoint_seconds`` if messages have come. ``notify`` is called with a line for the
    operator.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        *,
        pull: str = wire.PULL,
        ack: str = wire.ACK,
        subscribe: str | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        notify: Callable[[str], object] = lambda _line: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pull = pull
        self.ack = ack
        self.subscribe = subscribe
        self.counts = DaemonCounts()
        self._writer = writer
        self._notify = notify
        self._checkpoint_seconds = checkpoint_seconds
        self._monotonic = monotonic
        self._held: list[RawMessage | DeadLetter] = []
        self._pause = 0.0
        self._new = False
        self._stopping = False
        self._wake_receiver, self._wake_sender = os_sockets.socketpair()
        self._wake_sender.setblocking(False)
        self._context: Context | None = None

    def open(self) -> None:
        """Listen. Raises ``EndpointError``, with nothing left open."""
        self._context = zmq.Context()
        try:
            self._pull = self._socket(zmq.PULL)
            self._router = self._socket(zmq.ROUTER)
            self._router.setsockopt(zmq.SNDHWM, _ANSWERS)
            self._sub = self._socket(zmq.SUB)
            self.pull = bind(self._pull, self.pull)
            self.ack = bind(self._router, self.ack)
            if self.subscribe is not None:
                self._sub.setsockopt(zmq.SUBSCRIBE, b"")
                connect(self._sub, self.subscribe)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the sockets; the last receipts have a second to go out."""
        if self._context is not None:
            self._context.destroy(_LINGER_MS)
            self._context = None
        self._wake_receiver.close()
        self._wake_sender.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """Let ``run`` end soon. For signal handlers and other threads."""
        self._stopping = True
        with suppress(OSError):  # it is awake already, or over
            self._wake_sender.send(b"!")

    @property
    def wake_fd(self) -> int:
        """Where a byte ends a wait of ``run``: for ``signal.set_wakeup_fd``."""
        return self._wake_sender.fileno()

    def run(self) -> None:
        """Record until ``stop``; then read what has arrived, and make the last checkpoint.

        Raises ``StorageError`` when that could not be stored.
        """
        due = self._monotonic() + self._checkpoint_seconds
        while not self._stopping:
            self._record(self._read(self._wait(due)))
            if self._monotonic() >= due:
                self._checkpoint("auto")
                due = self._monotonic() + self._checkpoint_seconds
        self._finish()

    def _finish(self) -> None:
        # No socket is unbound first: that would cut off what is still on its way in.
        for _ in range(_DRAIN_ROUNDS):
            if not (ready := self._poll(_QUIET_MS)):
                break
            self._record(self._read(ready))
        else:
            self._notify("senders go on, and are read no longer")
        self._store_held()
        self._checkpoint("final")

    def _store_held(self) -> None:
        if self._held:
            try:
                self._stored(self._writer.write(self._held))
            except AgentStateError as error:
                self._notify(f"{len(self._held)} messages are lost: {error}")
                raise

    # -- reading -------------------------------------------------------------------------------

    def _wait(self, due: float) -> set[object]:
        seconds = min(due - self._monotonic(), _LONGEST_WAIT)
        if self._held:
            seconds = min(seconds, self._pause)
        # Also if it is to stop by now: it was not when that was looked at.
        return self._poll(max(0, int(seconds * 1000) + 1), self._wake_receiver.fileno())

    def _poll(self, milliseconds: int, *woken_by: int) -> set[object]:
        """Wait until there is something to read; the sockets on which there is.

        ``woken_by``: what else ends the wait.
        """
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        if not self._held:
            poller.register(self._pull, zmq.POLLIN)
            poller.register(self._sub, zmq.POLLIN)
        for descriptor in woken_by:
            poller.register(descriptor, zmq.POLLIN)
        ready = {found for found, _ in poller.poll(milliseconds)}
        if not ready.isdisjoint(woken_by):
            self._wake_receiver.recv(4096)
        return ready

    def _read(self, ready: set[object]) -> _ReceivedRound:
        got = _ReceivedRound()
        for frames in _waiting(self._router) if self._router in ready else ():
            try:
                got.requests.append(wire.parse_request(frames))
            except wire.WireFormatError as error:
                got.malformed.append((frames, error.message))
        if self._pull in ready:
            for frames in _waiting(self._pull):
                got.messages += frames
        if self._sub in ready:
            got.messages += [_published(frames) for frames in _waiting(self._sub)]
        return got

    # -- recording -----------------------------------------------------------------------------

    def _record(self, got: _ReceivedRound) -> None:
        """Record a round, and messages held from earlier ones; then answer the senders."""
        batch: list[RawMessage | DeadLetter] = []
        for request in got.requests:
            batch += request.messages
        batch += [DeadLetter(b"\n".join(frames[1:]), why) for frames, why in got.malformed]
        answered = len(batch)
        batch += self._held
        batch += got.messages
        if not batch:
            recorded = list[RecordResult]()
        else:
            try:
                recorded = self._writer.write(batch)
            except AgentStateError as error:
                self._refuse(got, batch[answered:], error)
                return
            self._stored(recorded)
        at = 0
        for request in got.requests:
            at, start = at + len(request.messages), at
            self._answer(wire.answer(request.envelope, request.number, recorded[start:at]))
        for frames, why in got.malformed:
            self._answer(wire.refusal(wire.envelope_of(frames), 0, why))

    def _stored(self, recorded: Sequence[RecordResult]) -> None:
        self._new = True
        if self._pause:
            self._notify("messages are stored again")
        self._held, self._pause = [], 0.0
        self._outcomes(recorded)

    def _outcomes(self, recorded: Sequence[RecordResult]) -> None:
        self.counts.rounds += 1
        for one in recorded:
            match one.outcome:
                case "recorded":
                    self.counts.recorded += 1
                case "duplicate":
                    self.counts.duplicates += 1
                case "dead-letter":
                    self.counts.dead_letters += 1

    def _refuse(
        self, got: _ReceivedRound, held: list[RawMessage | DeadLetter], error: AgentStateError
    ) -> None:
        """Nothing was stored: answer senders that can send again, and hold the other messages."""
        if not self._pause:
            self._notify(f"messages cannot be stored, and are tried again: {error}")
        self._pause = min(self._pause * 2 or _RETRY_SECONDS, _RETRY_MAX_SECONDS)
        self._held = held
        for request in got.requests:
            self.counts.refused += len(request.messages)
            self._answer(wire.refusal(request.envelope, request.number, str(error)))
        for frames, why in got.malformed:
            self._answer(wire.refusal(wire.envelope_of(frames), 0, why))

    def _answer(self, frames: list[bytes]) -> None:
        with suppress(zmq.ZMQError):  # the sender is gone, and sends again when it is back
            self._router.send_multipart(frames, zmq.NOBLOCK)

    def _checkpoint(self, label: Literal["auto", "final"]) -> None:
        """A checkpoint, if anything came. The messages are safe without it."""
        if not self._new:
            return
        try:
            self._writer.checkpoint(label)
            self._new = False
        except AgentStateError as error:
            self._notify(f"no checkpoint could be made: {error}")

    def _socket(self, kind: int) -> Socket:
        assert self._context is not None  # noqa: S101  # it was made just now
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME)
        return socket


def _waiting(socket: Socket) -> list[list[bytes]]:
    """The messages that have arrived, up to the size of a round."""
    got: list[list[bytes]] = []
    size = count = 0
    while count < ROUND and size < ROUND_BYTES:
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            break
        got.append(frames)
        count += len(frames)
        size += sum(map(len, frames))
    return got


def _published(frames: list[bytes]) -> bytes:
    """The message in what was published: ``[topic, json]``, ``topic json`` or ``json``."""
    message = frames[-1]
    if len(frames) == 1 and not message.startswith(b"{"):
        topic, brace, rest = message.partition(b"{")
        if brace and b'"' not in topic:
            return brace + rest
    return message
