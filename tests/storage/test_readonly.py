"""What a reader of a dead directory sees is what a restart would bring."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest

from agent_state import (
    AgentStateError,
    StateNotFoundError,
    StatePersistenceManager,
    WALStateStore,
)
from agent_state.protocols import Append, Change, Delete, Put, StateStore
from agent_state.storage import ReadOnlyStateStore

KINDS = ("agents", "tasks")


def put(key: str, number: int) -> Put:
    return Put("agents", (key,), b'{"n":%d}' % number, "agents/1")


async def seen(store: StateStore) -> dict[str, object]:
    """Every document and log record in a store."""
    found: dict[str, object] = {}
    for kind in KINDS:
        keys = await store.keys(kind)
        scanned = {document.key: document async for document in store.scan(kind)}
        assert sorted(scanned) == keys
        for key, document in scanned.items():
            found[f"{kind}{key}"] = (document.body, document.revision)
        for key in await store.logs(kind):
            records = [record async for record in store.read_log(kind, key)]
            found[f"{kind}{key} log"] = [(record.seq, record.body) for record in records]
    return found


async def read_only(root: Path) -> dict[str, object]:
    store = ReadOnlyStateStore(root)
    await store.open()
    try:
        return await seen(store)
    finally:
        await store.close()


def some_changes(random: Random) -> list[Change]:
    changes: list[Change] = []
    for _ in range(random.randint(1, 3)):
        key = random.choice("abc")
        match random.randrange(4):
            case 0:
                changes.append(Delete("agents", (key,)))
            case 1:
                changes.append(Append("tasks", (key, "log"), b'{"n":%d}' % random.randrange(99)))
            case _:
                changes.append(put(key, random.randrange(99)))
    return changes


@pytest.mark.parametrize("seed", range(25))
async def test_a_reader_sees_what_recovery_brings(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    live, dead = tmp_path / "live", tmp_path / "dead"
    store = WALStateStore(live, durability="os")
    await store.open()
    try:
        for _ in range(random.randint(1, 12)):
            await store.commit(some_changes(random))
            if random.random() < 0.25:
                await store.flush()
        beside = await read_only(live)
        shutil.copytree(live, dead)  # as a power cut would leave it
        at_last = await seen(store)
    finally:
        await store.close()

    before = await read_only(dead)
    recovered = WALStateStore(dead, durability="os")
    await recovered.open()
    after = await seen(recovered)
    await recovered.close()

    assert beside == before == after == at_last


async def test_a_document_deleted_and_made_anew_is_the_new_one(tmp_path: Path) -> None:
    live, dead = tmp_path / "live", tmp_path / "dead"
    store = WALStateStore(live, durability="os")
    await store.open()
    for number in range(3):
        await store.commit([put("a", number)])
    await store.flush()
    await store.commit([Delete("agents", ("a",))])
    await store.commit([put("a", 99)])
    shutil.copytree(live, dead)
    await store.close()

    assert await read_only(dead) == {"agents('a',)": (b'{"n":99}', 4)}


async def test_nothing_can_be_changed_through_it(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
    (tmp_path / "agents/bob.json").write_text('{"agent_id": 5}')

    async with StatePersistenceManager(store=ReadOnlyStateStore(tmp_path)) as manager:
        with pytest.raises(AgentStateError, match="reading only"):
            await manager.save_agent_state("alice", {"agent_id": "alice", "status": "idle"})
        with pytest.raises(AgentStateError, match="reading only"):
            async with manager.edit("agents", "alice"):
                pass
        assert [loaded.key async for loaded in manager.scan("agents")] == [("alice",)]
        assert [incident.key for incident in manager.incidents()] == [("bob",)]

    assert (tmp_path / "agents/bob.json").exists()


async def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StateNotFoundError):
        await ReadOnlyStateStore(tmp_path / "nothing").open()
    assert not (tmp_path / "nothing").exists()
