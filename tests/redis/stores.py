"""What the tests of the store in Redis share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agent_state.protocols import Key, Notice, NoticeStream
from agent_state.redis import RedisStateStore

ALWAYS = ("--appendonly", "yes", "--appendfsync", "always")
"""Settings of a server that keeps what it has acknowledged."""


@asynccontextmanager
async def store_on(url: str, **settings: Any) -> AsyncIterator[RedisStateStore]:
    """An open store. A test whose server stops answering sets a shorter ``timeout_seconds``."""
    store = RedisStateStore(url, **{"prefix": "app:", "timeout_seconds": 10.0, **settings})
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def until_told(notices: NoticeStream, key: Key) -> list[Notice]:
    """What is told, up to this key's first notice."""
    told = []
    async with asyncio.timeout(60):
        async for notice in notices:
            told.append(notice)
            if notice.key == key:
                break
    return told
