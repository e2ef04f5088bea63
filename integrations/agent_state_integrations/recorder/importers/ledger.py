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

import orjson

from agent_state.errors import storage_error
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.files import AtomicFile, Recording

Fingerprint = list[int]
_NAME = "imports.json"
_VERSION = 1
"""Of the readers: after a change of what they make of a file, files are read again."""


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

    def __init__(self, state_dir: str | PathLike[str]) -> None:
        self._path = Recording(state_dir).folder / _NAME
        self._files: dict[str, JsonObject] = {}
        try:
            content = orjson.loads(self._path.read_bytes())
            if content["version"] == _VERSION:
                self._files = dict(content["files"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it is a cache: everything is read again
        self._changed = False

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
        document = orjson.dumps({"version": _VERSION, "files": self._files})
        try:
            with AtomicFile(self._path) as out:
                out.write(document)
                out.publish(replace=True)
        except OSError as error:
            raise storage_error(error, "noting what was imported", path=self._path) from error
