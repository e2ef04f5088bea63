"""Sends a store's newest versions to the mirror, each over the entry it was compared with.

Nothing orders two versions: a document that was deleted and created again may count from 1 again,
and clocks go back. So each write names the last write of that document that the follower has seen
(a number that is never given twice), and the store was read after seeing it. If that is still the
last write in Redis, the written version is as new as the one there, or newer; if not, nothing is
written, and the store is read again. A write that timed out and arrives late finds another number
and does nothing.

Several processes may follow one store. Another process may write a version that it has read before
a change of this process. So each change of this process ends with a write, even if the index seems
to have its version: the write of the other process then finds another number. In an exclusive
store a follower leaves that write out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from agent_state.errors import AgentStateError, Key, StateCorruptedError, StorageError
from agent_state.protocols import (
    Append,
    Change,
    Delete,
    Document,
    DocumentId,
    LogRecord,
    Origin,
    StateStore,
)
from agent_state.redis.client import failure_kind
from agent_state.redis.mirror_client import (
    NO_ENTRY,
    STATUS_DOCUMENT,
    IndexEntry,
    IndexReplacedError,
    KindIndex,
    MirrorClient,
    MirrorWrite,
    describe_id,
    parse_entry,
    version_of,
)
from agent_state.storage import paths

T = TypeVar("T")

BATCH_DOCUMENTS = 64
BATCH_RECORDS = 256
_BATCH_BYTES = 512 * 1024
_SCAN_FROM = 512
"""From this many pending documents on, and a quarter of a kind, the follower scans the kind."""


class PendingIds:
    """Documents or logs that have changed and are not in the mirror yet: their ids, no contents.

    Each counts once however often it changes, from its first change on, until it is ``done``.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, dict[DocumentId, float]] = {}
        self._taken: dict[DocumentId, float] = {}

    def __contains__(self, target: DocumentId) -> bool:
        """Whether it has changed since it was taken last."""
        return target in self._kinds.get(target[0], ())

    def __len__(self) -> int:
        twice = sum(target in self._kinds[target[0]] for target in self._taken)
        return sum(map(len, self._kinds.values())) + len(self._taken) - twice

    def add(self, target: DocumentId, now: float) -> None:
        """It has changed at this time."""
        self._kinds.setdefault(target[0], {}).setdefault(target, now)

    def kinds(self) -> list[str]:
        """The kinds with something pending."""
        return [kind for kind, targets in self._kinds.items() if targets]

    def count(self, kind: str) -> int:
        return len(self._kinds.get(kind, ()))

    def below(self, target: DocumentId) -> list[DocumentId]:
        """Those with this key or below it, also those that are being sent this moment."""
        kind, key = target
        known = {*self._kinds.get(kind, ()), *self._taken}
        return [one for one in known if one[0] == kind and one[1][: len(key)] == key]

    def take(self, kind: str, most: int) -> dict[DocumentId, float]:
        """The first of a kind, with the times of their changes. A later change adds one again."""
        targets = self._kinds.get(kind, {})
        first = [target for target, _ in zip(targets, range(most), strict=False)]
        taken = {target: targets.pop(target) for target in first}
        self._taken.update(taken)
        return taken

    def done(self, targets: Iterable[DocumentId]) -> None:
        """These are in the mirror, or were added again."""
        for target in targets:
            self._taken.pop(target, None)

    def add_again(self, taken: Mapping[DocumentId, float]) -> None:
        """These are still pending, since the times of their changes."""
        for target, since in taken.items():
            targets = self._kinds.setdefault(target[0], {})
            targets[target] = min(since, targets.get(target, since))

    def oldest(self) -> float | None:
        """The time of the earliest change; None when nothing is pending."""
        groups = (*self._kinds.values(), self._taken)
        return min((min(targets.values()) for targets in groups if targets), default=None)


class Follower:
    """Knows what is pending, and what Redis has. Only the event loop's thread uses it."""

    def __init__(
        self, store: StateStore, client: MirrorClient, instance: str, origin: Origin
    ) -> None:
        self._store = store
        self._client = client
        self.instance = instance
        self._kinds = set(origin.kinds)
        self._exclusive = origin.exclusive
        self.sent = self.removed = 0
        self.unreadable: dict[DocumentId, str] = {}
        """Damaged documents, whose last good version the mirror keeps, and the reasons."""
        self._refused: dict[DocumentId, str] = {}
        self._documents = PendingIds()
        self._deletions = Deletions(store, origin)
        self._logs = LogFollower(store, client, self._deletions)
        self._known: dict[str, KindIndex] = {}
        self._unconfirmed: set[DocumentId] = set()
        """Documents whose last write may have been done."""
        self._changed_here: set[DocumentId] = set()
        """Documents that this process has changed, in a store that is not exclusive."""
        self._erased: list[DocumentId] = []
        """Erased documents, until it is known what Redis has of their kinds."""
        self._stale: set[str] = set()
        self._claimed = self._compare_all = False
        self._server = ""

    @property
    def pending(self) -> int:
        """The number of documents and logs that are not in the mirror yet."""
        return len(self._documents) + len(self._logs.pending) + len(self._erased)

    @property
    def records(self) -> int:
        """The number of log records sent."""
        return self._logs.records

    def oldest(self) -> float | None:
        """The time of the earliest pending change; None when nothing is pending."""
        both = (self._documents.oldest(), self._logs.pending.oldest())
        return min((since for since in both if since is not None), default=None)

    def refused(self) -> tuple[str, ...]:
        """Documents and logs that cannot be mirrored as they are, with the reasons."""
        documents = [f"{describe_id(one)}: {why}" for one, why in self._refused.items()]
        logs = [f"{describe_id(one, log=True)}: {why}" for one, why in self._logs.refused.items()]
        return (*documents, *logs)

    # -- what has changed ------------------------------------------------------------------

    def changed(self, changes: Iterable[Change], now: float) -> None:
        """These changes may have been made."""
        for change in changes:
            target = (change.kind, change.key)
            if isinstance(change, Append):
                self._logs.changed(target, now)
                continue
            if isinstance(change, Delete):
                self._deletions.add(target)
            else:
                self._deletions.discard(target)
            self.touch(target, now, here=True)

    def touch(self, target: DocumentId, now: float, *, here: bool = False) -> None:
        """This document may have changed; ``here``: by this process.

        The mirror's status and recordings are not mirrored.
        """
        if target != STATUS_DOCUMENT and target[0] not in paths.RECORDED:
            if here and not self._exclusive:
                self._changed_here.add(target)
            self._refused.pop(target, None)
            self._documents.add(target, now)

    def erased(self, target: DocumentId, now: float) -> None:
        """This document and log may be erased, with everything below them."""
        if target[0] in paths.RECORDED:
            return
        index = self._known.get(target[0])
        if index is None or not self._exclusive:
            self._erased.append(target)
        else:
            self._touch_erased(target, index, now)

    def _touch_erased(self, target: DocumentId, index: KindIndex, now: float) -> None:
        kind, key = target
        there = [one for one in index.documents if one[1][: len(key)] == key]
        # Redis may get one this moment, which the index does not have yet.
        for one in {*there, *self._documents.below(target)}:
            self._deletions.add(one)
            self.touch(one, now, here=True)
        self._logs.erased(kind, key, index, now)

    def compare_again(self) -> None:
        """Compare all of the store in the next round: notices of changes may be missing."""
        self._claimed, self._compare_all = False, True

    def invalidate_claim(self) -> None:
        """Check ownership and indexes again: a command failed, or another server may answer."""
        self._claimed = False

    # -- sending ---------------------------------------------------------------------------

    async def send_pending(self, now: float, *, check: bool) -> None:
        """Send what is pending now; with ``check``, first compare what Redis has with before.

        Raises ``StorageError``, ``AnotherInstanceError``; what was not sent stays pending.
        """
        if check or not self._claimed:
            await self._check(now)
        for kind in sorted({kind for kind, _ in self._erased}):
            await self._load(kind, now)
        # Kinds and changes added from here on are handled in the next round.
        documents, logs = self._documents.kinds(), self._logs.pending.kinds()
        for kind in dict.fromkeys([*documents, *logs]):
            if kind not in self._known:
                await self._load(kind, now)
        for kind in documents:
            left = self._documents.count(kind)
            if left >= max(_SCAN_FROM, len(self._known[kind].documents) // 4):
                left -= await self._guarded(kind, self._send_by_scan(kind), now)
            while left > 0:
                count = min(left, BATCH_DOCUMENTS)
                left -= await self._guarded(kind, self._send(kind, count), now)
        for kind in logs:
            for _ in range(self._logs.pending.count(kind)):
                for target, since in self._logs.pending.take(kind, 1).items():
                    work = self._logs.follow(target, since, self._known[kind])
                    await self._guarded(kind, work, now)

    async def _guarded(self, kind: str, work: Coroutine[None, None, int], now: float) -> int:
        """The result of the work; the kind's index is read again if it turned out to be stale."""
        try:
            done = await work
        except IndexReplacedError:
            self._stale.add(kind)
            done = 0
        if kind in self._stale:
            await self._load(kind, now)
        return done

    async def _check(self, now: float) -> None:
        client = self._client
        reload = not self._claimed
        await client.claim(self.instance)
        server = await client.server()
        reload, self._server = reload or server != self._server, server
        if self._compare_all:
            self._known.clear()
            self._compare_all = False
        for kind in sorted({*self._kinds, *self._known, *await client.kinds()}):
            known = self._known.get(kind)
            if known is not None and not reload:
                index_id, writes = await client.index_version(kind)
                if index_id == known.index_id and writes >= known.writes:
                    continue
            await self._load(kind, now)
        self._claimed = True

    # -- comparing -------------------------------------------------------------------------

    async def _load(self, kind: str, now: float) -> None:
        """Read what Redis has of a kind; every difference becomes pending."""
        index = await self._client.load(kind, self.instance)
        before = self._known.get(kind)
        if before is None:
            await self._compare_with_store(kind, index, now)
        else:
            if index.index_id != before.index_id:
                self._exclusive = False  # a rebuild may have replaced it, and write too
            for target in before.documents.keys() | index.documents.keys():
                ours = before.documents.get(target, NO_ENTRY)
                if ours != index.documents.get(target, NO_ENTRY):
                    self.touch(target, now)
            for target in before.logs.keys() | index.logs.keys():
                if before.logs.get(target) != index.logs.get(target):
                    self._logs.pending.add(target, now)
        self._known[kind] = index
        self._stale.discard(kind)
        for target in [target for target in self._erased if target[0] == kind]:
            self._erased.remove(target)
            self._touch_erased(target, index, now)
        if index.deleted:
            await self._client.forget(kind, index.deleted)

    async def _compare_with_store(self, kind: str, index: KindIndex, now: float) -> None:
        missing = {target for target, entry in index.documents.items() if entry.revision}
        if missing:
            async for document in self._store.scan(kind):
                target = (kind, document.key)
                missing.discard(target)
                if index.documents.get(target, NO_ENTRY).version != version_of(document):
                    self.touch(target, now)
        else:
            for key in await self._store.keys(kind):
                self.touch((kind, key), now)
        for target in missing:
            self.touch(target, now)
        await self._logs.compare(kind, index, now)

    # -- documents -------------------------------------------------------------------------

    async def _send(self, kind: str, most: int) -> int:
        """Send some documents; returns how many were looked at."""
        taken = self._documents.take(kind, most)
        try:
            writes, postponed = await self._read(self._known[kind], taken)
            await self._write(kind, writes, taken)
            self._documents.add_again(postponed)
        except BaseException:
            self._documents.add_again(taken)
            raise
        finally:
            self._documents.done(taken)
        return len(taken) - len(postponed)

    async def _send_by_scan(self, kind: str) -> int:
        """Send everything pending of a kind from one scan of it; returns how many were found."""
        # Taken before the scan: a change from here on makes its document pending again.
        taken = self._documents.take(kind, self._documents.count(kind))
        known, before = self._known[kind], len(taken)
        batch: dict[DocumentId, float] = {}
        writes: list[MirrorWrite] = []
        size = 0
        try:
            async with aclosing(_closable(self._store.scan(kind))) as documents:
                async for document in documents:
                    target = (kind, document.key)
                    if target not in taken:
                        continue
                    batch[target] = taken.pop(target)
                    write = self._compared(known, target, document)
                    if write is not None:
                        writes.append(write)
                        size += len(document.body)
                    if len(writes) == BATCH_DOCUMENTS or size > _BATCH_BYTES:
                        await self._write(kind, writes, batch)
                        self._documents.done(batch)
                        writes, batch, size = [], {}, 0
            await self._write(kind, writes, batch)
        except BaseException:
            self._documents.add_again(batch)
            raise
        finally:
            self._documents.add_again(taken)  # those that are deleted, or cannot be read
            self._documents.done([*batch, *taken])
        return before - len(taken)

    async def _read(
        self, known: KindIndex, taken: Mapping[DocumentId, float]
    ) -> tuple[list[MirrorWrite], dict[DocumentId, float]]:
        """The versions that Redis does not have, and the documents that exceed the batch."""
        found = await asyncio.gather(*map(self._newest, taken))
        writes: list[MirrorWrite] = []
        postponed: dict[DocumentId, float] = {}
        size = 0
        for target, document in zip(taken, found, strict=True):
            if isinstance(document, AgentStateError):
                self._note_unreadable(target, document, taken[target])
                continue
            had = known.documents.get(target, NO_ENTRY).revision
            if document is None and had and self._deletions.is_damaged(target):
                self.unreadable[target] = "quarantined here"
                continue
            write = self._compared(known, target, document)
            if write is None:
                self._deletions.discard(target)
                continue
            size += len(document.body) if document is not None else 0
            if writes and size > _BATCH_BYTES:
                postponed[target] = taken[target]
            else:
                writes.append(write)
        return writes, postponed

    async def _newest(self, target: DocumentId) -> Document | AgentStateError | None:
        try:
            return await self._store.get(*target)
        except AgentStateError as error:
            return error

    def _compared(
        self, known: KindIndex, target: DocumentId, document: Document | None
    ) -> MirrorWrite | None:
        """The write that brings a readable document up to date; None if Redis has this version."""
        self._refused.pop(target, None)
        self.unreadable.pop(target, None)
        expected = known.documents.get(target, NO_ENTRY)
        needed = target in self._unconfirmed or target in self._changed_here
        if expected.version == version_of(document) and not needed:
            return None
        return MirrorWrite(target, document, expected)

    def _note_unreadable(self, target: DocumentId, error: AgentStateError, since: float) -> None:
        if isinstance(error, StateCorruptedError):
            self.unreadable[target] = error.message
            return
        self._refused[target] = error.message
        self._documents.add_again({target: since})  # it is read again

    async def _write(
        self, kind: str, writes: Sequence[MirrorWrite], taken: Mapping[DocumentId, float]
    ) -> None:
        if not writes:
            return
        targets = {write.target for write in writes}
        fresh = targets - self._unconfirmed
        self._unconfirmed |= targets  # until the reply
        try:
            replies = await self._client.put(kind, self._known[kind].index_id, writes)
        except IndexReplacedError:
            self._unconfirmed -= fresh
            raise
        self._unconfirmed -= targets
        self._learn(kind, writes, replies, taken)

    def _learn(
        self,
        kind: str,
        writes: Sequence[MirrorWrite],
        replies: Sequence[str],
        taken: Mapping[DocumentId, float],
    ) -> None:
        known = self._known[kind]
        highest, failed = known.writes, ""
        for (target, document, expected), reply in zip(writes, replies, strict=True):
            word, _, rest = reply.partition(" ")
            if word == "ok":
                known.documents[target] = IndexEntry(rest, *version_of(document))
                if int(rest) <= known.writes:
                    self._stale.add(kind)  # Redis has lost writes that it had
                highest = max(highest, int(rest))
                self.sent += document is not None
                self.removed += document is None and bool(expected.revision)
                self._deletions.mark_mirrored(target)
                if target not in self._documents:
                    self._changed_here.discard(target)
            elif word == "moved":
                known.documents[target] = parse_entry(rest)
                self._documents.add_again({target: taken[target]})
            elif failure_kind(self._client.refusal(reply)) == "wrong-type":
                self._refused[target] = rest
            else:
                failed = reply
                self._documents.add_again({target: taken[target]})
        self._known[kind] = known._replace(writes=highest)
        if failed:
            raise self._client.refusal(failed)


class Deletions:
    """Tells documents that were deleted from those that were quarantined because of damage."""

    def __init__(self, store: StateStore, origin: Origin) -> None:
        self._store = store
        self._quarantined = set(origin.quarantined)
        self._deleted: set[DocumentId] = set()

    def add(self, target: DocumentId) -> None:
        """It may have been deleted."""
        self._deleted.add(target)

    def discard(self, target: DocumentId) -> None:
        """It exists again, or the mirror has the deletion."""
        self._deleted.discard(target)

    def mark_mirrored(self, target: DocumentId) -> None:
        """The mirror has its newest version, or its deletion."""
        self._deleted.discard(target)
        self._quarantined.discard(target)

    def is_damaged(self, target: DocumentId) -> bool:
        """Whether it is missing because it was quarantined, and not because it was deleted."""
        if target in self._deleted:
            return False
        return target in self._quarantined or any(
            (incident.kind, incident.key) == target and incident.kept and not incident.restored
            for incident in self._store.incidents()
        )


class LogFollower:
    """Sends logs to the mirror, record by record; a record's number shows whether it is new."""

    def __init__(self, store: StateStore, client: MirrorClient, deletions: Deletions) -> None:
        self._store = store
        self._client = client
        self._deletions = deletions
        self.pending = PendingIds()
        self.records = 0
        self.refused: dict[DocumentId, str] = {}
        self._dropped: set[DocumentId] = set()

    def changed(self, target: DocumentId, now: float) -> None:
        """Records may have been appended."""
        self.refused.pop(target, None)
        self.pending.add(target, now)

    def erased(self, kind: str, key: Key, index: KindIndex, now: float) -> None:
        """These logs may be erased, and begun again."""
        there = [target for target in index.logs if target[1][: len(key)] == key]
        for target in {*there, *self.pending.below((kind, key))}:
            self._dropped.add(target)
            self.changed(target, now)

    async def compare(self, kind: str, index: KindIndex, now: float) -> None:
        """Make those logs pending that do not end in Redis as they do here."""
        here = {(kind, key) for key in await self._store.logs(kind)}
        for target in sorted(here | index.logs.keys()):
            if target not in here or await self._last(target) != index.logs.get(target, 0):
                self.pending.add(target, now)

    async def follow(self, target: DocumentId, since: float, known: KindIndex) -> int:
        """Send the new records. Raises ``StorageError``; then the log stays pending."""
        try:
            await self._send(target, known)
        except BaseException as error:
            if isinstance(error, StorageError) and failure_kind(error) == "wrong-type":
                self.refused[target] = error.message
                return 1
            self.pending.add_again({target: since})
            raise
        finally:
            self.pending.done([target])
        return 1

    async def _send(self, target: DocumentId, known: KindIndex) -> None:
        while True:
            after = known.logs.get(target, 0)
            records = [] if target in self._dropped else await self._records(target, after)
            if not records:
                if not await self._is_gone(target, after):
                    return
                await self._client.drop_log(target, known.index_id)
                self._dropped.discard(target)
                known.logs.pop(target, None)
                continue
            actual = await self._client.append(target, known.index_id, after, records)
            if actual is None:
                known.logs[target] = records[-1].seq
                self.records += len(records)
            else:
                known.logs[target] = actual

    async def _records(self, target: DocumentId, after: int) -> list[LogRecord]:
        records, size = [], 0
        async with aclosing(_closable(self._store.read_log(*target, after=after))) as found:
            async for record in found:
                records.append(record)
                size += len(record.body)
                if len(records) == BATCH_RECORDS or size > _BATCH_BYTES:
                    break
        return records

    async def _is_gone(self, target: DocumentId, after: int) -> bool:
        """Whether the mirrored log is to be removed, because the store's was erased or deleted."""
        if target in self._dropped:
            return True
        last = await self._last(target) if after else 0
        if last >= after:
            self.refused.pop(target, None)
            return False
        kind, key = target
        if key not in await self._store.logs(kind) and not self._deletions.is_damaged(target):
            return True
        # No save shortens a log: the mirror's may be the only complete copy.
        self.refused[target] = f"ends with {last} here, and with {after} there"
        return False

    async def _last(self, target: DocumentId) -> int:
        """The number of a log's last record; 0 for an empty or missing log."""
        last = 0
        async for record in self._store.read_log(*target, last=1):
            last = record.seq
        return last


async def _closable(items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The same items from a generator, which can be closed early."""
    async for item in items:
        yield item
