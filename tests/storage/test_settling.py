"""A person edits a file while the server saves: at every moment, valid or not."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import RevisionConflictError, StateCorruptedError, StatePersistenceManager
from agent_state.protocols import Incident
from agent_state.storage import WALStateStore, syscalls
from tests.deadlines import soon, until


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[StatePersistenceManager]:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        yield manager


def alice(tmp_path: Path) -> Path:
    return tmp_path / "agents" / "alice.json"


def edit(path: Path, **fields: Any) -> None:
    """What an editor does: read, change, write a new file over the old one."""
    content = json.loads(path.read_bytes())
    content.update(fields)
    fresh = path.with_suffix(".swp")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    fresh.replace(path)


def aged(path: Path) -> None:
    """Not so fresh that an editor may still be at it."""
    os.utime(path, (1_000_000_000, 1_000_000_000))


async def save(manager: StatePersistenceManager, **fields: Any) -> int:
    return await manager.save_agent_state("alice", {"agent_id": "alice", **fields})


async def loaded(manager: StatePersistenceManager) -> dict[str, Any]:
    agent = await manager.load_agent_state("alice")
    assert agent is not None
    return agent.model_dump()


async def settle(store: WALStateStore) -> None:
    """Write the files, and leave the journal as it is."""
    checkpoints = store._writing()
    async with checkpoints.lock:
        await checkpoints.write_back()


def put_aside(tmp_path: Path, incident: Incident) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quarantined document, and the reason beside it."""
    assert incident.kept is not None
    kept = tmp_path / incident.kept
    reason = kept.with_name(kept.name + ".reason.json")
    return json.loads(kept.read_bytes()), json.loads(reason.read_bytes())


async def test_an_edit_between_saves_is_used(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    edit(alice(tmp_path), status="active")

    assert (await loaded(manager))["status"] == "active"
    read = await manager.load_with_revision("agents", "alice")
    assert read is not None
    assert read.edited

    async with manager.edit("agents", "alice") as state:
        assert state.status == "active"
        state.agent_name = "Alice"
    await manager.flush()

    stored = json.loads(alice(tmp_path).read_bytes())
    assert (stored["status"], stored["agent_name"], stored["_revision"]) == ("active", "Alice", 2)
    assert manager.incidents() == []
    read = await manager.load_with_revision("agents", "alice")
    assert read is not None
    assert not read.edited


async def test_an_edit_nobody_read_before_the_next_save_is_kept_aside(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    edit(alice(tmp_path), status="theirs")

    await save(manager, status="ours")
    await manager.flush()

    assert json.loads(alice(tmp_path).read_bytes())["status"] == "ours"
    [incident] = manager.incidents()
    theirs, reason = put_aside(tmp_path, incident)
    assert theirs["status"] == "theirs"
    assert "changed outside" in reason["reason"]
    assert (reason["kind"], reason["key"], reason["was"]) == (
        "agents",
        ["alice"],
        "agents/alice.json",
    )


async def test_an_edit_between_save_and_settling_is_kept_aside(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    await save(manager, status="ours")
    edit(alice(tmp_path), status="theirs")

    assert (await loaded(manager))["status"] == "ours"
    await manager.flush()

    assert (await loaded(manager))["status"] == "ours"
    [incident] = manager.incidents()
    assert put_aside(tmp_path, incident)[0]["status"] == "theirs"


async def test_an_edit_that_claims_a_newer_revision_wins(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    await save(manager, status="ours")
    edit(alice(tmp_path), status="theirs", _revision=7)

    await manager.flush()

    assert (await loaded(manager))["status"] == "theirs"
    assert await save(manager, status="ours again") == 8
    await manager.flush()
    assert json.loads(alice(tmp_path).read_bytes())["_revision"] == 8
    assert manager.incidents() == []


async def test_an_invalid_edit_is_kept_aside_whatever_revision_it_claims(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    await save(manager, status="ours")
    edit(alice(tmp_path), status=["no", "status"], _revision=99)

    await manager.flush()

    assert (await loaded(manager))["status"] == "ours"
    [incident] = manager.incidents()
    theirs, reason = put_aside(tmp_path, incident)
    assert theirs["_revision"] == 99
    assert "status" in reason["reason"]


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "[]", '{"status": "x",\n<<<<<<< HEAD\n}', "\0"]
)
async def test_an_edit_that_is_no_json_gives_way_to_the_last_good_version(
    tmp_path: Path, manager: StatePersistenceManager, text: str
) -> None:
    await save(manager, status="idle")
    await save(manager, status="good")
    await manager.flush()
    alice(tmp_path).write_text(text)
    aged(alice(tmp_path))

    assert (await loaded(manager))["status"] == "good"

    assert json.loads(alice(tmp_path).read_bytes())["status"] == "good"
    [incident] = manager.incidents()
    assert incident.kept is not None
    assert (tmp_path / incident.kept).read_text() == text
    assert incident.restored
    assert await save(manager, status="better") == 3


async def test_an_invalid_edit_after_a_restart_gives_way_to_the_snapshot(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await save(manager, status="first")
        await manager.flush()
        await save(manager, status="second")
    edit(alice(tmp_path), status=7)

    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        assert (await loaded(manager))["status"] == "first"
        [incident] = manager.incidents()
        assert put_aside(tmp_path, incident)[0]["status"] == 7


@pytest.mark.parametrize("exclusive", [True, False])
async def test_an_invalid_snapshot_is_not_brought_back_again_and_again(
    tmp_path: Path, exclusive: bool
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await save(manager, status="good")
        await manager.flush()
        await save(manager, status="better")
    edit(alice(tmp_path), status=7)
    edit(tmp_path / ".snapshots" / "agents" / "alice.json", status=8)

    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        with pytest.raises(StateCorruptedError):
            await manager.load_agent_state("alice")
        assert await manager.load_agent_state("alice") is None
        kept = {incident.kept for incident in manager.incidents()}
        assert len(kept) == 2


async def test_an_edit_of_what_is_being_deleted_is_kept_aside(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    await manager.delete("agents", "alice")
    edit(alice(tmp_path), status="theirs")

    await manager.flush()

    assert await manager.load_agent_state("alice") is None
    assert not alice(tmp_path).exists()
    [incident] = manager.incidents()
    assert put_aside(tmp_path, incident)[0]["status"] == "theirs"


async def test_a_file_dropped_in_is_picked_up(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    mail = tmp_path / "mail" / "alice"
    mail.mkdir(parents=True)
    (mail / "m1.json").write_text('{"subject": "hello", "to_agent": "alice"}')

    message = await manager.load("mail", ("alice", "m1"))

    assert message is not None
    assert message.model_dump() == {"message_id": "m1", "subject": "hello", "to_agent": "alice"}
    assert await manager.keys("mail", "alice") == [("alice", "m1")]
    message.subject = "answered"  # type: ignore[attr-defined]
    await manager.save("mail", ("alice", "m1"), message)
    await manager.flush()
    assert json.loads((mail / "m1.json").read_bytes())["subject"] == "answered"


async def test_a_file_that_is_removed_is_gone(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    alice(tmp_path).unlink()

    assert await manager.load_agent_state("alice") is None
    assert await manager.list_persisted_agents() == []
    assert await save(manager, status="anew") > 0


async def test_a_checkout_of_an_older_version_is_used(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="first")
    await manager.flush()
    shutil.copy(alice(tmp_path), tmp_path / "old")
    await save(manager, status="second")
    await manager.flush()

    (tmp_path / "old").replace(alice(tmp_path))

    assert (await loaded(manager))["status"] == "first"
    with pytest.raises(RevisionConflictError):
        await manager.save("agents", "alice", {"agent_id": "alice"}, expected=2)
    assert manager.incidents() == []


async def test_what_a_reader_saw_late_never_hides_a_newer_save(tmp_path: Path) -> None:
    store = WALStateStore(tmp_path)
    await store.open()
    async with StatePersistenceManager(store=store) as manager:
        for n in range(200):
            await save(manager, counters={"n": n})
            if n % 3 == 0:
                await settle(store)
            assert (await loaded(manager))["counters"] == {"n": n}
        assert manager.incidents() == []


@pytest.mark.parametrize("ended", ["closed", "flush cancelled"])
async def test_a_write_back_that_is_interrupted_writes_each_file_once(
    manager: StatePersistenceManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ended: str,
) -> None:
    reached, allowed, rename = threading.Event(), threading.Event(), syscalls.rename
    written = []

    def wait_before_the_last_step(source: str, target: str) -> None:
        if target == str(alice(tmp_path)):
            written.append(target)
            reached.set()
            allowed.wait()
        rename(source, target)

    monkeypatch.setattr(syscalls, "rename", wait_before_the_last_step)
    await save(manager, status="idle")
    flushed = asyncio.create_task(manager.flush() if ended == "flush cancelled" else no_flush())
    await until(reached.is_set)
    flushed.cancel()
    closed = asyncio.create_task(manager.close())
    await asyncio.sleep(0)
    allowed.set()
    await soon(closed)

    assert len(written) == 1
    assert json.loads(alice(tmp_path).read_bytes())["status"] == "idle"
    assert not (tmp_path / ".snapshots" / "agents" / "alice.json").exists()


async def no_flush() -> None:
    """The write-back in the background does it."""


async def test_a_save_that_changes_nothing_leaves_an_edit_as_it_is(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    await save(manager, status="idle")
    await manager.flush()
    edit(alice(tmp_path), status="theirs")
    state = await manager.load_agent_state("alice")
    assert state is not None

    await manager.save_agent_state("alice", state)
    await manager.flush()

    stored = json.loads(alice(tmp_path).read_bytes())
    assert stored["status"] == "theirs"
    read = await manager.load_with_revision("agents", "alice")
    assert read is not None
    assert not read.edited  # stamped anew
