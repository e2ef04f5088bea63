"""The protocols that an application may implement, and the values that they exchange.

``StateStore`` keeps bytes, ``StateSerializer`` converts states to bytes, ``StateValidator`` checks
states, ``Mirror`` copies a store, ``Observer`` receives changes and ``Telemetry`` follows what
happens. ``docs/extending.md`` lists the
protocols of other modules, too.

A store knows nothing of agents. It keeps *documents* (one JSON object each, with a revision) and
*logs* (JSON objects appended one after another), each under a kind and a key.
``agent_state.testing.StateStoreContract`` expresses the docstrings of ``StateStore`` as tests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from agent_state.clock import Clock
from agent_state.errors import Key as Key
from agent_state.metrics import Metric

JsonObject = dict[str, Any]
Durability = Literal["fsync", "os"]
"""``fsync``: a change survives power loss. ``os``: it survives the end of the process."""
DocumentId = tuple[str, Key]
"""The kind and the key of a document or a log."""


@dataclass(frozen=True, slots=True)
class Document:
    """One version of a stored object."""

    kind: str
    key: Key
    body: bytes
    """Canonical JSON (compact, sorted keys), without the metadata below."""
    revision: int
    """The number of this version, from 1."""
    saved_at: str
    """The time of the save; empty if a person left it out."""
    schema: str
    """The schema and its version, such as ``agents/1``; empty if a person left it out."""
    edited: bool = False
    """The checksum does not match: a person, or another program, wrote this version."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line of a log."""

    seq: int
    """Its number. Numbers grow from 1; a gap is left only where an append failed."""
    body: bytes
    """Canonical JSON."""
    dedupe_key: str | None = None
    """The key that it was appended with."""


@dataclass(frozen=True, slots=True)
class Put:
    """Store ``body`` under the key."""

    kind: str
    key: Key
    body: bytes
    """Canonical JSON."""
    schema: str
    """The schema and its version, such as ``agents/1``."""
    expected: int | None = None
    """The revision that must be stored now; 0: nothing may be stored; None: any."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Further reserved keys, such as ``_session_id``."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the document; a no-op if it is not stored and ``expected`` does not require it."""

    kind: str
    key: Key
    expected: int | None = None
    """As in ``Put``."""


@dataclass(frozen=True, slots=True)
class Append:
    """Append one JSON object to the log."""

    kind: str
    key: Key
    body: bytes
    """Canonical JSON."""
    dedupe_key: str | None = None
    """If the log already has a record with this key, the change is a no-op."""
    expected: int | None = None
    """The number that the record must get; None: any."""


@dataclass(frozen=True, slots=True)
class Check:
    """Refuse the commit unless the document is stored at this revision. Writes nothing."""

    kind: str
    key: Key
    expected: int
    """The revision that must be stored now; 0: nothing may be stored."""


Change = Put | Delete | Append | Check


@dataclass(frozen=True, slots=True)
class Notice:
    """A document has changed. Several changes of one document may be reported as one."""

    kind: str
    key: Key
    revision: int | None
    """The revision now; None if the document was removed, 0 if the revision is unknown."""
    outside: bool = False
    """Another process, or a person, made the change."""


@dataclass(frozen=True, slots=True)
class Incident:
    """Damage, or an unusable document, that was found and contained."""

    what: str
    """The fault, for people."""
    kind: str | None = None
    """The kind of the document or log; None for other files."""
    key: Key | None = None
    """The key of the document or log."""
    path: str | None = None
    """The file, relative to the state directory."""
    kept: str | None = None
    """The file that the damaged bytes were moved to, relative to the state directory."""
    restored: bool = False
    """The newest good version that was kept has replaced the document, or it was deleted."""


@runtime_checkable
class NoticeStream(Protocol):
    """Notices, until ``aclose`` or until the store is closed."""

    def __aiter__(self) -> AsyncIterator[Notice]: ...
    async def __anext__(self) -> Notice: ...
    async def aclose(self) -> None: ...


@runtime_checkable
class StateStore(Protocol):
    """Keeps documents and logs. A change is durable when ``commit`` has returned.

    Bodies are bytes and belong to the store; every returned object is a value.
    """

    async def open(self) -> None:
        """Open the store; complete what a crash interrupted. A second call is a no-op."""

    async def close(self) -> None:
        """Flush, and release every lock. A second call is a no-op."""

    async def get(self, kind: str, key: Key) -> Document | None:
        """The newest version; None if it is not stored.

        Raises ``StateCorruptedError`` when it is unreadable; the damaged bytes were quarantined.
        """

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        """Make the changes atomically; returns a number for each, in order.

        For a put the new revision (the old one if nothing changed), for an append the sequence
        number, for a delete the revision removed (0 if nothing was stored), for a check the
        revision. Raises ``RevisionConflictError`` before anything is changed, also for the
        number of a record.
        """

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        """The sorted keys of the documents of a kind that are longer than ``prefix``."""

    def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        """Every document of the kind, in no order, read in batches.

        An unreadable one is quarantined, left out, and reported by ``incidents()``.
        """

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        """The sorted keys of the logs of a kind."""

    def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        """The records with ``seq > after`` in order; ``last``: only the last so many numbers.

        A log that does not exist has no records. An unreadable line is left out and reported by
        ``incidents()``.
        """

    async def watch(self) -> NoticeStream:
        """A stream of the changes made after this returns, by any process or person."""

    def lock(self, kind: str, key: Key) -> AbstractAsyncContextManager[None]:
        """Lock a document: every other ``lock`` and commit of it waits, in all processes.

        The holder's own commits go through. Raises ``LockTimeoutError``.
        """

    async def flush(self) -> None:
        """Write every acknowledged change to its final, readable place."""

    async def erase(self, kind: str, key: Key) -> int:
        """Remove a document and a log, all below the key, and every earlier version of them.

        Returns the number of documents and logs. Nothing restores them afterwards, and revisions
        and sequence numbers start from 1 again. After a crash a part may be left: call it again.
        Raises ``InvalidKeyError`` for an empty key, ``LockTimeoutError``, ``StorageError``.
        """

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        """Quarantine a document; returns the newest good version, which replaces it, if any.

        ``version``: the document that the caller refused. One that has replaced it stays, and is
        returned.
        """

    def incidents(self) -> list[Incident]:
        """The damage found and contained since the store was opened."""

    async def origin(self) -> Origin:
        """The identity and contents of its state directory, for a mirror; also before ``open``.

        An empty ``Origin`` for a store that has no directory.
        """


@dataclass(frozen=True, slots=True)
class Origin:
    """The identity of the store that a mirror copies, and facts that no listing shows."""

    instance: str | None = None
    """The id of the state directory; None when it has none yet."""
    kinds: tuple[str, ...] = ()
    """The kinds in the store."""
    quarantined: frozenset[tuple[str, Key]] = frozenset()
    """Damaged documents: the store does not have them, and no deletion removed them."""
    state_dir: str | None = None
    """The state directory; None for a store that has no directory."""
    exclusive: bool = False
    """Whether no other process can write to the store."""


@dataclass(frozen=True, slots=True)
class MirrorStatus:
    """The state of a mirror, and its counts since it was opened."""

    state: str
    """``starting``, ``following``, ``away``, ``full``, ``read-only``, ``refused``, ``failing``,
    ``collision`` or ``closed``; ``docs/redis.md`` explains each."""
    since: str
    """The time at which this state began."""
    waiting: int = 0
    """The number of documents and logs that have changed and are not copied yet."""
    lag: float = 0.0
    """The seconds that the oldest of them has waited."""
    sent: int = 0
    """The number of documents copied."""
    removed: int = 0
    """The number of documents and logs removed."""
    records: int = 0
    """The number of log records copied."""
    troubles: int = 0
    """The number of failures."""
    last_error: str | None = None
    """The latest failure."""
    last_error_at: str | None = None
    """The time of the latest failure."""
    refused: tuple[str, ...] = ()
    """Documents and logs that cannot be copied: another program's key, a truncated log."""
    kept: tuple[str, ...] = ()
    """Documents that are damaged here and whose last good version the mirror keeps."""


class BodySealer(Protocol):
    """Encrypts the bodies of documents and records, such as ``agent_state.encryption.Keyring``.

    Any thread may call it; ``ident``, ``prepare`` and ``load`` may block. Raises
    ``EncryptionKeyError`` when a key is wrong or missing, ``ErasedKeyError`` when it was erased.
    """

    @property
    def folder(self) -> str | None:
        """The folder of the keys, if they are in one; it is never inside a state directory."""

    @property
    def ident(self) -> str | None:
        """The id of the keys, which a store that they have sealed carries; None before any."""

    def prepare(self) -> str:
        """``ident``, after making the first key if there is none."""

    def seal(self, place: DocumentId, body: bytes, *, record: bool = False) -> bytes | None:
        """The sealed body, a JSON object; None if ``load`` must be called first.

        Equal bodies of one document give equal bytes; with ``record`` they differ.
        """

    def open(self, place: DocumentId, sealed: bytes, *, record: bool = False) -> bytes | None:
        """The body that was sealed; None if ``load`` must be called first.

        Raises ``StateCorruptedError`` when it is damaged, or another document's.
        """

    def place_of_record(self, log: DocumentId, dedupe_key: str | None) -> DocumentId:
        """The ``place`` of a record, which decides whose key seals it: in general its log's."""

    def load(self, place: DocumentId, sealed: bytes | None) -> None:
        """Load the key that opens ``sealed``; None: the one that seals, made if there is none."""


class DocumentCodec(Protocol):
    """The part of the manager's codec that a mirror needs."""

    def put(self, kind: str, key: Key, state: Mapping[str, Any], expected: int | None) -> Put:
        """The change that saves a state.

        Raises ``StateValidationError``, ``SerializationError``.
        """

    def check(self, document: Document) -> None:
        """Refuse a document that must not be used.

        Raises ``StateCorruptedError``, ``StateValidationError`` or ``SchemaTooNewError``.
        """


class Mirror(Protocol):
    """A copy of a store, kept elsewhere, that follows it and delays no save."""

    async def open(self, store: StateStore, origin: Origin, codec: DocumentCodec) -> None:
        """Begin to follow an open store. An unreachable mirror is not an error.

        ``codec`` checks what is restored, and writes the mirror's own state.

        Raises ``MirrorError`` when the mirror is the copy of another instance.
        """

    async def close(self) -> None:
        """Copy what waits, for a limited time; ``status`` reports the rest."""

    def changed(self, changes: Sequence[Change]) -> None:
        """Note changes that may have been made. Returns at once and raises nothing.

        A ``Check`` is not among them.
        """

    def erased(self, kind: str, key: Key) -> None:
        """Note that a key, with all below it, may be erased. Returns at once and raises nothing."""

    async def restore_document(self, kind: str, key: Key) -> Put | None:
        """The change that saves the mirrored version again, checked; None if the mirror has none.

        Raises ``MirrorError`` when the mirror cannot be asked.
        """

    async def restore_all(self, state_dir: str, codec: DocumentCodec) -> int:
        """Fill a directory that no store has open; returns the number of documents and logs.

        A document that ``codec`` refuses is left out. The directory becomes the instance whose
        copy this is. Raises ``MirrorError`` when the mirror cannot be asked.
        """

    def status(self) -> MirrorStatus:
        """The current status."""


@runtime_checkable
class DistributedStore(Protocol):
    """A store that several machines write; a ``StateStore`` with the clock that they share.

    A runtime on such a store takes its times from this clock.
    """

    clock: Clock
    """The time that the heartbeats of all machines are compared by."""


@runtime_checkable
class TrackedStore(Protocol):
    """A store whose files a version control system may track; a ``StateStore`` that knows of it."""

    async def is_removed(self, kind: str, key: Key) -> bool:
        """Whether the document's file was removed by git: it was deleted, and is not lost."""

    @property
    def is_merging(self) -> bool:
        """Whether ``check_merged`` may raise for any document, as far as was seen."""

    async def check_merged(self, kind: str, key: Key, *, reads: bool = False) -> None:
        """Raises ``UnmergedStateError`` while a merge of the document is not resolved.

        Also when it was resolved, and not read since, unless the caller ``reads`` it next.
        """


@runtime_checkable
class IndexedLogs(Protocol):
    """A store that finds records of long logs without reading these; a ``StateStore``, too."""

    async def keyed_records(self, kind: str, key: Key, prefix: str) -> list[LogRecord] | None:
        """The records of a log whose dedupe keys begin so, in order.

        None where only ``read_log`` tells: the log is short, for example, or has records without
        a dedupe key.
        """


class Observer(Protocol):
    """Receives every change, such as the recorder's ``RuntimeRecorder``."""

    def committed(self, changes: Sequence[Change], numbers: Sequence[int]) -> None:
        """Note changes that are durable, with the numbers that ``commit`` gave them, in order.

        A ``Check`` is not among them. Called on the event loop. Returns at once and raises nothing.
        """


class TracedTask(Protocol):
    """The fields of a ``Task`` that telemetry reads."""

    agent_id: str
    task_id: str
    name: str
    attempts: int
    trace: dict[str, str]


AttemptEnd = Callable[[str, BaseException | None], None]
"""Is told the status of the task after an attempt, and the error of a handler that failed."""


class Telemetry(Protocol):
    """Follows tasks, steps and saves as they happen, such as ``agent_state.telemetry``'s.

    Its methods, and the context managers that they return, are called on the event loop; they
    return at once and raise nothing but what the block raises.
    """

    def submitted(self, task: TracedTask) -> Mapping[str, str]:
        """Note a task that is about to be stored; returns the trace context to store with it."""

    def attempt(self, task: TracedTask, agent_type: str) -> AbstractContextManager[AttemptEnd]:
        """Surround an attempt, from the claim of the task until its outcome is stored."""

    def step(self, task: TracedTask, name: str) -> AbstractContextManager[None]:
        """Surround a step that runs, from its start until its outcome is stored."""

    def save(self, changes: Sequence[Change]) -> AbstractContextManager[None]:
        """Surround a save, until it is durable or has raised."""

    def sampled(self, metrics: Sequence[Metric]) -> None:
        """Take the figures of the runtime, a few times a minute."""


@runtime_checkable
class StateSerializer(Protocol):
    """Converts a state to the bytes of a JSON object and back, without loss."""

    def dumps(self, state: Mapping[str, Any]) -> bytes:
        """Canonical bytes: equal states give equal bytes.

        Raises ``SerializationError``, naming the field, for a value that ``loads`` would change.
        """

    def loads(self, data: bytes) -> JsonObject:
        """A new object that belongs to the caller. Raises ``StateCorruptedError``."""


@runtime_checkable
class StateValidator(Protocol):
    """Decides whether a state may be saved, and whether a stored state may be used."""

    def validate(self, kind: str, state: Mapping[str, Any]) -> object:
        """Check a state of this schema, before it is saved and after it is loaded.

        Raises ``StateValidationError``, naming the field. It may return the model that it built
        from ``state``; if that is the class ``load`` returns, it is not built a second time.
        Anything else that it returns, such as None, is ignored.
        """
