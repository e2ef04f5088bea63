"""States by name and by key: checked when they are saved and when they are loaded."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import compress
from os import PathLike
from time import perf_counter
from typing import Any, Self, TypeVar, cast

from agent_state.agent_documents import AgentDocuments
from agent_state.cleanup import CleanupReport, clean
from agent_state.clock import Clock, SystemClock, check_count, sort_text
from agent_state.codec import Codec, Group, State, StoredState, as_key
from agent_state.collection import (
    MAILBOX,
    TASK_QUEUE,
    Collection,
    join_collection,
    split_collection,
)
from agent_state.conversation_log import whole_put
from agent_state.errors import (
    AgentStateError,
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    StateValidationError,
    StorageError,
)
from agent_state.metrics import JournalLag, SaveStatistics
from agent_state.models import (
    AgentState,
    MailboxState,
    OpenModel,
    SleepState,
    SystemState,
    TaskQueueState,
)
from agent_state.preconditions import commit_checked, is_required
from agent_state.protocols import (
    BodySealer,
    Change,
    Check,
    Delete,
    Document,
    DocumentCodec,
    Durability,
    Incident,
    IndexedLogs,
    JsonObject,
    LogRecord,
    Mirror,
    Notice,
    NoticeStream,
    Observer,
    Put,
    StateSerializer,
    StateStore,
    StateValidator,
    Telemetry,
    TrackedStore,
)
from agent_state.storage import FileStateStore, ReadOnlyStateStore, WALStateStore
from agent_state.storage.mirrored_store import MirroredStateStore
from agent_state.storage.sealed_store import SealedCodec, SealedStateStore, refuse_encrypted

T = TypeVar("T")

_logger = logging.getLogger("agent_state.manager")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One record of a log."""

    seq: int
    """Its number, from 1."""
    record: JsonObject
    """The record; it belongs to the caller."""
    dedupe_key: str | None = None
    """The key that it was appended with."""


class StatePersistenceManager:
    """Saves and loads the states of agents, their tasks, sleep and mail, and of the system.

    ``state_dir``: the directory of the files; None for ``"state"``. ``exclusive``: no other
    process writes there, which is many times faster; otherwise any number of processes may.
    ``durability``: ``"fsync"``, the default (a state that ``save`` has returned for survives a
    power loss) or ``"os"`` (it survives the process). ``store`` replaces the files: these three
    arguments belong to the store, and may not be given with it.

    ``serializer`` and ``validator``: see ``docs/extending.md``. ``mirror`` keeps a copy elsewhere
    and delays no save, such as ``agent_state.redis.RedisMirror``. With ``mirror_restores`` a
    damaged document, or an empty directory, is restored from it. ``observer`` receives every
    change once it is durable, ``telemetry`` surrounds every save. ``encryption`` seals what is
    stored, such as an ``agent_state.encryption.Keyring``; its keys may not be in the state
    directory. ``history_window``: how many messages of a conversation that is in a log are loaded
    with an agent, the last ones (None for all, and with a ``serializer`` of one's own); a save
    leaves those before as they are, and ``read_history`` reads them. ``clock``: the time of the
    stamps; None for the system's.

    Use it with ``async with``, or between ``open`` and ``close``. Raises ``TypeError`` for
    arguments that contradict one another, and ``ValueError`` for an unknown ``durability`` and for
    a ``history_window`` of less than one message.
    """

    def __init__(
        self,
        state_dir: str | PathLike[str] | None = None,
        *,
        exclusive: bool = False,
        durability: Durability | None = None,
        serializer: StateSerializer | None = None,
        validator: StateValidator | None = None,
        store: StateStore | None = None,
        mirror: Mirror | None = None,
        mirror_restores: bool = False,
        observer: Observer | None = None,
        telemetry: Telemetry | None = None,
        encryption: BodySealer | None = None,
        history_window: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        if history_window is not None:
            check_count("history_window", history_window, 1)
        if mirror_restores and mirror is None:
            raise TypeError("mirror_restores= needs a mirror=")
        self.clock: Clock = clock or SystemClock()
        """The clock of the stamps."""
        self._observer = observer
        self._telemetry = telemetry
        self.saves = SaveStatistics()
        """How long saves took, and how many raised."""
        self._codec = Codec(serializer, validator)
        self.encryption = encryption
        """What seals the bodies; None without encryption."""
        stored: DocumentCodec = self._codec
        if encryption is not None:
            stored = SealedCodec(self._codec, encryption)
        if store is not None:
            given = {"state_dir": state_dir, "exclusive": exclusive or None}
            given["durability"] = durability
            names = [f"{name}=" for name, value in given.items() if value is not None]
            if names:
                raise TypeError(f"{', '.join(names)} and store= contradict one another")
            self.store: StateStore = store
            """The store, which holds the documents and logs."""
        elif exclusive:
            self.store = WALStateStore(
                "state" if state_dir is None else state_dir,
                durability=durability or "fsync",
                clock=self.clock,
                accept=stored.check,
            )
        else:
            self.store = FileStateStore(
                "state" if state_dir is None else state_dir,
                durability=durability or "fsync",
                clock=self.clock,
            )
        self.state_dir: str | None = getattr(self.store, "root", None)
        """The directory of the files; None for a store without one."""
        self.mirror = mirror
        """The mirror, if there is one."""
        if mirror is not None:
            self.store = MirroredStateStore(self.store, mirror, stored, restores=mirror_restores)
        if encryption is not None:
            _refuse_inside(encryption.folder, self.state_dir)
            marks = not isinstance(self.store, ReadOnlyStateStore)
            self.store = SealedStateStore(self.store, encryption, marks=marks)
        self.history_window = history_window if self._codec.splits else None
        """How many messages of a conversation in a log are loaded with an agent; None for all."""
        self._agent_documents = AgentDocuments(self.store, self.clock, window=self.history_window)
        self._tracked = self.store if isinstance(self.store, TrackedStore) else None
        self._unusable: list[Incident] = []

    @property
    def serializer(self) -> StateSerializer:
        """The serializer of every state and record."""
        return self._codec.serializer

    @property
    def validator(self) -> StateValidator:
        """The validator of every state."""
        return self._codec.validator

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Open the store; complete what a crash interrupted. A second call is a no-op.

        Raises ``EncryptionKeyError`` when the state is encrypted, and not with these keys.
        """
        await self.store.open()
        if self.encryption is None and not isinstance(self.store, SealedStateStore):
            try:
                await refuse_encrypted(self.store)
            except BaseException:
                await self.store.close()
                raise

    async def close(self) -> None:
        """Flush, and release the directory. A second call is a no-op."""
        await self._agent_documents.close()
        await self.store.close()

    async def flush(self) -> None:
        """Write every acknowledged change to its readable file, durably."""
        await self.store.flush()

    # -- by name ---------------------------------------------------------------------------

    async def save_agent_state(self, agent_id: str, state: AgentState | Mapping[str, Any]) -> int:
        """Save an agent; its new revision. Raises as ``save``."""
        change = self._codec.put("agents", (agent_id,), state, None)
        return (await self._commit([change]))[0]

    async def load_agent_state(self, agent_id: str) -> AgentState | None:
        """The agent; None if it is not stored. Raises as ``load``."""
        return cast("AgentState | None", await self.load("agents", agent_id))

    async def read_history(self, agent_id: str, *, start: int = 0) -> AsyncGenerator[Any, None]:
        """All messages of an agent's conversation behind the first ``start``, the oldest first.

        They are read from the log piece by piece; there are none for an agent that is not stored.
        Raises ``StateCorruptedError``, and ``StateValidationError`` for a ``start`` below 0.
        """
        check_count("start", start)
        async for message in self._agent_documents.history(agent_id, start):
            yield message

    async def save_sleep_state(self, agent_id: str, state: SleepState | Mapping[str, Any]) -> int:
        """Save the sleep of an agent; its new revision."""
        return await self.save("sleep", agent_id, state)

    async def load_sleep_state(self, agent_id: str) -> SleepState | None:
        """The sleep of an agent; None if it is not stored."""
        return cast("SleepState | None", await self.load("sleep", agent_id))

    async def save_system_state(self, name: str, state: SystemState | Mapping[str, Any]) -> int:
        """Save data of the system, under a name; its new revision."""
        return await self.save("system", name, state)

    async def load_system_state(self, name: str) -> SystemState | None:
        """The data of the system under a name; None if it is not stored."""
        return cast("SystemState | None", await self.load("system", name))

    async def save_task_queue_state(
        self, agent_id: str, state: TaskQueueState | Mapping[str, Any]
    ) -> None:
        """Save all tasks of an agent atomically; stored tasks that are not in it are removed."""
        await self._save_collection(TASK_QUEUE, agent_id, state)

    async def load_task_queue_state(self, agent_id: str) -> TaskQueueState | None:
        """All tasks of an agent; None if it has no queue and no task."""
        return cast("TaskQueueState | None", await self._load_collection(TASK_QUEUE, agent_id))

    async def save_mailbox_state(
        self, agent_id: str, state: MailboxState | Mapping[str, Any]
    ) -> None:
        """Save all mail of an agent atomically; stored mail that is not in it is removed."""
        await self._save_collection(MAILBOX, agent_id, state)

    async def load_mailbox_state(self, agent_id: str) -> MailboxState | None:
        """All mail of an agent; None if it has no mailbox and no mail."""
        return cast("MailboxState | None", await self._load_collection(MAILBOX, agent_id))

    async def list_persisted_agents(self) -> list[str]:
        """The ids of all stored agents, sorted."""
        return [key[0] for key in await self.keys("agents") if len(key) == 1]

    # -- by kind and key -------------------------------------------------------------------

    async def save(
        self, kind: str, key: Key | str, state: State, *, expected: int | None = None
    ) -> int:
        """Save a state as it is now; its new revision, or the old one if nothing changed.

        ``expected``: the revision that must be stored (0: nothing may be stored; None: any).
        Raises ``SerializationError``, ``StateValidationError``, ``RevisionConflictError``,
        ``LockTimeoutError`` or ``StorageError``; then nothing has changed.
        """
        [number] = await self._commit([self._codec.put(kind, as_key(key), state, expected)])
        return number

    async def load_with_revision(self, kind: str, key: Key | str) -> StoredState | None:
        """The state with its revision and time; None if it is not stored.

        A stored version that is unreadable or invalid is quarantined, and the newest good
        version that is kept replaces it. Raises ``StateCorruptedError`` if no good version is
        kept, and ``SchemaTooNewError``, which leaves the document where it is.
        """
        key = as_key(key)
        document = await self.document(kind, key)
        if document is None:
            return None
        return await self._usable(document, self._codec.load)

    async def document(self, kind: str, key: Key | str) -> Document | None:
        """The stored version, not decoded; an agent's has its conversation. None for none.

        Raises as ``StateStore.get``.
        """
        return await self._agent_documents.get(kind, as_key(key))

    async def whole(self, document: Document) -> Document:
        """An earlier version of a document, as a file has it; an agent's with its conversation.

        Raises ``StateCorruptedError`` when its conversation is not in the log any more.
        """
        return await self._agent_documents.whole(document, strict=True)

    async def _usable(self, document: Document, decode: Callable[[Document], T]) -> T:
        """The result of ``decode`` for a document, or for the earlier version that replaces it.

        A document that it refuses is quarantined. Raises ``StateCorruptedError`` when no earlier
        version is kept.
        """
        while True:
            try:
                return decode(document)
            except (StateValidationError, StateCorruptedError) as error:
                kind, key = document.kind, document.key
                earlier = await self._agent_documents.quarantine(
                    kind, key, error.message, version=document
                )
                if earlier is None or earlier == document:
                    raise StateCorruptedError(error.message, kind=kind, key=key) from error
                document = earlier

    async def load(self, kind: str, key: Key | str) -> OpenModel | None:
        """The state; None if it is not stored. It belongs to the caller.

        Raises as ``load_with_revision``, which also returns the revision.
        """
        loaded = await self.load_with_revision(kind, key)
        return loaded.state if loaded else None

    async def delete(self, kind: str, key: Key | str, *, expected: int | None = None) -> bool:
        """Remove a state; True if it was stored. ``expected`` as in ``save``."""
        [removed] = await self._commit([Delete(kind, as_key(key), expected)])
        return removed > 0

    async def is_removed(self, kind: str, key: Key | str) -> bool:
        """Whether a missing state was removed by git, such as by the checkout of a branch."""
        tracked = self._tracked
        return tracked is not None and await tracked.is_removed(kind, as_key(key))

    @property
    def is_merging(self) -> bool:
        """Whether a merge of some state is not resolved, or was not read since, as far as seen."""
        return self._tracked is not None and self._tracked.is_merging

    async def check_merged(self, kind: str, *keys: Key | str, reads: bool = False) -> None:
        """Raises ``UnmergedStateError`` while a merge of one of the states is not resolved.

        Also when it was resolved, and not read since, unless the caller ``reads`` it next.
        """
        if self._tracked is not None:
            for key in keys:
                await self._tracked.check_merged(kind, as_key(key), reads=reads)

    async def erase(self, kind: str, key: Key | str) -> int:
        """Remove a state and a log, all below the key, and every earlier version of them.

        Returns the number of states and logs. Unlike ``delete`` it also removes snapshots and
        quarantined versions. After a crash a part may be left: call it again. Raises as
        ``StateStore.erase``.
        """
        key = as_key(key)
        removed = is_required(kind, key) and await self.delete(kind, key)
        erased = await self.store.erase(kind, key)
        self._agent_documents.forget(kind, key)
        return removed + erased

    async def keys(self, kind: str, prefix: Key | str = ()) -> list[Key]:
        """The sorted keys of a kind, below ``prefix``."""
        return await self.store.keys(kind, as_key(prefix))

    async def scan(
        self,
        kind: str,
        prefix: Key | str = (),
        *,
        where: Callable[[Document], bool] = lambda _: True,
    ) -> AsyncGenerator[StoredState, None]:
        """Every usable state of a kind, below ``prefix``, in no order.

        ``where``: those alone whose documents it takes, as they are stored; no other is parsed.

        The others are quarantined and reported by ``incidents``. A document of a newer schema is
        reported too, and left where it is.
        """
        async with aclosing(self._documents(kind, as_key(prefix))) as documents:
            async for document in documents:
                if not where(document):
                    continue
                try:
                    loaded = await self._usable(document, self._codec.load)
                except SchemaTooNewError as error:
                    self._note(Incident(error.message, kind, document.key))
                except StateCorruptedError:
                    continue  # it is quarantined, and reported by incidents()
                else:
                    yield loaded

    async def _documents(self, kind: str, prefix: Key) -> AsyncGenerator[Document, None]:
        async for document in self._agent_documents.scan(kind, prefix):
            yield document

    async def append(
        self, kind: str, key: Key | str, record: Mapping[str, Any], *, dedupe_key: str | None = None
    ) -> int:
        """Append a record to a log in O(1); its number.

        If the log has a record with this ``dedupe_key``, nothing is appended, and its number is
        returned. Raises as ``save``.
        """
        change = self._codec.append(kind, as_key(key), record, dedupe_key)
        [number] = await self._commit([change])
        return number

    async def read_log(
        self, kind: str, key: Key | str, *, after: int = 0, last: int | None = None
    ) -> AsyncGenerator[LogEntry, None]:
        """The records of a log with numbers above ``after``; ``last``: at most the last so many."""
        key = as_key(key)
        async for record in self.store.read_log(kind, key, after=after, last=last):
            if (entry := self._entry(kind, key, record)) is not None:
                yield entry

    async def read_keyed(
        self, kind: str, key: Key | str, prefix: str
    ) -> AsyncGenerator[LogEntry, None]:
        """The records of a log whose dedupe keys begin so, or that have none, in order.

        In a long log of a directory they are found by an index.
        """
        store, key = self.store, as_key(key)
        found = None
        if isinstance(store, IndexedLogs):
            found = await store.keyed_records(kind, key, prefix)
        if found is not None:
            for record in found:
                if (entry := self._entry(kind, key, record)) is not None:
                    yield entry
            return
        async for record in store.read_log(kind, key):
            wanted = record.dedupe_key is None or record.dedupe_key.startswith(prefix)
            if wanted and (entry := self._entry(kind, key, record)) is not None:
                yield entry

    def _entry(self, kind: str, key: Key, record: LogRecord) -> LogEntry | None:
        """The record as it was appended; None, and reported, for one that cannot be read."""
        try:
            body = self._codec.record(kind, key, record.body)
        except StateCorruptedError as error:
            self._note(Incident(f"record {record.seq}: {error.message}", kind, key))
            return None
        return LogEntry(record.seq, body, record.dedupe_key)

    @asynccontextmanager
    async def edit(self, kind: str, key: Key | str) -> AsyncIterator[Any]:
        """Lock a state, load it, and save it on leaving; an error in the block saves nothing.

        Raises ``StateNotFoundError`` if it is not stored, and as ``load`` and ``save``.
        """
        key = as_key(key)
        async with self.lock(kind, key):
            loaded = await self.load_with_revision(kind, key)
            if loaded is None:
                raise StateNotFoundError(kind=kind, key=key)
            yield loaded.state
            await self.save(kind, key, loaded.state, expected=loaded.revision)

    @asynccontextmanager
    async def group(self) -> AsyncIterator[Group]:
        """Collect changes and commit them atomically on leaving; an error drops them all."""
        group = Group(self._codec)
        yield group
        if group.changes:
            await self._commit(group.changes)

    async def _commit(self, changes: Sequence[Change]) -> list[int]:
        return await commit_checked(self.store, changes, self._commit_as_given)

    async def _commit_as_given(self, changes: Sequence[Change]) -> list[int]:
        began = perf_counter()
        try:
            if self._telemetry is None:
                numbers = await self._agent_documents.commit(changes)
            else:
                with self._telemetry.save(changes):
                    numbers = await self._agent_documents.commit(changes)
        except AgentStateError as error:
            self.saves.errors[type(error).__name__] += 1
            self.saves.refused = self.saves.refused or isinstance(error, StorageError)
            raise
        finally:
            self.saves.seconds.observe(perf_counter() - began)
        self.saves.refused = False
        if self._observer is not None:
            made = [not isinstance(change, Check) for change in changes]
            whole = [whole_put(each) if isinstance(each, Put) else each for each in changes]
            try:
                self._observer.committed([*compress(whole, made)], [*compress(numbers, made)])
            except Exception:  # the changes are durable; an observer's error cannot undo them
                _logger.exception("the observer failed")
        return numbers

    async def commit(self, group: Group, *, guard: Change | None = None) -> list[int]:
        """Make a group's changes atomically; a number for each, as ``StateStore.commit``.

        ``guard``: one more change, such as a ``Check`` that fences the group. It is made, or
        refused, with the others; no number is returned for it.
        """
        if guard is None:
            return await self._commit(group.changes) if group.changes else []
        return (await self._commit([*group.changes, guard]))[:-1]

    def new_group(self) -> Group:
        """An empty group, for ``commit``."""
        return Group(self._codec)

    def lock(self, kind: str, key: Key | str) -> AbstractAsyncContextManager[None]:
        """Lock a state for this task: every other ``lock``, ``edit`` and save of it waits.

        The holder's own saves go through, and it may lock the same state again. Other processes
        wait too. Raises ``LockTimeoutError`` when the lock is not free in time.
        """
        return self.store.lock(kind, as_key(key))

    async def subscribe(self) -> NoticeStream:
        """A stream of the changes made after this returns; ``aclose`` ends it.

        It reports what ``watch`` reports. The subscription exists when this returns, so that a
        change made by the very next statement is in it.
        """
        return await self.store.watch()

    async def watch(self) -> AsyncIterator[Notice]:
        """Changes from the first step of the loop on, as one ``async for`` over ``subscribe``.

        They may be made by this process, by another one, by a hand edit or a ``git checkout``.
        """
        async with aclosing(await self.subscribe()) as notices:
            async for notice in notices:
                yield notice

    async def cleanup_old_states(
        self, max_age_hours: float = 24, *, dead_letters: bool = False
    ) -> CleanupReport:
        """Move finished states that are older than ``max_age_hours`` into archive logs.

        Completed and cancelled tasks are finished (dead ones only with ``dead_letters``), and so
        are archived, answered and read mail, the sleep of agents that are awake (it is removed),
        and stopped agents without open tasks and unread mail. Mail that expects a reply stays
        until it is answered.
        """
        return await clean(self, max_age_hours, dead_letters=dead_letters)

    def journal_lag(self) -> JournalLag | None:
        """How far the files are behind the journal; None for a store without a journal."""
        store = self.store
        while isinstance(store, MirroredStateStore | SealedStateStore):
            store = store.store
        return store.journal_lag() if isinstance(store, WALStateStore) else None

    def incidents(self) -> list[Incident]:
        """Damaged and unusable documents that were found since ``open``, and what was done."""
        return [*self.store.incidents(), *self._agent_documents.incidents(), *self._unusable]

    def _note(self, incident: Incident) -> None:
        if incident not in self._unusable:
            self._unusable.append(incident)

    # -- collections -----------------------------------------------------------------------

    async def _save_collection(self, collection: Collection, agent_id: str, state: State) -> None:
        kind, given = collection.kind, self._codec.plain(state)
        self._codec.validator.validate(collection.schema, given)
        header, items = split_collection(collection, given)
        async with self.lock(kind, agent_id):
            group = self.new_group()
            group.put(kind, (agent_id,), header, schema=collection.schema)
            for item_id, item in items.items():
                group.put(kind, (agent_id, item_id), item, schema=collection.schema_of(item))
            for key in await self.keys(kind, agent_id):
                if len(key) == 2 and key[1] not in items:
                    group.delete(kind, key)
            await self.commit(group)

    async def _load_collection(self, collection: Collection, agent_id: str) -> OpenModel | None:
        kind, decode = collection.kind, self._codec.body
        header, edited = None, False
        document = await self.store.get(kind, (agent_id,))
        if document is not None:
            header, edited = await self._usable(
                document, lambda found: (decode(found), found.edited)
            )
        items: list[tuple[str, JsonObject]] = []
        found = [each async for each in self.store.scan(kind, (agent_id,))]
        unread = {*await self.store.keys(kind, (agent_id,))} - {each.key for each in found}
        # What a listing leaves out, as it may not be read, would be removed at the next save.
        for key in sorted(unread):
            with suppress(StateCorruptedError):  # reported by incidents()
                found += filter(None, [await self.store.get(kind, key)])
        for document in found:
            if len(document.key) == 2:
                with suppress(StateCorruptedError):
                    items.append((document.key[1], await self._usable(document, decode)))
        items.sort(key=lambda item: (sort_text(item[1].get("created_at")), item[0]))
        state = join_collection(collection, agent_id, header, items, edited=edited)
        if state is None:
            return None
        try:
            return self._codec.build(collection.schema, state)
        except StateValidationError as error:
            raise StateCorruptedError(error.message, kind=kind, key=agent_id) from error


def _refuse_inside(folder: str | None, state_dir: str | None) -> None:
    """Refuse keys that would be copied and committed with what they seal."""
    if folder and state_dir and f"{folder}/".startswith(f"{state_dir}/"):
        raise ValueError(f"the keys may not be in the state directory: {folder}")
