"""One turn of the mirror, disturbed at every await: documents, logs and kinds come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager, WALStateStore
from agent_state.protocols import Append, Delete, Put
from agent_state.redis.mirror_client import MirrorClient
from agent_state.redis.mirror_follower import Follower
from agent_state.storage.directory import ensure_instance
from tests.redis.mirrors import PREFIX, caught_up, compare, mirrored, status, until
from tests.redis.servers import RedisServer

Disturb = Callable[[], Awaitable[None]]


class Disturbed:
    """A coroutine that is held at its n-th await until something else was done."""

    def __init__(self, work: Coroutine[Any, Any, None], at: int, disturb: Disturb) -> None:
        self._work, self._at, self._disturb = work, at, disturb
        self.awaits = 0

    def __await__(self) -> Generator[Any, None, None]:
        steps = self._work.__await__()
        while True:
            try:
                waiting = steps.send(None)
            except StopIteration:
                return
            self.awaits += 1
            if self.awaits == self._at:
                yield from asyncio.ensure_future(self._disturb()).__await__()
            yield waiting


class Scene:
    """A store, and a follower of it that is driven by hand."""

    def __init__(self, store: WALStateStore, client: MirrorClient, follower: Follower) -> None:
        self.store, self.client, self.follower = store, client, follower

    async def change(self, *changes: Put | Append | Delete) -> None:
        await self.store.commit(changes)
        self.follower.changed(changes, 0.0)

    async def prepare(self) -> None:
        for kind in ("notes", "letters"):
            await self.change(*(put(kind, f"{n}", {"n": n}) for n in range(5)))
            await self.change(*(Append(kind, ("log",), b'{"n":1}') for _ in range(3)))

    async def new_kind(self) -> None:
        await self.change(put("fresh", "a", {"n": 1}))

    async def new_log(self) -> None:
        await self.change(Append("events", ("log",), b'{"n":1}'))

    async def new_kind_outside(self) -> None:
        await self.store.commit([put("outside", "a", {"n": 1})])
        self.follower.touch(("outside", ("a",)), 0.0)

    async def gone(self) -> None:
        await self.change(*(Delete("notes", (f"{n}",)) for n in range(5)))
        await self.store.erase("letters", ("log",))
        self.follower.erased(("letters", ("log",)), 0.0)

    async def erased_kind(self) -> None:
        for kind in ("notes", "unheard"):
            await self.store.erase(kind, ("1",))
            self.follower.erased((kind, ("1",)), 0.0)

    async def missed(self) -> None:
        await self.store.commit([put("missed", "a", {"n": 1})])
        self.follower.compare_again()
        self.follower.touch(("missed", ("a",)), 0.0)


def put(kind: str, key: str, state: dict[str, int]) -> Put:
    return Put(kind, (key,), b'{"n":%d}' % state["n"], f"{kind}/1")


NewScene = Callable[[int], Awaitable[Scene]]


@pytest.fixture
async def scene(server: RedisServer, tmp_path: Path) -> AsyncIterator[NewScene]:
    opened: list[Scene] = []

    async def make(number: int) -> Scene:
        root = tmp_path / f"{number}"
        store = WALStateStore(root)
        await store.open()
        ident = await asyncio.to_thread(ensure_instance, str(root))
        client = MirrorClient(server.url, f"{PREFIX}{number}:", timeout_seconds=10)
        await client.claim(ident)
        one = Scene(store, client, Follower(store, client, ident, await store.origin()))
        opened.append(one)
        return one

    yield make
    for one in opened:
        await one.client.close()
        await one.store.close()


@pytest.mark.long("a turn for each of its awaits, six times")
@pytest.mark.parametrize(
    "what", ["new_kind", "new_log", "new_kind_outside", "gone", "erased_kind", "missed"]
)
async def test_a_turn_survives_what_comes_and_goes_at_each_of_its_awaits(
    scene: NewScene, server: RedisServer, tmp_path: Path, what: str
) -> None:
    at = 0
    while True:
        at += 1
        one = await scene(at)
        await one.prepare()
        turn = Disturbed(one.follower.send_pending(0.0, check=at % 2 == 0), at, getattr(one, what))
        await turn
        if turn.awaits < at:
            break
        for _ in range(5):
            await one.follower.send_pending(0.0, check=True)
        assert one.follower.pending == 0
        assert one.follower.refused() == ()
        await one.store.flush()
        compared = await compare(server.url, tmp_path / f"{at}", prefix=f"{PREFIX}{at}:")
        assert compared.ok, (at, compared)
    assert at > 10


async def test_an_unexpected_error_is_logged_with_its_traceback_and_the_mirror_goes_on(
    server: RedisServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await manager.save("notes", "a", {"n": 1})
        await caught_up(manager)
        real, failures = Follower.send_pending, iter([KeyError("events"), TypeError("odd")])

        async def failing(self: Follower, now: float, *, check: bool) -> None:
            for error in failures:
                raise error
            await real(self, now, check=check)

        monkeypatch.setattr(Follower, "send_pending", failing)
        with caplog.at_level(logging.WARNING, "agent_state.redis"):
            await manager.save("notes", "b", {"n": 2})
            await caught_up(manager)
        assert status(manager).troubles == 2
    told = [each for each in caplog.records if each.exc_info]
    assert [each.exc_info[0] for each in told if each.exc_info] == [KeyError, TypeError]
    assert (await compare(server.url, tmp_path / "state")).ok


async def test_the_files_follow_after_an_unexpected_error_of_the_write_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_state.storage.checkpoint._RETRY_SECONDS", 0.01)
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        store = manager.store
        assert isinstance(store, WALStateStore)
        real, failures = store._checkpointer.write_back, iter([KeyError("odd")])

        def failing(changes: Any) -> Any:
            for error in failures:
                raise error
            return real(changes)

        monkeypatch.setattr(store._checkpointer, "write_back", failing)
        await manager.save("notes", "a", {"n": 1})
        await until((tmp_path / "notes/a.json").exists)
    assert any(each.exc_info and each.exc_info[0] is KeyError for each in caplog.records)
