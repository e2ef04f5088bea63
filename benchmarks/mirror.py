"""What a mirror costs a save, and how fast it catches up. The server runs on the same cores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median

from agent_state import StatePersistenceManager
from agent_state.protocols import Mirror
from agent_state.redis import RedisMirror
from agent_state.redis.mirror_client import MirrorClient
from agent_state.redis.mirror_sync import verify
from benchmarks.report import Row, at_most
from benchmarks.workload import Save, Setting, State, agent_state, all_at_once, change
from tests.redis.servers import RedisServer

AGENTS_AWAY = 10_000
_POLL_SECONDS = 0.01

MakeMirror = Callable[[str], Mirror | None]


def mirror(setting: Setting) -> list[Row]:
    """Saves with and without the mirror, turn by turn; then 10,000 documents at once."""
    rows = []
    for what, measure, exclusive, count in (
        ("exclusive, 100 agents at once", _many, True, 600),
        ("exclusive, one save at a time", _single, True, 5000),
        ("shared, 100 agents at once", _many, False, 60),
        ("shared, one save at a time", _single, False, 2000),
    ):
        costs: dict[bool, list[float]] = {True: [], False: []}
        for run in range(setting.runs):
            for mirrored in (True, False) if run % 2 else (False, True):
                with setting.folder() as folder, _server(folder) as url:
                    manager = _manager(folder, url, exclusive=exclusive, mirrored=mirrored)
                    costs[mirrored].append(
                        asyncio.run(measure(setting.scaled(count), folder, manager))
                    )
        rows += [
            Row(f"{what}, mirrored: each costs", costs[True], "µs"),
            Row("  not mirrored", costs[False], "µs"),
            Row(
                "  mirrored / not",
                [a / b for a, b in zip(costs[True], costs[False], strict=True)],
                "times",
                at_most(1.15),
            ),
        ]
    for exclusive in (True, False):
        seconds = [_catching_up(setting, exclusive=exclusive) for _ in range(setting.runs)]
        what = "exclusive" if exclusive else "shared"
        rows.append(Row(f"{what}: 10,000 changed while Redis was away", seconds, "s", at_most(5)))
    return rows


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    server = RedisServer(folder / "redis")
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


def _manager(folder: Path, url: str, *, exclusive: bool, mirrored: bool) -> StatePersistenceManager:
    mirror = RedisMirror(url, prefix="bench:", drain_seconds=60.0) if mirrored else None
    return StatePersistenceManager(folder / "state", exclusive=exclusive, mirror=mirror)


async def _many(each: int, folder: Path, manager: StatePersistenceManager) -> float:
    """µs of the whole for each save, a hundred agents saving as fast as they can."""

    @asynccontextmanager
    async def contender(_folder: Path) -> AsyncIterator[Save]:
        async with manager:

            async def save(_: int, state: State) -> None:
                await manager.save_agent_state(state["agent_id"], state)

            yield save

    load = await all_at_once(contender, folder, each)
    _assert_mirrored(manager)
    return 1e6 / load.per_second


def _assert_mirrored(manager: StatePersistenceManager) -> None:
    if manager.mirror is not None:
        status = manager.mirror.status()
        assert status.sent
        assert not status.waiting
        assert not status.troubles


async def _single(count: int, _folder: Path, manager: StatePersistenceManager) -> float:
    """µs of a save in the median, one after another."""
    state = agent_state(0)
    waits = []
    async with manager:
        for number in range(1, count + 1):
            change(state, number)
            began = time.perf_counter()
            await manager.save_agent_state(state["agent_id"], state)
            waits.append(time.perf_counter() - began)
    _assert_mirrored(manager)
    return median(waits) * 1e6


def _catching_up(setting: Setting, *, exclusive: bool) -> float:
    with setting.folder() as folder:
        server = RedisServer(folder / "redis")
        server.start()
        try:
            return asyncio.run(_catch_up(folder, server, exclusive=exclusive))
        finally:
            server.kill()


async def _catch_up(folder: Path, server: RedisServer, *, exclusive: bool) -> float:
    """Seconds from when Redis answers again, empty, until every document is there."""
    states = [agent_state(index) for index in range(AGENTS_AWAY)]
    manager = _manager(folder, server.url, exclusive=exclusive, mirrored=True)
    mirror = manager.mirror
    assert mirror is not None
    async with manager:
        await _save_all(manager, states, 1)
        await _until_caught_up(mirror)
        server.kill()
        await _save_all(manager, states, 2)
        while mirror.status().state != "away":  # noqa: ASYNC110  # a mirror has no event for it
            await asyncio.sleep(_POLL_SECONDS)
        assert mirror.status().waiting == AGENTS_AWAY
        server.start()
        began = time.perf_counter()
        await _until_caught_up(mirror)
        seconds = time.perf_counter() - began
    client = MirrorClient(server.url, "bench:")
    try:
        compared = await verify(client, str(folder / "state"))
    finally:
        await client.close()
    assert compared.ok
    assert compared.documents == AGENTS_AWAY
    return seconds


async def _until_caught_up(mirror: Mirror) -> None:
    while mirror.status().waiting or mirror.status().state != "following":  # noqa: ASYNC110
        await asyncio.sleep(_POLL_SECONDS)


async def _save_all(manager: StatePersistenceManager, states: list[State], number: int) -> None:
    for start in range(0, len(states), 100):
        batch = states[start : start + 100]
        for state in batch:
            change(state, number)
        await asyncio.gather(
            *(manager.save_agent_state(state["agent_id"], state) for state in batch)
        )
