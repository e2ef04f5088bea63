"""What was imported before: ``record/imports.json``; files that have not changed are not read.

A file is known by its path, size, inode and time of change, and by those of a write-ahead log
beside it. The document is a cache: without it, or with a damaged one, every file is read again,
and nothing comes twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import StateCorruptedError
from agent_state.protocols import Document, JsonObject
from agent_state.serializers import canonical_json, parse_object
from agent_state_integrations.recorder.files import KIND, Recording

Fingerprint = list[int]
IMPORTS = ("imports",)
SCHEMA = "record_imports/1"
"""Its number is also that of the readers: when they make something else of a file, files are read
again."""


def fingerprint_of(path: Path) -> Fingerprint | None:
    """What changes when a file does; None where it cannot be looked at."""
    found: Fingerprint = []
    for each in (path, path.with_name(f"{path.name}-wal")):
        try:
            status = os.stat(each)  # noqa: PTH116 - ten thousand files in a row
        except FileNotFoundError:
            continue
        except OSError:
            return None
        found += [status.st_size, status.st_mtime_ns, status.st_ino]
    return found or None


class ImportLedger:
    """The imports of one recording. Use it while holding a writer of that recording."""

    def __init__(self, state_dir: str | PathLike[str], *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._directory = Recording(state_dir).directory(sync=True, clock=self._clock)
        self._place = self._directory.locate(KIND, IMPORTS)
        self._files: dict[str, JsonObject] = {}
        self._revision = 0
        self._changed = False
        try:
            stored = self._directory.documents.read(self._place)
            if stored is not None:
                self._revision = stored.document.revision
                content = parse_object(stored.document.body)
                if stored.document.schema == SCHEMA and type(content.get("files")) is dict:
                    self._files = content["files"]
        except StateCorruptedError:
            pass  # it is a cache: everything is read again

    def known(self, path: Path, fingerprint: Fingerprint | None) -> JsonObject | None:
        """The report of the import of exactly this file; None where it has to be read."""
        entry = self._files.get(str(path.absolute()))
        if entry is None or fingerprint is None or entry.get("fingerprint") != fingerprint:
            return None
        report = entry.get("report")
        return report if type(report) is dict else None

    def note(self, path: Path, fingerprint: Fingerprint, report: Mapping[str, object]) -> None:
        """A file was imported. ``fingerprint``: taken before it was read."""
        self._files[str(path.absolute())] = {"fingerprint": fingerprint, "report": dict(report)}
        self._changed = True

    def save(self) -> None:
        """Store what was noted, durably. Raises ``StorageError``."""
        if not self._changed:
            return
        body = canonical_json({"files": self._files})
        saved_at = stamp(self._clock.now())
        document = Document(KIND, IMPORTS, body, self._revision + 1, saved_at, SCHEMA)
        self._directory.documents.write(self._place, document, {})
