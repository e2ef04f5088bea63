"""Puts versions back into a state directory as they were, revisions included. Blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent_state.clock import Clock, stamp
from agent_state.errors import Key, StateCorruptedError
from agent_state.protocols import Document, LogRecord
from agent_state.storage import locks
from agent_state.storage.directory import LOCKS, StateDirectory
from agent_state.storage.settling import Settler, recover


class Restorer:
    """Owns the directory from ``open`` to ``close``; what a journal still holds is settled first.

    Raises ``StateDirectoryInUseError`` while anybody else has it open, and ``StorageError``.
    """

    def __init__(self, root: str, clock: Clock) -> None:
        self._directory = StateDirectory(root, sync=False, now=lambda: stamp(clock.now()))
        self._settler = Settler(self._directory, durable=True, accept=None)
        self._owner: locks.FileLock | None = None

    @property
    def root(self) -> str:
        return self._directory.root

    def open(self) -> None:
        self._directory.prepare()
        self._owner = locks.own_directory(f"{self.root}/{LOCKS}")
        try:
            recover(self._directory, self._settler)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go, with nothing more made durable than ``sync`` has."""
        self._settler.unsynced.close()
        if self._owner is not None:
            self._owner.release()
            self._owner = None

    def put_back(self, document: Document, meta: Mapping[str, str]) -> bool:
        """Write this version, unless the file is as new, newer, or edited by hand.

        Whether it was written. A file that cannot be read goes to the quarantine.
        """
        kind, key = document.kind, document.key
        try:
            stored = self._directory.read(kind, key)
        except StateCorruptedError as error:
            self._directory.put_aside(kind, key, error.message, restored=True)
            stored = None
        if stored is not None:
            there = stored.document
            older = there.revision < document.revision and there.saved_at <= document.saved_at
            if there.edited or not older:
                return False
        self._directory.write(document, dict(meta))
        self._settler.unsynced.note_file(self._directory.path(kind, key))
        return True

    def append(self, kind: str, key: Key, records: Sequence[LogRecord]) -> None:
        """Add those records that the log does not hold yet."""
        self._settler.append((kind, key), records)

    def last(self, kind: str, key: Key) -> int:
        """The number of a log's last record; 0 for none."""
        return self._directory.log(kind, key).tail().seq

    def sync(self) -> None:
        """Make everything that was put back durable."""
        self._settler.sync()
