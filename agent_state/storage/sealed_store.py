"""A store whose documents and records are encrypted before it gets them.

The body of a sealed document or record is ``{"_sealed": "<envelope>"}``; all else of it (kind, key,
revision, times, schema, number, dedupe key) is as it would be. So files, journal, snapshots,
quarantine, Redis and mirrors have ciphertext, and no store knows of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import orjson

from agent_state.errors import (
    AgentStateError,
    EncryptionKeyError,
    ErasedKeyError,
    Key,
    RevisionConflictError,
    StateCorruptedError,
)
from agent_state.protocols import (
    Append,
    BodySealer,
    Change,
    Document,
    DocumentCodec,
    DocumentId,
    Incident,
    IndexedLogs,
    JsonObject,
    LogRecord,
    NoticeStream,
    Origin,
    Put,
    StateStore,
)
from agent_state.serializers import canonical_json, parse_object
from agent_state.storage import logs, paths
from agent_state.storage.document import SEALED, check_size

MARKER: DocumentId = ("system", ("encryption",))
"""The document that says that a store is encrypted, and with which keys; it is not encrypted."""
ENVELOPE_START = b'{"%b":"' % SEALED.encode()
_BATCH = 128
"""Documents of a scan whose keys are loaded together."""


def is_sealed(body: bytes) -> bool:
    """Whether a body is encrypted. Raises ``StateCorruptedError`` if somebody added to it."""
    if body.startswith(ENVELOPE_START) and body.count(b'"', len(ENVELOPE_START)) == 1:
        return True
    if b'"%b"' % SEALED.encode() in body and SEALED in orjson.loads(body):
        raise StateCorruptedError("the encrypted content was changed")
    return False


async def refuse_encrypted(store: StateStore) -> None:
    """Raise ``EncryptionKeyError`` if an open store is encrypted, for one who has no keys."""
    document = await store.get(*MARKER)
    if document is not None:
        raise EncryptionKeyError("the state is encrypted: give its keyring, as encryption=")


def marker_body(ident: str) -> bytes:
    """The body of the marker, for the keys of this id."""
    return canonical_json({"cipher": "AES-256-GCM", "keyring": ident})


def check_keyring(marker: JsonObject, ident: str | None) -> None:
    """Raise ``EncryptionKeyError`` unless a marker names the keyring of this id."""
    found = marker.get("keyring")
    if found != ident:
        other = f"not with {ident}" if ident else "the one that is given has no keys"
        raise EncryptionKeyError(f"the state is encrypted with keyring {found}, and {other}")


def seal(sealer: BodySealer, place: DocumentId, body: bytes, *, record: bool = False) -> bytes:
    """The sealed body. Blocks. Raises ``EncryptionKeyError``, ``StorageError``."""
    while (sealed := sealer.seal(place, body, record=record)) is None:
        sealer.load(place, None)
    return sealed


def unseal(sealer: BodySealer, place: DocumentId, body: bytes, *, record: bool = False) -> bytes:
    """The body, opened if it is sealed. Blocks.

    Raises ``StateCorruptedError``, ``EncryptionKeyError``, ``StorageError``.
    """
    if not is_sealed(body):
        return body
    while (opened := sealer.open(place, body, record=record)) is None:
        sealer.load(place, body)
    return opened


def _with_body(change: Put | Append, body: bytes) -> Change:
    """The change with a sealed body. Raises ``SerializationError`` for one that is too long."""
    if isinstance(change, Append):
        logs.check_record(body, change.dedupe_key)
    else:
        check_size(body, change.kind, change.key)
    return replace(change, body=body)


class SealedCodec:
    """A ``DocumentCodec`` for what is below a ``SealedStateStore``: it sees sealed bodies."""

    def __init__(self, codec: DocumentCodec, sealer: BodySealer) -> None:
        self._codec = codec
        self._sealer = sealer

    def put(self, kind: str, key: Key, state: Mapping[str, Any], expected: int | None) -> Put:
        change = self._codec.put(kind, key, state, expected)
        return replace(change, body=seal(self._sealer, (kind, key), change.body))

    def check(self, document: Document) -> None:
        body = unseal(self._sealer, (document.kind, document.key), document.body)
        self._codec.check(replace(document, body=body))


class SealedStateStore:
    """``store``, with every body sealed by ``sealer`` on its way there, and opened on its way back.

    A document that is not sealed is read as it is, and sealed when it changes. ``marks``: whether
    ``open`` writes the marker of an encrypted store; False for a store that is only read.

    Raises what ``store`` raises; ``EncryptionKeyError`` at ``open`` when it was sealed with other
    keys, and later for a key that is missing, ``ErasedKeyError`` for one that was erased.
    Nothing is quarantined for want of a key.
    """

    def __init__(self, store: StateStore, sealer: BodySealer, *, marks: bool = True) -> None:
        self.store = store
        self._sealer = sealer
        self._marks = marks
        self._open = False
        self._incidents: list[Incident] = []
        self._loading = asyncio.Lock()
        self._waiting = 0
        """Commits that wait for their keys; later ones wait behind them."""

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._open:
            return
        ident = await asyncio.to_thread(lambda: self._sealer.ident)
        self._loading, self._waiting = asyncio.Lock(), 0
        await self.store.open()
        try:
            await self._check_marker(ident)
        except BaseException:
            await self.store.close()
            raise
        self._open = True

    async def _check_marker(self, ident: str | None) -> None:
        while True:
            marker = await self.store.get(*MARKER)
            if marker is not None:
                if ident is None:  # another process has made both since
                    ident = await asyncio.to_thread(lambda: self._sealer.ident)
                check_keyring(parse_object(marker.body), ident)
                return
            if not self._marks:
                return
            ident = await asyncio.to_thread(self._sealer.prepare)
            try:
                await self.store.commit([Put(*MARKER, marker_body(ident), "system/1", 0)])
            except RevisionConflictError:
                continue  # another process was first

    async def close(self) -> None:
        self._open = False
        await self.store.close()

    # -- sealing and opening -----------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if self._waiting or (sealed := self._seal(changes)) is None:
            # In the order they came, as a store makes them.
            self._waiting += 1
            try:
                async with self._loading:
                    sealed = self._seal(changes)
                    if sealed is None:
                        sealed = await asyncio.to_thread(self._load_and_seal, changes)
            finally:
                self._waiting -= 1
        return await self.store.commit(sealed)

    def _seal(self, changes: Sequence[Change]) -> list[Change] | None:
        """The changes with sealed bodies; None if keys must be loaded first."""
        sealed: list[Change] = []
        for change in changes:
            if isinstance(change, Put | Append):
                record = isinstance(change, Append)
                body = self._sealer.seal(self._place_of(change), change.body, record=record)
                if body is None:
                    return None
                sealed.append(_with_body(change, body))
            else:
                sealed.append(change)
        return sealed

    def _load_and_seal(self, changes: Sequence[Change]) -> list[Change]:
        """``_seal`` in a thread: each body as soon as its key is loaded."""
        sealed: list[Change] = []
        for change in changes:
            if isinstance(change, Put | Append):
                place, record = self._place_of(change), isinstance(change, Append)
                body = seal(self._sealer, place, change.body, record=record)
                sealed.append(_with_body(change, body))
            else:
                sealed.append(change)
        return sealed

    def _place_of(self, change: Put | Append) -> DocumentId:
        place = (change.kind, change.key)
        paths.relative(*place, paths.DOCUMENT)  # no key is made for what is no id
        if isinstance(change, Append):
            return self._sealer.place_of_record(place, change.dedupe_key)
        return place

    async def _unseal(self, place: DocumentId, body: bytes, *, record: bool = False) -> bytes:
        if not is_sealed(body):
            return body
        opened = self._sealer.open(place, body, record=record)
        if opened is None:
            opened = await asyncio.to_thread(unseal, self._sealer, place, body, record=record)
        return opened

    async def _usable(self, document: Document | None) -> Document | None:
        """The document, opened. A damaged one is quarantined; the version that replaces it, then.

        Raises ``StateCorruptedError`` when no earlier version is kept.
        """
        while document is not None:
            kind, key = document.kind, document.key
            try:
                body = await self._unseal((kind, key), document.body)
                return document if body is document.body else replace(document, body=body)
            except StateCorruptedError as error:
                earlier = await self.store.quarantine(kind, key, error.message, version=document)
                if earlier is None or earlier == document:
                    raise
                document = earlier
        return None

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        return await self._usable(await self.store.get(kind, key))

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        batch: list[Document] = []
        async for document in self.store.scan(kind, prefix):
            batch.append(document)
            if len(batch) == _BATCH:
                for each in await self._all_usable(batch):
                    yield each
                batch = []
        for each in await self._all_usable(batch):
            yield each

    async def _all_usable(self, documents: Sequence[Document]) -> list[Document]:
        """Those that can be used; their keys are loaded in one thread."""
        await asyncio.to_thread(self._load_for, documents)
        usable = []
        for document in documents:
            try:
                found = await self._usable(document)
            except StateCorruptedError:
                continue  # the store has reported it
            except ErasedKeyError as error:
                self._report(error, document.kind, document.key)
                continue
            if found is not None:
                usable.append(found)
        return usable

    def _load_for(self, documents: Sequence[Document]) -> None:
        for document in documents:
            place = (document.kind, document.key)
            try:
                if is_sealed(document.body) and self._sealer.open(place, document.body) is None:
                    self._sealer.load(place, document.body)
            except AgentStateError:
                continue  # whoever uses it meets the error

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        async for record in self.store.read_log(kind, key, after=after, last=last):
            unsealed = await self._unseal_record(kind, key, record)
            if unsealed is not None:
                yield unsealed

    async def keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        """The records whose dedupe keys begin so, as ``IndexedLogs``."""
        store = self.store
        if not isinstance(store, IndexedLogs):
            return None
        found = await store.keyed_records(kind, key, prefix)
        if found is None:
            return None
        unsealed = [await self._unseal_record(kind, key, record) for record in found]
        return [record for record in unsealed if record is not None]

    async def _unseal_record(self, kind: str, key: Key, record: LogRecord) -> LogRecord | None:
        """The record as it was appended; None, and reported, for one that cannot be unsealed."""
        try:
            place = self._sealer.place_of_record((kind, key), record.dedupe_key)
            body = await self._unseal(place, record.body, record=True)
        except (StateCorruptedError, ErasedKeyError) as error:
            self._report(error, kind, key)
            return None
        return record if body is record.body else replace(record, body=body)

    def _report(self, error: AgentStateError, kind: str, key: Key) -> None:
        incident = Incident(error.message, kind, key)
        if incident not in self._incidents:
            self._incidents.append(incident)

    def incidents(self) -> list[Incident]:
        return [*self.store.incidents(), *self._incidents]

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        if version is not None:
            stored = await self.store.get(kind, key)
            if stored is not None:
                try:
                    body = await self._unseal((kind, key), stored.body)
                except StateCorruptedError:
                    body = version.body
                if replace(stored, body=body) != version:
                    return replace(stored, body=body)  # it has replaced that version
                version = stored
        return await self._usable(await self.store.quarantine(kind, key, reason, version=version))

    # -- the store's -----------------------------------------------------------------------

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self.store.keys(kind, prefix)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        return await self.store.logs(kind, prefix)

    async def watch(self) -> NoticeStream:
        return await self.store.watch()

    def lock(self, kind: str, key: Key) -> AbstractAsyncContextManager[None]:
        return self.store.lock(kind, key)

    async def flush(self) -> None:
        await self.store.flush()

    async def erase(self, kind: str, key: Key) -> int:
        return await self.store.erase(kind, key)

    async def origin(self) -> Origin:
        return await self.store.origin()
