"""The store for several machines: the same documents and logs, kept by a Redis server.

All of one store is in one slot of a cluster, because a group may span any of its documents and
is changed by one script. Several stores, with prefixes of their own, spread over a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from agent_state.clock import Clock, new_id, stamp
from agent_state.errors import (
    Key,
    LockTimeoutError,
    StateCorruptedError,
    StorageError,
    concerning,
    describe,
)
from agent_state.protocols import Append, Change, Document, Incident, LogRecord, Notice, Origin
from agent_state.redis import checks, reading
from agent_state.redis.client import without_password
from agent_state.redis.commits import DELETED_SECONDS, Commits, Locked, Target, job_of, target
from agent_state.redis.erasing import Erasing
from agent_state.redis.keys import Names, place_of, text_of
from agent_state.redis.link import Argument, Lane, Link, call
from agent_state.redis.locking import Leases
from agent_state.redis.scripts import OPEN, QUARANTINE
from agent_state.redis.timing import ServerClock
from agent_state.redis.watching import Following
from agent_state.storage import logs, paths
from agent_state.storage.locks import TaskLocks
from agent_state.storage.watch import Subscription

_logger = logging.getLogger("agent_state.redis")
_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class _Open:
    """What there is between ``open`` and ``close``."""

    link: Link
    lane: Lane
    commits: Commits
    leases: Leases
    following: Following


class RedisStateStore:
    """Documents and logs in Redis (6.2 or newer) or Valkey, for any number of processes and hosts.

    ``url``: one server, a cluster or sentinels, as ``agent_state.redis.client.connect`` reads
    it. ``prefix``: stores with different prefixes do not see each other. ``timeout_seconds``: how
    long a command may take; one that changes something is tried twice, and raises
    ``DurabilityUnknownError`` when nobody knows what became of it. ``wait_replicas``: a commit
    returns once so many replicas have it, and raises ``DurabilityUnknownError`` when they do not
    say so in time; 0 asks none. ``lock_timeout_seconds``: how long to wait for a lock.
    ``lock_seconds``: how long a lock lasts that nobody renews; its holder does.

    ``clock`` is the server's time, unless one is given: leases compare times of several hosts.
    What the server's settings could cost is logged as a warning at ``open``: it is a matter of
    whoever runs the server, and no mistake in the program.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "",
        timeout_seconds: float = 1.0,
        wait_replicas: int = 0,
        lock_timeout_seconds: float = 10.0,
        lock_seconds: float = 10.0,
        clock: Clock | None = None,
        new_id: Callable[[], str] = new_id,
    ) -> None:
        self._url = url
        self._names = Names(prefix)
        self._timeout = timeout_seconds
        self._wait_replicas = wait_replicas
        self._lock_timeout = lock_timeout_seconds
        self._lock_seconds = lock_seconds
        self._server_clock = ServerClock() if clock is None else None
        self.clock: Clock = clock or self._server_clock or ServerClock()
        self._new_id = new_id
        self._incidents: list[Incident] = []
        self._gates = TaskLocks(lock_timeout_seconds)
        self._opening = asyncio.Lock()
        self._opened: _Open | None = None

    # -- life --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and look at the server's settings. Raises ``StorageError``."""
        async with self._opening:
            if self._opened is None:
                self._incidents.clear()
                self._opened = await self._connected()

    async def _connected(self) -> _Open:
        link = self._connect(self._timeout)
        try:
            sent = self._server_clock.local() if self._server_clock else None
            micros = await link.run(*call(OPEN, [self._names.locks], []), doing="opening")
            if self._server_clock is not None and sent is not None:
                self._server_clock.learn(sent, int(micros), self._server_clock.local())
            for warning in await checks.look_at(link, wait_replicas=self._wait_replicas):
                _logger.warning("%s: %s", link.url, warning)
        except BaseException:
            await link.close()
            raise
        # Known to nobody else, whatever makes the ids: batches of one writer are numbered.
        writer = secrets.token_hex(8)
        lane = Lane(link)
        following = Following(
            self._names,
            writer,
            lane,
            partial(self._connect, 2 * self._timeout),
            was_doubtful=lambda number: commits.was_doubtful(number),  # noqa: PLW0108  # made below
        )
        commits = Commits(
            link,
            self._names,
            writer,
            self._server_clock,
            now=lambda: stamp(self.clock.now()),
            tell=following.notify,
            wait_replicas=self._wait_replicas,
        )
        leases = Leases(lane, self._names, writer, seconds=self._lock_seconds)
        return _Open(link, lane, commits, leases, following)

    def _connect(self, timeout: float) -> Link:
        anchor = self._names.notices
        return Link(self._url, timeout=timeout, max_connections=_CONNECTIONS, anchor=anchor)

    async def close(self) -> None:
        """Wait for what was handed over, and let the connections go."""
        async with self._opening:
            opened, self._opened = self._opened, None
            if opened is not None:
                await opened.commits.ended()
                await opened.following.close()
                await opened.lane.ended()
                await opened.link.close()

    @property
    def _now_open(self) -> _Open:
        if self._opened is None:
            raise StorageError("the store is not open", path=without_password(self._url))
        return self._opened

    async def flush(self) -> None:
        """Wait for what was handed over. What that means is the server's setting."""
        await self._now_open.commits.ended()

    # -- documents ---------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        text = text_of(kind, key)
        with concerning(kind, key):
            fields = await reading.found(self._now_open.lane, self._names, kind, text)
        try:
            return reading.document_of(kind, key, fields)
        except StateCorruptedError as error:
            await self._put_aside(kind, key, error.message, fields)
            raise

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        targets = [target(change) for change in changes]
        for change in changes:
            if isinstance(change, Append):
                logs.check_record(change.body, change.dedupe_key)
        if not targets:
            return []
        until = time.monotonic() + self._lock_timeout
        while True:
            try:
                return await self._commit(targets)
            except Locked as locked:
                left = until - time.monotonic()
                if left <= 0:
                    change = locked.change
                    raise LockTimeoutError(
                        f"another process held it for {self._lock_timeout:g} s",
                        kind=change.kind,
                        key=change.key,
                    ) from None
                await asyncio.sleep(min(left, locked.seconds, 0.02))

    async def _commit(self, targets: Sequence[Target]) -> list[int]:
        opened = self._now_open
        if not self._gates:
            return await opened.commits.submit(job_of(targets, self._names, _nothing_held))
        async with self._gates.hold({target.place for target in targets}):
            return await opened.commits.submit(job_of(targets, self._names, opened.leases.held))

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._listed(self._names.index(paths.check_kind(kind)), prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._listed(self._names.logs(paths.check_kind(kind)), prefix)

    async def _listed(self, index: str, prefix: Key) -> list[Key]:
        pages = reading.members(self._now_open.lane, index, prefix)
        return sorted([member.key async for page in pages for member in page])

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        index = self._names.index(paths.check_kind(kind))
        lane = self._now_open.lane
        async for page in reading.members(lane, index, prefix):
            async for member, fields in reading.pages(lane, self._names, kind, page):
                document = await self._usable(kind, member.key, fields)
                if document is not None:
                    yield document

    async def _usable(
        self, kind: str, key: Key, fields: reading.Found | Exception
    ) -> Document | None:
        if isinstance(fields, Exception):
            if "WRONGTYPE" not in str(fields):
                raise fields
            await self._put_aside(kind, key, "it is no hash", None)
            return None
        try:
            return reading.document_of(kind, key, fields)
        except StateCorruptedError as error:
            await self._put_aside(kind, key, error.message, fields)
            return None

    async def erase(self, kind: str, key: Key) -> int:
        """As every store does; names of what was deleted within a day are looked for everywhere."""
        text, opened = text_of(kind, key), self._now_open
        async with self.lock(kind, key):
            place = place_of(kind, text)
            erasing = Erasing(
                opened.link,
                opened.lane,
                self._names,
                opened.commits.writer,
                kind,
                key,
                text,
                place,
                opened.leases.held(place),
            )
            documents, logs = await erasing.run()
            for gone in documents:
                opened.following.notify(Notice(kind, gone, None))
        return len(documents) + logs

    async def quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        """Put the document aside, under a key of its own. Redis keeps no earlier version."""
        await self._put_aside(kind, key, reason, None)
        return None

    async def _put_aside(
        self, kind: str, key: Key, reason: str, seen: reading.Found | None
    ) -> None:
        """Move the document out of the way; if ``seen`` is given, only while it is that one."""
        text, names = text_of(kind, key), self._names
        ident = self._new_id()
        kept = names.quarantine(kind, text, ident)
        body = b"" if seen is None else b"=" + (seen[0] or b"")
        at = stamp(self.clock.now())
        opened = self._now_open
        keys = [names.document(kind, text), names.index(kind), names.notices, kept]
        about: list[Argument] = [kind, text, reason, at, body, DELETED_SECONDS]
        command = call(
            QUARANTINE,
            [*keys, names.reason(kind, text, ident)],
            [*about, opened.commits.writer],
        )
        with concerning(kind, key):
            moved = await opened.lane.run(*command, doing="putting aside")
        if moved:
            self._note(Incident(reason, kind, key, path=names.document(kind, text), kept=kept))
            opened.following.notify(Notice(kind, key, None))

    async def origin(self) -> Origin:
        return Origin()

    def incidents(self) -> list[Incident]:
        return list(self._incidents)

    def _note(self, incident: Incident) -> None:
        if incident not in self._incidents:
            self._incidents.append(incident)
            where = describe(incident.kind or "", incident.key)
            _logger.error("%s: %s", where, incident.what)

    # -- logs --------------------------------------------------------------------------------

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        log = self._names.log(kind, text_of(kind, key))
        lane = self._now_open.lane
        if last is not None:
            after = max(after, await reading.last_seq(lane, log) - last)
        async for record in reading.records(lane, log, after):
            if isinstance(record, LogRecord):
                yield record
            else:
                seq, why = record
                self._note(Incident(f"record {seq}: {why}", kind, key, path=log))

    # -- others ------------------------------------------------------------------------------

    async def watch(self) -> Subscription:
        following = self._now_open.following
        subscription = following.subscribe()
        try:
            await following.start()
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

    @contextlib.asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        place = place_of(kind, text_of(kind, key))
        opened = self._now_open
        began = time.monotonic()
        async with self._gates.hold([place]):
            if opened.leases.held(place):
                yield  # passed again by the task that holds it
                return
            left = max(0.0, self._lock_timeout - (time.monotonic() - began))
            async with opened.leases.holding(place, left, kind=kind, key=key):
                await opened.commits.ended()  # those of this process that were handed over before
                yield


def _nothing_held(_: str) -> str:
    return ""
