"""Live changes as server-sent events, over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.protocols import Notice, NoticeStream
from agent_state.web import EventSettings, LiveBackend, ReadOnlyBackend
from agent_state.web.app import close
from agent_state.web.events import EventFeed
from tests.deadlines import until
from tests.web.client import TOKEN, Client, Events, answering, following


@pytest.fixture
async def manager() -> AsyncIterator[StatePersistenceManager]:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        yield manager


async def _save(manager: StatePersistenceManager, agent_id: str, mood: str = "") -> None:
    await manager.save_agent_state(agent_id, {"agent_id": agent_id, "mood": mood})


WIDE = "ä" * 1800
"""Makes an event of 11 KB, so that those nobody reads soon fill the buffers between."""


def _last(seen: dict[str, str]) -> dict[str, str]:
    return {"Last-Event-ID": seen["id"]}


async def test_what_is_saved_and_removed_is_told(manager: StatePersistenceManager) -> None:
    async with following(LiveBackend(manager=manager)) as events:
        assert (await events.next())["event"] == "ready"
        await _save(manager, "alice")
        saved = await events.named("change")
        await manager.delete("agents", "alice")
        gone = await events.named("gone")

    told = {"kind": "agents", "key": ["alice"], "revision": 1, "outside": False}
    assert json.loads(saved["data"]) == told
    assert json.loads(gone["data"])["key"] == ["alice"]


async def test_only_the_wanted_kinds_and_ids_are_told(manager: StatePersistenceManager) -> None:
    async with answering(LiveBackend(manager=manager)) as client:
        wanted = {"kind": "agents", "of": "bob"}
        async with client.stream("GET", "/api/events", params=wanted) as response:
            events = Events(response)
            await events.named("ready")
            await _save(manager, "alice")
            await manager.save_system_state("bob", {"x": 1})
            await _save(manager, "bob")
            first = await events.named("change")

    assert (json.loads(first["data"])["kind"], json.loads(first["data"])["key"]) == (
        "agents",
        ["bob"],
    )


async def test_the_stream_goes_on_from_the_summary(manager: StatePersistenceManager) -> None:
    """One look is enough: what the answer lacks comes as events, and nothing else does."""
    async with answering(LiveBackend(manager=manager)) as client:
        await client.get("/api/summary")
        await _save(manager, "first")
        summary = await client.get("/api/summary")
        await _save(manager, "second")
        since = {"since": summary.headers["last-event-id"]}
        async with client.stream("GET", "/api/events", params=since) as response:
            event = await Events(response).next()
        async with client.stream(
            "GET", "/api/events", params=since, headers=_last(event)
        ) as response:
            await _save(manager, "third")
            later = await Events(response).next()
        async with client.stream("GET", "/api/events", params={"since": "old-7"}) as response:
            reset = await Events(response).next()

    assert summary.json()["agents"] == 1
    assert [event["event"], json.loads(event["data"])["key"]] == ["change", ["second"]]
    assert json.loads(later["data"])["key"] == ["third"]
    assert reset["event"] == "reset"


async def test_who_comes_back_gets_what_was_missed_in_order(
    manager: StatePersistenceManager,
) -> None:
    async with answering(LiveBackend(manager=manager)) as client:
        async with client.stream("GET", "/api/events") as response:
            events = Events(response)
            await events.named("ready")
            await _save(manager, "first")
            seen = await events.named("change")
        for agent_id in ("second", "third"):
            await _save(manager, agent_id)
        async with client.stream("GET", "/api/events", headers=_last(seen)) as response:
            events = Events(response)
            missed = [await events.next(), await events.next()]

    assert [one["event"] for one in missed] == ["change", "change"]
    assert [json.loads(one["data"])["key"] for one in missed] == [["second"], ["third"]]


async def test_after_a_restart_the_client_is_told_to_look_again(
    manager: StatePersistenceManager,
) -> None:
    async with following(LiveBackend(manager=manager)) as events:
        seen = await events.named("ready")
    async with following(LiveBackend(manager=manager), headers=_last(seen)) as events:
        first = await events.next()

    assert first["event"] == "reset"
    assert first["id"] != seen["id"]


@pytest.mark.parametrize("wrong", ["nonsense", "-", "-5", "x-1"])
async def test_an_id_that_is_none_is_a_reset(manager: StatePersistenceManager, wrong: str) -> None:
    async with following(LiveBackend(manager=manager), headers={"Last-Event-ID": wrong}) as events:
        assert (await events.next())["event"] == "reset"


@pytest.mark.parametrize("number", ["1", "9" * 18, "9" * 19, "-1"])
async def test_an_id_that_this_server_has_not_given_yet_is_a_reset(
    manager: StatePersistenceManager, number: str
) -> None:
    async with answering(LiveBackend(manager=manager)) as client:
        async with client.stream("GET", "/api/events") as response:
            ready = await Events(response).named("ready")
        server = ready["id"].removesuffix("-0")
        wrong = {"Last-Event-ID": f"{server}-{number}"}
        async with client.stream("GET", "/api/events", headers=wrong) as response:
            first = await Events(response).next()

    assert (first["event"], first["id"]) == ("reset", ready["id"])


@pytest.mark.parametrize(("changes", "event"), [(3, "change"), (4, "reset")])
async def test_who_was_away_for_too_long_is_told_to_look_again(
    manager: StatePersistenceManager, changes: int, event: str
) -> None:
    async with answering(
        LiveBackend(manager=manager), events=EventSettings(kept_events=3)
    ) as client:
        async with client.stream("GET", "/api/events") as response:
            events = Events(response)
            seen = last = await events.named("ready")
            for number in range(changes):
                await _save(manager, "alice", str(number))
                last = await events.named("change")
        async with client.stream("GET", "/api/events", headers=_last(seen)) as response:
            first = await Events(response).next()

    assert first["event"] == event
    assert event == "change" or first["id"] == last["id"]


@pytest.mark.parametrize(("changes", "event"), [(3, b"change"), (4, b"reset"), (5, b"reset")])
async def test_a_stream_continues_as_long_as_the_ring_has_all_that_it_missed(
    manager: StatePersistenceManager, changes: int, event: bytes
) -> None:
    async def allowed() -> bool:
        return True

    feed = EventFeed(manager.subscribe, EventSettings(kept_events=3))
    await feed.start()
    slow = feed.stream(None, lambda _: True, allowed)
    quick = feed.stream(None, lambda _: True, allowed)
    assert b"event: ready" in await anext(slow)
    assert b"event: ready" in await anext(quick)
    for number in range(changes):
        await _save(manager, f"agent-{number}")
        assert f"agent-{number}".encode() in await anext(quick)

    missed = await anext(slow)

    assert missed.startswith(b"event: " + event)
    assert missed.count(b"event: ") == (changes if event == b"change" else 1)
    await feed.aclose()


async def test_what_follows_the_store_begins_again_after_an_error(
    manager: StatePersistenceManager, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [KeyError("events"), OSError("out of watches")]

    async def watch() -> NoticeStream:
        if len(broken) == 1:
            raise broken.pop()
        return BrokenNotices(broken.pop(0)) if broken else await manager.subscribe()

    class BrokenNotices:
        """What a store gives that has a fault."""

        def __init__(self, error: Exception) -> None:
            self._error = error

        def __aiter__(self) -> BrokenNotices:
            return self

        async def __anext__(self) -> Notice:
            raise self._error

        async def aclose(self) -> None:
            """Nothing is open."""

    async def allowed() -> bool:
        return True

    feed = EventFeed(watch, EventSettings())
    await feed.start()
    stream = feed.stream(None, lambda _: True, allowed)
    assert b"event: ready" in await anext(stream)
    async with asyncio.timeout(60):
        assert b"event: reset" in await anext(stream)
    await _save(manager, "alice")
    async with asyncio.timeout(60):
        assert b"alice" in await anext(stream)
    assert "KeyError: 'events'" in caplog.text
    assert "out of watches" in caplog.text
    await feed.aclose()


async def test_a_client_that_is_too_slow_loses_its_place_and_is_told(
    manager: StatePersistenceManager,
) -> None:
    async with answering(
        LiveBackend(manager=manager), events=EventSettings(kept_events=200)
    ) as client:
        slow = _plain_stream(client)
        await _until_ready(slow)
        async with client.stream("GET", "/api/events") as response:
            events = Events(response)
            await events.named("ready")
            for number in range(15):
                await asyncio.gather(*(_save(manager, f"{number}-{n}{WIDE}") for n in range(100)))
                for _ in range(100):
                    await events.named("change")
        left = await asyncio.to_thread(_rest, slow)

    assert b"event: reset" in left


async def test_a_client_that_takes_nothing_is_let_go(manager: StatePersistenceManager) -> None:
    async with answering(
        LiveBackend(manager=manager), events=EventSettings(send_timeout_seconds=0.2, max_streams=1)
    ) as client:
        stuck = _plain_stream(client)
        await _until_ready(stuck)
        async with asyncio.timeout(60):
            number = 0
            while True:
                number += 1
                await asyncio.gather(*(_save(manager, f"{number}-{n}{WIDE}") for n in range(100)))
                async with client.stream("GET", "/api/events") as response:
                    if response.status_code == 200:
                        break  # the only place is free again
        stuck.close()


async def test_signs_of_life_move_the_place_on(manager: StatePersistenceManager) -> None:
    async with (
        answering(
            LiveBackend(manager=manager), events=EventSettings(heartbeat_seconds=0.05)
        ) as client,
        client.stream("GET", "/api/events", params={"kind": "mail"}) as response,
    ):
        events = Events(response)
        began = await events.named("ready")
        await _save(manager, "alice")
        alive = await events.next()
        while alive["id"] == began["id"]:
            alive = await events.next()

    assert "event" not in alive
    assert "data" not in alive


async def test_no_more_streams_than_there_may_be(manager: StatePersistenceManager) -> None:
    async with answering(
        LiveBackend(manager=manager), events=EventSettings(max_streams=1)
    ) as client:
        async with client.stream("GET", "/api/events") as response:
            await Events(response).named("ready")
            refused = await client.get("/api/events")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["code"] == "too_many"


async def test_a_stream_that_ends_frees_its_place_and_no_other(
    manager: StatePersistenceManager,
) -> None:
    async with answering(
        LiveBackend(manager=manager), events=EventSettings(max_streams=2)
    ) as client:
        feed = client.app.state.feed
        async with client.stream("GET", "/api/events") as lasting:
            assert lasting.headers["x-accel-buffering"] == "no"  # a proxy holds no event back
            for _ in range(3):
                async with client.stream("GET", "/api/events"):
                    assert (await client.get("/api/events")).status_code == 503
                await until(lambda: feed._free_streams)
                assert feed._free_streams == 1


async def test_a_server_that_ends_ends_its_streams(manager: StatePersistenceManager) -> None:
    ready = asyncio.Event()

    async def until_it_ends(client: Client) -> dict[str, Any]:
        async with client.stream("GET", "/api/events") as response:
            events = Events(response)
            await events.named("ready")
            ready.set()
            return await events.next()

    async with asyncio.timeout(60):
        async with answering(LiveBackend(manager=manager)) as client:
            ending = asyncio.create_task(until_it_ends(client))
            await ready.wait()
            await close(client.app)
            assert await ending == {}


async def test_a_directory_of_another_process_is_followed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    async with ReadOnlyBackend(tmp_path / "state") as directory, following(directory) as events:
        await events.named("ready")
        async with StatePersistenceManager(tmp_path / "state") as other:
            await _save(other, "alice")
        told = await events.named("change")

    assert json.loads(told["data"]) == {
        "kind": "agents",
        "key": ["alice"],
        "revision": 0,  # not known
        "outside": True,
    }


def _plain_stream(client: httpx.AsyncClient) -> socket.socket:
    """A client that reads only when it is told to."""
    url = client.base_url
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect((url.host, url.port or 80))
    plain.sendall(
        f"GET /api/events HTTP/1.1\r\nHost: {url.host}\r\n"
        f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
    )
    return plain


async def _until_ready(plain: socket.socket) -> None:
    def read() -> None:
        text = b""
        while b"event: ready" not in text:
            text += plain.recv(4096)

    await asyncio.to_thread(read)


def _rest(plain: socket.socket) -> bytes:
    plain.settimeout(2)
    text = b""
    try:
        while b"event: reset" not in text:
            text += plain.recv(1 << 20)
    except TimeoutError:
        pass
    plain.close()
    return text
