"""The store in Redis when the line is cut, and when callers go: once, and nothing leaked."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from agent_state.errors import (
    DurabilityUnknownError,
)
from agent_state.protocols import StateStore
from agent_state.redis.client import connect
from agent_state.redis.keys import StoreKeys
from agent_state.testing.contract_base import (
    append,
    content_of,
    put,
    records_of,
)
from tests.redis.servers import RedisServer
from tests.redis.stores import store_on, until_told


class Cutting:
    """Stands between a client and the server, and cuts the line as it is told."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.cut_replies = 0
        """How many more replies are kept from the client, each with its connection."""
        self.cut_commands_at: int | None = None
        """After how many bytes a command is cut off, once."""
        self.holding = threading.Event()
        """While it is set, commands are kept back; ``let_go`` sends them on."""
        self.replies = 0
        self._held: list[tuple[socket.socket, bytes]] = []
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self._target))
            for source, target, replies in ((client, upstream, False), (upstream, client, True)):
                threading.Thread(
                    target=self._pump, args=(source, target, replies), daemon=True
                ).start()

    def _pump(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        with source, target:
            try:
                while data := source.recv(1 << 16):
                    if replies and self.cut_replies and not data.startswith(b"%"):
                        self.cut_replies -= 1
                        break
                    if not replies and self.cut_commands_at is not None and len(data) > 1000:
                        target.sendall(data[: self.cut_commands_at])
                        self.cut_commands_at = None
                        break
                    if not replies and self.holding.is_set():
                        self._held.append((target, data))
                        self._over.wait()
                        break
                    self.replies += replies
                    target.sendall(data)
            except OSError:
                pass
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def let_go(self) -> int:
        """Send on what was kept back; how many pieces there were."""
        held, self._held = self._held, []
        for line, data in held:
            line.sendall(data)
        return len(held)

    def close(self) -> None:
        self._over.set()
        self._server.close()


@pytest.fixture
def cutting(server: RedisServer) -> Iterator[Cutting]:
    proxy = Cutting(server.port)
    yield proxy
    proxy.close()


async def test_a_reply_that_is_cut_off_is_asked_for_again_and_nothing_is_made_twice(
    cutting: Cutting,
) -> None:
    async with store_on(f"redis://127.0.0.1:{cutting.port}/0") as store:
        await store.commit([put("a", {"n": 0})])
        cutting.cut_replies = 1

        results = await asyncio.gather(
            *(
                store.commit([put(str(n), {"n": n}, expected=0), append("log", {})])
                for n in range(9)
            )
        )

        assert cutting.cut_replies == 0
        assert sorted(results) == [[1, n] for n in range(1, 10)]
        assert len(await records_of(store, "log")) == 9


async def test_a_command_cut_in_the_middle_is_made_whole_or_not_at_all(cutting: Cutting) -> None:
    async with store_on(f"redis://127.0.0.1:{cutting.port}/0") as store:
        await store.commit([put("a", {"n": 0})])
        for at in (1, 100, 900):
            cutting.cut_commands_at = at
            await store.commit([put("a", {"n": at, "text": "x" * 5000}), append("log", {})])
            assert cutting.cut_commands_at is None
        assert len(await records_of(store, "log")) == 3


async def test_two_replies_cut_off_are_an_unknown_outcome(cutting: Cutting) -> None:
    async with store_on(f"redis://127.0.0.1:{cutting.port}/0") as store:
        await store.commit([put("a", {"n": 0})])
        notices = await store.watch()
        cutting.cut_replies = 2
        # The watcher's replies are cut too; more are cut until both are the commit's.
        n = 0
        with pytest.raises(DurabilityUnknownError):
            while True:
                n += 1
                cutting.cut_replies = 2
                await store.commit([put(str(n), {"n": n}), append("log", {})])
        cutting.cut_replies = 0
        assert await content_of(store, str(n)) == {"n": n}
        # Nobody was told of it by the commit: the stream of notices makes up for that.
        assert (await until_told(notices, (str(n),)))[-1].outside


async def test_a_save_that_comes_too_late_does_not_land_on_a_newer_one(
    cutting: Cutting,
) -> None:
    async with store_on(f"redis://127.0.0.1:{cutting.port}/0", timeout_seconds=1.0) as store:
        await store.commit([put("a", {"n": 0})])
        cutting.holding.set()
        with pytest.raises(DurabilityUnknownError):
            await store.commit([put("a", {"n": "late"}), append("log", {})])
        cutting.holding.clear()
        assert await store.commit([put("a", {"n": "new"})]) == [2]
        replies = cutting.replies
        held = cutting.let_go()
        assert held >= 1
        while cutting.replies < replies + held:  # the server answers, though nobody listens
            await asyncio.sleep(0.01)
        assert await content_of(store, "a") == {"n": "new"}
        assert await records_of(store, "log") == []


async def test_cancelled_callers_leak_nothing(server: RedisServer) -> None:
    async with store_on(server.url) as store, connect(server.url, timeout_seconds=10) as client:
        for n in range(60):
            work = [
                asyncio.create_task(store.commit([put("a", {"n": n}), append("log", {"n": n})])),
                asyncio.create_task(store.get("notes", ("a",))),
                asyncio.create_task(held(store)),
            ]
            for _ in range(n % 12):
                await asyncio.sleep(0)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
        async with asyncio.timeout(60), store.lock("notes", ("a",)):
            document = await store.get("notes", ("a",))
        records = await records_of(store, "log")
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        assert document is None or document.revision == len(records)
        assert await client.hlen(StoreKeys("app:").locks) == 0
        assert len(await client.client_list()) <= 5  # this test's, and the store's


async def held(store: StateStore) -> None:
    async with store.lock("notes", ("a",)):
        await asyncio.sleep(0)
