"""The newest version of every document and log, and how far each has come.

A version is, one after the other: pending (on its way to the journal), unsettled (durable, its
file not yet written), clean (as its file is). Only the event loop's thread touches any of this.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from agent_state.errors import Key
from agent_state.protocols import Append, Change, DocumentId, LogRecord
from agent_state.storage import paths
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    encode_changes,
    id_of,
)

CLEAN_BYTES = 64 * 1024 * 1024
CLEAN_MAX = 200_000


class _Unknown:
    """Nobody has verified_dirs at this place."""


UNKNOWN = _Unknown()


class MemTable:
    """What a commit is planned on (a ``planning.Base``), and what readers see before the files."""

    def __init__(self) -> None:
        self.in_flight: dict[DocumentId, ResolvedPut | ResolvedDelete] = {}
        self.dirty: dict[DocumentId, ResolvedPut | ResolvedDelete] = {}
        self.records: dict[DocumentId, list[LogRecord]] = {}
        self._clean: OrderedDict[DocumentId, ResolvedPut | None] = OrderedDict()
        self._clean_bytes = 0
        self._pinned: Counter[DocumentId] = Counter()
        self._ends: dict[DocumentId, int] = {}
        self._ids: dict[DocumentId, dict[str, int]] = {}
        self._floors: dict[DocumentId, int] = {}
        self._unsure: set[tuple[DocumentId, str]] = set()

    # -- what a commit is planned on -------------------------------------------------------

    def knows(self, change: Change) -> bool:
        """Whether the change can be planned without looking at the disk."""
        place = (change.kind, change.key)
        if isinstance(change, Append):
            return place in self._ends and (change.dedupe_key is None or place in self._ids)
        return place in self.dirty or place in self._clean or place in self.in_flight

    def current(self, kind: str, key: Key) -> ResolvedPut | None:
        place = (kind, key)
        change = self.in_flight.get(place) or self.dirty.get(place) or self._clean.get(place)
        return change if isinstance(change, ResolvedPut) else None

    def floor(self, kind: str, key: Key) -> int:
        place = (kind, key)
        gone = self.in_flight.get(place) or self.dirty.get(place)
        # As long as its file may be there, a deleted document is not begun anew: an edit of
        # what was deleted would look newer than what has come after.
        removed = gone.revision if isinstance(gone, ResolvedDelete) else 0
        return max(removed, self._floors.get(place, 0))

    def last_seq(self, kind: str, key: Key) -> int:
        return self._ends[kind, key]

    def find(self, kind: str, key: Key, dedupe_key: str) -> int | None:
        return self._ids[kind, key].get(dedupe_key)

    # -- what the disk says ----------------------------------------------------------------

    @contextmanager
    def pinned(self, places: Sequence[DocumentId]) -> Iterator[None]:
        """Meanwhile what is known of these places is not forgotten for want of room."""
        self._pinned.update(places)
        try:
            yield
        finally:
            self._pinned.subtract(places)
            for place in places:
                if not self._pinned[place]:
                    del self._pinned[place]

    def clean(self, place: DocumentId) -> ResolvedPut | _Unknown | None:
        """The version that the file holds, as far as is known."""
        return self._clean.get(place, UNKNOWN)

    def learn(
        self, place: DocumentId, found: ResolvedPut | None, before: ResolvedPut | _Unknown | None
    ) -> bool:
        """Take what a pinned file was found to hold; ``before`` is what was ``clean`` until then.

        False when a save has come between, so that what was found is no news.
        """
        if place in self.in_flight or place in self.dirty or self.clean(place) is not before:
            return False
        known = before.document if isinstance(before, ResolvedPut) else before
        if known != (found and found.document):
            self.keep(place, found)
            self._unsure.add((place, paths.DOCUMENT))
        return True

    def learn_log(self, place: DocumentId, end: int, ids: dict[str, int] | None) -> None:
        """Take what a log was found to hold, unless it is known already."""
        if ids is not None or place not in self._ends:
            self._unsure.add((place, paths.LOG))
        self._ends.setdefault(place, end)
        if ids is not None and place not in self._ids:
            waiting = self.records.get(place, ())
            ids.update((r.dedupe_key, r.seq) for r in waiting if r.dedupe_key is not None)
            self._ids[place] = ids

    def keep(self, place: DocumentId, version: ResolvedPut | None) -> None:
        """From now on this version is the one that the file holds."""
        self._drop(place)
        self._clean[place] = version
        if version is not None:
            self._clean_bytes += len(version.document.body)
        if self._clean_bytes > CLEAN_BYTES or len(self._clean) > CLEAN_MAX:
            self._make_room()

    def maybe_unsynced(
        self, changes: Sequence[Change], done: Sequence[ResolvedChange]
    ) -> set[tuple[DocumentId, str]]:
        """Whether a change need not be done as somebody else did it, perhaps not durably.

        Then everything of which that may be so, each with the ending of its file's name.
        """
        if len(done) == len(changes) or not self._unsure:
            return set()
        to_do = {id_of(change) for change in done}
        for change in changes:
            place = (change.kind, change.key)
            ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
            if place not in to_do and (place, ending) in self._unsure:
                return set(self._unsure)
        return set()

    def below(self, kind: str, key: Key) -> list[DocumentId]:
        """The places under a key, and the key's own, of which anything is known."""
        known = {*self._clean, *self._ends, *self._floors}
        return [place for place in known if place[0] == kind and place[1][: len(key)] == key]

    def erased(self, places: Iterable[DocumentId]) -> None:
        """Nothing is there any more, and nothing of it is remembered."""
        for place in places:
            self.keep(place, None)
            self._floors.pop(place, None)
            self._ends.pop(place, None)
            self._ids.pop(place, None)
            self._unsure.discard((place, paths.LOG))

    def mark_synced(self, confirmed: Iterable[tuple[DocumentId, str]]) -> None:
        """What was found there is durable now."""
        self._unsure.difference_update(confirmed)

    def _make_room(self) -> None:
        for place in list(self._clean):
            if self._clean_bytes <= CLEAN_BYTES and len(self._clean) <= CLEAN_MAX:
                return
            if place not in self._pinned:
                self._drop(place)

    def _drop(self, place: DocumentId) -> None:
        self._unsure.discard((place, paths.DOCUMENT))
        dropped = self._clean.pop(place, None)
        if dropped is not None:
            self._clean_bytes -= len(dropped.document.body)

    # -- a version's way -------------------------------------------------------------------

    def expect(self, done: Iterable[ResolvedChange]) -> None:
        """These changes are on their way to the journal."""
        for change in done:
            place = id_of(change)
            if not isinstance(change, ResolvedAppend):
                self.in_flight[place] = change
                continue
            self._ends[place] = change.record.seq
            if change.record.dedupe_key is not None:
                self._ids[place][change.record.dedupe_key] = change.record.seq

    def became_durable(self, done: Iterable[ResolvedChange]) -> None:
        for change in done:
            place = id_of(change)
            if isinstance(change, ResolvedAppend):
                self.records.setdefault(place, []).append(change.record)
                continue
            if self.in_flight.get(place) is change:
                del self.in_flight[place]
            self.dirty[place] = change

    def failed(self, done: Iterable[ResolvedChange]) -> None:
        """Forget what was planned. Its numbers may be on the disk and are never given again."""
        for change in done:
            place = id_of(change)
            if isinstance(change, ResolvedPut):
                self._floors[place] = max(change.document.revision, self._floors.get(place, 0))
            elif isinstance(change, ResolvedAppend) and change.record.dedupe_key is not None:
                self._ids[place].pop(change.record.dedupe_key, None)
            self.in_flight.pop(place, None)

    def became_clean(self, change: ResolvedPut | ResolvedDelete, won: ResolvedPut | None) -> bool:
        """The change, or somebody else's that won over it, is in its file.

        False when a newer one is waiting already.
        """
        place = id_of(change)
        if self.dirty.get(place) is not change:
            return False
        del self.dirty[place]
        self.keep(place, won or (change if isinstance(change, ResolvedPut) else None))
        return True

    def settled_records(self, place: DocumentId, count: int) -> None:
        """So many of a log's waiting records are in its file."""
        waiting = self.records[place]
        del waiting[:count]
        if not waiting:
            del self.records[place]

    # -- what readers see ------------------------------------------------------------------

    def unflushed_records(self) -> list[bytes]:
        """WriteAheadLog records for everything that is durable and in no file yet."""
        changes: list[ResolvedChange] = list(self.dirty.values())
        for (kind, key), waiting in self.records.items():
            changes.extend(ResolvedAppend(kind, key, record) for record in waiting)
        return [encode_changes([change]) for change in changes]

    def logs(self, kind: str, prefix: Key) -> set[Key]:
        """The logs that have records in no file yet."""
        return {key for k, key in self.records if k == kind and paths.is_below(key, prefix)}


def lay_over(
    found: set[Key],
    changes: Mapping[DocumentId, ResolvedPut | ResolvedDelete],
    kind: str,
    prefix: Key,
) -> None:
    """Bring a listing of files up to date with changes that are in no file yet."""
    for (other, key), change in changes.items():
        if other == kind and paths.is_below(key, prefix):
            if isinstance(change, ResolvedPut):
                found.add(key)
            else:
                found.discard(key)
