"""Claims: which process runs what, among the worktrees and clones of a git repository.

The processes of one user on one machine see one another here. Each has a file in a folder that
they share, and keeps it locked while it lives: the first line says who it is, every other one what
it claims, or claims no longer. The kernel releases the lock of a process that dies, and the next
one removes its file. git is asked only when another directory claims the same. Everything blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent_state.storage import fileio, locks
from agent_state.storage.locks import FileLock
from agent_state.storage.worktree import Worktree, find_repository

SETTING = "agent-state.runCopies"
"""The boolean of git's configuration by which copies run all the same."""
_FILE = ".claim"
_WAIT_SECONDS = 30.0


class Claimant(NamedTuple):
    """A process with claims."""

    directory: str
    """Its state directory."""
    pid: int
    repository: str
    """The folder of its repository, which linked worktrees share."""

    def __str__(self) -> str:
        return f"{self.directory} (process {self.pid})"


def claims_folder() -> str:
    """Where the processes of this user keep their claims."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return f"{home}/agent-state/running"


class Claims:
    """What this process claims for a state directory in a worktree."""

    def __init__(self, directory: str, top: str, repository: str) -> None:
        self._me = Claimant(directory, os.getpid(), repository)
        self._path = os.path.relpath(directory, top)
        self._folder = claims_folder()
        self._lock: FileLock | None = None
        self._mine: dict[str, None] = {}

    @classmethod
    def of(cls, directory: str) -> Claims | None:
        """Those of a directory; None outside of a worktree. Asks no git."""
        real = os.path.realpath(directory)
        found = find_repository(real)
        return None if found is None else cls(real, *found)

    def take(self, names: Iterable[str]) -> dict[str, Claimant]:
        """Claim names; those that a copy of the directory has, with who that is.

        A name is the same in every copy. Raises ``StorageError``, ``LockTimeoutError``.
        """
        wanted = {self._claim(name): name for name in names if not self.has(name)}
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        related: dict[Claimant, bool] = {}
        while wanted:
            with locks.holding(f"{self._folder}/mutex", _WAIT_SECONDS):
                taken = {
                    claim: who
                    for who, theirs in self._others()
                    if related.get(who, True)
                    for claim in theirs & wanted.keys()
                }
                if related.keys() >= {*taken.values()}:
                    self._write({claim: None for claim in wanted if claim not in taken})
                    return {wanted[claim]: who for claim, who in taken.items()}
            for who in {*taken.values()} - related.keys():
                related[who] = self._is_copy(who)
        return {}

    def has(self, name: str) -> bool:
        """Whether this process claims a name. Does not block."""
        return self._claim(name) in self._mine

    def drop(self, names: Iterable[str]) -> None:
        """Claim these names no longer."""
        gone = [self._claim(name) for name in names if self.has(name)]
        if self._lock is not None and gone:
            with locks.holding(f"{self._folder}/mutex", _WAIT_SECONDS):
                self._append(f"-{claim}" for claim in gone)
            for claim in gone:
                del self._mine[claim]

    def close(self) -> None:
        """Claim nothing. Twice is a no-op."""
        lock, self._lock, self._mine = self._lock, None, {}
        if lock is not None:
            fileio.discard(lock.path)
            lock.release()

    def _claim(self, name: str) -> str:
        what = json.dumps([self._path, name]).encode()
        return hashlib.blake2b(what, digest_size=8).hexdigest()

    def _write(self, claims: dict[str, None]) -> None:
        if self._lock is None or not locks.is_current(self._lock):  # or somebody has cleaned up
            path = f"{self._folder}/{self._me.pid}-{secrets.token_hex(4)}{_FILE}"
            if self._lock is not None:
                self._lock.release()
            self._lock = locks.acquire(path, _WAIT_SECONDS)
            self._append([json.dumps(self._me), *(f"+{claim}" for claim in self._mine)])
        self._append(f"+{claim}" for claim in claims)
        self._mine |= claims

    def _append(self, lines: Iterable[str]) -> None:
        if self._lock is not None and self._lock.fileno() >= 0:  # a child made by fork has none
            os.lseek(self._lock.fileno(), 0, os.SEEK_END)
            fileio.write_all(self._lock.fileno(), "".join(f"{line}\n" for line in lines).encode())

    def _others(self) -> Iterator[tuple[Claimant, set[str]]]:
        """The live processes with other directories; the files of dead ones are removed."""
        for name in fileio.list_folder(self._folder):
            path = f"{self._folder}/{name}"
            if not name.endswith(_FILE) or (self._lock is not None and self._lock.path == path):
                continue
            dead = locks.try_acquire(path)
            if dead is not None:
                fileio.discard(path)
                dead.release()
                continue
            found = fileio.read_file(path)
            header, *lines = found[0].decode().splitlines() if found is not None else [""]
            who = Claimant(*json.loads(header)) if header else self._me
            if who.directory != self._me.directory:
                claims: set[str] = set()
                for line in lines:
                    (claims.add if line[0] == "+" else claims.discard)(line[1:])
                yield who, claims

    def _is_copy(self, other: Claimant) -> bool:
        """Whether the other directory is of the same repository, and git has this one."""
        ours = Worktree(self._me.directory)
        if ours.is_set(SETTING) or ours.is_ignored():
            return False
        same = self._me.repository == other.repository
        return same or bool(ours.root_commits() & Worktree(other.directory).root_commits())
