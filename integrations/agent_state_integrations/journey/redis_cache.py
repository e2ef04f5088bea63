"""Live sessions in Redis, for other programs to read. The files are the truth.

``redis_layout`` says which keys there are.
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
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ResponseError

from agent_state.clock import instant
from agent_state.errors import AgentStateError, Key
from agent_state.manager import StatePersistenceManager
from agent_state.redis.client import FAILURES, connect, without_password
from agent_state_integrations.journey.models import KIND, JourneyState
from agent_state_integrations.journey.parts import SessionReader, expired
from agent_state_integrations.journey.redis_layout import (
    PARTS,
    enter,
    fields,
    key_of,
    leave,
    metadata,
    score,
)

_LISTS = ("milestones", "breakthroughs")
_CHUNK = 500
_logger = logging.getLogger("agent_state.sessions")


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """How far the cache has come. ``failures``: how often it could not follow at once."""

    waiting: int
    written: int
    removed: int
    failures: int
    last_error: str | None


class RedisConversationCache:
    """A ``ConversationCache`` in Redis. It follows behind the files, and delays and fails nobody.

    ``url`` as ``agent_state.redis.client.connect`` reads it. ``timeout_seconds``: how long a
    command may take, and that closing and erasing wait for it. ``retry_seconds``: how long it
    rests after a failure; when Redis is back, every live session is brought there again.
    ``window``: the messages kept of each session. ``most_waiting``: more sessions than that are
    not noted one by one, and all are brought over instead.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 1.0,
        retry_seconds: float = 1.0,
        window: int = 100,
        most_waiting: int = 10_000,
    ) -> None:
        self._url = url
        self._timeout = timeout_seconds
        self._retry_seconds = retry_seconds
        self._window = window
        self._most_waiting = most_waiting
        self._redis: Redis | None = None
        self._sessions: SessionReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: dict[Key, None] = {}
        self._all = False
        self._stirred = asyncio.Event()
        self._idle = asyncio.Event()
        self._forgetting: dict[Key, asyncio.Event] = {}
        self._written = self._removed = self._failures = 0
        self._last_error: str | None = None

    async def open(self, sessions: SessionReader) -> None:
        if self._task is not None:
            return
        self._sessions = sessions
        self._redis = connect(self._url, timeout_seconds=self._timeout, max_connections=2)
        self._task = asyncio.create_task(self._follow(), name="agent-state-conversation-cache")
        self.refill()

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
        if len(self._waiting) < self._most_waiting:
            self._waiting[user_id, session_id] = None
        else:
            self._all = True
        self._stir()

    async def forget(self, user_id: str, session_id: str) -> None:
        key = (user_id, session_id)
        self._waiting[key] = None  # in any case: what is erased is in no listing of all
        if self._task is None:
            return
        gone = self._forgetting.setdefault(key, asyncio.Event())
        self._stir()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await gone.wait()

    def refill(self) -> None:
        """Bring every live session over again, in the background."""
        self._all = True
        self._stir()

    def status(self) -> CacheStatus:
        """Where it stands now."""
        return CacheStatus(
            len(self._waiting), self._written, self._removed, self._failures, self._last_error
        )

    async def settled(self) -> None:
        """Wait until nothing waits."""
        await self._idle.wait()

    def _stir(self) -> None:
        self._idle.clear()
        self._stirred.set()

    # -- following ---------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            if not self._waiting and not self._all:
                self._idle.set()
                await self._stirred.wait()
            self._stirred.clear()
            try:
                await self._bring_all()
                await self._bring_waiting()
            except (*FAILURES, AgentStateError) as error:
                self._note(error)
                await self._until_it_answers()
                self._all = True  # it may have come back empty

    async def _bring_all(self) -> None:
        if not self._all:
            return
        self._all = False
        for key in await self._manager.keys(KIND):
            if len(key) == 2:
                self._waiting[key] = None

    async def _bring_waiting(self) -> None:
        while self._waiting:
            key = next(iter(self._waiting))
            del self._waiting[key]
            try:
                await self._bring(key)
            except ResponseError as error:
                self._note(error)  # of this session: others may go on, and its next change
            except AgentStateError as error:
                self._note(error)  # its files cannot be read, which their reader is told
            except BaseException:
                self._waiting[key] = None
                raise
            if (gone := self._forgetting.pop(key, None)) is not None:
                gone.set()

    def _note(self, error: Exception) -> None:
        self._failures += 1
        self._last_error = f"{type(error).__name__}: {error}"
        where = without_password(self._url)
        _logger.warning("conversations could not be cached in %s: %s", where, self._last_error)

    async def _until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(self._retry_seconds)
            try:
                await cast("Any", self._client.ping())
            except FAILURES:
                continue  # noted when it began
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

    async def _bring(self, key: Key) -> None:
        """Make Redis hold what the files hold; once more if they have changed meanwhile."""
        loaded = await self._manager.load_with_revision(KIND, key)
        now = self._manager.clock.now()
        if loaded is None or expired(cast("JourneyState", loaded.state), now):
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
            leave(pipe, key)
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
            pipe.hset(key_of(user_id, session_id, "emotion"), mapping=fields(state.emotion))
            context = fields(state.context_snapshot)
            pipe.hset(key_of(user_id, session_id, "context_snapshot"), mapping=context)
            pipe.delete(place)
            if messages:
                pipe.rpush(place, *messages)
            for part in PARTS:
                pipe.expire(key_of(user_id, session_id, part), ttl)
            if state.status == "active":
                enter(pipe, key, ttl)
            else:
                leave(pipe, key)
            await pipe.execute()

    async def _complete(self, key: Key, part: str, count: int) -> None:
        """Add what a sorted set lacks; what is there is the beginning of the log."""
        place = key_of(key[0], key[1], part)
        have = await self._client.zcard(place)
        if have == count:
            return
        if have < count and await self._add(key, part, place, count - have) == count:
            return
        await self._client.delete(place)  # some of it was lost, or is somebody else's
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
        """Whole or not at all, except in a cluster, where the keys are on several servers."""
        client: Any = self._client
        return client.pipeline(transaction=not isinstance(client, RedisCluster))
