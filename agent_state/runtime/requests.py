"""Requests of other programs, dropped as files into the directory of a running runtime.

``requests/<id>.json`` is a ``TaskRequest``. The runtime that owns the directory carries it out,
and stores the answer in the same document: ``answered_at`` with a ``report``, or with an ``error``.
Whoever asked removes the file. So a command line need not write around the owner.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pydantic import ValidationError

from agent_state.clock import instant, stamp
from agent_state.errors import (
    AgentStateError,
    Key,
    LockTimeoutError,
    RevisionConflictError,
    SchemaTooNewError,
    StateCorruptedError,
    StorageError,
    describe,
)
from agent_state.runtime.operations import TaskReport, TaskRequest
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.tasks import TaskService

REQUESTS = "requests"
"""The kind of the documents."""
_ANSWER = ("answered_at", "report", "error")
_KEPT_HOURS = 1.0
"""How long an answer stays that nobody has fetched."""


class RequestService:
    """Carries out the requests in the store of one runtime, one after another."""

    def __init__(self, state: RuntimeState, tasks: TaskService) -> None:
        self._state = state
        self._tasks = tasks
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start; what is bound to an event loop is made here."""
        self._waiting: dict[Key, None] = {}
        self._arrived = asyncio.Event()

    def note(self, key: Key) -> None:
        """Look at a request soon; another process wrote or removed it."""
        self._waiting[key] = None
        self._arrived.set()

    async def find(self) -> None:
        """Look at every request soon."""
        for key in await self._state.manager.keys(REQUESTS):
            self.note(key)

    async def run(self) -> None:
        """Answer until cancelled, beginning with what was asked while no runtime ran."""
        await self.find()
        while True:
            self._arrived.clear()
            while self._waiting:
                key = next(iter(self._waiting))
                await self._answer(key)
                self._waiting.pop(key, None)
            await self._arrived.wait()

    async def _answer(self, key: Key) -> None:
        """Carry out one request, unless it is answered. Raises if the store refuses."""
        manager, where = self._state.manager, describe(REQUESTS, key)
        try:
            stored = await manager.load_with_revision(REQUESTS, key)
        except (StateCorruptedError, SchemaTooNewError) as error:
            logger.warning("%s is not usable: %s", where, error)
            return
        if stored is None:
            return  # it was withdrawn
        body = stored.state.model_dump()
        if "answered_at" in body:
            await self._forget_old(key, str(body["answered_at"]))
            return
        body |= await self._perform(where, {k: v for k, v in body.items() if k not in _ANSWER})
        body["answered_at"] = stamp(self._state.clock.now())
        try:
            await manager.save(REQUESTS, key, body, expected=stored.revision)
        except RevisionConflictError:
            logger.warning("%s was withdrawn while it was carried out", where)

    async def _perform(self, where: str, body: dict[str, object]) -> dict[str, object]:
        try:
            request = TaskRequest.model_validate(body)
            report: TaskReport = await self._tasks.perform(request)
        except (StorageError, LockTimeoutError):
            raise  # the service is started again, and looks at the request again
        except (AgentStateError, ValidationError) as error:
            logger.warning("%s was refused: %s", where, error)
            return {"error": str(error)}
        logger.info("%s: %s changed %d tasks", where, request.action, report.changed)
        return {"report": report.to_dict()}

    async def _forget_old(self, key: Key, answered_at: str) -> None:
        """Remove an answer that nobody has fetched."""
        try:
            old = self._state.clock.now() - instant(answered_at) > timedelta(hours=_KEPT_HOURS)
        except ValueError:
            old = True
        if old:
            await self._state.manager.delete(REQUESTS, key)
