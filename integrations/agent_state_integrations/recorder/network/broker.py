"""A broker: what any agent publishes reaches every subscriber.

Publishers connect a PUB socket to the front, subscribers a SUB socket to the back. It keeps
nothing: who subscribes later has missed it, and a subscriber that is too slow misses messages.
"""

from __future__ import annotations

import threading
from typing import Self

from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.sockets import Context, bind, zmq


class Broker:
    """XSUB and XPUB sockets, and a thread that passes on between them.

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

        def pass_on() -> None:
            try:
                zmq.proxy(front, back)
            except zmq.ContextTerminated:
                front.close()
                back.close()

        threading.Thread(target=pass_on, name="agent-state-broker", daemon=True).start()

    def stop(self) -> None:
        """Stop at once; twice is a no-op. What has not been passed on is gone."""
        if self._context is not None:
            self._context.term()  # ends the proxy, and waits until its sockets are closed
            self._context = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
