"""The newest version of every document and log, in memory, with the stage of each.

A version is, one after the other: in flight (on its way to the write-ahead log), dirty (durable in
the log, not in its file yet), clean (as its file is). Only the thread of the event loop uses this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from agent_state.errors import Key
from agent_state.protocols import Append, Change, Check, DocumentId
from agent_state.storage import logs, paths
from agent_state.storage.changes import (
    Overlay,
    ResolvedAppend,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    id_of,
)
from agent_state.storage.lru_cache import LRUCache

CLEAN_BYTES = 64 * 1024 * 1024
CLEAN_MAX = 200_000
_ENTRY_BYTES = 1024
"""The memory of a clean version besides its body."""
_NOTED_MIN = 10_000
_COMPLETE_MAX = 20_000
"""The most dedupe keys of one log that are kept in memory. Of a longer log each is looked up."""
_PARTIAL_MAX = 5_000
"""How many of these are kept."""

FileId = tuple[DocumentId, str]
"""A document or a log, by the ending of its file."""


class _Unknown:
    """The file has not been read."""


UNKNOWN = _Unknown()


class MemTable:
    """A ``changes.CommitView`` for commits, and what readers see before the files."""

    def __init__(self) -> None:
        self.in_flight: dict[DocumentId, ResolvedPut | ResolvedDelete] = {}
        self.dirty = Overlay()
        self._pinned: Counter[DocumentId] = Counter()
        self._clean: LRUCache[DocumentId, ResolvedPut | None] = LRUCache(
            CLEAN_MAX, CLEAN_BYTES, self._pinned
        )
        self._ends: dict[DocumentId, int] = {}
        self._end_names: dict[DocumentId, str] = {}
        """``logs.end_name`` of the logs in a worktree of git, where it is known."""
        self._ids: dict[DocumentId, dict[str, int | None]] = {}
        """By log the numbers of its records by dedupe key; None where there is none."""
        self._appending: Counter[DocumentId] = Counter()
        """How many records of a log are in flight."""
        self._partial: set[DocumentId] = set()
        """The long logs, of which only some dedupe keys are known."""
        self._min_next_revisions: dict[DocumentId, int] = {}
        self._below: dict[DocumentId, set[DocumentId]] = {}
        """By a key and its kind: the longer keys of which something is, or was, known."""
        self._noted, self._noted_max = 0, _NOTED_MIN
        self._maybe_unsynced: set[FileId] = set()

    # -- the view of a commit --------------------------------------------------------------

    def knows(self, change: Change) -> bool:
        """Whether the change can be resolved without reading the disk."""
        place = (change.kind, change.key)
        if isinstance(change, Append):
            return place in self._ends and (
                change.dedupe_key is None or self._knows_id(place, change.dedupe_key)
            )
        return place in self.dirty.documents or place in self._clean or place in self.in_flight

    def current(self, place: DocumentId) -> tuple[ResolvedPut | None, int]:
        lowest = self._min_next_revisions.get(place, 1)
        change = self.in_flight.get(place) or self.dirty.documents.get(place)
        if isinstance(change, ResolvedDelete):
            # While the file of a deleted document may still exist, its revisions go on: an edit of
            # the deleted version would look newer than a new document.
            return None, max(lowest, change.revision + 1)
        return change or self._clean.get(place), lowest

    def last_seq(self, place: DocumentId) -> int:
        return self._ends[place]

    def end_name(self, place: DocumentId) -> str | None:
        return self._end_names.get(place)

    def find(self, place: DocumentId, dedupe_key: str) -> int | None:
        return self._ids[place].get(dedupe_key)

    # -- learning from the disk ------------------------------------------------------------

    @contextmanager
    def pinned(self, places: Sequence[DocumentId]) -> Iterator[None]:
        """Keep what is known of these places, even without room."""
        self._pinned.update(places)
        try:
            yield
        finally:
            self._pinned.subtract(places)
            for place in places:
                if not self._pinned[place]:
                    del self._pinned[place]

    def clean(self, place: DocumentId) -> ResolvedPut | _Unknown | None:
        """The version that the file has; ``UNKNOWN`` when it was not read."""
        return self._clean.get(place, UNKNOWN)

    def learn(
        self,
        place: DocumentId,
        found: ResolvedPut | None,
        before: ResolvedPut | _Unknown | None,
    ) -> bool:
        """Take the version that a pinned file was found to have; ``before``: ``clean`` until then.

        False when a save came in between, so that the file has changed since.
        """
        changed = self.clean(place) is not before
        if place in self.in_flight or place in self.dirty.documents or changed:
            return False
        known = before.document if isinstance(before, ResolvedPut) else before
        if known != (found and found.document):
            self.keep(place, found)
            self._maybe_unsynced.add((place, paths.DOCUMENT))
        return True

    def learn_log(
        self,
        place: DocumentId,
        end: int,
        ids: Mapping[str, int | None] | None,
        *,
        partial: bool,
        name: str | None = None,
    ) -> None:
        """Take what a log was found to hold, as far as it is not known already.

        ``partial``: it is long, and has other dedupe keys besides these. ``name``:
        ``logs.end_name``, in a worktree of git.
        """
        if ids is not None or place not in self._ends:
            self._maybe_unsynced.add((place, paths.LOG))
        if end > self._ends.get(place, -1):  # it is news, or others have added lines
            self._ends[place] = end
            self._end_names.pop(place, None)
            if name is not None:
                self._end_names[place] = name
        self._note(place)
        if ids is None:
            return
        known = self._ids.get(place)
        if known is None:
            waiting = self.dirty.records.get(place, ())
            known = self._ids[place] = {**ids}
            known.update((r.dedupe_key, r.seq) for r in waiting if r.dedupe_key is not None)
            if partial:
                self._partial.add(place)
        elif place in self._partial:
            if len(known) > _PARTIAL_MAX:
                for dedupe_key, seq in list(known.items()):
                    if seq is None or seq <= end:  # the log has it, or has it not
                        del known[dedupe_key]
            for dedupe_key, seq in ids.items():
                known.setdefault(dedupe_key, seq)

    def _knows_id(self, place: DocumentId, dedupe_key: str) -> bool:
        ids = self._ids.get(place)
        return ids is not None and (place not in self._partial or dedupe_key in ids)

    def knows_ids(self, place: DocumentId) -> bool:
        """Whether the dedupe ids of a log are known, or some of them."""
        return place in self._ids

    def take_in(
        self, place: DocumentId, end: int, ids: Mapping[str, int] | None, name: str | None
    ) -> None:
        """The file of a log ends with this number: others have added lines, or put another there.

        It has these ids; None for a long log, in which each is looked up again. ``name`` as in
        ``learn_log``. Numbers are never given twice, so they go on from the higher end.
        """
        if end > self._ends.get(place, end):
            self._ends[place] = end
        self._end_names.pop(place, None)
        if name is not None and place in self._ends and place not in self.dirty.records:
            self._end_names[place] = name
        known = self._ids.get(place)
        if known is None:
            return
        if place not in self.dirty.records and not self._appending[place]:
            known.clear()  # all that this process knows better is in the file, or was kept out
            self._partial.discard(place)
        if ids is None:
            self._partial.add(place)
        if place in self._partial:
            for dedupe_key in [key for key, seq in known.items() if seq is None]:
                del known[dedupe_key]
        known.update({key: seq for key, seq in (ids or {}).items() if key not in known})

    def keep(self, place: DocumentId, version: ResolvedPut | None) -> None:
        """The file has this version now."""
        self._maybe_unsynced.discard((place, paths.DOCUMENT))
        is_new = len(place[1]) > 1 and place not in self._clean
        size = _ENTRY_BYTES + (len(version.document.body) if version is not None else 0)
        self._clean.set(place, version, size)
        if is_new:
            self._note(place)
            self._forget_dropped()

    def maybe_unsynced(
        self, changes: Sequence[Change], resolved: Sequence[ResolvedChange]
    ) -> set[FileId]:
        """The files to fsync before a commit that skips changes may return.

        A change that a file already has may be the work of a process that died before its fsync.
        Empty when no such change was skipped.
        """
        if len(resolved) == len(changes) or not self._maybe_unsynced:
            return set()
        to_do = {id_of(change) for change in resolved}
        for change in changes:
            if isinstance(change, Check):
                continue
            place = (change.kind, change.key)
            ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
            if place not in to_do and (place, ending) in self._maybe_unsynced:
                return set(self._maybe_unsynced)
        return set()

    def mark_synced(self, files: Iterable[FileId]) -> None:
        """These files are durable."""
        self._maybe_unsynced.difference_update(files)

    def below(self, kind: str, key: Key) -> list[DocumentId]:
        """The places under a key, and the key's own, of which anything may be known."""
        return [(kind, key), *self._below.get((kind, key), ())]

    def _note(self, *known: DocumentId) -> None:
        """Note that something is known of these places, for ``below``."""
        for kind, key in known:
            for length in range(1, len(key)):
                places = self._below.setdefault((kind, key[:length]), set())
                self._noted -= len(places)
                places.add((kind, key))
                self._noted += len(places)

    def _forget_dropped(self) -> None:
        """Forget the places that the cache has dropped, once they are about half of all."""
        if self._noted > self._noted_max:
            self._below.clear()
            self._noted = 0
            self._note(*self._clean, *self._ends, *self._min_next_revisions)
            self._noted_max = 2 * self._noted + _NOTED_MIN

    def erase(self, places: Iterable[DocumentId]) -> None:
        """The files of these places were removed, and nothing of them is remembered."""
        for place in places:
            self._clean.drop(place)
            self._maybe_unsynced.discard((place, paths.DOCUMENT))
            self._min_next_revisions.pop(place, None)
            self._ends.pop(place, None)
            self._end_names.pop(place, None)
            self._ids.pop(place, None)
            self._partial.discard(place)
            self._maybe_unsynced.discard((place, paths.LOG))
            self._noted -= len(self._below.pop(place, ()))
            if self._pinned[place]:
                self.keep(place, None)  # whoever reads it this moment finds that it has changed

    # -- the way of a version --------------------------------------------------------------

    def begin(self, changes: Iterable[ResolvedChange]) -> None:
        """These changes are in flight."""
        for change in changes:
            place = id_of(change)
            if not isinstance(change, ResolvedAppend):
                self.in_flight[place] = change
                continue
            self._ends[place] = change.record.seq
            self._appending[place] += 1
            if place in self._end_names:
                record = change.record
                self._end_names[place] = logs.line_checksum(record.seq, record.body)
            if change.record.dedupe_key is not None:
                ids = self._ids[place]
                ids[change.record.dedupe_key] = change.record.seq
                if len(ids) > _COMPLETE_MAX:
                    self._partial.add(place)

    def became_durable(self, changes: Iterable[ResolvedChange]) -> None:
        """These changes were in flight, and are in the log."""
        for change in changes:
            place = id_of(change)
            if isinstance(change, ResolvedAppend):
                self._landed(place)
            elif self.in_flight.get(place) is change:
                del self.in_flight[place]
            self.dirty.add(change)

    def withdraw(self, changes: Sequence[ResolvedChange]) -> None:
        """Forget the last changes in flight, of which nothing was written."""
        for change in reversed(changes):
            place = id_of(change)
            if not isinstance(change, ResolvedAppend):
                self.in_flight.pop(place, None)
                continue
            self._landed(place)
            self._end_names.pop(place, None)
            if place in self._ends:
                self._ends[place] = min(self._ends[place], change.record.seq - 1)
            if change.record.dedupe_key is not None and place in self._ids:
                self._ids[place].pop(change.record.dedupe_key, None)

    def failed(self, changes: Iterable[ResolvedChange]) -> None:
        """Forget changes in flight. Their numbers may be on disk, and are never given again."""
        for change in changes:
            place = id_of(change)
            if isinstance(change, ResolvedPut):
                lowest = max(change.document.revision + 1, self._min_next_revisions.get(place, 1))
                self._min_next_revisions[place] = lowest
                self._note(place)
            elif isinstance(change, ResolvedAppend):
                self._landed(place)
                self._end_names.pop(place, None)
                if change.record.dedupe_key is not None:
                    self._ids[place].pop(change.record.dedupe_key, None)
            self.in_flight.pop(place, None)

    def _landed(self, place: DocumentId) -> None:
        self._appending[place] -= 1
        if self._appending[place] <= 0:
            del self._appending[place]

    def became_clean(self, change: ResolvedPut | ResolvedDelete, edit: ResolvedPut | None) -> bool:
        """The file has the change, or an ``edit`` of another process that is newer.

        False when a newer change is waiting already.
        """
        place = id_of(change)
        if self.dirty.documents.get(place) is not change:
            return False
        self.dirty.remove(place)
        self.keep(place, edit or (change if isinstance(change, ResolvedPut) else None))
        return True

    def unflushed(self) -> list[ResolvedChange]:
        """The changes that are durable and in no file yet."""
        changes: list[ResolvedChange] = list(self.dirty.documents.values())
        for (kind, key), waiting in self.dirty.records.items():
            bases = self.dirty.bases.get((kind, key), {})
            changes.extend(
                ResolvedAppend(kind, key, record, bases.get(record.seq)) for record in waiting
            )
        return changes
