"""Compares a directory with its mirror, writes the mirror again, and pulls it back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from agent_state.clock import Clock, SystemClock
from agent_state.errors import AgentStateError, MirrorError, StorageError
from agent_state.protocols import Document, DocumentCodec, LogRecord, Put
from agent_state.redis.client import redis_error_of
from agent_state.redis.mirror_client import (
    NO_ENTRY,
    STATUS_DOCUMENT,
    AnotherInstanceError,
    DocumentId,
    KindIndex,
    MirrorClient,
    MirrorWrite,
    describe_id,
    version_of,
)
from agent_state.redis.mirror_follower import BATCH_DOCUMENTS, BATCH_RECORDS
from agent_state.storage import ReadOnlyStateStore, paths
from agent_state.storage.checkpoint import Restorer
from agent_state.storage.directory import (
    ensure_instance,
    is_fresh,
    read_instance,
    write_instance,
)

_COMPARED_TOGETHER = 256


@dataclass(slots=True)
class MirrorComparison:
    """Where a directory and its mirror differ. Each is ``kind/key``."""

    documents: int = 0
    logs: int = 0
    """How many there are, on either client."""
    missing: list[str] = field(default_factory=list)
    """Not in the mirror."""
    different: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    """Only in the mirror."""
    expired: list[str] = field(default_factory=list)
    """Gone from the mirror by its TTL, as it should be."""

    @property
    def ok(self) -> bool:
        return not (self.missing or self.different or self.extra)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass(slots=True)
class PullReport:
    """What ``pull`` restored. Each is ``kind/key``."""

    documents: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Left as they are here: the same version, a newer one, or edited by hand."""
    refused: dict[str, str] = field(default_factory=dict)
    """Not usable, with the reasons."""

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.refused, **asdict(self)}


@dataclass(slots=True)
class RebuildReport:
    """The numbers of documents and records written again, and of keys removed."""

    documents: int = 0
    records: int = 0
    removed: int = 0


def restored(document: Document, codec: DocumentCodec) -> Put:
    """The change that saves a mirrored document again.

    Raises the errors of ``codec.check`` for a document that must not be used.
    """
    kind, key = document.kind, document.key
    codec.check(document)
    meta = {"_session_id": key[0]} if kind == "agents" else {}
    return Put(kind, key, document.body, document.schema, 0, meta)


@asynccontextmanager
async def _redis_errors(client: MirrorClient) -> AsyncIterator[None]:
    """Turn a failure of Redis into a ``MirrorError``."""
    try:
        yield
    except StorageError as error:
        if (cause := redis_error_of(error)) is None:
            raise
        raise MirrorError(f"{client.name}: {type(cause).__name__}: {cause}") from error


async def overview(client: MirrorClient) -> dict[str, Any]:
    """The owner, and the number of documents and logs of each kind. Raises ``MirrorError``."""
    async with _redis_errors(client):
        kinds = {}
        for kind in await client.kinds():
            index = await client.read_index(kind)
            living = sum(bool(entry.revision) for entry in index.documents.values())
            kinds[kind] = {"documents": living, "logs": len(index.logs)}
        return {"instance": await client.owner(), "kinds": kinds}


async def verify(client: MirrorClient, state_dir: str) -> MirrorComparison:
    """Compare every document and log on both sides, by revision and checksum.

    A server may be running; a change that it has not mirrored yet is a difference. Raises
    ``MirrorError``, and ``StateNotFoundError`` for a missing directory.
    """
    store, compared = ReadOnlyStateStore(state_dir), MirrorComparison()
    await store.open()
    try:
        async with _redis_errors(client):
            await client.adopt_ttl()
            await _check_owner(client, store.root)
            for kind in sorted({*await _followed(store), *await client.kinds()}):
                index = await client.read_index(kind)
                await _compare_documents(client, store, kind, index, compared)
                await _compare_logs(client, store, kind, index, compared)
    finally:
        await store.close()
    return compared


async def _check_owner(client: MirrorClient, state_dir: str) -> None:
    owner, ours = await client.owner(), await asyncio.to_thread(read_instance, state_dir)
    if owner is not None and owner != ours:
        raise AnotherInstanceError(
            f"{client.name} is the mirror of instance {owner}; {state_dir} is {ours or 'none yet'}"
        )


async def _compare_documents(
    client: MirrorClient,
    store: ReadOnlyStateStore,
    kind: str,
    index: KindIndex,
    compared: MirrorComparison,
) -> None:
    here: dict[DocumentId, tuple[str, str]] = {}
    async for document in store.scan(kind):
        here[kind, document.key] = version_of(document)
    here.pop(STATUS_DOCUMENT, None)
    listed = {target: entry for target, entry in index.documents.items() if entry.revision}
    targets = sorted({*here, *listed})
    compared.documents += len(targets)
    for start in range(0, len(targets), _COMPARED_TOGETHER):
        batch = targets[start : start + _COMPARED_TOGETHER]
        for target, there in zip(batch, await client.versions(batch), strict=True):
            entry = listed.get(target, NO_ENTRY)
            if not entry.revision:
                compared.missing.append(describe_id(target))
            elif target not in here:
                compared.extra.append(describe_id(target))
            elif here[target] != entry.version:
                compared.different.append(describe_id(target))
            elif there == ("", "") and client.expires(kind):
                compared.expired.append(describe_id(target))
            elif there != here[target]:
                (compared.different if there[0] else compared.missing).append(describe_id(target))


async def _compare_logs(
    client: MirrorClient,
    store: ReadOnlyStateStore,
    kind: str,
    index: KindIndex,
    compared: MirrorComparison,
) -> None:
    here = {(kind, key): 0 for key in await store.logs(kind)}
    for target in here:
        async for record in store.read_log(*target, last=1):
            here[target] = record.seq
    targets = sorted({*here, *index.logs})
    compared.logs += len(targets)
    for start in range(0, len(targets), _COMPARED_TOGETHER):
        batch = targets[start : start + _COMPARED_TOGETHER]
        for target, there in zip(batch, await client.ends(batch), strict=True):
            listed, name = index.logs.get(target, 0), describe_id(target, log=True)
            if target not in here:
                compared.extra.append(name)
            elif not listed:
                compared.missing.append(name)
            elif listed != here[target]:
                compared.different.append(name)
            elif not there and client.expires(kind):
                compared.expired.append(name)
            elif there != here[target]:
                (compared.different if there else compared.missing).append(name)


async def rebuild(
    client: MirrorClient, state_dir: str, *, take_over: bool = False
) -> RebuildReport:
    """Write every document and log again, and remove what the directory does not have.

    A server may be running; its mirror then compares everything again. ``take_over``: also
    replaces another instance's copy. Raises ``MirrorError``, ``StateNotFoundError``.
    """
    store, rebuilt = ReadOnlyStateStore(state_dir), RebuildReport()
    await store.open()  # raises for a missing directory
    await store.close()
    ours = await asyncio.to_thread(ensure_instance, store.root)
    async with _redis_errors(client):
        await client.adopt_ttl()
        await client.claim(ours, take_over=take_over)
        kinds = await client.kinds()
        # Redis is read first, then the directory, so no older version replaces a newer one.
        indexes = {kind: await client.load(kind, ours, replace=True) for kind in kinds}
        await store.open()
        try:
            for kind in sorted({*kinds, *await _followed(store)}):
                if kind not in indexes:
                    indexes[kind] = await client.load(kind, ours, replace=True)
                await _rebuild_kind(client, store, kind, indexes[kind], rebuilt)
                rebuilt.removed += await client.sweep(kind, await client.read_index(kind))
        finally:
            await store.close()
    return rebuilt


async def _rebuild_kind(
    client: MirrorClient,
    store: ReadOnlyStateStore,
    kind: str,
    index: KindIndex,
    rebuilt: RebuildReport,
) -> None:
    batch: list[MirrorWrite] = []
    gone = {target for target, entry in index.documents.items() if entry.revision}
    async for document in store.scan(kind):
        target = (kind, document.key)
        gone.discard(target)
        if target != STATUS_DOCUMENT:
            batch.append(MirrorWrite(target, document, index.documents.get(target, NO_ENTRY)))
        if len(batch) == BATCH_DOCUMENTS:
            rebuilt.documents += await _write(client, kind, index, batch)
            batch.clear()
    batch += [MirrorWrite(target, None, index.documents[target]) for target in sorted(gone)]
    rebuilt.removed += len(gone)
    for start in range(0, len(batch), BATCH_DOCUMENTS):
        part = batch[start : start + BATCH_DOCUMENTS]
        written = await _write(client, kind, index, part)
        rebuilt.documents += min(written, sum(version.document is not None for version in part))
    for key in await store.logs(kind):
        rebuilt.records += await _rebuild_log(client, store, (kind, key), index)
    for target in index.logs.keys() - {(kind, key) for key in await store.logs(kind)}:
        await client.drop_log(target, index.index_id)
        rebuilt.removed += 1


async def _write(
    client: MirrorClient, kind: str, index: KindIndex, batch: Sequence[MirrorWrite]
) -> int:
    """Returns how many were written; a document that was written since then is newer, and stays."""
    replies = await client.put(kind, index.index_id, batch)
    for write, reply in zip(batch, replies, strict=True):
        if reply.startswith("error "):
            error = client.refusal(reply)
            kind, key = write.target
            raise MirrorError(f"{client.name}: {error.message}", kind=kind, key=key) from error
    return sum(reply.startswith("ok ") for reply in replies)


async def _rebuild_log(
    client: MirrorClient, store: ReadOnlyStateStore, target: DocumentId, index: KindIndex
) -> int:
    await client.drop_log(target, index.index_id)
    after, written = 0, 0
    async for records in _chunks(store.read_log(*target)):
        if await client.append(target, index.index_id, after, records) is None:
            after, written = records[-1].seq, written + len(records)
    return written


async def pull(
    client: MirrorClient,
    state_dir: str,
    codec: DocumentCodec,
    *,
    take_over: bool = False,
    clock: Clock | None = None,
) -> PullReport:
    """Restore the mirror's documents, with their revisions and checked, unless newer ones exist.

    An empty directory becomes the instance whose copy this is; another one only with
    ``take_over``. Raises ``MirrorError``, and ``StateDirectoryInUseError`` while a server runs
    there.
    """
    pulled = PullReport()
    restorer = Restorer(state_dir, clock or SystemClock())
    async with _redis_errors(client):
        owner = await client.owner()
        if owner is None:
            return pulled
        await asyncio.to_thread(_may_pull, client, restorer.root, owner, take_over)
        await asyncio.to_thread(restorer.open)
        try:
            for kind in await client.kinds():
                index = await client.read_index(kind)
                await _pull_documents(client, restorer, index, codec, pulled)
                for target in index.logs:
                    await _pull_log(client, restorer, target, pulled)
            await asyncio.to_thread(restorer.sync)
            await asyncio.to_thread(write_instance, restorer.root, owner)
        finally:
            await asyncio.to_thread(restorer.close)
    return pulled


def _may_pull(client: MirrorClient, root: str, owner: str, take_over: bool) -> None:
    if take_over or is_fresh(root) or read_instance(root) == owner:
        return
    raise AnotherInstanceError(
        f"{client.name} is the mirror of instance {owner}, and {root} is not: pull into an empty "
        "directory, or say --take-over"
    )


async def _pull_documents(
    client: MirrorClient,
    restorer: Restorer,
    index: KindIndex,
    codec: DocumentCodec,
    pulled: PullReport,
) -> None:
    for target, entry in index.documents.items():
        if not entry.revision:
            continue
        try:
            document = await client.get(target)
            if document is None:
                continue  # it has expired
            meta = restored(document, codec).meta
        except StorageError:
            raise  # Redis has failed, not this document
        except AgentStateError as error:
            pulled.refused[describe_id(target)] = error.message
            continue
        put_back = await asyncio.to_thread(partial(restorer.put_back, document, meta))
        (pulled.documents if put_back else pulled.left).append(describe_id(target))


async def _pull_log(
    client: MirrorClient, restorer: Restorer, target: DocumentId, pulled: PullReport
) -> None:
    last = await asyncio.to_thread(partial(restorer.last, *target))
    restored_any = False
    async for records in _chunks(client.read_log(target, last)):
        await asyncio.to_thread(partial(restorer.append, *target, records))
        restored_any = True
    (pulled.logs if restored_any else pulled.left).append(describe_id(target, log=True))


async def _chunks(records: AsyncIterator[LogRecord]) -> AsyncIterator[list[LogRecord]]:
    chunk: list[LogRecord] = []
    async for record in records:
        chunk.append(record)
        if len(chunk) == BATCH_RECORDS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _followed(store: ReadOnlyStateStore) -> set[str]:
    """The kinds of a directory that a mirror copies."""
    return set(await store.kinds()) - paths.RECORDED
