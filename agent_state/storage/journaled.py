"""The exclusive store: journal first, files just after.

One process owns the directory. Saves of all its tasks are collected and committed together
(one write, one fdatasync), then everyone is told; the JSON files follow within about 50 ms.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from agent_state.clock import Clock
from agent_state.errors import (
    AgentStateError,
    Key,
    RevisionConflictError,
    StateCorruptedError,
    StorageError,
)
from agent_state.protocols import Append, Change, Document, LogRecord, Notice
from agent_state.storage import erasing, finding, intents, journal, locks, paths
from agent_state.storage.checkpointing import Checkpoints
from agent_state.storage.executor import shielded
from agent_state.storage.files import LOCK_SECONDS, FileStateStore
from agent_state.storage.finding import Found
from agent_state.storage.group_commit import GroupCommit
from agent_state.storage.journal import Journal
from agent_state.storage.names import is_forbidden
from agent_state.storage.planning import notice_of, plan
from agent_state.storage.records import Done, PutDone, encode_changes
from agent_state.storage.settling import Accept, Place, Settler, recover
from agent_state.storage.versions import Versions, lay_over

_SCAN_BATCH = 256


class WALStateStore(FileStateStore):
    """Documents and logs of which this process is the only writer.

    Takes what ``FileStateStore`` takes. ``accept`` raises an ``AgentStateError`` for a document
    that a person wrote and that must not be used. Raises ``StateDirectoryInUseError`` at ``open``
    while another process owns the directory or writes to it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        durability: str = "fsync",
        clock: Clock | None = None,
        lock_timeout_seconds: float = LOCK_SECONDS,
        accept: Accept | None = None,
        segment_bytes: int = journal.SEGMENT_BYTES,
    ) -> None:
        super().__init__(
            root, durability=durability, clock=clock, lock_timeout_seconds=lock_timeout_seconds
        )
        self._durable = durability == "fsync"
        self._directory.sync = False  # the journal makes each change durable, not the file
        self._settler = Settler(self._directory, durable=self._durable, accept=accept)
        self._segment_bytes = segment_bytes
        self._commits: GroupCommit | None = None
        self._versions = Versions()
        self._checkpoints: Checkpoints | None = None
        self._learning: dict[Place, asyncio.Future[None]] = {}

    # -- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        if self._pool is None:
            self._versions = Versions()  # while it was closed, anybody could write
            await super().open()
            self._commits = GroupCommit(
                Journal(self._settler.journal, sync=self._durable),
                durable=self._became_durable,
                failed=self._versions.failed,
                vouched=self._versions.vouched,
            )
            self._checkpoints = Checkpoints(
                self._settler,
                self._versions,
                self._commits,
                self._running().run,
                segment_bytes=self._segment_bytes,
                edited=self._tell_of_edit,
            )
            self._checkpoints.start()

    async def close(self) -> None:
        commits, self._commits = self._commits, None
        if commits is not None:
            await shielded(self._end_journal(commits))

    async def _end_journal(self, commits: GroupCommit) -> None:
        checkpoints = self._writing()
        try:
            await checkpoints.stop()
        finally:
            try:
                await commits.close()
                async with checkpoints.lock:
                    listing = partial(journal.segments, self._settler.journal)
                    await checkpoints.checkpoint(await self._running().run(listing))
            finally:
                await self._end()

    def _writing(self) -> Checkpoints:
        if self._checkpoints is None:
            raise AgentStateError("the store is not open", path=self.root)
        return self._checkpoints

    def _open(self) -> None:
        self._directory.prepare()
        self._membership = locks.own_directory(self._locks)
        try:
            recover(self._directory, self._settler)
            self._directory.remove_temporaries()
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        self._settler.unsynced.close()
        if self._membership is not None:
            self._membership.release()
            self._membership = None

    # -- reading -------------------------------------------------------------------------

    async def get(self, kind: str, key: Key) -> Document | None:
        place = (kind, key)
        change = self._versions.unsettled.get(place)
        if change is None:
            paths.relative(kind, key, paths.DOCUMENT)
            found = (await self._look([place]))[place]
            if isinstance(found, StateCorruptedError):
                raise found
            change = self._versions.unsettled.get(place) or found
        return change.document if isinstance(change, PutDone) else None

    async def _look(self, places: Sequence[Place]) -> dict[Place, Found]:
        """What the files of these places hold; a damaged one is put aside and mended."""
        with self._versions.pinned(places):
            before = {place: self._versions.clean(place) for place in places}
            read = await self._running().run(partial(finding.read, self._directory, places))
            seen: dict[Place, Found] = {}
            for place, stored in read.items():
                if isinstance(stored, StateCorruptedError):
                    seen[place] = await self._mend(place, stored)
                    continue
                version = stored and PutDone(stored.document, stored.meta)
                seen[place] = version
                news = self._versions.learn(place, version, before[place])
                if news and stored is not None:
                    self._directory.note_seen(self._directory.path(*place), stored.stamp)
        return seen

    async def _look_at_all(self, places: Sequence[Place]) -> dict[Place, Found]:
        """``_look``, leaving out what we may not read."""
        try:
            return await self._look(places)
        except StorageError as error:
            if not is_forbidden(error):
                raise
        seen: dict[Place, Found] = {}
        for place in places:
            try:
                seen.update(await self._look([place]))
            except StorageError as error:
                if not is_forbidden(error):
                    raise
                self._directory.report_forbidden(*place, error)
                seen[place] = None
        return seen

    async def _mend(self, place: Place, found: StateCorruptedError) -> Found:
        """Put a damaged file aside and write the last good version, while nothing is settled."""
        async with self._writing().lock:
            if place in self._versions.unsettled:
                return self._versions.current(*place)  # the settler will find the damage itself
            good = self._versions.clean(place)
            mended = await self._running().run(
                partial(finding.mend, self._directory, place, good, found)
            )
            if not isinstance(mended, StateCorruptedError):
                self._versions.keep(place, mended)
            else:
                self._versions.keep(place, None)
            return mended

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        # Once before and once after: what is settled meanwhile may be in neither listing.
        waiting = dict(self._versions.unsettled)
        found = set(await super().keys(kind, prefix))
        lay_over(found, waiting, kind, prefix)
        lay_over(found, self._versions.unsettled, kind, prefix)
        return sorted(found)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        waiting = self._versions.logs(kind, prefix)
        found = await super().logs(kind, prefix)
        return sorted({*found, *waiting, *self._versions.logs(kind, prefix)})

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        unsettled = self._versions.unsettled
        keys = await self.keys(kind, prefix)
        for start in range(0, len(keys), _SCAN_BATCH):
            places = [(kind, key) for key in keys[start : start + _SCAN_BATCH]]
            found: dict[Place, Done | StateCorruptedError | None] = {
                place: unsettled[place] for place in places if place in unsettled
            }
            filed = [place for place in places if place not in found]
            found.update(await self._look_at_all(filed))
            for place in places:
                change = unsettled.get(place) or found[place]
                if isinstance(change, PutDone):
                    yield change.document

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        waiting = list(self._versions.records.get((kind, key), ()))
        if last is not None and waiting:
            after = max(after, waiting[-1].seq - last)
            last = None
        async for record in super().read_log(kind, key, after=after, last=last):
            after = record.seq
            yield record
        for record in waiting:
            if record.seq > after:
                yield record

    # -- writing: to the journal -----------------------------------------------------------

    async def _commit(self, changes: Sequence[Change]) -> list[int]:
        if self._gates and self._closed_to_me(changes):
            names = [intents.lock_name(change.kind, change.key) for change in changes]
            async with self._gates.hold(names):
                return await self._commit_now(changes)
        return await self._commit_now(changes)

    def _closed_to_me(self, changes: Sequence[Change]) -> bool:
        """Whether another task holds a lock of what is to be changed."""
        names = (intents.lock_name(change.kind, change.key) for change in changes)
        return any(self._gates.held_by_other(name) for name in names)

    async def _commit_now(self, changes: Sequence[Change]) -> list[int]:
        versions = self._versions
        while True:
            if not all(map(versions.knows, changes)):
                await self._know(changes)
            commits = self._commits
            if commits is None:
                raise AgentStateError("the store is not open", path=self.root)
            if self._gates and self._closed_to_me(changes):  # since we began
                return await self._commit(changes)
            # Since they were known nothing has awaited, and until the queue nothing does: what is
            # planned on is what is committed on.
            try:
                numbers, done = plan(changes, versions, self._now())
            except RevisionConflictError as conflict:
                if (conflict.kind, conflict.key) in versions.pending:
                    # Readers see it only then; a caller that tries again at once would starve it.
                    await commits.submit(b"", ())
                raise
            if not versions.unsure(changes, done):
                break
            with versions.pinned([(change.kind, change.key) for change in changes]):
                async with self._writing().lock:
                    if unsure := versions.unsure(changes, done):  # and nobody has come before us
                        await self._running().run(partial(self._directory.confirm_all, unsure))
                        versions.made_sure(unsure)
        if done:
            record = encode_changes(done)
            versions.expect(done)
            await commits.submit(record, done)
        elif any((change.kind, change.key) in versions.pending for change in changes):
            await commits.submit(b"", ())  # unchanged, but not durable yet
        return numbers

    async def _know(self, changes: Sequence[Change]) -> None:
        """See to it that the changes can be planned, until the next await."""
        with self._versions.pinned([(change.kind, change.key) for change in changes]):
            while unknown := [each for each in changes if not self._versions.knows(each)]:
                await self._learn(unknown)

    async def _learn(self, changes: Sequence[Change]) -> None:
        """Read what the plan needs to know and memory does not hold.

        One reader a place: those who come meanwhile wait, and go on in the order they came.
        """
        places = sorted({(change.kind, change.key) for change in changes})
        if others := [self._learning[place] for place in places if place in self._learning]:
            await asyncio.wait(others)
            return
        learned = asyncio.get_running_loop().create_future()
        self._learning.update(dict.fromkeys(places, learned))
        try:
            documents = {(c.kind, c.key) for c in changes if not isinstance(c, Append)}
            if documents:
                await self._look(sorted(documents))
            appends = [change for change in changes if isinstance(change, Append)]
            if appends:
                ends, ids = await self._running().run(
                    partial(finding.ends, self._directory, appends)
                )
                for place, end in ends.items():
                    self._versions.learn_log(place, end, ids.get(place))
        finally:
            for place in places:
                del self._learning[place]
            learned.set_result(None)

    def _became_durable(self, done: Sequence[Done]) -> None:
        self._versions.became_durable(done)
        if self._watching.has_listeners:
            for change in done:
                self._watching.tell(notice_of(change))
        self._writing().stir()

    # -- the files: they follow the journal ------------------------------------------------

    async def flush(self) -> None:
        checkpoints = self._checkpoints
        if checkpoints is not None:
            async with checkpoints.lock:
                if self._commits is not None:
                    await checkpoints.checkpoint()

    def _tell_of_edit(self, document: Document) -> None:
        self._watching.tell(Notice(document.kind, document.key, document.revision, outside=True))

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        self._running()
        async with self._gates.hold([intents.lock_name(kind, key)]):
            yield

    async def _erase(self, kind: str, key: Key, name: str) -> tuple[list[Key], int]:
        """Once everything is settled, so that no journal has it any more."""
        commits = self._commits
        if commits is None:
            raise AgentStateError("the store is not open", path=self.root)
        await commits.submit(b"", ())
        async with self._writing().lock:
            await self._writing().checkpoint()
            known = self._versions.below(kind, key)
            erased = await self._running().run(
                partial(erasing.erase, self._directory, kind, key, durable=self._durable)
            )
            self._versions.erased([*known, *((kind, gone) for gone in erased[0])])
        return erased

    async def _quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        place = (kind, key)
        async with self._gates.hold([intents.lock_name(kind, key)]):
            async with self._writing().lock:
                if place not in self._versions.unsettled and place not in self._versions.pending:
                    contain = partial(self._directory.contain, kind, key, reason)
                    stored = await self._running().run(contain)
                    self._versions.keep(place, stored and PutDone(stored.document, stored.meta))
                    return stored.document if stored else None
            return await self.get(kind, key)
