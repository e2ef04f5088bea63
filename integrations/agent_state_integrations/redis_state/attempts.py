"""What the session manager and the execution cache share: trying, and saying why it failed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar

from agent_state.clock import Clock, SystemClock
from agent_state.errors import (
    LockTimeoutError,
    SchemaTooNewError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.protocols import JsonObject
from agent_state.storage.executor import shielded
from agent_state.storage.locks import TaskLocks
from agent_state_integrations.redis_state.coaia import CoaiaTransport
from agent_state_integrations.redis_state.config import RedisConfig, checked_seconds
from agent_state_integrations.redis_state.direct import DirectTransport
from agent_state_integrations.redis_state.keys import Keys
from agent_state_integrations.redis_state.records import SECRET_NAMES, Redactor
from agent_state_integrations.redis_state.transports import (
    TooLargeError,
    Transport,
    TransportError,
)

MAX_BYTES = 8 * 2**20
WAIT_SECONDS = 5.0

EXPECTED = (
    TransportError,
    TooLargeError,
    StateCorruptedError,
    SchemaTooNewError,
    LockTimeoutError,
)
"""What may go wrong without anybody having made a mistake in the program."""

T = TypeVar("T")

_logger = logging.getLogger("agent_state.redis_state")


class Attempts:
    """One user of Redis, who goes on without it.

    What cannot be done because Redis is away, slow, full or read-only, because a record is
    damaged, too new or too large, is logged with its reason, counted, and answered with False,
    None or an empty list. Nothing is latched: the next call tries again. Mistakes do raise:
    ``TypeError``, ``SerializationError`` for what is no JSON (a datetime in a context, say),
    ``InvalidKeyError``, ``StateValidationError``.

    ``enabled`` False: nothing is stored or read. ``ttl_seconds``: how long a record is kept,
    ``math.inf`` for ever. ``sliding``: a record that is read lives on as if it were saved now.
    ``config``: where all that is not given comes from; None: ``RedisConfig.from_env()``.
    ``transport``: one to share, which its maker closes; None: as the configuration says.
    ``max_bytes``: the largest record. ``secret_names``: patterns of fields that are stored as
    ``[redacted]``. ``server_id``: who uses this prefix; ``StateValidationError`` is raised when
    it is another's.

    ``counts`` has how often each of ``saved``, ``hit``, ``miss``, ``deleted`` and ``failed``
    happened, ``last_error`` why the last failure did.
    """

    _ttl_name: ClassVar[str] = "ttl_seconds"

    def __init__(
        self,
        enabled: bool | None = None,
        ttl_seconds: float | None = None,
        *,
        key_prefix: str | None = None,
        url: str | None = None,
        transport: Transport | None = None,
        config: RedisConfig | None = None,
        sliding: bool = True,
        max_bytes: int = MAX_BYTES,
        secret_names: Iterable[str] = SECRET_NAMES,
        server_id: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        config = config or RedisConfig.from_env()
        config = config if url is None else replace(config, url=url)
        self.enabled = config.enabled if enabled is None else enabled
        self.ttl_seconds: float = checked_seconds(
            config[self._ttl_name] if ttl_seconds is None else ttl_seconds
        )
        self.counts: Counter[str] = Counter()
        self.last_error: str | None = None
        self._keys = Keys(config.key_prefix if key_prefix is None else key_prefix)
        self._clock = clock or SystemClock()
        self._shared = transport is not None
        self._transport = transport or _transport(config, self._keys, max_bytes, self._clock)
        self._sliding = sliding
        self._redact = Redactor(secret_names)
        self._server_id = config.server_id if server_id is None else server_id
        self._claimed = False
        self._gates = TaskLocks(WAIT_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of connections and processes; a later call opens them again."""
        if not self._shared:
            await self._transport.close()

    async def _put(self, what: str, key: str, record: JsonObject, ttl: float | None) -> bool:
        """Whether it is stored. One who is cancelled waits for the outcome all the same."""
        seconds = self.ttl_seconds if ttl is None else checked_seconds(ttl)
        if not self.enabled:
            return False
        record, secrets = self._redact(record)
        if secrets:
            _logger.warning("%s: stored without its credentials in %s", what, secrets[:20])

        async def put() -> bool:
            async with self._gates.hold([key]):  # of two saves, the later one stays
                await self._transport.put(key, record, seconds)
            return True

        return await shielded(self._attempt(f"{what} is not saved", "saved", put())) or False

    async def _get(self, what: str, key: str) -> JsonObject | None:
        if not self.enabled:
            return None
        getting = self._transport.get(key, sliding=self._sliding)
        return await self._attempt(f"{what} is not loaded", "hit", getting)

    async def _drop(self, what: str, key: str) -> bool:
        if not self.enabled:
            return False

        async def drop() -> bool:
            async with self._gates.hold([key]):
                return await self._transport.drop(key)

        return await shielded(self._attempt(f"{what} is not deleted", "deleted", drop())) or False

    async def _attempt(self, failing: str, counted: str, work: Coroutine[Any, Any, T]) -> T | None:
        """The outcome; None when it failed as it may, which is logged with the reason."""
        try:
            await self._claim()
            outcome = await work
        except EXPECTED as error:
            work.close()
            self._claimed = False  # the Redis that comes back may be another, or empty
            self._note(failing, error)
            return None
        except BaseException:
            work.close()
            raise
        self.counts[counted if outcome else "miss"] += 1
        return outcome

    def _note(self, failing: str, error: Exception) -> None:
        self.counts["failed"] += 1
        self.last_error = f"{failing}: {error}"
        _logger.warning("%s", self.last_error)

    async def _claim(self) -> None:
        if self._server_id is None or self._claimed:
            return
        holder = await self._transport.claim(self._keys.server_id, self._server_id)
        if holder != self._server_id:
            raise StateValidationError(
                f"the prefix {self._keys.prefix!r} is used by {holder!r}, we are"
                f" {self._server_id!r}: give each deployment a prefix of its own"
            )
        self._claimed = True


def _transport(config: RedisConfig, keys: Keys, max_bytes: int, clock: Clock) -> Transport:
    if config.transport == "direct":
        return DirectTransport(config.url, max_bytes=max_bytes, clock=clock)
    return CoaiaTransport(
        config.url,
        keys=keys,
        command=config.coaia_command,
        instance=config.instance,
        max_bytes=max_bytes,
        clock=clock,
    )
