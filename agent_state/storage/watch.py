"""Changes as they happen: ours at once, everybody else's by hint and by rescan.

The operating system's file events are only a hint (they overflow, miss new folders and
recreated roots, and break on a name that is not UTF-8), so every few seconds the directory
itself is compared with what was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from agent_state.errors import AgentStateError
from agent_state.protocols import DocumentId, Notice
from agent_state.storage import paths
from agent_state.storage.directory import StateDirectory
from agent_state.storage.executor import Executor
from agent_state.storage.fileio import Stamp

RESCAN_SECONDS = 5.0
_logger = logging.getLogger("agent_state.storage")


class Subscription:
    """The notices of one listener; several for one document come as one."""

    def __init__(self, begin: Callable[[], None], end: Callable[[Subscription], None]) -> None:
        self._begin = begin
        self._end = end
        self._waiting: dict[DocumentId, Notice] = {}
        self._arrived = asyncio.Event()
        self._closed = False

    def tell(self, notice: Notice) -> None:
        place = (notice.kind, notice.key)
        earlier = self._waiting.pop(place, None)
        if earlier is not None and earlier.outside and not notice.outside:
            notice = Notice(notice.kind, notice.key, notice.revision, outside=True)
        self._waiting[place] = notice
        self._arrived.set()

    def close(self) -> None:
        self._closed = True
        self._arrived.set()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Notice:
        self._begin()
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.pop(next(iter(self._waiting)))

    async def aclose(self) -> None:
        self.close()
        self._end(self)


class Broadcast:
    """Everyone who listens to a store."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []

    @property
    def has_listeners(self) -> bool:
        return bool(self._subscriptions)

    def tell(self, notice: Notice | None) -> None:
        if notice is not None:
            for subscription in self._subscriptions:
                subscription.tell(notice)

    def listen(self) -> Subscription:
        subscription = Subscription(self._begin, self._forget)
        self._subscriptions.append(subscription)
        return subscription

    def _begin(self) -> None:
        """Somebody waits for notices."""

    def end(self) -> None:
        """Nobody is told anything any more."""
        for subscription in self._subscriptions:
            subscription.close()
        self._subscriptions.clear()

    def _forget(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)


class DirectoryWatcher(Broadcast):
    """Also tells of documents that somebody else changed."""

    def __init__(self, directory: StateDirectory) -> None:
        super().__init__()
        self._directory = directory
        self._seen: dict[str, tuple[Stamp, DocumentId]] = {}
        self._pool: Executor | None = None
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._over = asyncio.Event()

    async def start(self, pool: Executor) -> None:
        """Remember what is there; what changes after this is told. Twice is a no-op."""
        async with self._starting:
            if self._pool is None:
                self._seen.clear()
                await pool.run(partial(self._compare, []))
                self._pool = pool

    def _begin(self) -> None:
        """Look from when the first listener waits; until then nobody is in a hurry."""
        if self._task is None and self._pool is not None:
            self._over.clear()
            self._task = asyncio.create_task(self._look(self._pool), name="agent-state-watch")

    async def close(self) -> None:
        self.end()
        task, self._task, self._pool = self._task, None, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _look(self, pool: Executor) -> None:
        hints: asyncio.Queue[set[str] | None] = asyncio.Queue(maxsize=64)
        hinting = asyncio.create_task(self._hint(hints), name="agent-state-hints")
        try:
            rescan_at = time.monotonic() + RESCAN_SECONDS
            while True:
                # Hints that never cease do not put the rescan off: it finds what they miss.
                hinted = await _within(rescan_at - time.monotonic(), hints)
                began = time.monotonic()
                notices: list[Notice] = []
                named = hinted and all(path.endswith(paths.DOCUMENT) for path in hinted)
                try:
                    await pool.run(partial(self._compare, notices, hinted if named else None))
                except AgentStateError as error:
                    _logger.warning("the state directory could not be verified_dirs at: %s", error)
                for notice in notices:
                    self.tell(notice)
                if not named:
                    # A large directory is rescanned less often: a twentieth of a thread.
                    ended = time.monotonic()
                    rescan_at = ended + max(RESCAN_SECONDS, (ended - began) * 20)
        finally:
            # Told, and not only cancelled: inside awatch a cancellation can meet the one that
            # it uses itself, and be taken for it.
            self._over.set()
            hinting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await hinting

    async def _hint(self, hints: asyncio.Queue[set[str] | None]) -> None:
        from watchfiles import awatch  # loads a native library; only listeners pay for it

        # It tells every batch at INFO, which in a busy directory is many a second.
        chatter = logging.getLogger("watchfiles.main")
        if chatter.level == logging.NOTSET:
            chatter.setLevel(logging.WARNING)
        root = self._directory.root
        pause = 1.0

        def concerns_us(_: object, path: str) -> bool:
            return not path[len(root) + 1 :].startswith(".") and "/.tmp-" not in path

        while not self._over.is_set():
            live = False
            try:
                async for changes in awatch(
                    root,
                    watch_filter=concerns_us,
                    debounce=50,
                    step=10,
                    stop_event=self._over,
                    rust_timeout=500,
                    yield_on_timeout=True,
                ):
                    # The first batch, empty or not, says that events come from here on; what
                    # changed before is found by a rescan.
                    if changes or not live:
                        await hints.put({path for _, path in changes} if live else None)
                    live = True
            except (OSError, RuntimeError, UnicodeError, ExceptionGroup) as error:
                # Too many watches, or a name that is not UTF-8: rescans go on without hints. It is
                # a group when that meets a cancellation.
                _logger.info("file events ended, rescanning instead: %s", error)
                if not self._over.is_set():
                    await hints.put(None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._over.wait()
            pause = min(60.0, pause * 2)

    def _compare(self, notices: list[Notice], hinted: Iterable[str] | None = None) -> None:
        """Look at these files, or at all; add what somebody else has changed. Blocks."""
        directory = self._directory
        if hinted is not None:
            among = {path: directory.place_of(path) for path in hinted}
        else:
            among = {
                path: (kind, key)
                for kind in directory.kinds()
                for path, key in sorted(directory.files(kind))
            }
        for path in among if hinted is not None else {**self._seen, **among}:
            before, place = self._seen.get(path, (None, among.get(path)))
            stamp, theirs = directory.changed_externally(path)
            if place is None or stamp == before:
                continue
            if stamp is None:
                del self._seen[path]
            else:
                self._seen[path] = (stamp, place)
            if theirs:
                directory.forget_own_write(
                    path, before
                )  # should it come back, that is not our doing
                notices.append(Notice(*place, None if stamp is None else 0, outside=True))


async def _within(seconds: float, hints: asyncio.Queue[set[str] | None]) -> set[str] | None:
    """The next hints, or None when it is time to rescan."""
    try:
        async with asyncio.timeout(seconds):
            return await hints.get()
    except TimeoutError:
        return None
