"""Everything bad that can be given, and all that a disk can refuse: typed errors, nothing lost."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AgentState,
    AgentStateError,
    RevisionConflictError,
    SerializationError,
    StateDirectoryInUseError,
    StatePersistenceManager,
    StateValidationError,
    StorageError,
    StorageFullError,
)
from agent_state.testing import Fault, FaultyDisk
from agent_state.testing.contract_base import NASTY_IDS
from tests.alice import GOOD, alice, unharmed


@pytest.fixture
def manager(alices: StatePersistenceManager) -> StatePersistenceManager:
    return alices


def nested(levels: int) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for _ in range(levels):
        state = {"deeper": state}
    return state


# -- given ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [{}, {"agent_id": ""}, {"agent_id": 7}, {"agent_id": "alice", "context": []}, [], None, "text"],
)
async def test_a_state_that_does_not_validate(manager: StatePersistenceManager, state: Any) -> None:
    with pytest.raises(StateValidationError):
        await manager.save_agent_state("alice", state)
    await unharmed(manager)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        {1, 2},
        b"bytes",
        {1: "one"},
        "\ud800",
        {"\ud800": 1},
        2**64,
        nested(10_000),
        object(),
    ],
    ids=[
        "nan",
        "inf",
        "set",
        "bytes",
        "key",
        "surrogate",
        "surrogate key",
        "int",
        "deep",
        "object",
    ],
)
async def test_a_value_that_could_not_be_read_back(
    manager: StatePersistenceManager, value: Any
) -> None:
    with pytest.raises(SerializationError) as caught:
        await manager.save_agent_state("alice", {**GOOD, "metadata": {"bad": value}})
    assert caught.value.field.startswith("metadata")
    assert (caught.value.kind, caught.value.key) == ("agents", ("alice",))

    agent = AgentState(agent_id="alice")
    agent.metadata["bad"] = value
    with pytest.raises(SerializationError):
        await manager.save_agent_state("alice", agent)
    with pytest.raises(SerializationError):
        await manager.append("events", "alice", {"bad": value})
    with pytest.raises(SerializationError):
        await manager.save_task_queue_state(
            "alice", {"agent_id": "alice", "pending_tasks": [{"id": "t", "bad": value}]}
        )
    await unharmed(manager)
    assert await manager.keys("tasks") == []


async def test_a_nasty_id_stays_inside_and_comes_back(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    for number, ident in enumerate(NASTY_IDS):
        if ident != "alice":
            await manager.save_agent_state(ident, {"agent_id": ident})
        await manager.save("mail", (ident, ident), {"message_id": ident})
        await manager.append("events", ident, {"n": 1})
        await manager.flush()

        known = {"alice", *NASTY_IDS[: number + 1]}
        assert await manager.list_persisted_agents() == sorted(known)
        assert await manager.keys("mail", ident) == [(ident, ident)]
        assert [entry.seq async for entry in manager.read_log("events", ident)] == [1]
        await unharmed(manager)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert manager.incidents() == []


@pytest.mark.parametrize("ident", ["", "x" * 4097, "\ud800"])
async def test_what_is_no_id(manager: StatePersistenceManager, ident: str) -> None:
    for attempt in (
        manager.save_agent_state(ident, {"agent_id": "a"}),
        manager.load_agent_state(ident),
        manager.save_task_queue_state(ident, {"agent_id": "a"}),
        manager.load_mailbox_state(ident),
        manager.append("events", ident, {}),
        manager.delete("agents", ident),
    ):
        with pytest.raises((ValueError, AgentStateError)):
            await attempt
    await unharmed(manager)


async def test_a_revision_that_is_not_the_stored_one(manager: StatePersistenceManager) -> None:
    with pytest.raises(RevisionConflictError) as caught:
        await manager.save("agents", "alice", {"agent_id": "alice"}, expected=7)
    assert (caught.value.expected, caught.value.actual) == (7, 1)
    await unharmed(manager)


# -- the disk and other processes ---------------------------------------------------------------


async def test_a_file_in_the_way_of_a_folder(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    (tmp_path / "state" / "system").write_text("in the way")
    exclusive = type(manager.store).__name__ == "WALStateStore"

    async def save_and_settle() -> None:
        await manager.save("system", "settings", {"n": 1})
        await manager.flush()

    with pytest.raises(StorageError, match="making a directory") as caught:
        await save_and_settle()
    assert str(tmp_path / "state" / "system") in str(caught.value.path)

    assert (tmp_path / "state" / "system").read_text() == "in the way"
    await unharmed(manager)
    # What waits for one folder holds up nothing else.
    await manager.save_agent_state("bob", {"agent_id": "bob"})
    if exclusive:
        with pytest.raises(StorageError):
            await manager.flush()
    assert alice(tmp_path).with_name("bob.json").exists()
    (tmp_path / "state" / "system").unlink()
    await manager.flush()


async def test_a_directory_without_write_permission(tmp_path: Path) -> None:
    with FaultyDisk(Fault(at=1, call="mkdir", error=errno.EACCES, persistent=True)):
        for exclusive in (False, True):
            with pytest.raises(StorageError) as caught:
                await StatePersistenceManager(tmp_path / "state", exclusive=exclusive).open()
            assert caught.value.errno == errno.EACCES
            assert caught.value.path == str(tmp_path / "state")


async def test_a_read_only_disk(manager: StatePersistenceManager) -> None:
    calls = frozenset({"write", "rename", "link", "unlink", "mkdir", "ftruncate"})
    with FaultyDisk(Fault(at=1, call=calls, error=errno.EROFS, persistent=True)):
        with pytest.raises(StorageError) as caught:
            await manager.save_agent_state("alice", {"agent_id": "alice", "status": "new"})
        assert caught.value.errno == errno.EROFS
        await unharmed(manager)
    assert await manager.save_agent_state("alice", {"agent_id": "alice", "status": "new"}) > 1


async def test_a_full_disk(manager: StatePersistenceManager) -> None:
    with FaultyDisk(Fault(at=1, call="write", error=errno.ENOSPC, persistent=True)):
        for attempt in (
            manager.save_agent_state("alice", {"agent_id": "alice", "status": "new"}),
            manager.save_agent_state("bob", {"agent_id": "bob"}),
            manager.append("events", "alice", {"n": 1}),
            manager.save_task_queue_state("alice", {"agent_id": "alice", "pending_tasks": [1]}),
        ):
            with pytest.raises(StorageFullError) as caught:
                await attempt
            assert caught.value.path is not None
        await unharmed(manager)
        assert await manager.list_persisted_agents() == ["alice"]
    assert await manager.append("events", "alice", {"n": 1}) > 0
    await manager.save_agent_state("bob", {"agent_id": "bob"})


FILL = """
import asyncio, resource, signal, sys
from agent_state import StatePersistenceManager, StorageFullError

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with StatePersistenceManager(sys.argv[1], exclusive=sys.argv[2] == "exclusive") as m:
        await m.save_agent_state("alice", {"agent_id": "alice", "status": "idle"})
        await m.append("events", "alice", {"n": 1})
        await m.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        for attempt in (
            m.save_agent_state("alice", {"agent_id": "alice", "text": "x" * 9000}),
            m.append("events", "alice", {"text": "x" * 9000}),
        ):
            try:
                await attempt
            except StorageFullError as error:
                print("refused", error.errno is not None, error.path is not None)
        await m.save_agent_state("bob", {"agent_id": "bob"})
        await m.append("events", "alice", {"n": 2})

asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["shared", "exclusive"])
async def test_a_disk_that_is_really_full(tmp_path: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path), mode],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "refused True True\n" * 2

    async with StatePersistenceManager(tmp_path) as manager:
        await unharmed(manager)
        assert await manager.list_persisted_agents() == ["alice", "bob"]
        records = [entry.record async for entry in manager.read_log("events", "alice")]
        assert records == [{"n": 1}, {"n": 2}]
        assert manager.incidents() == []
    assert list(tmp_path.rglob(".tmp-*")) == []


async def test_two_owners(manager: StatePersistenceManager, tmp_path: Path) -> None:
    with pytest.raises(StateDirectoryInUseError) as caught:
        await StatePersistenceManager(tmp_path / "state", exclusive=True).open()
    assert caught.value.pid == os.getpid()
    await unharmed(manager)
