"""The daemon killed with SIGKILL under load: what was acknowledged, or spooled, is there once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from agent_state_integrations.recorder.network.client import RecorderClient
from agent_state_integrations.recorder.network.spool import Spool
from tests.recorder.daemons import Daemon, running

pytestmark = pytest.mark.long("kills daemons for many seconds")

CLIENTS, KILLS = 4, 3


@pytest.mark.parametrize("batch", [1, 40])
async def test_every_message_with_a_receipt_is_there_once(tmp_path: Path, batch: int) -> None:
    chosen = random.Random(batch)
    with running(tmp_path) as daemon:
        receipts: dict[str, str] = {}
        over = asyncio.Event()
        clients = [daemon.client(ack=True, timeout_seconds=3.0) for _ in range(CLIENTS)]
        for client in clients:
            await client.open()
        load = [
            asyncio.create_task(_send(client, name, batch, receipts, over))
            for name, client in enumerate(clients)
        ]
        for _ in range(KILLS):
            await _more(receipts, chosen.randrange(200, 600))
            await asyncio.to_thread(daemon.kill)
            if chosen.random() < 0.5:  # long enough to be away
                await _more(receipts, 50)
            await asyncio.to_thread(daemon.start)
        await _more(receipts, 300)
        over.set()
        await asyncio.gather(*load)
        async with asyncio.timeout(60):
            while Spool(daemon.spool).waiting():
                await asyncio.sleep(0.01)
        for client in clients:
            await client.close()
        _check(daemon, receipts)


async def _send(
    client: RecorderClient, name: int, batch: int, receipts: dict[str, str], over: asyncio.Event
) -> None:
    number = 0
    while not over.is_set():
        messages = [
            {"message_id": f"{name}-{number + n}", "content": f"{name} says {number + n}"}
            for n in range(batch)
        ]
        number += batch
        if batch == 1:
            receipt = await client.record(messages[0])
            receipts[messages[0]["message_id"]] = receipt.outcome
        else:
            got = await client.record_many(messages)
            receipts |= {
                one["message_id"]: it.outcome for one, it in zip(messages, got, strict=True)
            }


async def _more(receipts: dict[str, str], messages: int) -> None:
    before = len(receipts)
    async with asyncio.timeout(60):
        while len(receipts) < before + messages:
            await asyncio.sleep(0.001)


def _check(daemon: Daemon, receipts: dict[str, str]) -> None:
    found = Counter(daemon.ids())
    assert set(found.values()) == {1}
    assert set(found) == set(receipts)
    assert set(receipts.values()) <= {"recorded", "duplicate", "spooled"}
    assert receipts
    assert not daemon.dead_letters()
    seqs = [record["_seq"] for record in daemon.records()]
    assert seqs == sorted(set(seqs))
