"""What goes wrong, with both transports: mistakes, damage, a Redis that is away, or full."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from agent_state.errors import InvalidKeyError, SerializationError, StateValidationError
from agent_state.redis.client import connect
from agent_state_integrations.redis_state import RedisSessionManager
from tests.redis.servers import RedisServer
from tests.redis_state.redis_states import BOTH, Place, command, session


@pytest.fixture(params=BOTH)
async def place(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(request.param, server, stack)


async def test_mistakes_raise_and_store_nothing(place: Place) -> None:
    manager, cache = place.manager(), place.cache()
    wrong: Any = {"id": "s"}
    with pytest.raises(TypeError, match="UniversalSession"):
        await manager.save_session(wrong)
    unlike = session("s")
    unlike.history.append("text")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="history"):
        await manager.save_session(unlike)
    with pytest.raises(SerializationError, match=r"context\.when"):
        await manager.save_session(session("s", context={"when": datetime.now(UTC)}))
    with pytest.raises(SerializationError, match=r"context\.x"):
        await manager.save_session(session("s", context={"x": float("nan")}))
    with pytest.raises(InvalidKeyError):
        await manager.load_session("")
    with pytest.raises(InvalidKeyError):
        await manager.load_session("x" * 4097)
    with pytest.raises(TypeError):
        await manager.load_session(7)  # type: ignore[arg-type]
    with pytest.raises(StateValidationError):
        await manager.save_session(session("s"), ttl_seconds=0)
    with pytest.raises(TypeError):
        await cache.cache_result("e", "text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        await cache.cache_flow_history("s", "f", [1])  # type: ignore[list-item]

    assert await manager.list_sessions() == []


async def test_a_save_takes_the_session_as_it_is_at_that_moment(place: Place) -> None:
    manager = place.manager()
    changing = session("s", context={"list": [1]})

    saving = asyncio.create_task(manager.save_session(changing))
    await asyncio.sleep(0)
    changing.context["list"].append(2)
    assert await saving

    loaded = await manager.load_session("s")
    assert loaded is not None
    assert loaded.context == {"list": [1]}


async def test_a_damaged_or_newer_record_is_none_and_left_as_it_is(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    manager, cache = place.manager(), place.cache()
    damaged = {
        b"torn": b'{"id": "torn", "secret',
        b"list": b"[]",
        b"wrong": b'{"_schema_version": "2.0", "id": "wrong", "backend": "xyzzy"}',
        b"newer": b'{"_schema_version": "3.0", "id": "newer", "backend": "flowise"}',
    }
    async with connect(place.server.url) as redis:
        for name, text in damaged.items():
            await redis.set(b"agentic_flywheel:session:" + name, text)
        await redis.set(
            "agentic_flywheel:execution:newer", b'{"_schema_version": "3", "result": {}}'
        )

        for name in damaged:
            assert await manager.load_session(name.decode()) is None
        assert await cache.get_result("newer") is None

        for name, text in damaged.items():
            assert await redis.get(b"agentic_flywheel:session:" + name) == text
    assert "'newer' is not loaded: _schema_version is 3.0" in caplog.text
    assert "backend" in caplog.text
    assert "xyzzy" not in caplog.text


async def test_unknown_fields_are_kept(place: Place) -> None:
    manager = place.manager()
    newer = b'{"_schema_version": "2.7", "id": "s", "backend": "custom", "mood": ["good"]}'
    async with connect(place.server.url) as redis:
        await redis.set("agentic_flywheel:session:s", newer)
    loaded = await manager.load_session("s")
    assert loaded is not None

    await manager.save_session(loaded)

    again = await manager.load_session("s")
    assert again == loaded
    assert again.model_extra == {"mood": ["good"]}


async def test_nothing_raises_while_redis_is_away_and_all_works_when_it_is_back(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    manager, cache = place.manager(), place.cache()
    assert await manager.save_session(session("s"))
    place.server.kill()

    assert not await manager.save_session(session("s"))
    assert await manager.load_session("s") is None
    assert not await manager.delete_session("s")
    assert await manager.list_sessions() == []
    assert not await cache.cache_result("e", {})
    assert await cache.get_result("e") is None
    assert not await cache.cache_flow_history("s", "f", [])
    assert await cache.get_flow_history("s", "f") is None
    assert "session 's' is not saved: " in caplog.text
    assert manager.counts["failed"] == 4
    assert manager.last_error

    place.server.start()  # it is empty
    await eventually(manager, "s")
    assert await manager.list_sessions() == ["s"]
    await eventually(place.manager(), "t")
    assert await manager.list_sessions() == ["s", "t"]


async def test_whose_prefix_it_is_is_asked_again_after_a_failure(place: Place) -> None:
    manager = place.manager(server_id="one")
    assert await manager.save_session(session("s"))
    place.server.kill()
    assert not await manager.save_session(session("s"))
    place.server.start()
    async with connect(place.server.url) as redis:
        await redis.set("agentic_flywheel:meta:server_id", "two")

    with pytest.raises(StateValidationError, match="'two'"):
        await eventually(manager, "s")


async def eventually(manager: RedisSessionManager, name: str) -> None:
    """Saved at last: the coaia server is not started again within a second of its last start."""
    async with asyncio.timeout(60):
        while not await manager.save_session(session(name)):
            await asyncio.sleep(0.05)


async def test_a_redis_that_is_full_refuses_saves_and_still_loads(place: Place) -> None:
    manager = place.manager()
    assert await manager.save_session(session("s"))
    async with connect(place.server.url) as redis:
        await redis.config_set("maxmemory", "1")
        assert not await manager.save_session(session("s", total_queries=1))
        loaded = await manager.load_session("s")
        assert loaded is not None
        assert loaded.total_queries == 0
        assert "maxmemory" in (manager.last_error or "")
        await redis.config_set("maxmemory", "0")

    assert await manager.save_session(session("s", total_queries=2))


SCRIPT = """
import asyncio, sys
from agent_state_integrations.redis_state import *
session = UniversalSession(id="s", backend=BackendType.CUSTOM)
manager = RedisSessionManager()
print(asyncio.run(manager.save_session(session)))
print(asyncio.run(manager.load_session("s")) == session)
print(asyncio.run(manager.list_sessions()))
asyncio.run(manager.close())
"""


@pytest.mark.parametrize("kind", BOTH)
def test_a_script_may_run_an_event_loop_for_each_call(kind: str, server: RedisServer) -> None:
    said = {"REDIS_STATE_TRANSPORT": kind, "REDIS_STATE_COAIA_COMMAND": command()[0]}
    paths = os.pathsep.join(sys.path)
    environment = os.environ | said | {"REDIS_URL": server.url, "PYTHONPATH": paths}

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout.split("\n") == ["True", "True", "['s']", ""]


async def test_a_cancelled_save_is_done_when_the_cancelling_is(place: Place) -> None:
    manager = place.manager()
    await manager.save_session(session("first"))

    saving = asyncio.create_task(manager.save_session(session("s", total_queries=1)))
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving

    loaded = await manager.load_session("s")
    assert loaded is not None
    assert await manager.save_session(session("s", total_queries=2))


async def test_cancelled_loads_leave_nothing_behind(place: Place) -> None:
    manager = place.manager()
    await manager.save_session(session("s", context={"text": "x" * 200_000}))
    await manager.save_session(session("t"))
    for n in range(20):
        loading = asyncio.create_task(manager.load_session("s"))
        await asyncio.sleep(0.0002 * n)
        loading.cancel()
        await asyncio.wait([loading])
        loaded = await manager.load_session("t")
        assert loaded is not None
        assert loaded.id == "t"

    assert len(asyncio.all_tasks()) <= 2  # this one, and the reader of the coaia server
