"""What is stored in Redis, and what its settings mean."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.errors import (
    DurabilityUnknownError,
    RevisionConflictError,
    SchemaTooNewError,
    StateCorruptedError,
)
from agent_state.protocols import Put
from agent_state.redis import RedisStateStore
from agent_state.redis.client import connect
from agent_state.redis.keys import StoreKeys
from agent_state.testing.contract_base import (
    append,
    body,
    content_of,
    delete,
    put,
    records_of,
    scanned,
)
from tests.redis.servers import RedisServer
from tests.redis.stores import store_on


async def test_damage_is_put_aside_and_told_and_the_rest_goes_on(server: RedisServer) -> None:
    names = StoreKeys("app:")
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        for key in ("a", "b", "c"):
            await store.commit([put(key, {"n": 1})])
        await client.hset(names.document("notes", "a"), "body", b'{"n": \xff')
        with pytest.raises(StateCorruptedError) as caught:
            await store.get("notes", ("a",))
        assert caught.value.key == ("a",)
        [incident] = store.incidents()
        assert incident.kept is not None
        assert await client.hget(incident.kept, "body") == b'{"n": \xff'
        assert await store.get("notes", ("a",)) is None
        assert await store.keys("notes") == [("b",), ("c",)]
        await client.hset(names.document("notes", "b"), "body", b"[1]")
        await client.set(names.document("notes", "c"), "no hash")
        assert await scanned(store) == {}
        assert len(store.incidents()) == 3
        assert await store.commit([put("a", {"n": 2}, expected=0)]) == [2]  # it counts on
        assert await store.erase("notes", ("a",)) == 1
        assert await client.exists(incident.kept) == 0


async def test_an_edit_by_hand_is_used_and_stamped_at_the_next_save(server: RedisServer) -> None:
    key = StoreKeys("app:").document("notes", "a")
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        await store.commit([put("a", {"n": 1})])
        await client.hset(key, "body", b'{ "n": 2 }')
        document = await store.get("notes", ("a",))
        assert document is not None
        assert (document.body, document.edited, document.revision) == (body({"n": 2}), True, 1)
        assert await store.commit([put("a", {"n": 2}, expected=1)]) == [2]
        document = await store.get("notes", ("a",))
        assert document is not None
        assert not document.edited


async def test_an_edit_back_to_what_was_saved_last_is_a_change(server: RedisServer) -> None:
    """The checksum alone does not say what is stored."""
    key = StoreKeys("app:").document("notes", "a")
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        await store.commit([put("a", {"n": 1})])
        await client.hset(key, "body", b'{"n":2}')
        assert await store.commit([put("a", {"n": 1})]) == [2]
        assert await content_of(store, "a") == {"n": 1}


async def test_a_record_that_cannot_be_read_is_left_out_and_told(server: RedisServer) -> None:
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        await store.commit([append("log", {"n": 1})])
        await client.xadd(StoreKeys("app:").log("notes", "log"), {"body": "{"}, id="2-0")
        assert await store.commit([append("log", {"n": 3})]) == [3]
        assert [record.seq for record in await records_of(store, "log")] == [1, 3]
        [incident] = store.incidents()
        assert "record 2" in incident.what


async def test_a_newer_schema_is_not_replaced(server: RedisServer) -> None:
    async with store_on(server.url) as store:
        await store.commit([Put("notes", ("a",), body({"n": 1}), "notes/10")])
        with pytest.raises(SchemaTooNewError):
            await store.commit([put("b", {}), Put("notes", ("a",), body({"n": 2}), "notes/9")])
        assert await store.keys("notes") == [("a",)]
        assert await store.commit([Put("notes", ("a",), body({"n": 2}), "others/1")]) == [2]


async def test_revisions_go_on_counting_after_a_delete_by_another_process(
    server: RedisServer,
) -> None:
    async with store_on(server.url) as mine, store_on(server.url) as theirs:
        await mine.commit([put("a", {"n": 1})])
        await theirs.commit([delete("a")])
        await theirs.commit([put("a", {"n": "another"}, expected=0)])
        with pytest.raises(RevisionConflictError):  # not the document that was read
            await mine.commit([put("a", {"n": 2}, expected=1)])


async def test_stores_with_different_prefixes_do_not_see_each_other(server: RedisServer) -> None:
    async with store_on(server.url) as one, store_on(server.url, prefix="app") as other:
        await one.commit([put("a", {"n": 1}), append("a", {})])
        assert await other.keys("notes") == []
        assert await other.erase("notes", ("a",)) == 0
        assert await one.keys("notes") == [("a",)]
    with pytest.raises(ValueError, match="brace"):
        RedisStateStore(server.url, prefix="{app}")


async def test_what_the_servers_settings_may_cost_is_said_at_open(
    server: RedisServer, durable: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "agent_state.redis")

    async def said(url: str, **settings: Any) -> str:
        caplog.clear()
        async with store_on(url, **settings):
            return caplog.text

    assert "appendonly is off" in await said(server.url)
    assert await said(durable.url) == ""
    assert "0 are connected" in await said(durable.url, wait_replicas=1)
    async with connect(durable.url) as client:
        await client.config_set("appendfsync", "everysec")
        assert "the last second" in await said(durable.url)
        await client.config_set("maxmemory-policy", "allkeys-lru")
        assert "use noeviction" not in await said(durable.url)
        await client.config_set("maxmemory", "100mb")
        assert "use noeviction" in await said(durable.url)
    rules = ("on", ">pw", "~*", "&*", "+@all", "-config", "-info")
    durable.ask("acl", "setuser", "app", *rules)
    forbidden = await said(f"redis://app:pw@127.0.0.1:{durable.port}/0")
    assert "does not report" in forbidden


async def test_replicas_that_do_not_confirm_make_the_outcome_unknown(server: RedisServer) -> None:
    async with store_on(server.url, wait_replicas=1, timeout_seconds=2.0) as store:
        with pytest.raises(DurabilityUnknownError, match="0 of 1 replicas") as caught:
            await store.commit([put("a", {"n": 1})])
        assert caught.value.key == ("a",)
        with pytest.raises(RevisionConflictError):  # that is known, whoever confirms it
            await store.commit([put("a", {"n": 1}, expected=7)])
        assert await content_of(store, "a") == {"n": 1}


async def test_all_of_the_manager_works_on_it(server: RedisServer) -> None:
    async with StatePersistenceManager(store=RedisStateStore(server.url, prefix="app:")) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "agent_type": "worker"})
        await manager.save_task_queue_state(
            "alice",
            {"agent_id": "alice", "pending_tasks": [{"task_id": "1", "agent_id": "alice"}]},
        )
        async with manager.edit("agents", "alice") as state:
            state.context.working_memory["topic"] = "persistence"
        async with manager.group() as group:
            group.save("system", "x", {"n": 1})
            group.append("events", "all", {"n": 1})
        queue = await manager.load_task_queue_state("alice")
        assert queue is not None
        assert await manager.list_persisted_agents() == ["alice"]
        assert [entry.record async for entry in manager.read_log("events", "all")] == [{"n": 1}]
        await manager.cleanup_old_states(0)
