"""The default transport: redis-py, with Redis's own expiry.

A write carries the server's time at which its caller gives up, and the server refuses it after
that. So a write whose reply was lost cannot replace a newer one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as ConnectionLostError

from agent_state.clock import Clock, SystemClock
from agent_state.errors import StateCorruptedError
from agent_state.protocols import JsonObject
from agent_state.redis.client import FAILURES, connect
from agent_state.redis.keys import escape_glob
from agent_state.serializers import JSONStateSerializer
from agent_state_integrations.redis_state.transports import (
    TransportError,
    fitting,
    is_expired,
    milliseconds,
    time_to_live,
)

T = TypeVar("T")

_logger = logging.getLogger("agent_state.redis_state")

# Each returns {result, the server's time}; -1: too late, nothing was done.
_IN_TIME = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if now > tonumber(ARGV[1]) then return {-1, now} end
"""
_PUT = f"""{_IN_TIME}
if ARGV[3] == '0' then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return {{1, now}}
"""
_DROP = f"{_IN_TIME} return {{redis.call('DEL', KEYS[1]), now}}"
_RENEW = f"""{_IN_TIME}
local left = redis.call('PTTL', KEYS[1])
if left < 0 or left >= tonumber(ARGV[2]) then return {{0, now}} end
return {{redis.call('PEXPIRE', KEYS[1], ARGV[2]), now}}
"""


class DirectTransport:
    """A transport by redis-py.

    ``timeout_seconds``: the time limit of a call (of a listing: ten times that). ``max_bytes``: the
    size of the largest record. ``clock``: only for records that were written through the coaia
    tools; all others expire by the server's clock. Raises ``ValueError`` for an invalid URL.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 1.0,
        max_bytes: int = 8 * 2**20,
        clock: Clock | None = None,
    ) -> None:
        self._url = url
        self._timeout = timeout_seconds
        self._max_bytes = max_bytes
        self._clock = clock or SystemClock()
        self._serializer = JSONStateSerializer()
        self._server_ms: tuple[int, float] | None = None
        self._client: Redis | None = connect(url, timeout_seconds=timeout_seconds)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def put(self, key: str, record: JsonObject, seconds: float) -> None:
        if milliseconds(seconds):
            record = record | {"_ttl_seconds": seconds}
        text = fitting(self._serializer.dumps(record), self._max_bytes, key)
        await self._run(_PUT, key, text, milliseconds(seconds))

    async def get(self, key: str, *, sliding: bool) -> JsonObject | None:
        async def get(client: Redis) -> list[Any]:
            async with client.pipeline(transaction=False) as pipeline:
                _ = pipeline.get(key), pipeline.pttl(key)  # queued; nothing to await yet
                return await pipeline.execute()

        text, left = await self._reach(get)
        if text is None:
            return None
        record = self._serializer.loads(text)
        if is_expired(record, self._clock.now()):
            return None
        if sliding and left >= 0:
            await self._renew(key, left, time_to_live(record))
        return record

    async def _renew(self, key: str, left: int, seconds: float | None) -> None:
        if seconds is None or left >= 900 * seconds:
            return
        try:
            await self._run(_RENEW, key, milliseconds(seconds))
        except TransportError as error:  # the record has been read; it lives as long as it did
            _logger.warning("%s could not be renewed: %s", key, error)

    async def drop(self, key: str) -> bool:
        return await self._run(_DROP, key) > 0

    async def keys(self, prefix: str) -> list[str]:
        async def scan(client: Redis) -> set[str | None]:
            keys = client.scan_iter(match=f"{escape_glob(prefix)}*", count=1000)
            return {_text(key) async for key in keys}

        return sorted(key for key in await self._reach(scan, times=10) if key is not None)

    async def claim(self, key: str, owner: str) -> str:
        async def claim(client: Redis) -> str | None:
            await client.set(key, owner, nx=True)
            return _text(await client.get(key))

        holder = await self._reach(claim)
        if holder is None:
            raise StateCorruptedError("no owner can be read", key=key)
        return holder

    async def close(self) -> None:
        client, self._client, self._server_ms = self._client, None, None
        if client is not None and self._loop is asyncio.get_running_loop():
            try:
                async with asyncio.timeout(self._timeout):
                    await client.aclose()
            except FAILURES as error:
                _logger.warning("while closing the connections to Redis: %s", _describe(error))

    async def _run(self, script: str, key: str, *arguments: bytes | int) -> int:
        """Run one of the scripts above before the time limit, or not at all."""
        until = time.monotonic() + self._timeout

        async def run(client: Redis) -> int:
            for _ in range(2):  # again when its clock was not known yet, or has been set
                latest = self._server_time(until)
                call = client.register_script(script)
                done, now = await call(keys=[key], args=[latest, *arguments])
                self._server_ms = (now, time.monotonic())
                if done >= 0:
                    return int(done)
            raise TransportError("Redis got it too late, and did not do it", key=key)

        return await self._reach(run)

    def _server_time(self, moment: float) -> int:
        """The server's time in milliseconds at a local moment, or a little less."""
        if self._server_ms is None:
            return 0
        known, when = self._server_ms
        return known + int((moment - when) * 1000)

    async def _reach(self, work: Callable[[Redis], Awaitable[T]], times: int = 1) -> T:
        """The result of the work within the time limit. Raises ``TransportError``."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:  # a connection belongs to its loop
            self._client, self._loop = connect(self._url, timeout_seconds=self._timeout), loop
        try:
            async with asyncio.timeout(self._timeout * times):
                try:
                    return await work(self._client)
                except ConnectionLostError:  # so it was with an idle one when Redis has restarted
                    return await work(self._client)
        except FAILURES as error:
            raise TransportError(_describe(error)) from error


def _describe(error: BaseException) -> str:
    """The failure in one line; a timeout has no text of its own."""
    return f"{type(error).__name__}: {error}"[:300] if str(error) else "no answer in time"


def _text(data: bytes | str | None) -> str | None:
    """The text; None for bytes that are not UTF-8, which this transport never writes."""
    try:
        return data.decode() if isinstance(data, bytes) else data
    except UnicodeDecodeError:
        return None
