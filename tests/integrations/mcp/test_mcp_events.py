"""Events of MCP servers in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from mcp_types import JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.testing import FakeClock
from agent_state_integrations.mcp import AgentStateEventStore
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
)


def message(n: int) -> JSONRPCNotification:
    return JSONRPCNotification(
        jsonrpc="2.0", method="notifications/n", params={"n": n, "none": None}
    )


async def replayed(store: AgentStateEventStore, event_id: str) -> tuple[str | None, list[Any]]:
    found: list[Any] = []

    async def collect(event: Any) -> None:
        found.append((event.event_id, event.message))

    return await store.replay_events_after(event_id, collect), found


@pytest.fixture(params=STATES)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateEventStore]:
    async with state_of(request.param, tmp_path) as state, AgentStateEventStore(state) as made:
        yield made


async def test_what_followed_in_the_stream_is_replayed(store: AgentStateEventStore) -> None:
    priming = await store.store_event("one", None)
    first = await store.store_event("one", message(1))
    await store.store_event("other", message(2))
    await store.store_event("one", None)
    response = JSONRPCResponse(jsonrpc="2.0", id=7, result={"tools": []})
    last = await store.store_event("one", response)

    assert await replayed(store, priming) == ("one", [(first, message(1)), (last, response)])
    assert await replayed(store, first) == ("one", [(last, response)])
    assert await replayed(store, last) == ("one", [])


@pytest.mark.parametrize(
    "event_id", ["", "nonsense", "2020-01-01/1", "2999-01-01/1", "../..", "2026-01-01/0"]
)
async def test_an_unknown_id_replays_nothing(store: AgentStateEventStore, event_id: str) -> None:
    await store.store_event("one", message(1))

    assert await replayed(store, event_id) == (None, [])


async def test_every_stream_is_its_own(store: AgentStateEventStore) -> None:
    ids = {name: await store.store_event(name, None) for name in HOSTILE}
    for n, name in enumerate(HOSTILE):
        await store.store_event(name, message(n))

    for n, name in enumerate(HOSTILE):
        stream, events = await replayed(store, ids[name])
        assert stream == name
        assert [each for _, each in events] == [message(n)]


async def test_events_are_replayed_over_midnight_and_forgotten_later(fake_clock: FakeClock) -> None:
    manager = StatePersistenceManager(store=MemoryStateStore(clock=fake_clock), clock=fake_clock)
    store = AgentStateEventStore(manager, keep_days=2)
    first = await store.store_event("s", message(1))
    await fake_clock.advance(24 * 3600)
    second = await store.store_event("s", message(2))
    assert await replayed(store, first) == ("s", [(second, message(2))])
    await fake_clock.advance(48 * 3600)
    third = await store.store_event("s", message(3))

    assert await replayed(store, first) == (None, [])
    assert await replayed(store, second) == ("s", [(third, message(3))])
    with pytest.raises(ValueError, match="a day at least"):
        AgentStateEventStore(manager, keep_days=0)


async def test_a_request_comes_back_as_a_request(store: AgentStateEventStore) -> None:
    request = JSONRPCRequest(
        jsonrpc="2.0", id="a", method="sampling/createMessage", params={"x": 1}
    )
    before = await store.store_event("s", None)
    await store.store_event("s", request)

    [(_, got)] = (await replayed(store, before))[1]
    assert got == request
    assert type(got) is type(request)


def test_eight_processes_store_at_once_and_nothing_is_lost_by_kill_9(tmp_path: Path) -> None:
    program = f"""
import asyncio, itertools, sys
from mcp_types import JSONRPCNotification
from agent_state_integrations.mcp import AgentStateEventStore
async def main():
    name = (sys.argv + ["killed"])[1]
    async with AgentStateEventStore({str(tmp_path)!r}) as store:
        print(await store.store_event(name, None), flush=True)
        for n in range(10) if name != "killed" else itertools.count():
            event = JSONRPCNotification(jsonrpc="2.0", method="n", params={{"n": n}})
            print(await store.store_event(name, event), flush=True)
asyncio.run(main())
"""
    run_at_once(program, 8)
    ids = kill_after_lines(program, 12)

    async def check() -> None:
        async with AgentStateEventStore(tmp_path) as store:
            stream, events = await replayed(store, ids[0])
            assert stream == "killed"
            assert [event_id for event_id, _ in events][: len(ids) - 1] == ids[1:]

    asyncio.run(check())


async def test_a_cancelled_event_is_whole(tmp_path: Path) -> None:
    async with AgentStateEventStore(tmp_path) as store:
        first = await store.store_event("s", None)
        await cancel_soon(store.store_event("s", message(1)))
        last = await store.store_event("s", message(2))
        events = (await replayed(store, first))[1]

        assert events[-1] == (last, message(2))
        assert [each for _, each in events[:-1]] in ([], [message(1)])


async def test_ten_thousand_events(tmp_path: Path) -> None:
    async with state_of("exclusive", tmp_path) as state:
        store = AgentStateEventStore(state)
        ids = []
        for start in range(0, 10_000, 500):
            some = (store.store_event("s", message(n)) for n in range(start, start + 500))
            ids += await asyncio.gather(*some)

        assert len((await replayed(store, ids[0]))[1]) == 9_999
        assert len((await replayed(store, ids[9_989]))[1]) == 10
