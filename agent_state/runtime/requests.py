"""Requests of other programs, dropped as files into the directory of a running runtime.

``requests/<id>.json`` is one of the requests below. The runtime that owns the directory carries it
out, and stores the answer in the same document: ``answered_at`` with a ``report``, or with an
``error``. Whoever asked removes the file. So a command line need not write around the owner. On a
directory that no process owns, ``StoredOperator`` does the same in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from agent_state.clock import Clock, instant, new_id, stamp
from agent_state.errors import (
    AgentStateError,
    Key,
    LockTimeoutError,
    RevisionConflictError,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    StateValidationError,
    StorageError,
    describe,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import SCHEMAS, AgentState, Priority
from agent_state.protocols import Notice
from agent_state.runtime import transitions
from agent_state.runtime.agents import AgentService
from agent_state.runtime.mail import MailService, new_message
from agent_state.runtime.operations import StoredTasks, TaskOperator, TaskRequest
from agent_state.runtime.state import OWNERS, RuntimeState, logger
from agent_state.runtime.tasks import TaskService
from agent_state.salvage import EarlierVersion, drop, put_back, read_version

REQUESTS = "requests"
"""The kind of the documents."""
_ANSWER = ("answered_at", "report", "error")
AGENT_KINDS = ("agents", "tasks", "sleep", "mail")
"""The kinds of the documents that are an agent's own; their keys begin with its id."""
_MAX_CONFLICTS = 5
"""How often documents are put back anew because they were saved meanwhile."""
_KEPT_HOURS = 1.0
"""How long an answer stays that nobody has fetched."""
OPERATOR = "operator"
"""The sender of a message that a person sends."""

AgentAction = Literal["wake", "stop", "start"]
FileAction = Literal["restore", "drop"]
DocumentAction = Literal["save", "erase"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SubmitRequest(_Request):
    """Queue a task, as ``runtime.tasks.submit``."""

    action: Literal["submit"] = "submit"
    agent_id: str
    name: str
    payload: dict[str, Any] = Field(default_factory=dict)
    priority: Priority | None = None
    delay_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_attempts: int | None = Field(default=None, ge=1)


class SendRequest(_Request):
    """Send a message, as ``runtime.mail.send``."""

    action: Literal["send"] = "send"
    to_agent: str
    from_agent: str = OPERATOR
    subject: str
    body: Any = ""
    priority: Priority = "normal"


class AgentRequest(_Request):
    """Wake agents, stop them, or let stopped ones work again."""

    action: AgentAction
    agents: list[str]


class QuarantineRequest(_Request):
    """Put files back that were set aside, or remove them."""

    action: FileAction
    files: list[str]


class DocumentRequest(_Request):
    """Save a document of an application's own kind, or erase it with all below its key."""

    action: DocumentAction
    kind: str
    key: list[str]
    body: dict[str, Any] = Field(default_factory=dict)


class DocumentFile(_Request):
    """The file of a document, as an earlier version of the directory has it."""

    kind: str
    key: list[str]
    text: str


class RestoreRequest(_Request):
    """Put documents back as they were: all of them, or none.

    ``agent_id``: they are one agent's own (``AGENT_KINDS``). The agent is loaded anew then, and a
    sleep that is not among them is ended.
    """

    action: Literal["restore_documents"] = "restore_documents"
    agent_id: str | None = None
    files: list[DocumentFile]


Request = Annotated[
    TaskRequest
    | SubmitRequest
    | SendRequest
    | AgentRequest
    | QuarantineRequest
    | DocumentRequest
    | RestoreRequest,
    Field(discriminator="action"),
]
_REQUEST: TypeAdapter[Any] = TypeAdapter(Request)


@dataclass(slots=True)
class RequestReport:
    """What was done with each item of a request."""

    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    """Items that were so before."""
    refused: dict[str, str] = field(default_factory=dict)
    """Items that could not be changed, with the reason."""


class RequestOperator(Protocol):
    """Whoever may change what a request names."""

    manager: StatePersistenceManager

    async def submit(self, request: SubmitRequest, ident: str) -> BaseModel:
        """Queue a task; once, however often it is called with that id of the request."""

    async def send(self, request: SendRequest, ident: str) -> BaseModel:
        """Send a message; once, as ``submit``."""

    async def change_agent(self, action: AgentAction, agent_id: str) -> bool:
        """Change one agent; whether that changed anything. Raises ``StateNotFoundError``."""

    async def change_file(self, action: FileAction, name: str) -> bool:
        """Put a quarantined file back, or remove it. Raises ``StateNotFoundError``."""

    async def change_tasks(self, request: TaskRequest) -> dict[str, Any]:
        """Apply an action to tasks; the report."""

    async def restore(self, request: RestoreRequest) -> RequestReport:
        """Put documents back. Raises ``StateValidationError`` for one that is not usable."""


async def perform(operator: RequestOperator, request: Any, ident: str) -> dict[str, Any]:
    """Carry out one request; the report as JSON. ``ident``: the id of the request."""
    if isinstance(request, TaskRequest):
        return await operator.change_tasks(request)
    if isinstance(request, SubmitRequest):
        return {"task": (await operator.submit(request, ident)).model_dump(mode="json")}
    if isinstance(request, SendRequest):
        return {"message": (await operator.send(request, ident)).model_dump(mode="json")}
    if isinstance(request, DocumentRequest):
        return {request.action: await _change_document(operator.manager, request)}
    if isinstance(request, RestoreRequest):
        return asdict(await operator.restore(request))
    if isinstance(request, AgentRequest):
        changing = operator.change_agent
        return await _perform_each(request.agents, lambda name: changing(request.action, name))
    changing_file = operator.change_file
    return await _perform_each(request.files, lambda name: changing_file(request.action, name))


async def _perform_each(
    names: Iterable[str], change: Callable[[str], Awaitable[bool]]
) -> dict[str, Any]:
    report = RequestReport()
    for name in dict.fromkeys(names):
        try:
            (report.changed if await change(name) else report.unchanged).append(name)
        except (StorageError, LockTimeoutError):
            raise
        except AgentStateError as error:
            report.refused[name] = error.message
    return asdict(report)


class StoredOperator:
    """Changes the store of a directory that no process owns, or that several share.

    A runtime that shares the store notices the changes.
    """

    def __init__(self, manager: StatePersistenceManager, clock: Clock) -> None:
        self.manager = manager
        self._clock = clock
        self._tasks = TaskOperator(manager, clock, StoredTasks(manager, clock))

    async def submit(self, request: SubmitRequest, ident: str) -> BaseModel:
        if await self.manager.load("agents", request.agent_id) is None:
            raise StateNotFoundError("no such agent", kind="agents", key=request.agent_id)
        task = transitions.new_task(
            new_id(),
            request.agent_id,
            request.name,
            request.payload,
            now=self._clock.now(),
            priority=request.priority or "normal",
            delay_seconds=request.delay_seconds,
            max_attempts=request.max_attempts or transitions.MAX_ATTEMPTS,
        )
        await self.manager.save("tasks", (task.agent_id, task.task_id), task, expected=0)
        return task

    async def send(self, request: SendRequest, ident: str) -> BaseModel:
        message = new_message(
            new_id(),
            request.from_agent,
            request.to_agent,
            subject=request.subject,
            body=request.body,
            priority=request.priority,
            now=self._clock.now(),
        )
        key = (message.to_agent, message.message_id)
        await self.manager.save("mail", key, message, expected=0)
        return message

    async def change_agent(self, action: AgentAction, agent_id: str) -> bool:
        stored = await self.manager.load_with_revision("agents", agent_id)
        if stored is None or not isinstance(stored.state, AgentState):
            raise StateNotFoundError("no such agent", kind="agents", key=agent_id)
        agent, group = stored.state, self.manager.new_group()
        if action == "wake":
            sleep = await self.manager.load_with_revision("sleep", agent_id)
            if sleep is None:
                return False
            group.delete("sleep", agent_id, expected=sleep.revision)
            agent.metadata["woken_by"] = "manual_wake"
            agent.status = "idle" if agent.status == "sleeping" else agent.status
        elif (agent.status == "stopped") == (action == "stop"):
            return False
        else:
            agent.status = "stopped" if action == "stop" else "idle"
        group.save("agents", agent_id, agent, expected=stored.revision)
        await self.manager.commit(group)
        return True

    async def change_file(self, action: FileAction, name: str) -> bool:
        if action == "drop":
            await drop(self.manager, name)
        else:
            await put_back(self.manager, name)
        return True

    async def change_tasks(self, request: TaskRequest) -> dict[str, Any]:
        return (await self._tasks.perform(request)).to_dict()

    async def restore(self, request: RestoreRequest) -> RequestReport:
        return await _restore(self.manager, request)


async def _change_document(manager: StatePersistenceManager, request: DocumentRequest) -> int:
    kind, key = request.kind, tuple(request.key)
    if kind in SCHEMAS or kind == REQUESTS:  # the runtime, sessions and others hold them in memory
        raise StateValidationError("this kind is not an application's own", kind=kind, key=key)
    if request.action == "save":
        return await manager.save(kind, key, request.body)
    return await manager.erase(kind, key)


async def _restore(manager: StatePersistenceManager, request: RestoreRequest) -> RequestReport:
    """Put documents back by one compare-and-set. Raises as ``RequestOperator.restore``."""
    versions = []
    for file in request.files:
        key = tuple(file.key)
        if request.agent_id != (key[0] if file.kind in AGENT_KINDS else None):
            what = "the request is about something else"
            raise StateValidationError(what, kind=file.kind, key=key)
        versions.append(await read_version(manager, file.kind, key, file.text.encode()))
    attempts = _MAX_CONFLICTS
    while True:
        attempts -= 1
        try:
            return await _put_versions(manager, versions, request.agent_id)
        except RevisionConflictError:
            if not attempts:
                raise


async def _put_versions(
    manager: StatePersistenceManager, versions: list[EarlierVersion], agent_id: str | None
) -> RequestReport:
    report, group = RequestReport(), manager.new_group()
    for kind, version, body in versions:
        named = describe(kind, version.key)
        try:
            stored = await manager.load_with_revision(kind, version.key)
        except StateCorruptedError:
            stored = None  # it is in the quarantine now
        if stored is not None and stored.state.model_dump() == version.state.model_dump():
            report.unchanged.append(named)
            continue
        expected = stored.revision if stored is not None else None
        group.put(kind, version.key, body, schema=version.schema, expected=expected)
        report.changed.append(named)
    if agent_id is not None:
        sleep = await manager.load_with_revision("sleep", agent_id)
        if sleep is not None and all(version.kind != "sleep" for version in versions):
            group.delete("sleep", agent_id, expected=sleep.revision)
            report.changed.append(describe("sleep", (agent_id,)))
        # A runtime that shares the store does not own the agent then, and reads it anew.
        key = (OWNERS, agent_id)
        owner = await manager.load_with_revision("system", key)
        if owner is None:
            group.check("system", key, 0)
        else:
            body = {**owner.state.model_dump(), "owner": ""}
            group.save("system", key, body, expected=owner.revision)
    if report.changed:
        await manager.commit(group)
    return report


class LiveOperator:
    """Changes the agents of one runtime, in memory and in the store."""

    def __init__(
        self,
        state: RuntimeState,
        tasks: TaskService,
        mail: MailService,
        agents: AgentService,
        follow: Callable[[Notice], Awaitable[bool]],
    ) -> None:
        self.manager = state.manager
        self._tasks = tasks
        self._mail = mail
        self._agents = agents
        self._follow = follow

    async def submit(self, request: SubmitRequest, ident: str) -> BaseModel:
        return await self._tasks.submit(
            request.agent_id,
            request.name,
            request.payload,
            priority=request.priority,
            delay_seconds=request.delay_seconds,
            max_attempts=request.max_attempts,
            dedupe_key=f"request {ident}",
        )

    async def send(self, request: SendRequest, ident: str) -> BaseModel:
        return await self._mail.send(
            request.from_agent,
            request.to_agent,
            subject=request.subject,
            body=request.body,
            priority=request.priority,
            dedupe_key=f"request {ident}",
        )

    async def change_agent(self, action: AgentAction, agent_id: str) -> bool:
        if action == "wake":
            return await self._agents.wake(agent_id)
        if (self._agents.get(agent_id).status == "stopped") == (action == "stop"):
            return False
        await (self._agents.stop if action == "stop" else self._agents.start)(agent_id)
        return True

    async def change_file(self, action: FileAction, name: str) -> bool:
        if action == "drop":
            await drop(self.manager, name)
            return True
        kind, key, revision = await put_back(self.manager, name)
        # The agents take it in as they take in a file that a person has changed.
        return await self._follow(Notice(kind, key, revision, outside=True))

    async def change_tasks(self, request: TaskRequest) -> dict[str, Any]:
        return (await self._tasks.perform(request)).to_dict()

    async def restore(self, request: RestoreRequest) -> RequestReport:
        write = partial(_restore, self.manager, request)
        if request.agent_id is None:
            return await write()
        return await self._agents.replace(request.agent_id, write)


class RequestService:
    """Carries out the requests in the store of one runtime, one after another."""

    def __init__(self, state: RuntimeState, operator: RequestOperator) -> None:
        self._state = state
        self._operator = operator
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
            request = _REQUEST.validate_python(body)
            report = await perform(self._operator, request, where)
        except (StorageError, LockTimeoutError):
            raise  # the service is started again, and looks at the request again
        except (AgentStateError, ValidationError) as error:
            logger.warning("%s was refused: %s", where, error)
            return {"error": str(error)}
        changed = report.get("changed", 1)
        count = len(changed) if isinstance(changed, list) else changed
        logger.info("%s: %s changed %d", where, request.action, count)
        return {"report": report}

    async def _forget_old(self, key: Key, answered_at: str) -> None:
        """Remove an answer that nobody has fetched."""
        try:
            old = self._state.clock.now() - instant(answered_at) > timedelta(hours=_KEPT_HOURS)
        except ValueError:
            old = True
        if old:
            await self._state.manager.delete(REQUESTS, key)
