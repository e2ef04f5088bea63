"""Tasks: queue, follow, wait, cancel."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from agent_state.errors import TaskFailedError
from agent_state.models import AgentState, Task, TaskStatus
from agent_state.runtime import AsyncAgentSessionManager
from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep, RuntimeDep
from agent_state.web.models import (
    After,
    CancelResult,
    IdempotencyKey,
    Limit,
    NewTask,
    Page,
    PathId,
    Wait,
)
from agent_state.web.paging import one, page
from agent_state.web.problems import documented
from agent_state.web.replies import reply

router = APIRouter(
    prefix="/api/agents/{agent_id:id}/tasks", tags=["tasks"], dependencies=[Depends(operator)]
)

_READ = documented([401, 403, 404, 422, 503])
_CHANGE = documented([401, 403, 404, 409, 422, 503])


@router.get("", operation_id="list_tasks", response_model=Page[Task], responses=_READ)
async def list_tasks(
    *,
    backend: BackendDep,
    agent_id: PathId,
    status: Annotated[TaskStatus | None, Query(description="Only of this status.")] = None,
    after: After = None,
    limit: Limit = 100,
) -> Response:
    """The agent's tasks by id, without those that were cleaned up."""
    async with backend.view() as view:
        await one(view.manager, "agents", (agent_id,), AgentState)
        keys = [key for key in await view.manager.keys("tasks", agent_id) if len(key) == 2]
        found = await page(
            view.manager,
            "tasks",
            keys,
            Task,
            after=after,
            limit=limit,
            wanted=lambda task: status is None or task.status == status,
        )
    return reply(found)


@router.post(
    "", operation_id="submit_task", response_model=Task, status_code=201, responses=_CHANGE
)
async def submit_task(
    *,
    request: Request,
    runtime: RuntimeDep,
    agent_id: PathId,
    new: NewTask,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = 0.0,
) -> Response:
    """Queue a task; it is stored when this answers. With `wait`, as it is when it has ended.

    The same `Idempotency-Key` gives the same task again, in whatever state.
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
    if wait:
        await _until_ended(request, runtime, task, wait)
        task = await runtime.tasks.get(task)
    return reply(task, 201)


@router.get("/{task_id:id}", operation_id="get_task", response_model=Task, responses=_READ)
async def get_task(
    *,
    request: Request,
    backend: BackendDep,
    agent_id: PathId,
    task_id: PathId,
    wait: Wait = 0.0,
) -> Response:
    """One task, with its progress, its steps and its result. With `wait`, once it has ended."""
    if backend.runtime is not None:
        task = await backend.runtime.tasks.get(Task(task_id=task_id, agent_id=agent_id))
        if wait:
            await _until_ended(request, backend.runtime, task, wait)
            task = await backend.runtime.tasks.get(task)
        return reply(task)
    async with backend.view() as view:
        found = await one(view.manager, "tasks", (agent_id, task_id), Task)
    return reply(found)


@router.post("/{task_id:id}/cancel", operation_id="cancel_task", responses=_CHANGE)
async def cancel_task(runtime: RuntimeDep, agent_id: PathId, task_id: PathId) -> CancelResult:
    """Cancel a task, running or not; whether it was not finished yet."""
    task = await runtime.tasks.get(Task(task_id=task_id, agent_id=agent_id))
    return CancelResult(cancelled=await runtime.tasks.cancel(task))


async def _until_ended(
    request: Request, runtime: AsyncAgentSessionManager, task: Task, seconds: float
) -> None:
    """Until the task has ended, however, or the time is over, or the server is about to stop."""
    ended = asyncio.ensure_future(runtime.tasks.result(task))
    closing = asyncio.ensure_future(request.app.state.closing.wait())
    try:
        await asyncio.wait({ended, closing}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        closing.cancel()
        await asyncio.wait({ended, closing})
    if not ended.cancelled():
        with suppress(TaskFailedError):  # its status says so
            ended.result()
