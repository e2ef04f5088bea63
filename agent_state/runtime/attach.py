"""Persistence for a session manager that is not ours.

Such a manager needs four methods (``SessionSource``); its states are stored as they are, whatever
words they use, and handed back equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from agent_state.cleanup import CleanupReport
from agent_state.clock import Clock
from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Durability

T = TypeVar("T")

_logger = logging.getLogger("agent_state.runtime")


@runtime_checkable
class SessionSource(Protocol):
    """What a session manager must offer to be persisted. Each method may be async or plain."""

    def list_sessions(self) -> Iterable[str] | Awaitable[Iterable[str]]:
        """The ids of its sessions."""

    def export_session(
        self, session_id: str
    ) -> Mapping[str, Any] | Awaitable[Mapping[str, Any] | None] | None:
        """One session as JSON values, with ``agent_id``; None when it is gone."""

    def import_session(
        self, session_id: str, state: Mapping[str, Any]
    ) -> object | Awaitable[object]:
        """Make a session from what ``export_session`` once gave."""

    def on_change(self, callback: Callable[[str], None]) -> Callable[[], None] | None:
        """Call back with the id of a session whenever it has changed, or is gone.

        May return a function that ends this.
        """


class AttachedSessions:
    """Keeps another manager's sessions: restored at the start, saved on every change."""

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
        self._stirred = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._saving: asyncio.Task[None] | None = None
        self._detach: Callable[[], None] | None = None
        self.restored: list[str] = []
        """The sessions that the start has handed to the manager."""

    async def __aenter__(self) -> Self:
        await self.manager.open()
        try:
            self._loop = asyncio.get_running_loop()
            await self.restore_all_session_states()
            self._detach = self._source.on_change(self._on_change)
        except BaseException:
            await self.manager.close()
            raise
        self._saving = asyncio.create_task(self._save_forever(), name="agent-state attach")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
        """Save one session as it is; False when it is gone, and then its state is removed."""
        due = self._changed.pop(agent_id, agent_id) is None
        try:
            state = await _maybe(self._source.export_session(agent_id))
            if state is None:
                await self.manager.delete("agents", agent_id)
                return False
            await self.manager.save_agent_state(agent_id, state)
        except asyncio.CancelledError:
            if due:  # nobody is waiting any more, and still it has to be saved
                self._changed[agent_id] = None
            raise
        return True

    async def save_all_session_states(self) -> int:
        """Save every session that the manager lists, and those that said they had changed.

        One that cannot be saved does not keep the others from it; its error is raised at the end.
        """
        listed = await _maybe(self._source.list_sessions())
        saved = 0
        failed: Exception | None = None
        for session_id in {*listed, *self._changed}:
            try:
                saved += await self.save_session_state(session_id)
            except Exception as error:  # noqa: BLE001  # the other manager's faults may be any
                _logger.warning("session %s could not be saved: %s", session_id, error)
                failed = failed or error
        if failed is not None:
            raise failed
        return saved

    async def restore_session_state(self, agent_id: str) -> bool:
        """Hand one stored session to the manager; False when none is stored."""
        loaded = await self.manager.load_with_revision("agents", agent_id)
        if loaded is None:
            return False
        await _maybe(self._source.import_session(agent_id, loaded.state.model_dump()))
        return True

    async def restore_all_session_states(self) -> int:
        """Hand over every stored session that the manager does not have; how many."""
        present = set(await _maybe(self._source.list_sessions()))
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
        """Until every change reported so far is durable."""
        await self._save_changed()
        while self._changed:
            await self._save_changed()

    def _on_change(self, session_id: str) -> None:
        """Called by the manager, from whatever thread it likes."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._note, session_id)

    def _note(self, session_id: str) -> None:
        self._changed[session_id] = None
        self._stirred.set()

    async def _save_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._save_interval_seconds):
                    await self._stirred.wait()
                self._stirred.clear()
                await self._save_changed()
            except TimeoutError:
                await self._try(self.save_all_session_states())

    async def _save_changed(self) -> None:
        async with self._one_at_a_time:
            for session_id in list(self._changed):
                await self._try(self.save_session_state(session_id), session_id)

    async def _try(self, saving: Awaitable[object], session_id: str | None = None) -> None:
        try:
            await saving
        except Exception as error:  # the other manager's faults may be any
            _logger.exception("a session could not be saved")
            theirs = not isinstance(error, AgentStateError) or isinstance(
                error, (TypeError, ValueError)
            )
            if session_id is not None and not theirs:
                await asyncio.sleep(1.0)  # the disk's fault, not the session's: it stays due
                self._note(session_id)


def attach(
    source: SessionSource,
    state_dir: str | PathLike[str] | None = None,
    *,
    exclusive: bool = True,
    durability: Durability | None = None,
    clock: Clock | None = None,
    save_interval_seconds: float = 30.0,
) -> AttachedSessions:
    """Persist a session manager that is not ours; use the result with ``async with``.

    Sessions that are stored and that the manager does not have are imported at the start.
    Raises ``TypeError`` when the manager lacks one of the four methods.
    """
    if not isinstance(source, SessionSource):
        needed = ("list_sessions", "export_session", "import_session", "on_change")
        missing = ", ".join(name for name in needed if not hasattr(source, name))
        raise TypeError(f"{type(source).__name__} cannot be attached; it lacks {missing}")
    manager = StatePersistenceManager(
        state_dir, exclusive=exclusive, durability=durability, clock=clock
    )
    return AttachedSessions(source, manager, save_interval_seconds=save_interval_seconds)


async def _maybe(value: T | Awaitable[T]) -> T:
    return await value if inspect.isawaitable(value) else value
