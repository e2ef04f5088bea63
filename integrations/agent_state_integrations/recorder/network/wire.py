"""The protocol between an agent and the recording daemon, and its ZeroMQ sockets.

The agent's DEALER (or REQ) socket sends one request, the daemon's ROUTER one answer to each, in
the order of the requests. A request is a header and any number of messages, each a frame of its
own, as JSON bytes; without a message it only asks whether the daemon answers::

    [b""]  b"ARW1" <number: 8 bytes, big-endian>  <message> <message> …

The first, empty frame is what a REQ socket puts there; it comes back if it was sent. ``ARW1`` is
the protocol's name and version, the number is the agent's and comes back with the answer, whose
last frame is one JSON object. Either every message is durable, and it has the outcome of each,
in order::

    [b""]  b"ARW1" <number>  {"messages": [{"outcome": "recorded", "id": "…", "seq": 7,
                                            "reason": null}, …]}

or none of this request was acknowledged, and ``error`` is the reason; send it again with the same
ids in the messages, and those that were stored after all are a ``duplicate``::

    [b""]  b"ARW1" <number>  {"error": "appending to a log: No space left on device"}

An invalid request is kept as a dead letter and answered with ``error`` under the number 0.

Messages for which no receipt is wanted go to the daemon's PULL socket as they are: one message a
frame, in one frame or in many.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from agent_state.errors import AgentStateError, needs_extra

with needs_extra("recorder", "zmq"):
    import zmq as zmq

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


class EndpointError(AgentStateError, OSError):
    """The endpoint is invalid, or is taken by another process."""


def bind(socket: Socket, endpoint: str) -> str:
    """Listen there; the endpoint as others reach it. Raises ``EndpointError``."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot listen on {endpoint}: {_reason(error)}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: Socket, endpoint: str) -> None:
    """Connect, now or as soon as a process listens there. Raises ``EndpointError``."""
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot connect to {endpoint}: {_reason(error)}") from error


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach an endpoint."""
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme in {"ipc", "inproc"} or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: zmq.ZMQError) -> str:
    if error.errno in {errno.EINVAL, errno.ENODEV, errno.EPROTONOSUPPORT}:
        return f"{error.strerror}; an endpoint is like tcp://127.0.0.1:5557"
    return error.strerror or str(error)


PULL = "tcp://127.0.0.1:5557"
"""Where the daemon takes messages without a receipt."""
ACK = "tcp://127.0.0.1:5558"
"""Where the daemon takes messages and gives receipts."""
FRONT = "tcp://127.0.0.1:5555"
"""Where a broker takes what is published (XSUB)."""
BACK = "tcp://127.0.0.1:5556"
"""Where a broker gives it to its subscribers (XPUB)."""

MAX_FRAME = 64 * 1024 * 1024
"""A longer frame ends the connection that it comes from."""
MAX_MESSAGE = 32 * 1024 * 1024
"""The largest message of a client; redaction may make it longer."""

MAGIC = b"ARW1"
_HEADER = struct.Struct(">4sQ")

Outcome = Literal["recorded", "duplicate", "dead-letter", "spooled", "sent"]


class WireFormatError(AgentStateError, ValueError):
    """These frames are no request, or no answer, of this protocol."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The outcome of sending a message.

    ``recorded``, ``duplicate`` and ``dead-letter`` are the daemon's word, and durable there.
    ``spooled``: durable in the client's spool, and the daemon gets it later. ``sent``: handed to
    the network, without an answer.
    """

    outcome: Outcome
    id: str | None = None
    seq: int = 0
    """Its number in the recording; 0 where it has none (yet)."""
    reason: str | None = None
    """Why it is a dead letter."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the daemon sees it. ``envelope`` is what goes in front of the answer."""

    envelope: list[bytes]
    number: int
    messages: list[bytes]


def request(number: int, messages: Sequence[bytes]) -> list[bytes]:
    """The frames that ask for these messages to be recorded."""
    return [_HEADER.pack(MAGIC, number), *messages]


def parse_request(frames: list[bytes]) -> Request:
    """The request in what a ROUTER received, whose first frame names the sender.

    Raises ``NotUnderstoodError``.
    """
    start = _start(frames)
    if len(frames) <= start:
        raise WireFormatError("a request without a header")
    return Request(frames[:start], _number(frames[start]), frames[start + 1 :])


def envelope_of(frames: list[bytes]) -> list[bytes]:
    """The frames in front of an answer to these frames, valid or not."""
    return frames[: _start(frames)]


def _start(frames: list[bytes]) -> int:
    return 2 if len(frames) > 1 and not frames[1] else 1


def _number(header: bytes) -> int:
    if len(header) != _HEADER.size or not header.startswith(MAGIC[:3]):
        raise WireFormatError("a request without a header")
    magic, number = _HEADER.unpack(header)
    if magic != MAGIC:
        raise WireFormatError(f"version {magic[3:]!r} of the protocol; this is {MAGIC[3:]!r}")
    return int(number)


def answer(envelope: list[bytes], number: int, outcomes: Sequence[object]) -> list[bytes]:
    """The frames of an answer with the outcome of each message.

    An outcome is a dataclass with the fields of ``Receipt``.
    """
    return [*envelope, _HEADER.pack(MAGIC, number), orjson.dumps({"messages": outcomes})]


def refusal(envelope: list[bytes], number: int, reason: str) -> list[bytes]:
    """The frames of an answer that nothing of a request was stored, with the reason."""
    return [*envelope, _HEADER.pack(MAGIC, number), orjson.dumps({"error": reason})]


def parse_answer(frames: list[bytes]) -> tuple[int, list[Receipt] | str]:
    """The number, and the receipts or the reason why there are none.

    Raises ``NotUnderstoodError``.
    """
    if len(frames) != 2:
        raise WireFormatError(f"an answer of {len(frames)} frames")
    number = _number(frames[0])
    try:
        content: dict[str, Any] = orjson.loads(frames[1])
        if "error" in content:
            return number, str(content["error"])
        return number, [Receipt(**one) for one in content["messages"]]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise WireFormatError(f"an answer that cannot be read: {error}") from error
