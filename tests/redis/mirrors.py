"""What the tests of the mirror share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent_state import StatePersistenceManager
from agent_state.protocols import MirrorStatus
from agent_state.redis import RedisMirror
from agent_state.redis.client import connect
from agent_state.redis.mirror_client import MirrorClient
from agent_state.redis.mirror_sync import MirrorComparison, verify
from tests.deadlines import until as until

PREFIX = "app:"


def mirror(url: str, **settings: Any) -> RedisMirror:
    """A mirror in a hurry. A test whose server stops answering sets a short time limit."""
    quick: dict[str, Any] = {
        "prefix": PREFIX,
        "interval_seconds": 0.005,
        "timeout_seconds": 10.0,
        "check_interval_seconds": 0.05,
        "drain_seconds": 60.0,
    }
    return RedisMirror(url, **{**quick, **settings})


def mirrored(
    folder: Path, url: str, *, exclusive: bool = True, **settings: Any
) -> StatePersistenceManager:
    restores = settings.pop("restores", False)
    return StatePersistenceManager(
        folder,
        exclusive=exclusive,
        mirror=mirror(url, **settings),
        mirror_restores=restores,
    )


def status(manager: StatePersistenceManager) -> MirrorStatus:
    assert manager.mirror is not None
    return manager.mirror.status()


async def caught_up(manager: StatePersistenceManager) -> None:
    await until(lambda: status(manager).state == "following" and not status(manager).waiting)


@asynccontextmanager
async def mirror_client(url: str, *, prefix: str = PREFIX) -> AsyncIterator[MirrorClient]:
    one = MirrorClient(url, prefix, timeout_seconds=10)
    try:
        yield one
    finally:
        await one.close()


async def compare(url: str, folder: Path, *, prefix: str = PREFIX) -> MirrorComparison:
    async with mirror_client(url, prefix=prefix) as one:
        return await verify(one, str(folder))


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Any]:
    """A client whose replies are bytes, which redis-py's types do not know."""
    one = connect(url, timeout_seconds=10)
    try:
        yield one
    finally:
        await one.aclose()
