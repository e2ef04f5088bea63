"""What a mirror holds, while nothing goes wrong."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agent_state import MemoryStateStore, MirrorError, StatePersistenceManager
from agent_state.protocols import Append, Document, Key, Origin, Put
from agent_state.redis import RedisMirror
from agent_state.redis.mirror_follower import Follower
from agent_state_integrations.recorder import Recorder
from tests.redis.mirrors import (
    caught_up,
    client,
    compare,
    mirror,
    mirror_client,
    mirrored,
    status,
    until,
)
from tests.redis.servers import RedisServer


async def test_a_saved_document_is_readable_json_in_redis(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await manager.save("agents", "alice", {"agent_id": "alice", "mood": "good"})
        await caught_up(manager)
        async with client(server.url) as redis:
            fields = await redis.hgetall("app:state:{agents}:alice")

    assert json.loads(fields[b"body"])["mood"] == "good"
    assert (fields[b"revision"], fields[b"schema"]) == (b"1", b"agents/1")
    assert set(fields) == {b"body", b"revision", b"schema", b"saved_at", b"checksum"}


@pytest.mark.parametrize("exclusive", [True, False])
async def test_everything_is_on_both_sides_after_close(
    server: RedisServer, tmp_path: Path, exclusive: bool
) -> None:
    async with mirrored(tmp_path / "state", server.url, exclusive=exclusive) as manager:
        for number in range(150):
            await manager.save("notes", ("a/b", f"n{number}"), {"n": number})
        await manager.delete("notes", ("a/b", "n7"))
        for number in range(600):
            await manager.append("events", "log", {"n": number}, dedupe_key=str(number))

    compared = await compare(server.url, tmp_path / "state")
    assert compared.ok
    assert (compared.documents, compared.logs) == (149, 1)


async def test_many_saves_of_a_document_are_sent_as_few(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url, interval_seconds=60.0) as manager:
        await until(lambda: status(manager).state == "following")
        for number in range(100):
            await manager.save("notes", "one", {"n": number})

    assert status(manager).sent <= 2
    assert (await compare(server.url, tmp_path / "state")).ok


async def test_a_document_deleted_and_made_anew_counts_from_one_again(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url, exclusive=False) as manager:
        for number in range(5):
            await manager.save("notes", "one", {"n": number})
        await caught_up(manager)
        await manager.delete("notes", "one")
        await manager.save("notes", "one", {"n": "anew"})
        assert (await manager.load_with_revision("notes", "one")).revision == 1  # type: ignore[union-attr]
        await caught_up(manager)
        async with client(server.url) as redis:
            fields = await redis.hgetall("app:state:{notes}:one")

    assert json.loads(fields[b"body"]) == {"n": "anew"}
    assert (await compare(server.url, tmp_path / "state")).ok


async def test_an_edit_by_hand_is_mirrored(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url, exclusive=False) as manager:
        await manager.save("notes", "one", {"n": 1})
        await caught_up(manager)
        path = tmp_path / "state" / "notes" / "one.json"
        path.write_text(path.read_text().replace('"n": 1', '"n": 2'))
        async with client(server.url) as redis:
            while b'"n":2' not in await redis.hget("app:state:{notes}:one", "body"):
                await asyncio.sleep(0.01)

    assert (await compare(server.url, tmp_path / "state")).ok


async def test_each_change_is_told_in_a_stream(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await manager.save("notes", "one", {"n": 1})
        await caught_up(manager)
        await manager.delete("notes", "one")
        await caught_up(manager)
        async with client(server.url) as redis:
            told = [fields for _, fields in await redis.xrange("app:changes:{notes}")]

    assert told == [
        {b"key": b"one", b"revision": b"1"},
        {b"key": b"one", b"revision": b"gone"},
    ]


async def test_a_ttl_is_on_every_key_of_its_kind_and_slides_with_each_write(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url, ttl_seconds={"notes": 500.0}) as manager:
        await manager.save("notes", "one", {"n": 1})
        await manager.append("notes", "log", {"n": 1})
        await manager.save("others", "one", {"n": 1})
        await caught_up(manager)
        async with client(server.url) as redis:
            await redis.expire("app:state:{notes}:one", 10)
            await manager.save("notes", "one", {"n": 2})
            await caught_up(manager)
            ttls = {key: await redis.ttl(key) async for key in redis.scan_iter("app:*")}

    kept = {key for key, ttl in ttls.items() if ttl == -1}
    assert {key for key in ttls if b"{notes}" in key}
    assert not {key for key in kept if b"{notes}" in key}
    assert {key for key in ttls if b"{others}" in key} <= kept
    assert ttls[b"app:state:{notes}:one"] > 400


async def test_what_went_by_its_ttl_is_no_difference_and_not_sent_again(
    server: RedisServer, tmp_path: Path
) -> None:
    # An index lasts ten check intervals after a mirror has looked at it.
    settings: dict[str, Any] = {"ttl_seconds": {"notes": 0.05}, "check_interval_seconds": 60.0}
    async with mirrored(tmp_path / "state", server.url, **settings) as manager:
        await manager.save("notes", "one", {"n": 1})
        await caught_up(manager)
        async with client(server.url) as redis:
            while await redis.exists("app:state:{notes}:one"):
                await asyncio.sleep(0.01)
        sent = status(manager).sent
    async with mirrored(tmp_path / "state", server.url, **settings) as again:
        await caught_up(again)
        compared = await compare(server.url, tmp_path / "state")

        assert sent == 1
        assert status(again).sent == 0
        assert compared.ok
        assert compared.expired == ["notes/one"]


async def test_what_changed_without_a_mirror_is_found_by_comparing(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        for name in ("same", "changed", "deleted"):
            await manager.save("notes", name, {"n": 1})
    async with StatePersistenceManager(tmp_path / "state") as plain:
        await plain.save("notes", "changed", {"n": 2})
        await plain.save("notes", "new", {"n": 1})
        await plain.delete("notes", "deleted")
        await plain.append("events", "log", {"n": 1})
    async with mirrored(tmp_path / "state", server.url) as manager:
        await caught_up(manager)
        found = status(manager)

    assert (found.sent, found.removed, found.records) == (2, 1, 1)
    assert (await compare(server.url, tmp_path / "state")).ok


async def test_another_directory_under_the_same_prefix_is_refused(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "one", server.url) as manager:
        await manager.save("notes", "mine", {"n": 1})
    other = mirrored(tmp_path / "two", server.url)

    with pytest.raises(MirrorError, match="another state directory"):
        await other.open()

    async with StatePersistenceManager(tmp_path / "two", exclusive=True):
        pass  # nothing of it was left open
    async with mirrored(tmp_path / "two", server.url, prefix="other:") as manager:
        await manager.save("notes", "mine", {"n": 2})
    assert (await compare(server.url, tmp_path / "one")).ok
    assert (await compare(server.url, tmp_path / "two", prefix="other:")).ok


async def test_a_store_without_a_directory_says_whose_copy_it_is(server: RedisServer) -> None:
    store = MemoryStateStore()
    with pytest.raises(MirrorError, match="instance="):
        await StatePersistenceManager(store=store, mirror=mirror(server.url)).open()
    named = StatePersistenceManager(store=store, mirror=mirror(server.url, instance="mine"))
    async with named:
        await named.save("notes", "one", {"n": 1})
        await caught_up(named)
        assert status(named).sent == 1


async def test_the_state_of_the_mirror_is_in_the_system_state_and_is_not_mirrored(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await manager.save("notes", "one", {"n": 1})
        await until((tmp_path / "state" / ".runtime" / "mirror.json").exists)
        await caught_up(manager)
    async with client(server.url) as redis:
        assert not await redis.exists("app:state:{system}:mirror")
    state = json.loads((tmp_path / "state" / ".runtime" / "mirror.json").read_text())

    assert (state["state"], state["waiting"], state["sent"]) == ("closed", 0, 1)
    assert (await compare(server.url, tmp_path / "state")).ok


async def test_a_mirror_is_used_again_after_close(server: RedisServer, tmp_path: Path) -> None:
    manager = mirrored(tmp_path / "state", server.url)
    for number in range(2):
        async with manager:
            await manager.save("notes", f"n{number}", {"n": number})
    assert (await compare(server.url, tmp_path / "state")).ok


def test_a_url_or_prefix_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="scheme"):
        RedisMirror("nothing")
    with pytest.raises(ValueError, match="brace"):
        RedisMirror("redis://localhost", prefix="{a}")


async def test_what_is_erased_is_erased_there_too(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        for name in ("alice", "bob"):
            await manager.save("tasks", (name, "one"), {"agent_id": name, "task_id": "one"})
            for number in range(3):
                await manager.append("tasks", (name, "archive"), {"n": number})
        await caught_up(manager)
        await manager.erase("tasks", "alice")
        await manager.append("tasks", ("alice", "archive"), {"n": "begun anew"})
        await caught_up(manager)
        async with client(server.url) as redis:
            keys = sorted([key async for key in redis.scan_iter("app:*:{tasks}:*")])
            records = await redis.xrange("app:log:{tasks}:alice/archive")
        assert (await compare(server.url, tmp_path / "state")).ok
        await manager.erase("tasks", "bob")

    assert keys == [
        b"app:log:{tasks}:alice/archive",
        b"app:log:{tasks}:bob/archive",
        b"app:state:{tasks}:bob/one",
    ]
    assert [fields[b"body"] for _, fields in records] == [b'{"n":"begun anew"}']
    compared = await compare(server.url, tmp_path / "state")
    assert compared.ok
    assert (compared.documents, compared.logs) == (0, 1)


async def test_what_is_erased_while_redis_is_away_is_erased_there_later(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await manager.save("notes", "one", {"n": 1})
        await manager.append("notes", "one", {"n": 1})
    server.stop()
    quick: dict[str, Any] = {"timeout_seconds": 0.5, "drain_seconds": 0.1}
    async with mirrored(tmp_path / "state", server.url, **quick) as manager:
        await manager.erase("notes", "one")
        assert status(manager).state == "away"
    server.go_on()
    async with mirrored(tmp_path / "state", server.url) as manager:
        await caught_up(manager)
    async with client(server.url) as redis:
        assert not await redis.exists("app:state:{notes}:one", "app:log:{notes}:one")
    assert (await compare(server.url, tmp_path / "state")).ok


async def test_a_recording_is_left_alone(server: RedisServer, tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with mirrored(root, server.url) as manager, Recorder(root) as recorder:
        await recorder.record({"sender_id": "ann", "content": "hello"})
        await manager.save("notes", "one", {"n": 1})
    async with mirrored(root, server.url) as manager:  # and where it was there at the start
        await manager.save("notes", "two", {"n": 2})

    compared = await compare(server.url, root)
    assert compared.ok
    assert (compared.documents, compared.logs) == (2, 0)
    async with client(server.url) as redis:
        assert not [key async for key in redis.scan_iter("*record*")]


class _ChangedWhileRead(MemoryStateStore):
    """While a document is read, ``change`` happens once."""

    change: Append | None = None
    follower: Follower | None = None

    async def get(self, kind: str, key: Key) -> Document | None:
        change, self.change = self.change, None
        if change is not None and self.follower is not None:
            await self.commit([change])
            self.follower.changed([change], 0.0)
        return await super().get(kind, key)


async def test_a_log_of_a_new_kind_that_begins_while_documents_are_sent_is_mirrored(
    server: RedisServer,
) -> None:
    store = _ChangedWhileRead()
    await store.open()
    async with mirror_client(server.url) as one:
        store.follower = follower = Follower(store, one, "me", Origin("me"))
        store.change = Append("events", ("log",), b'{"n":1}')
        await store.commit([Put("notes", ("one",), b'{"n":1}', "notes/1")])
        follower.changed([Put("notes", ("one",), b'{"n":1}', "notes/1")], 0.0)

        await follower.send_pending(0.0, check=False)
        assert follower.pending == 1
        await follower.send_pending(0.0, check=False)

        assert follower.pending == 0
        assert await one.ends([("events", ("log",))]) == [1]


async def test_a_notice_about_a_recording_is_ignored(server: RedisServer) -> None:
    store = MemoryStateStore()
    await store.open()
    await store.commit([Put("record", ("index",), b"{}", "record/1")])
    async with mirror_client(server.url) as one:
        follower = Follower(store, one, "me", Origin("me"))
        follower.touch(("record", ("index",)), 0.0)
        await follower.send_pending(0.0, check=False)

        assert follower.sent == 0
        assert await one.kinds() == []
