"""What the routes stand on: running parts of this process, or a directory that is only read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Protocol, Self

from fastapi import Depends, Request

from agent_state.errors import StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import NoticeStream
from agent_state.runtime import AsyncAgentSessionManager
from agent_state.sessions import SessionManager
from agent_state.storage import ReadOnlyStateStore
from agent_state.web.problems import no_runtime, read_only


@dataclass(frozen=True, slots=True)
class View:
    """The state as one request sees it."""

    manager: StatePersistenceManager
    sessions: SessionManager


class Backend(Protocol):
    """What is served. ``runtime`` is None where no agents run here."""

    read_only: bool
    runtime: AsyncAgentSessionManager | None

    def view(self) -> AbstractAsyncContextManager[View]:
        """Look at the state, for as long as one answer takes."""

    def changing(self) -> View:
        """The state, to be changed. Raises ``Problem`` (409) where it is only read."""

    async def resolve(self, token: str) -> str | None:
        """The id of the session that the token opens; None when it opens none.

        Raises ``SessionExpiredError`` when the time of that session is over.
        """

    async def watch(self) -> NoticeStream:
        """Changes from now on."""


class Running:
    """Parts that run in this process. Whoever started them ends them, after the server."""

    read_only = False

    def __init__(
        self,
        *,
        runtime: AsyncAgentSessionManager | None = None,
        manager: StatePersistenceManager | None = None,
        sessions: SessionManager | None = None,
    ) -> None:
        if manager is None:
            if runtime is None:
                raise TypeError("there is nothing to serve: give a runtime or a manager")
            manager = runtime.manager
        self.runtime = runtime
        self._view = View(manager, sessions or SessionManager(manager))

    def view(self) -> AbstractAsyncContextManager[View]:
        return nullcontext(self._view)

    def changing(self) -> View:
        return self._view

    async def resolve(self, token: str) -> str | None:
        return await _opened(self._view.sessions, token)

    async def watch(self) -> NoticeStream:
        return await self._view.manager.store.watch()


@dataclass(slots=True)
class _Look:
    """A directory as it was when it was opened, and how many requests look at it."""

    view: View
    store: ReadOnlyStateStore
    began: int
    users: int = 0


class Directory:
    """A directory that another process may own. Nothing in it is changed or locked.

    ``sessions``: what makes a ``SessionManager``, where an application has its own types of agents.

    A reader lays the journal over the files once, when it is opened. So it is opened anew for each
    request, to see what was acknowledged before that came; those that wait meanwhile share one.
    """

    read_only = True
    runtime: AsyncAgentSessionManager | None = None

    def __init__(
        self,
        state_dir: str | os.PathLike[str],
        *,
        sessions: Callable[[StatePersistenceManager], SessionManager] = SessionManager,
    ) -> None:
        self._state_dir = state_dir
        self._sessions = sessions
        self._watched = ReadOnlyStateStore(state_dir)
        self._turns = count()
        self._opening = asyncio.Lock()
        self._latest: _Look | None = None

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
    async def view(self) -> AsyncIterator[View]:
        look = await self._look(asked=next(self._turns))
        try:
            yield look.view
        finally:
            look.users -= 1
            if look is not self._latest and not look.users:
                await look.store.close()

    async def _look(self, asked: int) -> _Look:
        """One that was opened after it was asked for."""
        async with self._opening:
            former = self._latest
            if former is None or former.began < asked:
                began, store = next(self._turns), ReadOnlyStateStore(self._state_dir)
                await store.open()
                manager = StatePersistenceManager(store=store)
                view = View(manager, self._sessions(manager))
                self._latest = _Look(view, store, began)
                if former is not None and not former.users:
                    await former.store.close()
            look = self._latest
            assert look is not None  # noqa: S101  # it was there, or was just made
            look.users += 1
            return look

    def changing(self) -> View:
        raise read_only()

    async def resolve(self, token: str) -> str | None:
        async with self.view() as view:
            return await _opened(view.sessions, token)

    async def watch(self) -> NoticeStream:
        return await self._watched.watch()


async def _opened(sessions: SessionManager, token: str) -> str | None:
    try:
        return (await sessions.resolve_token(token)).session_id
    except StateNotFoundError:
        return None


async def _backend(request: Request) -> Backend:
    found: Backend = request.app.state.backend
    return found


async def _runtime(backend: Annotated[Backend, Depends(_backend)]) -> AsyncAgentSessionManager:
    """The running runtime. Raises ``Problem`` (409) where there is none."""
    if backend.runtime is None:
        raise read_only() if backend.read_only else no_runtime()
    return backend.runtime


async def _sessions(backend: Annotated[Backend, Depends(_backend)]) -> SessionManager:
    return backend.changing().sessions


Serving = Annotated[Backend, Depends(_backend)]
Runtime = Annotated[AsyncAgentSessionManager, Depends(_runtime)]
SessionsHere = Annotated[SessionManager, Depends(_sessions)]
