"""The server: runs the application with uvicorn until a signal, and ends it in order."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext

import uvicorn
from fastapi import FastAPI

from agent_state.errors import AgentStateError
from agent_state.storage.executor import shielded
from agent_state.web.app import close

GRACE_SECONDS = 10
STUCK_SECONDS = 60
BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; the only such name is ``localhost``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, tokens: int) -> None:
    """Raises ``AgentStateError`` if other machines can reach the host, and there is no token."""
    if not is_loopback(host) and not tokens:
        raise AgentStateError(f"{host} can be reached from other machines; that needs a token")


async def serve(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_start: Callable[[str], None] = lambda _: None,
    opening: AbstractAsyncContextManager[object] | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or cancellation, then end open requests and event streams.

    ``port``: 0 for any free one. ``on_start`` is called with the address once requests are served.
    ``opening``: opens what is served, and closes it after the server. Until it is open the server
    answers ``/health`` and the files of the dashboard; other requests get 503 (``starting``).
    A second signal does not wait for open requests. Raises ``AgentStateError`` for a host that
    other machines can reach if the application has no token, and ``ListenError`` (an ``OSError``)
    for an address that is in use.
    """
    check_exposure(host, len(app.state.tokens))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    # uvicorn would exit the process if the address is in use; binding here raises instead.
    listening = await asyncio.get_running_loop().run_in_executor(None, _bound, host, port)
    with listening:
        bound = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        server = _Server(config, app)
        app.state.starting = opening is not None
        serving = asyncio.create_task(server.serve(sockets=[listening]), name="agent-state http")

        async def work() -> None:
            async with opening or nullcontext():
                app.state.starting = False
                await asyncio.wait(
                    (serving, asyncio.ensure_future(server.listening.wait())),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if server.listening.is_set():
                    on_start(f"http://{shown}:{bound}")
                await asyncio.shield(serving)

        working = asyncio.create_task(work(), name="agent-state backend")
        try:
            await asyncio.wait((serving, working), return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.should_exit = True
            if app.state.starting:
                working.cancel()
            await shielded(_ended(serving, working))
        if not working.cancelled():  # a signal came while it was opened
            working.result()
        serving.result()


async def _ended(*tasks: asyncio.Task[None]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    # Without the protocol, asyncio leaves Nagle's algorithm on for the socket, and each response
    # waits 40 ms for an acknowledgement that the client delays.
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":
            # Connections inherit it: a client that accepts nothing is disconnected in the end.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_SECONDS * 1000)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    except BaseException:
        listening.close()
        raise
    return listening


class ListenError(AgentStateError, OSError):
    """The server cannot listen on the address, such as one that is in use."""


class _Server(uvicorn.Server):
    """A uvicorn server that ends event streams before it waits for open requests.

    A signal stops it without an error.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await close(self._app)
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # a client that still accepts nothing

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
