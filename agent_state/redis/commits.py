"""Group commit: the commits of many tasks in one call of one script, each of them by itself.

One batch is under way at a time, and each has a number, of which Redis keeps the last with its
results. So a batch whose reply was lost may be sent again and is answered as the first time, and
one that a stopped server finds in its socket later can not land on top of a newer one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import orjson

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    LeaseLostError,
    RevisionConflictError,
    SchemaTooNewError,
    StorageError,
    StorageFullError,
)
from agent_state.protocols import Append, Change, Delete, Notice, Put
from agent_state.redis.keys import Names, place_of, text_of
from agent_state.redis.link import Argument, Link, call
from agent_state.redis.scripts import COMMIT
from agent_state.redis.timing import ServerClock
from agent_state.storage.document import checksum
from agent_state.storage.executor import UncancellableFuture

WRITER_SECONDS = 86_400
"""How long the last batch of a store that is silent is remembered."""
DELETED_SECONDS = 86_400
"""How long the revision of a deleted document is, so that a new one counts on from there."""
NOTICES = 2_000
"""How many batches' notices are kept for those who watch."""

_MOST_COMMITS = 128
_MOST_BYTES = 4 * 1024 * 1024


class Locked(Exception):
    """Another process holds a lock that the commit has to wait for, for so long at most.

    No failure: the commit is sent again.
    """

    def __init__(self, change: Change, seconds: float) -> None:
        self.change = change
        self.seconds = seconds


@dataclass(slots=True)
class Job:
    """One commit, in the words of the script."""

    changes: Sequence[Change]
    keys: list[str]
    arguments: list[Argument]
    size: int
    outcome: UncancellableFuture[list[int]]


class Target(NamedTuple):
    """A change, and the key it is about as text."""

    change: Change
    text: str

    @property
    def place(self) -> str:
        """The name of its lock."""
        return place_of(self.change.kind, self.text)


def target(change: Change) -> Target:
    """Raises ``InvalidKeyError``."""
    return Target(change, text_of(change.kind, change.key))


def job_of(targets: Sequence[Target], names: Names, held: Callable[[str], str]) -> Job:
    """``held`` gives the value of a lock that the caller holds, by its name; "" for none."""
    keys: list[str] = []
    arguments: list[Argument] = [len(targets)]
    size = 0
    for change, text in targets:
        kind = change.kind
        place = place_of(kind, text)
        if isinstance(change, Put):
            keys += (names.document(kind, text), names.index(kind))
            expected = "" if change.expected is None else change.expected
            meta = orjson.dumps(change.meta, option=orjson.OPT_SORT_KEYS) if change.meta else b""
            arguments += (place, held(place), "put", kind, text, expected, change.body)
            arguments += (checksum(change.body), change.schema, meta)
            size += len(change.body)
        elif isinstance(change, Delete):
            keys += (names.document(kind, text), names.index(kind))
            expected = "" if change.expected is None else change.expected
            arguments += (place, held(place), "delete", kind, text, expected)
        else:
            keys += (names.log(kind, text), names.dedupe(kind, text), names.logs(kind))
            dedupe = "" if change.dedupe_key is None else f"={change.dedupe_key}"
            arguments += (place, held(place), "append", kind, text, change.body)
            arguments += (checksum(change.body), dedupe)
            size += len(change.body)
    outcome: UncancellableFuture[list[int]] = UncancellableFuture(loop=asyncio.get_running_loop())
    return Job([change for change, _ in targets], keys, arguments, size, outcome)


class Commits:
    """Sends what is ready. ``tell`` gets the notice of each change once it is made."""

    def __init__(
        self,
        link: Link,
        names: Names,
        writer: str,
        clock: ServerClock | None,
        *,
        now: Callable[[], str],
        tell: Callable[[Notice], None],
        wait_replicas: int,
    ) -> None:
        self._link = link
        self._shared_keys = [names.writer(writer), names.notices, names.kinds, names.locks]
        self.writer = writer
        self._clock = clock
        self._now = now
        self._tell = tell
        self._wait: list[tuple[str, int, int]] = []
        if wait_replicas:
            # Well before the client gives up: Redis may be 100 ms late with its answer.
            self._wait = [("WAIT", wait_replicas, max(1, int(link.timeout * 500)))]
        self._numbers = count(1)
        self._queue: list[Job] = []
        self._running: asyncio.Task[None] | None = None
        self._fsync_failed: set[int] = set()
        self._under_way: int | None = None
        self._settled = asyncio.Event()

    def submit(self, job: Job) -> UncancellableFuture[list[int]]:
        """Queue a commit; its outcome is awaited, also by a caller who is cancelled."""
        self._queue.append(job)
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="agent-state redis commits")
        return job.outcome

    async def ended(self) -> None:
        """Wait for everything that was submitted until now."""
        last = self._queue[-1].outcome if self._queue else None
        if last is not None:
            await asyncio.wait([last])
        elif self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        try:
            while self._queue:
                batch = self._next_batch()
                self._under_way = next(self._numbers)
                self._settled.clear()
                try:
                    lines, doubt = await self._send(batch, self._under_way)
                except Exception as error:  # noqa: BLE001  # carried to whoever awaits
                    for job in batch:
                        job.outcome.fail(_own(error, job))
                else:
                    for job, line in zip(batch, lines, strict=True):
                        self._settle(job, line, doubt)
                self._under_way = None
                self._settled.set()
        finally:
            self._running = None

    def _next_batch(self) -> list[Job]:
        size = number = 0
        for job in self._queue[:_MOST_COMMITS]:
            size += job.size
            if number and size > _MOST_BYTES:
                break
            number += 1
        batch, self._queue = self._queue[:number], self._queue[number:]
        return batch

    async def was_doubtful(self, number: int) -> bool:
        """Whether nobody was told of that batch, as its outcome is not known; asked once."""
        while self._under_way == number:
            await self._settled.wait()
        try:
            self._fsync_failed.remove(number)
        except KeyError:
            return False
        return True

    async def _send(
        self, batch: Sequence[Job], number: int
    ) -> tuple[list[str], StorageError | None]:
        """A line for each job, and what makes the good ones among them fsync_failed."""
        keys = [*self._shared_keys]
        arguments: list[Argument] = [self.writer, number, WRITER_SECONDS, DELETED_SECONDS]
        arguments += (NOTICES, self._now(), 1 if self._wait else 0)
        for job in batch:
            keys += job.keys
            arguments += job.arguments
        sent = self._clock.local() if self._clock else None
        try:
            replies = await self._link.exchange(
                [call(COMMIT, keys, arguments), *self._wait], "committing"
            )
        except DurabilityUnknownError:
            self._fsync_failed.add(number)
            raise
        if isinstance(replies[0], Exception):
            raise self._link.error(replies[0], "committing")
        micros, lines = replies[0]
        if self._clock is not None and sent is not None:
            self._clock.learn(sent, int(micros), self._clock.local())
        if self._wait and not (isinstance(replies[1], int) and replies[1] >= self._wait[0][1]):
            confirmed = 0 if isinstance(replies[1], Exception) else replies[1]
            doubt = DurabilityUnknownError(
                f"made, but confirmed by {confirmed} of {self._wait[0][1]} replicas in time",
                path=self._link.url,
            )
            return lines.decode().split("\n"), doubt
        return lines.decode().split("\n"), None

    def _settle(self, job: Job, line: str, doubt: StorageError | None) -> None:
        word, *rest = line.split(" ", 2)
        if word != "ok":
            job.outcome.fail(self._refusal(job, word, rest))
            return
        words = line.split(" ")[1:]
        for change, number in zip(job.changes, words, strict=True):
            notice = _notice_of(change, number)
            if notice is not None:
                self._tell(notice)
        if doubt is not None:
            job.outcome.fail(_own(doubt, job))
        else:
            job.outcome.set_result([int(number.removeprefix("=")) for number in words])

    def _refusal(self, job: Job, word: str, rest: Sequence[str]) -> Exception:
        change = job.changes[int(rest[0]) - 1]
        about = rest[1] if len(rest) > 1 else ""
        kind, key = change.kind, change.key
        if word == "conflict":
            expected = 0 if isinstance(change, Append) else change.expected or 0
            return RevisionConflictError(
                expected=expected, actual=int(about), kind=kind, key=key, path=self._link.url
            )
        if word == "newer":
            return SchemaTooNewError(
                f"{about} is stored, and would be replaced", kind=kind, key=key
            )
        if word == "locked":
            return Locked(change, int(about) / 1000)
        if word == "lost":
            return LeaseLostError(
                "the lock under which this was to be written has expired", kind=kind, key=key
            )
        cls = StorageFullError if "OOM" in about or "No space left" in about else StorageError
        return cls(f"Redis refused it: {about}", kind=kind, key=key, path=self._link.url)


def _own(error: Exception, job: Job) -> Exception:
    """Each caller gets an error of its own, about its own document."""
    if not isinstance(error, StorageError):
        return error
    kind: str = job.changes[0].kind
    key: Key = job.changes[0].key
    own: AgentStateError = type(error)(error.message, kind=kind, key=key, path=error.path)
    own.__cause__ = error.__cause__ or error
    return own


def _notice_of(change: Change, number: str) -> Notice | None:
    if isinstance(change, Append) or number.startswith("=") or number == "0":
        return None
    return Notice(change.kind, change.key, None if isinstance(change, Delete) else int(number))
