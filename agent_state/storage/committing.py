"""Commits to the shared store as blocking functions: lock, look, plan, write, unlock.

A lock that is taken is never waited for here: it raises ``LockTimeoutError`` at once, and the
event loop tries again. Else those who wait could take up all threads, and whoever is to let
the lock go would find none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from agent_state.errors import Key, StateCorruptedError
from agent_state.protocols import Change
from agent_state.storage import intents, locks
from agent_state.storage.directory import StateDirectory, Stored
from agent_state.storage.planning import plan
from agent_state.storage.publishing import Staged, discard, publish, stage
from agent_state.storage.records import AppendDone, Done, PutDone

Job = tuple[Sequence[Change], frozenset[str]]
"""A commit's changes and the names of the locks they need."""
Committed = tuple[list[int], list[Done]]


class Committer:
    """Changes files under their locks. ``held``: the locks that this process keeps meanwhile."""

    def __init__(self, directory: StateDirectory, now: Callable[[], str]) -> None:
        self._directory = directory
        self._now = now
        self.held: dict[str, locks.FileLock] = {}

    def commit_all(self, jobs: Sequence[Job]) -> list[Committed | Exception]:
        """Each commit for itself, and what single documents need fsync for, together."""
        results: list[Committed | Exception] = []
        staged: dict[int, Staged] = {}
        with ExitStack() as held:
            try:
                for index, job in enumerate(jobs):
                    try:
                        committed, waiting = self._commit(held, job)
                    except Exception as error:  # noqa: BLE001  # that job's own; others go on
                        results.append(error)
                        continue
                    results.append(committed)
                    if waiting is not None:
                        staged[index] = waiting
            except BaseException:
                discard(staged.values())
                raise
            publish(self._directory, list(staged.values()))
            for index, document in staged.items():
                if document.error is not None:
                    results[index] = document.error
        return results

    def _commit(self, held: ExitStack, job: Job) -> tuple[Committed, Staged | None]:
        """Commit, or for a single document all but the last steps; then its lock stays held."""
        changes, names = job
        while True:
            with ExitStack() as stack:
                self.lock(stack, names)
                left = intents.touching(self._directory, names)
                if not left:
                    numbers, done = plan(changes, _OnDisk(self._directory), self._now())
                    waiting = None
                    if len(done) == 1 and isinstance(done[0], PutDone):
                        waiting = stage(self._directory, done[0])
                        held.push(stack.pop_all())
                    elif done:
                        self._apply(done)
                    return (numbers, done), waiting
            for intent in left:
                intents.complete(self._directory, intent, held=names & self.held.keys())

    def _apply(self, done: Sequence[Done]) -> None:
        if len(done) > 1:
            intents.apply_group(self._directory, done)
            return
        [change] = done
        if isinstance(change, AppendDone):
            log = self._directory.log(change.kind, change.key)
            self._directory.make_parent(log.path)
            log.append([change.record], sync=self._directory.sync)
        elif not isinstance(change, PutDone):
            self._directory.remove(change.kind, change.key)

    def lock(self, stack: ExitStack, names: Iterable[str]) -> None:
        """Take the locks that this process does not hold. Raises ``LockTimeoutError``."""
        for name in sorted(names):
            if name not in self.held:
                path = intents.lock_path(self._directory, name)
                stack.enter_context(locks.holding(path, 0.0))

    def take(self, name: str) -> locks.FileLock:
        """The lock, with nothing that a dead writer left half done behind it."""
        while True:
            lock = locks.acquire(intents.lock_path(self._directory, name), 0.0)
            try:
                left = intents.touching(self._directory, [name])
            except BaseException:
                lock.release()
                raise
            if not left:
                return lock
            lock.release()
            for intent in left:
                intents.complete(self._directory, intent)


class _OnDisk:
    """What the files hold, as the base of a commit. Called under the locks."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory

    def current(self, kind: str, key: Key) -> Stored | None:
        try:
            return self._directory.read(kind, key)
        except StateCorruptedError as error:
            return self._directory.contain(kind, key, error.message)

    def floor(self, kind: str, key: Key) -> int:
        return 0

    def last_seq(self, kind: str, key: Key) -> int:
        return self._directory.log(kind, key).tail().seq

    def find(self, kind: str, key: Key, dedupe_id: str) -> int | None:
        return self._directory.log(kind, key).find(dedupe_id)
