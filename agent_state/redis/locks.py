"""Locks between processes: leases with fencing tokens, renewed while they are held.

A lease is on the server's clock. The commit script compares the token, so a holder that lost its
lease, because its process stood still for longer, is refused.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent_state.clock import Backoff
from agent_state.errors import AgentStateError, Key, LockTimeoutError
from agent_state.redis.client import PipelineBatcher, Script
from agent_state.redis.keys import StoreKeys
from agent_state.storage.executor import shielded

LOCKS = Script.load("locks")
_logger = logging.getLogger("agent_state.redis")


class LeaseLocks:
    """The locks that one store holds. ``lease_seconds``: how long one lasts unless renewed."""

    def __init__(
        self, batcher: PipelineBatcher, keys: StoreKeys, writer: str, *, lease_seconds: float
    ) -> None:
        self._batcher = batcher
        self._keys = keys
        self._writer = writer
        self._millis = max(1, int(lease_seconds * 1000))
        self._held: dict[str, str] = {}

    def token(self, lock: str) -> str:
        """The fencing token of a lock that is held here; "" for none."""
        return self._held.get(lock, "")

    @asynccontextmanager
    async def hold(
        self, lock: str, timeout_seconds: float, *, kind: str, key: Key
    ) -> AsyncIterator[None]:
        """Take the lease within the time limit, renew it, and release it at the end.

        Raises ``LockTimeoutError``, ``StorageError``.
        """
        owner = f"{self._writer} {secrets.token_hex(4)}"
        try:
            token = await self._take(lock, owner, timeout_seconds, kind, key)
        except BaseException:
            # The server may have given the lease although the reply was not awaited.
            await shielded(self._release(lock, owner))
            raise
        self._held[lock] = token
        renewing = asyncio.create_task(self._renew(lock, token), name=f"lock of {lock}")
        try:
            yield
        finally:
            del self._held[lock]
            renewing.cancel()
            await shielded(self._release(lock, token))

    async def _take(
        self, lock: str, owner: str, timeout_seconds: float, kind: str, key: Key
    ) -> str:
        until = time.monotonic() + timeout_seconds
        command = LOCKS.call(
            [self._keys.locks, self._keys.fence], ["take", lock, owner, self._millis]
        )
        backoff = Backoff(0.005, 0.1)
        while True:
            taken, reply = await self._batcher.run(*command, doing="locking")
            if taken:
                return str(reply.decode())
            left = until - time.monotonic()
            if left <= 0:
                raise LockTimeoutError(
                    f"another process held it for {timeout_seconds:g} s", kind=kind, key=key
                )
            await asyncio.sleep(min(backoff.pause(), left, reply / 1000))

    async def _renew(self, lock: str, token: str) -> None:
        while True:
            await asyncio.sleep(self._millis / 3000)
            try:
                if not await self._extend(lock, token, self._millis, "renewing a lock"):
                    _logger.error("the lock of %s expired while it was held", lock)
                    return
            except AgentStateError as error:
                _logger.warning("the lock of %s was not renewed: %s", lock, error)

    async def _release(self, lock: str, token: str) -> None:
        try:
            await self._extend(lock, token, 0, "unlocking")
        except AgentStateError as error:
            _logger.warning("the lock of %s is left to expire: %s", lock, error)

    async def _extend(self, lock: str, token: str, millis: int, doing: str) -> bool:
        command = LOCKS.call([self._keys.locks], ["extend", lock, token, millis])
        return bool(await self._batcher.run(*command, doing=doing))
