"""A change that the exclusive owner finds done already: by whom, and how durably, it cannot know.

A shared writer that was killed may have renamed a file and not synced it. To call its change
durable, because the file says so, would be a promise that the next power cut breaks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_state import FileStateStore, StorageError, WALStateStore
from agent_state.protocols import Change
from agent_state.testing import Fault, FaultyDisk
from agent_state.testing.contract_base import append, delete, put

DONE: dict[str, Change] = {
    "put": put("a", {"n": 1}),
    "delete": delete("gone"),
    "append": append("log", {"n": 1}, "once"),
}
each = pytest.mark.parametrize("change", DONE.values(), ids=DONE)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[WALStateStore]:
    before = FileStateStore(tmp_path)
    await before.open()
    await before.commit([DONE["put"], DONE["append"], put("gone", {"n": 1})])
    await before.commit([DONE["delete"]])
    await before.close()
    store = WALStateStore(tmp_path)
    await store.open()
    yield store
    await store.close()


@each
async def test_what_is_found_done_is_made_durable_once(
    change: Change, store: WALStateStore
) -> None:
    with FaultyDisk() as disk:
        first = await store.commit([change])
        synced = disk.count("fsync_directory"), disk.count("fsync")
        assert await store.commit([change]) == first
        assert (disk.count("fsync_directory"), disk.count("fsync")) == synced
    assert synced[0] == 2  # its folder, and the one that has the folder
    assert synced[1] == (0 if change is DONE["delete"] else 1)


@each
async def test_what_was_found_done_and_cannot_be_made_durable_is_not_acknowledged(
    change: Change, store: WALStateStore
) -> None:
    call = "fsync_directory" if change is DONE["delete"] else "fsync"
    with FaultyDisk(Fault(1, call)) as disk:
        with pytest.raises(StorageError):
            await store.commit([change])
        await store.commit([change])
        # A file's pages may be dropped by now, and the kernel say yes: it is written anew.
        assert disk.count("rename") == (0 if change is DONE["delete"] else 1)
        await store.commit([change])
        assert disk.count("rename") == (0 if change is DONE["delete"] else 1)
    assert store.incidents() == []


@pytest.mark.parametrize("kind", [WALStateStore, FileStateStore])
async def test_what_is_saved_after_a_file_was_written_anew_is_no_edit_of_another(
    kind: type[WALStateStore | FileStateStore], store: WALStateStore, tmp_path: Path
) -> None:
    await store.close()
    store = kind(tmp_path)  # type: ignore[assignment]  # either
    await store.open()
    with FaultyDisk(Fault(1, "fsync")):
        with pytest.raises(StorageError):
            await store.commit([DONE["put"]])
        await store.commit([DONE["put"], DONE["append"]])
    assert await store.commit([put("a", {"n": 2}), append("log", {"n": 2}, "twice")]) == [2, 2]
    await store.flush()
    found = await store.get("notes", ("a",))
    await store.close()
    assert found is not None
    assert found.body == b'{"n":2}'
    assert b'"n": 2' in (tmp_path / "notes/a.json").read_bytes()
    assert store.incidents() == []
    assert not [*(tmp_path / ".quarantine").rglob("*.json*")]


async def test_an_edit_before_a_file_is_written_anew_is_still_one(
    store: WALStateStore, tmp_path: Path
) -> None:
    path = tmp_path / "notes/a.json"
    with FaultyDisk(Fault(1, "fsync")), pytest.raises(StorageError):
        await store.commit([DONE["put"]])
    await store.get("notes", ("a",))
    path.write_bytes(path.read_bytes().replace(b'"n": 1', b'"n": 5'))
    await store.commit([put("b", {"n": 1}), DONE["put"]])
    await store.commit([put("a", {"n": 2})])
    await store.flush()
    kept = b"".join(each.read_bytes() for each in (tmp_path / ".quarantine").rglob("a.json*"))
    assert b'"n": 5' in path.read_bytes() + kept


async def test_beside_a_new_change_too(store: WALStateStore) -> None:
    with FaultyDisk() as disk:
        assert await store.commit([DONE["put"], put("b", {"n": 1})]) == [1, 1]
        assert disk.count("fsync") == 1


async def test_what_this_owner_saved_needs_no_second_proof(store: WALStateStore) -> None:
    await store.commit([put("b", {"n": 1})])
    await store.flush()
    with FaultyDisk() as disk:
        await store.commit([put("b", {"n": 1})])
        assert disk.count("fsync") == 0
