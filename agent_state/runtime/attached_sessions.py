"""Persistence for the sessions of another session manager.

That manager needs four methods (``SessionSource``). Its states are stored as they are, with
their own fields, and are given back equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from os import PathLike
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from agent_state.cleanup import CleanupReport
from agent_state.clock import Clock
from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import BodySealer, Durability

T = TypeVar("T")

_logger = logging.getLogger("agent_state.runtime")


@runtime_checkable
class SessionSource(Protocol):
    """A session manager that can be persisted. Each method may be async or plain."""

    def list_sessions(self) -> Iterable[str] | Awaitable[Iterable[str]]:
        """Return the ids of its sessions."""

    def export_session(
        self, session_id: str
    ) -> Mapping[str, Any] | Awaitable[Mapping[str, Any] | None] | None:
        """Return one session as JSON values, with ``agent_id``; None when it no longer exists."""

    def import_session(
        self, session_id: str, state: Mapping[str, Any]
    ) -> object | Awaitable[object]:
        """Create a session from a state that ``export_session`` returned."""

    def on_change(self, callback: Callable[[str], None]) -> Callable[[], None] | None:
        """Call ``callback`` with a session's id whenever the session has changed or was removed.

        It may be called from any thread. May return a function that ends the calls.
        """


class AttachedSessions:
    """Stores another manager's sessions: restores them at the start, saves them on every change.

    ``save_interval_seconds``: how often every session is saved, should a change not be reported.
    Used with ``async with``.
    """

    def __init__(
        self,
        source: SessionSource,
        manager: StatePersistenceManager,
        *,
        save_interval_seconds: float = 30.0,
    ) -> None:
        self._source = source
        self.manager = manager
        self._save_interval_seconds = save_interval_seconds
        self._changed: dict[str, None] = {}
        """The sessions that were reported and not saved since; any thread adds to it."""
        self._failed: dict[str, Exception] = {}
        """The sessions whose latest save failed."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._saving: asyncio.Task[None] | None = None
        self._detach: Callable[[], None] | None = None
        self.restored: list[str] = []
        """The ids of the sessions that the start has imported into the manager."""

    async def __aenter__(self) -> Self:
        await self.manager.open()
        try:
            self._loop = asyncio.get_running_loop()
            self._woken = asyncio.Event()
            self._save_lock = asyncio.Lock()
            await self.restore_all_session_states()
            self._detach = self._source.on_change(self._on_change)
        except BaseException:
            await self.manager.close()
            raise
        self._saving = asyncio.create_task(self._save_forever(), name="agent-state attach")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._detach is not None:
            self._detach()
        if self._saving is not None:
            self._saving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._saving
        try:
            await self.save_all_session_states()
        finally:
            await self.manager.close()

    async def save_session_state(self, agent_id: str) -> bool:
        """Save one session as it is now. If it is gone, remove its state and return False."""
        # One after the other, so that an older state is not stored over a newer one.
        async with self._save_lock:
            due = self._changed.pop(agent_id, agent_id) is None
            try:
                saved = await self._save(agent_id)
            except asyncio.CancelledError:
                if due:  # its caller was cancelled; it must still be saved
                    self._changed[agent_id] = None
                raise
            except Exception as error:
                self._failed[agent_id] = error
                raise
            self._failed.pop(agent_id, None)
            return saved

    async def _save(self, agent_id: str) -> bool:
        state = await _awaited(self._source.export_session(agent_id))
        if state is None:
            await self.manager.delete("agents", agent_id)
            return False
        await self.manager.save_agent_state(agent_id, state)
        return True

    async def save_all_session_states(self) -> int:
        """Save every session that the manager lists or has reported; return how many.

        One that cannot be saved does not prevent saving the others; the first error is raised
        at the end.
        """
        listed = await _awaited(self._source.list_sessions())
        return await self._save_each({*listed, *self._changed, *self._failed})

    async def _save_each(self, session_ids: Iterable[str]) -> int:
        saved = 0
        failed: Exception | None = None
        for session_id in session_ids:
            try:
                saved += await self.save_session_state(session_id)
            except Exception as error:  # the other manager may raise anything
                _logger.exception("session %s could not be saved", session_id)
                failed = failed or error
        if failed is not None:
            raise failed
        return saved

    async def restore_session_state(self, agent_id: str) -> bool:
        """Import one stored session into the manager; False when none is stored."""
        loaded = await self.manager.load_with_revision("agents", agent_id)
        if loaded is None:
            return False
        await _awaited(self._source.import_session(agent_id, loaded.state.model_dump()))
        return True

    async def restore_all_session_states(self) -> int:
        """Import every stored session that the manager does not have; return how many."""
        present = set(await _awaited(self._source.list_sessions()))
        self.restored = [
            agent_id
            for agent_id in await self.manager.list_persisted_agents()
            if agent_id not in present and await self.restore_session_state(agent_id)
        ]
        return len(self.restored)

    async def cleanup_old_states(self, max_age_hours: float = 24) -> CleanupReport:
        """See ``StatePersistenceManager.cleanup_old_states``."""
        return await self.manager.cleanup_old_states(max_age_hours)

    async def saved(self) -> None:
        """Wait until every change that was reported so far is durable.

        What was refused before is tried again. One that cannot be saved does not prevent saving
        the others; the first error is raised at the end.
        """
        async with self._save_lock:
            pass  # a save that is under way is of an earlier state, and may fail
        await self._save_each([*{**self._changed, **self._failed}])

    def _on_change(self, session_id: str) -> None:
        """Record a change; the manager calls this from any thread."""
        self._changed[session_id] = None
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken.set)

    async def _save_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._save_interval_seconds):
                    await self._woken.wait()
            except TimeoutError:
                with contextlib.suppress(Exception):  # it is logged, and tried again
                    await self.save_all_session_states()
                continue
            self._woken.clear()
            with contextlib.suppress(Exception):  # it is logged
                await self._save_each(list(self._changed))
            refused = [name for name, error in self._failed.items() if _is_refusal(error)]
            if refused:
                await self.manager.clock.sleep(1.0)
                self._changed.update(dict.fromkeys(refused))
                self._woken.set()


def _is_refusal(error: Exception) -> bool:
    """Whether the store refused, and not the session's state: then it is worth another try."""
    return isinstance(error, AgentStateError) and not isinstance(error, (TypeError, ValueError))


def attach(
    source: SessionSource,
    state_dir: str | PathLike[str] | None = None,
    *,
    exclusive: bool = True,
    durability: Durability | None = None,
    encryption: BodySealer | None = None,
    clock: Clock | None = None,
    save_interval_seconds: float = 30.0,
) -> AttachedSessions:
    """Persist the sessions of another session manager; use the result with ``async with``.

    Stored sessions that the manager does not have are imported at the start. The other options
    are those of ``StatePersistenceManager`` and ``AttachedSessions``. Raises ``TypeError`` when
    the manager lacks one of the four methods.
    """
    if not isinstance(source, SessionSource):
        needed = ("list_sessions", "export_session", "import_session", "on_change")
        missing = ", ".join(name for name in needed if not hasattr(source, name))
        raise TypeError(f"{type(source).__name__} cannot be attached; it lacks {missing}")
    manager = StatePersistenceManager(
        state_dir, exclusive=exclusive, durability=durability, encryption=encryption, clock=clock
    )
    return AttachedSessions(source, manager, save_interval_seconds=save_interval_seconds)


async def _awaited(value: T | Awaitable[T]) -> T:
    return await value if inspect.isawaitable(value) else value
