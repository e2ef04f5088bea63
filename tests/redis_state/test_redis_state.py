"""What both transports do alike, on a real Redis and with the real coaia server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC
from typing import Any

import pytest

from agent_state.errors import StateValidationError
from agent_state.redis.client import connect
from agent_state_integrations.redis_state import (
    BackendType,
    DirectTransport,
    FlowStatus,
    RedisConfig,
    RedisSessionManager,
    UniversalSession,
    escape_glob,
)
from tests.redis.servers import RedisServer, free_port
from tests.redis_state.redis_states import BOTH, Place, full_session, session


@pytest.fixture(params=BOTH)
async def place(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(request.param, server, stack)


async def test_every_field_of_a_session_comes_back_after_a_restart(place: Place) -> None:
    saved = full_session()
    assert await place.manager().save_session(saved)

    loaded = await place.manager().load_session("session_123")

    assert loaded == saved
    assert loaded is not None
    assert type(loaded.backend) is BackendType
    assert type(loaded.status) is FlowStatus
    assert loaded.created_at.tzinfo is UTC
    assert set(UniversalSession.model_fields) == loaded.model_fields_set


async def test_a_session_without_a_backend_session_id_is_saved_and_resumed(place: Place) -> None:
    manager = place.manager(enabled=True, ttl_seconds=86400)
    new = UniversalSession(
        id="session_123",
        backend=BackendType.FLOWISE,
        context={"previous_topic": "structural tension"},
        history=[{"q": "What is creative orientation?", "a": "..."}],
    )
    await manager.save_session(new)

    restored = await manager.load_session("session_123")

    assert restored is not None
    assert restored.history[-1] == {"q": "What is creative orientation?", "a": "..."}
    assert restored == new


async def test_keys_have_the_shapes_that_are_documented(place: Place) -> None:
    cache = place.cache()
    await place.manager().save_session(session("a66f8bd2-29f5"))
    await cache.cache_result("exec_20251118_093012_abc123", {})
    await cache.cache_flow_history("session_123", "csv2507", [])

    async with connect(place.server.url) as redis:
        keys: set[Any] = set(await redis.keys())

    assert {key for key in keys if b":index" not in key} == {
        b"agentic_flywheel:session:a66f8bd2-29f5",
        b"agentic_flywheel:execution:exec_20251118_093012_abc123",
        b"agentic_flywheel:history:session_123:csv2507",
    }


async def test_the_last_save_of_two_managers_wins(place: Place) -> None:
    one, other = place.manager(), place.manager()
    assert await one.save_session(session("s", context={"by": "one"}))
    assert await other.save_session(session("s", context={"by": "other"}))

    loaded = [await one.load_session("s"), await other.load_session("s")]

    assert [each and each.context for each in loaded] == [{"by": "other"}] * 2


async def test_saves_at_once_of_one_manager_keep_their_order(place: Place) -> None:
    manager = place.manager()
    saves = [manager.save_session(session("s", total_queries=n)) for n in range(20)]

    assert all(await asyncio.gather(*saves))

    loaded = await manager.load_session("s")
    assert loaded is not None
    assert loaded.total_queries == 19


async def test_saves_at_once_of_two_managers_leave_one_of_them_whole(place: Place) -> None:
    managers = [place.manager(), place.manager()]
    filling = [{"text": f"{n}" * 5000, "n": n} for n in range(10)]
    saves = [
        manager.save_session(session("s", context=each)) for each in filling for manager in managers
    ]

    assert all(await asyncio.gather(*saves))

    loaded = await managers[0].load_session("s")
    assert loaded is not None
    assert loaded.context in filling


async def test_a_session_of_two_megabytes_comes_back(place: Place) -> None:
    big = session("big", history=[{"q": '"\\\n\x00 😀é' * 100} for _ in range(1300)])
    assert len(big.model_dump_json().encode()) > 2_000_000
    manager = place.manager()

    assert await manager.save_session(big)

    assert await manager.load_session("big") == big


async def test_a_session_beyond_the_limit_is_refused_and_the_old_one_stays(place: Place) -> None:
    transport = place.transport(max_bytes=20_000)
    manager = place.manager(transport=transport)
    await manager.save_session(session("s"))

    assert not await manager.save_session(session("s", context={"text": "x" * 20_000}))

    assert "20,000" in (manager.last_error or "")
    assert await manager.load_session("s") is not None


STRANGE = [
    "a b",
    "ü/😀",
    "a:b",
    "*",
    "[a]",
    "?\\",
    "\x00",
    "'\"\n",
    "agentic_flywheel:session:x",
    "%3A",
]


async def test_ids_may_hold_anything(place: Place) -> None:
    manager = place.manager()
    for name in STRANGE:
        assert await manager.save_session(session(name, user_id=name))

    assert await manager.list_sessions() == sorted(STRANGE)
    for name in STRANGE:
        loaded = await manager.load_session(name)
        assert loaded is not None
        assert loaded.id == loaded.user_id == name
        assert await manager.list_sessions(escape_glob(name)) == [name]


async def test_a_listing_follows_the_pattern_and_forgets_what_is_deleted(place: Place) -> None:
    manager, other = place.manager(), place.manager()
    for name in ("a1", "a2", "b1"):
        await manager.save_session(session(name))
    await other.save_session(session("a3"))

    assert await manager.list_sessions() == ["a1", "a2", "a3", "b1"]
    assert await manager.list_sessions("a*") == ["a1", "a2", "a3"]
    assert await manager.list_sessions("[^a]?") == ["b1"]
    assert await other.delete_session("a1")
    assert await manager.list_sessions("a[0-2]") == ["a2"]


async def test_what_is_deleted_is_gone(place: Place) -> None:
    manager = place.manager()
    await manager.save_session(session("s", context={"secret plan": "xyzzy"}))

    assert await manager.delete_session("s")

    assert await manager.load_session("s") is None
    assert not await manager.delete_session("s")
    async with connect(place.server.url) as redis:
        for key in await redis.keys():
            assert b"xyzzy" not in (await redis.get(key) or b"")
    assert await manager.save_session(session("s"))
    assert await manager.list_sessions() == ["s"]


async def test_two_prefixes_on_one_redis_do_not_meet(place: Place) -> None:
    prod, test = place.manager(key_prefix="fly:prod"), place.manager(key_prefix="fly:test:")
    await prod.save_session(session("s", user_id="prod"))
    await test.save_session(session("s", user_id="test"))
    await test.save_session(session("t"))

    assert await prod.list_sessions() == ["s"]
    assert await prod.delete_session("s")
    assert await test.list_sessions() == ["s", "t"]
    kept = await test.load_session("s")
    assert kept is not None
    assert kept.user_id == "test"


async def test_a_prefix_that_is_another_servers_is_an_error(place: Place) -> None:
    assert await place.manager(server_id="one").save_session(session("s"))

    with pytest.raises(StateValidationError, match="'one'"):
        await place.manager(server_id="two").load_session("s")
    assert await place.manager(server_id="one").load_session("s") is not None


async def test_results_and_histories_are_cached(place: Place) -> None:
    cache, other = place.cache(), place.cache()
    result = {"output": "…", "metrics": {"seconds": 0.5}}
    executions: list[dict[str, Any]] = [{"id": 1, "in": "\x00😀"}, {"id": 2}]

    assert await cache.cache_result("e", result)
    assert await cache.cache_flow_history("s", "f", executions)
    assert await cache.cache_flow_history("a:b", "c", [{"of": "a:b"}])
    assert await cache.cache_flow_history("a", "b:c", [])

    assert await other.get_result("e") == result
    assert await other.get_flow_history("s", "f") == executions
    assert await other.get_flow_history("a:b", "c") == [{"of": "a:b"}]
    assert await other.get_flow_history("a", "b:c") == []
    assert await other.get_result("none") is None
    assert await other.get_flow_history("s", "none") is None


async def test_what_older_versions_cached_is_read(place: Place) -> None:
    cache = place.cache()
    async with connect(place.server.url) as redis:
        await redis.set(
            "agentic_flywheel:execution:e",
            b'{"execution_id": "e", "result": {"output": 1}, "cached_at": "2025-11-18T09:30:12"}',
        )
        await redis.set(
            "agentic_flywheel:history:s:f",
            b'{"_schema_version": "1.0", "session_id": "s", "flow_id": "f", "executions": [{}]}',
        )

    assert await cache.get_result("e") == {"output": 1}
    assert await cache.get_flow_history("s", "f") == [{}]


async def test_credentials_are_not_stored(place: Place) -> None:
    manager = place.manager()
    secrets = {"apiKey": "sk-1", "flowise_api_key": "sk-2", "Authorization": {"Bearer": "sk-3"}}
    kept = {"max_tokens": 5, "next_page_token": "p2", "password": ""}
    await manager.save_session(session("s", context={"http": [secrets | kept]}))

    loaded = await manager.load_session("s")

    assert loaded is not None
    assert loaded.context["http"][0] == dict.fromkeys(secrets, "[redacted]") | kept
    async with connect(place.server.url) as redis:
        assert b"sk-" not in (await redis.get("agentic_flywheel:session:s") or b"")


async def test_nothing_is_stored_or_read_when_it_is_not_enabled(place: Place) -> None:
    await place.manager().save_session(session("s"))
    manager = place.manager(enabled=False)

    assert not await manager.save_session(session("t"))
    assert await manager.load_session("s") is None
    assert await manager.list_sessions() == []
    assert not await manager.delete_session("s")
    assert await place.manager().list_sessions() == ["s"]


def test_a_manager_asks_the_environment_where_redis_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", "many")
    with pytest.raises(StateValidationError, match="REDIS_PORT"):
        RedisSessionManager()
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    monkeypatch.setenv("REDIS_TTL_SECONDS", "60")
    manager = RedisSessionManager()
    assert manager.ttl_seconds == 60

    assert not asyncio.run(manager.save_session(session("s")))  # nobody is there


async def test_the_coaia_tools_are_a_matter_of_configuration(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.redis_state.redis_states import command

    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("REDIS_STATE_TRANSPORT", "coaia")
    monkeypatch.setenv("REDIS_STATE_COAIA_COMMAND", f"'{command()[0]}'")
    config = RedisConfig.from_env()
    assert config["transport"] == "coaia"

    async with RedisSessionManager() as manager:
        assert await manager.save_session(session("s"))

    direct = DirectTransport(server.url)  # each reads what the other wrote
    assert await RedisSessionManager(transport=direct).load_session("s") is not None
    await direct.close()
