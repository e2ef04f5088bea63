"""The git worktree that a state directory is in: what git has in work there.

git needs no server to do its work, and tells none of it. So the index is looked at when it has
changed, by git's own command; without git, or outside of a worktree, there is nothing to know.
Methods block, unless they say otherwise.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time

from agent_state.errors import AgentStateError, UnmergedStateError
from agent_state.storage import fileio
from agent_state.storage.fileio import Stamp
from agent_state.storage.paths import DocumentPath

BUSY_SECONDS = 10.0
"""The longest time that work of git is waited for; a lock older than that was left behind."""
_LOOK_SECONDS = 0.001
_SEARCH_SECONDS = 1.0
_GIT_SECONDS = 60.0
_MARKER = re.compile(rb"^(<+|>+)(?: |\r?$)", re.MULTILINE)

_logger = logging.getLogger("agent_state.storage")


def has_conflict_markers(data: bytes) -> bool:
    """Whether bytes that are no JSON hold a merge conflict, of any style and marker size.

    No line of a document or log begins with such a character.
    """
    found = {match[1] for match in _MARKER.finditer(data)}
    return any(b">" * len(marker) in found for marker in found if marker.startswith(b"<"))


class Worktree:
    """The worktree around ``root``, as far as the stores must know it."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._index: str | None = None
        self._seen: Stamp | None = None
        self._resolved: set[str] = set()
        self._looked = self._searched = float("-inf")
        self._mutex = threading.Lock()
        self._refused = ""
        self.unmerged: frozenset[str] = frozenset()
        """The paths that the index has as unmerged."""
        self.marked: set[str] = set()
        """The paths in which conflict markers were found."""
        self._unread: set[str] = set()

    def is_stale(self) -> bool:
        """Whether ``refresh`` may find something new. Blocks for one ``stat`` at most."""
        now = time.monotonic()
        pause = _SEARCH_SECONDS if self._index is None else _LOOK_SECONDS
        if now - self._looked < pause:
            return False
        self._looked = now
        return self._index is None or fileio.stat_file(self._index) != self._seen

    def refresh(self, *, search: bool = False) -> None:
        """Read the index, if it has changed.

        Outside of a worktree, one is looked for once a second, or at each ``search``.
        """
        with self._mutex:
            if self._index is None:
                now = time.monotonic()
                if now - self._searched < _SEARCH_SECONDS and not search:
                    return
                self._searched = now
                found = _find_worktree(self._root)
                self._index = found and f"{found[1]}/index"
            self._looked = time.monotonic()
            if self._index is None:
                return
            seen = fileio.stat_file(self._index)
            if seen == self._seen:
                return
            self._seen = seen
            listed = self._git("ls-files", "-u", "-z", "--", ".") or b""
            names = {line.partition(b"\t")[2] for line in listed.split(b"\0")[:-1]}
            unmerged = {f"{self._root}/{os.fsdecode(name)}" for name in names}
            for path in self.unmerged - unmerged:
                self.note_resolved(path)
            self.unmerged = frozenset(unmerged)

    @property
    def is_merging(self) -> bool:
        """Whether a merge is not resolved, or its outcome not read, as far as was seen."""
        return bool(self.unmerged or self.marked or self._unread)

    def note_resolved(self, path: str) -> None:
        """A merge of this path was resolved."""
        self.marked.discard(path)
        self._resolved.add(path)
        self._unread.add(path)

    def note_read(self, path: str) -> None:
        """The present version of this path was read, by one who goes on from there."""
        if path in self._unread and path not in self.unmerged:
            self._unread.discard(path)

    def is_unread(self, path: str) -> bool:
        """Whether a merge of this path was resolved, and nobody has read the outcome."""
        return path in self._unread

    def take_resolved(self) -> set[str]:
        """The paths that are no longer unmerged, each once."""
        resolved, self._resolved = self._resolved, set()
        return resolved

    def is_busy(self) -> bool:
        """Whether a git command is at work with the index, for less than ``BUSY_SECONDS``."""
        if self._index is None:
            return False
        lock = fileio.stat_file(f"{self._index}.lock")
        return lock is not None and time.time_ns() - lock.mtime_ns < BUSY_SECONDS * 1e9

    def outlast(self) -> bool:
        """Wait for a git command that is at work; whether there was one, and it has ended."""
        until, waited = time.monotonic() + BUSY_SECONDS, False
        while (busy := self.is_busy()) and time.monotonic() < until:
            waited = True
            time.sleep(0.01)
        return waited and not busy

    def is_there(self) -> bool:
        """Whether the directory is in a worktree, as far as was seen."""
        return self._index is not None

    def is_removed(self, path: str) -> bool:
        """Whether a checkout, a merge or ``git rm`` took this path away.

        git has had it in a commit, and has it no longer. Waits for a git command that is at work.
        """
        self.outlast()
        self.refresh(search=True)
        if self._index is None:
            return False
        below = os.path.relpath(path, self._root)
        listed = self._git("ls-files", "-z", "--", f":(literal){below}")
        if listed is None or listed:
            return False
        history = ("log", "-1", "--all", "--reflog", "--format=%h")
        return bool(self._git(*history, "--", f":(literal){below}"))

    def has(self, data: bytes) -> bool:
        """Whether git has these bytes as a file: in a commit, a stash, or an index."""
        blob = b"blob %d\0%b" % (len(data), data)
        names = (hashlib.new(kind, blob, usedforsecurity=False) for kind in ("sha1", "sha256"))
        return any(self._git("cat-file", "-e", name.hexdigest()) is not None for name in names)

    def check(self, at: DocumentPath, *, unread: bool = False) -> None:
        """Raises ``UnmergedStateError`` for a path that is unmerged, or that has markers.

        ``unread``: also for one that was resolved, and not read since.
        """
        what = self.conflict(at.path)
        if what is None and unread and at.path in self._unread:
            what = "its merge was resolved; it is read again first"
        if what is not None:
            raise UnmergedStateError(what, kind=at.kind, key=at.key, path=at.path)

    def conflict(self, path: str) -> str | None:
        """Why a file is left alone, for people: a merge of it is not resolved; None if none is."""
        if path in self.unmerged:
            return f"{self._operation()} has left it unmerged; resolve it and `git add` it"
        return "it has conflict markers; resolve them" if path in self.marked else None

    def last_good(self, path: str) -> list[bytes]:
        """What the index has of an unmerged path: our side, theirs, and their base."""
        below = os.path.relpath(path, self._root)
        found = (self._git("cat-file", "blob", f":{stage}:./{below}") for stage in (2, 3, 1))
        return [data for data in found if data is not None] if path in self.unmerged else []

    def root_commits(self) -> frozenset[bytes]:
        """The commits without parents that HEAD goes back to: clones have them in common."""
        return frozenset((self._git("rev-list", "--max-parents=0", "HEAD") or b"").split())

    def is_ignored(self) -> bool:
        """Whether git ignores the directory, so that no commit has it."""
        return self._git("check-ignore", "-q", ".") is not None

    def is_set(self, name: str) -> bool:
        """Whether a boolean of git's configuration is true."""
        return (self._git("config", "--type=bool", "--get", name) or b"").strip() == b"true"

    def _operation(self) -> str:
        """What git is in the midst of, by the files that it keeps meanwhile."""
        return find_operation(os.path.dirname(self._index or "")) or "git"

    def _git(self, *args: str) -> bytes | None:
        """What git prints; None, and logged once, when it cannot be asked."""
        import subprocess  # a command that has nothing to ask starts without it

        command = ["git", "-C", self._root, "-c", "core.fsmonitor=false", *args]
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        try:
            done = subprocess.run(  # noqa: S603  # git, with arguments of ours
                command, env=env, capture_output=True, timeout=_GIT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self._refuse(f"git cannot be asked: {error}")
            return None
        if done.returncode == 0:
            return done.stdout
        if args[0] not in _MAY_FAIL:
            self._refuse(done.stderr.decode(errors="replace").strip())
        return None

    def _refuse(self, reason: str) -> None:
        if reason != self._refused:
            self._refused = reason
            _logger.warning("the git worktree of %s is not looked at: %s", self._root, reason)


_MAY_FAIL = frozenset({"cat-file", "check-ignore", "config", "log", "rev-list"})
"""An empty repository has no log, an unmerged path not every side, a setting may be missing."""
_OPERATIONS = {
    "MERGE_HEAD": "a merge",
    "rebase-merge": "a rebase",
    "rebase-apply": "a rebase",
    "CHERRY_PICK_HEAD": "a cherry-pick",
    "REVERT_HEAD": "a revert",
}


def find_operation(folder: str) -> str | None:
    """What git is in the midst of, such as ``a merge``, by its folder; None for nothing."""
    begun = (what for name, what in _OPERATIONS.items() if os.path.lexists(f"{folder}/{name}"))
    return next(begun, None)


def find_repository(root: str) -> tuple[str, str] | None:
    """The top of the innermost worktree around a directory, and the folder of its repository.

    Linked worktrees share that folder. None outside of a worktree. Asks no git.
    """
    found = _find_worktree(root)
    if found is None:
        return None
    top, folder = found
    try:
        common = fileio.read_file(f"{folder}/commondir")
    except AgentStateError:
        common = None
    below = os.fsdecode(common[0].strip()) if common is not None else "."
    return top, os.path.realpath(os.path.join(folder, below))


def _find_worktree(root: str) -> tuple[str, str] | None:
    """The top of the innermost worktree around a directory, and git's folder of it."""
    folder = os.path.realpath(root)
    while True:
        git = f"{folder}/.git"
        try:
            if os.path.isdir(git):
                return folder, git
            found = fileio.read_file(git)
        except AgentStateError:
            found = None
        if found is not None and found[0].startswith(b"gitdir: "):
            named = os.fsdecode(found[0].removeprefix(b"gitdir: ").strip())
            return folder, os.path.join(folder, named)
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent
