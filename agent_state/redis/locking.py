"""Locks between processes: a lease with a fencing token for each, renewed while it is held.

The lease is on the server's clock. Whoever lost it, because its process stood still for longer,
is refused by the commit script, which compares the token.
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
from agent_state.redis.keys import Names
from agent_state.redis.link import Lane, call
from agent_state.redis.scripts import KEEP_LOCK, LOCK
from agent_state.storage.executor import shielded

_logger = logging.getLogger("agent_state.redis")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1
"""Seconds between two tries for a lock that is taken."""


class Leases:
    """The locks that one store holds. ``seconds``: how long one lasts without being renewed."""

    def __init__(self, lane: Lane, names: Names, writer: str, *, seconds: float) -> None:
        self._lane = lane
        self._names = names
        self._writer = writer
        self._millis = max(1, int(seconds * 1000))
        self._held: dict[str, str] = {}

    def held(self, place: str) -> str:
        """The value of a lock that is held here; "" for none."""
        return self._held.get(place, "")

    @asynccontextmanager
    async def holding(
        self, place: str, patience: float, *, kind: str, key: Key
    ) -> AsyncIterator[None]:
        """Take the lease within ``patience`` seconds, keep it, give it back.

        Raises ``LockTimeoutError``, ``StorageError``.
        """
        mark = f"{self._writer} {secrets.token_hex(4)}"
        try:
            value = await self._take(place, mark, patience, kind, key)
        except BaseException:
            # A take that nobody waited for may have been carried out all the same.
            await shielded(self._give_back(place, mark))
            raise
        self._held[place] = value
        renewing = asyncio.create_task(self._renew(place, value), name=f"lock of {place}")
        try:
            yield
        finally:
            del self._held[place]
            renewing.cancel()
            await shielded(self._give_back(place, value))

    async def _take(self, place: str, mark: str, patience: float, kind: str, key: Key) -> str:
        until = time.monotonic() + patience
        command = call(LOCK, [self._names.locks, self._names.fence], [place, mark, self._millis])
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            taken, said = await self._lane.run(*command, doing="locking")
            if taken:
                return str(said.decode())
            left = until - time.monotonic()
            if left <= 0:
                raise LockTimeoutError(
                    f"another process held it for {patience:g} s", kind=kind, key=key
                )
            await asyncio.sleep(min(backoff.pause(), left, said / 1000))

    async def _renew(self, place: str, value: str) -> None:
        while True:
            await asyncio.sleep(self._millis / 3000)
            command = call(KEEP_LOCK, [self._names.locks], [place, value, self._millis])
            try:
                if not await self._lane.run(*command, doing="renewing a lock"):
                    _logger.error("the lock of %s has expired under its holder", place)
                    return
            except AgentStateError as error:
                _logger.warning("the lock of %s was not renewed: %s", place, error)

    async def _give_back(self, place: str, value: str) -> None:
        command = call(KEEP_LOCK, [self._names.locks], [place, value, 0])
        try:
            await self._lane.run(*command, doing="unlocking")
        except AgentStateError as error:
            _logger.warning("the lock of %s is left to expire: %s", place, error)
