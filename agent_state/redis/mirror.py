"""A copy of a state directory in Redis that follows by itself; the files stay the truth."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

from redis.asyncio import Redis

from agent_state.clock import Backoff, Clock, SystemClock, stamp
from agent_state.errors import AgentStateError, Key, MirrorError, StateCorruptedError
from agent_state.protocols import (
    Change,
    DocumentCodec,
    MirrorStatus,
    NoticeStream,
    Origin,
    Put,
    StateStore,
)
from agent_state.redis.client import FAILURES, connect
from agent_state.redis.mirror_copying import Pulled, checked, pull
from agent_state.redis.mirror_follower import Follower
from agent_state.redis.mirror_layout import STATUS, say
from agent_state.redis.mirror_side import AnotherInstanceError, MirrorSide
from agent_state.redis.mirror_trouble import state_of

_COLLISION_SECONDS = 15.0
_REPORT_SECONDS = 60.0
_LETTING_GO_SECONDS = 1.0
_LAST_TURNS = 20
"""So often at ``close``: another process may have been quicker, and it has to be read again."""

_logger = logging.getLogger("agent_state.redis")


class RedisMirror:
    """Keeps a copy of a store under ``prefix`` in the Redis at ``url``, written behind.

    Handed over as ``StatePersistenceManager(…, mirror=…)``. A save never waits for Redis and
    never fails because of it; ``status`` says how far the copy is behind.

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
        self._url, self._prefix, self._ttl = url, prefix, dict(ttl_seconds or {})
        self._interval, self._timeout = interval_seconds, timeout_seconds
        self._check_interval, self._drain = check_interval_seconds, drain_seconds
        self._instance = instance
        self._clock: Clock = clock or SystemClock()
        self._backoff = Backoff(0.1, 2.0, random=random or Random())  # noqa: S311  # jitter, not secrets
        self._codec: DocumentCodec | None = None
        self._follower: Follower | None = None
        self._store: StateStore | None = None
        self._client, self._side = self._connected()
        self._tasks: list[asyncio.Task[None]] = []
        self._stirred, self._closing = asyncio.Event(), asyncio.Event()
        self._status = MirrorStatus("closed", stamp(self._clock.now()))
        self._reported: tuple[str, float, object] = ("closed", 0.0, None)

    def _connected(self) -> tuple[Redis, MirrorSide]:
        client = connect(self._url, timeout_seconds=self._timeout)
        keeps = 10 * self._check_interval
        return client, MirrorSide(client, self._url, self._prefix, self._ttl, keeps)

    # -- life ------------------------------------------------------------------------------

    async def open(self, store: StateStore, origin: Origin, codec: DocumentCodec) -> None:
        """Begin to follow. Redis being away is no error.

        Raises ``MirrorError`` when another instance's copy is under the prefix, or when nobody
        says which instance this is.
        """
        instance = self._instance or origin.instance
        if instance is None:
            raise MirrorError("the store has no directory: say whose copy it is, with instance=")
        self._client, self._side = self._connected()
        self._stirred, self._closing = asyncio.Event(), asyncio.Event()
        self._status = MirrorStatus("starting", stamp(self._clock.now()))
        self._store, self._codec = store, codec
        try:
            await self._side.claim(instance)
        except AnotherInstanceError:
            await self._let_go()
            raise
        except FAILURES as error:
            self._enter(state_of(error), error)
            await self._let_go()
        self._follower = Follower(store, self._side, instance, origin)
        notices = await store.watch()
        self._tasks = [
            asyncio.create_task(self._run(self._follower), name="agent-state-mirror"),
            asyncio.create_task(self._watch(notices), name="agent-state-mirror-watch"),
        ]

    async def close(self) -> None:
        """Bring over what waits, for ``drain`` seconds at most; ``status`` says what is left."""
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
            await self._let_go()

    async def _let_go(self) -> None:
        """Drop all connections; the next command makes a new one."""
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(_LETTING_GO_SECONDS):
                await self._client.aclose()

    # -- what the store tells --------------------------------------------------------------

    def changed(self, changes: Sequence[Change]) -> None:
        """These may have been made; the mirror looks."""
        if self._follower is not None:
            self._follower.changed(changes, self._clock.monotonic())
            self._stirred.set()

    def erased(self, kind: str, key: Key) -> None:
        """This may be gone with all below it; the mirror lets go of it too."""
        if self._follower is not None:
            self._follower.erased((kind, key), self._clock.monotonic())
            self._stirred.set()

    async def _watch(self, notices: NoticeStream) -> None:
        """See also what others change: a person, another process."""
        async with contextlib.aclosing(notices):
            async for notice in notices:
                if notice.outside and self._follower is not None:
                    place = (notice.kind, notice.key)
                    self._follower.touch(place, self._clock.monotonic())
                    self._stirred.set()

    # -- following -------------------------------------------------------------------------

    async def _run(self, follower: Follower) -> None:
        checked_at = self._clock.monotonic()
        turns_left = _LAST_TURNS
        while True:
            now = self._clock.monotonic()
            turns_left -= self._closing.is_set()
            check = now - checked_at >= self._check_interval
            self._stirred.clear()
            try:
                await follower.turn(now, check=check)
            except AnotherInstanceError as error:
                self._enter("collision", error)
                follower.lost_touch()
                pause = _COLLISION_SECONDS
            except Exception as error:  # noqa: BLE001  # told in the state; ending would be silent
                self._enter(state_of(error), error)
                follower.lost_touch()
                await self._let_go()
                pause = self._backoff.pause()
            else:
                self._enter("following")
                self._backoff.reset()
                checked_at = now if check else checked_at
                pause = 0.0
            if turns_left < _LAST_TURNS:
                if pause or not turns_left or not follower.waiting:
                    return
                continue
            await self._report_now_and_then()
            if pause:
                await self._rest(pause, self._closing)
            else:
                due = max(0.0, checked_at + self._check_interval - self._clock.monotonic())
                await self._rest(due, self._stirred, self._closing)
                await self._rest(self._interval, self._closing)

    async def _rest(self, seconds: float, *until: asyncio.Event) -> None:
        """Wait so long, or until one of these happens."""
        if any(event.is_set() for event in until):
            return
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(each.wait()) for each in until]
        waits.append(asyncio.ensure_future(self._clock.sleep(seconds)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # -- saying how it goes ----------------------------------------------------------------

    def status(self) -> MirrorStatus:
        """Where it stands now; after ``close``, where it stood then."""
        follower = self._follower
        if follower is None:
            return self._status
        oldest = follower.oldest()
        return replace(
            self._status,
            waiting=follower.waiting,
            lag=0.0 if oldest is None else max(0.0, self._clock.monotonic() - oldest),
            refused=follower.refused(),
            kept=tuple(f"{say(place)}: {why}" for place, why in follower.notes.kept.items()),
            **follower.counted(),
        )

    def _enter(self, state: str, error: Exception | None = None) -> None:
        status, now = self._status, stamp(self._clock.now())
        if error is not None:
            said = f"{type(error).__name__}: {error}"
            status = replace(
                status, troubles=status.troubles + 1, last_error=said, last_error_at=now
            )
        if state != status.state:
            told = f": {status.last_error}" if error is not None else ""
            level = logging.INFO if error is None else logging.WARNING
            _logger.log(level, "the mirror %s is %s%s", self._side.where, state, told)
            status = replace(status, state=state, since=now)
        self._status = status

    async def _report_now_and_then(self) -> None:
        """Keep the state where everybody can read it: when it changes, or once a minute."""
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
        body = {"mirror": self._side.where, "at": stamp(self._clock.now()), **asdict(status)}
        body["refused"], body["kept"] = list(status.refused), list(status.kept)
        try:
            await store.commit([codec.put(*STATUS, body, None)])
        except AgentStateError as error:
            _logger.warning("the state of the mirror could not be stored: %s", error)

    # -- bringing back ---------------------------------------------------------------------

    async def restore_document(self, kind: str, key: Key) -> Put | None:
        """The change that saves the mirrored version again; None when there is none.

        Raises ``MirrorError`` when Redis cannot be asked, or what it has is not usable.
        """
        follower = self._follower
        codec = self._codec
        if follower is None or codec is None or self._status.state == "collision":
            return None
        try:
            await self._side.claim(follower.instance)
            document = await self._side.get((kind, key))
        except (*FAILURES, StateCorruptedError) as error:
            raise MirrorError(f"{self._side.where}: {error}", kind=kind, key=key) from error
        if document is None:
            return None
        try:
            return checked(document, codec)
        except AgentStateError as error:
            raise MirrorError(error.message, kind=kind, key=key) from error

    async def restore_all(self, state_dir: str, codec: DocumentCodec) -> int:
        """Fill a directory that has nothing yet; how many documents and logs were brought.

        It becomes the instance whose copy this is. Raises ``MirrorError``.
        """
        try:
            pulled: Pulled = await pull(self._side, state_dir, codec)
        finally:
            await self._let_go()
        return len(pulled.documents) + len(pulled.logs)
