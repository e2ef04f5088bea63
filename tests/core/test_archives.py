"""Archive logs: what is large in an archived document is compressed, and every reader sees it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys
from agent_state.models import ARCHIVE
from agent_state.testing import FakeClock
from agent_state.verify import verify

TEXT = "".join(
    f"{number}: what the agent has read, and what it made of it\n" for number in range(9000)
)
TASK: dict[str, Any] = {"task_id": "t1", "status": "completed", "name": "read", "result": TEXT}
MAIL = {"message_id": "m1", "to_agent": "alice", "status": "archived", "body": TEXT}
AGENT = {"agent_id": "bob", "status": "stopped", "context": {"working_memory": {"text": TEXT}}}
LOGS = {"tasks": ("alice", ARCHIVE), "mail": ("alice", ARCHIVE), "agents": (ARCHIVE,)}


async def archive(manager: StatePersistenceManager, clock: FakeClock) -> None:
    await manager.save("tasks", ("alice", "t1"), TASK)
    await manager.save("tasks", ("alice", "t2"), {**TASK, "task_id": "t2", "result": "short"})
    await manager.save("mail", ("alice", "m1"), MAIL)
    await manager.save("agents", "bob", AGENT)
    await clock.advance(25 * 3600)
    assert (await manager.cleanup_old_states()).total == 4
    await manager.flush()


async def archived(manager: StatePersistenceManager) -> dict[str, list[dict[str, Any]]]:
    return {
        kind: [entry.record async for entry in manager.read_log(kind, key)]
        for kind, key in LOGS.items()
    }


async def test_what_cleanup_has_archived_is_read_back_whole(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> None:
    await archive(manager, fake_clock)

    found = await archived(manager)
    [long, short] = sorted(found["tasks"], key=lambda task: task["task_id"])
    assert (long["result"], short["result"]) == (TEXT, "short")
    assert found["mail"][0]["body"] == TEXT
    assert found["agents"][0]["context"]["working_memory"] == {"text": TEXT}
    keyed = [each async for each in manager.read_keyed("tasks", ("alice", ARCHIVE), "t1@")]
    assert [each.record["result"] for each in keyed] == [TEXT]


@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
async def test_only_the_large_fields_of_large_records_are_compressed(
    tmp_path: Path, exclusive: bool, fake_clock: FakeClock
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive, clock=fake_clock) as manager:
        await archive(manager, fake_clock)

    lines = (tmp_path / "tasks/alice/archive.jsonl").read_text().splitlines()
    long, short = sorted(map(json.loads, lines), key=lambda line: line["task_id"])
    assert (long["task_id"], long["status"], long["name"]) == ("t1", "completed", "read")
    assert "result" not in long
    assert max(map(len, lines)) < len(TEXT) / 4
    assert short["result"] == "short"
    assert "_gzip" not in short
    assert (await verify(tmp_path)).ok


async def test_a_line_of_2026_12_is_read(tmp_path: Path) -> None:
    """Never change this line: archives that have such ones must open for ever."""
    packed = "H4sIAAAAAAAAA6tWKkotLs0pUbICMhJTlGoB6RkDghEAAAA="
    file = tmp_path / "tasks/alice/archive.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"task_id": "t", "status": "completed", "_gzip": packed}) + "\n")

    async with StatePersistenceManager(tmp_path) as manager:
        [task] = (await archived(manager))["tasks"]
    assert task == {"task_id": "t", "status": "completed", "result": "read"}


@pytest.mark.parametrize("packed", ["", "no base64!", "H4sIAAAAAAAC/6tWKkotLs0", 7, None, [1]])
async def test_a_record_that_cannot_be_decompressed_is_reported_and_hides_no_other(
    tmp_path: Path, packed: object
) -> None:
    file = tmp_path / "tasks/alice/archive.jsonl"
    file.parent.mkdir(parents=True)
    lines: list[dict[str, object]] = [{"task_id": "a"}, {"task_id": "b", "_gzip": packed}]
    lines.append({"task_id": "c"})
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    async with StatePersistenceManager(tmp_path) as manager:
        assert [task["task_id"] for task in (await archived(manager))["tasks"]] == ["a", "c"]
        [incident] = manager.incidents()
        assert "record 2" in incident.what
    [problem] = (await verify(tmp_path)).problems
    assert (problem.fault, problem.path) == ("damaged", "tasks/alice/archive.jsonl")


async def test_encrypted_archives_are_compressed_too(tmp_path: Path, fake_clock: FakeClock) -> None:
    master = os.urandom(32)
    keyring = Keyring(tmp_path / "keys", MasterKeys(lambda: [master]))
    state = tmp_path / "state"
    async with StatePersistenceManager(state, clock=fake_clock, encryption=keyring) as manager:
        await archive(manager, fake_clock)
        assert (await archived(manager))["mail"][0]["body"] == TEXT

    assert (state / "mail/alice/archive.jsonl").stat().st_size < len(TEXT) / 3
    assert (await verify(state, encryption=keyring)).ok
    assert (await verify(state)).ok


async def test_a_runtime_finds_the_result_of_an_archived_task(
    tmp_path: Path, fake_clock: FakeClock
) -> None:
    async with StatePersistenceManager(tmp_path, clock=fake_clock) as manager:
        await archive(manager, fake_clock)

    async with AsyncAgentSessionManager(tmp_path) as runtime:
        task = await runtime.tasks.get("t1")
        assert task.result == TEXT


@pytest.mark.parametrize("name", ["_seq", "_crc", "_dedupe", "_gzip"])
async def test_a_document_with_a_name_that_logs_reserve_is_archived_whole(
    manager: StatePersistenceManager, fake_clock: FakeClock, name: str
) -> None:
    """Such a document had ended every cleanup with an error."""
    await manager.save("tasks", ("alice", "t"), {**TASK, "result": "short", name: 5})
    await fake_clock.advance(25 * 3600)

    assert (await manager.cleanup_old_states()).tasks == ["alice/t"]
    [task] = (await archived(manager))["tasks"]
    assert (task[name], task["result"]) == (5, "short")
