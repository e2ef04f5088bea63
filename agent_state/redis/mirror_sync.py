"""Compares a directory with its mirror, writes the mirror again, and pulls it back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

from agent_state.clock import Clock, SystemClock
from agent_state.errors import AgentStateError, MirrorError, StorageError
from agent_state.protocols import Document, DocumentCodec, DocumentId, LogRecord, Origin, Put
from agent_state.redis.client import redis_error_of
from agent_state.redis.mirror_client import (
    STATUS_DOCUMENT,
    AnotherInstanceError,
    KindIndex,
    MirrorClient,
    describe_id,
    version_of,
)
from agent_state.redis.mirror_follower import BATCH_RECORDS, Follower
from agent_state.storage import ReadOnlyStateStore, paths
from agent_state.storage.directory import ensure_instance, is_fresh, read_instance, write_instance
from agent_state.storage.restorer import Restorer

T = TypeVar("T")

_COMPARED_TOGETHER = 256


@dataclass(slots=True)
class MirrorComparison:
    """Where a directory and its mirror differ. Each is ``kind/key``."""

    documents: int = 0
    """The number of documents on either side."""
    logs: int = 0
    """The number of logs on either side."""
    missing: list[str] = field(default_factory=list)
    """Not in the mirror."""
    different: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    """Only in the mirror."""
    expired: list[str] = field(default_factory=list)
    """Removed from the mirror by its TTL, which is not a difference."""

    @property
    def ok(self) -> bool:
        return not (self.missing or self.different or self.extra)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass(slots=True)
class PullReport:
    """The documents and logs that ``pull`` restored. Each is ``kind/key``."""

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
                await _compare_documents(client, store, index, compared)
                await _compare_logs(client, store, index, compared)
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
    client: MirrorClient, store: ReadOnlyStateStore, index: KindIndex, compared: MirrorComparison
) -> None:
    here = {
        (index.kind, document.key): version_of(document)
        async for document in store.scan(index.kind)
    }
    here.pop(STATUS_DOCUMENT, None)
    listed = {target: entry.version for target, entry in index.documents.items() if entry.revision}
    compared.documents += len(here.keys() | listed.keys())
    await _compare(client, compared, here, listed, client.versions)


async def _compare_logs(
    client: MirrorClient, store: ReadOnlyStateStore, index: KindIndex, compared: MirrorComparison
) -> None:
    here = {(index.kind, key): 0 for key in await store.logs(index.kind)}
    for target in here:
        async for record in store.read_log(*target, last=1):
            here[target] = record.seq
    compared.logs += len(here.keys() | index.logs.keys())
    await _compare(client, compared, here, index.logs, client.ends, log=True)


async def _compare(
    client: MirrorClient,
    compared: MirrorComparison,
    here: Mapping[DocumentId, T],
    listed: Mapping[DocumentId, T],
    read: Callable[[Sequence[DocumentId]], Awaitable[Sequence[T | None]]],
    *,
    log: bool = False,
) -> None:
    """Compare the versions in the directory, the index, and the keys, which ``read`` gives."""
    targets = sorted(here.keys() | listed.keys())
    for start in range(0, len(targets), _COMPARED_TOGETHER):
        batch = targets[start : start + _COMPARED_TOGETHER]
        for target, there in zip(batch, await read(batch), strict=True):
            name = describe_id(target, log=log)
            if target not in here:
                compared.extra.append(name)
            elif target not in listed:
                compared.missing.append(name)
            elif listed[target] != here[target]:
                compared.different.append(name)
            elif there is None:
                expired = client.expires(target[0])
                (compared.expired if expired else compared.missing).append(name)
            elif there != here[target]:
                compared.different.append(name)


async def rebuild(
    client: MirrorClient, state_dir: str, *, take_over: bool = False
) -> RebuildReport:
    """Write every document and log again, and remove what the directory does not have.

    A server may be running; its mirror then compares everything again. ``take_over``: also
    replaces another instance's copy. Raises ``MirrorError``, ``StateNotFoundError``.
    """
    store = ReadOnlyStateStore(state_dir)
    await store.open()
    try:
        ours = await asyncio.to_thread(ensure_instance, store.root)
        async with _redis_errors(client):
            await client.adopt_ttl()
            await client.claim(ours, take_over=take_over)
            kinds = sorted({*await client.kinds(), *await _followed(store)})
            for kind in kinds:
                await client.load(kind, ours, replace=True)
            follower = Follower(store, client, ours, Origin(ours, tuple(kinds)))
            await follower.send_pending(0.0, check=True)
            while follower.pending and not follower.refused():  # a server's mirror was faster
                await follower.send_pending(0.0, check=False)
            if refused := follower.refused():
                raise MirrorError(f"{client.name}: {refused[0]}")
            removed = [await client.sweep(await client.read_index(kind)) for kind in kinds]
    finally:
        await store.close()
    return RebuildReport(follower.sent, follower.records, sum(removed))


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
        "directory, or use --take-over"
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
