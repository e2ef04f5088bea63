"""``agent-state import pydantic-ai``: what the harness' stores have, in a state directory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai.messages import BinaryImage, ModelRequest, UserPromptPart
from pydantic_ai_harness.step_persistence import (
    ContinuableSnapshot,
    FileStepStore,
    RunRecord,
    SqliteStepStore,
    StepEvent,
    ToolEffectRecord,
)

from agent_state.cli.app import run as main
from agent_state_integrations.pydantic_ai import AgentStateStepStore

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
RUNS = ("one", "a.b", "media", "unregistered")
IMAGE = BinaryImage(b"\x00\xff" * 100_000, media_type="image/png")  # stored beside the snapshots


def history(run_id: str, count: int) -> list[Any]:
    texts: list[Any] = [f"{run_id} {n}" for n in range(count)]
    return [
        ModelRequest(parts=[UserPromptPart(content=text, timestamp=NOON)])
        for text in [*texts, ["look", IMAGE], "x" * 100_000]
    ]


async def fill(store: Any) -> None:
    for run_id in RUNS:
        if run_id != "unregistered":
            await store.register_run(
                RunRecord(run_id=run_id, conversation_id="c", metadata={"é": ""}, started_at=NOON)
            )
        for n, state in enumerate(["complete", "interrupted"]):
            await store.append_event(
                StepEvent(run_id=run_id, kind="run_started", step_index=n, timestamp=NOON)
            )
            await store.save_snapshot(
                ContinuableSnapshot(
                    run_id=run_id,
                    step_index=n,
                    messages=history(run_id, n),
                    timestamp=NOON,
                    state=state,
                    idempotency_key=f"{n}:k",
                )
            )
        for call, status in (("a/b", "started"), ("two", "started"), ("two", "completed")):
            await store.record_tool_effect(
                ToolEffectRecord(
                    tool_call_id=call,
                    tool_name="pay",
                    run_id=run_id,
                    status=status,
                    started_at=NOON,
                )
            )


async def content_of(store: Any) -> list[Any]:
    found: list[Any] = [sorted(await store.list_runs(), key=lambda run: run.run_id)]
    for run_id in RUNS:
        found.append(await store.list_events(run_id=run_id))
        found.append(await store.list_snapshots(run_id=run_id, include_interrupted=True))
        found.append(await store.list_unresolved_tool_effects(run_id=run_id))
        found.append(await store.get_tool_effect(run_id=run_id, tool_call_id="two"))
    return found


async def content_here(state: Path) -> list[Any]:
    async with AgentStateStepStore(state) as store:
        return await content_of(store)


@pytest.mark.parametrize("make", [FileStepStore, lambda path: SqliteStepStore(database=path)])
def test_every_run_is_brought_over_once(
    make: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, state = tmp_path / "old", tmp_path / "state"
    asyncio.run(fill(make(source)))
    expected = asyncio.run(content_of(make(source)))
    command = ["import", "pydantic-ai", str(source), "--state", str(state)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out == "4 runs with 8 snapshots would be brought over\n"
    assert not state.exists()
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {"runs": 4, "events": 8, "snapshots": 8, "effects": 8, "refused": {}}
    assert asyncio.run(content_here(state)) == expected
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_was_begun_is_completed_and_another_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, state = tmp_path / "old", tmp_path / "state"
    asyncio.run(fill(FileStepStore(source)))

    async def begin() -> None:
        async with AgentStateStepStore(state) as store:
            theirs = FileStepStore(source)
            for event in (await theirs.list_events(run_id="media"))[:1]:
                await store.append_event(event)
            other = StepEvent(run_id="one", kind="run_failed", step_index=9, timestamp=NOON)
            await store.append_event(other)

    asyncio.run(begin())
    assert main(["import", "pydantic-ai", str(source), "--state", str(state)]) == 1
    assert "not brought over: one: StepEvent(" in capsys.readouterr().err

    async def compare() -> None:
        async with AgentStateStepStore(state) as store:
            theirs = FileStepStore(source)
            assert await store.list_events(run_id="media") == await theirs.list_events(
                run_id="media"
            )
            [event] = await store.list_events(run_id="one")
            assert event.kind == "run_failed"

    asyncio.run(compare())


def test_what_is_no_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no database")
    for name in ("text", "missing"):
        words = [str(tmp_path / name), "--state", str(tmp_path / "state")]
        assert main(["import", "pydantic-ai", *words]) == 2
        assert "no runs can be read" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def test_its_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "pydantic-ai", "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example: agent-state import pydantic-ai " in said
    assert all(option in said for option in ("--state", "--dry-run", "--json"))
