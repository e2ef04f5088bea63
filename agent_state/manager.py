"""States by name: what is kept for an agent, checked on the way in and on the way out."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from agent_state import cleanup as cleaning
from agent_state.clock import Clock, SystemClock
from agent_state.codec import Codec, StoredState
from agent_state.errors import (
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    StateValidationError,
)
from agent_state.groups import Group, State, as_key
from agent_state.models import (
    AgentState,
    MailboxState,
    OpenModel,
    SleepState,
    SystemState,
    TaskQueueState,
)
from agent_state.protocols import (
    Change,
    Delete,
    Document,
    Incident,
    JsonObject,
    LogRecord,
    Mirror,
    Notice,
    NoticeStream,
    Observer,
    StateSerializer,
    StateStore,
    StateValidator,
)
from agent_state.storage import FileStateStore, WALStateStore
from agent_state.storage.mirrored_store import MirroredStateStore
from agent_state.views import MAILBOX, TASK_QUEUE, View, item_schema, put_together, take_apart

T = TypeVar("T")

_logger = logging.getLogger("agent_state.manager")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One record of a log, as an object that belongs to the caller."""

    seq: int
    record: JsonObject
    dedupe_key: str | None = None


class StatePersistenceManager:
    """Saves and loads the states of agents, their tasks, sleep and mail, and of the system.

    ``state_dir``: where the files are. ``exclusive``: this process alone writes there, which is
    many times faster; otherwise any number of processes may. ``durability``: ``"fsync"`` (what
    ``save`` has returned for survives power loss) or ``"os"`` (it survives the process).
    ``store`` replaces the files altogether; then the three settings above are the store's.
    ``mirror`` keeps a copy elsewhere and delays nobody, such as ``agent_state.redis.RedisMirror``;
    with ``mirror_restores`` what is found damaged, or an empty directory, is restored from it.
    ``observer`` is told every change once it is durable, such as a ``Narrator``.
    Used with ``async with``, or between ``open`` and ``close``.
    """

    def __init__(
        self,
        state_dir: str | PathLike[str] = "state",
        *,
        exclusive: bool = False,
        durability: str = "fsync",
        serializer: StateSerializer | None = None,
        validator: StateValidator | None = None,
        store: StateStore | None = None,
        mirror: Mirror | None = None,
        mirror_restores: bool = False,
        observer: Observer | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self._observer = observer
        self._codec = Codec(serializer, validator)
        if store is not None:
            self.store: StateStore = store
        elif exclusive:
            self.store = WALStateStore(
                state_dir, durability=durability, clock=self.clock, accept=self._codec.check
            )
        else:
            self.store = FileStateStore(state_dir, durability=durability, clock=self.clock)
        self.mirror = mirror
        if mirror is not None:
            self.store = MirroredStateStore(
                self.store, mirror, self._codec, restores=mirror_restores
            )
        self._unusable: list[Incident] = []

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Make ready; complete what a crash left half done. Twice is a no-op."""
        await self.store.open()

    async def close(self) -> None:
        """Bring everything to its place and let go of the directory. Twice is a no-op."""
        await self.store.close()

    async def flush(self) -> None:
        """Bring everything acknowledged to its readable file, durably."""
        await self.store.flush()

    # -- by name ---------------------------------------------------------------------------

    async def save_agent_state(self, agent_id: str, state: AgentState | Mapping[str, Any]) -> int:
        """Save an agent session; its new revision. Raises as ``save`` does."""
        return await self.save("agents", agent_id, state)

    async def load_agent_state(self, agent_id: str) -> AgentState | None:
        """The agent session; None when there is none. Raises as ``load`` does."""
        return cast("AgentState | None", await self.load("agents", agent_id))

    async def save_sleep_state(self, agent_id: str, state: SleepState | Mapping[str, Any]) -> int:
        """Save why and until when an agent sleeps; the new revision."""
        return await self.save("sleep", agent_id, state)

    async def load_sleep_state(self, agent_id: str) -> SleepState | None:
        """The sleep state; None when there is none."""
        return cast("SleepState | None", await self.load("sleep", agent_id))

    async def save_system_state(self, name: str, state: SystemState | Mapping[str, Any]) -> int:
        """Save something the system as a whole must remember; the new revision."""
        return await self.save("system", name, state)

    async def load_system_state(self, name: str) -> SystemState | None:
        """What the system remembers under this name; None when nothing."""
        return cast("SystemState | None", await self.load("system", name))

    async def save_task_queue_state(
        self, agent_id: str, state: TaskQueueState | Mapping[str, Any]
    ) -> None:
        """Save all tasks of an agent, whole or not at all; tasks not in it are removed."""
        await self._save_view(TASK_QUEUE, agent_id, state)

    async def load_task_queue_state(self, agent_id: str) -> TaskQueueState | None:
        """All tasks of an agent; None when it has no queue and no task."""
        return cast("TaskQueueState | None", await self._load_view(TASK_QUEUE, agent_id))

    async def save_mailbox_state(
        self, agent_id: str, state: MailboxState | Mapping[str, Any]
    ) -> None:
        """Save all mail of an agent, whole or not at all; mail not in it is removed."""
        await self._save_view(MAILBOX, agent_id, state)

    async def load_mailbox_state(self, agent_id: str) -> MailboxState | None:
        """All mail of an agent; None when it has no mailbox and no mail."""
        return cast("MailboxState | None", await self._load_view(MAILBOX, agent_id))

    async def list_persisted_agents(self) -> list[str]:
        """The ids of all stored agent sessions, sorted."""
        return [key[0] for key in await self.keys("agents") if len(key) == 1]

    # -- by kind and key -------------------------------------------------------------------

    async def save(
        self, kind: str, key: Key | str, state: State, *, expected: int | None = None
    ) -> int:
        """Save a state as it is now; its new revision, or the old one when nothing changed.

        ``expected``: the revision that must be stored (0: nothing may be). Raises
        ``SerializationError`` or ``StateValidationError`` with nothing touched,
        ``RevisionConflictError``, ``LockTimeoutError``, ``StorageError``.
        """
        [number] = await self._commit([self._codec.put(kind, as_key(key), state, expected)])
        return number

    async def load_with_revision(self, kind: str, key: Key | str) -> StoredState | None:
        """The state with its revision and time; None when there is none.

        Raises ``StateCorruptedError`` when what is stored cannot be used (it was put aside) and
        ``SchemaTooNewError`` (it was left alone).
        """
        key = as_key(key)
        document = await self.store.get(kind, key)
        if document is None:
            return None
        return await self._usable(document, self._codec.load)

    async def _usable(self, document: Document, decode: Callable[[Document], T]) -> T:
        """What ``decode`` makes of a document, or of the earlier version that replaces it.

        A document that it refuses is quarantined. Raises ``StateCorruptedError`` when no earlier
        version is kept.
        """
        while True:
            try:
                return decode(document)
            except (StateValidationError, StateCorruptedError) as error:
                kind, key = document.kind, document.key
                earlier = await self.store.quarantine(kind, key, error.message)
                if earlier is None or earlier == document:
                    raise StateCorruptedError(error.message, kind=kind, key=key) from error
                document = earlier

    async def load(self, kind: str, key: Key | str) -> OpenModel | None:
        """The state, as an object that belongs to the caller; None when there is none."""
        loaded = await self.load_with_revision(kind, key)
        return loaded.state if loaded else None

    async def delete(self, kind: str, key: Key | str, *, expected: int | None = None) -> bool:
        """Remove a state; whether there was one."""
        [removed] = await self._commit([Delete(kind, as_key(key), expected)])
        return removed > 0

    async def erase(self, kind: str, key: Key | str) -> int:
        """Remove a state and a log, all below them, and every earlier version kept of them.

        Returns how many states and logs there were. Unlike ``delete`` it leaves nothing that
        could bring them back: no snapshot, nothing that was put aside from there. Cut short by a
        crash it may have removed a part: call it again. Raises as ``StateStore.erase`` does.
        """
        return await self.store.erase(kind, as_key(key))

    async def keys(self, kind: str, prefix: Key | str = ()) -> list[Key]:
        """The sorted keys of a kind, below ``prefix``."""
        return await self.store.keys(kind, as_key(prefix))

    async def scan(self, kind: str, prefix: Key | str = ()) -> AsyncIterator[StoredState]:
        """Every usable state of a kind; ``incidents`` tells of the others, which were put aside.

        A document of a newer schema is left where it is, left out, and told too.
        """
        async with aclosing(self._documents(kind, as_key(prefix))) as documents:
            async for document in documents:
                try:
                    loaded = await self._usable(document, self._codec.load)
                except SchemaTooNewError as error:
                    self._note(Incident(error.message, kind, document.key))
                except StateCorruptedError:
                    continue  # put aside, and told in incidents()
                else:
                    yield loaded

    async def _documents(self, kind: str, prefix: Key) -> AsyncGenerator[Document, None]:
        async for document in self.store.scan(kind, prefix):
            yield document

    async def append(
        self, kind: str, key: Key | str, record: Mapping[str, Any], *, dedupe_key: str | None = None
    ) -> int:
        """Add a record to a log in O(1); its number. A known ``dedupe_key`` adds nothing."""
        change = self._codec.append(kind, as_key(key), record, dedupe_key)
        [number] = await self._commit([change])
        return number

    async def read_log(
        self, kind: str, key: Key | str, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogEntry]:
        """The records of a log with a number above ``after``, or only the ``last`` so many."""
        records = self.store.read_log(kind, as_key(key), after=after, last=last)
        async for record in records:
            yield self._entry(record)

    def _entry(self, record: LogRecord) -> LogEntry:
        return LogEntry(record.seq, self._codec.serializer.loads(record.body), record.dedupe_key)

    @asynccontextmanager
    async def edit(self, kind: str, key: Key | str) -> AsyncIterator[Any]:
        """Lock, read afresh, and save on leaving with compare-and-set; an error saves nothing.

        Raises ``StateNotFoundError`` when there is nothing to edit.
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
        """Collect changes and make them all, or none, on leaving; an error makes none."""
        group = Group(self._codec)
        yield group
        await self.commit(group)

    async def _commit(self, changes: Sequence[Change]) -> list[int]:
        numbers = await self.store.commit(changes)
        if self._observer is not None:
            try:
                self._observer.committed(changes, numbers)
            except Exception:  # the changes are made, whatever an observer makes of them
                _logger.exception("the observer failed")
        return numbers

    async def commit(self, group: Group, *, guard: Change | None = None) -> list[int]:
        """Make a group's changes, all or none; a number for each, as ``StateStore.commit``.

        ``guard``: one more change, such as a save with ``expected`` that fences the group. It is
        made, or refused, with the others; no number is returned for it.
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

    async def cleanup_old_states(self, max_age_hours: float = 24) -> cleaning.CleanupReport:
        """Move what is finished and older than that into archive logs; the rest is spared.

        Finished are completed, dead and cancelled tasks, archived and answered mail, the sleep
        of agents that are awake, and stopped agents with no open task and no unread mail.
        """
        return await cleaning.clean(self, max_age_hours)

    def incidents(self) -> list[Incident]:
        """What was found damaged or unusable since ``open``, and what was done about it."""
        return [*self.store.incidents(), *self._unusable]

    def _note(self, incident: Incident) -> None:
        if incident not in self._unusable:
            self._unusable.append(incident)

    # -- wholes ----------------------------------------------------------------------------

    async def _save_view(self, view: View, agent_id: str, state: State) -> None:
        whole = self._codec.plain(state)
        self._codec.validator.validate(view.schema, whole)
        header, members = take_apart(view, whole)
        async with self.lock(view.kind, agent_id):
            group = self.new_group()
            group.put(view.kind, (agent_id,), header, schema=view.schema)
            for ident, body in members.items():
                group.put(view.kind, (agent_id, ident), body, schema=item_schema(view, body))
            for key in await self.keys(view.kind, (agent_id,)):
                if len(key) == 2 and key[1] not in members:
                    group.delete(view.kind, key)
            await self.commit(group)

    async def _load_view(self, view: View, agent_id: str) -> OpenModel | None:
        header = await self.store.get(view.kind, (agent_id,))
        members: list[tuple[str, JsonObject]] = []
        async with aclosing(self._documents(view.kind, (agent_id,))) as documents:
            async for document in documents:
                if len(document.key) == 2:
                    with suppress(StateCorruptedError):  # quarantined, and listed in incidents()
                        body = await self._usable(document, self._codec.body)
                        members.append((document.key[1], body))
        members.sort(key=lambda member: (str(member[1].get("created_at") or ""), member[0]))
        head = await self._usable(header, self._codec.body) if header else None
        whole = put_together(view, agent_id, head, members)
        if whole is None:
            return None
        try:
            return self._codec.build(view.schema, whole)
        except StateValidationError as error:
            raise StateCorruptedError(error.message, kind=view.kind, key=agent_id) from error
