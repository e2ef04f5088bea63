"""LangGraph's long-term memory in a state directory."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import (
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
)

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.testing import FakeClock
from agent_state_integrations.langgraph import AgentStateStore

WORDS = ("cat", "dog", "bread", "wine")


def embed(texts: list[str]) -> list[list[float]]:
    """How often each of the words is in a text."""
    return [[float(text.count(word)) for word in WORDS] for text in texts]


@pytest.fixture(params=["directory", "shared", "exclusive", "memory"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, fake_clock: FakeClock
) -> AsyncIterator[AgentStateStore]:
    index: Any = {"dims": 4, "embed": embed, "fields": ["text"]}
    if request.param == "directory":
        async with AgentStateStore(tmp_path, index=index) as made:
            yield made
    elif request.param == "memory":
        yield AgentStateStore(MemoryStateStore(), index=index)
    else:
        exclusive = request.param == "exclusive"
        async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
            yield AgentStateStore(manager, index=index)


async def test_an_item_comes_back_with_its_times(store: AgentStateStore) -> None:
    value: dict[str, Any] = {"b": [1, {"z": 1, "a": 2}], "a": None}
    await store.aput(("users", "1"), "prefs", value)
    value["b"].append("changed")
    first = await store.aget(("users", "1"), "prefs")
    await store.aput(("users", "1"), "prefs", {"n": 2})
    second = await store.aget(("users", "1"), "prefs")

    assert first is not None
    assert second is not None
    assert first.value == {"b": [1, {"z": 1, "a": 2}], "a": None}
    assert [*first.value] == ["b", "a"]
    assert second.value == {"n": 2}
    assert first.created_at == second.created_at
    assert second.updated_at > first.updated_at
    assert first.created_at.utcoffset() == timedelta(0)
    await store.adelete(("users", "1"), "prefs")
    await store.adelete(("users", "1"), "prefs")
    assert await store.aget(("users", "1"), "prefs") is None


async def test_a_batch_reads_what_was_before_it_and_the_last_put_wins(
    store: AgentStateStore,
) -> None:
    await store.aput(("a",), "k", {"n": 1})

    got, _, _, found, _ = await store.abatch(
        [
            GetOp(("a",), "k"),
            PutOp(("a",), "k", {"n": 2}),
            PutOp(("a",), "k", {"n": 3}),
            SearchOp(("a",)),
            PutOp(("b",), "new", {"n": 4}),
        ]
    )

    assert got.value == {"n": 1}
    assert [item.value for item in found] == [{"n": 1}]
    assert (await store.aget(("a",), "k")).value == {"n": 3}
    assert (await store.aget(("b",), "new")).value == {"n": 4}


@pytest.mark.parametrize("key", ["", "..", "a/b", "A", "a", "con", "x" * 300, "\0", "é", "a.json"])
async def test_every_key_is_an_item_of_its_own(store: AgentStateStore, key: str) -> None:
    await store.aput(("ns",), "another", {"key": None})
    await store.aput(("ns",), key, {"key": key})

    assert (await store.aget(("ns",), key)).value == {"key": key}
    assert key in [item.key for item in await store.asearch(("ns",))]


@pytest.mark.parametrize("namespace", [(), ("langgraph",), ("a.b",), ("",), ("a", 1)])
async def test_a_namespace_that_no_store_takes_is_refused(
    store: AgentStateStore, namespace: Any
) -> None:
    with pytest.raises(InvalidNamespaceError):
        await store.aput(namespace, "k", {})


async def test_search_filters_and_pages(store: AgentStateStore) -> None:
    for n in range(6):
        await store.aput(("a", str(n % 2)), str(n), {"n": n, "even": n % 2 == 0, "sub": {"x": n}})
    await store.aput(("ab",), "other", {"n": 0})

    async def keys(**search: Any) -> list[str]:
        return [item.key for item in await store.asearch(("a",), **search)]

    assert await keys() == ["5", "4", "3", "2", "1", "0"]
    assert await keys(filter={"even": True}) == ["4", "2", "0"]
    assert await keys(filter={"n": {"$gt": 1, "$lte": 4}}) == ["4", "3", "2"]
    assert await keys(filter={"sub": {"x": 3}}) == ["3"]
    assert await keys(filter={"missing": {"$ne": 1}}, limit=2, offset=1) == ["4", "3"]
    assert await keys(filter={"missing": {"$lt": 1}}) == []
    with pytest.raises(ValueError, match="operator"):
        await keys(filter={"n": {"$in": [1]}})


async def test_search_by_meaning(store: AgentStateStore) -> None:
    await store.aput(("a",), "cats", {"text": "cat cat dog"})
    await store.aput(("a",), "food", {"text": "bread and wine"})
    await store.aput(("a",), "unindexed", {"text": "cat"}, index=False)
    await store.aput(("a",), "other", {"title": "wine", "text": "dog"}, index=["title", "text"])

    found = await store.asearch(("a",), query="cat")

    assert [item.key for item in found][:1] == ["cats"]
    assert found[0].score == pytest.approx(2 / 5**0.5)
    assert [item.key for item in found if item.score is None] == ["unindexed"]
    assert (await store.asearch(("a",), query="wine", limit=1))[0].key == "other"
    await store.aput(("a",), "cats", {"text": "bread"})
    assert (await store.asearch(("a",), query="bread", limit=1))[0].key == "cats"


async def test_namespaces_are_listed(store: AgentStateStore) -> None:
    for namespace in [("a", "b", "c"), ("a", "b"), ("a", "x", "c"), ("z",)]:
        await store.aput(namespace, "k", {})
    await store.aget(("missing",), "k")

    assert await store.alist_namespaces() == [("a", "b"), ("a", "b", "c"), ("a", "x", "c"), ("z",)]
    assert await store.alist_namespaces(prefix=("a", "*"), suffix=("c",)) == [
        ("a", "b", "c"),
        ("a", "x", "c"),
    ]
    assert await store.alist_namespaces(max_depth=2, limit=2, offset=1) == [("a", "x"), ("z",)]
    odd: Any = MatchCondition("middle", ("a",))
    with pytest.raises(ValueError, match="kind of match"):
        await store.abatch([ListNamespacesOp(match_conditions=(odd,))])


async def test_items_expire_and_reading_lets_them_live_on(fake_clock: FakeClock) -> None:
    manager = StatePersistenceManager(store=MemoryStateStore(clock=fake_clock), clock=fake_clock)
    store = AgentStateStore(manager, ttl={"default_ttl": 10, "sweep_interval_minutes": 60})
    await store.aput(("a",), "default", {})
    await store.aput(("a",), "never", {}, ttl=None)
    await store.aput(("b",), "short", {}, ttl=0.5)
    await fake_clock.advance(60)
    assert await store.aget(("b",), "short") is None
    assert await store.alist_namespaces() == [("a",)]
    await fake_clock.advance(500)
    assert await store.aget(("a",), "default") is not None  # and lives for ten minutes more
    await fake_clock.advance(500)
    assert await store.aget(("a",), "default", refresh_ttl=False) is not None
    await fake_clock.advance(100)
    assert [item.key for item in await store.asearch(("a",))] == ["never"]
    assert len(await manager.keys("langgraph_items")) == 3
    await fake_clock.advance(3600)
    await store.aput(("a",), "more", {}, ttl=None)  # an hour has passed: the expired are removed
    assert sorted(key[-1] for key in await manager.keys("langgraph_items")) == ["more", "never"]


async def test_what_is_not_json_comes_back_too(store: AgentStateStore) -> None:
    await store.aput(("a",), "k", {"raw": b"\x00", "set": {1}})

    assert (await store.aget(("a",), "k")).value == {"raw": b"\x00", "set": {1}}


async def test_eight_writers_at_once(store: AgentStateStore) -> None:
    async def write(writer: int) -> None:
        for n in range(10):
            await store.aput(("shared",), str(n), {"writer": writer})
            await store.aput(("own", str(writer)), str(n), {"n": n})

    await asyncio.gather(*map(write, range(8)))

    assert len(await store.asearch(("shared",), limit=100)) == 10
    assert len(await store.asearch(("own",), limit=100)) == 80


def test_a_batch_survives_kill_9_whole(tmp_path: Path) -> None:
    program = f"""
import itertools
from langgraph.store.base import PutOp
from agent_state_integrations.langgraph import AgentStateStore
store = AgentStateStore({str(tmp_path)!r})
for n in itertools.count():
    store.batch([PutOp(("a",), name, {{"n": n}}) for name in ("one", "two", "three")])
    print(n, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += map(int, writer.stdout.read().split())
    writer.wait()
    writer.stdout.close()

    with AgentStateStore(tmp_path) as store:
        numbers = {item.value["n"] for item in store.search(("a",))}
    assert len(numbers) == 1
    assert numbers.pop() >= acknowledged[-1]


async def test_a_cancelled_put_is_whole(tmp_path: Path) -> None:
    async with AgentStateStore(tmp_path) as store:
        await store.aput(("a",), "k", {"n": 1})
        writing = asyncio.create_task(store.aput(("a",), "k", {"n": 2}))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await store.aput(("a",), "other", {})

        assert (await store.aget(("a",), "k")).value["n"] in (1, 2)


@pytest.mark.long("10,000 items")
async def test_ten_thousand_items(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        store = AgentStateStore(manager)
        for start in range(0, 10_000, 500):
            await store.abatch(
                [PutOp(("a", str(n % 10)), str(n), {"n": n}) for n in range(start, start + 500)]
            )

        assert len(await store.alist_namespaces()) == 10
        found = await store.asearch(("a",), filter={"n": {"$gte": 9_990}}, limit=100)
        assert len(found) == 10
