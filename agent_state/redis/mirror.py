"""A copy of a state directory in Redis that follows by itself; the files stay the truth."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

from agent_state.clock import Backoff, Clock, SystemClock, stamp
from agent_state.errors import AgentStateError, Key, MirrorError, StateCorruptedError, StorageError
from agent_state.protocols import (
    Change,
    DocumentCodec,
    MirrorStatus,
    NoticeStream,
    Origin,
    Put,
    StateStore,
)
from agent_state.redis.client import FAILURES, failure_kind, redis_error_of
from agent_state.redis.mirror_client import (
    STATUS_DOCUMENT,
    AnotherInstanceError,
    MirrorClient,
    describe_id,
)
from agent_state.redis.mirror_follower import Follower
from agent_state.redis.mirror_sync import pull, restored

_COLLISION_SECONDS = 15.0
_REPORT_SECONDS = 60.0
_DISCONNECT_SECONDS = 1.0
_LAST_ROUNDS = 20
"""How many rounds ``close`` may take: after another process's write a document is read again."""

_logger = logging.getLogger("agent_state.redis")


class RedisMirror:
    """Keeps a copy of a store under ``prefix`` in the Redis at ``url``, written behind.

    Passed as ``StatePersistenceManager(…, mirror=…)``. A save never waits for Redis and
    never fails because of it; ``status`` has how far the copy is behind.

    ``url``: as ``connect`` takes it: one server, a cluster or sentinels. ``ttl_seconds``: by kind,
    the time after a document's last write at which Redis drops its copy; by default the copy
    stays. ``interval_seconds``: changes of a document within it are sent as one.
    ``timeout_seconds``: the time limit of a command. ``check_interval_seconds``: how often the
    mirror checks that Redis still has what it had. ``drain_seconds``: the time limit for sending
    what waits at ``close``. ``instance``: whose copy it is, for a store without a directory.
    ``clock`` and ``random`` give the time and the jitter. Raises ``ValueError`` for an invalid URL
    or prefix.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "",
        ttl_seconds: Mapping[str, float] | None = None,
        interval_seconds: float = 0.5,
        timeout_seconds: float = 1.0,
        check_interval_seconds: float = 10.0,
        drain_seconds: float = 5.0,
        instance: str | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
    ) -> None:
        self._interval, self._drain = interval_seconds, drain_seconds
        self._check_interval = check_interval_seconds
        self._instance = instance
        self._clock: Clock = clock or SystemClock()
        self._backoff = Backoff(0.1, 2.0, random=random or Random())  # noqa: S311  # jitter only
        self._client = MirrorClient(
            url,
            prefix,
            timeout_seconds=timeout_seconds,
            ttl_seconds=ttl_seconds,
            index_seconds=10 * check_interval_seconds,
        )
        self._codec: DocumentCodec | None = None
        self._follower: Follower | None = None
        self._store: StateStore | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._changed, self._closing = asyncio.Event(), asyncio.Event()
        self._status = MirrorStatus("closed", stamp(self._clock.now()))
        self._reported: tuple[str, float, object] = ("closed", 0.0, None)

    # -- opening and closing ---------------------------------------------------------------

    async def open(self, store: StateStore, origin: Origin, codec: DocumentCodec) -> None:
        """Begin to follow. An unreachable Redis is not an error.

        Raises ``MirrorError`` if the prefix holds another instance's copy, or if the instance of
        this store is unknown.
        """
        instance = self._instance or origin.instance
        if instance is None:
            raise MirrorError("the store has no directory: name the copied instance with instance=")
        self._changed, self._closing = asyncio.Event(), asyncio.Event()
        self._status = MirrorStatus("starting", stamp(self._clock.now()))
        self._store, self._codec = store, codec
        try:
            await self._client.claim(instance)
        except AnotherInstanceError:
            await self._disconnect()
            raise
        except StorageError as error:
            self._enter(failure_kind(error), error)
            await self._disconnect()
        self._follower = Follower(store, self._client, instance, origin)
        notices = await store.watch()
        self._tasks = [
            asyncio.create_task(self._run(self._follower), name="agent-state-mirror"),
            asyncio.create_task(
                self._watch(store, self._follower, notices), name="agent-state-mirror-watch"
            ),
        ]

    async def close(self) -> None:
        """Send what is pending, within ``drain_seconds``; ``status`` has what is left."""
        if self._follower is None:
            return
        self._closing.set()
        running, watching = self._tasks
        self._tasks = []
        try:
            watching.cancel()
            await asyncio.wait([running], timeout=self._drain)
        finally:
            running.cancel()
            await asyncio.gather(running, watching, return_exceptions=True)
            self._enter("closed")
            self._status = self.status()
            self._follower = None
            await self._report(self._status)
            self._store = None
            await self._disconnect()

    async def _disconnect(self) -> None:
        """Close every connection; the next command makes a new one."""
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(_DISCONNECT_SECONDS):
                await self._client.close()

    # -- changes ---------------------------------------------------------------------------

    def changed(self, changes: Sequence[Change]) -> None:
        """These changes may have been made; the mirror reads the store."""
        if self._follower is not None:
            self._follower.changed(changes, self._clock.monotonic())
            self._changed.set()

    def erased(self, kind: str, key: Key) -> None:
        """This key may be erased with everything below it; the mirror removes it too."""
        if self._follower is not None:
            self._follower.erased((kind, key), self._clock.monotonic())
            self._changed.set()

    async def _watch(self, store: StateStore, follower: Follower, notices: NoticeStream) -> None:
        """Follow the changes of others too: a person, another process."""
        while True:
            try:
                async with contextlib.aclosing(notices):
                    async for notice in notices:
                        if notice.outside:
                            target = (notice.kind, notice.key)
                            follower.touch(target, self._clock.monotonic())
                            self._changed.set()
                return
            except Exception:  # what was missed is compared; ending would be silent
                _logger.exception("the mirror %s could not watch the store", self._client.name)
            await self._clock.sleep(self._backoff.pause())
            notices = await store.watch()
            follower.compare_again()
            self._changed.set()

    # -- following -------------------------------------------------------------------------

    async def _run(self, follower: Follower) -> None:
        checked_at = self._clock.monotonic()
        rounds_left = _LAST_ROUNDS
        while True:
            now = self._clock.monotonic()
            rounds_left -= self._closing.is_set()
            check = now - checked_at >= self._check_interval
            self._changed.clear()
            pause = await self._send(follower, now, check=check)
            if not pause and check:
                checked_at = now
            if rounds_left < _LAST_ROUNDS:
                if pause or not rounds_left or not follower.pending:
                    return
                continue
            await self._report_if_due()
            if pause:
                await self._rest(pause, self._closing)
            else:
                due = max(0.0, checked_at + self._check_interval - self._clock.monotonic())
                await self._rest(due, self._changed, self._closing)
                await self._rest(self._interval, self._closing)

    async def _send(self, follower: Follower, now: float, *, check: bool) -> float:
        """Send what is pending; returns the seconds to wait after a failure, else 0."""
        try:
            await follower.send_pending(now, check=check)
        except AnotherInstanceError as error:
            self._enter("collision", error)
            follower.invalidate_claim()
            return _COLLISION_SECONDS
        except Exception as error:  # ending would be silent
            if not isinstance(error, (*FAILURES, AgentStateError)):
                _logger.exception("the mirror %s met an unexpected error", self._client.name)
            self._enter(failure_kind(error), error)
            follower.invalidate_claim()
            await self._disconnect()
            return self._backoff.pause()
        self._enter("following")
        self._backoff.reset()
        return 0.0

    async def _rest(self, seconds: float, *until: asyncio.Event) -> None:
        """Wait for the time, or for one of the events."""
        if any(event.is_set() for event in until):
            return
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(each.wait()) for each in until]
        waits.append(asyncio.ensure_future(self._clock.sleep(seconds)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # -- status ----------------------------------------------------------------------------

    def status(self) -> MirrorStatus:
        """The state now; after ``close``, the state at its end."""
        follower = self._follower
        if follower is None:
            return self._status
        oldest = follower.oldest()
        return replace(
            self._status,
            waiting=follower.pending,
            lag=0.0 if oldest is None else max(0.0, self._clock.monotonic() - oldest),
            sent=follower.sent,
            removed=follower.removed,
            records=follower.records,
            refused=follower.refused(),
            kept=tuple(f"{describe_id(one)}: {why}" for one, why in follower.unreadable.items()),
        )

    def _enter(self, state: str, error: Exception | None = None) -> None:
        status, now = self._status, stamp(self._clock.now())
        reason = ""
        if error is not None:
            cause = redis_error_of(error) or error
            text = f"{type(cause).__name__}: {cause}"
            reason = f": {text}"
            status = replace(
                status, troubles=status.troubles + 1, last_error=text, last_error_at=now
            )
        if state != status.state:
            level = logging.INFO if error is None else logging.WARNING
            _logger.log(level, "the mirror %s is %s%s", self._client.name, state, reason)
            status = replace(status, state=state, since=now)
        self._status = status

    async def _report_if_due(self) -> None:
        """Store the status where everyone can read it: when its state changes, or once a minute."""
        status = self.status()
        state, at, counts = self._reported
        now = self._clock.monotonic()
        news = (status.sent, status.removed, status.records, status.troubles)
        if status.state != state or (news != counts and now - at >= _REPORT_SECONDS):
            self._reported = (status.state, now, news)
            await self._report(status)

    async def _report(self, status: MirrorStatus) -> None:
        store, codec = self._store, self._codec
        if store is None or codec is None:
            return
        body = {"mirror": self._client.name, "at": stamp(self._clock.now()), **asdict(status)}
        body["refused"], body["kept"] = list(status.refused), list(status.kept)
        try:
            await store.commit([codec.put(*STATUS_DOCUMENT, body, None)])
        except AgentStateError as error:
            _logger.warning("the state of the mirror could not be stored: %s", error)
        except Exception:  # a report is no reason to stop following
            _logger.exception("the state of the mirror could not be stored")

    # -- restoring -------------------------------------------------------------------------

    async def restore_document(self, kind: str, key: Key) -> Put | None:
        """The change that saves the mirrored version again; None if the mirror has none.

        Raises ``MirrorError`` if Redis cannot be asked, or the version must not be used.
        """
        follower, codec = self._follower, self._codec
        if follower is None or codec is None or self._status.state == "collision":
            return None
        try:
            await self._client.claim(follower.instance)
            document = await self._client.get((kind, key))
        except (StorageError, StateCorruptedError) as error:
            raise MirrorError(f"{self._client.name}: {error}", kind=kind, key=key) from error
        if document is None:
            return None
        try:
            return restored(document, codec)
        except AgentStateError as error:
            raise MirrorError(error.message, kind=kind, key=key) from error

    async def restore_all(self, state_dir: str, codec: DocumentCodec) -> int:
        """Fill an empty directory; returns the number of documents and logs.

        It becomes the instance whose copy this is. Raises ``MirrorError``.
        """
        try:
            pulled = await pull(self._client, state_dir, codec)
        finally:
            await self._disconnect()
        return len(pulled.documents) + len(pulled.logs)
