"""What is deleted, archived or erased leaves nothing beside it, and costs what it is itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import FileStateStore, StatePersistenceManager, WALStateStore
from agent_state.protocols import DocumentId
from agent_state.storage import document_files, memtable
from agent_state.storage.lru_cache import LRUCache
from agent_state.storage.memtable import MemTable
from agent_state.testing import FakeClock
from tests.storage.counting import CountedDisk

exclusively = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])


def snapshots(root: Path) -> set[str]:
    folder = root / ".snapshots"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {".gitignore"}


async def save_twice(manager: StatePersistenceManager, kind: str, *keys: tuple[str, ...]) -> None:
    """Save documents so that each has an earlier version."""
    for number in range(2):
        for key in keys:
            await manager.save(kind, key, {"n": number})
        await manager.flush()


# -- beside it -------------------------------------------------------------------------------------


@exclusively
async def test_cleaning_up_leaves_no_snapshot_of_what_it_archives(
    exclusive: bool, tmp_path: Path
) -> None:
    clock = FakeClock()
    async with StatePersistenceManager(tmp_path, exclusive=exclusive, clock=clock) as manager:
        for status in ("in_progress", "completed"):
            for number in range(7):
                task = {"task_id": f"{number}", "agent_id": "ann", "name": "work", "status": status}
                await manager.save("tasks", ("ann", f"{number}"), task)
            await manager.save("agents", "ann", {"agent_id": "ann", "status": status})
            await manager.flush()
        await manager.save("agents", "bob", {"agent_id": "bob", "status": "stopped", "n": 1})
        await manager.flush()
        await manager.save("agents", "bob", {"agent_id": "bob", "status": "stopped", "n": 2})
        await manager.flush()
        assert len(snapshots(tmp_path)) == 9
        await clock.advance(7200)

        report = await manager.cleanup_old_states(max_age_hours=1)
        await manager.flush()

        assert (len(report.tasks), report.agents) == (7, ["bob"])
        assert snapshots(tmp_path) == {"agents/ann.json"}


@exclusively
async def test_a_deleted_document_begins_again_with_a_snapshot_of_its_own(
    exclusive: bool, tmp_path: Path
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await save_twice(manager, "notes", ("a",))
        await manager.delete("notes", "a")
        await manager.flush()
        assert snapshots(tmp_path) == set()
        await save_twice(manager, "notes", ("a",))
        (tmp_path / "notes" / "a.json").write_text("no JSON")
        loaded = await manager.load("notes", "a")
        assert loaded is not None
        assert loaded.model_dump() == {"n": 1}


@exclusively
async def test_snapshots_that_an_earlier_version_left_go_when_the_directory_is_opened(
    exclusive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [("a",), ("b", "c"), ("b", "d"), ("e", "f", "g")]
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await save_twice(manager, "notes", *keys)
        with monkeypatch.context() as earlier:
            earlier.setattr(document_files.Snapshots, "drop", lambda *_: None)
            for key in (("b", "c"), ("e", "f", "g")):
                await manager.delete("notes", key)
            await manager.flush()
    left = tmp_path / ".snapshots" / "notes" / "b" / ".tmp-c.json"
    left.write_text("a process died here")
    assert len(snapshots(tmp_path)) == 5

    async with StatePersistenceManager(tmp_path, exclusive=exclusive):
        pass

    assert snapshots(tmp_path) == {"notes/a.json", "notes/b/d.json"}
    assert not (tmp_path / ".snapshots" / "notes" / "e").exists()


# -- what it costs -----------------------------------------------------------------------------


async def erase_among(root: Path, others: int, *, exclusive: bool) -> CountedDisk:
    """Erase one key of a folder with so many others; what the disk was asked for."""
    made = WALStateStore(root) if exclusive else FileStateStore(root)
    async with StatePersistenceManager(store=made) as manager:
        keys = [(f"{number}",) for number in range(others)]
        await asyncio.gather(*(manager.save("notes", key, {"n": 1}) for key in keys))
        await asyncio.gather(*(manager.save("notes", key, {"n": 2}) for key in keys))
        await save_twice(manager, "notes", ("one",), ("one", "below"))
        await manager.append("notes", ("one", "log"), {"n": 1})
        await manager.flush()
        with CountedDisk() as disk:
            assert await manager.erase("notes", "one") == 3
    assert not [path for path in root.rglob("one*") if ".locks" not in path.parts]
    return disk


@exclusively
async def test_erasing_costs_what_is_erased(exclusive: bool, tmp_path: Path) -> None:
    few = await erase_among(tmp_path / "few", 3, exclusive=exclusive)
    many = await erase_among(tmp_path / "many", 300, exclusive=exclusive)

    # The write-ahead log's folder, and what is below the key.
    assert many.entries <= few.entries <= 12
    assert many.calls <= few.calls + 2  # another segment


async def test_many_keys_are_erased_in_one_pass(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        keys = [(f"{number}",) for number in range(100)]
        await asyncio.gather(*(manager.save("notes", key, {"n": 1}) for key in keys))
        for key in keys[:50]:
            await manager.store.quarantine("notes", key, "for the test")
        await manager.flush()
        with CountedDisk() as disk:
            await asyncio.gather(*(manager.erase("notes", key) for key in keys))
        assert await manager.keys("notes") == []
    assert not [*(tmp_path / ".quarantine" / "notes").iterdir()]
    assert disk.about("scandir").count(f"{tmp_path}/.quarantine/notes") == 1
    assert disk.about("fsync_directory").count(f"{tmp_path}/notes") <= 2


async def test_one_key_that_is_locked_delays_no_other(tmp_path: Path) -> None:
    one = StatePersistenceManager(tmp_path)
    other = StatePersistenceManager(store=FileStateStore(tmp_path, lock_timeout_seconds=60))
    async with one, other:
        for key in ("a", "b"):
            await one.save("notes", key, {"n": 1})
        async with one.lock("notes", "a"):
            waiting = asyncio.create_task(other.erase("notes", "a"))
            assert await other.erase("notes", "b") == 1
            assert not waiting.done()
        assert await waiting == 1


async def test_the_removal_of_a_single_file_is_synced(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        await manager.save("notes", "a", {"n": 1})
        with CountedDisk() as disk:
            assert await manager.erase("notes", "a") == 1
    assert f"{tmp_path}/notes" in disk.about("fsync_directory")


async def test_erasing_goes_through_nothing_else_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        for key in (("a",), ("a", "b"), ("c",), ("c", "d")):
            await manager.save("notes", key, {"n": 1})
        await manager.delete("notes", ("c", "d"))
        with monkeypatch.context() as watched:
            watched.setattr(LRUCache, "__iter__", lambda _: pytest.fail("everything was listed"))
            assert await manager.erase("notes", "a") == 2
        assert await manager.keys("notes") == [("c",)]


KEYS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(tuple)


@given(
    st.lists(st.tuples(st.sampled_from(["keep", "log", "erase"]), KEYS), max_size=40),
    st.sampled_from([2, 200]),
)
def test_the_places_below_a_key_are_those_that_are_known(
    steps: list[tuple[str, tuple[str, ...]]], most: int
) -> None:
    with pytest.MonkeyPatch.context() as small:
        small.setattr(memtable, "CLEAN_MAX", most)
        small.setattr(memtable, "_NOTED_MIN", 1)
        known = MemTable()
        known._clean._max_entries = most  # the cache forgets
        for what, key in steps:
            place: DocumentId = ("notes", key)
            if what == "keep":
                known.keep(place, None)
            elif what == "log":
                known.learn_log(place, 1, {}, partial=False)
            else:
                known.erase(known.below(*place))
                assert not [each for each in places(known) if each[1][: len(key)] == key]
            assert known._noted == sum(map(len, known._below.values()))
            for prefix in {each[1][:length] for each in places(known) for length in (1, 2, 3)}:
                below = {each for each in places(known) if each[1][: len(prefix)] == prefix}
                assert below <= set(known.below("notes", prefix))


def places(known: MemTable) -> set[DocumentId]:
    return {*known._clean, *known._ends}


def test_many_small_documents_do_not_exceed_the_memory_of_clean_versions() -> None:
    """What a version takes besides its body counts, too: most documents are small."""
    known = MemTable()
    for number in range(memtable.CLEAN_BYTES // 1024 + 10):
        known.keep(("notes", (f"{number}",)), None)
    assert len(known._clean) <= memtable.CLEAN_BYTES // 512
    assert isinstance(known.clean(("notes", ("0",))), memtable._Unknown)
