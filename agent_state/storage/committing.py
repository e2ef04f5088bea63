"""Commits to the shared store as blocking functions: lock, look, plan, write, unlock.

A lock that is taken is never waited for here: it raises ``LockTimeoutError`` at once, and the
event loop tries again. Else those who wait could take up all threads, and whoever is to let
the lock go would find none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from agent_state.errors import AgentStateError, Key, StateCorruptedError
from agent_state.protocols import Append, Change
from agent_state.storage import intents, locks, paths
from agent_state.storage.directory import LookedAt, StateDirectory, Stored
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
        while True:
            with ExitStack() as stack:
                refused = [self._lock_job(stack, names) for _, names in jobs]
                locked = {
                    name
                    for (_, names), refusal in zip(jobs, refused, strict=True)
                    if refusal is None
                    for name in names
                }
                left = intents.touching(self._directory, locked)
                if not left:
                    return self._write_all(jobs, refused)
            for intent in left:
                intents.complete(self._directory, intent, held=locked & self.held.keys())

    def _lock_job(self, stack: ExitStack, names: Iterable[str]) -> Exception | None:
        try:
            self.lock(stack, names)
        except AgentStateError as error:
            return error
        return None

    def _write_all(
        self, jobs: Sequence[Job], refused: Sequence[Exception | None]
    ) -> list[Committed | Exception]:
        results: list[Committed | Exception] = []
        staged: dict[int, Staged] = {}
        try:
            for index, ((changes, _), refusal) in enumerate(zip(jobs, refused, strict=True)):
                if refusal is not None:
                    results.append(refusal)
                    continue
                try:
                    base = _OnDisk(self._directory)
                    numbers, done = plan(changes, base, self._now())
                    self._confirm(changes, done)
                    if len(done) == 1 and isinstance(done[0], PutDone):
                        staged[index] = stage(self._directory, done[0], base.looked_at)
                    elif done:
                        self._apply(done, base.looked_at)
                    results.append((numbers, done))
                except Exception as error:  # noqa: BLE001  # that job's own; the others go on
                    results.append(error)
        except BaseException:
            discard(staged.values())
            raise
        publish(self._directory, list(staged.values()))
        for index, document in staged.items():
            if document.error is not None:
                results[index] = document.error
        return results

    def _confirm(self, changes: Sequence[Change], done: Sequence[Done]) -> None:
        """What is found done already is made durable: an earlier try may not have come so far."""
        if len(done) < len(changes):
            to_do = {intents.place_of(change) for change in done}
            for change in changes:
                if (change.kind, change.key) not in to_do:
                    ending = paths.LOG if isinstance(change, Append) else paths.DOCUMENT
                    self._directory.confirm(change.kind, change.key, ending)

    def _apply(self, done: Sequence[Done], looked_at: LookedAt) -> None:
        if len(done) > 1:
            intents.apply_group(self._directory, done, looked_at)
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
                stack.callback(intents.take_lock(self._directory, name).release)

    def hold(self, name: str) -> None:
        """Take the lock and keep it, until it is taken out of ``held`` and released."""
        self.held[name] = self._take(name)

    def let_go(self) -> None:
        """Release what is still held: nobody can write any more."""
        while self.held:
            self.held.popitem()[1].release()

    def _take(self, name: str) -> locks.FileLock:
        """The lock, with nothing that a dead writer left half done behind it."""
        while True:
            lock = intents.take_lock(self._directory, name)
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
        self.looked_at: LookedAt = {}

    def current(self, kind: str, key: Key) -> Stored | None:
        try:
            stored = self._directory.read(kind, key)
        except StateCorruptedError as error:
            stored = self._directory.contain(kind, key, error.message)
        self.looked_at[kind, key] = stored.stamp if stored is not None else None
        return stored

    def floor(self, kind: str, key: Key) -> int:
        return 0

    def last_seq(self, kind: str, key: Key) -> int:
        return self._directory.log(kind, key).tail().seq

    def find(self, kind: str, key: Key, dedupe_key: str) -> int | None:
        return self._directory.log(kind, key).find(dedupe_key)
