"""The runtime records itself."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, StatePersistenceManager, Task, TaskContext
from agent_state.errors import StorageFullError
from agent_state.testing import FaultyDisk
from agent_state.testing.faults import Fault
from agent_state_integrations.recorder import Recorder, RuntimeRecorder


def recorded(root: Path) -> list[dict[str, Any]]:
    lines = (root / "record/current.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def told(root: Path, kind: str) -> list[str]:
    return [
        f"{line['SpeakerName']}: {line['Message']}"
        for line in recorded(root)
        if line["Metadata"]["message_type"] == kind
    ]


async def test_a_life_is_told(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        runtime = AsyncAgentSessionManager(tmp_path, observer=RuntimeRecorder(recorder))

        @runtime.handler("reader")
        async def read(ctx: TaskContext, task: Task) -> str:
            await ctx.send_mail("bob", subject="done", body="We should design the index")
            return "read"

        async with runtime:
            await runtime.agents.create("alice", agent_type="reader")
            await runtime.agents.create("bob", agent_type="listener")
            task = await runtime.tasks.submit("alice", "summarise", {"file": "a.md"})
            assert await runtime.tasks.result(task) == "read"
            await runtime.agents.sleep("bob", seconds=3600, reason="tired")
            await runtime.emit("system_event", {"note": "lunch"})
            await runtime.agents.wake("bob")
    assert told(tmp_path, "task") == [
        "alice: task summarise: pending",
        "alice: task summarise: in_progress",
        "alice: task summarise: completed",
    ]
    assert told(tmp_path, "mail") == ["alice: done: We should design the index"]
    assert told(tmp_path, "event") == ["runtime: system_event"]
    asleep, awake = told(tmp_path, "sleep")
    assert asleep.startswith("bob: sleeps until 2")
    assert asleep.endswith(": tired")
    assert awake == "bob: wakes up"
    assert "alice: agent is active" in told(tmp_path, "state")
    [mail] = [line for line in recorded(tmp_path) if line["Metadata"]["message_type"] == "mail"]
    assert mail["SpeakerRole"] == "Agent"
    assert mail["Metadata"]["receiver"] == "bob"
    assert mail["Metadata"]["ace_tier"]
    [event] = [line for line in recorded(tmp_path) if line["Metadata"]["message_type"] == "event"]
    assert event["Content"]["data"] == {"note": "lunch"}
    assert len({line["Id"] for line in recorded(tmp_path)}) == len(recorded(tmp_path))


async def test_what_a_dead_process_did_not_tell_is_told_after_the_next_start(
    tmp_path: Path,
) -> None:
    async with StatePersistenceManager(tmp_path) as manager:  # nobody records here
        await manager.save("tasks", ("alice", "t1"), {"task_id": "t1", "name": "read"})
        await manager.save_agent_state("alice", {"agent_id": "alice"})
    async with Recorder(tmp_path) as recorder, StatePersistenceManager(tmp_path) as manager:
        assert await RuntimeRecorder(recorder).catch_up(manager.store) == 2
        assert await RuntimeRecorder(recorder).catch_up(manager.store) == 0
    assert told(tmp_path, "task") == ["alice: task read: pending"]


async def test_every_sleep_is_told(tmp_path: Path) -> None:
    async with (
        Recorder(tmp_path) as recorder,
        AsyncAgentSessionManager(tmp_path, observer=RuntimeRecorder(recorder)) as runtime,
    ):
        await runtime.agents.create("bob", agent_type="reader")
        for _ in range(3):
            await runtime.agents.sleep("bob", wake_on=["manual_wake"])
            await runtime.agents.wake("bob")
    assert told(tmp_path, "sleep") == ["bob: sleeps until an event", "bob: wakes up"] * 3


async def test_after_a_restart_only_news_is_told(tmp_path: Path) -> None:
    for run in range(3):
        async with Recorder(tmp_path, dedupe_window=1) as recorder:
            narrator = RuntimeRecorder(recorder)
            async with StatePersistenceManager(tmp_path, observer=narrator) as manager:
                assert await narrator.catch_up(manager.store) == 0
                for beat in range(2):
                    at = f"2026-11-21T00:00:{run}{beat}Z"
                    await manager.save_agent_state(
                        "alice", {"agent_id": "alice", "last_active": at}
                    )
                    mail = {"message_id": "x1", "body": "hello", "metadata": {"seen": at}}
                    await manager.save("mail", ("alice", "x1"), mail)
                    task = {"task_id": "t1", "name": "read", "progress": {"at": at}}
                    await manager.save("tasks", ("alice", "t1"), task)
                await manager.save("sleep", ("alice",), {"agent_id": "alice", "reason": "tired"})
    assert len(recorded(tmp_path)) == 4


async def test_the_recorder_lives_beside_a_runtime_that_owns_the_directory(tmp_path: Path) -> None:
    async with AsyncAgentSessionManager(tmp_path) as runtime, Recorder(tmp_path) as recorder:
        await asyncio.gather(
            runtime.agents.create("alice", agent_type="reader"),
            recorder.record({"sender_id": "ann", "content": "hello"}),
        )
    assert [line["Message"] for line in recorded(tmp_path)] == ["hello"]


async def test_a_recorder_that_cannot_write_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Recorder(tmp_path / "elsewhere") as recorder:
        narrator = RuntimeRecorder(recorder)
        async with StatePersistenceManager(tmp_path, observer=narrator) as manager:
            await manager.save_agent_state("alice", {"agent_id": "alice"})
            await recorder.record({"content": "in order"})
            with FaultyDisk(Fault(at=1, call="fdatasync", error=errno.ENOSPC)):
                narrator.committed(*_a_change(manager))
                with pytest.raises(StorageFullError):
                    await recorder.record({"content": "in the same batch"})
        assert narrator.failed == 1
    assert "could not be recorded" in caplog.text
    async with StatePersistenceManager(tmp_path, observer=narrator) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "status": "late"})
    assert narrator.failed == 2


def _a_change(manager: StatePersistenceManager) -> tuple[Any, list[int]]:
    group = manager.new_group()
    group.save("agents", "bob", {"agent_id": "bob"})
    return group.changes, [1]


async def test_an_observer_that_fails_does_not_undo_a_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def committed(self, changes: object, numbers: object) -> None:
            raise ValueError("broken")

    async with StatePersistenceManager(tmp_path, observer=Broken()) as manager:
        assert await manager.save_agent_state("alice", {"agent_id": "alice"}) == 1
        assert await manager.load_agent_state("alice") is not None
    assert "the observer failed" in caplog.text
