"""The newest version of every document and log, and how far each has come.

A version is, one after the other: pending (on its way to the journal), unsettled (durable, its
file not yet written), clean (as its file is). Only the event loop's thread touches any of this.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from agent_state.errors import Key
from agent_state.protocols import Append, Change, LogRecord
from agent_state.storage import paths
from agent_state.storage.intents import place_of
from agent_state.storage.records import AppendDone, DeleteDone, Done, PutDone, encode_changes
from agent_state.storage.settling import Place

CLEAN_BYTES = 64 * 1024 * 1024
CLEAN_MAX = 200_000


class _Unknown:
    """Nobody has looked at this place."""


UNKNOWN = _Unknown()


class Versions:
    """What a commit is planned on (a ``planning.Base``), and what readers see before the files."""

    def __init__(self) -> None:
        self.pending: dict[Place, PutDone | DeleteDone] = {}
        self.unsettled: dict[Place, PutDone | DeleteDone] = {}
        self.records: dict[Place, list[LogRecord]] = {}
        self._clean: OrderedDict[Place, PutDone | None] = OrderedDict()
        self._clean_bytes = 0
        self._pinned: Counter[Place] = Counter()
        self._ends: dict[Place, int] = {}
        self._ids: dict[Place, dict[str, int]] = {}
        self._floors: dict[Place, int] = {}
        self._unsure: set[tuple[Place, str]] = set()

    # -- what a commit is planned on -------------------------------------------------------

    def knows(self, change: Change) -> bool:
        """Whether the change can be planned without looking at the disk."""
        place = (change.kind, change.key)
        if isinstance(change, Append):
            return place in self._ends and (change.dedupe_key is None or place in self._ids)
        return place in self.unsettled or place in self._clean or place in self.pending

    def current(self, kind: str, key: Key) -> PutDone | None:
        place = (kind, key)
        change = self.pending.get(place) or self.unsettled.get(place) or self._clean.get(place)
        return change if isinstance(change, PutDone) else None

    def floor(self, kind: str, key: Key) -> int:
        place = (kind, key)
        gone = self.pending.get(place) or self.unsettled.get(place)
        # As long as its file may be there, a deleted document is not begun anew: an edit of
        # what was deleted would look newer than what has come after.
        removed = gone.revision if isinstance(gone, DeleteDone) else 0
        return max(removed, self._floors.get(place, 0))

    def last_seq(self, kind: str, key: Key) -> int:
        return self._ends[kind, key]

    def find(self, kind: str, key: Key, dedupe_key: str) -> int | None:
        return self._ids[kind, key].get(dedupe_key)

    # -- what the disk says ----------------------------------------------------------------

    @contextmanager
    def pinned(self, places: Sequence[Place]) -> Iterator[None]:
        """Meanwhile what is known of these places is not forgotten for want of room."""
        self._pinned.update(places)
        try:
            yield
        finally:
            self._pinned.subtract(places)
            for place in places:
                if not self._pinned[place]:
                    del self._pinned[place]

    def clean(self, place: Place) -> PutDone | _Unknown | None:
        """The version that the file holds, as far as is known."""
        return self._clean.get(place, UNKNOWN)

    def learn(self, place: Place, found: PutDone | None, before: PutDone | _Unknown | None) -> bool:
        """Take what a pinned file was found to hold; ``before`` is what was ``clean`` until then.

        False when a save has come between, so that what was found is no news.
        """
        if place in self.pending or place in self.unsettled or self.clean(place) is not before:
            return False
        known = before.document if isinstance(before, PutDone) else before
        if known != (found and found.document):
            self.keep(place, found)
            self._unsure.add((place, paths.DOCUMENT))
        return True

    def learn_log(self, place: Place, end: int, ids: dict[str, int] | None) -> None:
        """Take what a log was found to hold, unless it is known already."""
        if ids is not None or place not in self._ends:
            self._unsure.add((place, paths.LOG))
        self._ends.setdefault(place, end)
        if ids is not None and place not in self._ids:
            waiting = self.records.get(place, ())
            ids.update((r.dedupe_key, r.seq) for r in waiting if r.dedupe_key is not None)
            self._ids[place] = ids

    def keep(self, place: Place, version: PutDone | None) -> None:
        """From now on this version is the one that the file holds."""
        self._drop(place)
        self._clean[place] = version
        if version is not None:
            self._clean_bytes += len(version.document.body)
        if self._clean_bytes > CLEAN_BYTES or len(self._clean) > CLEAN_MAX:
            self._make_room()

    def unsure(self, changes: Sequence[Change], done: Sequence[Done]) -> set[tuple[Place, str]]:
        """Whether a change need not be done as somebody else did it, perhaps not durably.

        Then everything of which that may be so, each with the ending of its file's name.
        """
        if len(done) == len(changes) or not self._unsure:
            return set()
        to_do = {place_of(change) for change in done}
        for change in changes:
            place = (change.kind, change.key)
            ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
            if place not in to_do and (place, ending) in self._unsure:
                return set(self._unsure)
        return set()

    def below(self, kind: str, key: Key) -> list[Place]:
        """The places under a key, and the key's own, of which anything is known."""
        known = {*self._clean, *self._ends, *self._floors}
        return [place for place in known if place[0] == kind and place[1][: len(key)] == key]

    def erased(self, places: Iterable[Place]) -> None:
        """Nothing is there any more, and nothing of it is remembered."""
        for place in places:
            self.keep(place, None)
            self._floors.pop(place, None)
            self._ends.pop(place, None)
            self._ids.pop(place, None)
            self._unsure.discard((place, paths.LOG))

    def made_sure(self, confirmed: Iterable[tuple[Place, str]]) -> None:
        """What was found there is durable now."""
        self._unsure.difference_update(confirmed)

    def _make_room(self) -> None:
        for place in list(self._clean):
            if self._clean_bytes <= CLEAN_BYTES and len(self._clean) <= CLEAN_MAX:
                return
            if place not in self._pinned:
                self._drop(place)

    def _drop(self, place: Place) -> None:
        self._unsure.discard((place, paths.DOCUMENT))
        dropped = self._clean.pop(place, None)
        if dropped is not None:
            self._clean_bytes -= len(dropped.document.body)

    # -- a version's way -------------------------------------------------------------------

    def expect(self, done: Iterable[Done]) -> None:
        """These changes are on their way to the journal."""
        for change in done:
            place = place_of(change)
            if not isinstance(change, AppendDone):
                self.pending[place] = change
                continue
            self._ends[place] = change.record.seq
            if change.record.dedupe_key is not None:
                self._ids[place][change.record.dedupe_key] = change.record.seq

    def became_durable(self, done: Iterable[Done]) -> None:
        for change in done:
            place = place_of(change)
            if isinstance(change, AppendDone):
                self.records.setdefault(place, []).append(change.record)
                continue
            if self.pending.get(place) is change:
                del self.pending[place]
            self.unsettled[place] = change

    def failed(self, done: Iterable[Done]) -> None:
        """Forget what was planned. Its numbers may be on the disk and are never given again."""
        for change in done:
            place = place_of(change)
            if isinstance(change, PutDone):
                self._floors[place] = max(change.document.revision, self._floors.get(place, 0))
            elif isinstance(change, AppendDone) and change.record.dedupe_key is not None:
                self._ids[place].pop(change.record.dedupe_key, None)
            self.pending.pop(place, None)

    def became_clean(self, change: PutDone | DeleteDone, won: PutDone | None) -> bool:
        """The change, or somebody else's that won over it, is in its file.

        False when a newer one is waiting already.
        """
        place = place_of(change)
        if self.unsettled.get(place) is not change:
            return False
        del self.unsettled[place]
        self.keep(place, won or (change if isinstance(change, PutDone) else None))
        return True

    def settled_records(self, place: Place, count: int) -> None:
        """So many of a log's waiting records are in its file."""
        waiting = self.records[place]
        del waiting[:count]
        if not waiting:
            del self.records[place]

    # -- what readers see ------------------------------------------------------------------

    def vouched(self) -> list[bytes]:
        """Journal records for everything that is durable and in no file yet."""
        changes: list[Done] = list(self.unsettled.values())
        for (kind, key), waiting in self.records.items():
            changes.extend(AppendDone(kind, key, record) for record in waiting)
        return [encode_changes([change]) for change in changes]

    def logs(self, kind: str, prefix: Key) -> set[Key]:
        """The logs that have records in no file yet."""
        return {key for k, key in self.records if k == kind and paths.is_below(key, prefix)}


def lay_over(
    found: set[Key], changes: Mapping[Place, PutDone | DeleteDone], kind: str, prefix: Key
) -> None:
    """Bring a listing of files up to date with changes that are in no file yet."""
    for (other, key), change in changes.items():
        if other == kind and paths.is_below(key, prefix):
            if isinstance(change, PutDone):
                found.add(key)
            else:
                found.discard(key)
