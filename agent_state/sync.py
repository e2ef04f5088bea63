"""The manager for scripts and notebooks: the same methods, blocking.

One background thread runs one event loop with the asynchronous manager on it; there is no
second implementation.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from agent_state import manager as asynchronous
from agent_state.cleanup import CleanupReport
from agent_state.codec import StoredState
from agent_state.errors import Key, StateNotFoundError
from agent_state.groups import Group, State
from agent_state.manager import LogEntry
from agent_state.models import (
    AgentState,
    MailboxState,
    OpenModel,
    SleepState,
    SystemState,
    TaskQueueState,
)
from agent_state.protocols import Incident

T = TypeVar("T")


class StatePersistenceManager:
    """Takes what ``agent_state.StatePersistenceManager`` takes; used with ``with``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._manager = asynchronous.StatePersistenceManager(*args, **settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        if self._loop is not None:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="agent-state-sync", daemon=True
        )
        self._thread.start()
        try:
            self._call(self._manager.open())
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        if self._loop is not None:
            try:
                self._call(self._manager.close())
            finally:
                self._end()

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise RuntimeError("the manager is not open; use it with `with`")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def save_agent_state(self, agent_id: str, state: AgentState | Mapping[str, Any]) -> int:
        return self._call(self._manager.save_agent_state(agent_id, state))

    def load_agent_state(self, agent_id: str) -> AgentState | None:
        return self._call(self._manager.load_agent_state(agent_id))

    def save_task_queue_state(
        self, agent_id: str, state: TaskQueueState | Mapping[str, Any]
    ) -> None:
        self._call(self._manager.save_task_queue_state(agent_id, state))

    def load_task_queue_state(self, agent_id: str) -> TaskQueueState | None:
        return self._call(self._manager.load_task_queue_state(agent_id))

    def save_sleep_state(self, agent_id: str, state: SleepState | Mapping[str, Any]) -> int:
        return self._call(self._manager.save_sleep_state(agent_id, state))

    def load_sleep_state(self, agent_id: str) -> SleepState | None:
        return self._call(self._manager.load_sleep_state(agent_id))

    def save_mailbox_state(self, agent_id: str, state: MailboxState | Mapping[str, Any]) -> None:
        self._call(self._manager.save_mailbox_state(agent_id, state))

    def load_mailbox_state(self, agent_id: str) -> MailboxState | None:
        return self._call(self._manager.load_mailbox_state(agent_id))

    def save_system_state(self, name: str, state: SystemState | Mapping[str, Any]) -> int:
        return self._call(self._manager.save_system_state(name, state))

    def load_system_state(self, name: str) -> SystemState | None:
        return self._call(self._manager.load_system_state(name))

    def list_persisted_agents(self) -> list[str]:
        return self._call(self._manager.list_persisted_agents())

    def save(self, kind: str, key: Key | str, state: State, *, expected: int | None = None) -> int:
        return self._call(self._manager.save(kind, key, state, expected=expected))

    def load_with_revision(self, kind: str, key: Key | str) -> StoredState | None:
        return self._call(self._manager.load_with_revision(kind, key))

    def load(self, kind: str, key: Key | str) -> OpenModel | None:
        return self._call(self._manager.load(kind, key))

    def delete(self, kind: str, key: Key | str, *, expected: int | None = None) -> bool:
        return self._call(self._manager.delete(kind, key, expected=expected))

    def erase(self, kind: str, key: Key | str) -> int:
        return self._call(self._manager.erase(kind, key))

    def keys(self, kind: str, prefix: Key | str = ()) -> list[Key]:
        return self._call(self._manager.keys(kind, prefix))

    def scan(self, kind: str, prefix: Key | str = ()) -> Iterator[StoredState]:
        yield from self._iterate(self._manager.scan(kind, prefix))

    def append(
        self, kind: str, key: Key | str, record: Mapping[str, Any], *, dedupe_key: str | None = None
    ) -> int:
        return self._call(self._manager.append(kind, key, record, dedupe_key=dedupe_key))

    def read_log(
        self, kind: str, key: Key | str, *, after: int = 0, last: int | None = None
    ) -> Iterator[LogEntry]:
        yield from self._iterate(self._manager.read_log(kind, key, after=after, last=last))

    @contextmanager
    def edit(self, kind: str, key: Key | str) -> Iterator[Any]:
        """As the asynchronous one: read, change, and save with compare-and-set on leaving.

        No lock is held while the block runs, so somebody else's save in between raises
        ``RevisionConflictError``.
        """
        loaded = self._call(self._manager.load_with_revision(kind, key))
        if loaded is None:
            raise StateNotFoundError(kind=kind, key=key)
        yield loaded.state
        self.save(kind, key, loaded.state, expected=loaded.revision)

    @contextmanager
    def group(self) -> Iterator[Group]:
        group = self._manager.new_group()
        yield group
        self._call(self._manager.commit(group))

    def cleanup_old_states(self, max_age_hours: float = 24) -> CleanupReport:
        return self._call(self._manager.cleanup_old_states(max_age_hours))

    def flush(self) -> None:
        self._call(self._manager.flush())

    def incidents(self) -> list[Incident]:
        return self._manager.incidents()

    def _iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        async def some(number: int) -> list[T]:
            batch: list[T] = []
            async for item in items:
                batch.append(item)
                if len(batch) == number:
                    break
            return batch

        while batch := self._call(some(256)):
            yield from batch
