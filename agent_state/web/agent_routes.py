"""The routes of agents, their tasks and their mail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import Query, Request

from agent_state.errors import Key, StateValidationError, TaskFailedError
from agent_state.manager import StatePersistenceManager
from agent_state.models import (
    AgentState,
    MailMessage,
    MailStatus,
    SleepState,
    Task,
    TaskStatus,
    meaning_of,
)
from agent_state.runtime import AsyncAgentSessionManager, TaskRequest
from agent_state.runtime.live_agent import with_stored_id
from agent_state.runtime.operations import StoredTasks, TaskOperator
from agent_state.web.auth import operator
from agent_state.web.backend import Backend, BackendDep, RuntimeDep
from agent_state.web.models import (
    After,
    CancelResult,
    IdempotencyKey,
    Limit,
    NewAgent,
    NewMail,
    NewTask,
    OperationReport,
    Page,
    PathId,
    ReplyRequest,
    RetryResult,
    SleepRequest,
    TaskOperation,
    Wait,
    WakeResult,
)
from agent_state.web.operations import (
    Created,
    OperationRouter,
    Versioned,
    document,
    load_one,
    load_page,
    load_version,
)
from agent_state.web.problems import Problem

W = TypeVar("W", Task, MailMessage)

agents = OperationRouter(
    "/api/agents", "agents", access=operator, about="Agents: create, stop, start, sleep, wake."
)
tasks = OperationRouter(
    "/api/agents/{agent_id:id}/tasks",
    "tasks",
    access=operator,
    about="The work of agents: queue it, follow it, run it again, cancel and delete it.",
)
all_tasks = OperationRouter("/api/tasks", "tasks", access=operator)
mail = OperationRouter(
    "/api/agents/{agent_id:id}/mail", "mail", access=operator, about="Messages between agents."
)

_AGENT = document("agents", "agent_id")
_SLEEP = document("sleep", "agent_id")
_TASK = document("tasks", "agent_id", "task_id")
_MAIL = document("mail", "agent_id", "message_id")


async def _only_task(given: Mapping[str, Any]) -> tuple[str, Key]:
    """The task of an id, which no other agent has. Raises ``StateNotFoundError``."""
    task = await given["runtime"].tasks.get(given["task_id"])
    return "tasks", (task.agent_id, task.task_id)


# -- agents ------------------------------------------------------------------------------------


@agents.operation("POST", "", status=201, existing="It existed, and was not changed.")
async def create_agent(runtime: RuntimeDep, new: NewAgent) -> Created[AgentState]:
    """Create an agent; it runs at once if its type has a handler. An existing one is not changed.

    An existing agent of another type is an error (422).
    """
    existed = new.agent_id in runtime.agents.list()
    agent = await runtime.agents.create(
        new.agent_id,
        agent_type=new.agent_type,
        name=new.name,
        configuration=new.configuration,
        system_prompt=new.system_prompt,
        metadata=new.metadata,
    )
    return Created(agent, existed)


@agents.operation("GET", "/{agent_id:id}")
async def get_agent(backend: BackendDep, agent_id: PathId) -> Versioned[AgentState]:
    """One agent, with its memory."""
    async with backend.view() as view:
        return await load_version(view.manager, "agents", (agent_id,), AgentState)


@agents.operation("POST", "/{agent_id:id}/stop", changes=_AGENT)
async def stop_agent(runtime: RuntimeDep, agent_id: PathId) -> AgentState:
    """Stop the agent after its current task. Its state, tasks and mail stay."""
    await runtime.agents.stop(agent_id)
    return runtime.agents.get(agent_id)


@agents.operation("POST", "/{agent_id:id}/start", changes=_AGENT)
async def start_agent(runtime: RuntimeDep, agent_id: PathId) -> AgentState:
    """Start a stopped agent."""
    await runtime.agents.start(agent_id)
    return runtime.agents.get(agent_id)


@agents.operation("GET", "/{agent_id:id}/sleep")
async def get_sleep(backend: BackendDep, agent_id: PathId) -> Versioned[SleepState]:
    """The end of the agent's sleep, and its reason; 404 if it is awake."""
    async with backend.view() as view:
        return await load_version(view.manager, "sleep", (agent_id,), SleepState)


@agents.operation("POST", "/{agent_id:id}/sleep", changes=_SLEEP)
async def let_sleep(runtime: RuntimeDep, agent_id: PathId, request: SleepRequest) -> SleepState:
    """Let the agent start no task until the time, a wake event, or a call of `wake`."""
    return await runtime.agents.sleep(
        agent_id,
        seconds=request.seconds,
        until=request.until,
        wake_on=request.wake_on,
        reason=request.reason,
    )


@agents.operation("POST", "/{agent_id:id}/wake", changes=_SLEEP)
async def wake_agent(runtime: RuntimeDep, agent_id: PathId) -> WakeResult:
    """End the agent's sleep, whatever it waits for."""
    return WakeResult(woken=await runtime.agents.wake(agent_id))


# -- tasks -------------------------------------------------------------------------------------


async def _page_of_agent(
    model: type[W], backend: Backend, agent_id: str, status: str | None, **paging: Any
) -> Page[W]:
    """A page of the agent's tasks or mail by id, without what was archived."""
    kind = "tasks" if model is Task else "mail"
    async with backend.view() as view:
        await load_one(view.manager, "agents", (agent_id,), AgentState)
        keys = [key for key in await view.manager.keys(kind, agent_id) if len(key) == 2]

        def wanted(found: W) -> bool:
            return status in (None, meaning_of(found.status))

        return await load_page(view.manager, kind, keys, model, wanted=wanted, **paging)


@tasks.operation("GET", "")
async def list_tasks(
    *,
    backend: BackendDep,
    agent_id: PathId,
    status: Annotated[TaskStatus | None, Query(description="Only of this status.")] = None,
    after: After = None,
    limit: Limit = 100,
) -> Page[Task]:
    """The agent's tasks by id, without the archived ones."""
    return await _page_of_agent(Task, backend, agent_id, status, after=after, limit=limit)


@tasks.operation("POST", "", status=201)
async def submit_task(
    *,
    request: Request,
    runtime: RuntimeDep,
    agent_id: PathId,
    new: NewTask,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = 0.0,
) -> Task:
    """Queue a task; it is durable once this is answered. `wait` returns it once it has ended.

    A repeated `Idempotency-Key` returns the same task, in its present status, for a day at least.
    Tasks of two names may have one key; with other content it is refused (422).
    """
    task = await runtime.tasks.submit(
        agent_id,
        new.name,
        new.payload,
        priority=new.priority,
        delay_seconds=new.delay_seconds,
        max_attempts=new.max_attempts,
        timeout_seconds=new.timeout_seconds,
        dedupe_key=idempotency_key,
    )
    return await _ended(request, runtime, task, wait) if wait else task


@tasks.operation("GET", "/{task_id:id}")
async def get_task(
    *, request: Request, backend: BackendDep, agent_id: PathId, task_id: PathId, wait: Wait = 0.0
) -> Versioned[Task]:
    """One task, with its progress, steps and result. `wait` returns it once it has ended."""
    if backend.runtime is not None:
        task = await backend.runtime.tasks.get((agent_id, task_id))
        if wait:
            task = await _ended(request, backend.runtime, task, wait)
        return await _version_of(backend.runtime.manager, task)
    async with backend.view() as view:
        return await load_version(view.manager, "tasks", (agent_id, task_id), Task)


@tasks.operation("POST", "/{task_id:id}/cancel", changes=_TASK)
async def cancel_task(runtime: RuntimeDep, agent_id: PathId, task_id: PathId) -> CancelResult:
    """Cancel a task, even if it is running."""
    task = await runtime.tasks.get((agent_id, task_id))
    return CancelResult(cancelled=await runtime.tasks.cancel(task))


# -- the tasks of all agents -------------------------------------------------------------------


@all_tasks.operation("POST", "")
async def operate_tasks(runtime: RuntimeDep, request: TaskOperation) -> OperationReport:
    """Run tasks again, cancel or delete them: those of `tasks`, or all that `filter` matches.

    `retry` is for dead and failed tasks (cancelled ones if the filter names that status), `cancel`
    for unfinished and `delete` for finished ones.
    """
    if bool(request.tasks) == (request.filter is not None):
        raise StateValidationError("give either tasks or a filter")
    asked = TaskRequest.model_validate(request.model_dump())
    return OperationReport(**(await runtime.tasks.perform(asked)).to_dict())


@all_tasks.operation("GET", "/{task_id:id}")
async def find_task(
    *, request: Request, backend: BackendDep, task_id: PathId, wait: Wait = 0.0
) -> Versioned[Task]:
    """One task by its id alone, also an archived one. `wait` returns it once it has ended."""
    if backend.runtime is not None:
        task = await backend.runtime.tasks.get(task_id)
        if wait:
            task = await _ended(request, backend.runtime, task, wait)
        return await _version_of(backend.runtime.manager, task)
    async with backend.view() as view:
        return await _version_of(view.manager, await _operator(view.manager).get(task_id))


@all_tasks.operation("DELETE", "/{task_id:id}", status=204, changes=_only_task)
async def delete_task(runtime: RuntimeDep, task_id: PathId) -> None:
    """Remove a finished task; another one is refused (409): cancel it first."""
    if not await runtime.tasks.delete(task_id):
        raise Problem(409, "not_finished", "The task has not ended; cancel it first.")


@all_tasks.operation("POST", "/{task_id:id}/retry", changes=_only_task)
async def retry_task(runtime: RuntimeDep, task_id: PathId) -> RetryResult:
    """Run a dead, failed or cancelled task again, at once, with all its attempts."""
    return RetryResult(retried=await runtime.tasks.retry(task_id))


@all_tasks.operation("POST", "/{task_id:id}/cancel", changes=_only_task)
async def cancel_any_task(runtime: RuntimeDep, task_id: PathId) -> CancelResult:
    """Cancel a task by its id alone, even if it is running."""
    return CancelResult(cancelled=await runtime.tasks.cancel(task_id))


async def _version_of(manager: StatePersistenceManager, task: Task) -> Versioned[Task]:
    """The task as it is stored now; an archived one has no revision."""
    key = (task.agent_id, task.task_id)
    stored = await manager.load_with_revision("tasks", key)
    if stored is None or not isinstance(stored.state, Task):
        return Versioned(task, None)
    return Versioned(with_stored_id(stored.state, key), stored.revision)


def _operator(manager: StatePersistenceManager) -> TaskOperator:
    return TaskOperator(manager, manager.clock, StoredTasks(manager, manager.clock))


async def _ended(
    request: Request, runtime: AsyncAgentSessionManager, task: Task, seconds: float
) -> Task:
    """The task once it has ended, or the time is over, or the server begins to stop."""
    ended = asyncio.ensure_future(runtime.tasks.result(task))
    closing = asyncio.ensure_future(request.app.state.closing.wait())
    try:
        await asyncio.wait({ended, closing}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        closing.cancel()
        await asyncio.wait({ended, closing})
    if not ended.cancelled():
        with suppress(TaskFailedError):  # the task's status has it
            ended.result()
    return await runtime.tasks.get(task)


# -- mail --------------------------------------------------------------------------------------


@mail.operation("GET", "")
async def list_mail(
    *,
    backend: BackendDep,
    agent_id: PathId,
    status: Annotated[MailStatus | None, Query(description="Only of this status.")] = None,
    after: After = None,
    limit: Limit = 100,
) -> Page[MailMessage]:
    """The agent's mail by id, without the messages that cleanup archived."""
    return await _page_of_agent(MailMessage, backend, agent_id, status, after=after, limit=limit)


@mail.operation("POST", "", status=201)
async def send_mail(
    *, runtime: RuntimeDep, agent_id: PathId, new: NewMail, idempotency_key: IdempotencyKey = None
) -> MailMessage:
    """Deliver a message; it is durable once this is answered.

    A repeated `Idempotency-Key` of the same sender returns the delivered message, for a day at
    least; with other content it is refused (422).
    """
    runtime.agents.get(agent_id)  # raises for an unknown agent, which would never read its mail
    return await runtime.mail.send(
        new.from_agent,
        agent_id,
        subject=new.subject,
        body=new.body,
        priority=new.priority,
        expects_reply=new.expects_reply,
        dedupe_key=idempotency_key,
        metadata=new.metadata,
    )


@mail.operation("GET", "/{message_id:id}")
async def get_mail(
    backend: BackendDep, agent_id: PathId, message_id: PathId
) -> Versioned[MailMessage]:
    """One message. This does not mark it as read."""
    async with backend.view() as view:
        return await load_version(view.manager, "mail", (agent_id, message_id), MailMessage)


@mail.operation("POST", "/{message_id:id}/read", changes=_MAIL)
async def read_mail(runtime: RuntimeDep, agent_id: PathId, message_id: PathId) -> MailMessage:
    """Mark a message as read."""
    return await runtime.mail.read(agent_id, message_id)


@mail.operation("POST", "/{message_id:id}/archive", changes=_MAIL)
async def archive_mail(runtime: RuntimeDep, agent_id: PathId, message_id: PathId) -> MailMessage:
    """Move a message from the inbox to the archive."""
    return await runtime.mail.archive(agent_id, message_id)


@mail.operation("POST", "/{message_id:id}/reply", status=201, changes=_MAIL)
async def reply_to_mail(
    runtime: RuntimeDep, agent_id: PathId, message_id: PathId, new: ReplyRequest
) -> MailMessage:
    """Reply to a message, once: a second reply returns the first one."""
    return await runtime.mail.reply(agent_id, message_id, new.body, priority=new.priority)
