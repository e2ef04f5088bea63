"""Puts versions back into a closed state directory, such as those of a mirror.

It owns the directory meanwhile, as a store does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent_state.clock import Clock, stamp
from agent_state.errors import Key, StateCorruptedError
from agent_state.protocols import Document, LogRecord
from agent_state.storage import locks, paths
from agent_state.storage.checkpoint import Checkpointer
from agent_state.storage.directory import StateDirectory


class Restorer:
    """Puts versions back into a state directory as they were, revisions included. Blocks.

    Owns the directory from ``open`` to ``close``; ``open`` writes the changes of the write-ahead
    log to their files first. Raises ``StateDirectoryInUseError`` while another process has it
    open, and ``StorageError``.
    """

    def __init__(self, root: str, clock: Clock) -> None:
        self._directory = StateDirectory(root, sync=False, now=lambda: stamp(clock.now()))
        self._checkpointer = Checkpointer(self._directory, durable=True, accept=None)
        self._owner: locks.Standing | None = None

    @property
    def root(self) -> str:
        return self._directory.root

    def open(self) -> None:
        self._directory.prepare()
        self._owner = locks.acquire_exclusive(self._directory.locks)
        try:
            self._checkpointer.recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the directory, with nothing more made durable than ``sync`` has."""
        self._checkpointer.close()
        if self._owner is not None:
            self._owner.release()
            self._owner = None

    def put_back(self, document: Document, meta: Mapping[str, str]) -> bool:
        """Write this version, unless the file is as new, newer, or edited by hand.

        Whether it was written. An unreadable file is quarantined.
        """
        at = self._directory.locate(document.kind, document.key)
        try:
            stored = self._directory.documents.read(at)
        except StateCorruptedError as error:
            self._directory.documents.quarantine(at, error.message, restored=True)
            stored = None
        if stored is not None:
            there = stored.document
            older = there.revision < document.revision and there.saved_at <= document.saved_at
            if there.edited or not older:
                return False
        self._directory.documents.write(at, document, meta)
        self._checkpointer.note_written(at)
        return True

    def append(self, kind: str, key: Key, records: Sequence[LogRecord]) -> None:
        """Append those records that the log does not have yet."""
        self._checkpointer.append((kind, key), records)

    def last(self, kind: str, key: Key) -> int:
        """The number of a log's last record; 0 for none."""
        at = self._directory.locate(kind, key, paths.LOG)
        return self._directory.logs.writer(at).tail().seq

    def sync(self) -> None:
        """Make everything that was put back durable."""
        self._checkpointer.sync()
