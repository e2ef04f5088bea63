"""Steps of Pydantic AI's agents in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import (
    BinaryImage,
    ModelRequest,
    ModelResponse,
    TextPart,
    UserPromptPart,
)
from pydantic_ai.models.test import TestModel
from pydantic_ai_harness.step_persistence import (
    ContinuableSnapshot,
    RunRecord,
    StepEvent,
    StepPersistence,
    StepStore,
    ToolEffectRecord,
    continue_run,
)

from agent_state_integrations.pydantic_ai import AgentStateStepStore
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def message(text: Any, kind: str = "request") -> Any:
    if kind == "response":
        return ModelResponse(parts=[TextPart(content=text)], timestamp=NOON)
    return ModelRequest(parts=[UserPromptPart(content=text, timestamp=NOON)])


def snapshot(messages: list[Any], step: int = 0, **fields: Any) -> ContinuableSnapshot:
    made = {"run_id": "r", "step_index": step, "messages": messages, "timestamp": NOON, **fields}
    return ContinuableSnapshot(**made)


@pytest.fixture(params=STATES)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateStepStore]:
    async with state_of(request.param, tmp_path) as state, AgentStateStepStore(state) as made:
        yield made


async def test_runs(store: AgentStateStepStore) -> None:
    assert isinstance(store, StepStore)
    for n, name in enumerate(["c", "a", "b"]):
        started = NOON + timedelta(seconds=n)
        await store.register_run(
            RunRecord(
                run_id=name, conversation_id="x", parent_run_id=f"p{n % 2}", started_at=started
            )
        )
    naive = datetime(2026, 1, 1, 12, 0, 1, 500_000)  # noqa: DTZ001  # as an older version wrote it
    await store.register_run(RunRecord(run_id="naive", started_at=naive, registration_id="g"))
    await store.register_run(RunRecord(run_id="c", agent_name="again", started_at=NOON))

    assert [run.run_id for run in await store.list_runs()] == ["c", "a", "naive", "b"]
    assert [run.run_id for run in await store.list_runs(conversation_id="x")] == ["a", "b"]
    assert [run.run_id for run in await store.list_runs(parent_run_id="p0")] == ["b"]
    found = await store.get_run(run_id="naive")
    assert found is not None
    assert (found.registration_id, found.started_at) == ("g", naive)
    assert await store.get_run(run_id="missing") is None


async def test_events_are_appended_once(store: AgentStateStepStore) -> None:
    def event(n: int, key: str | None = None) -> StepEvent:
        return StepEvent(
            run_id="r", kind="run_started", step_index=n, timestamp=NOON, idempotency_key=key
        )

    for each in (event(0, "k"), event(1), event(2, "k"), event(1)):
        await store.append_event(each)

    assert await store.list_events(run_id="r") == [event(0, "k"), event(1), event(1)]
    assert await store.list_events(run_id="missing") == []


async def test_snapshots_come_back_in_the_order_in_which_they_were_saved(
    store: AgentStateStepStore,
) -> None:
    one = [message("a"), message("b", "response")]
    two = [*one, message(["look", BinaryImage(b"\x00\xff", media_type="image/png")])]
    other = [message("a"), message("compacted")]
    saved = [
        snapshot(one, 1, idempotency_key="5:x"),
        snapshot(two, 2, idempotency_key="3:y"),
        snapshot(other, 3),
        snapshot(two, 4, state="interrupted"),
    ]
    for each in [*saved, snapshot([], 9, idempotency_key="5:x")]:
        await store.save_snapshot(each)

    assert await store.list_snapshots(run_id="r", include_interrupted=True) == saved
    assert await store.latest_snapshot(run_id="r") == saved[2]
    assert await store.latest_snapshot(run_id="r", include_interrupted=True) == saved[3]
    assert await store.latest_snapshot(run_id="missing") is None


async def test_fifty_snapshots_at_once_are_all_kept(store: AgentStateStepStore) -> None:
    history = [message(str(n)) for n in range(50)]
    await asyncio.gather(*(store.save_snapshot(snapshot(history[:n], n)) for n in range(50)))

    found = await store.list_snapshots(run_id="r")
    assert sorted(each.step_index for each in found) == [*range(50)]
    assert all(each.messages == history[: each.step_index] for each in found)


async def test_a_run_takes_space_in_proportion_to_its_messages(tmp_path: Path) -> None:
    async with AgentStateStepStore(tmp_path) as store:
        history = [message("x" * 1000 + str(n)) for n in range(100)]
        for n in range(100):
            await store.save_snapshot(snapshot(history[: n + 1], n))

    assert sum(path.stat().st_size for path in tmp_path.rglob("snapshots.jsonl")) < 250_000


async def test_a_completed_effect_is_not_opened_again(store: AgentStateStepStore) -> None:
    def effect(call: str, status: Any, second: int = 0) -> ToolEffectRecord:
        started = NOON + timedelta(seconds=second)
        return ToolEffectRecord(
            tool_call_id=call, tool_name="t", run_id="r", status=status, started_at=started
        )

    for each in (effect("b", "started", 2), effect("a", "started", 1), effect("c", "started", 3)):
        await store.record_tool_effect(each)
    await store.record_tool_effect(effect("b", "completed", 2))
    await store.record_tool_effect(effect("b", "started", 2))
    await store.record_tool_effect(effect("c", "failed", 3))
    await store.record_tool_effect(effect("c", "started", 4))  # it is tried again

    unresolved = await store.list_unresolved_tool_effects(run_id="r")
    assert [each.tool_call_id for each in unresolved] == ["a", "c"]
    found = await store.get_tool_effect(run_id="r", tool_call_id="b")
    assert found == effect("b", "completed", 2)
    assert await store.get_tool_effect(run_id="r", tool_call_id="x") is None


async def test_every_id_is_its_own(store: AgentStateStepStore) -> None:
    for name in HOSTILE:
        await store.register_run(RunRecord(run_id=name, agent_name=name))
        await store.save_snapshot(snapshot([message(name)], run_id=name))
        await store.record_tool_effect(
            ToolEffectRecord(tool_call_id=name, tool_name=name, run_id="r", status="started")
        )

    for name in HOSTILE:
        run = await store.get_run(run_id=name)
        latest = await store.latest_snapshot(run_id=name)
        effect = await store.get_tool_effect(run_id="r", tool_call_id=name)
        assert run is not None
        assert latest is not None
        assert effect is not None
        assert run.agent_name == effect.tool_name == name
        assert latest.messages == [message(name)]


async def test_an_agent_goes_on_in_another_process(tmp_path: Path) -> None:
    async with AgentStateStepStore(tmp_path) as store:
        agent = Agent(TestModel(), capabilities=[StepPersistence(store=store)])
        result = await agent.run("hello", conversation_id="c")
        [run] = await store.list_runs(conversation_id="c")
        assert {each.kind for each in await store.list_events(run_id=run.run_id)} >= {
            "run_started",
            "run_completed",
        }

    async with AgentStateStepStore(tmp_path) as store:
        history = await continue_run(store, run_id=run.run_id)
        assert history == result.all_messages()


PROGRAM = """
import asyncio, itertools, sys
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai_harness.step_persistence import ContinuableSnapshot
from agent_state_integrations.pydantic_ai import AgentStateStepStore
async def main():
    name = (sys.argv + ["killed"])[1]
    run_id = "killed" if name == "killed" else "all"
    async with AgentStateStepStore({directory!r}) as store:
        for n in range(5) if name != "killed" else itertools.count():
            parts = [UserPromptPart(content=f"{{name}}-{{i}}") for i in range(n)]
            messages = [ModelRequest(parts=[part]) for part in parts]
            made = dict(run_id=run_id, step_index=n, agent_name=name, messages=messages)
            await store.save_snapshot(ContinuableSnapshot(**made))
            print(n, flush=True)
asyncio.run(main())
"""


def test_eight_processes_save_and_nothing_is_lost_by_kill_9(tmp_path: Path) -> None:
    program = PROGRAM.format(directory=str(tmp_path))
    run_at_once(program, 8)
    lines = kill_after_lines(program, 8)

    async def check() -> None:
        async with AgentStateStepStore(tmp_path) as store:
            shared = await store.list_snapshots(run_id="all")
            assert len(shared) == 40
            for each in [*shared, *await store.list_snapshots(run_id="killed")]:
                texts = [message.parts[0].content for message in each.messages]
                assert texts == [f"{each.agent_name}-{i}" for i in range(each.step_index)]
            killed = await store.list_snapshots(run_id="killed")
            assert len(killed) in (len(lines), len(lines) + 1)

    asyncio.run(check())


async def test_a_cancelled_snapshot_is_whole(tmp_path: Path) -> None:
    async with AgentStateStepStore(tmp_path) as store:
        await store.save_snapshot(snapshot([message("a")], 1))
        await cancel_soon(store.save_snapshot(snapshot([message("a"), message("b")], 2)))
        await store.save_snapshot(snapshot([message("a"), message("b"), message("c")], 3))

        found = await store.list_snapshots(run_id="r")
        assert [each.step_index for each in found] in ([1, 3], [1, 2, 3])
        assert found[-1].messages == [message("a"), message("b"), message("c")]


async def test_ten_thousand_events(tmp_path: Path) -> None:
    async with state_of("exclusive", tmp_path) as state:
        store = AgentStateStepStore(state)
        for start in range(0, 10_000, 500):
            await asyncio.gather(
                *(
                    store.append_event(StepEvent(run_id="r", kind="run_started", step_index=n))
                    for n in range(start, start + 500)
                )
            )

        assert len(await store.list_events(run_id="r")) == 10_000
