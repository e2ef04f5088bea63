"""Group commit: the commits of many tasks in one call of one script, each atomic by itself.

One batch runs at a time. Batches are numbered, and Redis keeps the number and results of the last
one: a batch whose reply was lost may be sent again and gets the same reply, and a batch that a
stopped server reads from its socket later cannot replace a newer one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import NamedTuple

import orjson
from redis.exceptions import RedisError, ResponseError

from agent_state.clock import Clock, SystemClock
from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    LeaseLostError,
    RevisionConflictError,
    SchemaTooNewError,
    StorageError,
    StorageFullError,
)
from agent_state.protocols import Append, Change, Check, Delete, Notice, Put
from agent_state.redis.client import Argument, RedisLink, Script, failure_kind
from agent_state.redis.keys import StoreKeys, lock_of, text_of
from agent_state.storage.document import checksum
from agent_state.storage.executor import Batcher

WRITER_SECONDS = 86_400
"""How long Redis remembers the last batch of a store that sends no more."""
DELETED_SECONDS = 86_400
"""How long Redis remembers the revision of a deleted document; a new one counts on from there."""
NOTICES_KEPT = 2_000
"""How many batches' notices the stream keeps for watchers."""

_MAX_COMMITS = 128
_MAX_BYTES = 4 * 1024 * 1024
_COMMIT = Script.load("commit")


class ServerClock:
    """This host's clock, corrected by the server's, so that all hosts have one time.

    A reply proves that the server's clock showed its time between sending and receiving.
    The correction changes only as far as that requires, so a slow reply changes nothing.
    """

    def __init__(self, base: Clock | None = None) -> None:
        self._base: Clock = base or SystemClock()
        self._ahead = timedelta(0)

    def now(self) -> datetime:
        """The server's time; its error is at most that of the quickest reply since a jump."""
        return self._base.now() + self._ahead

    def monotonic(self) -> float:
        return self._base.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._base.sleep(seconds)

    def local(self) -> datetime:
        """This host's time, for ``learn``."""
        return self._base.now()

    def learn(self, sent: datetime, server_micros: int, received: datetime) -> None:
        """Use the server's time (microseconds since 1970) at a moment between two local times."""
        server = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=server_micros)
        self._ahead = min(max(self._ahead, server - received), server - sent)


class LockedError(AgentStateError):
    """Another process holds a lock that the commit has to wait for, ``seconds`` at most.

    The store sends the commit again.
    """

    def __init__(self, change: Change, seconds: float) -> None:
        super().__init__("another process holds the lock", kind=change.kind, key=change.key)
        self.change = change
        self.seconds = seconds


class TargetedChange(NamedTuple):
    """A change, and its document's key as text."""

    change: Change
    text: str

    @property
    def lock(self) -> str:
        """The name of the document's lock."""
        return lock_of(self.change.kind, self.text)


def targeted(change: Change) -> TargetedChange:
    """The change with its key as text. Raises ``InvalidKeyError``."""
    return TargetedChange(change, text_of(change.kind, change.key))


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """One commit, in the words of the script."""

    changes: Sequence[Change]
    keys: list[str]
    arguments: list[Argument]
    size: int


def encode_commit(
    targets: Sequence[TargetedChange], keys: StoreKeys, token: Callable[[str], str]
) -> CommitRequest:
    """``token`` gives the fencing token of a lock that the caller holds, by its name; else ""."""
    names: list[str] = []
    arguments: list[Argument] = [len(targets)]
    size = 0
    for change, text in targets:
        kind = change.kind
        lock = lock_of(kind, text)
        if isinstance(change, Append):
            names += (keys.log(kind, text), keys.dedupe(kind, text), keys.logs(kind))
            dedupe = "" if change.dedupe_key is None else f"={change.dedupe_key}"
            arguments += (lock, token(lock), "append", kind, text, change.body)
            expected = "" if change.expected is None else change.expected
            arguments += (checksum(change.body), dedupe, expected)
            size += len(change.body)
            continue
        names += (keys.document(kind, text), keys.index(kind))
        expected = "" if change.expected is None else change.expected
        if isinstance(change, Put):
            meta = orjson.dumps(change.meta, option=orjson.OPT_SORT_KEYS) if change.meta else b""
            arguments += (lock, token(lock), "put", kind, text, expected, change.body)
            arguments += (checksum(change.body), change.schema, meta)
            size += len(change.body)
        else:
            op = "check" if isinstance(change, Check) else "delete"
            arguments += (lock, token(lock), op, kind, text, expected)
    return CommitRequest([change for change, _ in targets], names, arguments, size)


class CommitQueue:
    """Sends commits in batches. ``notify`` gets the notice of each change that was made.

    ``clock`` learns the server's time from the replies. ``now`` gives the time to store, as text.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: StoreKeys,
        writer: str,
        clock: ServerClock | None,
        *,
        now: Callable[[], str],
        notify: Callable[[Notice], None],
        wait_replicas: int,
    ) -> None:
        self._link = link
        self._shared_keys = [keys.writer(writer), keys.notices, keys.kinds, keys.locks]
        self._writer = writer
        self._clock = clock
        self._now = now
        self._notify = notify
        self._wait: list[tuple[str, int, int]] = []
        if wait_replicas:
            # Well before the client gives up: Redis may be 100 ms late with its answer.
            self._wait = [("WAIT", wait_replicas, max(1, int(link.timeout_seconds * 500)))]
        self._numbers = count(1)
        self._batcher = Batcher[CommitRequest, list[int]](
            self._commit_batch,
            max_items=_MAX_COMMITS,
            max_bytes=_MAX_BYTES,
            size_of=lambda request: request.size,
        )
        self._last: asyncio.Future[list[int]] | None = None
        self._running: int | None = None
        self._finished = asyncio.Event()
        self._unknown: set[int] = set()

    def submit(self, request: CommitRequest) -> asyncio.Future[list[int]]:
        """Queue a commit; a caller that is cancelled waits for its outcome all the same."""
        self._last = self._batcher.submit(request)
        return self._last

    async def ended(self) -> None:
        """Wait for every commit that was submitted before this call."""
        if self._last is not None:
            await asyncio.wait([self._last])

    async def was_unknown(self, number: int) -> bool:
        """Whether the outcome of that batch was unknown, so that its notices were not given.

        Waits for a running batch; True once for each.
        """
        while self._running == number:
            await self._finished.wait()
        known = number not in self._unknown
        self._unknown.discard(number)
        return not known

    async def _commit_batch(self, batch: list[CommitRequest]) -> list[list[int] | Exception]:
        self._running = next(self._numbers)
        self._finished.clear()
        try:
            lines, doubt = await self._send(batch, self._running)
            return [
                self._outcome(request, line, doubt)
                for request, line in zip(batch, lines, strict=True)
            ]
        except StorageError as error:
            return [_about(error, request) for request in batch]
        finally:
            self._running = None
            self._finished.set()

    async def _send(
        self, batch: Sequence[CommitRequest], number: int
    ) -> tuple[list[str], StorageError | None]:
        """A line for each commit, and the error of those that replicas did not confirm."""
        keys = [*self._shared_keys]
        arguments: list[Argument] = [self._writer, number, WRITER_SECONDS, DELETED_SECONDS]
        arguments += (NOTICES_KEPT, self._now(), 1 if self._wait else 0)
        for request in batch:
            keys += request.keys
            arguments += request.arguments
        sent = self._clock.local() if self._clock else None
        try:
            reply, *confirmations = await self._link.exchange(
                [_COMMIT.call(keys, arguments), *self._wait], "committing"
            )
        except DurabilityUnknownError:
            self._unknown.add(number)
            raise
        if isinstance(reply, RedisError):
            raise self._link.error(reply, "committing") from reply
        micros, lines = reply
        if self._clock is not None and sent is not None:
            self._clock.learn(sent, int(micros), self._clock.local())
        doubt = None
        for confirmed, (_, wanted, _) in zip(confirmations, self._wait, strict=True):
            if not isinstance(confirmed, int) or confirmed < wanted:
                replicas = confirmed if isinstance(confirmed, int) else 0
                doubt = DurabilityUnknownError(
                    f"made, but confirmed by {replicas} of {wanted} replicas in time",
                    path=self._link.url,
                )
        return lines.decode().split("\n"), doubt

    def _outcome(
        self, request: CommitRequest, line: str, doubt: StorageError | None
    ) -> list[int] | Exception:
        word, *rest = line.split(" ", 2)
        if word != "ok":
            return self._refusal(request, word, rest)
        words = line.split(" ")[1:]
        for change, number in zip(request.changes, words, strict=True):
            notice = _notice_of(change, number)
            if notice is not None:
                self._notify(notice)
        if doubt is not None:
            return _about(doubt, request)
        return [int(number.removeprefix("=")) for number in words]

    def _refusal(self, request: CommitRequest, word: str, rest: Sequence[str]) -> Exception:
        change = request.changes[int(rest[0]) - 1]
        about = rest[1] if len(rest) > 1 else ""
        kind, key = change.kind, change.key
        if word == "conflict":
            return RevisionConflictError(
                expected=change.expected or 0,
                actual=int(about),
                kind=kind,
                key=key,
                path=self._link.url,
            )
        if word == "newer":
            return SchemaTooNewError(
                f"{about} is stored, and would be replaced", kind=kind, key=key
            )
        if word == "locked":
            return LockedError(change, int(about) / 1000)
        if word == "lost":
            return LeaseLostError(
                "the lock under which this was to be written has expired", kind=kind, key=key
            )
        full = failure_kind(ResponseError(about)) == "full"
        error = StorageFullError if full else StorageError
        return error(f"Redis refused it: {about}", kind=kind, key=key, path=self._link.url)


def _about(error: StorageError, request: CommitRequest) -> StorageError:
    """An error of the caller's own, about its first document."""
    change = request.changes[0]
    own = type(error)(error.message, kind=change.kind, key=change.key, path=error.path)
    own.__cause__ = error.__cause__ or error
    return own


def _notice_of(change: Change, number: str) -> Notice | None:
    if isinstance(change, Append | Check) or number.startswith("=") or number == "0":
        return None
    return Notice(change.kind, change.key, None if isinstance(change, Delete) else int(number))
