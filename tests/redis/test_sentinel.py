"""The store behind sentinels: its master is killed, and it goes on with the replica."""

from __future__ import annotations

import asyncio
import logging

import orjson
import pytest

from agent_state.errors import DurabilityUnknownError, StorageError
from agent_state.protocols import Put
from agent_state.redis import RedisStateStore
from agent_state.testing.contract_base import append, content_of, put, records_of, scanned
from tests.redis.servers import Guarded
from tests.redis.stores import store_on

pytestmark = pytest.mark.long("starts two servers and three sentinels")


async def test_what_a_replica_confirmed_survives_its_master(guarded: Guarded) -> None:
    store = RedisStateStore(guarded.url, prefix="app:", wait_replicas=1, timeout_seconds=2.0)
    await store.open()
    notices = await store.watch()
    acknowledged: dict[int, int] = {}
    over = asyncio.Event()

    async def agent(number: int) -> None:
        n = 0
        while not over.is_set():
            n += 1
            try:
                await store.commit([put(f"a{number}", {"n": n}), append(f"a{number}", {"n": n})])
                acknowledged[number] = n
            except StorageError:
                await asyncio.sleep(0.02)

    agents = [asyncio.create_task(agent(number)) for number in range(10)]
    while len(acknowledged) < 10:
        await asyncio.sleep(0.01)
    guarded.master.kill()
    at_the_kill = dict(acknowledged)
    await asyncio.to_thread(guarded.until_promoted)
    # The one that is left has no replica: what it keeps is made, and said to be doubtful.
    with pytest.raises(DurabilityUnknownError, match="0 of 1 replicas"):
        await store.commit([put("after", {"n": 1})])
    over.set()
    await asyncio.gather(*agents)

    for number, n in at_the_kill.items():
        stored = await content_of(store, f"a{number}")
        assert stored["n"] >= n
        records = await records_of(store, f"a{number}")
        numbers = [orjson.loads(record.body)["n"] for record in records]
        assert set(range(1, n + 1)) <= set(numbers)
        assert len(numbers) == len(set(numbers)), "a retry was applied twice"
    other = RedisStateStore(guarded.url, prefix="app:")
    await other.open()
    assert await content_of(other, "after") == {"n": 1}
    await other.commit([put("theirs", {})])
    async with asyncio.timeout(60):
        async for notice in notices:
            if notice.key == ("theirs",):
                break
    await other.close()
    await store.close()


async def test_a_store_without_replicas_to_ask_goes_on_after_a_fail_over(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = RedisStateStore(guarded.url, prefix="app:", timeout_seconds=5.0)
    await store.open()
    for n in range(50):
        await store.commit([put(str(n), {"n": n})])
    assert guarded.master.ask("wait", "1", "5000") == "1"

    guarded.master.kill()
    with pytest.raises(StorageError):
        await store.commit([Put("notes", ("x",), b'{"n":1}', "notes/1", expected=0)])
    await asyncio.to_thread(guarded.until_promoted)

    assert await store.commit([Put("notes", ("x",), b'{"n":1}', "notes/1", expected=0)]) == [1]
    assert len(await scanned(store)) == 51
    await store.close()


async def test_what_is_found_saved_already_is_confirmed_too(guarded: Guarded) -> None:
    """A second try of a save that no replica confirmed changes nothing, and still says so."""
    url = guarded.master.url
    settings = {"wait_replicas": 1, "timeout_seconds": 2.0}
    async with store_on(url, **settings) as store, store_on(url, **settings) as again:
        assert await store.commit([put("a", {"n": 1})]) == [1]
        guarded.replica.stop()
        for each in (store, again):
            with pytest.raises(DurabilityUnknownError, match="0 of 1"):
                await each.commit([put("a", {"n": 2})])
        guarded.replica.go_on()
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await again.commit([put("a", {"n": 2})]) == [2]
                    break
                except DurabilityUnknownError:
                    continue
