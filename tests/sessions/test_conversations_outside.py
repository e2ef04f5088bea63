"""Lines that others add to a conversation, or to the archive of an agent's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.testing import FakeClock
from tests.sessions.managers import session_manager


def hand(path: Path, **line: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line))  # without its newline, as an editor may leave it


@pytest.mark.parametrize("manager", ["shared", "exclusive"], indirect=True)
async def test_a_message_by_hand_costs_no_message_that_was_added_after_it(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    sessions = session_manager(manager)
    await sessions.create("ann")
    talk = ("s1", "guide_agent")
    first = await sessions.conversations.add(*talk, "user", "one")
    await manager.flush()
    [log] = (tmp_path / "conversations").rglob("*.jsonl")
    line = json.loads(log.read_text())
    hand(log, **{name: line[name] for name in line if name[0] != "_"} | {"content": "by hand"})

    added = [await sessions.conversations.add(*talk, "user", text) for text in ("two", "three")]
    page = await sessions.conversations.page(*talk)

    assert [message.content for message in page.messages] == ["one", "by hand", "two", "three"]
    assert [message.seq for message in page.messages] == [1, 2, 3, 4]
    assert [first.seq, *(message.seq for message in added)] == [1, 3, 4]


@pytest.mark.parametrize("manager", ["shared", "exclusive"], indirect=True)
async def test_a_line_in_the_archive_costs_no_task_that_is_archived_after_it(
    manager: StatePersistenceManager, tmp_path: Path, fake_clock: FakeClock
) -> None:
    async def archive(name: str) -> None:
        await manager.save("tasks", ("alice", name), {"task_id": name, "status": "completed"})
        await fake_clock.advance(3 * 24 * 3600)
        report = await manager.cleanup_old_states()
        assert report.tasks == [f"alice/{name}"]
        await manager.flush()

    await archive("t1")
    hand(tmp_path / "tasks/alice/archive.jsonl", record={"task_id": "by hand"})
    await archive("t2")

    found = [entry async for entry in manager.read_log("tasks", ("alice", "archive"))]
    names = [entry.record.get("task_id") or entry.record["record"]["task_id"] for entry in found]
    assert names == ["t1", "by hand", "t2"]
    assert not (tmp_path / "tasks/alice/t2.json").exists()
