"""Notices of changes: our own at once, those of other processes by file events and by rescan.

The operating system's file events are only a hint (they overflow, miss new folders and
recreated roots, and break on a name that is not UTF-8). So every few seconds the directory
is compared with the stamps that were seen.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from agent_state.errors import AgentStateError
from agent_state.protocols import DocumentId, Notice
from agent_state.storage import paths
from agent_state.storage.directory import StateDirectory
from agent_state.storage.executor import Executor, end_task
from agent_state.storage.fileio import Stamp

RESCAN_SECONDS = 5.0
_AGAIN_SECONDS = 0.1
_NAMED = (paths.DOCUMENT, paths.LOG)
"""An event of another name, such as a folder's, may stand for any number of documents."""
_FOLDERS_MS = 100
"""A kind's first folder is noticed after so long."""
_logger = logging.getLogger("agent_state.storage")


class Subscription:
    """The notices of one listener; several for one document are merged."""

    def __init__(self, begin: Callable[[], None], end: Callable[[Subscription], None]) -> None:
        self._begin = begin
        self._end = end
        self._waiting: dict[DocumentId, Notice] = {}
        self._arrived = asyncio.Event()
        self._closed = False

    def notify(self, notice: Notice) -> None:
        """Queue a notice, in the place of an earlier one about the same document."""
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
    """The subscriptions to the notices of one store."""

    def __init__(self) -> None:
        self.subscriptions: list[Subscription] = []

    def notify(self, notice: Notice | None) -> None:
        """Give a notice to every subscription; nothing for None."""
        if notice is not None:
            for subscription in self.subscriptions:
                subscription.notify(notice)

    def subscribe(self) -> Subscription:
        """A new subscription, to notices from now on."""
        subscription = Subscription(self._begin, self._forget)
        self.subscriptions.append(subscription)
        return subscription

    def _begin(self) -> None:
        """A listener waits for notices."""

    def end(self) -> None:
        """Close every subscription."""
        for subscription in self.subscriptions:
            subscription.close()
        self.subscriptions.clear()

    def _forget(self, subscription: Subscription) -> None:
        if subscription in self.subscriptions:
            self.subscriptions.remove(subscription)


class DirectoryWatcher(Broadcast):
    """Also sends notices of documents that other processes changed."""

    def __init__(self, directory: StateDirectory) -> None:
        super().__init__()
        self._directory = directory
        self._seen: dict[str, tuple[Stamp, DocumentId]] = {}
        self._pool: Executor | None = None
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def start(self, pool: Executor) -> None:
        """Remember the stamps of all files; later changes are noticed. Twice is a no-op."""
        async with self._starting:
            if self._pool is None:
                self._seen.clear()
                await pool.run(partial(self._compare, []))
                self._pool = pool

    def _begin(self) -> None:
        """Begin to look for changes when the first listener waits."""
        if self._task is None and self._pool is not None:
            self._task = asyncio.create_task(self._look(self._pool), name="agent-state-watch")

    def abandon(self) -> None:
        """Forget all; the loop that it ran in has ended."""
        self.subscriptions.clear()
        self._task = self._pool = None

    async def close(self) -> None:
        self.end()
        task, self._task, self._pool = self._task, None, None
        if task is not None:
            await end_task(task)

    async def _look(self, pool: Executor) -> None:
        events, documents = FileEvents(self._directory.root), self._directory.documents
        documents.found_half_written = events.hint
        try:
            rescan_at = time.monotonic() + RESCAN_SECONDS
            while True:
                # A stream of hints does not postpone the rescan, which finds what they miss.
                hinted = await events.next(rescan_at - time.monotonic())
                if documents.half_written:
                    await asyncio.sleep(_AGAIN_SECONDS)
                began = time.monotonic()
                if hinted == set() and began >= rescan_at:
                    hinted = None
                notices: list[Notice] = []
                named = hinted is not None and all(path.endswith(_NAMED) for path in hinted)
                try:
                    await pool.run(partial(self._compare, notices, hinted if named else None))
                except AgentStateError as error:
                    _logger.warning("the state directory could not be looked at: %s", error)
                except Exception:  # a listener would wait for ever for notices that never come
                    _logger.exception("the state directory could not be looked at")
                for notice in notices:
                    self.notify(notice)
                if not named:
                    # A large directory is rescanned less often: a twentieth of a thread.
                    ended = time.monotonic()
                    rescan_at = ended + max(RESCAN_SECONDS, (ended - began) * 20)
        finally:
            await pool.run(events.end)

    def _compare(self, notices: list[Notice], hinted: Iterable[str] | None = None) -> None:
        """Compare these files, or all, with what was seen; add a notice of each change. Blocks."""
        tree, documents = self._directory.tree, self._directory.documents
        self._directory.worktree.refresh()
        resolved = self._directory.worktree.take_resolved()
        found = filter(None, map(tree.id_of_path, sorted(resolved)))
        notices.extend(Notice(*document, 0, outside=True) for document in found)
        while documents.half_written:  # they are looked at until they are whole, or judged
            _, document = documents.half_written.popitem()
            notices.append(Notice(*document, 0, outside=True))
        if hinted is not None:
            among = {path: tree.id_of_path(path) for path in hinted}
        else:
            among = {}
            for kind in tree.kinds():
                for path, key in sorted(tree.files(kind)):
                    among[path] = (kind, key)
        for path in among if hinted is not None else {**self._seen, **among}:
            before, place = self._seen.get(path, (None, among.get(path)))
            stamp, external = documents.changed_externally(path)
            if place is None or stamp == before:
                continue
            if stamp is None:
                del self._seen[path]
            else:
                self._seen[path] = (stamp, place)
            if external:
                # If this version appears again, it is not a write of ours.
                documents.forget_own_write(path, before)
                notices.append(Notice(*place, None if stamp is None else 0, outside=True))


class FileEvents:
    """A thread that gathers the paths of file events below a folder, for one task.

    It is a thread of our own, and not ``awatch``, whose thread keeps a process from ending after
    a second Ctrl-C.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._loop = asyncio.get_running_loop()
        self._paths: set[str] = set()
        self._everything = False
        self._arrived = asyncio.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-state-events", daemon=True)
        _running.add(self)
        self._thread.start()

    async def next(self, seconds: float) -> set[str] | None:
        """The next paths; None for all of them, and none if there are none in these seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return set()
        self._arrived.clear()
        found, everything = self._paths, self._everything
        self._paths, self._everything = set(), False
        return None if everything else found

    def hint(self) -> None:
        """End the wait for paths; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._add, set())

    def end(self) -> None:
        """End the thread. Blocks for a moment."""
        self._over.set()
        self._thread.join()
        _running.discard(self)

    def _add(self, found: set[str] | None) -> None:
        self._paths |= found or set()
        self._everything = self._everything or found is None
        self._arrived.set()

    def _run(self) -> None:
        pause = 1.0
        with contextlib.suppress(RuntimeError):  # the loop is closed
            while not self._over.is_set():
                try:
                    while self._follow():
                        pass
                except (OSError, RuntimeError, UnicodeError) as error:
                    # Too many watches, or a name that is not UTF-8: rescans go on without hints.
                    _logger.info("file events ended, rescanning instead: %s", error)
                    self._loop.call_soon_threadsafe(self._add, None)
                self._over.wait(pause)
                pause = min(60.0, pause * 2)

    def _folders(self) -> dict[str, int]:
        """The folders of the kinds with their inodes.

        The kernel counts one watch for each folder, so our own hidden ones are left out.
        """
        with os.scandir(self._root) as entries:  # as watchfiles looks, and not as the store does
            return {
                entry.path: entry.inode()
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            }

    def _follow(self) -> bool:
        """Gather events until the end; True when there are other folders than there were."""
        from watchfiles import watch  # loads a native library; only listeners pay for it

        # It logs every batch at INFO, many a second in a busy directory.
        chatter = logging.getLogger("watchfiles.main")
        if chatter.level == logging.NOTSET:
            chatter.setLevel(logging.WARNING)
        live, folders = False, self._folders()
        for changes in watch(
            *(folders or [self._root]),
            recursive=bool(folders),
            watch_filter=self._concerns_us,
            debounce=50,
            step=25,
            stop_event=self._over,
            rust_timeout=_FOLDERS_MS,
            yield_on_timeout=True,
        ):
            # After the first batch, empty or not, all events arrive; a rescan finds earlier
            # changes.
            if changes or not live or self._loop.is_closed():
                found = {path for _, path in changes} if live else None
                self._loop.call_soon_threadsafe(self._add, found)
            live = True
            if self._folders() != folders:
                self._loop.call_soon_threadsafe(self._add, None)
                return True
        return False

    def _concerns_us(self, _: object, path: str) -> bool:
        below = path[len(self._root) + 1 :]
        ours = below.startswith(".") and not below.startswith(f"{paths.RUN}/")
        return not ours and "/.tmp-" not in path


_running: set[FileEvents] = set()


def _end_all() -> None:
    """A thread in native code must not meet the end of the interpreter."""
    for events in list(_running):
        events.end()


atexit.register(_end_all)
