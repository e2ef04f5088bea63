"""The source of the state that the routes serve: parts of this process, or a directory on disk."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import count
from typing import Annotated, Protocol, Self, TypeVar, cast

from fastapi import Depends, Request

from agent_state.errors import AgentStateError, MissingExtraError, StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import BodySealer, NoticeStream, StateSerializer, StateValidator
from agent_state.runtime import AsyncAgentSessionManager
from agent_state.sessions import SessionManager
from agent_state.storage import ReadOnlyStateStore
from agent_state.web.problems import no_runtime, read_only

S = TypeVar("S")
_logger = logging.getLogger("agent_state.web")

EXTENSIONS = "agent_state.session_extensions"
"""The group of entry points by which installed packages extend a served ``SessionManager``."""

_LITTLE_ROOM = 1024 * 1024
"""With fewer free bytes on a disk it is tried whether it takes a change."""
_PROBE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class StateView:
    """The state that one request reads or changes."""

    manager: StatePersistenceManager
    sessions: SessionManager
    services: list[object] = field(default_factory=list)
    """Managers of added systems, on the same ``manager``."""

    def service(self, kind: type[S]) -> S:
        """The manager of an added system, by its class.

        It is the one that the application gave to the backend; otherwise ``kind(manager)`` with
        its default settings, made at the first call and kept with the view.
        """
        for found in self.services:
            if isinstance(found, kind):
                return found
        make = cast("Callable[[StatePersistenceManager], S]", kind)
        made = make(self.manager)
        self.services.append(made)
        return made


class Backend(Protocol):
    """The state that is served. ``runtime`` is None if this process runs no agents."""

    read_only: bool
    runtime: AsyncAgentSessionManager | None

    def view(self) -> AbstractAsyncContextManager[StateView]:
        """The state, to be read while one request is answered."""

    def writable(self) -> StateView:
        """The state, to be changed. Raises ``Problem`` (409) if it can only be read."""

    async def resolve(self, token: str) -> str | None:
        """The id of the session of a token; None if no session has this token.

        Raises ``SessionExpiredError`` if that session has expired.
        """

    async def watch(self) -> NoticeStream:
        """Changes from now on."""


class LiveBackend:
    """Managers that run in this process. The caller starts them before the server, and stops them.

    ``sessions``: a ``SessionManager`` with its own settings. ``services``: managers of added
    systems, such as a ``ConversationStateManager`` with its own settings; routes find them with
    ``StateView.service``. Raises ``TypeError`` without a runtime and without a manager.
    """

    read_only = False

    def __init__(
        self,
        *,
        runtime: AsyncAgentSessionManager | None = None,
        manager: StatePersistenceManager | None = None,
        sessions: SessionManager | None = None,
        services: Iterable[object] = (),
    ) -> None:
        if manager is None:
            if runtime is None:
                raise TypeError("there is nothing to serve: give a runtime or a manager")
            manager = runtime.manager
        self.runtime = runtime
        sessions = sessions or SessionManager(manager)
        for extend in _installed_extensions():
            extend(sessions)
        self._view = StateView(manager, sessions, list(services))

    def view(self) -> AbstractAsyncContextManager[StateView]:
        return nullcontext(self._view)

    def writable(self) -> StateView:
        return self._view

    async def resolve(self, token: str) -> str | None:
        return await _session_of(self._view.sessions, token)

    async def watch(self) -> NoticeStream:
        return await self._view.manager.subscribe()


@dataclass(slots=True)
class _OpenView:
    """A view of the directory at the time it was opened, and the requests that use it."""

    view: StateView
    store: ReadOnlyStateStore
    opened_at: int
    users: int = 0


class ReadOnlyBackend:
    """A directory that another process may own. Nothing in it is changed or locked.

    ``sessions`` and ``services`` make managers with an application's own settings: each is called
    with the ``StatePersistenceManager`` of a view. ``serializer``, ``validator``
    and ``encryption`` are those of the manager that writes the directory; None stands for the
    default ones, and for none.

    A reader applies the journal to the files once, at its opening. Each request therefore needs a
    view that was opened after the request came; requests that wait at the same time share one.
    """

    read_only = True
    runtime: AsyncAgentSessionManager | None = None

    def __init__(
        self,
        state_dir: str | os.PathLike[str],
        *,
        sessions: Callable[[StatePersistenceManager], SessionManager] = SessionManager,
        services: Iterable[Callable[[StatePersistenceManager], object]] = (),
        serializer: StateSerializer | None = None,
        validator: StateValidator | None = None,
        encryption: BodySealer | None = None,
    ) -> None:
        self._serializer, self._validator = serializer, validator
        self._encryption = encryption
        self._state_dir = state_dir
        self._sessions = sessions
        self._services = tuple(services)
        self._extensions = _installed_extensions()
        self._watched = ReadOnlyStateStore(state_dir)
        self._order = count()
        self._opening = asyncio.Lock()
        self._latest: _OpenView | None = None

    async def __aenter__(self) -> Self:
        await self._watched.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._latest is not None:
                await self._latest.store.close()
        finally:
            await self._watched.close()

    @asynccontextmanager
    async def view(self) -> AsyncIterator[StateView]:
        current = await self._opened_after(next(self._order))
        try:
            yield current.view
        finally:
            current.users -= 1
            if current is not self._latest and not current.users:
                await current.store.close()

    async def _opened_after(self, requested_at: int) -> _OpenView:
        async with self._opening:
            former = self._latest
            if former is None or former.opened_at < requested_at:
                opened_at, store = next(self._order), ReadOnlyStateStore(self._state_dir)
                await store.open()
                self._latest = _OpenView(self._view_of(store), store, opened_at)
                if former is not None and not former.users:
                    await former.store.close()
            current = self._latest
            assert current is not None  # noqa: S101  # it existed, or was just made
            current.users += 1
            return current

    def _view_of(self, store: ReadOnlyStateStore) -> StateView:
        manager = StatePersistenceManager(
            store=store,
            serializer=self._serializer,
            validator=self._validator,
            encryption=self._encryption,
        )
        sessions = self._sessions(manager)
        for extend in self._extensions:
            extend(sessions)
        return StateView(manager, sessions, [make(manager) for make in self._services])

    def writable(self) -> StateView:
        raise read_only()

    async def resolve(self, token: str) -> str | None:
        async with self.view() as view:
            return await _session_of(view.sessions, token)

    async def watch(self) -> NoticeStream:
        return await self._watched.watch()


def load_installed(group: str) -> list[tuple[str, object]]:
    """The objects of a group of entry points, by their names.

    One whose extra is not installed is left out, with a warning in the log. Raises
    ``AgentStateError`` for one that cannot be loaded for another reason.
    """
    found = []
    for entry in sorted(entry_points(group=group), key=lambda each: each.name):
        try:
            found.append((entry.name, entry.load()))
        except (ModuleNotFoundError, MissingExtraError) as error:
            _logger.warning("the entry point %r of %s is left out: %s", entry.name, group, error)
        except Exception as error:  # another package's module may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise AgentStateError(
                f"the entry point {entry.name!r} of {group} cannot be loaded: {reason}"
            ) from error
    return found


def _installed_extensions() -> list[Callable[[SessionManager], object]]:
    return [
        cast("Callable[[SessionManager], object]", added) for _, added in load_installed(EXTENSIONS)
    ]


async def check_writable(manager: StatePersistenceManager) -> None:
    """Raise ``StorageError`` while the storage takes no changes, such as on a full disk.

    That is tried, with a document of 64 KiB that is removed again, only when the storage has
    refused the last save or the disk has little room; otherwise nothing is written.
    """
    tried, root = manager.saves.refused, manager.state_dir
    if not tried and root is not None:
        with suppress(OSError):  # a save says what is wrong
            usage = await asyncio.to_thread(shutil.disk_usage, root)
            tried = usage.free < _LITTLE_ROOM
    if tried:
        await manager.save("system", "probe", {"text": "." * _PROBE_BYTES})
        await manager.delete("system", "probe")


async def _session_of(sessions: SessionManager, token: str) -> str | None:
    try:
        return (await sessions.tokens.resolve(token)).session_id
    except StateNotFoundError:
        return None


async def _backend(request: Request) -> Backend:
    found: Backend = request.app.state.backend
    return found


async def _runtime(backend: Annotated[Backend, Depends(_backend)]) -> AsyncAgentSessionManager:
    """The running runtime. Raises ``Problem`` (409) if no runtime runs."""
    if backend.runtime is None:
        raise read_only() if backend.read_only else no_runtime()
    return backend.runtime


async def _sessions(backend: Annotated[Backend, Depends(_backend)]) -> SessionManager:
    return backend.writable().sessions


BackendDep = Annotated[Backend, Depends(_backend)]
RuntimeDep = Annotated[AsyncAgentSessionManager, Depends(_runtime)]
SessionsDep = Annotated[SessionManager, Depends(_sessions)]
