"""Live sessions in Redis, for other programs to read. The stored documents are the truth.

The keys::

    session:{user_id}:{session_id}:metadata          HASH
    session:{user_id}:{session_id}:emotion           HASH   current_emotion, emotion_intensity, …
    session:{user_id}:{session_id}:messages          LIST   the latest 100, as JSON
    session:{user_id}:{session_id}:milestones        ZSET   JSON by time
    session:{user_id}:{session_id}:breakthroughs     ZSET   JSON by time
    session:{user_id}:{session_id}:context_snapshot  HASH
    sessions:user:{user_id}:index                    SET    of session ids
    sessions:global:active                           SET    of {user_id}:{session_id}

In ids ``%`` and ``:`` are written ``%25`` and ``%3A``, so that no id reaches another one's key.
Every key expires with the session, the indices with their last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import orjson

from agent_state.clock import instant
from agent_state.errors import AgentStateError, Key, needs_extra
from agent_state.manager import StatePersistenceManager
from agent_state.models import OpenModel
from agent_state_integrations.journey.models import KIND, EmotionState, JourneyState
from agent_state_integrations.journey.repository import SessionReader, is_expired

with needs_extra("redis", "redis"):
    from redis.asyncio import Redis, RedisCluster
    from redis.exceptions import ResponseError

    from agent_state.redis.client import FAILURES, connect, without_password

ACTIVE = "sessions:global:active"
PARTS = ("metadata", "emotion", "messages", "milestones", "breakthroughs", "context_snapshot")
_LISTS = ("milestones", "breakthroughs")
_CHUNK = 500
_logger = logging.getLogger("agent_state.sessions")


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """The progress of the cache."""

    waiting: int
    """The sessions that are still to be written."""
    written: int
    """The sessions written so far, each change counted."""
    removed: int
    """The sessions removed so far."""
    failures: int
    """The failed attempts so far."""
    last_error: str | None
    """The latest failure; None before the first one."""


class RedisConversationCache:
    """A ``ConversationCache`` in Redis. It follows the stored sessions in the background.

    ``url`` as ``agent_state.redis.client.connect`` reads it. ``timeout_seconds``: how long a
    command may take, and that closing and erasing wait for it. ``retry_seconds``: how long it
    waits after a failure; when Redis is reachable again, every live session is written again.
    ``window``: the messages kept of each session. ``max_waiting``: when more sessions than that
    are waiting, all sessions are written again instead.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 1.0,
        retry_seconds: float = 1.0,
        window: int = 100,
        max_waiting: int = 10_000,
    ) -> None:
        self._url = url
        self._timeout = timeout_seconds
        self._retry_seconds = retry_seconds
        self._window = window
        self._max_waiting = max_waiting
        self._redis: Redis | None = None
        self._sessions: SessionReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: dict[Key, None] = {}
        self._all = False
        self._wake_up = asyncio.Event()
        self._idle = asyncio.Event()
        self._forgotten: dict[Key, asyncio.Event] = {}
        self._written = self._removed = self._failures = 0
        self._last_error: str | None = None

    async def open(self, sessions: SessionReader) -> None:
        if self._task is not None:
            return
        self._sessions = sessions
        self._redis = connect(self._url, timeout_seconds=self._timeout, max_connections=2)
        self._task = asyncio.create_task(self._follow(), name="agent-state-conversation-cache")
        self.rewrite_all()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await self._idle.wait()
        task.cancel()
        await asyncio.wait([task])
        if self._redis is not None:
            await self._redis.aclose()
            self._redis = None

    def changed(self, user_id: str, session_id: str) -> None:
        if len(self._waiting) < self._max_waiting:
            self._waiting[user_id, session_id] = None
        else:
            self._all = True
        self._notify()

    async def forget(self, user_id: str, session_id: str) -> None:
        key = (user_id, session_id)
        self._waiting[key] = None  # in any case: a listing of all sessions lacks an erased one
        if self._task is None:
            return
        gone = self._forgotten.setdefault(key, asyncio.Event())
        self._notify()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await gone.wait()

    def rewrite_all(self) -> None:
        """Write every live session again, in the background."""
        self._all = True
        self._notify()

    def status(self) -> CacheStatus:
        """The progress of the cache now."""
        return CacheStatus(
            len(self._waiting), self._written, self._removed, self._failures, self._last_error
        )

    async def wait_idle(self) -> None:
        """Wait until no session is waiting."""
        await self._idle.wait()

    def _notify(self) -> None:
        self._idle.clear()
        self._wake_up.set()

    # -- the background task -----------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            if not self._waiting and not self._all:
                self._idle.set()
                await self._wake_up.wait()
            self._wake_up.clear()
            try:
                await self._queue_all()
                await self._write_waiting()
            except (*FAILURES, AgentStateError) as error:
                self._report(error)
                await self._wait_for_server()
                self._all = True  # it may have lost its data

    async def _queue_all(self) -> None:
        if not self._all:
            return
        self._all = False
        for key in await self._manager.keys(KIND):
            if len(key) == 2:
                self._waiting[key] = None

    async def _write_waiting(self) -> None:
        while self._waiting:
            key = next(iter(self._waiting))
            del self._waiting[key]
            try:
                await self._sync(key)
            except ResponseError as error:
                self._report(error)  # of this session alone: the others go on
            except AgentStateError as error:
                self._report(error)  # its files cannot be read; their readers get the error
            except BaseException:
                self._waiting[key] = None
                raise
            if (gone := self._forgotten.pop(key, None)) is not None:
                gone.set()

    def _report(self, error: Exception) -> None:
        self._failures += 1
        self._last_error = f"{type(error).__name__}: {error}"
        where = without_password(self._url)
        _logger.warning("conversations could not be cached in %s: %s", where, self._last_error)

    async def _wait_for_server(self) -> None:
        while True:
            await asyncio.sleep(self._retry_seconds)
            try:
                await cast("Any", self._client.ping())
            except FAILURES:
                continue  # reported when the outage began
            return

    @property
    def _manager(self) -> StatePersistenceManager:
        if self._sessions is None:
            raise AgentStateError("the cache is not open")
        return self._sessions.manager

    @property
    def _client(self) -> Redis:
        if self._redis is None:
            raise AgentStateError("the cache is not open")
        return self._redis

    # -- one session -------------------------------------------------------------------------

    async def _sync(self, key: Key) -> None:
        """Copy the stored session to Redis; once more if it has changed during that."""
        loaded = await self._manager.load_with_revision(KIND, key)
        now = self._manager.clock.now()
        if loaded is None or is_expired(cast("JourneyState", loaded.state), now):
            await self._remove(key)
            return
        state = cast("JourneyState", loaded.state)
        ttl = max(1, math.ceil((instant(state.expires_at) - now).total_seconds()))
        await self._write(key, state, ttl)
        self._written += 1
        after = await self._manager.load_with_revision(KIND, key)
        if after is None or after.revision != loaded.revision:
            self._waiting[key] = None

    async def _remove(self, key: Key) -> None:
        user_id, session_id = key
        async with self._pipeline() as pipe:
            for part in PARTS:
                pipe.delete(key_of(user_id, session_id, part))
            remove_from_indices(pipe, key)
            await pipe.execute()
        self._removed += 1

    async def _write(self, key: Key, state: JourneyState, ttl: int) -> None:
        user_id, session_id = key
        messages = [
            orjson.dumps(entry.record)
            async for entry in self._manager.read_log(KIND, (*key, "messages"), last=self._window)
        ]
        for part in _LISTS:
            await self._complete(key, part, getattr(state.counters, part))
        place = key_of(user_id, session_id, "messages")
        async with self._pipeline() as pipe:
            pipe.hset(key_of(user_id, session_id, "metadata"), mapping=metadata(state))
            pipe.hset(key_of(user_id, session_id, "emotion"), mapping=emotion(state.emotion))
            context = fields(state.context_snapshot)
            context["last_summarized"] = context.get("updated_at", "")
            pipe.hset(key_of(user_id, session_id, "context_snapshot"), mapping=context)
            pipe.delete(place)
            if messages:
                pipe.rpush(place, *messages)
            for part in PARTS:
                pipe.expire(key_of(user_id, session_id, part), ttl)
            if state.status == "active":
                enter(pipe, key, ttl)
            else:
                remove_from_indices(pipe, key)
            await pipe.execute()

    async def _complete(self, key: Key, part: str, count: int) -> None:
        """Add the records that a sorted set lacks; its members are the beginning of the log."""
        place = key_of(key[0], key[1], part)
        have = await self._client.zcard(place)
        if have == count:
            return
        if have < count and await self._add(key, part, place, count - have) == count:
            return
        await self._client.delete(place)  # members were lost, or other programs wrote them
        await self._add(key, part, place, None)

    async def _add(self, key: Key, part: str, place: str, last: int | None) -> int:
        members: dict[str | bytes, float] = {}
        async for record in self._records(key, part, last):
            members[orjson.dumps(record)] = score(record.get("timestamp"))
            if len(members) == _CHUNK:
                await self._client.zadd(place, cast("Any", members))
                members.clear()
        if members:
            await self._client.zadd(place, cast("Any", members))
        return int(await self._client.zcard(place))

    async def _records(self, key: Key, log: str, last: int | None) -> AsyncIterator[dict[str, Any]]:
        async for entry in self._manager.read_log(KIND, (*key, log), last=last):
            yield entry.record

    def _pipeline(self) -> Any:
        """A transaction, except in a cluster, where the keys are on several servers."""
        client: Any = self._client
        return client.pipeline(transaction=not isinstance(client, RedisCluster))


# -- the layout ---------------------------------------------------------------------------------


def escaped(ident: str) -> str:
    """An id within a key."""
    return ident.replace("%", "%25").replace(":", "%3A")


def key_of(user_id: str, session_id: str, part: str) -> str:
    """``session:{user_id}:{session_id}:{part}``."""
    return f"session:{escaped(user_id)}:{escaped(session_id)}:{part}"


def index_of(user_id: str) -> str:
    """``sessions:user:{user_id}:index``."""
    return f"sessions:user:{escaped(user_id)}:index"


def enter(pipe: Any, key: Key, ttl: int) -> None:
    """Put a session into the indices, which live as long as their last one."""
    user_id, session_id = key
    pipe.sadd(index_of(user_id), session_id)
    pipe.sadd(ACTIVE, f"{escaped(user_id)}:{escaped(session_id)}")
    for index in (index_of(user_id), ACTIVE):
        pipe.expire(index, ttl, nx=True)  # GT alone leaves a new key without an expiry
        pipe.expire(index, ttl, gt=True)


def remove_from_indices(pipe: Any, key: Key) -> None:
    """Remove a session from the indices."""
    user_id, session_id = key
    pipe.srem(index_of(user_id), session_id)
    pipe.srem(ACTIVE, f"{escaped(user_id)}:{escaped(session_id)}")


def metadata(state: JourneyState) -> dict[str, str]:
    """The fields of the hash ``metadata``."""
    own = fields(state)
    for name in ("emotion", "context_snapshot", "counters", "last_message", "last_breakthrough"):
        own.pop(name, None)
    own["session_version"] = own.get("version", "")
    own["model_switch_timestamp"] = own.get("model_switched_at", "")
    own["message_count"] = str(state.counters.messages)
    own["milestone_count"] = str(state.counters.milestones)
    own["breakthrough_count"] = str(state.counters.breakthroughs)
    return own


def emotion(state: EmotionState) -> dict[str, str]:
    """The fields of the hash ``emotion``, also by the names that the first design has."""
    own = fields(state)
    return own | {former: own[name] for former, name in EmotionState.former_names.items()}


def fields(model: OpenModel) -> dict[str, str]:
    """Every field as text, what is not set as an empty one, so that no older value stays."""
    names = [*type(model).model_fields, *(model.model_extra or {})]
    return {name: _text(getattr(model, name)) for name in names}


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, OpenModel):
        value = value.model_dump()
    return orjson.dumps(value).decode()


def score(time: object) -> float:
    """A stored time as seconds since 1970; 0 if it is not a time."""
    try:
        return instant(str(time)).timestamp()
    except ValueError:
        return 0.0
