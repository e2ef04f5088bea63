"""A crew: each member has a role, talks with a language model, and calls tools.

It knows nothing of tests. A clock, a model and a runtime are given to it, as to any program.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from agent_state import AgentRuntime, Task, TaskContext

Message: TypeAlias = dict[str, Any]
Model: TypeAlias = Callable[[list[Message]], Awaitable[Message]]
Tool: TypeAlias = Callable[..., Awaitable[str]]

_TURNS = 10
"""How often a member may ask the model for one assignment."""


class Crew:
    """Members who work on assignments, one at a time each, until the model has no more calls.

    Every answer of the model and every result of a tool is a step, so a crash repeats none of
    them. ``tools``: by their names.
    """

    def __init__(
        self,
        runtime: AgentRuntime,
        model: Model,
        tools: Mapping[str, Tool] | None = None,
    ) -> None:
        self.runtime = runtime
        self._model = model
        self._tools = dict(tools or {})
        runtime.task("assignment", agent_type="member")(self._work)

    async def hire(self, name: str, role: str) -> None:
        """Add a member; one who is there already stays as they are."""
        await self.runtime.agents.create(name, agent_type="member", configuration={"role": role})

    async def assign(self, name: str, text: str) -> Task:
        """Give a member something to do; ``result`` waits for it."""
        return await self.runtime.tasks.submit(name, "assignment", {"text": text})

    async def result(self, assignment: Task) -> str:
        """The last answer. Raises ``TaskFailedError``."""
        return str(await self.runtime.tasks.result(assignment))

    async def _work(self, ctx: TaskContext, task: Task) -> str:
        talk: list[Message] = [
            {"role": "system", "content": f"You are the {ctx.configuration['role']}."},
            {"role": "user", "content": task.payload["text"]},
        ]
        for turn in range(_TURNS):
            answer = await ctx.step(f"think {turn}", self._ask, list(talk))
            talk.append(answer)
            if not answer.get("tool_calls"):
                ctx.memory.setdefault("done", []).append(task.payload["text"])
                return str(answer["content"])
            for call in answer["tool_calls"]:
                result = await self._call(ctx, call)
                talk.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        raise RuntimeError(f"no answer after {_TURNS} turns")

    async def _ask(self, talk: list[Message]) -> Message:
        return await self._model(talk)

    async def _call(self, ctx: TaskContext, call: Mapping[str, Any]) -> str:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        if name not in self._tools:
            return f"There is no tool {name}."
        return await ctx.step(f"{name} {call['id']}", self._tools[name], **arguments)
