"""Redis fails in every way we know: no save notices, and both sides are equal afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.protocols import Document
from agent_state.redis.mirror_client import NO_ENTRY, IndexReplacedError, MirrorWrite
from agent_state.testing import FakeClock
from tests.redis.mirrors import (
    caught_up,
    client,
    compare,
    mirror_client,
    mirrored,
    status,
    until,
)
from tests.redis.servers import RedisServer


async def _save_some(manager: StatePersistenceManager, n: int, count: int = 150) -> None:
    """Puts, a deletion and a log, of which most were there before."""
    for number in range(count):
        await manager.save("notes", f"n{number}", {"n": n, "text": "x" * 500})
    await manager.delete("notes", "n3")
    for number in range(5):
        await manager.append("events", "log", {"n": n, "number": number})


async def _equal(server: RedisServer, folder: Path) -> None:
    compared = await compare(server.url, folder)
    assert compared.ok, compared
    assert compared.documents >= 149
    assert compared.logs == 1


async def test_redis_is_killed_and_comes_back_empty(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        server.kill()
        await _save_some(manager, 2)
        await until(lambda: status(manager).state == "away")
        assert status(manager).waiting
        assert status(manager).lag > 0
        assert "Connection" in (status(manager).last_error or "")
        server.start()
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_redis_is_stopped_and_goes_on(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url, timeout_seconds=0.5) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        for n in range(2, 5):  # each time something is under way, and is applied late
            await manager.save("notes", "n0", {"n": n, "under way": True})
            server.stop()
            await _save_some(manager, n)
            await until(lambda: status(manager).state == "away")
            await _save_some(manager, n * 10)
            server.go_on()
            await caught_up(manager)
            await _equal(server, tmp_path / "state")


async def test_redis_is_full(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        async with client(server.url) as redis:
            await redis.config_set("maxmemory", 1)
            await _save_some(manager, 2)
            await until(lambda: status(manager).state == "full")
            assert status(manager).waiting
            await redis.config_set("maxmemory", 0)
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_redis_becomes_a_read_only_replica(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        async with client(server.url) as redis:
            await redis.replicaof("127.0.0.1", 1)
            await _save_some(manager, 2)
            await until(lambda: status(manager).state == "read-only")
            await redis.replicaof("NO", "ONE")
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_somebody_flushes_redis_while_nothing_is_saved(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        before = status(manager).sent
        async with client(server.url) as redis:
            await redis.flushall()
        await until(lambda: status(manager).sent >= before + 149)
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_the_index_of_a_kind_is_deleted(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        async with client(server.url) as redis:
            await redis.delete("app:index:{notes}", "app:index:{events}")
        await _save_some(manager, 2)
        await until(lambda: status(manager).sent >= 2 * 149)
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_redis_comes_back_with_what_it_had_a_while_ago(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        async with client(server.url) as redis:
            await redis.save()
        await _save_some(manager, 2)
        await manager.save("notes", "late", {"n": 1})
        await caught_up(manager)
        server.restart()
        async with client(server.url) as redis:
            while not await redis.exists("app:state:{notes}:late"):
                await asyncio.sleep(0.01)
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_a_connection_is_cut_in_the_middle(server: RedisServer, tmp_path: Path) -> None:
    async with _proxy(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with mirrored(tmp_path / "state", url) as manager:
            await _save_some(manager, 1)
            await caught_up(manager)
            for n, cut in enumerate(("request", "reply") * 3, start=2):
                troubles = status(manager).troubles
                proxy.cut_after(cut, 5000 if cut == "request" else 1)
                await _save_some(manager, n)
                await until(partial(_more_trouble, manager, troubles))
                await caught_up(manager)
                await _equal(server, tmp_path / "state")
    await _no_half_written_key(server)


def _more_trouble(manager: StatePersistenceManager, before: int) -> bool:
    return status(manager).troubles > before


async def test_a_write_that_comes_late_does_not_undo_what_a_person_did(
    server: RedisServer, tmp_path: Path
) -> None:
    path = tmp_path / "state" / "notes" / "one.json"
    async with _proxy(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        settings: dict[str, Any] = {
            "exclusive": False,
            "check_interval_seconds": 60.0,
            "timeout_seconds": 0.5,
        }
        async with mirrored(tmp_path / "state", url, **settings) as manager:
            await manager.save("notes", "one", {"n": 1})
            await caught_up(manager)
            first = path.read_bytes()
            proxy.hold()
            await manager.save("notes", "one", {"n": 2})
            await until(lambda: status(manager).state == "away")
            path.write_bytes(first)  # as git checkout does: there is nothing to send any more
            proxy.go_on()
            await caught_up(manager)
            proxy.let_held_go()
            await proxy.held_is_answered()
            assert (await compare(server.url, tmp_path / "state")).ok


async def test_redis_forgets_writes_and_somebody_makes_as_many_others(
    server: RedisServer, tmp_path: Path
) -> None:
    clock = FakeClock()
    folder = tmp_path / "state"
    async with mirrored(folder, server.url, clock=clock, check_interval_seconds=60.0) as manager:

        async def pass_until_caught_up() -> None:
            while status(manager).waiting or status(manager).state != "following":
                await clock.advance(0.1)

        await manager.save("notes", "one", {"n": 1})
        await pass_until_caught_up()
        async with client(server.url) as redis:
            await redis.save()
        await manager.save("notes", "one", {"n": 2})
        await pass_until_caught_up()
        server.restart()
        async with mirror_client(server.url) as other:  # a process that mirrors the same directory
            ours = await other.owner()
            assert ours is not None
            index = await other.load("notes", ours)
            theirs = MirrorWrite(("notes", ("two",)), None, NO_ENTRY)
            for _ in range(5):
                await other.put("notes", index.index_id, [theirs])
                theirs = theirs._replace(expected=(await other.entries([theirs.target]))[0])
        await clock.advance(60)
        async with client(server.url) as redis:
            while await redis.hget("app:state:{notes}:one", "revision") != b"2":
                await clock.advance(0.1)
    assert (await compare(server.url, folder)).ok


async def _no_half_written_key(server: RedisServer) -> None:
    async with client(server.url) as redis:
        async for key in redis.scan_iter("app:state:*"):
            fields = await redis.hgetall(key)
            assert set(fields) == {b"body", b"revision", b"schema", b"saved_at", b"checksum"}
            json.loads(fields[b"body"])


async def test_a_password_is_asked_for(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis", "--requirepass", "secret")
    server.start()
    try:
        async with mirrored(tmp_path / "state", server.url) as manager:
            await _save_some(manager, 1)
            await until(lambda: status(manager).state == "refused")
            with_password = server.url.replace("//", "//:secret@")
            async with client(with_password) as redis:
                await redis.config_set("requirepass", "")
            await caught_up(manager)
        await _equal(server, tmp_path / "state")
    finally:
        server.kill()


async def test_a_key_that_is_somebody_elses_is_left_alone(
    server: RedisServer, tmp_path: Path
) -> None:
    async with client(server.url) as redis:
        await redis.set("app:state:{notes}:n1", "theirs")
        await redis.set("app:log:{events}:log", "theirs")
        async with mirrored(tmp_path / "state", server.url) as manager:
            await _save_some(manager, 1)
            await caught_up(manager)
            refused = status(manager).refused
        assert await redis.get("app:state:{notes}:n1") == b"theirs"
        assert await redis.get("app:log:{events}:log") == b"theirs"

    assert [told.partition(":")[0] for told in refused] == ["notes/n1", "events/log.jsonl"]
    compared = await compare(server.url, tmp_path / "state")
    assert compared.missing == ["events/log.jsonl", "notes/n1"]


async def test_another_instance_is_met_when_redis_comes_back(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "one", server.url) as manager:
        await manager.save("notes", "mine", {"n": 1})
    server.stop()
    # Away is not an error.
    async with mirrored(tmp_path / "two", server.url, timeout_seconds=0.5) as manager:
        await manager.save("notes", "mine", {"n": 2})
        server.go_on()
        await until(lambda: status(manager).state == "collision")
        assert status(manager).waiting
    assert status(manager).state == "closed"
    assert "another state directory" in (status(manager).last_error or "")
    assert (await compare(server.url, tmp_path / "one")).ok


async def test_a_cancelled_save_is_mirrored(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await _save_some(manager, 1)
        await caught_up(manager)
        saves = [
            asyncio.create_task(manager.save("notes", f"n{number}", {"n": 2}))
            for number in range(50)
        ]
        await asyncio.sleep(0)
        for save in saves:
            save.cancel()
        done = await asyncio.gather(*saves, return_exceptions=True)
        assert any(isinstance(outcome, asyncio.CancelledError) for outcome in done)
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_close_does_not_wait_for_a_redis_that_hangs(
    server: RedisServer, tmp_path: Path
) -> None:
    before = asyncio.all_tasks()
    manager = mirrored(tmp_path / "state", server.url, timeout_seconds=60.0, drain_seconds=0.1)
    async with manager:
        await caught_up(manager)
        server.stop()
        await _save_some(manager, 1)
    assert status(manager).state == "closed"
    assert status(manager).waiting == 151
    server.go_on()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    async with client(server.url) as redis:
        while len(await redis.client_list()) > 1:  # the server still has to notice the end
            await asyncio.sleep(0.01)
    async with mirrored(tmp_path / "state", server.url) as manager:
        await caught_up(manager)
    await _equal(server, tmp_path / "state")


async def test_two_processes_mirror_one_directory(server: RedisServer, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with mirrored(folder, server.url, exclusive=False) as manager:
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _OTHER, str(folder), server.url
        )
        for n in range(3):
            await _save_some(manager, n, 20)
            with contextlib.suppress(AssertionError):
                await manager.delete("notes", f"n{n}")
        assert await other.wait() == 0
        await caught_up(manager)
    compared = await compare(server.url, folder)
    assert compared.ok, compared


_OTHER = """
import asyncio, sys
from agent_state import StatePersistenceManager
from agent_state.redis import RedisMirror

async def main():
    mirror = RedisMirror(
        sys.argv[2], prefix="app:", interval_seconds=0.005, check_interval_seconds=0.05
    )
    async with StatePersistenceManager(sys.argv[1], mirror=mirror) as manager:
        for n in range(3):
            for number in range(20):
                await manager.save("notes", f"n{number}", {"n": n, "other": True})
                if number % 5 == 0:
                    await manager.delete("notes", f"n{number}")
            await manager.append("events", "log", {"n": n})

asyncio.run(main())
"""


async def test_an_older_version_never_replaces_a_newer_one(
    server: RedisServer, tmp_path: Path
) -> None:
    def version(n: int, revision: int) -> Document:
        return Document("notes", ("one",), b'{"n":%d}' % n, revision, "", "notes/1")

    place = ("notes", ("one",))
    async with mirror_client(server.url) as mine:
        await mine.claim("me")
        mark = (await mine.load("notes", "me")).index_id
        [first] = await mine.put("notes", mark, [MirrorWrite(place, version(1, 7), NO_ENTRY)])
        over = (await mine.entries([place]))[0]
        late = MirrorWrite(place, version(2, 8), over)
        # A deletion and a new beginning overtake what is still under way.
        await mine.put("notes", mark, [MirrorWrite(place, None, over)])
        gone = (await mine.entries([place]))[0]
        [refused] = await mine.put("notes", mark, [late])
        await mine.put("notes", mark, [MirrorWrite(place, version(3, 1), gone)])
        [again] = await mine.put("notes", mark, [late])
        document = await mine.get(place)

        assert first == "ok 1"
        assert refused.startswith("moved 2 gone")
        assert again.startswith("moved 3 1 ")
        assert document is not None
        assert document.body == b'{"n":3}'

        async with client(server.url) as redis:
            await redis.flushall()
        await mine.claim("me")
        await mine.load("notes", "me")
        with pytest.raises(IndexReplacedError):  # from before the flush
            await mine.put("notes", mark, [MirrorWrite(place, version(1, 7), NO_ENTRY)])


async def test_a_damaged_file_does_not_take_the_mirrored_version_with_it(
    server: RedisServer, tmp_path: Path
) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        await manager.save("notes", "one", {"n": 1})
        await manager.flush()  # a write-back cut short by close is repeated, and leaves a snapshot
    (tmp_path / "state" / "notes" / "one.json").write_text("{ broken")
    for _ in range(2):
        async with mirrored(tmp_path / "state", server.url) as manager:
            found = [loaded.key async for loaded in manager.scan("notes")]
            await caught_up(manager)
            assert found == []
            assert status(manager).kept == ("notes/one: quarantined here",)
    async with mirrored(tmp_path / "state", server.url, restores=True) as manager:
        assert await manager.load("notes", "one") is None  # nothing here says it was ever there
        await caught_up(manager)  # its first comparison must not read the damage below
        (tmp_path / "state" / "notes" / "one.json").write_text("{ broken again")
        loaded = await manager.load("notes", "one")
        assert loaded is not None
        assert loaded.model_dump() == {"n": 1}
        await caught_up(manager)
    assert (await compare(server.url, tmp_path / "state")).ok


async def test_a_log_that_got_shorter_is_left_as_it_is(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", server.url) as manager:
        for number in range(5):
            await manager.append("events", "log", {"n": number})
    path = tmp_path / "state" / "events" / "log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    async with mirrored(tmp_path / "state", server.url) as manager:
        await caught_up(manager)
        assert status(manager).refused == ("events/log.jsonl: ends with 2 here, and with 5 there",)
    assert (await compare(server.url, tmp_path / "state")).different == ["events/log.jsonl"]


class _Proxy:
    """Hands bytes to and fro, until it is told to cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._cut: str | None = None
        self._left = 0
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._holding = False
        self._go, self._answered = asyncio.Event(), asyncio.Event()

    def hold(self) -> None:
        """Keep what the connections that there are ask from here on, and answer nothing."""
        self._holding = True

    def go_on(self) -> None:
        """New connections are as before."""
        self._holding = False

    def let_held_go(self) -> None:
        self._go.set()

    async def held_is_answered(self) -> None:
        """The server has done what was held."""
        await self._answered.wait()

    def cut_after(self, what: str, count: int) -> None:
        self._cut, self._left = what, count

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._holding:
            writer.close()  # nobody is let in meanwhile
            return
        back, forth = await asyncio.open_connection("127.0.0.1", self._target)
        both = {writer, forth}
        self._writers |= both
        pipes = [
            asyncio.create_task(self._pipe("request", reader, forth)),
            asyncio.create_task(self._pipe("reply", back, writer)),
        ]
        await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        for pipe in pipes:
            pipe.cancel()
        for end in both:
            end.close()
        self._writers -= both

    async def _pipe(
        self, what: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                if self._holding and what == "request":
                    await self._go.wait()
                    writer.write(piece)
                    await self._answered.wait()
                    return
                if self._go.is_set() and what == "reply":
                    self._answered.set()
                if self._cut == what:
                    writer.write(piece[: self._left])
                    self._left -= len(piece)
                    if self._left <= 0:
                        self._cut = None
                        return
                else:
                    writer.write(piece)
                await writer.drain()

    def close(self) -> None:
        self._go.set()
        for writer in self._writers:
            writer.close()


@contextlib.asynccontextmanager
async def _proxy(target: int) -> AsyncIterator[_Proxy]:
    proxy = _Proxy(target)
    listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = listening.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listening.close()
        proxy.close()
        await listening.wait_closed()
