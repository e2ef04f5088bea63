"""A store with a mirror, which is told of every change, and which nobody waits for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

from agent_state.errors import (
    Key,
    MirrorError,
    RevisionConflictError,
    StateCorruptedError,
    describe,
)
from agent_state.protocols import (
    Change,
    Document,
    DocumentCodec,
    Incident,
    LogRecord,
    Mirror,
    NoticeStream,
    Origin,
    StateStore,
)
from agent_state.serializers import canonical_json, parse_object
from agent_state.storage import fileio, paths
from agent_state.storage.directory import StateDirectory
from agent_state.storage.file_store import FileStateStore
from agent_state.storage.inspection import quarantined

_logger = logging.getLogger("agent_state.storage")


class MirroredStateStore:
    """``store``, which stays the truth, and a mirror that follows it.

    ``restores``: a document that is found damaged, with no earlier version here, is brought back
    from the mirror, and so is everything when the directory is empty at ``open``. A document that
    is merely missing is not: that is what a deletion looks like.

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
        self._brought: dict[tuple[str, Key], bytes] = {}
        self._incidents: list[Incident] = []
        self._open = False

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._open:
            return
        await self._refill()
        await self.store.open()
        try:
            # It reads through this store: damage that it meets first is mended here too.
            await self.mirror.open(self, await self._origin(), self._codec)
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
        store = self.store
        if not self._restores or not isinstance(store, FileStateStore):
            return
        if not await asyncio.to_thread(is_fresh, store.root):
            return
        try:
            brought = await self.mirror.restore_all(store.root, self._codec)
        except MirrorError as error:
            self._incidents.append(Incident(f"nothing was brought from the mirror: {error}"))
            _logger.warning("an empty state directory was not filled: %s", error)
        else:
            _logger.info("%s: %d brought from the mirror", store.root, brought)

    async def _origin(self) -> Origin:
        store = self.store
        if not isinstance(store, FileStateStore):
            return Origin()
        return await asyncio.to_thread(_origin_of, store.root)

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        try:
            return await self.store.get(kind, key)
        except StateCorruptedError:
            document = await self._restore_document(kind, key)
            if document is None:
                raise
            return document

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        before = len(self.store.incidents()) if self._restores else 0
        async for document in self.store.scan(kind, prefix):
            yield document
        if self._restores:
            for incident in self.store.incidents()[before:]:
                if _is_lost(incident, kind, prefix) and incident.key is not None:
                    brought = await self._restore_document(kind, incident.key)
                    if brought is not None:
                        yield brought

    async def quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        earlier = await self.store.quarantine(kind, key, reason)
        return earlier or await self._restore_document(kind, key)

    async def _restore_document(self, kind: str, key: Key) -> Document | None:
        """Save the mirrored version of a document that was put aside; None when there is none.

        The same version is not brought back twice: then it is what is no good.
        """
        if not self._restores:
            return None
        try:
            change = await self.mirror.restore_document(kind, key)
        except MirrorError as error:
            _logger.warning("%s was not brought back: %s", describe(kind, key), error)
            return None
        if change is None or self._brought.get((kind, key)) == change.body:
            return None
        with contextlib.suppress(RevisionConflictError):  # somebody has saved it meanwhile
            await self.commit([change])
        self._brought[kind, key] = change.body
        what = "the version that the mirror had was brought back"
        self._incidents.append(Incident(what, kind, key, restored=True))
        return await self.store.get(kind, key)

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self.store.keys(kind, prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self.store.logs(kind, prefix)

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        return self.store.read_log(kind, key, after=after, last=last)

    async def watch(self) -> NoticeStream:
        return await self.store.watch()

    def incidents(self) -> list[Incident]:
        return [*self.store.incidents(), *self._incidents]

    # -- writing -------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        try:
            return await self.store.commit(changes)
        finally:
            # Also of a caller that was cancelled, or told that nobody knows: the mirror looks.
            self.mirror.changed(changes)

    async def erase(self, kind: str, key: Key) -> int:
        try:
            return await self.store.erase(kind, key)
        finally:
            self._brought.pop((kind, key), None)
            self.mirror.erased(kind, key)

    def lock(self, kind: str, key: Key) -> AbstractAsyncContextManager[None]:
        return self.store.lock(kind, key)

    async def flush(self) -> None:
        await self.store.flush()


def _origin_of(root: str) -> Origin:
    directory = StateDirectory(root, sync=False, now=str)
    lost = {(kept.kind, kept.key) for kept in quarantined(directory) if kept.kind is not None}
    kinds = [kind for kind in directory.kinds() if kind not in paths.RECORDED]
    return Origin(ensure_instance(root), tuple(kinds), frozenset(lost))


def _is_lost(incident: Incident, kind: str, prefix: Key) -> bool:
    """Whether it tells of a document of this listing that was put aside for good."""
    if incident.kind != kind or incident.key is None or incident.restored or not incident.kept:
        return False
    return paths.is_below(incident.key, prefix)


FOLDER = ".mirror"
_FILE = f"{FOLDER}/instance.json"


def read_instance(root: str) -> str | None:
    """The id of a directory; None when it has none. Raises ``StateCorruptedError``. Blocks."""
    path = f"{root}/{_FILE}"
    found = fileio.read_file(path)
    if found is None:
        return None
    ident = parse_object(found[0]).get("instance")
    if type(ident) is not str or not ident:
        raise StateCorruptedError("it does not say which instance this is", path=path)
    return ident


def write_instance(root: str, ident: str) -> None:
    """Give a directory this id. Raises ``StorageError``. Blocks."""
    fileio.make_directories(root, FOLDER, sync=True)
    ignore = f"{root}/{FOLDER}/.gitignore"
    if fileio.stat_file(ignore) is None:
        fileio.replace_file(ignore, b"*\n", sync=True)
    fileio.replace_file(f"{root}/{_FILE}", canonical_json({"instance": ident}) + b"\n", sync=True)


def ensure_instance(root: str) -> str:
    """The id of a directory, made now if it has none. Blocks."""
    ident = read_instance(root)
    if ident is None:
        ident = secrets.token_hex(8)
        write_instance(root, ident)
        ident = read_instance(root) or ident  # of two processes that made one, the last has won
    return ident


def is_fresh(root: str) -> bool:
    """Whether there is nothing in a directory that a copy could be mixed with. Blocks."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return read_instance(root) is None and all(name.startswith(".") for name in names)
