"""Damage of every kind, found on the disk: contained, kept, and nothing else is lost."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AgentState,
    SchemaTooNewError,
    StateCorruptedError,
    StatePersistenceManager,
    StorageError,
)
from agent_state.storage import syscalls
from agent_state.testing import Fault, FaultyDisk
from tests.alice import GOOD, alice, damage, unharmed
from tests.deadlines import soon, until


@pytest.fixture
def manager(alices: StatePersistenceManager) -> StatePersistenceManager:
    return alices


# -- found ------------------------------------------------------------------------------------


def put_something_else(path: Path, what: str, victim: Path) -> None:
    """In the place of a document; a symlink leads to ``victim``."""
    victim.write_text(json.dumps({"agent_id": "bob", "status": "precious"}))
    if what == "a symlink":
        path.symlink_to(victim)
    elif what == "a symlink to nothing":
        path.symlink_to(victim.with_name("nothing"))
    elif what == "a folder":
        path.mkdir()
        (path / "inside").write_text("kept")
    else:
        os.mkfifo(path)


SOMETHING_ELSE = pytest.mark.parametrize(
    "what", ["a symlink", "a symlink to nothing", "a folder", "a pipe"]
)


@SOMETHING_ELSE
async def test_something_else_in_the_place_of_a_document_gives_way_to_its_snapshot(
    manager: StatePersistenceManager, tmp_path: Path, what: str
) -> None:
    path, victim = alice(tmp_path), tmp_path / "victim.json"
    good = await make_unusable(manager, path, DAMAGED)
    path.unlink()
    put_something_else(path, what, victim)

    assert await manager.load_agent_state("alice") == good

    [incident] = manager.incidents()
    assert incident.kept is not None
    assert os.path.lexists(tmp_path / "state" / incident.kept)
    assert json.loads(victim.read_text())["status"] == "precious"
    assert path.is_file()
    assert not path.is_symlink()


@SOMETHING_ELSE
async def test_something_else_stands_where_a_document_should_be(
    manager: StatePersistenceManager, tmp_path: Path, what: str
) -> None:
    path, victim = alice(tmp_path).with_name("bob.json"), tmp_path / "victim.json"
    put_something_else(path, what, victim)

    with pytest.raises(StateCorruptedError) as caught:
        await manager.load_agent_state("bob")
    assert caught.value.path is not None

    assert await manager.load_agent_state("bob") is None
    [incident] = manager.incidents()
    assert incident.kept is not None
    assert os.path.lexists(tmp_path / "state" / incident.kept)
    await manager.save_agent_state("bob", {"agent_id": "bob"})
    await manager.flush()
    assert json.loads(victim.read_text())["status"] == "precious"
    assert not (tmp_path / "nothing").exists()
    await unharmed(manager)


async def test_a_symlink_in_the_place_of_a_folder_leads_nowhere(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "state" / "system").symlink_to(elsewhere, target_is_directory=True)

    with suppress(StorageError):
        await manager.save("system", "runtime", {"n": 1})
        await manager.flush()

    assert list(elsewhere.iterdir()) == []
    (tmp_path / "state" / "system").unlink()


async def test_a_file_cut_at_every_length(manager: StatePersistenceManager, tmp_path: Path) -> None:
    path = alice(tmp_path)
    whole = path.read_bytes()
    # Without a second version there is nothing to bring back; the damaged bytes are kept.
    for size in range(len(whole) - 1):
        name = f"cut{size}"
        damage(path.with_name(f"{name}.json"), whole[:size])
        with pytest.raises(StateCorruptedError):
            await manager.load_agent_state(name)
        assert await manager.load_agent_state(name) is None

    kept = [incident.kept for incident in manager.incidents()]
    assert len(kept) == len(whole) - 1
    for size, place in enumerate(kept):
        assert place is not None
        assert (tmp_path / "state" / place).read_bytes() == whole[:size]
    await unharmed(manager)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 500,
        b"\xff" * 50,
        b"[]",
        b"null",
        b'{"agent_id": "bob"',
        b'{"agent_id": "bob", "agent_id": "bob"}',
        b'{"agent_id": "bob", "n": 18446744073709551616}',
        b'{"agent_id": "bob", "n": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
        b'{"agent_id": "bob", "n": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
        b'{"agent_id": ""}',
        b'{"agent_id": "bob", "status": 5}',
        b'{"_id": "somebody else", "agent_id": "bob"}',
        b'{"_schema": "no schema", "agent_id": "bob"}',
    ],
    ids=range(14),
)
async def test_damage_of_any_kind_is_contained_and_the_rest_goes_on(
    manager: StatePersistenceManager, tmp_path: Path, data: bytes
) -> None:
    damage(alice(tmp_path).with_name("bob.json"), data)

    found = [loaded.key async for loaded in manager.scan("agents")]

    assert found == [("alice",)]
    [incident] = manager.incidents()
    assert (incident.kind, incident.key) == ("agents", ("bob",))
    assert incident.kept is not None
    assert (tmp_path / "state" / incident.kept).read_bytes() == data
    assert await manager.load_agent_state("bob") is None
    await unharmed(manager)


async def make_unusable(manager: StatePersistenceManager, path: Path, data: bytes) -> AgentState:
    """Give the document a snapshot, and damage its file; the version that is to be restored."""
    await manager.save_agent_state("alice", {**GOOD, "status": "newer"})
    await manager.flush()
    damage(path, data)
    return AgentState(**{**GOOD, "status": "newer"})  # which memory still knows


DAMAGED = b"{ damaged"
UNUSABLE = pytest.mark.parametrize(
    "data", [DAMAGED, b'{"agent_id": "alice", "status": 7}'], ids=["damaged", "invalid"]
)


@UNUSABLE
async def test_tasks_that_meet_an_unusable_document_at_once_all_get_its_snapshot(
    manager: StatePersistenceManager, tmp_path: Path, data: bytes
) -> None:
    good = await make_unusable(manager, alice(tmp_path), data)

    loaded = await asyncio.gather(*(manager.load_agent_state("alice") for _ in range(5)))

    assert loaded == [good] * 5
    [incident] = manager.incidents()
    assert incident.restored
    assert alice(tmp_path).exists()


@UNUSABLE
@pytest.mark.parametrize("alices", ["shared"], indirect=True)
async def test_several_stores_that_meet_an_unusable_document_at_once_all_get_its_snapshot(
    manager: StatePersistenceManager, tmp_path: Path, data: bytes
) -> None:
    good = await make_unusable(manager, alice(tmp_path), data)

    async with (
        StatePersistenceManager(tmp_path / "state") as second,
        StatePersistenceManager(tmp_path / "state") as third,
    ):
        all_three = (manager, second, third)
        loaded = await asyncio.gather(*(each.load_agent_state("alice") for each in all_three))
        incidents = [incident for each in all_three for incident in each.incidents()]

    # A store that did not write it knows the snapshot alone.
    assert loaded in ([good] * 3, [AgentState(**GOOD)] * 3)
    assert len(incidents) == 1


@UNUSABLE
async def test_a_document_is_found_while_its_snapshot_is_restored(
    manager: StatePersistenceManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
) -> None:
    good = await make_unusable(manager, alice(tmp_path), data)
    reached, allowed, rename = threading.Event(), threading.Event(), syscalls.rename

    def wait_before_the_last_step(source: str, target: str) -> None:
        if target == str(alice(tmp_path)):
            reached.set()
            allowed.wait()
        rename(source, target)

    monkeypatch.setattr(syscalls, "rename", wait_before_the_last_step)
    first = asyncio.create_task(manager.load_agent_state("alice"))
    await until(reached.is_set)
    try:
        assert await manager.keys("agents") == [("alice",)]
        second = asyncio.create_task(manager.load_agent_state("alice"))
        await asyncio.wait([second], timeout=0.1)  # time enough to find nothing
    finally:
        allowed.set()

    assert await soon(first) == await soon(second) == good


@UNUSABLE
async def test_a_snapshot_that_cannot_be_written_is_restored_the_next_time(
    manager: StatePersistenceManager, tmp_path: Path, data: bytes
) -> None:
    good = await make_unusable(manager, alice(tmp_path), data)

    # The first write is the reason in the quarantine, the second the snapshot.
    with FaultyDisk(Fault(at=2, call="write", persistent=True)), pytest.raises(StorageError):
        await manager.load_agent_state("alice")

    assert await manager.load_agent_state("alice") == good


async def test_a_save_that_overtakes_the_load_of_an_invalid_document_stays(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    damage(alice(tmp_path), b'{"agent_id": "alice", "status": 7}')
    document = await manager.store.get("agents", ("alice",))
    await manager.save_agent_state("alice", {**GOOD, "status": "newer"})

    await manager.store.quarantine("agents", ("alice",), "invalid", version=document)

    assert await manager.load_agent_state("alice") == AgentState(**{**GOOD, "status": "newer"})


async def test_damage_under_a_save_is_kept_and_the_save_goes_on(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    damage(alice(tmp_path).with_name("bob.json"), b"damaged")

    assert await manager.save_agent_state("bob", {"agent_id": "bob"}) == 1
    await manager.flush()

    assert await manager.load_agent_state("bob") == AgentState(agent_id="bob")
    [incident] = manager.incidents()
    assert incident.kept is not None
    assert (tmp_path / "state" / incident.kept).read_bytes() == b"damaged"


@pytest.mark.parametrize("odd", ["x", -1, 0, 2**63, 1.5, True, None, [], 10**30])
async def test_odd_reserved_keys_are_filled_in(
    manager: StatePersistenceManager, tmp_path: Path, odd: Any
) -> None:
    names = ["_checksum", "_revision", "_saved_at", "_session_id"]
    content = {**dict.fromkeys(names, odd), "agent_id": "bob"}
    damage(alice(tmp_path).with_name("bob.json"), json.dumps(content).encode())
    if odd == 10**30:  # beyond what JSON readers agree on
        with pytest.raises(StateCorruptedError):
            await manager.load_agent_state("bob")
        return

    assert await manager.load_agent_state("bob") == AgentState(agent_id="bob")
    loaded = await manager.load_with_revision("agents", "bob")
    assert loaded is not None
    assert await manager.save("agents", "bob", {"agent_id": "bob", "n": 1}) == loaded.revision + 1


async def test_a_file_of_a_newer_schema_is_neither_read_nor_replaced_nor_moved(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    path = alice(tmp_path).with_name("bob.json")
    damage(path, b'{"_schema": "agents/99", "agent_id": "bob", "status": {"new": true}}')
    before = path.read_bytes()

    with pytest.raises(SchemaTooNewError):
        await manager.load_agent_state("bob")
    with pytest.raises(SchemaTooNewError):
        await manager.save_agent_state("bob", {"agent_id": "bob"})
    with pytest.raises(SchemaTooNewError):
        async with manager.group() as group:
            group.save("agents", "alice", {"agent_id": "alice", "status": "changed"})
            group.save("agents", "bob", {"agent_id": "bob"})
    await manager.flush()

    assert path.read_bytes() == before
    await unharmed(manager)
