"""Recording through the daemon, and a loop of the same sockets that only writes and syncs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from agent_state.storage import logs
from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.client import RecorderClient
from agent_state_integrations.recorder.network.wire import Context, Socket, zmq
from benchmarks.report import Row, at_least
from benchmarks.workload import Setting, agent_state

CLIENTS, EACH = 8, 1000
BATCHES, BATCH, OUTSTANDING = 200, 500, 4
_PER_SECOND = 5000
_SAID = [agent_state(n)["context"]["conversation_history"][0]["content"] for n in range(50)]


@dataclass(slots=True)
class _ArchiveRun:
    """Messages a second."""

    batched: float = 0.0
    bare_batched: float = 0.0
    pushed: float = 0.0
    one_by_one: float = 0.0
    bare: float = 0.0


@dataclass(slots=True)
class _Runs:
    runs: list[_ArchiveRun] = field(default_factory=list)

    def each(self, figure: Callable[[_ArchiveRun], float]) -> list[float]:
        return [figure(run) for run in self.runs]


def recording(setting: Setting) -> list[Row]:
    """A daemon in a process of its own, all clients in this one.

    The bare loop is pyzmq alone: a ROUTER that takes what is there, one write, one fdatasync, and
    an answer to each, and as many DEALER sockets in one poller. Neither parses anything.
    """
    found = _Runs()
    for _ in range(setting.runs):
        with setting.folder() as folder:
            found.runs.append(asyncio.run(_run(folder, setting)))
    ratio = found.each(lambda run: run.one_by_one / run.bare)
    single = found.each(lambda run: run.one_by_one)
    return [
        Row(
            f"messages with receipts, {OUTSTANDING} batches of {BATCH} under way",
            found.each(lambda run: run.batched),
            "messages/s",
            at_least(20_000),
        ),
        Row(
            "  bare pyzmq + write + fdatasync, the same batches",
            found.each(lambda run: run.bare_batched),
            "/s",
        ),
        Row("  without receipts, until all is recorded", found.each(lambda run: run.pushed), "/s"),
        Row(
            f"{CLIENTS} clients with receipts, one message at a time",
            single,
            "messages/s",
            # Either figure will do: where the disk is slow, the ratio is what can be asked for.
            None if median(ratio) >= 0.5 else at_least(_PER_SECOND),
        ),
        Row("  bare pyzmq + write + fdatasync", found.each(lambda run: run.bare), "/s"),
        Row(
            "  ours / bare",
            ratio,
            "times",
            None if median(single) >= _PER_SECOND else at_least(0.5),
        ),
    ]


def _message(client: int, number: int) -> dict[str, Any]:
    said = _SAID[number % len(_SAID)]
    return {
        "message_id": f"{client}-{number}",
        "timestamp": "2026-01-01T00:00:00.000000Z",
        "sender_id": f"agent-{client}",
        "context_id": f"thread-{number % 20}",
        "content": {"message": f"{number}: {said}"},
        "metadata": {"sender_role": "Developer"},
    }


async def _run(folder: Path, setting: Setting) -> _ArchiveRun:
    run = _ArchiveRun()
    batches, each = setting.scaled(BATCHES), setting.scaled(EACH)
    with _daemon(folder / "state") as (pull, ack):
        spool = folder / "spool"
        async with RecorderClient(pull, ack, ack=True, spool_dir=spool) as client:
            run.batched = await _batched(client, batches)
        async with RecorderClient(pull, ack, spool_dir=spool) as client:
            run.pushed = await _pushed(client, batches, folder / "state")
        clients = [RecorderClient(pull, ack, ack=True, spool_dir=spool) for _ in range(CLIENTS)]
        for one in clients:
            await one.open()
        run.one_by_one = await _one_by_one(clients, each)
        for one in clients:
            await one.close()
        assert not spool.exists(), "the daemon was slower than the clients' patience"
    with _bare_server(folder / "bare.log") as endpoint:
        run.bare = _bare(endpoint, CLIENTS, each, 1)
        run.bare_batched = _bare(endpoint, OUTSTANDING, batches // OUTSTANDING, BATCH)
    return run


@contextmanager
def _process(code: str, *arguments: str) -> Iterator[str]:
    """A program; the line that it prints when it is ready."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  # us
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.terminate()


@contextmanager
def _daemon(state: Path) -> Iterator[tuple[str, str]]:
    package = "agent_state_integrations.recorder.commands.daemon"
    code = f"import typer; from {package} import daemon; typer.run(daemon)"
    free = "tcp://127.0.0.1:*"
    options = ("--state", str(state), "--pull", free, "--ack", free)
    with _process(code, *options) as line:
        words = line.replace(",", " ").split()
        yield words[words.index("pull") + 1], words[words.index("ack") + 1]


async def _batched(client: RecorderClient, batches: int) -> float:
    numbers = iter(range(batches))

    async def send() -> None:
        for batch in numbers:
            some = [_message(0, batch * BATCH + number) for number in range(BATCH)]
            receipts = await client.record_many(some)
            assert all(receipt.outcome == "recorded" for receipt in receipts)

    began = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(OUTSTANDING)))
    return batches * BATCH / (time.perf_counter() - began)


async def _pushed(client: RecorderClient, batches: int, state: Path) -> float:
    """Until the daemon has written the last one, which it answers for."""
    messages = batches * BATCH
    log = str(state / "record" / "current.jsonl")
    upto = logs.last_seq(log) + messages
    began = time.perf_counter()
    await client.record_many(_message(99, number) for number in range(messages))
    while logs.last_seq(log) < upto:  # noqa: ASYNC110  # another process writes it
        await asyncio.sleep(0.005)
    return messages / (time.perf_counter() - began)


async def _one_by_one(clients: list[RecorderClient], each: int) -> float:
    async def send(place: int, client: RecorderClient) -> None:
        for number in range(each):
            receipt = await client.record(_message(place + 1, number))
            assert receipt.outcome == "recorded"

    began = time.perf_counter()
    await asyncio.gather(*(send(place, client) for place, client in enumerate(clients)))
    return len(clients) * each / (time.perf_counter() - began)


@contextmanager
def _bare_server(log: Path) -> Iterator[str]:
    code = "import sys; from benchmarks.recording import bare_server; bare_server(sys.argv[1])"
    with _process(code, str(log)) as line:
        yield line.strip()


def bare_server(log: str) -> None:
    """Take what is there, write it, sync it once, answer each; until the process is ended."""
    context: Context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    print(router.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        router.poll()
        requests = []
        while router.poll(0):
            requests.append(router.recv_multipart())
        os.write(file, b"".join(b"\n".join(request[2:]) for request in requests))
        os.fdatasync(file)
        for request in requests:
            router.send_multipart(request[:2])


def _bare(endpoint: str, clients: int, each: int, batch: int) -> float:
    message = b"x" * 300
    context: Context = zmq.Context()
    poller = zmq.Poller()
    left: dict[Socket, int] = {}
    for _ in range(clients):
        socket = context.socket(zmq.DEALER)
        socket.connect(endpoint)
        poller.register(socket, zmq.POLLIN)
        left[socket] = each
    began = time.perf_counter()
    for socket in left:
        socket.send_multipart(wire.request(1, [message] * batch))
    while any(left.values()):
        for socket, _ in poller.poll():
            socket.recv_multipart()
            left[socket] -= 1
            if left[socket]:
                socket.send_multipart(wire.request(1, [message] * batch))
    seconds = time.perf_counter() - began
    context.destroy(0)
    return clients * each * batch / seconds
