"""Runs, snapshots and effects of tools that older versions have kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import (
    BinaryImage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.test import TestModel
from pydantic_ai_harness.step_persistence import (
    ContinuableSnapshot,
    RunRecord,
    StepEvent,
    StepPersistence,
    ToolEffectRecord,
    continue_run,
)

from agent_state_integrations.pydantic_ai import AgentStateStepStore
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("pydantic-ai-harness", "pydantic-ai-slim")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def messages(turn: int) -> list[Any]:
    image = BinaryImage(b"\x00\xff", media_type="image/png")
    history: list[Any] = [
        ModelRequest(parts=[UserPromptPart(content=["look ü", image], timestamp=NOON)]),
        ModelResponse(parts=[ToolCallPart("f", {"n": 1}, "c")], timestamp=NOON),
        ModelRequest(parts=[ToolReturnPart("f", {"n": [1, None]}, "c", timestamp=NOON)]),
        ModelResponse(parts=[TextPart(content="done")], timestamp=NOON),
    ]
    return history[: 2 * turn]


async def write(directory: Path, turn: int) -> None:
    async with AgentStateStepStore(directory) as store:
        for name in ("both", f"of/{turn}"):
            await store.register_run(RunRecord(run_id=name, started_at=NOON, conversation_id="x"))
            kind: Any = "run_started"
            await store.append_event(
                StepEvent(run_id=name, kind=kind, step_index=turn, timestamp=NOON)
            )
            await store.save_snapshot(
                ContinuableSnapshot(
                    run_id=name, step_index=turn, messages=messages(turn), timestamp=NOON
                )
            )
            for call, status in (("done", "started"), ("done", "completed"), ("open", "started")):
                state: Any = status
                await store.record_tool_effect(
                    ToolEffectRecord(
                        tool_call_id=f"{call} {turn}",
                        tool_name="t",
                        run_id=name,
                        status=state,
                        started_at=NOON,
                    )
                )
    if turn == 1:
        async with AgentStateStepStore(directory) as store:
            steps = StepPersistence(store=store, agent_name="helper")
            helper = Agent(TestModel(), name="helper", capabilities=[steps])
            await helper.run("begin", conversation_id="talk")


def _known(record: Any) -> dict[str, Any]:
    """The fields that have a value; newer versions have more fields."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(record), default=str))
    return {name: value for name, value in found.items() if value not in (None, {}, [])}


def _dumped(history: list[Any]) -> Any:
    return ModelMessagesTypeAdapter.dump_python(history, mode="json", exclude_none=True)


async def read(directory: Path) -> Any:
    async with AgentStateStepStore(directory) as store:
        found = []
        for run in await store.list_runs(conversation_id="x"):
            name = run.run_id
            snapshots = await store.list_snapshots(run_id=name)
            done = [
                await store.get_tool_effect(run_id=name, tool_call_id=f"done {turn}")
                for turn in (1, 2)
            ]
            effects = [each for each in done if each is not None]
            effects += await store.list_unresolved_tool_effects(run_id=name)
            found.append(
                [
                    _known(run),
                    [_known(each) for each in await store.list_events(run_id=name)],
                    [[each.step_index, _dumped(each.messages)] for each in snapshots],
                    [_known(each) for each in effects],
                ]
            )
        return sorted(found, key=lambda each: str(each[0]["run_id"]))


@pytest.mark.parametrize("older", older_states("pydantic_ai"), ids=name_of)
async def test_runs_of_an_older_version_go_on(older: OlderState, tmp_path: Path) -> None:
    await check(older, tmp_path, write, read)


@pytest.mark.parametrize("older", older_states("pydantic_ai"), ids=name_of)
async def test_an_agent_of_an_older_version_goes_on(older: OlderState, tmp_path: Path) -> None:
    older.unpack(tmp_path)
    async with AgentStateStepStore(tmp_path) as store:
        (run,) = await store.list_runs(conversation_id="talk")
        history = await continue_run(store, run_id=run.run_id)
        result = await Agent(TestModel(), name="helper").run("go on", message_history=history)
        assert len(result.all_messages()) == len(history) + 2
