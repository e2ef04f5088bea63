"""What is kept beside the documents: earlier versions, and what was found damaged.

``.snapshots/`` mirrors the tree with an earlier version of each document. ``.quarantine/``
mirrors it too, each file numbered, with a ``.reason.json`` beside it; nothing is ever removed
from there by this library.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable

from agent_state.errors import AgentStateError, Key, storage_error
from agent_state.storage import fileio, syscalls

QUARANTINE, SNAPSHOTS = ".quarantine", ".snapshots"

SNAPSHOT_SECONDS = 60.0
"""The earlier version of a document is renewed at most this often."""
_REMEMBERED = 100_000


class Snapshots:
    """An earlier version of each document, kept by a link just before it is replaced."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._renewed: dict[str, float] = {}

    def keep(self, path: str) -> None:
        """Keep what is about to be replaced.

        A snapshot is a second line: where a link is refused (a file system without them, a
        full disk), the document is saved all the same, and ``bytes_of`` finds none.
        """
        now = time.monotonic()
        if now - self._renewed.get(path, float("-inf")) < SNAPSHOT_SECONDS:
            return
        if fileio.stat_file(path) is None:
            return
        if len(self._renewed) >= _REMEMBERED:
            self._renewed.clear()
        self._renewed[path] = now
        target = self._place(path)
        folder, name = os.path.split(target)
        temporary = f"{folder}/{fileio.TEMPORARY}{name}"
        try:
            fileio.has_folders(self._root, target)
        except AgentStateError:
            return
        try:
            try:
                syscalls.link(path, temporary)
            except FileNotFoundError:
                fileio.make_directories(self._root, folder[len(self._root) + 1 :], sync=False)
                syscalls.link(path, temporary)
            syscalls.rename(temporary, target)
        except (OSError, AgentStateError):
            fileio.discard(temporary)

    def bytes_of(self, path: str) -> bytes | None:
        """The earlier version of the document at ``path``; None when there is none."""
        place = self._place(path)
        try:
            found = fileio.read_file(place) if fileio.has_folders(self._root, place) else None
        except AgentStateError:
            return None
        return None if found is None else found[0]

    def drop(self, path: str) -> None:
        """The earlier version has been used; the next save keeps a new one."""
        self._renewed.pop(path, None)
        place = self._place(path)
        with contextlib.suppress(AgentStateError):
            if fileio.has_folders(self._root, place):
                fileio.discard(place)

    def _place(self, path: str) -> str:
        return f"{self._root}/{SNAPSHOTS}/{path[len(self._root) + 1 :]}"


class Quarantine:
    """Where damaged and defeated files go, each with its reason."""

    def __init__(self, root: str, *, sync: bool, now: Callable[[], str]) -> None:
        self._root = root
        self._sync = sync
        self._now = now

    def move(self, path: str, reason: str, kind: str | None = None, key: Key = ()) -> str:
        """Move a file there; its new place, relative to the root. Raises ``StorageError``."""
        kept = self._announce(path, reason, kind, key)
        try:
            syscalls.rename(path, kept)
        except OSError as error:
            raise storage_error(error, "putting a file aside", path=path) from error
        if self._sync:
            fileio.sync_directory(os.path.dirname(kept))
            fileio.sync_directory(os.path.dirname(path))
        return kept[len(self._root) + 1 :]

    def link(self, path: str, reason: str, kind: str | None = None, key: Key = ()) -> str:
        """Keep a file that is about to be replaced; readers find one all the time."""
        kept = self._announce(path, reason, kind, key)
        try:
            syscalls.link(path, kept)
        except OSError:  # a file system without links
            try:
                syscalls.rename(path, kept)
            except OSError as error:
                raise storage_error(error, "putting a file aside", path=path) from error
        if self._sync:
            fileio.sync_directory(os.path.dirname(kept))
        return kept[len(self._root) + 1 :]

    def keep(
        self, path: str, data: bytes, reason: str, kind: str | None = None, key: Key = ()
    ) -> str:
        """Keep bytes that were at ``path``; their new place, relative to the root."""
        kept = self._announce(path, reason, kind, key)
        fileio.replace_file(kept, data, sync=self._sync)
        return kept[len(self._root) + 1 :]

    def _announce(self, path: str, reason: str, kind: str | None, key: Key) -> str:
        """Write the reason, and give the place it speaks of."""
        was = path[len(self._root) + 1 :].replace(os.sep, "/")
        fileio.make_directories(self._root, f"{QUARANTINE}/{os.path.dirname(was)}", sync=self._sync)
        number = 1
        while os.path.lexists(kept := f"{self._root}/{QUARANTINE}/{was}.{number}"):
            number += 1
        note = {"at": self._now(), "key": list(key), "kind": kind, "reason": reason, "was": was}
        text = json.dumps(note, indent=2, ensure_ascii=False) + "\n"
        # A file's name need not be Unicode; its reason must be, to be read.
        data = text.encode(errors="replace")
        fileio.replace_file(f"{kept}.reason.json", data, sync=self._sync)
        return kept
