"""Agents: look, create, stop, start, let sleep, wake."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response

from agent_state.models import AgentState, SleepState
from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep, RuntimeDep
from agent_state.web.models import After, Limit, NewAgent, Page, PathId, SleepRequest, WakeResult
from agent_state.web.paging import one, page
from agent_state.web.problems import documented
from agent_state.web.replies import reply

router = APIRouter(prefix="/api/agents", tags=["agents"], dependencies=[Depends(operator)])

_READ = documented([401, 403, 404, 422, 503])
_CHANGE = documented([401, 403, 404, 409, 422, 503])


@router.get(
    "",
    operation_id="list_agents",
    response_model=Page[AgentState],
    responses=documented([401, 403, 422, 503]),
)
async def list_agents(backend: BackendDep, after: After = None, limit: Limit = 100) -> Response:
    """The agents that are stored, by id."""
    async with backend.view() as view:
        keys = [key for key in await view.manager.keys("agents") if len(key) == 1]
        found = await page(view.manager, "agents", keys, AgentState, after=after, limit=limit)
    return reply(found)


@router.post(
    "",
    operation_id="create_agent",
    response_model=AgentState,
    status_code=201,
    responses={
        200: {"description": "It was there, and was left as it is.", "model": AgentState},
        **documented([401, 403, 409, 422, 503]),
    },
)
async def create_agent(runtime: RuntimeDep, new: NewAgent) -> Response:
    """An agent, running at once if its type has a handler. One that exists is left as it is.

    One of another type is a mistake (422).
    """
    status = 200 if new.agent_id in runtime.agents.list() else 201
    made = await runtime.agents.create(
        new.agent_id,
        agent_type=new.agent_type,
        name=new.name,
        configuration=new.configuration,
        system_prompt=new.system_prompt,
        metadata=new.metadata,
    )
    return reply(made, status)


@router.get("/{agent_id:id}", operation_id="get_agent", response_model=AgentState, responses=_READ)
async def get_agent(backend: BackendDep, agent_id: PathId) -> Response:
    """One agent, with what it knows."""
    async with backend.view() as view:
        found = await one(view.manager, "agents", (agent_id,), AgentState)
    return reply(found)


@router.post(
    "/{agent_id:id}/stop", operation_id="stop_agent", response_model=AgentState, responses=_CHANGE
)
async def stop_agent(runtime: RuntimeDep, agent_id: PathId) -> Response:
    """Let the agent finish its task and begin no other. Its state, tasks and mail stay."""
    await runtime.agents.stop(agent_id)
    return reply(runtime.agents.get(agent_id))


@router.post(
    "/{agent_id:id}/start", operation_id="start_agent", response_model=AgentState, responses=_CHANGE
)
async def start_agent(runtime: RuntimeDep, agent_id: PathId) -> Response:
    """Let a stopped agent work again."""
    await runtime.agents.start(agent_id)
    return reply(runtime.agents.get(agent_id))


@router.get(
    "/{agent_id:id}/sleep", operation_id="get_sleep", response_model=SleepState, responses=_READ
)
async def get_sleep(backend: BackendDep, agent_id: PathId) -> Response:
    """Why and until when the agent sleeps; 404 when it is awake."""
    async with backend.view() as view:
        found = await one(view.manager, "sleep", (agent_id,), SleepState)
    return reply(found)


@router.post(
    "/{agent_id:id}/sleep", operation_id="let_sleep", response_model=SleepState, responses=_CHANGE
)
async def let_sleep(runtime: RuntimeDep, agent_id: PathId, nap: SleepRequest) -> Response:
    """Let the agent begin no task until the time, a wake event, or a call of `wake`."""
    slept = await runtime.agents.sleep(
        agent_id, seconds=nap.seconds, until=nap.until, wake_on=nap.wake_on, reason=nap.reason
    )
    return reply(slept)


@router.post("/{agent_id:id}/wake", operation_id="wake_agent", responses=_CHANGE)
async def wake_agent(runtime: RuntimeDep, agent_id: PathId) -> WakeResult:
    """End the agent's sleep, whatever it waits for."""
    return WakeResult(woken=await runtime.agents.wake(agent_id))
