"""ZeroMQ sockets, whose failures are typed errors that name the endpoint."""

from __future__ import annotations

import errno
from ipaddress import ip_address
from urllib.parse import urlsplit

from agent_state.errors import AgentStateError, MissingExtraError

try:
    import zmq as zmq
except ModuleNotFoundError as error:
    raise MissingExtraError("recorder", "pyzmq") from error

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


class EndpointError(AgentStateError, OSError):
    """The endpoint is none, or is taken by another process."""


def bind(socket: Socket, endpoint: str) -> str:
    """Listen there; the endpoint as others reach it. Raises ``EndpointError``."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot listen on {endpoint}: {_why(error)}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: Socket, endpoint: str) -> None:
    """Connect, now or as soon as somebody listens there. Raises ``EndpointError``."""
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot connect to {endpoint}: {_why(error)}") from error


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


def _why(error: zmq.ZMQError) -> str:
    if error.errno in {errno.EINVAL, errno.ENODEV, errno.EPROTONOSUPPORT}:
        return f"{error.strerror}; an endpoint is like tcp://127.0.0.1:5557"
    return error.strerror or str(error)
