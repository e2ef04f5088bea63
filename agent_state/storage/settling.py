"""From the journal to the files: each changed document brought to its readable place.

The journal has made the changes durable; here they are written without fsync, and ``sync``
makes all of them durable together before a segment may go. A file that somebody else has
changed meanwhile is looked at first. Everything here blocks and runs in one thread at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from agent_state.errors import AgentStateError, Key, StateCorruptedError, StorageError
from agent_state.protocols import Document, Incident, LogRecord
from agent_state.storage import envelope, fileio, intents, journal, paths
from agent_state.storage.directory import JOURNAL, StateDirectory, Stored
from agent_state.storage.fileio import PendingSync, Stamp
from agent_state.storage.records import AppendDone, DeleteDone, Done, PutDone

Place = tuple[str, Key]
Accept = Callable[[Document], None]
"""Raises an ``AgentStateError`` when a document that somebody else wrote must not be used."""


class Settler:
    """Writes what the journal holds, and knows which files are not yet durable."""

    def __init__(self, directory: StateDirectory, *, durable: bool, accept: Accept | None) -> None:
        self.journal = f"{directory.root}/{JOURNAL}"
        self._directory = directory
        self.durable = durable
        self._accept = accept
        self.unsynced = PendingSync(directory.root)
        self._recovering = False

    def put(self, change: PutDone) -> Stored | None:
        """Write the document; the edit that won instead, if somebody made one that is newer."""
        document = change.document
        path = self._directory.path(document.kind, document.key)
        stamp = fileio.stat_file(path)
        known = self._directory.seen.get(path)
        if stamp is not None and stamp != known:
            theirs, stamp = self._theirs(change, expected=known is not None)
            if theirs is not None:
                self.unsynced.note_file(path)
                return theirs
        self._directory.write(document, change.meta, stamp)
        self.unsynced.note_file(path)
        return None

    def delete(self, change: DeleteDone) -> Stored | None:
        """Remove the document; the edit that is newer than what was deleted, if there is one."""
        path = self._directory.path(change.kind, change.key)
        stamp = fileio.stat_file(path)
        if stamp is not None and stamp != self._directory.seen.get(path):
            try:
                stored = self._directory.read(change.kind, change.key)
            except StateCorruptedError as error:
                if not self._is_unfinished(path, b""):
                    kind, key = change.kind, change.key
                    self._directory.put_aside(kind, key, error.message, restored=False)
                    return None
                stored = None
            if stored is not None and stored.document.revision > change.revision:
                self._directory.note_seen(path, stored.stamp)
                self.unsynced.note_file(path)
                return stored
            if stored is not None and stored.document.edited:
                reason = f"changed outside, while revision {change.revision} was being deleted"
                self._directory.put_aside(change.kind, change.key, reason, restored=False)
                self.unsynced.note_folder(os.path.dirname(path))
                return None
        self._directory.remove(change.kind, change.key)
        self.unsynced.note_folder(os.path.dirname(path))
        return None

    def append(self, place: Place, records: Sequence[LogRecord]) -> None:
        """Add those records that the log does not hold yet."""
        log = self._directory.log(*place)
        seq = log.tail().seq
        # After a segment in doubt the next one says again what the first has said.
        fresh = {record.seq: record for record in records if record.seq > seq}
        if fresh:
            self._directory.make_parent(log.path)
            log.append([fresh[number] for number in sorted(fresh)], sync=False)
        self.unsynced.note_file(log.path)

    def sync(self) -> None:
        """Make everything written so far durable. Raises ``StorageError``; then all stays due."""
        if self.durable:
            self.unsynced.sync()
        else:
            self.unsynced.forget()

    def rewrite_doubtful(self) -> None:
        """Write the files whose fsync failed once more, from the journal that still has them."""
        fsync_failed = self.unsynced.fsync_failed
        if not fsync_failed:
            return
        for path in fsync_failed:
            if path.endswith(paths.LOG):
                fileio.rewrite(path)  # what the kernel has dropped, the journal has
        for segment in journal.segments(self.journal):
            for record in journal.read_segment(segment).records:
                for change in record:
                    if isinstance(change, PutDone):
                        self._rewrite(change)
                    elif isinstance(change, AppendDone):
                        self._rewrite_record(change)
        fsync_failed.clear()

    def _rewrite(self, change: PutDone) -> None:
        document = change.document
        path = self._directory.path(document.kind, document.key)
        if path in self.unsynced.fsync_failed:
            stored = self._directory.read(document.kind, document.key)
            if stored is not None and stored.document.revision <= document.revision:
                self._directory.write(document, change.meta)
                self.unsynced.note_file(path)

    def _rewrite_record(self, change: AppendDone) -> None:
        if self._directory.log(change.kind, change.key).path in self.unsynced.fsync_failed:
            self.append((change.kind, change.key), [change.record])

    def recover(self) -> list[str]:
        """Replay all segments into the files; the segments that may be removed after ``sync``."""
        found = journal.segments(self.journal)
        if self.durable:
            journal.make_durable(found, self.journal)
        gone = []
        replay = Replay(self, self._directory)
        for path in found:
            try:
                segment = journal.read_segment(path)
            except StateCorruptedError as error:  # no file at all
                replay.later.append((path, error.message))
                continue
            for record in segment.records:
                for change in record:
                    replay.add(change)
            if segment.damaged:
                reason = f"{segment.damaged} records cannot be read; the others were replayed"
                replay.later.append((path, reason))
            else:
                gone.append(path)
        self._recovering = True
        try:
            replay.finish()
        finally:
            self._recovering = False
        return gone

    def _theirs(self, change: PutDone, *, expected: bool) -> tuple[Stored | None, Stamp | None]:
        """Somebody else's version of the file, if it wins; if it loses, it is put aside.

        And which version of the file may be replaced then; None for none.
        """
        document = change.document
        path = self._directory.path(document.kind, document.key)
        self._directory.forget(document.kind, document.key)
        try:
            stored = self._directory.read(document.kind, document.key)
            if stored is None:
                return None, None
            if stored.document.revision >= document.revision:
                if stored.document.body == document.body:
                    self._directory.note_seen(path, stored.stamp)
                    return stored, stored.stamp
                if self._accept is not None:
                    self._accept(stored.document)
                self._directory.note_seen(path, stored.stamp)
                return stored, stored.stamp
            if not expected and not stored.document.edited:
                return None, stored.stamp  # an earlier version of ours, from before this process
            reason = (
                f"changed outside at revision {stored.document.revision}, "
                f"while revision {document.revision} was being saved"
            )
        except StateCorruptedError as error:
            if self._is_unfinished(path, envelope.encode_document(document, change.meta)):
                return None, fileio.stat_file(path)
            reason = error.message
        except StorageError:
            raise  # a disk that cannot be read says nothing about what is on it
        except AgentStateError as error:
            reason = f"changed outside, and not usable: {error.message}"
        self._directory.put_aside(document.kind, document.key, reason, restored=True)
        return None, None

    def _is_unfinished(self, path: str, ours: bytes) -> bool:
        """Whether a power cut left nothing, NULs, or the beginning of our own unsynced file."""
        if not self._recovering:
            return False
        try:
            found = fileio.read_file(path)
        except StateCorruptedError:
            return False
        return found is not None and ours.startswith(found[0].rstrip(b"\0"))


class Replay:
    """The journal's changes, brought together to the last of each document."""

    def __init__(self, settler: Settler, directory: StateDirectory) -> None:
        self._settler = settler
        self._directory = directory
        self._last: dict[Place, PutDone | DeleteDone] = {}
        self._deleted: dict[Place, int] = {}
        self._records: dict[Place, list[LogRecord]] = {}
        self.later: list[tuple[str, str]] = []

    def add(self, change: Done) -> None:
        if isinstance(change, AppendDone):
            self._records.setdefault((change.kind, change.key), []).append(change.record)
        elif isinstance(change, PutDone):
            document = change.document
            place = (document.kind, document.key)
            last = self._last.get(place)
            # After a failed batch a revision is never given twice, so the higher one is later.
            if not isinstance(last, PutDone) or last.document.revision < document.revision:
                self._last[place] = change
        else:
            place = (change.kind, change.key)
            self._last[place] = change
            self._deleted[place] = max(change.revision, self._deleted.get(place, 0))

    def finish(self) -> None:
        making_way = self._directory.making_way
        for place, change in self._last.items():
            if isinstance(change, PutDone):
                making_way(partial(self._put, place, change))
            else:
                making_way(partial(self._settler.delete, change))
        for place, records in self._records.items():
            making_way(partial(self._append, place, records))
        for path, reason in self.later:
            kept = self._directory.aside.move(path, reason)
            self._directory.incidents.append(
                Incident(reason, path=self._directory.relative(path), kept=kept)
            )

    def _put(self, place: Place, change: PutDone) -> None:
        try:
            stored = self._directory.read(*place)
        except StateCorruptedError:
            stored = None  # the settler puts it aside and writes ours
        if stored is not None and not stored.document.edited:
            # A document deleted and made anew counts its revisions from 1 again.
            reborn = stored.document.revision <= self._deleted.get(place, 0)
            path = self._directory.path(*place)
            if stored.document.revision >= change.document.revision and not reborn:
                # Written by a process that died, which may not have come to its fsync.
                self._settler.unsynced.note_file(path)
                return
            self._directory.note_seen(path, stored.stamp)
        self._settler.put(change)

    def _append(self, place: Place, records: Sequence[LogRecord]) -> None:
        """Add what the log does not hold, or holds torn: nothing of this had to be synced."""
        first = min(record.seq for record in records)
        behind = self._directory.log(*place).cut_damage(first - 1)
        self._settler.append(place, [*behind, *records])


def settle(
    settler: Settler, changes: Iterable[PutDone | DeleteDone]
) -> dict[Place, Stored | AgentStateError | None]:
    """Settle documents one after another: for each the edit that won, or why it could not be done.

    One that finds something in its way does not keep the others from their files.
    """
    results: dict[Place, Stored | AgentStateError | None] = {}
    for change in changes:
        place = intents.place_of(change)
        try:
            if isinstance(change, PutDone):
                results[place] = settler.put(change)
            else:
                results[place] = settler.delete(change)
        except AgentStateError as error:
            results[place] = error
    return results


def recover(directory: StateDirectory, settler: Settler) -> None:
    """Complete what a crash left, as the directory's owner. Doing it twice changes nothing."""
    sync, directory.sync = directory.sync, settler.durable
    try:
        intents.complete_dead(directory)  # no journal vouches for these
    finally:
        directory.sync = sync
    if settler.durable:
        settler.unsynced.watch_errors()
    replayed = settler.recover()
    settler.sync()
    journal.remove_segments(replayed, settler.journal, sync=settler.durable)
