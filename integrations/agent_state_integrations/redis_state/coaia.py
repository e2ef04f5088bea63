"""The coaia tools as a transport: the real ``coaiapy-mcp`` server, started as a process.

The properties of coaiapy-mcp 0.4.3 decide how it is used:

- it has two tools, ``coaia_tash(key, value)`` and ``coaia_fetch(key)``. So a record contains its
  expiry, deleting one writes a tombstone over it, and an index lists them. A server that offers
  ``coaia_drop(key)`` or ``coaia_list(pattern)`` is asked for them;
- errors are text with ``isError`` false: every reply except ``{"success": true, …}`` is an error;
- it connects to Redis once, when it starts: it is restarted until it has a connection;
- it waits for Redis without a limit: a server that does not answer in time is killed;
- it logs every argument to its stderr, which is discarded.

The server needs an environment of its own: ``pip install coaiapy-mcp 'mcp<2'``. With ``mcp`` 2 it
does not start, and its other pins exclude current versions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import compress

from agent_state.clock import Clock, IdFactory, SystemClock, later, new_id, stamp
from agent_state.errors import StateCorruptedError
from agent_state.protocols import JsonObject
from agent_state.serializers import JSONStateSerializer, parse_object
from agent_state.storage.executor import shielded
from agent_state_integrations.redis_state.index import InstanceIndex
from agent_state_integrations.redis_state.keys import Keys, escape_glob
from agent_state_integrations.redis_state.stdio import StdioServer
from agent_state_integrations.redis_state.transports import (
    TransportError,
    expiry,
    fitting,
    time_to_live,
)

START_SECONDS = 30.0
"""Importing what the server needs takes seconds on a slow machine."""
_AT_ONCE = 50
_AWAY = ("Redis connection failed", "Redis not available", "Redis is not available")

_logger = logging.getLogger("agent_state.redis_state")
_serializer = JSONStateSerializer()


class CoaiaTransport:
    """A transport through the tools of a coaia server.

    ``url``: of the Redis, passed to the server. ``command``: how the server is started; a program
    that is not absolute is looked for in ``PATH``. ``instance``: names the index of the sessions
    saved here, by one process at a time; None: a new one for each object. ``timeout_seconds``: for
    one call of a tool; ``start_timeout_seconds``: for starting the server; a method takes at most
    both together. ``retry_seconds``: after a start that failed, no other one before that.
    ``environment``: further variables for the server, which gets little of ours.
    """

    def __init__(
        self,
        url: str,
        *,
        keys: Keys | None = None,
        command: Sequence[str] = ("coaiapy-mcp",),
        instance: str | None = None,
        timeout_seconds: float = 5.0,
        start_timeout_seconds: float = START_SECONDS,
        retry_seconds: float = 1.0,
        max_bytes: int = 8 * 2**20,
        environment: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        new_id: IdFactory = new_id,
    ) -> None:
        if isinstance(command, str) or not command:
            raise TypeError("command is the program and its arguments, as a list")
        self._keys = keys or Keys()
        self._command = tuple(command)
        self._environment = {
            "REDIS_URL": url,
            "COAIAPY_MCP_FEATURES": "MINIMAL",
            "COAIAPY_ENV_PATH": "/dev/null",  # a .env file would override these variables
            "LANGFUSE_TRACING_ENABLED": "false",
            "PYTHONUNBUFFERED": "1",  # its warnings come before its first answer
            **(environment or {}),
        }
        self._timeout = timeout_seconds
        self._start_timeout = start_timeout_seconds
        self._retry_seconds = retry_seconds
        self._max_bytes = max_bytes
        self._clock = clock or SystemClock()
        self._new_id = new_id
        self._server: StdioServer | None = None
        self._starting = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._failed_at: float | None = None
        self._failure = ""
        self._index = InstanceIndex(self, self._keys, instance or new_id(), self._clock)

    @property
    def pid(self) -> int | None:
        """The process id of the server; None while none runs."""
        return self._server.pid if self._server is not None and self._server.alive else None

    async def put(self, key: str, record: JsonObject, seconds: float) -> None:
        record = record | {"_write": self._new_id()}
        if seconds != float("inf"):
            until = stamp(later(self._clock.now(), seconds))
            record |= {"_ttl_seconds": seconds, "_expires_at": until}
        text = fitting(_serializer.dumps(record), self._max_bytes, key).decode()
        async with self._limited(), self._writing:
            if key.startswith(self._keys.sessions):
                await self._index.add(key)  # first, so that every stored record is listed
            await self.tash(key, text)

    async def get(self, key: str, *, sliding: bool) -> JsonObject | None:
        async with self._limited():
            text = await self.fetch(key)
            record = None if text is None else parse_object(text.encode())
            if record is None or "_dropped_at" in record:
                return None
            until, seconds = expiry(record), time_to_live(record)
            if until is None:
                return record
            now = self._clock.now()
            enough = later(now, 0.9 * seconds if sliding and seconds else 0)
            if until <= enough:
                until = max(until, await self._lease(key, record) or until)
            if until <= now:
                return None
            if until < enough and seconds:
                await self._renew(key, record, later(now, seconds))
            return record

    async def _lease(self, key: str, record: JsonObject) -> datetime | None:
        """A later expiry of exactly this version, from a key of its own.

        The record itself is not written again, which could undo a save in between.
        """
        text = await self.fetch(self._keys.lease(key))
        lease = parse_object(text.encode()) if text is not None else {}
        return expiry(lease) if lease.get("of") == record.get("_write", "") else None

    async def _renew(self, key: str, record: JsonObject, until: datetime) -> None:
        if "_write" not in record:
            return
        lease = {"of": record["_write"], "_expires_at": stamp(until)}
        try:
            await self.tash(self._keys.lease(key), _serializer.dumps(lease).decode())
        except TransportError as error:  # the record has been read; it lives as long as it did
            _logger.warning("%s could not be renewed: %s", key, error)

    async def drop(self, key: str) -> bool:
        async with self._limited(), self._writing:
            if not await self._exists(key):
                return False
            server = await self._started()
            if _takes(server, "coaia_drop", "key"):
                await self._call("coaia_drop", {"key": key})
            else:
                tombstone = {"_dropped_at": stamp(self._clock.now())}
                await self.tash(key, _serializer.dumps(tombstone).decode())
            await self._index.remove({key})
            return True

    async def _exists(self, key: str) -> bool:
        try:
            return await self.get(key, sliding=False) is not None
        except StateCorruptedError:
            return True  # it exists, and is unreadable

    async def keys(self, prefix: str) -> list[str]:
        """The keys of sessions. Each is fetched, because it may be dropped or expired."""
        async with self._limited(times=4):
            server = await self._started()
            if _takes(server, "coaia_list", "pattern"):
                answer = await self._call("coaia_list", {"pattern": f"{escape_glob(prefix)}*"})
                if isinstance(listed := answer.get("keys"), list):
                    return sorted(await self._existing({k for k in listed if isinstance(k, str)}))
            indexes = await self._index.all()
            known: set[str] = set().union(*indexes.values())
            living = await self._existing({key for key in known if key.startswith(prefix)})
            await self._clean_indexes(indexes, living)
            return sorted(living)

    async def _existing(self, keys: Iterable[str]) -> set[str]:
        """Those that exist. The questions of a batch are sent at once: one round trip for each."""
        found: set[str] = set()
        ordered = sorted(keys)
        for start in range(0, len(ordered), _AT_ONCE):
            some = ordered[start : start + _AT_ONCE]
            asked = [asyncio.ensure_future(self._exists(key)) for key in some]
            try:
                found.update(compress(some, await asyncio.gather(*asked)))
            finally:
                for each in asked:  # after an error the others are not waited for
                    each.cancel()
        return found

    async def _clean_indexes(self, indexes: Mapping[str, set[str]], living: set[str]) -> None:
        """Remove missing keys from this instance's index, and instances without keys."""
        try:
            async with self._writing:
                gone = indexes[self._index.instance] - living
                await self._index.remove(gone - await self._existing(gone))
                await self._index.forget({name for name in indexes if not indexes[name] & living})
        except TransportError as error:  # the listing is complete
            _logger.warning("the index could not be tidied: %s", error)

    async def claim(self, key: str, owner: str) -> str:
        async with self._limited():
            holder = await self.fetch(key)
            if holder is None:
                await self.tash(key, owner)
                holder = await self.fetch(key)
        if holder is None:
            raise TransportError("who uses the prefix could not be stored", key=key)
        return holder

    async def close(self) -> None:
        async with self._starting:
            if self._server is not None:
                await self._end(self._server)

    async def tash(self, key: str, text: str) -> None:
        """Call the tool of that name. Raises ``TransportError``."""
        await self._call("coaia_tash", {"key": key, "value": text})

    async def fetch(self, key: str) -> str | None:
        """Call the tool of that name; None for a missing key. Raises ``TransportError``."""
        answer = await self._call("coaia_fetch", {"key": key}, missing=f"Key '{key}' not found")
        value = answer.get("value")
        return value if isinstance(value, str) else None

    async def _call(
        self, tool: str, arguments: Mapping[str, str], missing: str | None = None
    ) -> JsonObject:
        """The tool's successful answer, or the one that begins with ``missing``."""
        server = await self._started()
        try:
            async with asyncio.timeout(self._timeout):
                text = await server.call(tool, arguments)
        except TimeoutError as error:
            await self._end(server)
            raise TransportError(f"{tool}: no answer in {self._timeout:g} s") from error
        try:
            answer = parse_object(text.encode())
        except StateCorruptedError:
            raise TransportError(f"{tool}: {text[:200]}") from None
        reason = str(answer.get("error", "no success"))
        if answer.get("success") is True or (missing is not None and reason.startswith(missing)):
            return answer
        if reason.startswith(_AWAY):
            await self._end(server)
        raise TransportError(f"{tool}: {reason[:200]}")

    async def _started(self) -> StdioServer:
        """The running server, or a new one. Raises ``TransportError``."""
        async with self._starting:
            if self._server is not None:
                if self._server.alive:
                    return self._server
                await self._end(self._server)
            now = self._clock.monotonic()
            if self._failed_at is not None and now < self._failed_at + self._retry_seconds:
                raise TransportError(f"not started again yet: {self._failure}")
            try:
                self._server = await self._start()
            except TransportError as error:
                self._failed_at, self._failure = self._clock.monotonic(), error.message
                raise
            return self._server

    async def _start(self) -> StdioServer:
        try:
            async with asyncio.timeout(self._start_timeout):
                server = await StdioServer.start(
                    self._command, self._environment, longest_line=16 * self._max_bytes + 2**20
                )
        except TimeoutError as error:
            raise TransportError(f"not started in {self._start_timeout:g} s") from error
        away = any(_reports_lost_connection(line) for line in server.noise)
        if away or not {"coaia_tash", "coaia_fetch"} <= server.tools.keys():
            await shielded(server.close())
            raise TransportError("Redis was away" if away else "it has no coaia_tash, coaia_fetch")
        return server

    async def _end(self, server: StdioServer) -> None:
        """Stop the server; the next call starts another one."""
        if self._server is server:
            self._server = None
        await shielded(server.close())

    @asynccontextmanager
    async def _limited(self, times: int = 1) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(times * (self._timeout + self._start_timeout)):
                yield
        except TimeoutError as error:
            raise TransportError("the coaia tools took too long") from error


def _takes(server: StdioServer, tool: str, argument: str) -> bool:
    return argument in server.tools.get(tool, ())


def _reports_lost_connection(line: str) -> bool:
    """Whether its first lines report a failed connection; it may use another Redis then."""
    return any(words in line for words in _AWAY)
