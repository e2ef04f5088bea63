"""The disk under the daemon is full: nothing is acknowledged, nothing is dropped, all is told."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.spool import Spool
from agent_state_integrations.recorder.network.wire import zmq
from tests.deadlines import until_in_thread as until
from tests.recorder.daemons import Daemon, Sockets, running

LIMIT = 20_000
"""Bytes that any file of the daemon may have."""


def limit(daemon: Daemon, size: int) -> None:
    assert daemon.process is not None
    _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    soft = hard if size < 0 else size
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


def test_a_request_that_cannot_be_stored_is_refused_with_the_reason(
    tmp_path: Path, sockets: Sockets
) -> None:
    with running(tmp_path) as daemon:
        dealer = sockets.connect(zmq.DEALER, daemon.ack)
        limit(daemon, LIMIT)
        large = b'{"id": "large", "content": "%b"}' % (b"x" * LIMIT)
        for number in range(3):
            dealer.send_multipart(wire.request(number, [b'{"id": "a", "content": "b"}', large]))
            answered, reason = wire.parse_answer(dealer.recv_multipart())
            assert answered == number
            assert isinstance(reason, str)
            assert "File too large" in reason
        assert not daemon.records()
        assert daemon.errors().count("\n") == 1
        assert "cannot be stored" in daemon.errors()
        limit(daemon, -1)
        dealer.send_multipart(wire.request(9, [large]))
        _, receipts = wire.parse_answer(dealer.recv_multipart())
        assert [one.outcome for one in receipts if not isinstance(one, str)] == ["recorded"]
        assert "stored again" in daemon.errors()
        assert daemon.ids() == ["large"]


def test_what_is_no_request_is_not_tried_again(tmp_path: Path, sockets: Sockets) -> None:
    with running(tmp_path) as daemon:
        dealer = sockets.connect(zmq.DEALER, daemon.ack)
        push = sockets.connect(zmq.PUSH, daemon.pull)
        limit(daemon, LIMIT)
        push.send(b'{"id": "pushed", "content": "%b"}' % (b"x" * LIMIT))
        until(lambda: "cannot be stored" in daemon.errors())
        for number in range(3):
            dealer.send_multipart([b"GET / HTTP/1.1", b"%d" % number])
            assert wire.parse_answer(dealer.recv_multipart())[0] == 0
        limit(daemon, -1)
        until(lambda: daemon.ids() == ["pushed"])
        letters = (daemon.state / "record/dead-letter.jsonl").read_bytes().splitlines()
        assert len(letters) == 3


async def test_what_was_pushed_is_kept_and_what_was_asked_is_spooled(
    tmp_path: Path, sockets: Sockets
) -> None:
    with running(tmp_path) as daemon:
        push = sockets.connect(zmq.PUSH, daemon.pull)
        async with daemon.client(ack=True) as client:
            await client.record({"id": "before", "content": "x"})
            limit(daemon, LIMIT)
            for number in range(500):
                push.send_json({"id": f"pushed-{number}", "content": f"{number} " + "x" * 100})
            until(lambda: "cannot be stored" in daemon.errors())
            receipts = await client.record_many(
                {"id": f"asked-{number}", "content": f"{number}"} for number in range(100)
            )
            assert {one.outcome for one in receipts} == {"spooled"}
            limit(daemon, -1)
            until(lambda: "stored again" in daemon.errors())
            async with asyncio.timeout(60):
                while Spool(daemon.spool).waiting():
                    await asyncio.sleep(0.01)
        until(lambda: len(daemon.ids()) == 601)
        names = {
            f"{name}-{n}" for name, count in (("pushed", 500), ("asked", 100)) for n in range(count)
        }
        assert set(daemon.ids()) == names | {"before"}
        assert daemon.stop() == 0


def test_what_is_lost_at_the_end_is_told(tmp_path: Path, sockets: Sockets) -> None:
    with running(tmp_path) as daemon:
        push = sockets.connect(zmq.PUSH, daemon.pull)
        limit(daemon, LIMIT)
        push.send_json({"id": "pushed", "content": "x" * LIMIT})
        until(lambda: "cannot be stored" in daemon.errors())
        assert daemon.stop() == 1
        assert "1 messages are lost" in daemon.errors()
