"""Whole copies: a directory compared with its mirror, written there again, and brought back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from agent_state.clock import Clock, SystemClock
from agent_state.errors import AgentStateError, MirrorError
from agent_state.protocols import Document, DocumentCodec, LogRecord, Put
from agent_state.redis.client import FAILURES
from agent_state.redis.mirror_follower import BATCH
from agent_state.redis.mirror_layout import NOTHING, STATUS, Index, Place, say, version_of
from agent_state.redis.mirror_logs import RECORDS
from agent_state.redis.mirror_side import AnotherInstanceError, MirrorSide, Version
from agent_state.storage import ReadOnlyStateStore, paths
from agent_state.storage.checkpoint import Restorer
from agent_state.storage.directory import (
    ensure_instance,
    is_fresh,
    read_instance,
    write_instance,
)

_AT_ONCE = 256


@dataclass(slots=True)
class Compared:
    """Where a directory and its mirror differ. Each is ``kind/key``."""

    documents: int = 0
    logs: int = 0
    """How many there are, on either side."""
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
class Pulled:
    """What came of bringing a directory back. Each is ``kind/key``."""

    documents: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Left as they are here: as new, newer, or edited by hand."""
    refused: dict[str, str] = field(default_factory=dict)
    """Not usable, and why."""

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.refused, **asdict(self)}


@dataclass(slots=True)
class Rebuilt:
    """How much was written again, and how many keys were removed."""

    documents: int = 0
    records: int = 0
    removed: int = 0


def checked(document: Document, codec: DocumentCodec) -> Put:
    """The change that saves a mirrored document again.

    Raises what ``codec`` raises for one that may not be used.
    """
    kind, key = document.kind, document.key
    codec.check(document)
    meta = {"_session_id": key[0]} if kind == "agents" else {}
    return Put(kind, key, document.body, document.schema, 0, meta)


@asynccontextmanager
async def _asking(side: MirrorSide) -> AsyncIterator[None]:
    """Turn what Redis refuses into a ``MirrorError``."""
    try:
        yield
    except FAILURES as error:
        raise MirrorError(f"{side.where}: {type(error).__name__}: {error}") from error


async def overview(side: MirrorSide) -> dict[str, Any]:
    """Whose copy it is, and how much there is of each kind. Raises ``MirrorError``."""
    async with _asking(side):
        kinds = {}
        for kind in await side.kinds():
            index = await side.read_index(kind)
            living = sum(bool(entry.revision) for entry in index.documents.values())
            kinds[kind] = {"documents": living, "logs": len(index.logs)}
        return {"instance": await side.owner(), "kinds": kinds}


async def verify(side: MirrorSide, state_dir: str) -> Compared:
    """Compare every document and log on both sides, by revision and checksum.

    Works beside a running server; what it has not brought over yet is a difference. Raises
    ``MirrorError``, and ``StateNotFoundError`` when there is no such directory.
    """
    store, compared = ReadOnlyStateStore(state_dir), Compared()
    await store.open()
    try:
        async with _asking(side):
            await side.adopt_ttl()
            await _check_owner(side, store.root)
            for kind in sorted({*await _followed(store), *await side.kinds()}):
                index = await side.read_index(kind)
                await _compare_documents(side, store, kind, index, compared)
                await _compare_logs(side, store, kind, index, compared)
    finally:
        await store.close()
    return compared


async def _check_owner(side: MirrorSide, state_dir: str) -> None:
    owner, ours = await side.owner(), await asyncio.to_thread(read_instance, state_dir)
    if owner is not None and owner != ours:
        raise AnotherInstanceError(
            f"{side.where} is the mirror of instance {owner}; {state_dir} is {ours or 'none yet'}"
        )


async def _compare_documents(
    side: MirrorSide, store: ReadOnlyStateStore, kind: str, index: Index, compared: Compared
) -> None:
    here: dict[Place, tuple[str, str]] = {}
    async for document in store.scan(kind):
        here[kind, document.key] = version_of(document)
    here.pop(STATUS, None)
    listed = {place: entry for place, entry in index.documents.items() if entry.revision}
    places = sorted({*here, *listed})
    compared.documents += len(places)
    for start in range(0, len(places), _AT_ONCE):
        batch = places[start : start + _AT_ONCE]
        for place, there in zip(batch, await side.versions(batch), strict=True):
            entry = listed.get(place, NOTHING)
            if not entry.revision:
                compared.missing.append(say(place))
            elif place not in here:
                compared.extra.append(say(place))
            elif here[place] != entry.version:
                compared.different.append(say(place))
            elif there == ("", "") and side.expires(kind):
                compared.expired.append(say(place))
            elif there != here[place]:
                (compared.different if there[0] else compared.missing).append(say(place))


async def _compare_logs(
    side: MirrorSide, store: ReadOnlyStateStore, kind: str, index: Index, compared: Compared
) -> None:
    here = {(kind, key): 0 for key in await store.logs(kind)}
    for place in here:
        async for record in store.read_log(*place, last=1):
            here[place] = record.seq
    places = sorted({*here, *index.logs})
    compared.logs += len(places)
    for start in range(0, len(places), _AT_ONCE):
        batch = places[start : start + _AT_ONCE]
        for place, there in zip(batch, await side.ends(batch), strict=True):
            listed, name = index.logs.get(place, 0), say(place, log=True)
            if place not in here:
                compared.extra.append(name)
            elif not listed:
                compared.missing.append(name)
            elif listed != here[place]:
                compared.different.append(name)
            elif not there and side.expires(kind):
                compared.expired.append(name)
            elif there != here[place]:
                (compared.different if there else compared.missing).append(name)


async def rebuild(side: MirrorSide, state_dir: str, *, take_over: bool = False) -> Rebuilt:
    """Write every document and log again, and remove what the directory does not have.

    Works beside a running server, whose mirror looks again. ``take_over``: also where another
    instance's copy is, which goes. Raises ``MirrorError``, ``StateNotFoundError``.
    """
    store, rebuilt = ReadOnlyStateStore(state_dir), Rebuilt()
    await store.open()  # only to say so when there is no directory
    await store.close()
    ours = await asyncio.to_thread(ensure_instance, store.root)
    async with _asking(side):
        await side.adopt_ttl()
        await side.claim(ours, take_over=take_over)
        kinds = await side.kinds()
        # Read in Redis first, then in the directory: so what is written is never the older one.
        indexes = {kind: await side.load(kind, ours, anew=True) for kind in kinds}
        await store.open()
        try:
            for kind in sorted({*kinds, *await _followed(store)}):
                if kind not in indexes:
                    indexes[kind] = await side.load(kind, ours, anew=True)
                await _rebuild_kind(side, store, kind, indexes[kind], rebuilt)
                rebuilt.removed += await side.sweep(kind, await side.read_index(kind))
        finally:
            await store.close()
    return rebuilt


async def _rebuild_kind(
    side: MirrorSide, store: ReadOnlyStateStore, kind: str, index: Index, rebuilt: Rebuilt
) -> None:
    batch: list[Version] = []
    gone = {place for place, entry in index.documents.items() if entry.revision}
    async for document in store.scan(kind):
        place = (kind, document.key)
        gone.discard(place)
        if place != STATUS:
            batch.append(Version(place, document, index.documents.get(place, NOTHING)))
        if len(batch) == BATCH:
            rebuilt.documents += await _write(side, kind, index, batch)
            batch.clear()
    batch += [Version(place, None, index.documents[place]) for place in sorted(gone)]
    rebuilt.removed += len(gone)
    for start in range(0, len(batch), BATCH):
        part = batch[start : start + BATCH]
        written = await _write(side, kind, index, part)
        rebuilt.documents += min(written, sum(version.document is not None for version in part))
    for key in await store.logs(kind):
        rebuilt.records += await _rebuild_log(side, store, (kind, key), index)
    for place in index.logs.keys() - {(kind, key) for key in await store.logs(kind)}:
        await side.drop_log(place, index.mark)
        rebuilt.removed += 1


async def _write(side: MirrorSide, kind: str, index: Index, batch: list[Version]) -> int:
    """How many were written; one that somebody has written meanwhile is newer, and stays."""
    replies = await side.put(kind, index.mark, batch)
    for version, reply in zip(batch, replies, strict=True):
        if reply.startswith("error "):
            raise MirrorError(
                f"{side.where}: {reply.removeprefix('error ')}",
                kind=version.place[0],
                key=version.place[1],
            )
    return sum(reply.startswith("ok ") for reply in replies)


async def _rebuild_log(
    side: MirrorSide, store: ReadOnlyStateStore, place: Place, index: Index
) -> int:
    await side.drop_log(place, index.mark)
    after, written = 0, 0
    records: list[LogRecord] = []

    async def write() -> None:
        nonlocal after, written
        if records and await side.append(place, index.mark, after, records) is None:
            after, written = records[-1].seq, written + len(records)
        records.clear()

    async for record in store.read_log(*place):
        records.append(record)
        if len(records) == RECORDS:
            await write()
    await write()
    return written


async def pull(
    side: MirrorSide,
    state_dir: str,
    codec: DocumentCodec,
    *,
    take_over: bool = False,
    clock: Clock | None = None,
) -> Pulled:
    """Bring back what the mirror holds, with its revisions, checked, and over nothing newer.

    An empty directory becomes the instance whose copy it is; another one only with
    ``take_over``. Raises ``MirrorError``, and
    ``StateDirectoryInUseError`` while a server runs there.
    """
    pulled = Pulled()
    restorer = Restorer(state_dir, clock or SystemClock())
    async with _asking(side):
        owner = await side.owner()
        if owner is None:
            return pulled
        await asyncio.to_thread(_may_pull, side, restorer.root, owner, take_over)
        await asyncio.to_thread(restorer.open)
        try:
            for kind in await side.kinds():
                index = await side.read_index(kind)
                await _pull_documents(side, restorer, index, codec, pulled)
                for place in index.logs:
                    await _pull_log(side, restorer, place, pulled)
            await asyncio.to_thread(restorer.sync)
            await asyncio.to_thread(write_instance, restorer.root, owner)
        finally:
            await asyncio.to_thread(restorer.close)
    return pulled


def _may_pull(side: MirrorSide, root: str, owner: str, take_over: bool) -> None:
    if take_over or is_fresh(root) or read_instance(root) == owner:
        return
    raise AnotherInstanceError(
        f"{side.where} is the mirror of instance {owner}, and {root} is not: pull into an empty "
        "directory, or say --take-over"
    )


async def _pull_documents(
    side: MirrorSide, restorer: Restorer, index: Index, codec: DocumentCodec, pulled: Pulled
) -> None:
    for place, entry in index.documents.items():
        if not entry.revision:
            continue
        try:
            document = await side.get(place)
            if document is None:
                continue  # by its TTL
            meta = checked(document, codec).meta
        except AgentStateError as error:
            pulled.refused[say(place)] = error.message
            continue
        put_back = await asyncio.to_thread(partial(restorer.put_back, document, meta))
        (pulled.documents if put_back else pulled.left).append(say(place))


async def _pull_log(side: MirrorSide, restorer: Restorer, place: Place, pulled: Pulled) -> None:
    last = await asyncio.to_thread(partial(restorer.last, *place))
    brought, records = 0, []
    async for record in side.read_log(place, last):
        records.append(record)
        if len(records) == RECORDS:
            await asyncio.to_thread(partial(restorer.append, *place, list(records)))
            brought += len(records)
            records.clear()
    if records:
        await asyncio.to_thread(partial(restorer.append, *place, records))
        brought += len(records)
    (pulled.logs if brought else pulled.left).append(say(place, log=True))


async def _followed(store: ReadOnlyStateStore) -> set[str]:
    """The kinds of a directory that a mirror follows."""
    return set(await store.kinds()) - paths.RECORDED
