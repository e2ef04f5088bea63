"""The three seams: what stores bytes, what turns states into bytes, what checks them.

A store knows nothing of agents. It keeps *documents* (one JSON object each, with a
revision) and *logs* (JSON objects appended one after another), each under a kind and
a key. ``agent_state.testing.StateStoreContract`` says in tests what is said here in words.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from agent_state.clock import Clock
from agent_state.errors import Key as Key

JsonObject = dict[str, Any]
Durability = Literal["fsync", "os"]
"""``fsync``: a change survives power loss. ``os``: it survives the end of the process."""
DocumentId = tuple[str, Key]
"""A kind and a key: which document, or which log."""


@dataclass(frozen=True, slots=True)
class Document:
    """One stored object. ``body`` is canonical JSON (compact, sorted keys), without metadata."""

    kind: str
    key: Key
    body: bytes
    revision: int
    saved_at: str
    schema: str
    edited: bool = False
    """The checksum does not fit: a person, or another program, wrote this version."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line of a log. ``seq`` grows from 1, with a gap only where an append failed."""

    seq: int
    body: bytes
    dedupe_key: str | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """Store ``body`` under the key.

    ``expected``: the revision that must be stored now; 0 means nothing may be stored,
    None that any will do. ``meta`` holds further reserved keys, such as ``_session_id``.
    """

    kind: str
    key: Key
    body: bytes
    schema: str
    expected: int | None = None
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the document; if there is none, this is a no-op (unless ``expected`` asks for one)."""

    kind: str
    key: Key
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class Append:
    """Add one JSON object to the log; a ``dedupe_key`` that the log already holds is a no-op."""

    kind: str
    key: Key
    body: bytes
    dedupe_key: str | None = None


Change = Put | Delete | Append


@dataclass(frozen=True, slots=True)
class Notice:
    """A document is not what it was. ``revision`` is None when it is gone, 0 when not known.

    ``outside`` is True when another process or a person made the change. A notice says
    "look again", not what was written: several changes may come as one.
    """

    kind: str
    key: Key
    revision: int | None
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Incident:
    """Something a store found and contained: what, where, and what it did about it."""

    what: str
    kind: str | None = None
    key: Key | None = None
    path: str | None = None
    kept: str | None = None
    """Where the damaged bytes were put, relative to the state directory."""
    restored: bool = False
    """An earlier good version was brought back in its place."""


@runtime_checkable
class NoticeStream(Protocol):
    """Notices as they come, until ``aclose``; closing the store ends it too."""

    def __aiter__(self) -> AsyncIterator[Notice]: ...
    async def __anext__(self) -> Notice: ...
    async def aclose(self) -> None: ...


@runtime_checkable
class StateStore(Protocol):
    """Keeps documents and logs. What ``commit`` has returned for is durable.

    Bodies are bytes and belong to the store; every returned object is a value.
    """

    async def open(self) -> None:
        """Make the store ready; complete what a crash left half done. Twice is a no-op."""

    async def close(self) -> None:
        """Finish everything handed over and let go of locks. Twice is a no-op."""

    async def get(self, kind: str, key: Key) -> Document | None:
        """The newest version; None when there is none.

        Raises ``StateCorruptedError`` when it cannot be read; the damaged bytes were put aside.
        """

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        """Make all the changes or none; returns a number for each, in order.

        For a put the new revision (the old one when nothing changed), for an append the
        sequence number, for a delete the revision removed (0 when there was nothing).
        Raises ``RevisionConflictError`` before anything is changed.
        """

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        """The sorted keys of the documents of a kind that go on after ``prefix``."""

    def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        """Every document of the kind, in no order, read in batches.

        One that cannot be read is contained and left out; ``incidents()`` tells.
        """

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        """The sorted keys of the logs of a kind."""

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        """The records with ``seq > after`` in order; ``last``: only the last so many numbers.

        Nothing for a log that does not exist. A line that cannot be read is left out and
        told in ``incidents()``.
        """

    async def watch(self) -> NoticeStream:
        """Begin to watch: changes made after this has returned are told, whoever makes them."""

    def lock(self, kind: str, key: Key) -> AbstractAsyncContextManager[None]:
        """Keep every other ``lock`` of this document out, here and in other processes.

        Raises ``LockTimeoutError``. The holder's own commits go through.
        """

    async def flush(self) -> None:
        """Bring everything acknowledged to its final, readable place."""

    async def erase(self, kind: str, key: Key) -> int:
        """Remove a document and a log, everything below the key, and every earlier version kept.

        Returns how many documents and logs there were. When it has returned, nothing brings them
        back, and what is stored there next begins anew; cut short by a crash, it may have removed
        a part, and is to be called again. Raises ``InvalidKeyError`` for an empty key,
        ``LockTimeoutError``, ``StorageError``.
        """

    async def quarantine(self, kind: str, key: Key, reason: str) -> Document | None:
        """Put the stored document aside; returns the earlier good version brought back, if any."""

    def incidents(self) -> list[Incident]:
        """What was found and contained since the store was opened."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose copy a mirror keeps, and what a listing of the store does not say."""

    instance: str | None = None
    """The id of the state directory; None for a store that has no directory."""
    kinds: tuple[str, ...] = ()
    quarantined: frozenset[tuple[str, Key]] = frozenset()
    """Damaged documents: the store does not have them, and no deletion removed them."""


@dataclass(frozen=True, slots=True)
class MirrorStatus:
    """How far a mirror has come."""

    state: str
    """``starting``, ``following``, ``away``, ``full``, ``read-only``, ``refused``, ``failing``,
    ``collision`` or ``closed``; ``docs/redis.md`` says what each means."""
    since: str
    """When this state began."""
    waiting: int = 0
    """Documents and logs that have changed and are not there yet."""
    lag: float = 0.0
    """Seconds that the oldest of them has waited."""
    sent: int = 0
    removed: int = 0
    records: int = 0
    """Of logs."""
    troubles: int = 0
    """How often something went wrong."""
    last_error: str | None = None
    last_error_at: str | None = None
    refused: tuple[str, ...] = ()
    """What cannot be mirrored as it is: a key that is somebody else's, a log that got shorter."""
    kept: tuple[str, ...] = ()
    """Damaged documents, put aside here, whose last good version the mirror holds on to."""


class DocumentCodec(Protocol):
    """What a mirror needs of the codec of the manager whose store it follows."""

    def put(self, kind: str, key: Key, state: Mapping[str, Any], expected: int | None) -> Put:
        """The change that saves a state.

        Raises ``StateValidationError``, ``SerializationError``.
        """

    def check(self, document: Document) -> None:
        """Refuse a document that must not be used.

        Raises ``StateCorruptedError``, ``StateValidationError`` or ``SchemaTooNewError``.
        """


class Mirror(Protocol):
    """A copy of a store, kept somewhere else, that follows by itself and delays nobody."""

    async def open(self, store: StateStore, origin: Origin, codec: DocumentCodec) -> None:
        """Begin to follow an open store. An unreachable mirror is not an error.

        ``codec`` checks what is restored, and writes the mirror's own state.

        Raises ``MirrorError`` when what is there is the copy of another instance.
        """

    async def close(self) -> None:
        """Bring over what waits, for a limited time; ``status`` says what is left."""

    def changed(self, changes: Sequence[Change]) -> None:
        """These may have been made. Returns at once and raises nothing."""

    def erased(self, kind: str, key: Key) -> None:
        """This key may be gone, with all below it. Returns at once and raises nothing."""

    async def restore_document(self, kind: str, key: Key) -> Put | None:
        """The change that saves the mirrored version again, checked; None if there is no version.

        Raises ``MirrorError`` when the mirror cannot be asked.
        """

    async def restore_all(self, state_dir: str, codec: DocumentCodec) -> int:
        """Fill a directory that no store has open; returns the number of documents and logs.

        A document that ``codec`` refuses is left out. The directory becomes the instance whose
        copy this is. Raises ``MirrorError`` when the mirror cannot be asked.
        """

    def status(self) -> MirrorStatus:
        """Where it stands now."""


@runtime_checkable
class DistributedStore(Protocol):
    """A store that several machines write; a ``StateStore`` with the clock that they share.

    A runtime on such a store takes its times from this clock, and saves an agent only while it
    holds the agent's lease.
    """

    clock: Clock
    """The time that the leases of all machines are compared by."""


class Observer(Protocol):
    """Is told what was changed, such as the recorder's ``Narrator``."""

    def committed(self, changes: Sequence[Change], numbers: Sequence[int]) -> None:
        """These changes are durable, with the numbers ``commit`` gave them, in this order.

        Called on the event loop. Returns at once and raises nothing.
        """


@runtime_checkable
class StateSerializer(Protocol):
    """Turns a state into a JSON object's bytes and back, without losing anything silently."""

    def dumps(self, state: Mapping[str, Any]) -> bytes:
        """Canonical bytes: equal states give equal bytes.

        Raises ``SerializationError``, naming the field, for what ``loads`` could not give back.
        """

    def loads(self, data: bytes) -> JsonObject:
        """A new object that belongs to the caller. Raises ``StateCorruptedError``."""


@runtime_checkable
class StateValidator(Protocol):
    """Says whether a state may be stored, and whether what was stored may be used."""

    def validate(self, kind: str, state: Mapping[str, Any]) -> object:
        """Check a state of this schema, before it is saved and after it is loaded.

        Raises ``StateValidationError``, naming the field. It may return the model that it built
        from ``state``; if that is the class ``load`` returns, it is not built a second time.
        Anything else that it returns, such as None, is ignored.
        """
