"""The session manager of ``redis_state``: one save or load at a time, on a local Redis."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

from agent_state.redis.client import connect
from agent_state_integrations.redis_state import (
    BackendType,
    CoaiaTransport,
    DirectTransport,
    RedisConfig,
    RedisSessionManager,
    Transport,
    UniversalSession,
)
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting, percentile
from tests.redis.servers import RedisServer
from tests.redis_state.coaia import installed

SAVES = 5_000
CALLS_OF_TOOLS = 2_500

Times = dict[str, list[float]]


def redis_state(setting: Setting) -> list[Row]:
    """Beside each other, turn by turn: redis-py alone, the direct transport, the coaia tools."""
    runs = []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            runs.append(asyncio.run(_run(setting, folder)))
    rows = []
    for name, most in (("direct", 5), ("coaia tools", 50)):
        for verb in ("save", "load"):
            worst = [percentile(run[f"{verb} {name}"], 0.99) for run in runs]
            rows.append(Row(f"{verb}, {name}, p99", worst, "ms", at_most(most), "10 KB session"))
    for name in ("direct", "coaia tools"):
        for verb, bare in (("save", "SET"), ("load", "GET")):
            ratios = [median(run[f"{verb} {name}"]) / median(run[bare]) for run in runs]
            took = median([median(run[bare]) for run in runs])
            rows.append(
                Row(f"{verb}, {name} / {bare}", ratios, "times", None, f"{bare} {took:.2f} ms")
            )
    return rows


async def _run(setting: Setting, folder: Path) -> Times:
    server = RedisServer(folder)
    server.start()
    program = (str(installed() / "coaiapy-mcp"),)
    try:
        async with connect(server.url) as redis:
            direct, coaia = DirectTransport(server.url), CoaiaTransport(server.url, command=program)
            one, other = _manager(direct, server), _manager(coaia, server)
            session = _session()
            body = session.model_dump_json().encode()
            assert 9_500 < len(body) < 10_500, len(body)
            rounds = (
                (setting.scaled(SAVES), "SET", lambda: redis.set("k", body)),
                (setting.scaled(SAVES), "GET", lambda: redis.get("k")),
                (setting.scaled(SAVES), "save direct", lambda: one.save_session(session)),
                (setting.scaled(SAVES), "load direct", lambda: one.load_session("s")),
                (setting.scaled(CALLS_OF_TOOLS), "save coaia tools",
                 lambda: other.save_session(session)),
                (setting.scaled(CALLS_OF_TOOLS), "load coaia tools",
                 lambda: other.load_session("s")),
            )  # fmt: skip
            times = {what: await _timed(count, work) for count, what, work in rounds}
            await direct.close()
            await coaia.close()
            return times
    finally:
        server.kill()


def _manager(transport: Transport, server: RedisServer) -> RedisSessionManager:
    return RedisSessionManager(transport=transport, config=RedisConfig(url=server.url))


def _session() -> UniversalSession:
    turn = {"q": "What is creative orientation? " * 5, "a": "It is about bringing into being. " * 4}
    return UniversalSession(
        id="s",
        backend=BackendType.FLOWISE,
        context={"topic": "structural tension", "scores": [0.5] * 40},
        history=[turn] * 31,
    )


async def _timed(count: int, work: Callable[[], Awaitable[object]]) -> list[float]:
    """Milliseconds of each, after the first few; every one must succeed."""
    for _ in range(20):
        assert await work()
    gc.collect()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        done = await work()
        times.append((time.perf_counter() - began) * 1e3)
        assert done
    return times
