"""Two mirrors follow one store: their reads and writes cross, and Redis ends with the newest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from agent_state import MemoryStateStore
from agent_state.protocols import Append, Change, Delete, Document, Key, Origin, Put
from agent_state.redis.mirror_client import MirrorClient
from agent_state.redis.mirror_follower import Follower
from tests.redis.mirrors import mirror_client
from tests.redis.servers import RedisServer

ONE = ("notes", ("one",))
PUT = Put("notes", ("one",), b'{"n":1}', "notes/1")
DELETE = Delete("notes", ("one",))


class InterruptedStore(MemoryStateStore):
    """After the next read of a document, and before its reader has it, ``interrupt`` runs once."""

    interrupt: Callable[[], Awaitable[None]] | None = None

    async def get(self, kind: str, key: Key) -> Document | None:
        document = await super().get(kind, key)
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            await interrupt()
        return document


class Shared:
    """A store, and two followers that have compared it with Redis."""

    def __init__(self, store: InterruptedStore, client: MirrorClient, origin: Origin) -> None:
        self.store, self.client = store, client
        self.first = Follower(store, client, "me", origin)
        self.second = Follower(store, client, "me", origin)

    async def commit(self, follower: Follower, *changes: Change) -> None:
        """A change by the process of this follower."""
        await self.store.commit(changes)
        follower.changed(changes, 0.0)

    async def erase(self, follower: Follower, kind: str, key: Key) -> None:
        await self.store.erase(kind, key)
        follower.erased((kind, key), 0.0)

    async def in_redis(self) -> Document | None:
        return await self.client.get(ONE)


async def send_all(*followers: Follower) -> None:
    """Send what is pending. Redis answers, so a few rounds are enough."""
    for _ in range(10):
        for follower in followers:
            await follower.send_pending(0.0, check=False)
    assert [follower.pending for follower in followers] == [0] * len(followers)


@asynccontextmanager
async def shared(
    server: RedisServer, origin: Origin, before: Sequence[Change] = ()
) -> AsyncIterator[Shared]:
    store = InterruptedStore()
    await store.open()
    await store.commit([Put("notes", ("other",), b"{}", "notes/1"), *before])
    async with mirror_client(server.url) as client:
        both = Shared(store, client, origin)
        for follower in (both.first, both.second):
            await follower.send_pending(0.0, check=True)
            await send_all(follower)
        yield both


SHARED = Origin("me", ("notes",))


async def test_a_process_deletes_what_only_the_other_one_has_mirrored(server: RedisServer) -> None:
    async with shared(server, SHARED) as both:
        await both.commit(both.first, PUT)
        await send_all(both.first)
        await both.commit(both.second, DELETE)
        await send_all(both.second)

        assert await both.in_redis() is None


async def test_a_deletion_overtakes_the_put_of_the_other_process(server: RedisServer) -> None:
    async with shared(server, SHARED) as both:

        async def delete() -> None:
            await both.commit(both.second, DELETE)
            await send_all(both.second)

        await both.commit(both.first, PUT)
        both.store.interrupt = delete
        await send_all(both.first)

        assert await both.in_redis() is None


async def test_the_same_version_again_overtakes_a_deletion_by_the_other_process(
    server: RedisServer,
) -> None:
    async with shared(server, SHARED, [PUT]) as both:

        async def put_again() -> None:
            await both.commit(both.second, PUT)
            await send_all(both.second)

        await both.commit(both.first, DELETE)
        both.store.interrupt = put_again
        await send_all(both.first)

        document = await both.in_redis()
        assert document is not None
        assert document.body == PUT.body


async def test_a_process_erases_what_only_the_other_one_has_mirrored(server: RedisServer) -> None:
    async with shared(server, SHARED) as both:
        await both.commit(both.first, PUT, Append("notes", ("one",), b'{"n":1}'))
        await send_all(both.first)
        await both.erase(both.second, *ONE)
        assert both.second.pending
        await send_all(both.second)

        assert await both.in_redis() is None
        assert await both.client.ends([ONE]) == [None]


async def test_a_rebuild_is_a_second_writer_beside_an_exclusive_process(
    server: RedisServer,
) -> None:
    async with shared(server, Origin("me", ("notes",), exclusive=True)) as both:
        await both.client.load("notes", "me", replace=True)
        rebuild = Follower(both.store, both.client, "me", Origin("me", ("notes",)))
        await both.first.send_pending(0.0, check=True)
        await send_all(both.first)

        async def delete() -> None:
            await both.commit(both.first, DELETE)
            await send_all(both.first)

        await both.store.commit([PUT])
        rebuild.touch(ONE, 0.0)
        both.store.interrupt = delete
        await send_all(rebuild)

        assert await both.in_redis() is None


@pytest.mark.parametrize("exclusive", [False, True])
async def test_a_document_deleted_before_it_was_mirrored_is_noted_only_for_another_process(
    server: RedisServer, exclusive: bool
) -> None:
    async with shared(server, Origin("me", ("notes",), exclusive=exclusive)) as both:
        await both.commit(both.first, PUT)
        await both.commit(both.first, DELETE)
        await send_all(both.first)

        index = await both.client.read_index("notes")
        assert list(index.deleted) == ([] if exclusive else ["one"])
        assert both.first.removed == 0
