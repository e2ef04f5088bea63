"""The direct transport: Redis's own expiry, and writes that come too late."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from agent_state.redis.client import connect
from agent_state_integrations.redis_state import RedisConfig, RedisSessionManager
from tests.redis.servers import RedisServer, ThreeNodes
from tests.redis_state.redis_states import Place, session

KEY = "agentic_flywheel:session:s"


@pytest.fixture
async def place(server: RedisServer) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place("direct", server, stack)


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    async with connect(server.url) as client:
        yield client


async def test_a_session_lives_a_day_or_as_long_as_it_is_told(place: Place, redis: Redis) -> None:
    manager = place.manager()

    await manager.save_session(session("s"))
    assert 86_300_000 < await redis.pttl(KEY) <= 86_400_000
    await manager.save_session(session("s"), ttl_seconds=20)
    assert 10_000 < await redis.pttl(KEY) <= 20_000
    await manager.save_session(session("s"), ttl_seconds=math.inf)
    assert await redis.pttl(KEY) == -1
    cache = place.cache()
    await cache.cache_result("e", {})
    assert 3_500_000 < await redis.pttl("agentic_flywheel:execution:e") <= 3_600_000


async def test_loading_begins_the_time_again(place: Place, redis: Redis) -> None:
    manager = place.manager()
    await manager.save_session(session("s"), ttl_seconds=1000)
    await redis.pexpire(KEY, 500_000)  # half of it has passed

    await manager.load_session("s")

    assert 900_000 < await redis.pttl(KEY) <= 1_000_000


async def test_loading_begins_nothing_again_where_it_is_not_wanted(
    place: Place, redis: Redis
) -> None:
    await place.manager().save_session(session("s"), ttl_seconds=1000)
    await redis.pexpire(KEY, 500_000)

    await place.manager(sliding=False).load_session("s")

    assert await redis.pttl(KEY) <= 500_000


async def test_a_session_without_an_end_gets_none_by_loading(place: Place, redis: Redis) -> None:
    await place.manager(ttl_seconds=1000).save_session(session("s"))
    await redis.persist(KEY)

    assert await place.manager().load_session("s") is not None

    assert await redis.pttl(KEY) == -1


async def test_a_renewal_that_comes_after_another_save_shortens_nothing(
    place: Place, redis: Redis
) -> None:
    transport = place.transport()
    manager = place.manager(transport=transport)
    for seconds in (math.inf, 5000):
        await manager.save_session(session("s"), ttl_seconds=seconds)
        before = await redis.pttl(KEY)

        await transport._renew(KEY, left=1, seconds=1000)  # as the record was when it was read

        after = await redis.pttl(KEY)
        assert (before == after == -1) if seconds == math.inf else before - 2000 < after <= before
    await redis.delete(KEY)
    await transport._renew(KEY, left=1, seconds=1000)
    assert not await redis.exists(KEY)


async def test_an_expired_session_is_gone(place: Place, redis: Redis) -> None:
    manager = place.manager(ttl_seconds=0.05, sliding=False)
    await manager.save_session(session("s"))
    async with asyncio.timeout(60):
        while await redis.exists(KEY):
            await asyncio.sleep(0.01)

    assert await manager.load_session("s") is None
    assert await manager.list_sessions() == []
    assert not await manager.delete_session("s")


async def test_a_save_that_was_given_up_is_never_done_later(place: Place, redis: Redis) -> None:
    manager = place.manager(transport=place.transport(timeout_seconds=0.5))
    await manager.save_session(session("s"))
    place.server.stop()
    assert not await manager.save_session(session("s", total_queries=1))
    assert not await manager.delete_session("s")
    place.server.go_on()

    await redis.ping()  # what waited before it has been read
    loaded = await place.manager().load_session("s")

    assert loaded is not None
    assert loaded.total_queries == 0
    assert await manager.save_session(session("s", total_queries=2))


async def test_the_first_save_of_all_is_never_done_later_either(place: Place, redis: Redis) -> None:
    manager = place.manager(transport=place.transport(timeout_seconds=0.5))
    place.server.stop()
    assert not await manager.save_session(session("s"))
    place.server.go_on()
    await redis.ping()

    assert not await redis.exists(KEY)
    assert "in time" in (manager.last_error or "")
    assert await manager.save_session(session("s"))


async def test_a_restart_between_two_saves_is_not_noticed(place: Place) -> None:
    manager = place.manager()
    assert await manager.save_session(session("s"))

    place.server.restart()

    assert await manager.save_session(session("s"))
    assert await manager.load_session("s") is not None


async def test_connections_that_were_cut_are_made_again(place: Place, redis: Redis) -> None:
    manager = place.manager()
    assert all(await asyncio.gather(*(manager.save_session(session(f"{n}")) for n in range(40))))

    await redis.client_kill_filter(_type="normal", skipme=True)

    assert await manager.load_session("7") is not None
    assert len(await manager.list_sessions()) == 40


async def test_a_redis_that_only_reads_is_read(place: Place, redis: Redis) -> None:
    manager = place.manager()
    await manager.save_session(session("s"))
    await redis.replicaof("127.0.0.1", "1")

    assert not await manager.save_session(session("s", total_queries=1))
    assert not await manager.delete_session("s")
    assert await manager.load_session("s") is not None
    await redis.replicaof("no", "one")
    assert await manager.save_session(session("s"))


async def test_a_renewal_that_fails_does_not_take_the_session_away(
    place: Place, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    manager = place.manager(ttl_seconds=1000)
    await manager.save_session(session("s"))
    await redis.pexpire(KEY, 500_000)
    await redis.replicaof("127.0.0.1", "1")

    assert await manager.load_session("s") is not None

    assert f"{KEY} could not be renewed" in caplog.text


async def test_what_is_not_ours_is_left_alone(place: Place, redis: Redis) -> None:
    manager = place.manager(key_prefix="a?[b]*:")
    await redis.rpush("a?[b]*:session:list", "x")
    await redis.set("ax[b]y:session:other", "x")
    await redis.set(b"a?[b]*:session:\xff", "x")
    await manager.save_session(session("s"))

    assert await manager.list_sessions() == ["list", "s"]
    assert await manager.load_session("list") is None
    assert "WRONGTYPE" in (manager.last_error or "")
    assert await redis.lrange("a?[b]*:session:list", 0, -1) == [b"x"]


async def test_a_wrong_password_is_told_and_not_shown(
    server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.config_set("requirepass", "right")
    url = server.url.replace("//", "//:wr0ng@")
    config = RedisConfig(url=url)

    async with RedisSessionManager(config=config) as manager:
        assert not await manager.save_session(session("s"))

    assert "Authentication" in caplog.text
    assert "wr0ng" not in caplog.text + repr(config)


async def test_a_closed_manager_opens_again(place: Place) -> None:
    async with RedisSessionManager(config=place.config) as manager:
        await manager.save_session(session("s"))
    assert await manager.load_session("s") is not None
    await manager.close()


async def test_a_cluster_is_a_redis_too(tmp_path: Path) -> None:
    cluster = ThreeNodes(tmp_path / "cluster")
    cluster.start()
    try:
        async with RedisSessionManager(config=RedisConfig(url=cluster.url)) as manager:
            names = [f"{n:02}" for n in range(12)]
            for name in names:
                assert await manager.save_session(session(name, user_id=name))
            assert await manager.list_sessions() == names
            for name in names:
                loaded = await manager.load_session(name)
                assert loaded is not None
                assert loaded.user_id == name
            assert await manager.delete_session("07")
            assert await manager.list_sessions("0[5-9]") == ["05", "06", "08", "09"]
    finally:
        cluster.kill()
