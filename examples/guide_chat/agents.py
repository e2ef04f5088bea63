"""The agents: a guide, a liaison for each field, and the orchestrators that do the work.

Each is an agent of the runtime, each piece of work a task: what dies in the middle is done again
from its last remembered step. Nothing is kept in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agent_state import AsyncAgentSessionManager, Task, TaskContext
from agent_state.errors import SessionEndedError
from agent_state.sessions import SessionManager, SessionNotFoundError
from agent_state_integrations.orchestration import preset

Handler = Callable[[TaskContext, Task], Awaitable[object]]

GUIDE = "guide_agent"
ORCHESTRATORS = {
    "content_liaison": "ContentAnalysisOrchestrator",
    "insights_liaison": "InsightsOrchestrator",
    "operations_liaison": "OperationsOrchestrator",
    "business_outcomes_liaison": "BusinessOutcomesOrchestrator",
}
SERVICES = {
    "ContentAnalysisOrchestrator": ("FileParser", "DataAnalyzer", "Summarizer"),
    "InsightsOrchestrator": ("DataAnalyzer", "ChartMaker"),
    "OperationsOrchestrator": ("ProcessMapper", "GapFinder"),
    "BusinessOutcomesOrchestrator": ("GoalFinder", "RoadmapWriter"),
}
WORDS = {
    "file": "content_liaison",
    "upload": "content_liaison",
    "trend": "insights_liaison",
    "chart": "insights_liaison",
    "process": "operations_liaison",
    "goal": "business_outcomes_liaison",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A user's request, as it is handed from task to task."""

    session_id: str
    conversation: str
    message_id: str
    text: str = ""

    @property
    def workflow_id(self) -> str:
        return f"workflow-{self.message_id}"


def liaison_for(text: str) -> str | None:
    """The liaison agent for the first known word; None without one."""
    words = (word.strip(".,!?").lower().removesuffix("s") for word in text.split())
    return next((WORDS[word] for word in words if word in WORDS), None)


class Team:
    """The agents' handlers. A service takes ``pause`` seconds."""

    def __init__(self, sessions: SessionManager, pause: float) -> None:
        self._sessions = sessions
        self._orchestration = preset(sessions)
        self._pause = pause

    async def say(self, request: Request, what: str, text: str, **about: str) -> None:
        """Add a message to the conversation, once for each ``what`` of a request."""
        await self._sessions.conversations.add(
            request.session_id,
            request.conversation,
            "assistant",
            text,
            orchestrator_context={"workflow_id": request.workflow_id, **about} if about else None,
            dedupe_key=f"{request.workflow_id}/{what}",
        )

    async def guide(self, ctx: TaskContext, task: Task) -> str:
        """Choose a liaison agent and hand the request over."""
        request = Request(**task.payload)
        liaison = liaison_for(request.text)
        if liaison is None:
            await self.say(request, "guide", "I can help with files, trends, processes and goals.")
            return "answered"
        await self.say(request, "guide", f"I ask the {liaison} to help you.")
        await ctx.submit(liaison, "answer", task.payload)
        return liaison

    async def liaison(self, ctx: TaskContext, task: Task) -> str:
        """Start the workflow of this liaison's orchestrator."""
        request, orchestrator = Request(**task.payload), ORCHESTRATORS[ctx.agent_id]
        workflow_id = request.workflow_id
        await self._orchestration.track(
            request.session_id,
            orchestrator,
            workflow_id,
            progress={"done": 0, "of": len(SERVICES[orchestrator])},
        )
        about = {"orchestrator": orchestrator, "workflow_id": workflow_id, "status": "active"}
        await self._sessions.conversations.update_context(
            request.session_id, request.conversation, about
        )
        await self.say(
            request, "started", "The work has begun.", orchestrator=orchestrator, status="active"
        )
        await ctx.submit(orchestrator, "work", task.payload)
        return workflow_id

    async def orchestrate(self, ctx: TaskContext, task: Task) -> str:
        """Use one service after the other, and report the progress in the conversation."""
        request, orchestrator = Request(**task.payload), ctx.agent_id
        services = SERVICES[orchestrator]
        for done, service in enumerate(services, start=1):
            await ctx.step(service, self.use, request, service)
            status = "completed" if done == len(services) else "processing"
            await self._orchestration.track(
                request.session_id,
                orchestrator,
                request.workflow_id,
                status=status,
                progress={"done": done},
            )
            text = f"{service} is done ({done} of {len(services)})."
            await self.say(request, service, text, orchestrator=orchestrator, status=status)
        about = {"orchestrator": orchestrator, "workflow_id": request.workflow_id}
        await self._sessions.conversations.update_context(
            request.session_id, request.conversation, {**about, "status": "completed"}
        )
        await self.say(
            request, "completed", "All done.", orchestrator=orchestrator, status="completed"
        )
        return "completed"

    async def use(self, request: Request, service: str) -> str:
        """The work of a service; a real one would read a file here, or call a model."""
        await asyncio.sleep(self._pause)
        await self._orchestration.report_service(
            request.session_id, service, "idle", workflow_id=request.workflow_id
        )
        return f"{service} has looked at: {request.text}"


def unless_ended(work: Handler) -> Handler:
    """The handler, which returns at once when the session has ended."""

    async def handle(ctx: TaskContext, task: Task) -> object:
        try:
            return await work(ctx, task)
        except (SessionNotFoundError, SessionEndedError):
            return "the session has ended"

    return handle


def assemble(runtime: AsyncAgentSessionManager, sessions: SessionManager, pause: float) -> None:
    """Give the runtime its handlers, before it starts."""
    team = Team(sessions, pause)
    runtime.handler("guide")(unless_ended(team.guide))
    runtime.handler("liaison")(unless_ended(team.liaison))
    runtime.handler("orchestrator")(unless_ended(team.orchestrate))


async def set_up(runtime: AsyncAgentSessionManager) -> None:
    """Create the agents; existing ones stay as they are."""
    await runtime.agents.create(GUIDE, agent_type="guide")
    for liaison, orchestrator in ORCHESTRATORS.items():
        await runtime.agents.create(liaison, agent_type="liaison")
        await runtime.agents.create(orchestrator, agent_type="orchestrator")
