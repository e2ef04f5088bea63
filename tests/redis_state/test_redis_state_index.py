"""How sessions are listed where nothing can list: an index for each instance."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.asyncio import Redis

from agent_state.redis.client import connect
from agent_state.testing import FakeClock
from tests.redis.servers import RedisServer
from tests.redis_state.redis_states import Place, session

pytestmark = pytest.mark.long("starts the coaia server as a process")

KEY = "agentic_flywheel:session:s"
INDEX = "agentic_flywheel:index"


@pytest.fixture
async def place(server: RedisServer) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place("coaia", server, stack)


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    async with connect(server.url) as client:
        yield client


def held(text: Any) -> list[str]:
    names: list[str] = json.loads(text)["holds"]
    return names


async def test_instances_that_begin_at_once_find_each_others_sessions(
    place: Place, redis: Redis
) -> None:
    managers = [place.manager() for _ in range(3)]
    saves = [manager.save_session(session(f"{n}")) for n, manager in enumerate(managers)]
    assert all(await asyncio.gather(*saves))
    for n, manager in enumerate(managers):  # each looks whether its name is there
        assert await manager.save_session(session(f"{n}"))

    assert [await manager.list_sessions() for manager in managers] == [["0", "1", "2"]] * 3


async def test_an_instance_whose_name_was_lost_adds_it_again(place: Place, redis: Redis) -> None:
    manager, other = place.manager(), place.manager()
    await manager.save_session(session("s"))
    await redis.set(INDEX, '{"holds": ["somebody"]}')
    assert await other.list_sessions() == []

    await manager.save_session(session("s"))

    assert await other.list_sessions() == ["s"]


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"holds": 5}', b'{"holds": [5, null]}'])
async def test_a_damaged_index_is_written_again(place: Place, redis: Redis, damage: bytes) -> None:
    manager = place.manager()
    await manager.save_session(session("s"))
    await redis.set(INDEX, damage)

    await manager.save_session(session("s"))

    assert await place.manager().list_sessions() == ["s"]


async def test_an_instance_with_a_name_goes_on_with_its_index(place: Place, redis: Redis) -> None:
    for name in ("a", "b"):
        transport = place.transport(instance="desk")
        await place.manager(transport=transport).save_session(session(name))
        await transport.close()

    assert await place.manager().list_sessions() == ["a", "b"]
    assert held(await redis.get(INDEX)) == ["desk"]


async def test_who_has_nothing_left_is_forgotten_in_time(place: Place, redis: Redis) -> None:
    clock = FakeClock()
    await place.manager(clock=clock).save_session(session("old"), ttl_seconds=60)
    manager = place.manager(clock=clock)
    await manager.save_session(session("s"))
    await clock.advance(61)
    assert await manager.list_sessions() == ["s"]
    assert len(held(await redis.get(INDEX))) == 2  # it may just be about to save

    await clock.advance(3600)
    assert await manager.list_sessions() == ["s"]

    assert len(held(await redis.get(INDEX))) == 1


async def test_an_index_forgets_what_expired(place: Place, redis: Redis) -> None:
    clock = FakeClock()
    manager = place.manager(transport=place.transport(clock=clock, instance="desk"))
    for n in range(5):
        await manager.save_session(session(f"{n}"), ttl_seconds=60)
    await manager.save_session(session("s"))
    await clock.advance(61)

    await manager.list_sessions()

    assert held(await redis.get(f"{INDEX}:desk")) == [KEY]
