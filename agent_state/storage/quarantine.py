"""``.quarantine/``: damaged and replaced files, each numbered, each with its reason.

Each is logged as a warning too: an edit of a person that is set aside must not pass unseen.
The folder mirrors the tree of the documents. Beside each file is a ``.reason.json``. This library
removes nothing from there but what is erased.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent_state.errors import AgentStateError, Key, storage_error
from agent_state.protocols import Incident
from agent_state.serializers import parse_object
from agent_state.storage import fileio, syscalls
from agent_state.storage.tree import DocumentTree

QUARANTINE = ".quarantine"
REASON = ".reason.json"
_REASON_MAX = 1 << 20

_logger = logging.getLogger("agent_state.storage")


class Quarantine:
    """Moves files there, and reports each as an incident.

    ``now`` gives the time as it is written into the reason.
    """

    def __init__(self, tree: DocumentTree, *, sync: bool, now: Callable[[], str]) -> None:
        self._tree = tree
        self._root = tree.root
        self._sync = sync
        self._now = now

    def move(
        self,
        path: str,
        reason: str,
        kind: str | None = None,
        key: Key | None = None,
        *,
        restored: bool = False,
    ) -> str:
        """Move a file there; its new path, relative to the root. Raises ``StorageError``.

        ``restored``: the caller writes an earlier version in its place.
        """
        kept = self._write_reason(path, reason, kind, key)
        try:
            syscalls.rename(path, kept)
        except OSError as error:
            raise storage_error(error, "quarantining a file", path=path) from error
        if self._sync:
            fileio.sync_directory(os.path.dirname(kept))
            fileio.sync_directory(os.path.dirname(path))
        kept = self._tree.relative(kept)
        self.report(self._tree.relative(path), reason, kind, key, kept, restored=restored)
        return kept

    def link(self, path: str, reason: str, kind: str, key: Key) -> None:
        """Keep a file that is about to be replaced; readers find one all the time."""
        kept = self._write_reason(path, reason, kind, key)
        try:
            syscalls.link(path, kept)
        except OSError:  # a file system without links
            try:
                syscalls.rename(path, kept)
            except OSError as error:
                raise storage_error(error, "quarantining a file", path=path) from error
        if self._sync:
            fileio.sync_directory(os.path.dirname(kept))
        relative = self._tree.relative
        self.report(relative(path), reason, kind, key, relative(kept), restored=True)

    def keep(self, path: str, data: bytes, reason: str, kind: str, key: Key) -> str:
        """Keep bytes that were at ``path``; their path, relative to the root. Not reported."""
        kept = self._write_reason(path, reason, kind, key)
        fileio.replace_file(kept, data, sync=self._sync)
        return self._tree.relative(kept)

    def report(
        self,
        path: str,
        reason: str,
        kind: str | None,
        key: Key | None,
        kept: str | None,
        *,
        restored: bool = False,
    ) -> None:
        """Add and log an incident: ``path`` had damage, and the bytes are at ``kept``.

        Both are relative.
        """
        now = ", and an earlier version is used" if restored else ""
        told = f"{self._root}/{path}: {reason}; it is kept as {kept}{now}"
        # A file's name need not be Unicode; what is logged must be.
        _logger.warning("%s", told.encode(errors="backslashreplace").decode())
        self._tree.incidents.append(Incident(reason, kind, key, path, kept, restored))

    def tell(self, incident: Incident) -> None:
        """Add an incident about a file that stays where it is."""
        self._tree.incidents.append(incident)

    def _write_reason(self, path: str, reason: str, kind: str | None, key: Key | None) -> str:
        """Write the reason, and return the path of the file that it is about."""
        was = self._tree.relative(path)
        fileio.make_directories(self._root, f"{QUARANTINE}/{os.path.dirname(was)}", sync=self._sync)
        number = 1
        while os.path.lexists(kept := f"{self._root}/{QUARANTINE}/{was}.{number}"):
            number += 1
        note = {
            "at": self._now(),
            "key": list(key or ()),
            "kind": kind,
            "reason": reason,
            "was": was,
        }
        text = json.dumps(note, indent=2, ensure_ascii=False) + "\n"
        # A file's name need not be Unicode; its reason must be, to be read.
        data = text.encode(errors="replace")
        fileio.replace_file(f"{kept}{REASON}", data, sync=self._sync)
        return kept


@dataclass(frozen=True, slots=True)
class QuarantinedFile:
    """One quarantined file, and the reason. Paths are relative to the state directory."""

    path: str
    was: str | None
    reason: str
    at: str | None
    kind: str | None = None
    key: Key = ()


def quarantined(tree: DocumentTree) -> list[QuarantinedFile]:
    """Everything in ``.quarantine/``, by path."""
    found = []
    for kept, (is_there, has_reason) in sorted(quarantined_paths(tree).items()):
        if has_reason:
            found.append(_described(tree, kept, _read_reason(kept + REASON), missing=not is_there))
        else:
            found.append(
                QuarantinedFile(tree.relative(kept), None, "its reason file is missing", None)
            )
    return found


def quarantined_paths(tree: DocumentTree) -> dict[str, tuple[bool, bool]]:
    """The absolute paths: whether the file is there, and whether its reason is. Reads no file."""
    found: dict[str, tuple[bool, bool]] = {}
    for entry in tree.walk(f"{tree.root}/{QUARANTINE}", hidden=True):
        path = entry.path
        if fileio.TEMPORARY not in path and path != f"{tree.root}/{QUARANTINE}/.gitignore":
            kept = path.removesuffix(REASON)
            is_there, has_reason = found.get(kept, (False, False))
            found[kept] = (is_there or kept == path, has_reason or kept != path)
    return found


def _described(
    tree: DocumentTree, kept: str, note: dict[str, Any], *, missing: bool
) -> QuarantinedFile:
    reason = str(note.get("reason") or "its reason cannot be read")
    if missing:
        reason += " (announced, but the file was never moved)"
    key = note.get("key")
    return QuarantinedFile(
        tree.relative(kept),
        _text(note.get("was")),
        reason,
        _text(note.get("at")),
        _text(note.get("kind")),
        tuple(str(part) for part in key) if isinstance(key, list) else (),
    )


def _read_reason(path: str) -> dict[str, Any]:
    try:
        found = fileio.read_file(path, limit=_REASON_MAX)
        return parse_object(found[0]) if found else {}
    except AgentStateError:
        return {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
