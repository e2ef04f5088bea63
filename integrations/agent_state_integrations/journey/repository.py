"""The documents and logs of sessions: find one, change one as a single commit."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar, cast

from agent_state.clock import Clock, IdFactory, instant, later, stamp
from agent_state.codec import Group
from agent_state.errors import (
    Key,
    RevisionConflictError,
    SessionClosedError,
    SessionExpiredError,
    StateNotFoundError,
)
from agent_state.manager import LogEntry, StatePersistenceManager
from agent_state.models import OpenModel
from agent_state.protocols import JsonObject
from agent_state.storage import MemoryStateStore
from agent_state_integrations.journey.models import KIND, JourneyState, fingerprint

T = TypeVar("T")

MAX_INDEXED_IDS = 200_000
_ATTEMPTS = 32


class SessionReader(Protocol):
    """The source of a cache: the stored documents."""

    @property
    def manager(self) -> StatePersistenceManager: ...
    @property
    def clock(self) -> Clock: ...


class ConversationCache(Protocol):
    """A copy of the live sessions elsewhere. It never delays or fails a change."""

    async def open(self, sessions: SessionReader) -> None:
        """Begin to follow the sessions. An unreachable server is not an error."""

    async def close(self) -> None:
        """Write the pending changes, for a limited time."""

    def changed(self, user_id: str, session_id: str) -> None:
        """Note that the session has changed. Returns at once and raises nothing."""

    async def forget(self, user_id: str, session_id: str) -> None:
        """Delete the copy of an erased session; returns after that, or after a limited time."""


@dataclass(slots=True)
class JourneyDraft:
    """A change of one session while it is made: its document, and what is committed with it."""

    key: Key
    state: JourneyState
    group: Group
    now: datetime
    new_id: IdFactory
    messages: dict[str, int] = field(default_factory=dict)
    """The position in the group of the change that stores the message with this id."""
    skip_commit: bool = False
    """Set it to commit nothing after all."""

    @property
    def time(self) -> str:
        """``now`` as it is stored."""
        return stamp(self.now)

    def append(self, log: str, record: OpenModel | Mapping[str, Any]) -> JsonObject:
        """Add a record to one of the session's logs; the record as it will be stored."""
        body = record.model_dump(warnings=False) if isinstance(record, OpenModel) else dict(record)
        self.group.append(KIND, (*self.key, log), body)
        if log == "messages":
            self.messages[body["message_id"]] = len(self.group.changes) - 1
        return body

    def record_event(self, event_type: str, **facts: object) -> JsonObject:
        """Add an event to the session's log; the record as it will be stored."""
        self.state.counters.events += 1
        return self.append("events", {"timestamp": self.time, "event_type": event_type, **facts})

    def new_citation_id(self) -> str:
        return f"if://citation/{self.new_id()}"

    def cite(
        self,
        kind: str,
        citation_id: str,
        record: Mapping[str, Any],
        evidence: Sequence[Mapping[str, Any]] = (),
        *,
        subject: str | None = None,
        content_hash: str | None = None,
    ) -> None:
        """Store a citation of a record.

        ``subject``: the log that contains the record; None stores the record in the citation.
        ``evidence``: the stored messages that it rests on. ``content_hash``: the hash of the
        cited text, where a text is cited.
        """
        body: JsonObject = {
            "citation_id": citation_id,
            "type": kind,
            "timestamp": self.time,
            "content_hash": content_hash or fingerprint(record),
            "status": "verified",
        }
        if subject is not None:
            body["subject"] = subject
        else:
            body["data"] = dict(record)
        if evidence:
            body["evidence"] = [
                {"message_id": message["message_id"], "sha256": fingerprint(message)}
                for message in evidence
            ]
        self.append("citations", body)
        self.state.counters.citations += 1


class _IndexedLog:
    __slots__ = ("last_seq", "numbers")

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.last_seq = 0


class MessageIndex:
    """The number of each message in its log, by its id.

    The first search in a session reads its log, later ones what was added since. The ids of the
    sessions that were searched last are kept, about ``max_ids`` in all.
    """

    def __init__(self, max_ids: int = MAX_INDEXED_IDS) -> None:
        self._max_ids = max_ids
        self._logs: OrderedDict[Key, _IndexedLog] = OrderedDict()

    async def find(
        self, files: StatePersistenceManager, key: Key, message_id: str, count: int
    ) -> int | None:
        """The number of the message in the log, which holds ``count`` messages or more."""
        log = self._logs.setdefault(key, _IndexedLog())
        self._logs.move_to_end(key)
        if message_id not in log.numbers and len(log.numbers) < count:
            async for entry in files.read_log(KIND, (*key, "messages"), after=log.last_seq):
                log.numbers[str(entry.record.get("message_id"))] = entry.seq
                log.last_seq = max(log.last_seq, entry.seq)
            self._evict()
        return log.numbers.get(message_id)

    def add(self, key: Key, message_id: str, seq: int) -> None:
        """Note a message that was stored, if the log is indexed up to it."""
        log = self._logs.get(key)
        if log is not None and log.last_seq == seq - 1:
            log.numbers[message_id] = log.last_seq = seq

    def discard(self, key: Key) -> None:
        """Forget the session."""
        self._logs.pop(key, None)

    def _evict(self) -> None:
        indexed = sum(len(log.numbers) for log in self._logs.values())
        while indexed > self._max_ids and len(self._logs) > 1:
            _, log = self._logs.popitem(last=False)
            indexed -= len(log.numbers)


class JourneyRepository:
    """Finds and changes the documents of sessions for ``ConversationStateManager`` and its parts.

    A session off the record is in a store in memory; every other one in ``manager``'s.
    """

    def __init__(
        self,
        manager: StatePersistenceManager,
        *,
        ttl_seconds: float,
        cache: ConversationCache | None,
        new_id: IdFactory | None,
    ) -> None:
        self.manager = manager
        self.clock = manager.clock
        self.ttl_seconds = ttl_seconds
        self.new_id = new_id or (lambda: str(uuid.uuid4()))
        self._cache = cache
        self._index = MessageIndex()
        self._in_memory = StatePersistenceManager(
            store=MemoryStateStore(clock=self.clock),
            clock=self.clock,
            serializer=manager.serializer,
            validator=manager.validator,
        )
        self._off_the_record: set[Key] = set()

    @property
    def managers(self) -> tuple[StatePersistenceManager, StatePersistenceManager]:
        """The manager of the stored sessions, and that of those off the record."""
        return self.manager, self._in_memory

    def is_off_the_record(self, key: Key) -> bool:
        return key in self._off_the_record

    def files(self, key: Key) -> StatePersistenceManager:
        """The manager of this session."""
        return self._in_memory if key in self._off_the_record else self.manager

    async def create(self, state: JourneyState, *, off_the_record: bool) -> None:
        """Store a new session."""
        key = (state.user_id, state.session_id)
        await (self._in_memory if off_the_record else self.manager).save(
            KIND, key, state, expected=0
        )
        if off_the_record:
            self._off_the_record.add(key)
        self._notify(key)

    async def find(self, user_id: str, session_id: str) -> JourneyState:
        """The session's document, even when it has ended. Raises ``StateNotFoundError``."""
        return (await self._stored((user_id, session_id)))[0]

    async def _stored(self, key: Key) -> tuple[JourneyState, int]:
        loaded = await self.files(key).load_with_revision(KIND, key)
        if loaded is None:
            raise StateNotFoundError("there is no such session", kind=KIND, key=key)
        return cast("JourneyState", loaded.state), loaded.revision

    async def log(
        self, key: Key, log: str, *, after: int = 0, last: int | None = None
    ) -> AsyncGenerator[LogEntry, None]:
        """The entries of one of the session's logs."""
        entries = self.files(key).read_log(KIND, (*key, log), after=after, last=last)
        async with aclosing(entries):
            async for entry in entries:
                yield entry

    async def find_message(
        self, key: Key, state: JourneyState, message_id: str
    ) -> JsonObject | None:
        """The stored record of the message; None when it does not exist."""
        seq = await self._index.find(self.files(key), key, message_id, state.counters.messages)
        if seq is None:
            return None
        async with aclosing(self.log(key, "messages", after=seq - 1)) as entries:
            async for entry in entries:
                return entry.record
        return None

    async def stored_message(self, draft: JourneyDraft, message_id: str) -> JsonObject:
        """The stored record of the message. Raises ``StateNotFoundError``."""
        found = await self.find_message(draft.key, draft.state, message_id)
        if found is None:
            raise StateNotFoundError(
                f"there is no message {message_id!r:.80}", kind=KIND, key=draft.key
            )
        return found

    async def message_number(self, key: Key, state: JourneyState, message_id: str) -> int | None:
        """The number of the message in the conversation; None when it does not exist."""
        return await self._index.find(self.files(key), key, message_id, state.counters.messages)

    async def shift_until(self, draft: JourneyDraft, cause: JsonObject) -> str | None:
        """The latest change of the emotion, as ``from:to``, until a stored message."""
        state, message_id = draft.state, str(cause["message_id"])
        if state.last_message is not None and state.last_message.message_id == message_id:
            return state.last_shift
        until = await self.message_number(draft.key, state, message_id) or 0
        shift = None
        async with aclosing(self.log(draft.key, "emotions")) as entries:
            async for entry in entries:
                step = entry.record
                by = step.get("message_id")
                if by is None:
                    early = str(step.get("timestamp")) <= str(cause.get("timestamp"))
                else:
                    early = (await self.message_number(draft.key, state, str(by)) or 0) <= until
                if early and step.get("from_emotion") != step.get("to_emotion"):
                    shift = f"{step.get('from_emotion')}:{step.get('to_emotion')}"
        return shift

    async def change(
        self,
        user_id: str,
        session_id: str,
        work: Callable[[JourneyDraft], Awaitable[T]],
        *,
        check: bool = True,
        renews: bool = True,
    ) -> T:
        """Change one session as one commit; the value that ``work`` returns.

        ``work`` runs again from the start when another writer commits first. ``check``: refuse a
        session that has ended. ``renews``: its expiry counts from now on. Raises
        ``StateNotFoundError``, ``SessionExpiredError``, ``SessionClosedError``, and what ``work``
        and the store raise; then nothing has changed.
        """
        key = (user_id, session_id)
        try:
            return await self._attempt(key, work, check=check, renews=renews)
        except RevisionConflictError:
            pass
        async with self.files(key).lock(KIND, key):
            for _ in range(_ATTEMPTS):
                try:
                    return await self._attempt(key, work, check=check, renews=renews)
                except RevisionConflictError:
                    continue  # a writer that takes no lock
            return await self._attempt(key, work, check=check, renews=renews)

    async def _attempt(
        self,
        key: Key,
        work: Callable[[JourneyDraft], Awaitable[T]],
        *,
        check: bool,
        renews: bool,
    ) -> T:
        files = self.files(key)
        state, revision = await self._stored(key)
        now = self.clock.now()
        if check:
            check_alive(state, now)
        draft = JourneyDraft(key, state, files.new_group(), now, self.new_id)
        result = await work(draft)
        if draft.skip_commit:
            return result
        if renews:
            _renew(state, now, self.ttl_seconds)
        draft.group.save(KIND, key, state, expected=revision)
        numbers = await files.commit(draft.group)
        for message_id, position in draft.messages.items():
            self._index.add(key, message_id, numbers[position])
        self._notify(key)
        return result

    async def erase(self, key: Key) -> int:
        """Erase the session with every earlier version; the number of documents and logs."""
        erased = await self.files(key).erase(KIND, key)
        self._off_the_record.discard(key)
        self._index.discard(key)
        if self._cache is not None:
            await self._cache.forget(*key)
        return erased

    def _notify(self, key: Key) -> None:
        if self._cache is not None and key not in self._off_the_record:
            self._cache.changed(*key)


def check_alive(state: JourneyState, now: datetime) -> None:
    """Raise ``SessionClosedError`` or ``SessionExpiredError`` for a session that has ended."""
    key = (state.user_id, state.session_id)
    if is_expired(state, now):
        raise SessionExpiredError(f"the session expired at {state.expires_at}", kind=KIND, key=key)
    if state.status == "closed":
        raise SessionClosedError(f"the session was closed at {state.closed_at}", kind=KIND, key=key)


def is_expired(state: JourneyState, now: datetime) -> bool:
    """Whether the session's time is over."""
    return instant(state.expires_at) <= now


def _renew(state: JourneyState, now: datetime, seconds: float) -> None:
    """Let the expiry count from now on; a clock that went back does not shorten it."""
    state.last_updated = max(state.last_updated, stamp(now))
    state.expires_at = max(state.expires_at, stamp(later(now, seconds)))
