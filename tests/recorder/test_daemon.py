"""The daemon as agents meet it: a process, sockets, and what is in the log afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import orjson
import pytest

from agent_state.cli.app import run
from agent_state.errors import UnreadableMessageError
from agent_state_integrations.recorder.network import daemon as network_daemon
from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.daemon import RecorderDaemon
from agent_state_integrations.recorder.network.wire import Socket, zmq
from agent_state_integrations.recorder.writer import RecordWriter
from tests.deadlines import until_in_thread as until
from tests.recorder.daemons import FREE, Daemon, Sockets, lines_of, running

FLAT = {
    "message_id": "m-1",
    "timestamp": "2026-11-21T10:00:00Z",
    "sender_id": "ada",
    "context_id": "thread-1",
    "content": {"message": "we decided to use a log"},
    "metadata": {"sender_role": "Architect"},
}
WRAPPED = {
    "event_type": "message_sent",
    "agent": "bob",
    "timestamp": "2026-11-21T10:00:01Z",
    "message": {"message_id": "m-2", "sender_id": "bob", "content": "should we?"},
}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path) as one:
        yield one


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


def asked(socket: Socket, number: int, *messages: bytes) -> tuple[int, Any]:
    socket.send_multipart(wire.request(number, messages))
    return wire.parse_answer(socket.recv_multipart())


def test_what_is_pushed_is_recorded_flat_or_wrapped(daemon: Daemon, sockets: Sockets) -> None:
    push = sockets.connect(zmq.PUSH, daemon.pull)
    push.send_json(FLAT)
    push.send_json(WRAPPED)
    until(lambda: len(daemon.records()) == 2)
    first, second = daemon.records()
    assert (first["Id"], first["SpeakerName"], first["Message"]) == (
        "m-1",
        "ada",
        "we decided to use a log",
    )
    assert (second["Id"], second["SpeakerName"], second["Message"]) == ("m-2", "bob", "should we?")


def test_each_frame_that_is_pushed_is_a_message(daemon: Daemon, sockets: Sockets) -> None:
    push = sockets.connect(zmq.PUSH, daemon.pull)
    push.send_multipart([orjson.dumps({"id": str(n), "content": "hello"}) for n in range(5)])
    until(lambda: len(daemon.records()) == 5)
    assert daemon.ids() == ["0", "1", "2", "3", "4"]


def test_a_receipt_says_what_became_of_each_message(daemon: Daemon, sockets: Sockets) -> None:
    dealer = sockets.connect(zmq.DEALER, daemon.ack)
    flat, wrapped = orjson.dumps(FLAT), orjson.dumps(WRAPPED)
    number, receipts = asked(dealer, 2**64 - 1, flat, wrapped, flat, b"{torn")
    assert number == 2**64 - 1
    assert [(one.outcome, one.id, one.seq) for one in receipts] == [
        ("recorded", "m-1", 1),
        ("recorded", "m-2", 2),
        ("duplicate", "m-1", 1),
        ("dead-letter", None, 0),
    ]
    assert "JSON" in receipts[3].reason
    assert daemon.ids() == ["m-1", "m-2"]
    [letter] = daemon.dead_letters()
    assert letter["raw"] == "{torn"


def test_a_request_of_nothing_is_answered(daemon: Daemon, sockets: Sockets) -> None:
    assert asked(sockets.connect(zmq.DEALER, daemon.ack), 7) == (7, [])


def test_a_req_socket_is_answered_too(daemon: Daemon, sockets: Sockets) -> None:
    [receipt] = asked(sockets.connect(zmq.REQ, daemon.ack), 1, orjson.dumps(FLAT))[1]
    assert receipt.outcome == "recorded"


@pytest.mark.parametrize(
    "frames",
    [
        [b"{}"],
        [b""],
        [b"", b""],
        [b"ARW1"],
        [b"ARW1" + b"\0" * 9, b"{}"],
        [b"ARW2" + b"\0" * 8, b"{}"],
        [b"\xff" * 12, b"\0", b"", b"x" * 100_000],
    ],
    ids=repr,
)
def test_a_request_that_is_none_is_kept_refused_and_harms_nobody(
    daemon: Daemon, sockets: Sockets, frames: list[bytes]
) -> None:
    dealer = sockets.connect(zmq.DEALER, daemon.ack)
    dealer.send_multipart(frames)
    answer = dealer.recv_multipart()
    number, reason = wire.parse_answer(answer[-2:])
    assert number == 0
    assert isinstance(reason, str)
    [letter] = daemon.dead_letters()
    assert letter["reason"] == reason
    assert asked(dealer, 1, orjson.dumps(FLAT))[1][0].outcome == "recorded"


def test_what_nobody_understands_is_a_dead_letter(daemon: Daemon, sockets: Sockets) -> None:
    push = sockets.connect(zmq.PUSH, daemon.pull)
    garbage = [b"", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"a":' * 5000, b"{}"]
    for one in garbage:
        push.send(one)
    push.send_json(FLAT)
    until(lambda: daemon.ids() == ["m-1"] and len(daemon.dead_letters()) == len(garbage))


def test_a_message_of_10_mb(daemon: Daemon, sockets: Sockets) -> None:
    dealer = sockets.connect(zmq.DEALER, daemon.ack)
    text = "word " * 2_000_000
    [receipt] = asked(dealer, 1, orjson.dumps({"id": "large", "content": text}))[1]
    assert (receipt.outcome, receipt.seq) == ("recorded", 1)
    assert daemon.records()[0]["Message"] == text


def test_a_frame_over_the_limit_ends_its_connection_alone(daemon: Daemon, sockets: Sockets) -> None:
    push = sockets.connect(zmq.PUSH, daemon.pull)
    push.send(b"x" * (wire.MAX_FRAME + 1))
    dealer = sockets.connect(zmq.DEALER, daemon.ack)
    assert asked(dealer, 1, orjson.dumps(FLAT))[1][0].outcome == "recorded"


def test_sender_and_receiver_publish_the_same_message(daemon: Daemon, sockets: Sockets) -> None:
    one = sockets.connect(zmq.PUSH, daemon.pull)
    other = sockets.connect(zmq.DEALER, daemon.ack)
    one.send_json(FLAT)
    until(lambda: daemon.ids() == ["m-1"])
    [receipt] = asked(other, 1, orjson.dumps(FLAT))[1]
    assert (receipt.outcome, receipt.seq) == ("duplicate", 1)
    assert daemon.ids() == ["m-1"]


@pytest.mark.parametrize("repeat", [False, True])
def test_the_same_words_again(tmp_path: Path, sockets: Sockets, *, repeat: bool) -> None:
    options = () if repeat else ("--dedupe-content",)
    with running(tmp_path, *options) as daemon:
        dealer = sockets.connect(zmq.DEALER, daemon.ack)
        receipts = [
            asked(dealer, n, orjson.dumps(FLAT | {"message_id": f"m-{n}"}))[1][0] for n in (1, 2)
        ]
        last = "recorded" if repeat else "duplicate"
        assert [one.outcome for one in receipts] == ["recorded", last]


def test_secrets_are_not_written(daemon: Daemon, sockets: Sockets) -> None:
    dealer = sockets.connect(zmq.DEALER, daemon.ack)
    said = {"content": "postgres://ada:hunter2secret@db/x"}
    asked(dealer, 1, orjson.dumps(said), b"torn " + orjson.dumps(said))
    for path in (daemon.state / "record").glob("*.jsonl"):
        assert "hunter2secret" not in path.read_text()
    assert len(daemon.dead_letters()) == 1


def test_sigterm_records_what_has_arrived_and_makes_the_last_checkpoint(
    daemon: Daemon, sockets: Sockets
) -> None:
    push = sockets.connect(zmq.PUSH, daemon.pull)
    push.send_json({"id": "first", "content": "hello"})
    until(lambda: daemon.ids() == ["first"])
    for number in range(20_000):
        push.send_json({"id": str(number), "content": "hello"})
    sockets.close()  # all of it is with the daemon's machine
    assert daemon.stop() == 0
    assert sorted(daemon.ids()) == sorted(["first", *map(str, range(20_000))])
    [checkpoint] = (daemon.state / "record" / "checkpoints").glob("*final*")
    assert "20001" in checkpoint.read_text()


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[RecorderDaemon]:
    """A daemon that is told to stop before it has read anything; its clock runs very fast."""
    with (
        RecordWriter(tmp_path) as writer,
        RecorderDaemon(
            writer, pull=FREE, ack=FREE, monotonic=(10.0 * n for n in count()).__next__
        ) as daemon,
    ):
        daemon.stop()
        yield daemon


def test_how_long_it_takes_to_read_what_has_arrived_does_not_matter(
    stopped: RecorderDaemon, sockets: Sockets
) -> None:
    push = sockets.connect(zmq.PUSH, stopped.pull)
    for number in range(900):  # the receiver's queue takes 1,000
        push.send_json({"id": str(number), "content": "hello"})
    stopped.run()
    assert stopped.counts.recorded == 900


def test_who_goes_on_sending_is_not_waited_for_for_ever(
    stopped: RecorderDaemon, sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_daemon, "_DRAIN_ROUNDS", 3)
    push = sockets.connect(zmq.PUSH, stopped.pull)
    over = Event()

    def send() -> None:
        while not over.is_set():
            with suppress(zmq.Again):
                push.send(b'{"content": "again"}', zmq.NOBLOCK)

    sender = Thread(target=send)
    sender.start()
    try:
        stopped.run()
    finally:
        over.set()
        sender.join()
    assert 1 <= stopped.counts.rounds <= 4


def test_without_messages_there_is_no_checkpoint(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    assert not list((daemon.state / "record").glob("checkpoints/*"))


@pytest.mark.parametrize("seconds", ["2592000", "inf"])
def test_checkpoints_may_be_as_seldom_as_one_likes(
    tmp_path: Path, sockets: Sockets, seconds: str
) -> None:
    with running(tmp_path, "--checkpoint-every", seconds) as daemon:
        asked(sockets.connect(zmq.DEALER, daemon.ack), 1, orjson.dumps(FLAT))
        assert daemon.stop() == 0
    assert list((daemon.state / "record").glob("checkpoints/*final*"))


def test_a_checkpoint_is_made_now_and_then_if_anything_came(
    tmp_path: Path, sockets: Sockets
) -> None:
    with running(tmp_path, "--checkpoint-every", "1") as daemon:
        asked(sockets.connect(zmq.DEALER, daemon.ack), 1, orjson.dumps(FLAT))
        until(lambda: list((daemon.state / "record").glob("checkpoints/*auto*")))


def test_a_second_daemon_on_the_same_ports_says_why_it_cannot(
    daemon: Daemon, tmp_path: Path
) -> None:
    second = Daemon(tmp_path)
    second.endpoints = dict(daemon.endpoints)
    with pytest.raises(AssertionError, match=r"cannot listen on tcp://127.*in use"):
        second.start()
    assert second.process is not None
    assert second.process.wait(20) == 2
    assert second.process.stdout is not None
    second.process.stdout.close()


def test_two_daemons_may_share_a_directory(
    daemon: Daemon, tmp_path: Path, sockets: Sockets
) -> None:
    second = Daemon(tmp_path)
    second.start()
    try:
        for number, one in enumerate((daemon, second, daemon, second)):
            dealer = sockets.connect(zmq.DEALER, one.ack)
            message = orjson.dumps({"id": str(number // 2), "content": "hello"})
            [receipt] = asked(dealer, 1, message)[1]
            assert receipt.outcome == ("recorded", "duplicate")[number % 2]
    finally:
        second.kill()
    assert daemon.ids() == ["0", "1"]


@pytest.mark.parametrize("endpoint", ["5557", "tcp://nowhere", "http://127.0.0.1:1", ""])
def test_what_is_no_endpoint_is_one_line_and_exit_2(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from agent_state.cli.app import app
    from agent_state_integrations.recorder.commands.daemon import daemon

    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    app.command("a-daemon")(daemon)
    state = tmp_path / "state"
    assert run(["a-daemon", "--state", str(state), "--pull", endpoint, "--ack", FREE]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert f"cannot listen on {endpoint}" in said.err
    assert not said.out
    assert not state.exists()


def test_listening_to_other_machines_is_warned_of(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.endpoints["pull"] = "tcp://0.0.0.0:*"
    daemon.start()
    try:
        assert "open to other machines" in daemon.errors()
        assert "tcp://0.0.0.0" in daemon.errors()
        assert daemon.errors().count("\n") == 1
    finally:
        daemon.kill()


def test_a_daemon_in_a_thread(tmp_path: Path, sockets: Sockets) -> None:
    writer = RecordWriter(tmp_path / "state")
    with writer, RecorderDaemon(writer, pull=FREE, ack=FREE) as daemon:
        thread = Thread(target=daemon.run)
        thread.start()
        dealer = sockets.connect(zmq.DEALER, daemon.ack)
        assert asked(dealer, 1, orjson.dumps(FLAT))[1][0].outcome == "recorded"
        daemon.stop()
        thread.join(20)
        assert not thread.is_alive()
        assert (daemon.counts.recorded, daemon.counts.rounds) == (1, 1)
    daemon.stop()  # it is over already


def test_segments_are_rotated_under_way(tmp_path: Path, sockets: Sockets) -> None:
    with running(tmp_path, "--rotate-size", "1") as daemon:
        dealer = sockets.connect(zmq.DEALER, daemon.ack)
        for number in range(30):
            message = {"id": str(number), "content": f"{number} " + "x" * 100_000}
            asked(dealer, number, orjson.dumps(message))
        segments = sorted((daemon.state / "record").glob("20*.jsonl"))
        assert len(segments) >= 2
        ids = [record["Id"] for path in segments for record in lines_of(path)] + daemon.ids()
        assert ids == [str(number) for number in range(30)]


async def test_the_client_raises_for_a_dead_letter(daemon: Daemon) -> None:
    async with daemon.client(ack=True) as client:
        with pytest.raises(UnreadableMessageError, match="no content"):
            await client.record({"sender_id": "ada"})
        receipts = await client.record_many([{"sender_id": "ada"}, {"content": "hello"}])
        assert [one.outcome for one in receipts] == ["dead-letter", "recorded"]


def test_a_stop_just_before_a_wait_ends_it(tmp_path: Path) -> None:
    """Between the last look at whether to stop and the wait, the time is asked for."""
    looks = count()

    def monotonic() -> float:
        if next(looks) == 1:
            waiting.stop()
        return 0.0

    with (
        RecordWriter(tmp_path) as writer,
        RecorderDaemon(
            writer, pull=FREE, ack=FREE, checkpoint_seconds=float("inf"), monotonic=monotonic
        ) as waiting,
    ):
        thread = Thread(target=waiting.run, daemon=True)
        thread.start()
        until(lambda: not thread.is_alive())
