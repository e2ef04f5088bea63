"""A store for several machines: the documents and logs are kept by a Redis server.

All keys of one store are in one slot of a cluster, because a group may span any of its documents
and one script changes it. Several stores, with prefixes of their own, spread over a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis.exceptions import ResponseError

from agent_state.clock import Clock, new_id, stamp
from agent_state.errors import (
    Key,
    LeaseLostError,
    LockTimeoutError,
    StateCorruptedError,
    StorageError,
    concerning,
    describe,
)
from agent_state.protocols import Append, Change, Document, Incident, LogRecord, Notice, Origin
from agent_state.redis.client import (
    Argument,
    PipelineBatcher,
    RedisLink,
    Script,
    failure_kind,
    without_password,
)
from agent_state.redis.commit import (
    DELETED_SECONDS,
    CommitQueue,
    LockedError,
    ServerClock,
    TargetedChange,
    encode_commit,
    targeted,
)
from agent_state.redis.keys import StoreKeys, escape_glob, lock_of, text_of
from agent_state.redis.locks import LOCKS, LeaseLocks
from agent_state.redis.reader import Fields, Member, StoreReader, document_of
from agent_state.redis.watch import NoticeReader
from agent_state.storage import logs, paths
from agent_state.storage.locks import TaskLocks
from agent_state.storage.watch import Broadcast, Subscription

_REMOVE = Script.load("remove")
_OLDEST_VERSION = (6, 2)
_KEYS_PER_ERASE = 200
_logger = logging.getLogger("agent_state.redis")


@dataclass(frozen=True, slots=True)
class _Connected:
    """The parts of a store that exist between ``open`` and ``close``."""

    link: RedisLink
    batcher: PipelineBatcher
    reader: StoreReader
    commits: CommitQueue
    locks: LeaseLocks
    listeners: Broadcast
    notices: NoticeReader
    writer: str


class RedisStateStore:
    """Documents and logs in Redis (6.2 or newer) or Valkey, for any number of processes and hosts.

    ``url``: one server, a cluster or sentinels, as ``agent_state.redis.client.connect`` reads
    it. ``prefix``: stores with different prefixes do not see each other. ``timeout_seconds``: the
    time limit of a command; a commit is sent twice, and raises ``DurabilityUnknownError`` if its
    outcome is unknown then. ``wait_replicas``: a commit returns once that many replicas have it,
    and raises ``DurabilityUnknownError`` if they do not confirm it in time; 0: none are asked.
    ``lock_timeout_seconds``: how long to wait for a lock. ``lock_lease_seconds``: how long a lock
    lasts after its holder has stopped renewing it.

    ``clock``: None for the server's time, because leases compare times of several hosts. ``open``
    logs a warning for each setting of the server that may lose data.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "",
        timeout_seconds: float = 1.0,
        wait_replicas: int = 0,
        lock_timeout_seconds: float = 10.0,
        lock_lease_seconds: float = 10.0,
        clock: Clock | None = None,
        new_id: Callable[[], str] = new_id,
    ) -> None:
        self._url = url
        self._keys = StoreKeys(prefix)
        self._timeout = timeout_seconds
        self._wait_replicas = wait_replicas
        self._lock_timeout = lock_timeout_seconds
        self._lock_lease = lock_lease_seconds
        self._server_clock = ServerClock() if clock is None else None
        self.clock: Clock = clock or self._server_clock or ServerClock()
        self._new_id = new_id
        self._incidents: list[Incident] = []
        self._task_locks = TaskLocks(lock_timeout_seconds)
        self._opening = asyncio.Lock()
        self._connected: _Connected | None = None

    # -- opening and closing -----------------------------------------------------------------

    async def open(self) -> None:
        """Connect and check the server's settings. Raises ``StorageError``."""
        async with self._opening:
            if self._connected is None:
                self._incidents.clear()
                self._connected = await self._connect()

    async def _connect(self) -> _Connected:
        link = self._new_link(self._timeout)
        try:
            sent = self._server_clock.local() if self._server_clock else None
            micros = await link.run(*LOCKS.call([self._keys.locks], ["clean"]), doing="opening")
            if self._server_clock is not None and sent is not None:
                self._server_clock.learn(sent, int(micros), self._server_clock.local())
            for warning in await check_settings(link, wait_replicas=self._wait_replicas):
                _logger.warning("%s: %s", link.url, warning)
        except BaseException:
            await link.close()
            raise
        # Random whatever ``new_id`` gives: the batches of one writer are numbered.
        writer = secrets.token_hex(8)
        batcher = PipelineBatcher(link)
        reader = StoreReader(batcher, self._keys)
        listeners = Broadcast()
        commits = CommitQueue(
            link,
            self._keys,
            writer,
            self._server_clock,
            now=lambda: stamp(self.clock.now()),
            notify=listeners.notify,
            wait_replicas=self._wait_replicas,
        )
        notices = NoticeReader(
            self._keys,
            writer,
            batcher,
            reader,
            listeners=listeners,
            connect=partial(self._new_link, 2 * self._timeout),
            was_unknown=commits.was_unknown,
        )
        locks = LeaseLocks(batcher, self._keys, writer, lease_seconds=self._lock_lease)
        return _Connected(link, batcher, reader, commits, locks, listeners, notices, writer)

    def _new_link(self, timeout_seconds: float) -> RedisLink:
        return RedisLink(self._url, anchor=self._keys.notices, timeout_seconds=timeout_seconds)

    async def close(self) -> None:
        """Wait for the commits under way, then close the connections."""
        async with self._opening:
            connected, self._connected = self._connected, None
            if connected is not None:
                await connected.commits.ended()
                await connected.notices.close()
                await connected.batcher.ended()
                await connected.link.close()

    @property
    def _open(self) -> _Connected:
        if self._connected is None:
            raise StorageError("the store is not open", path=without_password(self._url))
        return self._connected

    async def flush(self) -> None:
        """Wait for the commits under way; the server's settings decide whether they are durable."""
        await self._open.commits.ended()

    # -- documents ---------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        text = text_of(kind, key)
        with concerning(kind, key):
            fields = await self._open.reader.fields(kind, text)
        try:
            return document_of(kind, key, fields)
        except StateCorruptedError as error:
            await self._quarantine(kind, key, error.message, fields)
            raise

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        targets = [targeted(change) for change in changes]
        for change in changes:
            if isinstance(change, Append):
                logs.check_record(change.body, change.dedupe_key)
        if not targets:
            return []
        until = time.monotonic() + self._lock_timeout
        while True:
            try:
                return await self._commit(targets)
            except LockedError as locked:
                left = until - time.monotonic()
                if left <= 0:
                    raise LockTimeoutError(
                        f"another process held it for {self._lock_timeout:g} s",
                        kind=locked.kind,
                        key=locked.key,
                    ) from None
                await asyncio.sleep(min(left, locked.seconds, 0.02))

    async def _commit(self, targets: Sequence[TargetedChange]) -> list[int]:
        connected = self._open
        if not self._task_locks.held:
            return await connected.commits.submit(encode_commit(targets, self._keys, _no_token))
        async with self._task_locks.hold({target.lock for target in targets}):
            request = encode_commit(targets, self._keys, connected.locks.token)
            return await connected.commits.submit(request)

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._listed(self._keys.index(paths.check_kind(kind)), prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self._listed(self._keys.logs(paths.check_kind(kind)), prefix)

    async def _listed(self, index: str, prefix: Key) -> list[Key]:
        pages = self._open.reader.members(index, prefix)
        return sorted([member.key async for page in pages for member in page])

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        index = self._keys.index(paths.check_kind(kind))
        reader = self._open.reader
        async for page in reader.members(index, prefix):
            async for member, fields in reader.all_fields(kind, page):
                document = await self._readable(kind, member.key, fields)
                if document is not None:
                    yield document

    async def _readable(self, kind: str, key: Key, fields: Fields | Exception) -> Document | None:
        """The document; None if it is missing, or damaged and now quarantined."""
        if isinstance(fields, Exception):
            if failure_kind(fields) != "wrong-type":
                raise fields
            await self._quarantine(kind, key, "it is not a hash", None)
            return None
        try:
            return document_of(kind, key, fields)
        except StateCorruptedError as error:
            await self._quarantine(kind, key, error.message, fields)
            return None

    # -- quarantine and erasure --------------------------------------------------------------

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        """As in every store; Redis keeps no earlier version."""
        seen = None
        if version is not None:
            seen = await self._open.reader.fields(kind, text_of(kind, key))
            with contextlib.suppress(StateCorruptedError):
                stored = document_of(kind, key, seen)
                if stored is None or stored != version:
                    return stored
        await self._quarantine(kind, key, reason, seen)
        return None

    async def _quarantine(self, kind: str, key: Key, reason: str, seen: Fields | None) -> None:
        """Move the document to its quarantine key; with ``seen``, only if it is still that one."""
        text, keys, connected = text_of(kind, key), self._keys, self._open
        entry_id = self._new_id()
        kept = keys.quarantine(kind, text, entry_id)
        body = b"" if seen is None else b"=" + (seen[0] or b"")
        command = _REMOVE.call(
            [
                keys.notices,
                keys.document(kind, text),
                keys.index(kind),
                kept,
                keys.reason(kind, text, entry_id),
            ],
            [
                *("quarantine", connected.writer, kind, text),
                *(reason, stamp(self.clock.now()), body, DELETED_SECONDS),
            ],
        )
        with concerning(kind, key):
            moved = await connected.batcher.run(*command, doing="putting in quarantine")
        if moved:
            self._note(Incident(reason, kind, key, path=keys.document(kind, text), kept=kept))
            connected.listeners.notify(Notice(kind, key, None))

    async def erase(self, kind: str, key: Key) -> int:
        """As in every store. All keys are scanned for the names of recently deleted documents."""
        text, connected = text_of(kind, key), self._open
        async with self.lock(kind, key):
            erasure = _Erasure(connected, self._keys, kind, key, text)
            documents, count = await erasure.run()
            for gone in documents:
                connected.listeners.notify(Notice(kind, gone, None))
        return len(documents) + count

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
        log = self._keys.log(kind, text_of(kind, key))
        reader = self._open.reader
        if last is not None:
            after = max(after, await reader.last_seq(log) - last)
        async for record in reader.records(log, after):
            if isinstance(record, LogRecord):
                yield record
            else:
                seq, why = record
                self._note(Incident(f"record {seq}: {why}", kind, key, path=log))

    # -- locks and notices -------------------------------------------------------------------

    async def watch(self) -> Subscription:
        connected = self._open
        subscription = connected.listeners.subscribe()
        try:
            await connected.notices.start()
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

    @contextlib.asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        name = lock_of(kind, text_of(kind, key))
        connected = self._open
        began = time.monotonic()
        async with self._task_locks.hold([name]):
            if connected.locks.token(name):
                yield  # this task holds it already
                return
            left = max(0.0, self._lock_timeout - (time.monotonic() - began))
            async with connected.locks.hold(name, left, kind=kind, key=key):
                await connected.commits.ended()  # commits of this process that came earlier
                yield


def _no_token(_: str) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class _Erasure:
    """Erases a document, its log, everything below them, and their quarantined versions.

    Runs under the document's lock. The script compares the fencing token, so a holder that has
    lost the lock erases nothing.
    """

    connected: _Connected
    keys: StoreKeys
    kind: str
    key: Key
    text: str

    async def run(self) -> tuple[list[Key], int]:
        """The keys of the erased documents, and the number of erased logs.

        Raises ``LeaseLostError``, ``StorageError``.
        """
        keys, kind, reader = self.keys, self.kind, self.connected.reader
        documents = await reader.members_from(keys.index(kind), self.text, self.key)
        logs = await reader.members_from(keys.logs(kind), self.text, self.key)
        for texts in _batches(documents):
            await self._remove([keys.document(kind, text) for text in texts], texts)
        for texts in _batches(logs):
            names = [keys.log(kind, text) for text in texts]
            names += [keys.dedupe(kind, text) for text in texts]
            await self._remove(names, (), texts)
        await self._remove_unlisted()
        return [member.key for member in documents], len(logs)

    async def _remove(
        self, names: Sequence[str], documents: Sequence[str], logs: Sequence[str] = ()
    ) -> None:
        keys, kind, connected = self.keys, self.kind, self.connected
        lock = lock_of(kind, self.text)
        shared = [keys.notices, keys.locks, keys.index(kind), keys.logs(kind)]
        about: list[Argument] = ["erase", connected.writer, kind, lock, connected.locks.token(lock)]
        command = _REMOVE.call([*shared, *names], [*about, len(documents), *documents, *logs])
        if not await connected.batcher.run(*command, doing="erasing"):
            raise LeaseLostError("the lock has expired", kind=kind, key=self.key)

    async def _remove_unlisted(self) -> None:
        """Remove revisions of deleted documents, and quarantined ones, which no index lists."""
        pattern = f"{escape_glob(self.keys.tag)}:*:{self.kind}:*{escape_glob(self.text)}*"
        async for page in self.connected.link.scan(pattern, doing="erasing"):
            names = [name.decode() for name in page if self._is_part(name.decode(errors="replace"))]
            if names:
                await self._remove(names, ())

    def _is_part(self, name: str) -> bool:
        text = self.keys.text_in(name, self.kind)
        return text is not None and (text == self.text or text.startswith(f"{self.text}/"))


def _batches(members: Sequence[Member]) -> list[list[str]]:
    texts = [member.text for member in members]
    return [texts[at : at + _KEYS_PER_ERASE] for at in range(0, len(texts), _KEYS_PER_ERASE)]


# -- the server's settings -----------------------------------------------------------------------


async def check_settings(link: RedisLink, *, wait_replicas: int) -> list[str]:
    """A warning for each setting of the server that may lose data, or that it does not disclose.

    Raises ``StorageError`` for a server that is too old.
    """
    info = await _run_allowed(link, "INFO")
    warnings = []
    if isinstance(info, dict):
        version = re.match(r"(\d+)\.(\d+)", str(info.get("redis_version", "")))
        if version and (int(version[1]), int(version[2])) < _OLDEST_VERSION:
            raise StorageError(
                f"Redis {info['redis_version']} is too old, 6.2 is the oldest", path=link.url
            )
        replicas = int(info.get("connected_slaves", 0))
        if wait_replicas > replicas:
            warnings.append(
                f"{wait_replicas} replicas are to confirm each commit, and {replicas} are connected"
            )
    policy = await _config(link, "maxmemory-policy")
    if policy is not None and policy != "noeviction" and await _config(link, "maxmemory") != "0":
        warnings.append(
            f"maxmemory-policy is {policy}: a full server drops what is needed; use noeviction"
        )
    return [*warnings, *await _check_persistence(link, info)]


async def _check_persistence(link: RedisLink, info: Any) -> list[str]:
    appendonly = await _config(link, "appendonly")
    if appendonly is None and isinstance(info, dict) and "aof_enabled" in info:
        appendonly = "yes" if info["aof_enabled"] else "no"
    if appendonly is None:
        return [
            "the server does not report whether it writes to disk (INFO and CONFIG are forbidden)"
        ]
    if appendonly != "yes":
        return ["appendonly is off: what was saved since the last snapshot is lost with the server"]
    appendfsync = await _config(link, "appendfsync")
    if appendfsync == "always":
        return []
    if appendfsync is None:
        return ["the server does not report how often it syncs its file (CONFIG is forbidden)"]
    lost = "the last second" if appendfsync == "everysec" else "some seconds"
    return [f"appendfsync is {appendfsync}: a power cut costs {lost} of what was saved"]


async def _config(link: RedisLink, name: str) -> str | None:
    found = await _run_allowed(link, "CONFIG GET", name)
    if not isinstance(found, dict):
        return None
    value = found.get(name, found.get(name.encode()))
    return value.decode() if isinstance(value, bytes) else value


async def _run_allowed(link: RedisLink, *command: str) -> Any:
    """The reply as redis-py parses it; None if the server refuses the command."""
    try:
        return await link.run_on_node(*command)
    except StorageError as error:
        if isinstance(error.__cause__, ResponseError):
            return None
        raise
