"""Sessions, and a run that waits for an approval, that older versions have kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agents import Agent, Model, ModelResponse, Runner, Usage, function_tool
from agents.run import RunConfig
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)

from agent_state_integrations.openai_agents import AgentStateSession, list_sessions
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("openai-agents",)
DONE: list[str] = []


class Clerk(Model):
    """Sends a letter first, and is done when it was sent."""

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("input", args[1] if args else ())
        answer: Any = ResponseFunctionToolCall(
            type="function_call", name="send", arguments='{"to": "ann"}', call_id="c1"
        )
        if any(each.get("type") == "function_call_output" for each in given):
            text = ResponseOutputText(text="done", type="output_text", annotations=[])
            answer = ResponseOutputMessage(
                id="m", type="message", role="assistant", status="completed", content=[text]
            )
        return ModelResponse(output=[answer], usage=Usage(), response_id=None)

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@function_tool(needs_approval=True)
def send(to: str) -> str:
    """Send a letter."""
    DONE.append(to)
    return "sent"


CLERK = Agent("clerk", model=Clerk(), tools=[send])
QUIET = RunConfig(tracing_disabled=True)


async def write(directory: Path, turn: int) -> None:
    async with AgentStateSession(directory, "talk/ü") as session:
        await session.add_items([{"role": "user", "content": f"{n} in {turn}"} for n in range(4)])
        await session.pop_item()
        await session.update_metadata(**{f"title{turn}": "a talk"})
    async with AgentStateSession(directory, f"run {turn}") as session:
        result = await Runner.run(CLERK, "write to ann", session=session, run_config=QUIET)
        await session.save_run_state(result.to_state())
    async with AgentStateSession(directory, f"lives {turn}", ttl=10**9) as session:
        await session.add_items([{"role": "user", "content": "for long"}])


async def read(directory: Path) -> Any:
    found = {}
    for name in await list_sessions(directory):
        async with AgentStateSession(directory, name) as session:
            found[name] = [await session.get_items(), await session.metadata()]
    return found


@pytest.mark.parametrize("older", older_states("openai_agents"), ids=name_of)
async def test_a_session_of_an_older_version_goes_on(older: OlderState, tmp_path: Path) -> None:
    await check(older, tmp_path, write, read)


@pytest.mark.parametrize("older", older_states("openai_agents"), ids=name_of)
async def test_an_interrupted_run_of_an_older_version_goes_on(
    older: OlderState, tmp_path: Path
) -> None:
    older.unpack(tmp_path)
    DONE.clear()
    async with AgentStateSession(tmp_path, "run 1") as session:
        state = await session.load_run_state(CLERK)
        assert state is not None
        state.approve(state.get_interruptions()[0])
        result = await Runner.run(CLERK, state, session=session, run_config=QUIET)
        kinds = [each.get("type", each.get("role")) for each in await session.get_items()]

    assert (result.final_output, DONE) == ("done", ["ann"])
    assert kinds == ["user", "function_call", "function_call_output", "message"]
