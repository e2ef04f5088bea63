"""The broker: published once, passed on to subscribers, and recorded by the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from agent_state.errors import AgentStateError
from agent_state_integrations.recorder.network.daemon import Broker
from agent_state_integrations.recorder.network.wire import Socket, zmq
from tests.deadlines import until_in_thread as until
from tests.recorder.daemons import FREE, Daemon, Sockets, running


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


def publisher(sockets: Sockets, front: str) -> Socket:
    """An XPUB socket is a PUB socket that can tell when somebody has subscribed."""
    socket = sockets.connect(zmq.XPUB, front)
    assert socket.recv() == b"\x01"
    return socket


def check(daemon: Daemon, pub: Socket) -> None:
    """Every form in which agents publish."""
    messages = [orjson.dumps({"id": str(n), "content": "hello"}) for n in range(4)]
    pub.send(messages[0])
    pub.send_multipart([b"agents.ada", messages[1]])
    pub.send(b"agents.ada " + messages[2])
    pub.send_multipart([b"agents.ada", b"", messages[3]])
    pub.send(b"torn {")
    until(lambda: daemon.ids() == ["0", "1", "2", "3"] and len(daemon.dead_letters()) == 1)
    assert {record["Message"] for record in daemon.records()} == {"hello"}


def test_a_daemon_with_a_broker_of_its_own(tmp_path: Path, sockets: Sockets) -> None:
    with running(tmp_path, "--broker", "--front", FREE, "--back", FREE) as daemon:
        # The daemon is the only subscriber: what the publisher is told of is its subscription.
        check(daemon, publisher(sockets, daemon.endpoints["front"]))
        assert daemon.stop() == 0


def test_a_daemon_that_listens_to_a_broker(tmp_path: Path, sockets: Sockets) -> None:
    with Broker(FREE, FREE) as broker, running(tmp_path, "--subscribe", broker.back) as daemon:
        check(daemon, publisher(sockets, broker.front))


def test_sender_and_receiver_of_one_message(tmp_path: Path, sockets: Sockets) -> None:
    with running(tmp_path, "--broker", "--front", FREE, "--back", FREE) as daemon:
        message = orjson.dumps({"id": "m", "content": "hello"})
        publisher(sockets, daemon.endpoints["front"]).send(message)
        until(lambda: daemon.ids() == ["m"])
        push = sockets.connect(zmq.PUSH, daemon.pull)
        push.send(message)
        push.send(orjson.dumps({"id": "next", "content": "hello"}))
        until(lambda: daemon.ids() == ["m", "next"])


def test_a_broker_passes_on_what_is_subscribed_to(sockets: Sockets) -> None:
    with Broker(FREE, FREE) as broker:
        subscriber = sockets.connect(zmq.SUB, broker.back)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"a")
        pub = sockets.connect(zmq.XPUB, broker.front)
        assert pub.recv() == b"\x01a"
        for topic in (b"b", b"a1", b"a2"):
            pub.send_multipart([topic, b"x"])
        assert [subscriber.recv_multipart()[0] for _ in range(2)] == [b"a1", b"a2"]
        subscriber.close(0)
        pub.close(0)


def test_a_broker_can_be_stopped_at_any_time_and_its_ports_are_free_again() -> None:
    first = Broker(FREE, FREE)
    first.stop()
    first.start()
    with pytest.raises(AgentStateError, match=r"cannot listen on .*in use"):
        Broker(FREE, first.front).start()
    first.stop()
    first.stop()
    with Broker(first.front, first.back) as again:
        assert (again.front, again.back) == (first.front, first.back)
