"""A long log: its records are found by their dedupe keys without reading it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import AsyncAgentSessionManager, StatePersistenceManager, Task
from agent_state.errors import StateNotFoundError
from agent_state.models import ARCHIVE
from agent_state.protocols import LogRecord
from agent_state.storage import log_index, logs, memtable
from agent_state.storage.log_index import LogIndex
from agent_state.storage.log_writer import LogWriter
from tests.storage.counting import CountedDisk

exclusively = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of two kilobytes is long."""
    monkeypatch.setattr(log_index, "INDEXED_BYTES", 2048)
    monkeypatch.setattr(memtable, "_COMPLETE_MAX", 30)
    monkeypatch.setattr(memtable, "_PARTIAL_MAX", 10)


@pytest.fixture(params=[False, True], ids=["shared", "exclusive"])
def exclusive(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def fill(root: Path, number: int, *, exclusive: bool) -> None:
    async with StatePersistenceManager(root, exclusive=exclusive) as manager:
        for start in range(0, number, 100):
            async with manager.group() as group:
                for each in range(start, min(number, start + 100)):
                    group.append("notes", "log", {"n": each}, dedupe_key=f"k{each}")
    logs._ordered.clear()  # as a new process


def index_of(root: Path) -> Path:
    return root / ".index" / "notes" / "log.jsonl"


# -- what it costs -----------------------------------------------------------------------------


async def test_the_first_keyed_append_reads_the_same_of_a_long_log_as_of_a_longer_one(
    tmp_path: Path, exclusive: bool
) -> None:
    read = []
    for number in (1500, 6000):
        root = tmp_path / f"{number}"
        await fill(root, number, exclusive=exclusive)
        async with StatePersistenceManager(root, exclusive=exclusive) as manager:
            with CountedDisk() as disk:
                again = await manager.append("notes", "log", {"n": 5}, dedupe_key="k5")
                new = await manager.append("notes", "log", {"n": 0}, dedupe_key="new")
            assert (again, new) == (6, number + 1)
        read.append(disk.bytes_read)
        assert len([*index_of(root).iterdir()]) <= 12
    assert read[1] <= 1.5 * read[0], "some blocks more, of the files of the index"


async def test_only_some_keys_of_a_long_log_are_kept_in_memory(
    tmp_path: Path, exclusive: bool
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        for number in range(300):
            await manager.append("notes", "log", {"n": number}, dedupe_key=f"k{number}")
            if number % 50 == 0:
                await manager.flush()
        assert await manager.append("notes", "log", {}, dedupe_key="k7") == 8
        store: Any = manager.store
        [writer] = store._directory.logs._writers.values()
        assert len(writer._ids) < 150
        if exclusive:
            [known] = store._memtable._ids.values()
            assert len(known) < 100
        numbers = [await manager.append("notes", "log", {}, dedupe_key=f"k{n}") for n in range(300)]
        assert numbers == [*range(1, 301)]


async def test_a_task_that_was_archived_is_found_without_reading_the_archive(
    tmp_path: Path,
) -> None:
    read = []
    for number in (1000, 4000):
        root = tmp_path / f"{number}"
        async with StatePersistenceManager(root, exclusive=True) as manager:
            async with manager.group() as group:
                for each in range(number):
                    task = Task(task_id=f"t{each}", agent_id="ann", name="work", status="completed")
                    key = f"t{each}@3"
                    group.append("tasks", ("ann", ARCHIVE), task.model_dump(), dedupe_key=key)
            await manager.flush()
        logs._ordered.clear()
        async with AsyncAgentSessionManager(root, exclusive=True) as runtime:
            with CountedDisk() as disk:
                assert (await runtime.tasks.get(("ann", "t7"))).name == "work"
                for unknown in ("t", "t99999", "x"):
                    with pytest.raises(StateNotFoundError):
                        await runtime.tasks.get(("ann", unknown))
        read.append(disk.bytes_read)
    assert read[1] <= 1.5 * read[0]


# -- that it is right --------------------------------------------------------------------------

KEYS = st.text(st.sampled_from('ab"\\é\n, []@'), max_size=4)


@given(st.lists(st.tuples(KEYS, st.booleans()), max_size=120), st.data())
def test_an_index_finds_what_the_log_has(
    tmp_path_factory: pytest.TempPathFactory, added: list[tuple[str, bool]], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("index")
    path = f"{root}/log.jsonl"
    with pytest.MonkeyPatch.context() as small:
        small.setattr(log_index, "INDEXED_BYTES", 300)
        small.setattr(log_index, "_PIECE", 64)
        writer = LogWriter(
            path, ("log",), lambda *_: None, index=LogIndex(f"{root}", path, durable=False)
        )
        known = dict[str, int]()
        for number, (dedupe_key, restarted) in enumerate(added, 1):
            if restarted:
                index = LogIndex(f"{root}", path, durable=False)
                writer = LogWriter(path, ("log",), lambda *_: None, index=index)
            assert writer.find(dedupe_key) == known.get(dedupe_key)
            known.setdefault(dedupe_key, number)
            keyed = dedupe_key if known[dedupe_key] == number else None
            writer.append([LogRecord(number, b'{"n":1}', keyed)], sync=False)
        for dedupe_key in [*known, "none"]:
            assert writer.find(dedupe_key) == known.get(dedupe_key)
        prefix = data.draw(KEYS)
        found = log_index.find_records(f"{root}", path, prefix)
        if found is not None:
            wanted = sorted(seq for key, seq in known.items() if key.startswith(prefix))
            assert [record.seq for record in found] == wanted
            assert len(known) == len(added), "there was a record without a key"


def edits(path: Path) -> Iterator[tuple[str, Any]]:
    index = sorted(path.iterdir())
    yield "removed", index[0].unlink
    yield "torn", lambda: index[0].write_bytes(index[0].read_bytes()[:-5])
    yield "zeros", lambda: index[-1].write_bytes(bytes(len(index[-1].read_bytes())))
    yield "left by a process", lambda: (path / ".tmp-1234").write_text("x")


@exclusively
@pytest.mark.parametrize("edit", range(4))
async def test_an_index_that_does_not_fit_is_written_anew(
    tmp_path: Path, exclusive: bool, edit: int
) -> None:
    await fill(tmp_path, 400, exclusive=exclusive)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.append("notes", "log", {}, dedupe_key="k1")
    _, change = [*edits(index_of(tmp_path))][edit]
    change()
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        numbers = [
            await manager.append("notes", "log", {}, dedupe_key=f"k{n}") for n in range(0, 400, 7)
        ]
        assert numbers == [*range(1, 401, 7)]


@exclusively
async def test_a_log_that_was_edited_by_hand_is_indexed_anew(
    tmp_path: Path, exclusive: bool
) -> None:
    await fill(tmp_path, 400, exclusive=exclusive)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.append("notes", "log", {}, dedupe_key="k1")
    log = tmp_path / "notes" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    edited = [line for line in lines if '"k20"' not in line]
    edited[250] = '{"by":"hand","_dedupe":"mine"}\n' + edited[250]
    log.write_text("".join(edited))
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        mine = await manager.append("notes", "log", {}, dedupe_key="mine")
        assert 250 < mine < 254
        assert await manager.append("notes", "log", {}, dedupe_key="k19") == 20
        end = await manager.append("notes", "log", {}, dedupe_key="k20")
        assert end >= 400
        assert await manager.append("notes", "log", {}, dedupe_key="k20") == end


async def test_two_processes_use_one_index(tmp_path: Path) -> None:
    one, other = StatePersistenceManager(tmp_path), StatePersistenceManager(tmp_path)
    async with one, other:
        for number in range(600):
            manager = (one, other)[number // 7 % 2]
            await manager.append("notes", "log", {"n": number}, dedupe_key=f"k{number}")
        for number in range(0, 600, 5):
            for manager in (one, other):
                again = await manager.append("notes", "log", {}, dedupe_key=f"k{number}")
                assert again == number + 1


@exclusively
async def test_without_room_for_an_index_all_is_read(
    tmp_path: Path, exclusive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LogIndex, "_write", full)
    await fill(tmp_path, 200, exclusive=exclusive)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        numbers = [await manager.append("notes", "log", {}, dedupe_key=f"k{n}") for n in range(200)]
        assert numbers == [*range(1, 201)]
        assert await manager.append("notes", "log", {}, dedupe_key="new") == 201
        found = [entry.seq async for entry in manager.read_keyed("notes", "log", "k1")]
        assert found == [2, *range(11, 21), *range(101, 201)]


@exclusively
async def test_the_same_key_at_once_is_appended_once(tmp_path: Path, exclusive: bool) -> None:
    await fill(tmp_path, 200, exclusive=exclusive)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        for number in range(200, 260):
            keys = [f"k{number}", f"k{number - 100}", f"k{number}"]
            made = (manager.append("notes", "log", {}, dedupe_key=key) for key in keys)
            assert await asyncio.gather(*made) == [number + 1, number - 99, number + 1]


@exclusively
async def test_an_erased_log_leaves_no_index(tmp_path: Path, exclusive: bool) -> None:
    await fill(tmp_path, 200, exclusive=exclusive)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.append("notes", "log", {}, dedupe_key="k1")
        assert [*index_of(tmp_path).iterdir()]
        await manager.erase("notes", "log")
        assert not index_of(tmp_path).exists()
        assert await manager.append("notes", "log", {}, dedupe_key="k1") == 1


async def test_an_index_whose_log_was_removed_by_hand_goes_when_the_directory_is_opened(
    tmp_path: Path, exclusive: bool
) -> None:
    await fill(tmp_path, 200, exclusive=exclusive)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.append("notes", "log", {}, dedupe_key="k1")
        await manager.flush()
    async with StatePersistenceManager(tmp_path, exclusive=exclusive):
        assert [*index_of(tmp_path).iterdir()]
    (tmp_path / "notes" / "log.jsonl").unlink()
    async with StatePersistenceManager(tmp_path, exclusive=exclusive):
        assert not index_of(tmp_path).exists()


async def test_git_ignores_the_index_also_where_an_earlier_version_wrote_what_it_ignores(
    tmp_path: Path,
) -> None:
    async with StatePersistenceManager(tmp_path):
        pass
    ignore = tmp_path / ".gitignore"
    now = ignore.read_text()
    for before, after in (
        (now.replace(".index/\n", ""), now),
        ("mine\n" + now.replace(".index/\n", ""), "mine\n" + now.replace(".index/\n", "")),
    ):
        ignore.write_text(before)
        async with StatePersistenceManager(tmp_path):
            assert ignore.read_text() == after
    assert ".index/" in now
