"""A store with a mirror: the mirror is notified of every change, and delays no caller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TypeVar

from agent_state.errors import (
    Key,
    MirrorError,
    RevisionConflictError,
    StateCorruptedError,
    describe,
)
from agent_state.protocols import (
    Change,
    Check,
    Document,
    DocumentCodec,
    DocumentId,
    Incident,
    IndexedLogs,
    LogRecord,
    Mirror,
    NoticeStream,
    Origin,
    StateStore,
    TrackedStore,
)
from agent_state.storage import paths
from agent_state.storage.directory import ensure_instance, is_fresh
from agent_state.storage.locks import TaskLocks

_logger = logging.getLogger("agent_state.storage")

T = TypeVar("T")

_RESTORE_SECONDS = 60.0
"""How long a reader waits while a document is restored."""


class MirroredStateStore:
    """``store``, which stays the truth, and a mirror that follows it.

    ``restores``: a damaged document without an earlier version here is restored from the mirror,
    and so is everything when the directory is empty at ``open``. A missing document is not
    restored: it may have been deleted.

    Raises what ``store`` raises, and at ``open`` ``MirrorError`` when the mirror is another
    instance's.
    """

    def __init__(
        self, store: StateStore, mirror: Mirror, codec: DocumentCodec, *, restores: bool = False
    ) -> None:
        self.store = store
        self.mirror = mirror
        self._codec = codec
        self._restores = restores
        self._restored: dict[DocumentId, bytes] = {}
        self._incidents: list[Incident] = []
        self._reads: set[asyncio.Future[None]] = set()
        self._lost: set[DocumentId] = set()
        self._noted = 0
        """How many incidents of the store have been looked at."""
        self._locks = TaskLocks(_RESTORE_SECONDS)
        self._open = False

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._open:
            return
        await self._refill()
        await self.store.open()
        try:
            # It reads through this store, so that damage it finds first is repaired here too.
            await self.mirror.open(self, await self.origin(), self._codec)
        except BaseException:
            await self.store.close()
            raise
        self._open = True

    async def close(self) -> None:
        if not self._open:
            await self.store.close()
            return
        self._open = False
        try:
            await self.mirror.close()
        finally:
            await self.store.close()

    async def _refill(self) -> None:
        """Restore everything into a directory that is empty, if ``restores``."""
        state_dir = (await self.store.origin()).state_dir if self._restores else None
        if state_dir is None or not await asyncio.to_thread(is_fresh, state_dir):
            return
        try:
            restored = await self.mirror.restore_all(state_dir, self._codec)
        except MirrorError as error:
            self._incidents.append(Incident(f"nothing was restored from the mirror: {error}"))
            _logger.warning("an empty state directory was not filled: %s", error)
        else:
            _logger.info("%s: %d restored from the mirror", state_dir, restored)

    async def origin(self) -> Origin:
        """The store's, with an id made now if its directory has none."""
        origin = await self.store.origin()
        if origin.state_dir is None or origin.instance is not None:
            return origin
        return replace(origin, instance=await asyncio.to_thread(ensure_instance, origin.state_dir))

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        if not self._restores:
            return await self.store.get(kind, key)
        # Another reader must not find nothing while the document is restored.
        async with self._locks.hold([describe(kind, key)]):
            try:
                document = await self._reading(self.store.get(kind, key))
            except StateCorruptedError:
                document = await self._restore_document(kind, key)
                if document is None:
                    raise
            if document is None and (kind, key) in await self._lost_documents():
                document = await self._restore_document(kind, key)
            return document

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        before, found = len(self._incidents), set()
        documents = self.store.scan(kind, prefix)
        while (document := await self._reading(anext(documents, None))) is not None:
            found.add(document.key)
            yield document
        for key in await self._restored_since(before, kind, prefix):
            if key not in found and (document := await self.get(kind, key)) is not None:
                yield document

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        before = len(self._incidents)
        keys = await self._reading(self.store.keys(kind, prefix))
        restored = await self._restored_since(before, kind, prefix)
        found = [key for key in restored if await self.get(kind, key) is not None]
        return sorted({*keys, *found}) if found else keys

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        async with self._locks.hold([describe(kind, key)]):
            quarantined = self.store.quarantine(kind, key, reason, version=version)
            return await self._reading(quarantined) or await self._restore_document(kind, key)

    # -- restoring -----------------------------------------------------------------------

    async def _reading(self, read: Awaitable[T]) -> T:
        """Await a read of the store, which may quarantine what it finds damaged."""
        ended = asyncio.get_running_loop().create_future()
        self._reads.add(ended)
        try:
            return await read
        finally:
            self._reads.remove(ended)
            ended.set_result(None)

    async def _lost_documents(self) -> set[DocumentId]:
        """Those that the store has quarantined, also in reads that run, and that are not restored.

        One that was saved or deleted since is none of them.
        """
        if self._restores:
            if self._reads:
                await asyncio.wait([*self._reads])
            self._note_losses()
        return self._lost

    def _note_losses(self) -> None:
        incidents = self.store.incidents()
        for incident in incidents[self._noted :]:
            if incident.kind is not None and incident.key is not None:
                of_log = (incident.path or "").endswith(paths.LOG)
                if incident.kept and not incident.restored and not of_log:
                    self._lost.add((incident.kind, incident.key))
        self._noted = len(incidents)

    async def _restored_since(self, before: int, kind: str, prefix: Key) -> list[Key]:
        """The documents that are lost, or restored since this store had so many incidents."""
        lost = await self._lost_documents()
        restored = [(incident.kind, incident.key) for incident in self._incidents[before:]]
        keys = [key for k, key in {*lost, *restored} if k == kind and key is not None]
        return sorted(key for key in keys if paths.is_below(key, prefix))

    async def _restore_document(self, kind: str, key: Key) -> Document | None:
        """Save the mirrored version of a quarantined document; None if the mirror has none.

        The same version is not restored twice: it is damaged, or invalid, itself.
        """
        if not self._restores:
            return None
        self._note_losses()
        try:
            change = await self.mirror.restore_document(kind, key)
            if change is None or self._restored.get((kind, key)) == change.body:
                return None
            with contextlib.suppress(RevisionConflictError):  # another task has saved it since
                await self.commit([change])
            self._restored[kind, key] = change.body
            what = "the version of the mirror was restored"
            self._incidents.append(Incident(what, kind, key, restored=True))
            return await self.store.get(kind, key)
        except MirrorError as error:
            _logger.warning("%s was not restored: %s", describe(kind, key), error)
            return None
        finally:
            self._lost.discard((kind, key))

    # -- the store's -----------------------------------------------------------------------

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self.store.logs(kind, prefix)

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        return self.store.read_log(kind, key, after=after, last=last)

    async def keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        store = self.store
        return (
            await store.keyed_records(kind, key, prefix) if isinstance(store, IndexedLogs) else None
        )

    async def watch(self) -> NoticeStream:
        return await self.store.watch()

    async def is_removed(self, kind: str, key: Key) -> bool:
        return isinstance(self.store, TrackedStore) and await self.store.is_removed(kind, key)

    @property
    def is_merging(self) -> bool:
        return isinstance(self.store, TrackedStore) and self.store.is_merging

    async def check_merged(self, kind: str, key: Key, *, reads: bool = False) -> None:
        if isinstance(self.store, TrackedStore):
            await self.store.check_merged(kind, key, reads=reads)

    def incidents(self) -> list[Incident]:
        return [*self.store.incidents(), *self._incidents]

    # -- writing -------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        try:
            numbers = await self._reading(self.store.commit(changes))
            if self._restores:
                self._note_losses()
                self._lost.difference_update((change.kind, change.key) for change in changes)
            return numbers
        finally:
            # Also after a cancellation or an unknown outcome: the mirror reads the store.
            self.mirror.changed([each for each in changes if not isinstance(each, Check)])

    async def erase(self, kind: str, key: Key) -> int:
        try:
            return await self.store.erase(kind, key)
        finally:
            self._restored.pop((kind, key), None)
            self._lost.discard((kind, key))
            self.mirror.erased(kind, key)

    def lock(self, kind: str, key: Key) -> AbstractAsyncContextManager[None]:
        return self.store.lock(kind, key)

    async def flush(self) -> None:
        await self.store.flush()
