"""Brings a store's newest versions to the mirror, each over what it was compared with.

The order of versions is nobody's to say: a document deleted and made anew may count from 1 again,
and clocks go back. So each write names the last write of that document that it has seen (a number
that is never given twice), and has read the store after seeing it. If that is still the last one
in Redis, what is written is as new as what is there, or newer; if not, nothing is written, and the
store is read again. A write that timed out and comes late finds another number and does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from agent_state.errors import AgentStateError, StateCorruptedError
from agent_state.protocols import (
    Append,
    Change,
    Delete,
    Document,
    Origin,
    StateStore,
)
from agent_state.redis.mirror_layout import (
    NOTHING,
    STATUS,
    Entry,
    Index,
    Place,
    entry_of,
    say,
    version_of,
)
from agent_state.redis.mirror_logs import BATCH_BYTES, LogFollower, each
from agent_state.redis.mirror_side import MarkChangedError, MirrorSide, Version
from agent_state.redis.mirror_trouble import ScriptError, is_not_ours
from agent_state.redis.mirror_waiting import Waiting

BATCH = 64
MANY = 512
"""From so many on, and a quarter of a kind, it is cheaper to read the whole kind in one go."""


@dataclass(slots=True)
class Notes:
    """What is not as it should be, by place, for people."""

    refused: dict[Place, str] = field(default_factory=dict)
    kept: dict[Place, str] = field(default_factory=dict)

    def settle(self, place: Place) -> None:
        self.refused.pop(place, None)
        self.kept.pop(place, None)


class Follower:
    """Knows what waits, and what Redis has. Only the event loop's thread touches it."""

    def __init__(self, store: StateStore, side: MirrorSide, instance: str, origin: Origin) -> None:
        self._store = store
        self._side = side
        self.instance = instance
        self._quarantined = set(origin.quarantined)
        self._kinds = set(origin.kinds)
        self.documents = Waiting()
        self._logs = LogFollower(store, side, self._is_damaged)
        self._sent = self._removed = 0
        self.notes = Notes()
        self._known: dict[str, Index] = {}
        self._deleted: set[Place] = set()
        self._erased: list[Place] = []
        self._doubtful: set[Place] = set()
        self._stale: set[str] = set()
        self._claimed = False
        self._server = ""

    @property
    def waiting(self) -> int:
        """How many documents and logs are not there yet."""
        return len(self.documents) + len(self._logs.waiting)

    def oldest(self) -> float | None:
        """Since when something has waited; None when nothing waits."""
        both = (self.documents.oldest(), self._logs.waiting.oldest())
        return min((since for since in both if since is not None), default=None)

    def counted(self) -> dict[str, Any]:
        """What was brought over since the mirror was opened."""
        return {"sent": self._sent, "removed": self._removed, "records": self._logs.records}

    def refused(self) -> tuple[str, ...]:
        """What cannot be mirrored as it is, and why."""
        documents = [f"{say(place)}: {why}" for place, why in self.notes.refused.items()]
        logs = [f"{say(place, log=True)}: {why}" for place, why in self._logs.refused.items()]
        return (*documents, *logs)

    # -- what there is to do ---------------------------------------------------------------

    def changed(self, changes: Iterable[Change], now: float) -> None:
        """These may have been made."""
        for change in changes:
            place = (change.kind, change.key)
            if isinstance(change, Append):
                self._logs.changed(place, now)
                continue
            if isinstance(change, Delete):
                self._deleted.add(place)
            elif self._deleted:
                self._deleted.discard(place)
            self.touch(place, now)

    def touch(self, place: Place, now: float) -> None:
        """This document may not be what it was."""
        if place != STATUS:
            self.notes.refused.pop(place, None)
            self.documents.add(place, now)

    def erased(self, place: Place, now: float) -> None:
        """This document and log may be gone, with all below them, and must not stay there."""
        kind, key = place
        index = self._known.get(kind)
        if index is None:
            self._erased.append(place)  # seen to as soon as it is known what is there
            return
        for one in [one for one in index.documents if one[1][: len(key)] == key]:
            self._deleted.add(one)
            self.touch(one, now)
        self._logs.erased(kind, key, index, now)

    def lost_touch(self) -> None:
        """Nobody knows what Redis has done, or who answers next."""
        self._claimed = False

    # -- doing it --------------------------------------------------------------------------

    async def turn(self, now: float, *, check: bool) -> None:
        """Bring over what waits now; with ``check`` see first whether Redis is what it was.

        Raises redis-py's errors, ``AnotherInstanceError``, and what the store raises; what was
        not brought over waits on.
        """
        if check or not self._claimed:
            await self._check(now)
        for kind in dict.fromkeys([*self.documents.kinds(), *self._logs.waiting.kinds()]):
            if kind not in self._known:
                await self._load(kind, now)
        for kind in self.documents.kinds():
            left = self.documents.count(kind)  # those who come meanwhile have the next turn
            if left >= max(MANY, len(self._known[kind].documents) // 4):
                left -= await self._guarded(kind, self._send_all(kind), now)
            while left > 0:
                left -= await self._guarded(kind, self._send(kind, min(left, BATCH)), now)
        logs = self._logs.waiting
        for kind in logs.kinds():
            for _ in range(logs.count(kind)):
                for place, since in logs.take(kind, 1).items():
                    work = self._logs.follow(place, since, self._known[kind])
                    await self._guarded(kind, work, now)

    async def _guarded(self, kind: str, work: Coroutine[None, None, int], now: float) -> int:
        try:
            done = await work
        except MarkChangedError:
            self._stale.add(kind)
            done = 0
        if kind in self._stale:
            await self._load(kind, now)
        return done

    async def _check(self, now: float) -> None:
        side = self._side
        again = not self._claimed
        await side.claim(self.instance)
        server = await side.server()
        again, self._server = again or server != self._server, server
        for kind in sorted({*self._kinds, *self._known, *await side.kinds()}):
            known = self._known.get(kind)
            if known is not None and not again:
                mark, writes = await side.glance(kind)
                if mark == known.mark and writes >= known.writes:
                    continue
            await self._load(kind, now)
        self._claimed = True

    # -- comparing -------------------------------------------------------------------------

    async def _load(self, kind: str, now: float) -> None:
        """Read what Redis has of a kind; what is not as it should be waits from now on."""
        index = await self._side.load(kind, self.instance)
        before = self._known.get(kind)
        if before is None:
            await self._compare_with_store(kind, index, now)
        else:
            for place in before.documents.keys() | index.documents.keys():
                ours = before.documents.get(place, NOTHING)
                if ours != index.documents.get(place, NOTHING):
                    self.touch(place, now)
            for place in before.logs.keys() | index.logs.keys():
                if before.logs.get(place) != index.logs.get(place):
                    self._logs.waiting.add(place, now)
        self._known[kind] = index
        self._stale.discard(kind)
        for place in [place for place in self._erased if place[0] == kind]:
            self._erased.remove(place)
            self.erased(place, now)
        if index.gone:
            await self._side.forget(kind, index.gone)

    async def _compare_with_store(self, kind: str, index: Index, now: float) -> None:
        missing = {place for place, entry in index.documents.items() if entry.revision}
        if missing:
            async for document in self._store.scan(kind):
                place = (kind, document.key)
                missing.discard(place)
                if index.documents.get(place, NOTHING).version != version_of(document):
                    self.touch(place, now)
        else:
            for key in await self._store.keys(kind):
                self.touch((kind, key), now)
        for place in missing:
            self.touch(place, now)
        await self._logs.compare(kind, index, now)

    # -- documents -------------------------------------------------------------------------

    async def _send(self, kind: str, most: int) -> int:
        """Bring some documents over; how many were looked at."""
        taken = self.documents.take(kind, most)
        try:
            versions, kept_back = await self._read(self._known[kind], taken)
            await self._deliver(kind, versions, taken)
            self.documents.put_back(kept_back)
        except BaseException:
            self.documents.put_back(taken)
            raise
        finally:
            self.documents.done(taken)
        return len(taken) - len(kept_back)

    async def _send_all(self, kind: str) -> int:
        """Bring everything that waits over, from one reading of the kind; how many were."""
        # Taken before anything is read: what changes from here on waits again.
        taken = self.documents.take(kind, self.documents.count(kind))
        known, before = self._known[kind], len(taken)
        batch: dict[Place, float] = {}
        versions: list[Version] = []
        size = 0
        try:
            async with aclosing(each(self._store.scan(kind))) as documents:
                async for document in documents:
                    place = (kind, document.key)
                    if place not in taken:
                        continue
                    batch[place] = taken.pop(place)
                    self.notes.settle(place)
                    over = known.documents.get(place, NOTHING)
                    if over.version != version_of(document) or place in self._doubtful:
                        versions.append(Version(place, document, over))
                        size += len(document.body)
                    if len(versions) == BATCH or size > BATCH_BYTES:
                        await self._deliver(kind, versions, batch)
                        self.documents.done(batch)
                        versions, batch, size = [], {}, 0
            await self._deliver(kind, versions, batch)
        except BaseException:
            self.documents.put_back(batch)
            raise
        finally:
            self.documents.put_back(taken)  # those that are gone, or cannot be read
            self.documents.done([*batch, *taken])
        return before - len(taken)

    async def _deliver(
        self, kind: str, versions: Sequence[Version], taken: Mapping[Place, float]
    ) -> None:
        if versions:
            replies = await self._put(self._known[kind].mark, versions)
            self._learn(kind, versions, replies, taken)

    async def _put(self, mark: str, versions: Sequence[Version]) -> list[str]:
        places = {version.place for version in versions}
        fresh = places - self._doubtful
        self._doubtful |= places  # until there is an answer
        try:
            replies = await self._side.put(versions[0].place[0], mark, versions)
        except MarkChangedError:
            self._doubtful -= fresh
            raise
        self._doubtful -= places
        return replies

    async def _read(
        self, known: Index, taken: Mapping[Place, float]
    ) -> tuple[list[Version], dict[Place, float]]:
        """The newest versions that Redis does not have, and what is too much for one batch."""
        found = await asyncio.gather(*map(self._newest, taken))
        versions: list[Version] = []
        kept_back: dict[Place, float] = {}
        size = 0
        for place, document in zip(taken, found, strict=True):
            if isinstance(document, AgentStateError):
                self._leave(place, document, taken[place])
                continue
            over = known.documents.get(place, NOTHING)
            if document is None and over.revision and self._is_damaged(place):
                self.notes.kept[place] = "put aside here"
                continue
            self.notes.settle(place)
            if over.version == version_of(document) and place not in self._doubtful:
                self._deleted.discard(place)
                continue
            size += len(document.body) if document is not None else 0
            if versions and size > BATCH_BYTES:
                kept_back[place] = taken[place]
            else:
                versions.append(Version(place, document, over))
        return versions, kept_back

    async def _newest(self, place: Place) -> Document | AgentStateError | None:
        try:
            return await self._store.get(*place)
        except AgentStateError as error:
            return error

    def _leave(self, place: Place, error: AgentStateError, since: float) -> None:
        if isinstance(error, StateCorruptedError):
            self.notes.kept[place] = error.message
            return
        self.notes.refused[place] = error.message  # it could not be read, and will be again
        self.documents.put_back({place: since})

    def _is_damaged(self, place: Place) -> bool:
        """Whether it is gone because it was damaged, and not because it was deleted."""
        if place in self._deleted:
            return False
        return place in self._quarantined or any(
            (incident.kind, incident.key) == place and incident.kept and not incident.restored
            for incident in self._store.incidents()
        )

    def _learn(
        self,
        kind: str,
        versions: Sequence[Version],
        replies: Sequence[str],
        taken: Mapping[Place, float],
    ) -> None:
        known = self._known[kind]
        writes, failed = known.writes, ""
        for (place, document, _), reply in zip(versions, replies, strict=True):
            word, _, rest = reply.partition(" ")
            if word == "ok":
                known.documents[place] = Entry(rest, *version_of(document))
                if int(rest) <= known.writes:
                    self._stale.add(kind)  # Redis has forgotten writes that it had
                writes = max(writes, int(rest))
                self._sent += document is not None
                self._removed += document is None
                self._deleted.discard(place)
                self._quarantined.discard(place)
            elif word == "moved":
                known.documents[place] = entry_of(rest)
                self.documents.put_back({place: taken[place]})
            elif is_not_ours(rest):
                self.notes.refused[place] = rest
            else:
                failed = rest
                self.documents.put_back({place: taken[place]})
        self._known[kind] = known._replace(writes=writes)
        if failed:
            raise ScriptError(failed)
