"""The store in Redis when its server goes, or refuses: typed errors, nothing half done."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent_state.errors import (
    DurabilityUnknownError,
    RevisionConflictError,
    StorageError,
    StorageFullError,
)
from agent_state.protocols import Change
from agent_state.redis import RedisStateStore
from agent_state.redis.client import connect
from agent_state.redis.keys import StoreKeys
from agent_state.testing.contract_base import (
    append,
    content_of,
    delete,
    put,
    records_of,
)
from tests.redis.servers import RedisServer
from tests.redis.stores import store_on


async def test_what_was_acknowledged_survives_kill_9(durable: RedisServer) -> None:
    async with store_on(durable.url) as store:
        acknowledged: dict[int, int] = {}

        async def save(number: int) -> None:
            for n in range(1, 10_000):
                try:
                    await store.commit([put(f"a{number}", {"n": n}), append(f"a{number}", {})])
                except StorageError:
                    return
                acknowledged[number] = n

        saving = [asyncio.create_task(save(number)) for number in range(20)]
        while len(acknowledged) < 20 or min(acknowledged.values()) < 3:
            await asyncio.sleep(0.001)
        durable.kill()
        await asyncio.gather(*saving)
        durable.start()

        for number, n in acknowledged.items():
            document = await store.get("notes", (f"a{number}",))
            assert document is not None
            records = await records_of(store, f"a{number}")
            # One more may have been made, of which the reply was lost; whole, if so.
            assert document.revision == len(records)
            assert document.revision in {n, n + 1}


async def test_a_server_that_is_away_refuses_with_its_name_and_no_password(
    tmp_path: Path,
) -> None:
    server = RedisServer(tmp_path, "--requirepass", "s3cret")
    server.start()
    url = f"redis://:s3cret@127.0.0.1:{server.port}/0"
    async with store_on(url) as store:
        await store.commit([put("a", {"n": 1})])
        server.kill()
        for attempt in range(2):
            with pytest.raises(StorageError) as caught:
                await store.commit([put("a", {"n": 2})])
            assert "s3cret" not in str(caught.value)
            assert f"127.0.0.1:{server.port}" in str(caught.value)
            assert caught.value.kind == "notes"
            if attempt:  # a connection that was open may have been used to the end
                assert type(caught.value) is StorageError
        with pytest.raises(StorageError):
            await store.get("notes", ("a",))
        with pytest.raises(StorageError):
            async with store.lock("notes", ("a",)):
                raise AssertionError("nobody gave the lock")
    with pytest.raises(StorageError):
        await RedisStateStore(url).open()
    with pytest.raises(StorageError, match="not open"):
        await store.get("notes", ("a",))


async def test_a_wrong_password_is_told_at_open(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "s3cret")
    server.start()
    try:
        with pytest.raises(StorageError) as caught:
            await RedisStateStore(f"redis://:wr0ng@127.0.0.1:{server.port}/0").open()
        assert "wr0ng" not in str(caught.value)
    finally:
        server.kill()


async def test_a_save_to_a_stopped_server_is_of_unknown_outcome_and_never_lands_late(
    server: RedisServer,
) -> None:
    async with store_on(server.url, timeout_seconds=0.75) as store:
        await store.commit([put("a", {"n": 0})])
        server.stop()
        late = []
        for n in (1, 2):
            with pytest.raises(DurabilityUnknownError) as caught:
                await store.commit([put("a", {"n": n}), append("a", {"n": n})])
            late.append(caught.value)
        newest = asyncio.create_task(store.commit([put("a", {"n": "new"}), append("a", {})]))
        server.go_on()
        revision, seq = await newest

        assert await content_of(store, "a") == {"n": "new"}
        assert revision == seq + 1  # each of the earlier ones was made whole, once, or not at all
        assert len(await records_of(store, "a")) == seq <= 3
        assert {error.key for error in late} == {("a",)}


async def test_a_short_stop_is_hidden_by_the_second_try(server: RedisServer) -> None:
    async with store_on(server.url, timeout_seconds=2.0) as store:
        await store.commit([put("a", {"n": 0})])
        server.stop()
        saving = asyncio.create_task(store.commit([put("a", {"n": 1}), append("a", {})]))
        await asyncio.sleep(2.3)  # the first try is over, its command in the server's socket
        server.go_on()
        assert await saving == [2, 1]
        assert len(await records_of(store, "a")) == 1


async def test_a_full_server_takes_nothing_and_a_delete_makes_room(server: RedisServer) -> None:
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        await store.commit([put("a", {"n": 1}), put("big", {"text": "x" * 100_000})])
        await client.config_set("maxmemory", 1)
        groups: list[list[Change]] = [[put("a", {"n": 2})], [append("log", {}), put("b", {})]]
        for group in groups:
            with pytest.raises(StorageFullError) as caught:
                await store.commit(group)
            assert caught.value.key == group[0].key
        assert await content_of(store, "a") == {"n": 1}
        assert await store.keys("notes") == [("a",), ("big",)]
        assert await records_of(store, "log") == []
        assert await store.commit([delete("big")]) == [1]
        await client.config_set("maxmemory", 0)
        assert await store.commit([put("a", {"n": 2}), append("log", {})]) == [2, 1]


async def test_one_commit_that_is_refused_leaves_those_beside_it_alone(
    server: RedisServer,
) -> None:
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        await client.set(StoreKeys("app:").document("notes", "foreign"), "not ours")
        outcomes = await asyncio.gather(
            store.commit([put("a", {"n": 1})]),
            store.commit([put("b", {"n": 1}), put("foreign", {"n": 1})]),
            store.commit([put("c", {"n": 1}, expected=3)]),
            store.commit([put("d", {"n": 1})]),
            return_exceptions=True,
        )
        assert outcomes[0] == outcomes[3] == [1]
        assert isinstance(outcomes[1], StorageError)
        assert outcomes[1].key == ("foreign",)
        assert isinstance(outcomes[2], RevisionConflictError)
        assert await store.keys("notes") == [("a",), ("d",)]
        assert await client.get(StoreKeys("app:").document("notes", "foreign")) == b"not ours"


async def test_a_log_of_somebody_else_is_left_alone(server: RedisServer) -> None:
    names = StoreKeys("app:")
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        for key in (names.log("notes", "a"), names.dedupe("notes", "b"), names.index("others")):
            await client.set(key, "not ours")
        beside: list[Change] = [
            append("a", {}),
            append("b", {}, "id"),
            put("y", {}, kind="others"),
        ]
        for change in beside:
            with pytest.raises(StorageError, match="WRONGTYPE"):
                await store.commit([put("x", {}), change])
        assert await store.keys("notes") == []


async def test_a_read_only_server_takes_nothing(server: RedisServer, tmp_path: Path) -> None:
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        await store.commit([put("a", {"n": 1})])
        await client.replicaof("127.0.0.1", "1")
        with pytest.raises(StorageError, match="READONLY"):
            await store.commit([put("a", {"n": 2}), append("a", {})])
        assert await content_of(store, "a") == {"n": 1}
        await client.replicaof("NO", "ONE")
        assert await store.commit([put("a", {"n": 2}), append("a", {})]) == [2, 1]


async def test_a_server_that_forgot_its_scripts_is_told_them_again(server: RedisServer) -> None:
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        await store.commit([put("a", {"n": 1})])
        await client.script_flush()
        assert await store.commit([put("a", {"n": 2})]) == [2]
        async with store.lock("notes", ("a",)):
            await client.script_flush()
            assert await store.commit([put("a", {"n": 3})]) == [3]
