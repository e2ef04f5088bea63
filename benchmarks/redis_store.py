"""The store in Redis: a hundred agents saving at once, compared with bare SET of the same bytes."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import orjson

from agent_state import StatePersistenceManager
from benchmarks.report import Row, at_least
from benchmarks.workload import (
    AGENTS,
    Contender,
    Load,
    Save,
    Setting,
    State,
    agent_state,
    all_at_once,
    percentile,
)

EACH = 300


def redis_store(setting: Setting) -> list[Row]:
    """100 agents at once, nothing on disk, then every write synced; one server for both."""
    rows: list[Row] = []
    for name, settings in (
        ("no file", ("--appendonly", "no")),
        ("appendfsync always", ("--appendonly", "yes", "--appendfsync", "always")),
    ):
        rows += _side_by_side(setting, name, settings)
    return rows


def _side_by_side(setting: Setting, name: str, settings: Sequence[str]) -> list[Row]:
    loads: dict[Callable[[str], Contender], list[Load]] = {_ours: [], _bare: [], _bare_wide: []}
    for run in range(setting.runs):
        with setting.folder() as folder, _server(folder, settings) as url:
            for contender in list(loads)[:: -1 if run % 2 else 1]:
                each = setting.scaled(EACH)
                loads[contender].append(asyncio.run(all_at_once(contender(url), folder, each)))
    mine, bare, wide = ([load.per_second for load in each] for each in loads.values())
    return [
        Row(f"RedisStateStore, 100 agents at once, {name}", mine, "saves/s"),
        Row("  redis-py SET, 100 tasks, same pool of 4", bare, "/s"),
        Row("  redis-py SET, 100 tasks, 100 connections", wide, "/s"),
        Row("  ours / SET, same pool", _ratios(mine, bare), "times", at_least(0.6)),
        Row("  ours / SET, 100 connections", _ratios(mine, wide), "times", at_least(0.6)),
        Row(
            "  acknowledged after, p99",
            [percentile(load.acks_ms, 0.99) for load in loads[_ours]],
            "ms",
        ),
    ]


def _ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [ours / other for ours, other in zip(mine, theirs, strict=True)]


def _ours(url: str) -> Contender:
    """The manager on the store: checked, compared and set, with a notice for each change."""
    from agent_state.redis import RedisStateStore  # an extra

    @asynccontextmanager
    async def contender(_: Path) -> AsyncIterator[Save]:
        logging.getLogger("agent_state.redis").setLevel(logging.ERROR)  # its settings are known
        store = RedisStateStore(url, prefix="bench:", timeout_seconds=10)
        async with StatePersistenceManager(store=store) as manager:

            async def save(_: int, state: State) -> None:
                revisions[state["agent_id"]] = await manager.save_agent_state(
                    state["agent_id"], state
                )

            revisions: dict[str, int] = {}
            yield save
            for index in range(AGENTS):
                loaded = await manager.load_with_revision("agents", agent_state(index)["agent_id"])
                assert loaded is not None
                assert loaded.revision == revisions[loaded.key[0]]
                saves = loaded.state.model_dump()["counters"]["saves"]
                assert loaded.revision == saves + 1, "each save must have made a new version"

    return contender


def _bare_wide(url: str) -> Contender:
    """The same with a connection for each task."""
    return _bare(url, connections=AGENTS)


def _bare(url: str, connections: int = 4) -> Contender:
    """redis-py's SET of the same JSON, on the same client with the same pool."""
    from agent_state.redis.client import connect  # an extra

    @asynccontextmanager
    async def contender(_: Path) -> AsyncIterator[Save]:
        async with connect(url, timeout_seconds=10, max_connections=connections) as client:

            async def save(_: int, state: State) -> None:
                await client.set(state["agent_id"], orjson.dumps(state))

            yield save

    return contender


@contextmanager
def _server(folder: Path, settings: Sequence[str]) -> Iterator[str]:
    """A redis-server of the benchmark's own."""
    program = shutil.which("redis-server")
    assert program, "redis-server is not installed: make test installs it"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # a fixed command
            [*command, "--save", "", *settings], stdout=log, stderr=log
        )
    try:
        _wait_for(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return
        except OSError:
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.01)
