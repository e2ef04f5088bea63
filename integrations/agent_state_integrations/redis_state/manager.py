"""The session manager and the execution cache: records in Redis that outlive the process."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar

from agent_state.clock import Clock, SystemClock, stamp
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
from agent_state_integrations.redis_state.keys import Keys, glob
from agent_state_integrations.redis_state.records import (
    SECRET_NAMES,
    Redactor,
    UniversalSession,
    checked_version,
    compressed,
    decompressed,
    from_session,
    is_bare_result,
    to_session,
    written,
)
from agent_state_integrations.redis_state.transports import (
    TooLargeError,
    Transport,
    TransportError,
)

MAX_BYTES = 8 * 2**20
WAIT_SECONDS = 5.0

_EXPECTED = (
    TransportError,
    TooLargeError,
    StateCorruptedError,
    SchemaTooNewError,
    LockTimeoutError,
)
"""Errors that are logged and not raised: no mistake in the program causes them."""

T = TypeVar("T")

_logger = logging.getLogger("agent_state.redis_state")


class BestEffortStore:
    """Stores records in Redis, and goes on without it.

    When Redis is away, slow, full or read-only, or a record is damaged, too new or too large, the
    failure is logged and counted, and the result is False, None or an empty list. The next call
    tries again. Mistakes in the program raise ``TypeError``, ``SerializationError`` (a value that
    is not JSON, such as a datetime in a context), ``InvalidKeyError`` or ``StateValidationError``.

    ``enabled``: False to store and read nothing. ``ttl_seconds``: how long a record is kept,
    ``math.inf`` for ever. ``sliding``: reading a record renews its time to live. ``config``: gives
    every argument that is None; None for ``RedisConfig.from_env()``. ``transport``: a shared one,
    which its maker closes; None for the one that the configuration names. ``max_bytes``: the size
    of the largest record. ``secret_names``: patterns of fields that are stored as ``[redacted]``.
    ``gzip_over_bytes``: records that are larger as JSON are stored compressed; programs of older
    versions cannot read those. None for the configuration's, which is that none is.
    ``server_id``: the user of the prefix; another user's prefix raises ``StateValidationError``.

    ``counts``: the numbers of ``saved``, ``hit``, ``miss``, ``deleted`` and ``failed``.
    ``last_error``: the reason of the last failure; None before the first.
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
        gzip_over_bytes: int | None = None,
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
        if gzip_over_bytes is None:
            gzip_over_bytes = config.gzip_over_bytes
        self._gzip_over = math.inf if gzip_over_bytes is None else gzip_over_bytes
        self._server_id = config.server_id if server_id is None else server_id
        self._claimed = False
        self._locks = TaskLocks(WAIT_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close connections and processes; a later call opens them again."""
        if not self._shared:
            await self._transport.close()

    async def _put(self, name: str, key: str, record: JsonObject, ttl: float | None) -> bool:
        """Whether the record was stored. A cancelled caller waits for the outcome all the same."""
        seconds = self.ttl_seconds if ttl is None else checked_seconds(ttl)
        if not self.enabled:
            return False
        record, secrets = self._redact(record)
        if secrets:
            _logger.warning("%s: stored without its credentials in %s", name, secrets[:20])

        record = compressed(record, self._gzip_over)

        async def put() -> bool:
            async with self._locks.hold([key]):  # of two saves the later one wins
                await self._transport.put(key, record, seconds)
            return True

        return await shielded(self._attempt(f"{name} is not saved", "saved", put())) or False

    async def _get(self, name: str, key: str) -> JsonObject | None:
        if not self.enabled:
            return None

        async def get() -> JsonObject | None:
            record = await self._transport.get(key, sliding=self._sliding)
            return None if record is None else decompressed(record)

        return await self._attempt(f"{name} is not loaded", "hit", get())

    async def _drop(self, name: str, key: str) -> bool:
        if not self.enabled:
            return False

        async def drop() -> bool:
            async with self._locks.hold([key]):
                return await self._transport.drop(key)

        return await shielded(self._attempt(f"{name} is not deleted", "deleted", drop())) or False

    async def _attempt(self, failure: str, counter: str, work: Coroutine[Any, Any, T]) -> T | None:
        """The outcome; None after an expected failure, which is logged with its reason."""
        try:
            await self._claim()
            outcome = await work
        except _EXPECTED as error:
            work.close()
            self._claimed = False  # another Redis, or an empty one, may answer next
            self._note(failure, error)
            return None
        except BaseException:
            work.close()
            raise
        self.counts[counter if outcome else "miss"] += 1
        return outcome

    def _note(self, failure: str, error: Exception) -> None:
        self.counts["failed"] += 1
        self.last_error = f"{failure}: {error}"
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
        start_timeout_seconds=config.coaia_start_seconds,
        instance=config.instance,
        max_bytes=max_bytes,
        clock=clock,
    )


class RedisSessionManager(BestEffortStore):
    """Stores sessions under ``{prefix}session:<id>``, by default for a day."""

    async def save_session(
        self, session: UniversalSession, *, ttl_seconds: float | None = None
    ) -> bool:
        """Store the session, in place of an earlier version; returns whether it was stored.

        ``ttl_seconds``: for this session until its next save; None for the manager's. Of two
        processes that save one session, the last one wins. After a timeout the result is False:
        the session may be stored at that time, and is not stored later.
        """
        if not isinstance(session, UniversalSession):
            raise TypeError(f"a session is a UniversalSession, not {type(session).__name__}")
        key = self._keys.session(session.id)
        return await self._put(_name_of(session.id), key, from_session(session), ttl_seconds)

    async def load_session(self, session_id: str) -> UniversalSession | None:
        """The session; None if it is missing or cannot be read now."""
        record = await self._get(_name_of(session_id), self._keys.session(session_id))
        try:
            return None if record is None else to_session(record)
        except (SchemaTooNewError, StateCorruptedError) as error:
            self._note(f"{_name_of(session_id)} is not loaded", error)
            return None

    async def delete_session(self, session_id: str) -> bool:
        """Whether the session existed and was deleted."""
        return await self._drop(_name_of(session_id), self._keys.session(session_id))

    async def list_sessions(self, pattern: str = "*") -> list[str]:
        """The ids that match a glob (``*``, ``?``, ``[a-z]``), sorted.

        ``escape_glob`` makes the glob that matches one id.
        """
        matches = glob(pattern).match
        if not self.enabled:
            return []
        prefix = self._keys.sessions
        keys = await self._attempt("sessions are not listed", "hit", self._transport.keys(prefix))
        return [name for key in keys or () if matches(name := key.removeprefix(prefix))]


def _name_of(session_id: str) -> str:
    return f"session {session_id!r}"


class RedisExecutionCache(BestEffortStore):
    """Stores results under ``{prefix}execution:<id>``, histories under ``{prefix}history:…``.

    By default for an hour. After a failure its methods return what those of
    ``RedisSessionManager`` do.
    """

    _ttl_name: ClassVar[str] = "execution_ttl_seconds"

    async def cache_result(
        self, execution_id: str, result: dict[str, Any], *, ttl_seconds: float | None = None
    ) -> bool:
        """Store the result of one execution; returns whether it was stored."""
        if not isinstance(result, dict):
            raise TypeError(f"a result is a dict, not {type(result).__name__}")
        key = self._keys.execution(execution_id)
        record = self._written(execution_id=execution_id, result=result)
        return await self._put(f"execution {execution_id!r}", key, record, ttl_seconds)

    async def get_result(self, execution_id: str) -> dict[str, Any] | None:
        """The result; None if it is missing or cannot be read now."""
        name = f"execution {execution_id!r}"
        value = await self._field(name, self._keys.execution(execution_id), "result")
        return value if isinstance(value, dict) else None

    async def cache_flow_history(
        self,
        session_id: str,
        flow_id: str,
        executions: Sequence[dict[str, Any]],
        *,
        ttl_seconds: float | None = None,
    ) -> bool:
        """Store a flow's executions in a session, in place of those stored before."""
        if not isinstance(executions, list | tuple):
            raise TypeError(f"executions are a list of dicts, not {type(executions).__name__}")
        wrong = next((each for each in executions if not isinstance(each, dict)), None)
        if wrong is not None:
            raise TypeError(f"an execution is a dict, not {type(wrong).__name__}")
        key = self._keys.history(session_id, flow_id)
        record = self._written(session_id=session_id, flow_id=flow_id, executions=list(executions))
        return await self._put(f"history {session_id!r}, {flow_id!r}", key, record, ttl_seconds)

    async def get_flow_history(self, session_id: str, flow_id: str) -> list[dict[str, Any]] | None:
        """The executions; None if none are stored or they cannot be read now."""
        name = f"history {session_id!r}, {flow_id!r}"
        value = await self._field(name, self._keys.history(session_id, flow_id), "executions")
        return value if isinstance(value, list) else None

    def _written(self, **fields: Any) -> JsonObject:
        return written({**fields, "cached_at": stamp(self._clock.now())})

    async def _field(self, name: str, key: str, field: str) -> Any:
        record = await self._get(name, key)
        try:
            if record is None:
                return None
            checked_version(record)
            if field == "result" and is_bare_result(record):
                return {each: value for each, value in record.items() if not each.startswith("_")}
            if field not in record:
                raise StateCorruptedError(f"the record has no {field}", key=key)  # noqa: TRY301
        except (SchemaTooNewError, StateCorruptedError) as error:
            self._note(f"{name} is not loaded", error)
            return None
        return record[field]
