"""Several processes on one store in Redis: what they are told, and how they wait."""

from __future__ import annotations

import asyncio

import pytest

from agent_state.errors import (
    LeaseLostError,
    LockTimeoutError,
)
from agent_state.protocols import Key, Notice
from agent_state.redis import RedisStateStore
from agent_state.redis.client import connect
from agent_state.redis.keys import StoreKeys
from agent_state.testing.contract_base import (
    content_of,
    delete,
    put,
)
from tests.redis.servers import RedisServer
from tests.redis.stores import store_on, until_told


async def test_changes_of_another_process_are_told_as_such(server: RedisServer) -> None:
    async with store_on(server.url) as mine, store_on(server.url) as theirs:
        notices = await mine.watch()
        await theirs.commit([put("a", {"n": 1}), put(("b", "c/d"), {})])
        await theirs.commit([put("a", {"n": 2}), delete(("b", "c/d"))])
        await theirs.commit([put("end", {})])
        told = {notice.key: notice for notice in await until_told(notices, ("end",))}
        assert told == {
            ("a",): Notice("notes", ("a",), 2, outside=True),
            ("b", "c/d"): Notice("notes", ("b", "c/d"), None, outside=True),
            ("end",): Notice("notes", ("end",), 1, outside=True),
        }


async def test_nothing_is_missed_while_the_server_is_away(durable: RedisServer) -> None:
    async with store_on(durable.url, timeout_seconds=2.0) as mine, store_on(durable.url) as theirs:
        await theirs.commit([put("before", {})])
        notices = await mine.watch()
        durable.restart()
        for n in range(10):
            await theirs.commit([put(str(n), {"n": n})])
        await theirs.commit([put("end", {})])
        told = {notice.key for notice in await until_told(notices, ("end",))}
        assert {(str(n),) for n in range(10)} <= told


async def test_a_watcher_is_told_that_everything_is_gone(server: RedisServer) -> None:
    async with (
        store_on(server.url, timeout_seconds=1.0) as store,
        connect(server.url, timeout_seconds=10) as client,
    ):
        await store.commit([put("a", {}), put("b", {})])
        notices = await store.watch()
        await client.flushall()
        told = [await asyncio.wait_for(anext(aiter(notices)), 60) for _ in range(2)]
        assert sorted(told, key=lambda notice: notice.key) == [
            Notice("notes", ("a",), None, outside=True),
            Notice("notes", ("b",), None, outside=True),
        ]
        assert await store.keys("notes") == []
        assert await store.commit([put("a", {}, expected=0)]) == [1]


async def test_a_server_that_comes_back_empty_and_is_filled_anew_is_looked_at_again(
    server: RedisServer,
) -> None:
    async with store_on(server.url, timeout_seconds=1.0) as mine, store_on(server.url) as theirs:
        await theirs.commit([put("a", {}), put("b", {})])
        notices = await mine.watch()
        server.restart()  # with nothing on disk
        await theirs.commit([put("b", {"n": "new"}), put("c", {})])
        told: dict[Key, Notice] = {}
        async with asyncio.timeout(60):
            while not {("a",), ("b",), ("c",)} <= told.keys():
                notice = await anext(aiter(notices))
                told[notice.key] = notice
        assert told[("a",)].revision is None
        assert told[("b",)].revision is not None
        assert all(notice.outside for notice in told.values())


async def test_a_notice_that_no_store_writes_hides_no_other(server: RedisServer) -> None:
    """Digits that are none in ASCII, and a number that Python does not read."""
    lines = ("notes \N{SUPERSCRIPT TWO} a", f"notes {'9' * 5000} b", "notes 1", "\0")
    async with (
        store_on(server.url) as mine,
        store_on(server.url) as theirs,
        connect(server.url, timeout_seconds=10) as client,
    ):
        notices = await mine.watch()
        await theirs.commit([put("first", {})])
        await client.xadd(
            StoreKeys("app:").notices, {"before": "?", "writer": "?", "changes": "\n".join(lines)}
        )
        await theirs.commit([put("end", {})])
        told = await until_told(notices, ("end",))
        assert ("first",) in {notice.key for notice in told}


async def test_notices_that_were_dropped_make_it_look_at_everything(server: RedisServer) -> None:
    async with store_on(server.url, timeout_seconds=1.0) as mine, store_on(server.url) as theirs:
        notices = await mine.watch()
        server.stop()
        await asyncio.sleep(2.1)  # the watcher's line is dropped after twice the time limit
        server.go_on()
        await theirs.commit([put("a", {}), put("b", {})])
        async with connect(server.url, timeout_seconds=10) as client:
            await client.xtrim(StoreKeys("app:").notices, maxlen=0, approximate=False)
        await theirs.commit([put("end", {})])
        told: set[Key] = set()
        async with asyncio.timeout(60):
            while not {("a",), ("b",)} <= told:
                told.add((await anext(aiter(notices))).key)


async def test_a_lock_keeps_other_processes_out_and_their_commits_wait(
    server: RedisServer,
) -> None:
    async with (
        store_on(server.url) as mine,
        store_on(server.url) as theirs,
    ):
        impatient = RedisStateStore(server.url, prefix="app:", lock_timeout_seconds=0.1)
        await impatient.open()
        async with mine.lock("notes", ("a",)):
            with pytest.raises(LockTimeoutError) as caught:
                async with impatient.lock("notes", ("a",)):
                    raise AssertionError("two processes hold one lock")
            assert (caught.value.kind, caught.value.key) == ("notes", ("a",))
            with pytest.raises(LockTimeoutError):
                await impatient.commit([put(("a", "below"), {})])
            waiting = asyncio.create_task(theirs.commit([put("a", {"n": "theirs"})]))
            assert await theirs.commit([put("b", {})]) == [1]
            assert await mine.commit([put("a", {"n": "mine"}, expected=0)]) == [1]
            assert not waiting.done()
        assert await waiting == [2]
        await impatient.close()


async def test_a_lock_is_renewed_while_it_is_held(server: RedisServer) -> None:
    async with (
        store_on(server.url, lock_lease_seconds=2.0) as mine,
        store_on(server.url, lock_timeout_seconds=2.5) as theirs,
    ):
        async with mine.lock("notes", ("a",)):
            with pytest.raises(LockTimeoutError):
                async with theirs.lock("notes", ("a",)):
                    raise AssertionError("it was held")
            await mine.commit([put("a", {"n": 1})])
        async with theirs.lock("notes", ("a",)):
            pass


async def test_who_lost_a_lock_can_not_write_under_it(server: RedisServer) -> None:
    async with store_on(server.url) as mine, store_on(server.url) as theirs:
        await mine.commit([put("a", {"n": 1})])
        async with mine.lock("notes", ("a",)):
            async with connect(server.url, timeout_seconds=10) as client:
                await client.delete(StoreKeys("app:").locks)  # as if it had expired
            async with theirs.lock("notes", ("a",)):
                with pytest.raises(LeaseLostError):
                    await mine.commit([put("b", {}), put("a", {"n": "late"})])
                with pytest.raises(LeaseLostError):
                    await mine.erase("notes", ("a",))
                await theirs.commit([put("a", {"n": "theirs"})])
            with pytest.raises(LeaseLostError):
                await mine.commit([put("a", {"n": "later still"})])
        assert await content_of(mine, "a") == {"n": "theirs"}
        assert await mine.get("notes", ("b",)) is None


async def test_the_lock_of_a_dead_process_expires(server: RedisServer) -> None:
    async with store_on(server.url, lock_lease_seconds=0.3) as dead, store_on(server.url) as alive:
        lock = dead.lock("notes", ("a",))
        await lock.__aenter__()
        for task in asyncio.all_tasks():
            if task.get_name().startswith("lock of"):
                task.cancel()  # nobody renews it any more
        async with asyncio.timeout(60), alive.lock("notes", ("a",)):
            await alive.commit([put("a", {"n": 1})])
        await lock.__aexit__(None, None, None)
