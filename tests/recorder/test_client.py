"""The client: nothing it was given is dropped, whatever becomes of the daemon and of itself."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_state.errors import AgentStateError, SerializationError, StorageFullError
from agent_state.testing.faults import Fault, FaultyDisk
from agent_state_integrations.recorder.network.client import RecorderClient
from agent_state_integrations.recorder.network.spool import Spool
from agent_state_integrations.recorder.network.wire import zmq
from tests.deadlines import until_in_thread as until
from tests.recorder.daemons import Daemon, Sockets, run_python, running


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path) as one:
        yield one


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that is not there, and can be started."""
    with running(tmp_path) as one:
        one.kill()
        yield one


def said(number: object) -> dict[str, Any]:
    return {"message_id": f"m-{number}", "sender_id": "ada", "content": f"said {number}"}


def spooled(daemon: Daemon) -> bool:
    return Spool(daemon.spool).waiting()


async def happened(what: Any) -> None:
    """Wait, while this process's client goes on."""
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.005)


async def test_with_ack_a_message_is_durable_when_the_call_returns(daemon: Daemon) -> None:
    async with daemon.client(ack=True) as client:
        receipt = await client.record(said(1))
        assert (receipt.outcome, receipt.id, receipt.seq) == ("recorded", "m-1", 1)
        daemon.kill()
        assert daemon.ids() == ["m-1"]


async def test_without_ack_it_is_sent(daemon: Daemon) -> None:
    async with daemon.client() as client:
        receipt = await client.record(said(1))
        assert (receipt.outcome, receipt.id) == ("sent", "m-1")
        receipts = await client.record_many(said(n) for n in range(2, 3000))
        assert {one.outcome for one in receipts} == {"sent"}
    until(lambda: len(daemon.ids()) == 2999)
    assert daemon.ids() == [f"m-{n}" for n in range(1, 3000)]
    assert not daemon.spool.exists()


async def test_receipts_come_in_the_order_of_the_messages(daemon: Daemon) -> None:
    async with daemon.client(ack=True) as client:
        receipts = await client.record_many(said(n) for n in range(3000))
    assert [one.id for one in receipts] == [f"m-{n}" for n in range(3000)]
    assert [one.seq for one in receipts] == list(range(1, 3001))


async def test_callers_of_one_client_share_requests(daemon: Daemon) -> None:
    async with daemon.client(ack=True) as client:
        receipts = await asyncio.gather(*(client.record(said(n)) for n in range(2500)))
        assert [one.id for one in receipts] == [f"m-{n}" for n in range(2500)]
        assert client._asking._number < 10


@pytest.mark.parametrize(
    "message",
    [
        {"content": "no id"},
        {"message_id": "", "content": "an empty id"},
        {"Id": "other", "content": "another name"},
        {"event_type": "x", "agent": "bob", "message": {"content": "wrapped"}},
        {"event_type": "x", "agent": "bob", "message": {"id": "inner", "content": "wrapped"}},
        {"event_type": "x", "agent": "bob", "message": {"id": "inner", "words": "no content"}},
    ],
)
async def test_every_message_has_an_id_by_which_it_is_recorded_once(
    daemon: Daemon, message: dict[str, Any]
) -> None:
    async with daemon.client(ack=True) as client:
        receipt = await client.record(message)
        [parcel_id, data] = client._written(message)
    [record] = daemon.records()
    assert record["Id"] == receipt.id
    assert receipt.id is not None
    if receipt.id in {"other", "inner"}:
        assert parcel_id == receipt.id
    given = set(message.get("metadata", {})) | {"type", "message_type"}
    assert not {name for name in record["Metadata"] if "id" in name.lower()} - given, data


async def test_the_daemon_away_at_the_start(away: Daemon) -> None:
    async with away.client() as client:
        receipts = await client.record_many(said(n) for n in range(1200))
        assert {one.outcome for one in receipts} == {"spooled"}
        assert [one.id for one in receipts] == [f"m-{n}" for n in range(1200)]
        assert spooled(away)
        away.start()
        await happened(lambda: not spooled(away))
    assert away.ids() == [f"m-{n}" for n in range(1200)]


@pytest.mark.parametrize("ack", [True, False])
async def test_the_daemon_goes_and_comes_again(daemon: Daemon, *, ack: bool) -> None:
    async with daemon.client(ack=ack) as client:
        assert (await client.record(said(0))).outcome in {"recorded", "sent"}
        until(lambda: daemon.ids() == ["m-0"])
        daemon.kill()
        # What is pushed before that is noticed is lost, as the class says.
        await happened(lambda: ack or not client._sending.connected.is_set())
        assert (await client.record(said(1))).outcome == "spooled"
        assert (await client.record(said(2))).outcome == "spooled"
        daemon.start()
        await happened(lambda: daemon.ids() == ["m-0", "m-1", "m-2"])
        await happened(lambda: not spooled(daemon))
        assert (await client.record(said(3))).outcome in {"recorded", "sent"}
    until(lambda: daemon.ids() == ["m-0", "m-1", "m-2", "m-3"])


async def test_a_daemon_that_answers_nothing(daemon: Daemon) -> None:
    """It is stopped, so its connections stand."""
    assert daemon.process is not None
    async with daemon.client(ack=True, timeout_seconds=0.5) as client:
        await client.record(said(0))
        daemon.process.send_signal(19)
        try:
            assert (await client.record(said(1))).outcome == "spooled"
        finally:
            daemon.process.send_signal(18)
        await happened(lambda: not spooled(daemon))
    assert daemon.ids() == ["m-0", "m-1"]


async def test_a_queue_that_is_full_is_spooled(daemon: Daemon) -> None:
    async with daemon.client(queue=10) as client:
        receipts = await client.record_many(said(n) for n in range(100))
        assert {one.outcome for one in receipts} == {"spooled"}
        await happened(lambda: not spooled(daemon))
    assert sorted(daemon.ids()) == sorted(f"m-{n}" for n in range(100))


async def test_the_spool_of_a_process_that_was_killed(away: Daemon) -> None:
    code = """
import asyncio, os, signal, sys
from agent_state_integrations.recorder.network.client import RecorderClient

async def main():
    pull, ack, spool = sys.argv[1:]
    async with RecorderClient(pull, ack, ack=True, spool_dir=spool) as client:
        for number in range(50):
            receipt = await client.record({"message_id": f"m-{number}", "content": f"{number}"})
            print(receipt.outcome, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    with run_python(code, away.pull, away.ack, str(away.spool)) as process:
        out, _ = process.communicate(timeout=60)
    assert out.split() == ["spooled"] * 50
    assert process.returncode == -9
    with (away.spool / "current.jsonl").open("ab") as file:
        file.write(b'{"_crc":"00000000","_seq":51,"mess')  # and it was writing one more
    away.start()
    async with away.client():
        await happened(lambda: not spooled(away))
    assert away.ids() == [f"m-{n}" for n in range(50)]
    assert not away.dead_letters()


async def test_several_clients_share_a_spool(away: Daemon) -> None:
    clients = [away.client(ack=n % 2 == 0) for n in range(4)]
    for client in clients:
        await client.open()
    await asyncio.gather(
        *(client.record(said(f"{n}-{k}")) for n, client in enumerate(clients) for k in range(50))
    )
    away.start()
    await happened(lambda: not spooled(away))
    for client in clients:
        await client.close()
    assert sorted(away.ids()) == sorted(f"m-{n}-{k}" for n in range(4) for k in range(50))


async def test_closing_spools_what_is_under_way(daemon: Daemon) -> None:
    assert daemon.process is not None
    client = daemon.client(ack=True, timeout_seconds=0.5)
    await client.open()
    await client.record(said(0))
    daemon.process.send_signal(19)
    try:
        calls = [asyncio.create_task(client.record(said(n))) for n in range(1, 10)]
        await asyncio.sleep(0)
        await client.close()
        assert {(await call).outcome for call in calls} == {"spooled"}
    finally:
        daemon.process.send_signal(18)
    async with daemon.client():
        await happened(lambda: not spooled(daemon))
    assert sorted(daemon.ids()) == [f"m-{n}" for n in range(10)]


async def test_a_cancelled_call_goes_on(daemon: Daemon) -> None:
    async with daemon.client(ack=True) as client:
        one = asyncio.create_task(client.record(said(1)))
        many = asyncio.create_task(client.record_many(said(n) for n in range(2, 1002)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        one.cancel()
        many.cancel()
        assert {type(e) for e in await asyncio.gather(one, many, return_exceptions=True)} == {
            asyncio.CancelledError
        }
        await client.record(said("last"))
    ids = daemon.ids()
    assert ids[0] == "m-1"
    assert ids[-1] == "m-last"
    assert len(ids) == len(set(ids))


async def test_a_cancelled_close_still_spools_the_rest(away: Daemon) -> None:
    client = away.client(ack=True)
    await client.open()
    call = asyncio.create_task(client.record(said(1)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert (await call).outcome == "spooled"
    async with client:  # it can be opened again
        away.start()
        await happened(lambda: not spooled(away))
        assert (await client.record(said(2))).outcome == "recorded"
    assert away.ids() == ["m-1", "m-2"]


async def test_a_full_disk_under_the_spool_is_the_callers_error(away: Daemon) -> None:
    async with away.client(ack=True) as client:
        await client.record(said(0))
        with FaultyDisk(Fault(1, "write", error=errno.ENOSPC, persistent=True)) as disk:
            with pytest.raises(StorageFullError, match="No space left"):
                await client.record(said(1))
            calls = [client.record(said(n)) for n in (2, 3)]
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(error) for error in errors} == {StorageFullError}
            assert errors[0] is not errors[1]
            disk.heal()
            assert (await client.record(said(4))).outcome == "spooled"
        away.start()
        await happened(lambda: not spooled(away))
    assert away.ids() == ["m-0", "m-4"]


async def test_secrets_are_not_spooled(away: Daemon) -> None:
    async with away.client() as client:
        await client.record({"id": "1", "content": "postgres://ada:hunter2secret@db/x"})
        await client.record({"id": "2", "nothing": "postgres://ada:hunter2secret@db/x"})
    for path in away.spool.iterdir():
        assert "hunter2secret" not in path.read_text()
        assert path.stat().st_mode & 0o777 == 0o600
    away.start()
    async with away.client():
        await happened(lambda: not spooled(away))
    assert away.ids() == ["1"]
    assert len(away.dead_letters()) == 1


async def test_what_was_recorded_and_is_spooled_too_is_there_once(daemon: Daemon) -> None:
    """The daemon died between writing and answering, or the answer was late."""
    forms: list[dict[str, Any]] = [
        {"id": "1", "content": "postgres://ada:hunter2secret@db/x"},
        {
            "id": "2",
            "content": {"message": "text", "password": "hunter2secret", "n": [1, {"a": 2}]},
        },
        {"event_type": "t", "agent": "bob", "message": {"id": "3", "content": {"plan": ["x"]}}},
        {"Id": "4", "Message": '{"text": "inside"}', "SpeakerName": "ada", "Metadata": {"k": "v"}},
    ]
    async with daemon.client(ack=True) as client:
        first = await client.record_many(forms)
        written = [client._written(form)[1] for form in forms]
        Spool(daemon.spool).append(written)
        client._spooled.set()
        await happened(lambda: not spooled(daemon))
    assert [one.outcome for one in first] == ["recorded"] * 4
    assert daemon.ids() == ["1", "2", "3", "4"]


@pytest.mark.parametrize("value", [{1, 2}, object(), 2**70, "\ud800"])
async def test_what_cannot_be_json_is_refused(daemon: Daemon, value: object) -> None:
    async with daemon.client(ack=True) as client:
        with pytest.raises(SerializationError):
            await client.record({"content": value})
        with pytest.raises(SerializationError, match="over the limit"):
            await client.record({"content": "x" * (33 * 1024 * 1024)})
        assert (await client.record(said(1))).outcome == "recorded"


async def test_a_closed_client_takes_nothing(daemon: Daemon) -> None:
    client = daemon.client(ack=True)
    with pytest.raises(AgentStateError, match="not open"):
        await client.record(said(1))
    async with client:
        pass
    await client.close()
    with pytest.raises(AgentStateError, match="not open"):
        await client.record(said(1))


async def test_an_endpoint_that_is_none(tmp_path: Path) -> None:
    for endpoints in (("5557", "tcp://127.0.0.1:5558"), ("tcp://127.0.0.1:5557", "nowhere")):
        with pytest.raises(AgentStateError, match="cannot connect"):
            await RecorderClient(*endpoints, spool_dir=tmp_path / "spool").open()


async def test_answers_of_somebody_else_harm_nobody(tmp_path: Path) -> None:
    sockets = Sockets()
    router = sockets.connect(zmq.ROUTER, "tcp://127.0.0.1:1")
    port = router.bind_to_random_port("tcp://127.0.0.1")
    place = f"tcp://127.0.0.1:{port}"
    try:
        async with RecorderClient(
            place, place, ack=True, spool_dir=tmp_path / "spool", timeout_seconds=0.5
        ) as client:
            call = asyncio.create_task(client.record(said(1)))
            await happened(lambda: router.poll(0))
            frames = router.recv_multipart()
            for answer in (
                [b""],
                [b"x", b"y"],
                [frames[1], b"{"],
                [frames[1], b'{"messages":[3]}'],
            ):
                router.send_multipart([frames[0], *answer])
            router.send_multipart([frames[0], frames[1], b'{"messages":[]}'])
            assert (await call).outcome == "spooled"
    finally:
        sockets.close()
