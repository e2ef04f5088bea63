"""Gives the documents and records of a directory other bytes, in place: for new encryption keys.

Numbers, revisions, times and names stay. Everything here blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from agent_state.clock import Clock, stamp
from agent_state.errors import (
    Key,
    SerializationError,
    StateCorruptedError,
    StateNotFoundError,
    describe,
)
from agent_state.protocols import Document, DocumentId, LogRecord
from agent_state.storage import fileio, locks, logs, paths
from agent_state.storage.checkpoint import Checkpointer
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document import check_size
from agent_state.storage.document_files import SNAPSHOTS
from agent_state.storage.quarantine import quarantined_paths


class BodyChange(Protocol):
    """New bytes for the bodies of a directory; the same ones for what is to stay as it is."""

    def document(self, document: Document, /) -> bytes:
        """The new body of a document."""

    def record(self, log: DocumentId, record: LogRecord, /) -> bytes:
        """The new body of a record in this log."""


@dataclass(slots=True)
class RewriteReport:
    """What was written anew."""

    documents: int = 0
    records: int = 0
    snapshots: int = 0
    """Earlier versions that were removed; the next save of a document keeps one again."""
    damaged: list[str] = field(default_factory=list)
    """Documents and logs that could not be read, and stay as they are."""
    left: list[str] = field(default_factory=list)
    """Files that stay as they are: the quarantine's, and those of recordings."""

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.damaged, **asdict(self)}


class BodyRewriter:
    """Owns a directory between ``open`` and ``close``, and rewrites what is in it.

    ``open`` first writes the changes of the write-ahead log to their files, and removes what dead
    writers left half written. Raises
    ``StateNotFoundError``, ``StateDirectoryInUseError`` while another process has it open, and
    ``StorageError``. A process that dies on the way leaves each file old or new.
    """

    def __init__(self, root: str | os.PathLike[str], clock: Clock) -> None:
        self._clock = clock
        self._directory = StateDirectory(os.fspath(root), sync=False, now=self._now, durable=True)
        self._checkpointer = Checkpointer(self._directory, durable=True, accept=None)
        self._owner: locks.Standing | None = None

    def _now(self) -> str:
        return stamp(self._clock.now())

    @property
    def root(self) -> str:
        return self._directory.root

    def open(self) -> None:
        if not os.path.isdir(self.root):
            raise StateNotFoundError("there is no such state directory", path=self.root)
        self._directory.prepare()
        self._owner = locks.acquire_exclusive(self._directory.locks)
        try:
            self._checkpointer.recover()
            self._directory.remove_leftovers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._checkpointer.close()
        if self._owner is not None:
            self._owner.release()
            self._owner = None

    def get(self, kind: str, key: Key) -> Document | None:
        """One document. Raises ``StateCorruptedError``."""
        stored = self._directory.documents.read(self._directory.locate(kind, key))
        return stored.document if stored is not None else None

    def put(self, kind: str, key: Key, body: bytes, schema: str) -> None:
        """Write one document, whatever is there, durably."""
        stored = self.get(kind, key)
        revision = 1 if stored is None else stored.revision + 1
        document = Document(kind, key, body, revision, self._now(), schema)
        at = self._directory.locate(kind, key)
        self._directory.documents.write(at, document, {}, sync=True, snapshot=False)

    def remove(self, kind: str, key: Key) -> None:
        """Remove one document, durably."""
        self._directory.documents.delete(self._directory.locate(kind, key), sync=True)

    def rewrite(self, change: BodyChange, *, spared: DocumentId) -> RewriteReport:
        """Give every body but that of the document ``spared`` its new bytes.

        Snapshots are removed, since they hold the former ones. Files of the quarantine, and of
        recordings, are left, and named. Raises what ``change`` raises.
        """
        report, tree = RewriteReport(), self._directory.tree
        for kind in tree.kinds():
            if kind in paths.RECORDED:
                entries = tree.walk(f"{tree.root}/{kind}")
                report.left += [tree.relative(entry.path) for entry in entries]
                continue
            for key in tree.keys(kind):
                if (kind, key) != spared:
                    self._each(report, kind, key, self._document, change)
            for key in tree.keys(kind, (), paths.LOG):
                self._each(report, kind, key, self._log, change)
        self._checkpointer.sync()
        for entry in tree.walk(f"{tree.root}/{SNAPSHOTS}", hidden=True):
            report.snapshots += fileio.remove_file(entry.path, sync=False)
        report.left += map(tree.relative, quarantined_paths(tree))
        report.left.sort()
        return report

    def _each(
        self,
        report: RewriteReport,
        kind: str,
        key: Key,
        work: Callable[[RewriteReport, str, Key, BodyChange], None],
        change: BodyChange,
    ) -> None:
        try:
            work(report, kind, key, change)
        except StateCorruptedError as error:
            report.damaged.append(f"{describe(kind, key)}: {error.message}")

    def _document(self, report: RewriteReport, kind: str, key: Key, change: BodyChange) -> None:
        at = self._directory.locate(kind, key)
        stored = self._directory.documents.read(at)
        if stored is None:
            return
        body = stored.document.body
        body = _fitting(report, (kind, key), body, change.document(stored.document))
        if body != stored.document.body:
            document = replace(stored.document, body=body, edited=False)
            self._directory.documents.write(at, document, stored.meta, snapshot=False)
            self._checkpointer.note_written(at)
            report.documents += 1

    def _log(self, report: RewriteReport, kind: str, key: Key, change: BodyChange) -> None:
        at = self._directory.locate(kind, key, paths.LOG)
        writer = self._directory.logs.writer(at)
        log = (kind, key)
        report.records += writer.rewrite(
            lambda record: _fitting(report, log, record.body, change.record(log, record))
        )


def _fitting(report: RewriteReport, place: DocumentId, body: bytes, changed: bytes) -> bytes:
    """The new bytes; the former ones where the new ones are too long to be read back."""
    try:
        check_size(changed, *place)
        logs.check_record(changed, None)
    except SerializationError as error:
        report.left.append(f"{describe(*place)}: {error.message}")
        return body
    return changed
