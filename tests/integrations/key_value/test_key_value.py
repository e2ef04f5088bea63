"""py-key-value's entries in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from key_value.aio.errors import InvalidTTLError, SerializationError
from key_value.aio.protocols.key_value import AsyncKeyValue
from key_value.aio.wrappers.prefix_keys import PrefixKeysWrapper

from agent_state import StatePersistenceManager
from agent_state_integrations.key_value import KIND, AgentStateKeyValueStore
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
    writer,
)


@pytest.fixture(params=STATES)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateKeyValueStore]:
    async with state_of(request.param, tmp_path) as state, AgentStateKeyValueStore(state) as made:
        yield made


async def test_entries(store: AgentStateKeyValueStore) -> None:
    assert isinstance(store, AsyncKeyValue)
    value: dict[str, Any] = {"b": [1, {"x": None}]}
    await store.put("k", value)
    value["b"].append("changed")
    got = await store.get("k")
    assert got == {"b": [1, {"x": None}]}
    got["b"].append("changed")

    assert await store.get("k") == {"b": [1, {"x": None}]}
    assert await store.get("k", collection="") == await store.get("k", collection=None)
    assert await store.get("k", collection="default_collection") == {"b": [1, {"x": None}]}
    assert await store.get("k", collection="other") is None
    assert await store.delete("k")
    assert not await store.delete("k")
    assert await store.ttl("k") == (None, None)


async def test_many_entries_are_put_together(store: AgentStateKeyValueStore) -> None:
    await store.put_many(["a", "b"], [{"n": 1}, {"n": 2}], ttl=60)
    with pytest.raises(SerializationError):
        await store.put_many(["a", "c"], [{"n": 3}, {"n": object()}])

    assert await store.get_many(["a", "b", "c"]) == [{"n": 1}, {"n": 2}, None]
    assert [0 < (each[1] or 0) <= 60 for each in await store.ttl_many(["a", "b"])] == [True, True]
    assert await store.delete_many(["a", "b", "c"]) == 2


async def test_expired_entries_are_gone_and_culled(tmp_path: Path) -> None:
    async with (
        StatePersistenceManager(tmp_path) as manager,
        AgentStateKeyValueStore(manager) as store,
    ):
        await store.put("short", {"n": 1}, ttl=0.01)
        await store.put("long", {"n": 2}, ttl=600)
        expired = await manager.load(KIND, ("default_collection", "short"))
        assert expired is not None
        await asyncio.sleep(0.02)

        assert await store.get("short") is None
        assert await store.delete("short")
        await store.put("short", {"n": 1}, ttl=0.01)
        await asyncio.sleep(0.02)
        await store.cull()
        assert await manager.keys(KIND) == [("default_collection", "long")]


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), True, "text"])
async def test_a_ttl_that_is_no_time_is_refused(store: AgentStateKeyValueStore, ttl: Any) -> None:
    with pytest.raises((InvalidTTLError, TypeError, ValueError, OverflowError)):
        await store.put("k", {"n": 1}, ttl=ttl)

    assert await store.get("k") is None


async def test_every_key_and_collection_is_its_own(store: AgentStateKeyValueStore) -> None:
    for name in HOSTILE:
        await store.put(name, {"key": name})
        await store.put("k", {"collection": name}, collection=f"c{name}")

    for name in HOSTILE:
        assert await store.get(name) == {"key": name}
        assert await store.get("k", collection=f"c{name}") == {"collection": name}
    assert sorted(await store.keys()) == sorted(HOSTILE)
    assert {f"c{name}" for name in HOSTILE} < {*await store.collections()}
    await store.destroy_collection("c..")
    assert await store.get("k", collection="c..") is None
    await store.destroy()
    assert await store.collections() == []


async def test_the_wrappers_of_the_library_work_on_it(store: AgentStateKeyValueStore) -> None:
    wrapped = PrefixKeysWrapper(store, prefix="p")
    await wrapped.put("k", {"n": 1})

    assert await wrapped.get("k") == {"n": 1}
    assert await store.get("k") is None


async def test_an_entry_is_put_unless_there_is_one(store: AgentStateKeyValueStore) -> None:
    claims = (store.put_if_absent("k", {"by": n}, ttl=100) for n in range(20))
    assert sorted(await asyncio.gather(*claims)) == [False] * 19 + [True]

    value, ttl = await store.ttl("k")
    assert value is not None
    assert ttl is not None
    assert 0 < ttl <= 100
    assert not await store.put_if_absent("k", {"by": "late"})
    assert await store.get("k") == value
    with pytest.raises(SerializationError):
        await store.put_if_absent("other", {"value": object()})
    with pytest.raises(InvalidTTLError):
        await store.put_if_absent("other", {}, ttl=-1)
    await store.delete("k")
    assert await store.put_if_absent("k", {"by": "next"})


async def test_an_expired_entry_is_absent(tmp_path: Path) -> None:
    async with AgentStateKeyValueStore(tmp_path) as store:
        await store.put("k", {"n": 1}, ttl=0.001)
        await asyncio.sleep(0.002)
        assert await store.put_if_absent("k", {"n": 2})
        assert await store.get("k") == {"n": 2}


def test_eight_processes_put_at_once(tmp_path: Path) -> None:
    run_at_once(
        writer(
            AgentStateKeyValueStore,
            tmp_path,
            times=10,
            body="""
await it.put("same", {"n": n})
await it.put(f"{sys.argv[1]}-{n}", {"n": n})
""",
        ),
        8,
    )

    async def read() -> Any:
        async with AgentStateKeyValueStore(tmp_path) as store:
            return await store.keys()

    assert len(asyncio.run(read())) == 81


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    lines = kill_after_lines(
        writer(
            AgentStateKeyValueStore,
            tmp_path,
            body='await it.put_many(["a", "b"], [{"n": n}, {"n": n}])',
        ),
        15,
    )

    async def read() -> Any:
        async with AgentStateKeyValueStore(tmp_path) as store:
            return await store.get_many(["a", "b"])

    one, other = asyncio.run(read())
    assert one == other
    assert one["n"] >= int(lines[-1])


async def test_a_cancelled_put_is_whole(tmp_path: Path) -> None:
    async with AgentStateKeyValueStore(tmp_path) as store:
        await store.put_many(["a", "b"], [{"n": 1}, {"n": 1}])
        await cancel_soon(store.put_many(["a", "b"], [{"n": 2}, {"n": 2}]))
        one, other = await store.get_many(["a", "b"])

        assert one == other


async def test_ten_thousand_entries(tmp_path: Path) -> None:
    async with state_of("exclusive", tmp_path) as state, AgentStateKeyValueStore(state) as store:
        names = [str(n) for n in range(10_000)]
        for start in range(0, 10_000, 1000):
            some = names[start : start + 1000]
            await store.put_many(some, [{"n": name} for name in some])

        assert len(await store.keys()) == 10_000
        assert await store.get("9999") == {"n": "9999"}
