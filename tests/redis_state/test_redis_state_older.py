"""What older programs stored is read; large records are stored compressed; lists cost batches."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.asyncio import Redis

import agent_state_integrations
from agent_state import StateValidationError
from agent_state.redis.client import connect
from agent_state_integrations.redis_state import (
    CoaiaTransport,
    FlowStatus,
    RedisConfig,
    RedisExecutionCache,
    RedisSessionManager,
)
from tests.redis.servers import RedisServer
from tests.redis_state.redis_states import BOTH, PREFIX, Place, command, full_session, session


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    async with connect(server.url) as client:
        yield client


@pytest.fixture
async def manager(server: RedisServer) -> AsyncIterator[RedisSessionManager]:
    async with RedisSessionManager(url=server.url) as one:
        yield one


# -- the records of older programs -------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("active", FlowStatus.RUNNING),
        ("ACTIVE", FlowStatus.RUNNING),
        ("idle", FlowStatus.PENDING),
        (None, FlowStatus.PENDING),
        ("Completed", FlowStatus.COMPLETED),
        ("error", FlowStatus.FAILED),
        ("hibernating", FlowStatus.PENDING),
    ],
)
@pytest.mark.parametrize("version", ["1.0", None])
async def test_a_session_of_an_older_program_is_read_whatever_its_status(
    manager: RedisSessionManager,
    redis: Redis,
    status: str | None,
    expected: FlowStatus,
    version: str | None,
) -> None:
    record: dict[str, Any] = {
        "id": "s",
        "backend": "flowise",
        "backend_session_id": "b",
        "status": status,
        "current_flow_id": None,
        "context": {"a": 1},
        "history": [{"q": "x"}],
        "metadata": {"created_at": "2025-11-18T09:30:00", "last_active": "2025-11-19T00:00:00"},
    }
    if version is not None:
        record["_schema_version"] = version
    await redis.set(f"{PREFIX}session:s", json.dumps(record))

    loaded = await manager.load_session("s")

    assert loaded is not None
    assert (loaded.status, loaded.context, loaded.updated_at.day) == (expected, {"a": 1}, 19)
    former = (loaded.model_extra or {}).get("former_status")
    assert former == ("hibernating" if status == "hibernating" else None)
    assert await manager.save_session(loaded)
    assert await manager.load_session("s") == loaded


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"answer": 42, "steps": [1]}, {"answer": 42, "steps": [1]}),
        ({"result": "of the flow", "ms": 7}, {"result": "of the flow", "ms": 7}),
        ({}, {}),
        ({"execution_id": "e", "result": {"a": 1}, "cached_at": "2025-11-18"}, {"a": 1}),
        ({"_schema_version": "2.0", "result": {"a": 1}}, {"a": 1}),
        ({"_schema_version": "2.0", "answer": 42}, None),
    ],
)
async def test_a_result_of_an_older_program_is_read_bare_or_not(
    server: RedisServer, redis: Redis, stored: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    await redis.set(f"{PREFIX}execution:e", json.dumps(stored))
    async with RedisExecutionCache(url=server.url) as cache:
        assert await cache.get_result("e") == expected


# -- compression -------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", BOTH)
async def test_a_large_session_is_stored_compressed_and_comes_back_equal(
    server: RedisServer, redis: Redis, transport: str
) -> None:
    large = full_session("large")
    large.history = [{"q": "the same words again", "n": number} for number in range(2000)]
    async with AsyncExitStack() as stack:
        place = Place(transport, server, stack)
        manager = place.manager(gzip_over_bytes=1000)
        plain = place.manager()
        for each in (large, session("small")):
            assert await manager.save_session(each)
            assert await plain.load_session(each.id) == each  # every reader of this version
        assert sorted(await manager.list_sessions()) == ["large", "small"]
    stored = json.loads(await redis.get(f"{PREFIX}session:large") or "")
    assert json.loads(gzip.decompress(base64.b64decode(stored["_body"])))["id"] == "large"
    assert len(json.dumps(stored)) < 20_000
    assert "_encoding" not in json.loads(await redis.get(f"{PREFIX}session:small") or "")


async def test_what_does_not_get_smaller_is_stored_as_it_is(
    server: RedisServer, redis: Redis
) -> None:
    async with RedisSessionManager(url=server.url, gzip_over_bytes=0) as manager:
        assert await manager.save_session(session("s"))
        assert await manager.load_session("s") is not None


@pytest.mark.parametrize(
    "broken",
    [
        {"_encoding": "gzip+base64"},
        {"_encoding": "gzip+base64", "_body": "no base64!"},
        {"_encoding": "gzip+base64", "_body": base64.b64encode(b"no gzip").decode()},
        {
            "_encoding": "gzip+base64",
            "_body": base64.b64encode(gzip.compress(b'{"id": 1}')[:-9]).decode(),
        },
        {"_encoding": "gzip+base64", "_body": base64.b64encode(gzip.compress(b"[1]")).decode()},
        {"_encoding": "zstd", "_body": ""},
    ],
)
async def test_a_damaged_compressed_record_is_reported(
    manager: RedisSessionManager, redis: Redis, broken: dict[str, Any]
) -> None:
    await redis.set(f"{PREFIX}session:s", json.dumps({"_schema_version": "2.0", **broken}))

    assert await manager.load_session("s") is None
    assert manager.last_error is not None


# -- listing -----------------------------------------------------------------------------------


async def test_a_listing_asks_for_no_single_session(
    manager: RedisSessionManager, redis: Redis
) -> None:
    await redis.mset({f"{PREFIX}session:{number}": "{}" for number in range(3000)})
    await redis.config_resetstat()

    assert len(await manager.list_sessions()) == 3000

    calls = {name: each["calls"] for name, each in (await redis.info("commandstats")).items()}
    assert calls["cmdstat_scan"] <= 10
    assert not calls.keys() & {"cmdstat_get", "cmdstat_pttl", "cmdstat_exists"}


class _CountingTransport(CoaiaTransport):
    now = most = asked = 0

    async def fetch(self, key: str) -> str | None:
        self.now, self.asked = self.now + 1, self.asked + 1
        self.most = max(self.most, self.now)
        try:
            return await super().fetch(key)
        finally:
            self.now -= 1


@pytest.mark.long("starts the coaia server as a process")
async def test_a_listing_by_the_coaia_tools_asks_for_a_batch_at_once(server: RedisServer) -> None:
    transport = _CountingTransport(server.url, command=command(), instance="one")
    async with RedisSessionManager(transport=transport) as manager:
        for number in range(60):
            assert await manager.save_session(session(f"s{number}"))
        assert await manager.delete_session("s7")
        transport.most = transport.asked = 0
        listed = await manager.list_sessions()
    await transport.close()

    assert len(listed) == 59
    assert transport.most >= 50
    assert transport.asked < 80


# -- the configuration -------------------------------------------------------------------------


def test_the_configuration_is_a_mapping_and_its_times_are_whole_numbers() -> None:
    config = RedisConfig.from_env({"REDIS_TTL_SECONDS": "3600"})

    assert isinstance(config, Mapping)
    assert {**config} == dict(config.items()) == {name: config[name] for name in config}
    assert len(config) == len(list(config))
    assert "host" in config
    assert config.get("nothing") is None
    for seconds in (config.ttl_seconds, config["session_ttl"], config["ttl_seconds"]):
        assert (type(seconds), seconds) == (int, 3600)
    assert (type(config["execution_ttl"]), config["execution_ttl"]) == (int, 3600)
    assert type(RedisConfig().ttl_seconds) is int
    assert RedisConfig(ttl_seconds=0.5).ttl_seconds == 0.5
    assert RedisConfig(ttl_seconds=math.inf).ttl_seconds == math.inf
    assert hash(RedisConfig()) == hash(RedisConfig())
    with pytest.raises(KeyError):
        config["nothing"]


def test_the_start_of_the_coaia_server_has_a_budget_of_its_own() -> None:
    assert RedisConfig().coaia_start_seconds == 30
    config = RedisConfig.from_env(
        {"REDIS_STATE_COAIA_START_SECONDS": "90", "REDIS_STATE_GZIP_OVER_BYTES": "65536"}
    )
    assert (config.coaia_start_seconds, config.gzip_over_bytes) == (90, 65536)
    for name in ("REDIS_STATE_COAIA_START_SECONDS", "REDIS_STATE_GZIP_OVER_BYTES"):
        with pytest.raises(StateValidationError, match=name):
            RedisConfig.from_env({name: "soon"})


def test_the_package_says_what_there_is() -> None:
    for name in ("demo", "journey", "orchestration", "recorder", "redis_state"):
        assert f"``{name}``" in (agent_state_integrations.__doc__ or "")
