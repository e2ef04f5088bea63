"""The journal: damaged anywhere, replayed twice, refused by the disk."""

from __future__ import annotations

import asyncio
import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AgentStateError,
    DurabilityUnknownError,
    FileStateStore,
    StorageError,
    StorageFullError,
    WALStateStore,
)
from agent_state.protocols import Change, StateStore
from agent_state.storage import wal
from agent_state.storage.changes import ResolvedDelete, decode_record, encode_changes, frame
from agent_state.testing import Crash, Fault, FaultyDisk
from agent_state.testing.contract_base import append, body, content_of, delete, put, records_of

JOURNAL = ".journal"


async def opened(root: Path, segment_bytes: int = wal.SEGMENT_BYTES) -> WALStateStore:
    store = WALStateStore(root, segment_bytes=segment_bytes)
    await store.open()
    return store


async def settle(store: WALStateStore) -> None:
    """Write the files, and leave the journal as it is."""
    checkpoints = store._writing()
    async with checkpoints.lock:
        await checkpoints.write_back()


async def unsettled(root: Path, *commits: list[Change]) -> Path:
    """A directory whose owner died right after its last commit; its only segment."""
    with FaultyDisk() as disk:
        store = await opened(root)
        for changes in commits:
            await store.commit(changes)
        disk.crash()
        with pytest.raises(Crash):
            await store.close()
    [segment] = (root / JOURNAL).glob("*.jsonl")
    return segment


async def contents(store: StateStore) -> dict[str, object]:
    return {key[0]: await content_of(store, key) for key in await store.keys("notes")}


async def test_what_was_acknowledged_is_in_the_journal_at_once(tmp_path: Path) -> None:
    segment = await unsettled(tmp_path, [put("a", {"n": 1}), append("log", {"n": 1})])

    assert not (tmp_path / "notes").exists()
    [record] = wal.read_segment(str(segment)).records
    assert len(record) == 2


@pytest.mark.parametrize("heir", [WALStateStore, FileStateStore])
async def test_damage_at_the_tail_costs_only_what_was_not_acknowledged(
    tmp_path: Path, heir: type[FileStateStore]
) -> None:
    segment = await unsettled(
        tmp_path / "origin", [put("a", {"n": 1})], [put("b", {"n": 1}), append("log", {"n": 1})]
    )
    data = segment.read_bytes()
    last = data[:-1].rindex(b"\n") + 1
    for cut in range(last, len(data) - 1, 31 if heir is FileStateStore else 5):
        for filler in (b"", b"\0" * 40):
            root = tmp_path / "copy"
            shutil.copytree(tmp_path / "origin", root)
            (root / JOURNAL / segment.name).write_bytes(data[:cut] + filler)

            store = heir(root)
            await store.open()
            assert await contents(store) == {"a": {"n": 1}}
            assert await records_of(store, "log") == []
            assert store.incidents() == []
            assert await store.commit([put("a", {"n": 2}, expected=1)]) == [2]
            await store.close()
            assert list((root / JOURNAL).glob("[!.]*")) == []
            shutil.rmtree(root)


async def test_damage_before_the_tail_is_put_aside_and_reported(tmp_path: Path) -> None:
    segment = await unsettled(
        tmp_path / "origin", [put("a", {"n": 1})], [put("b", {"n": 1})], [put("c", {"n": 1})]
    )
    data = segment.read_bytes()
    first, second = data.index(b"\n") + 1, data[:-1].rindex(b"\n") + 1
    for at in sorted({*range(first, second, 9), second - 1}):
        root = tmp_path / "copy"
        shutil.copytree(tmp_path / "origin", root)
        (root / JOURNAL / segment.name).write_bytes(data[:at] + b"\xff" + data[at + 1 :])

        store = await opened(root)
        # Without the newline between them, two records are one that cannot be read.
        after = {} if at == second - 1 else {"c": {"n": 1}}
        assert await contents(store) == {"a": {"n": 1}, **after}
        [incident] = store.incidents()
        await store.close()

        assert incident.path == f"{JOURNAL}/{segment.name}"
        assert incident.kept is not None
        assert (root / incident.kept).stat().st_size == len(data)
        assert list((root / JOURNAL).glob("[!.]*")) == []
        shutil.rmtree(root)


async def test_replaying_twice_changes_nothing(tmp_path: Path) -> None:
    segment = await unsettled(
        tmp_path,
        [put("a", {"n": 1}), append("log", {"n": 1}, "once")],
        [put("a", {"n": 2}), put("b", {"n": 1})],
        [delete("b"), append("log", {"n": 2})],
    )
    data = segment.read_bytes()
    seen: list[Any] = []
    for _ in range(3):
        segment.write_bytes(data)
        store = await opened(tmp_path)
        seen.append((await contents(store), await records_of(store, "log")))
        assert store.incidents() == []
        await store.close()
        seen.append({path.name: path.read_bytes() for path in (tmp_path / "notes").iterdir()})

    assert seen[0:2] == seen[2:4] == seen[4:6]
    assert seen[0][0] == {"a": {"n": 2}}


async def test_an_old_journal_never_undoes_what_was_saved_since(tmp_path: Path) -> None:
    segment = await unsettled(tmp_path, [put("a", {"n": 1})], [append("log", {"n": 1})])
    data = segment.read_bytes()
    store = await opened(tmp_path)
    await store.commit([put("a", {"n": 2}), append("log", {"n": 2})])
    await store.close()
    segment.write_bytes(data)

    store = await opened(tmp_path)

    assert await content_of(store, "a") == {"n": 2}
    assert len(await records_of(store, "log")) == 2
    await store.close()


@pytest.mark.parametrize("settled", [0, 1, 2, 3, 4])
async def test_a_document_deleted_and_made_anew_survives_a_crash(
    tmp_path: Path, settled: int
) -> None:
    commits: list[list[Change]] = [
        [put("a", {"n": 1})],
        [put("a", {"n": 2})],
        [put("a", {"n": 3})],
        [delete("a")],
        [put("a", {"n": "new"})],
    ]
    with FaultyDisk() as disk:
        store = await opened(tmp_path)
        for number, changes in enumerate(commits):
            await store.commit(changes)
            if number < settled:
                await settle(store)  # the files are written, the segment stays
        disk.crash()
        with pytest.raises(Crash):
            await store.close()

    store = await opened(tmp_path)
    assert await content_of(store, "a") == {"n": "new"}
    assert store.incidents() == []
    await store.close()


async def test_an_fsync_that_failed_is_never_asked_again(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.commit([put("a", {"n": 1})])
    with FaultyDisk(Fault(at=1, call="fdatasync")) as disk:
        assert await store.commit([put("b", {"n": 1}), put("a", {"n": 2})]) == [1, 2]
        assert await store.commit([append("log", {"n": 1})]) == [1]
    synced = [about for name, about in disk.calls if name == "fdatasync"]
    begun = [about for name, about in disk.calls if name == "open" and about.endswith(".jsonl")]

    assert any(about.endswith("00000002.jsonl") for about in begun)
    assert len(synced) == 3
    # The new segment vouches for all that was not settled, whatever became of the old one.
    segment = next((tmp_path / JOURNAL).glob("*2.jsonl"))
    assert len(wal.read_segment(str(segment)).records) == 3
    await store.close()
    assert (tmp_path / "notes" / "b.json").exists()


async def test_a_disk_that_confirms_nothing_gives_an_answer_of_its_own(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.commit([put("a", {"n": 1})])
    with FaultyDisk(Fault(at=1, call="fdatasync", persistent=True)):
        with pytest.raises(DurabilityUnknownError):
            await store.commit([put("a", {"n": 2})])
        assert await content_of(store, "a") == {"n": 1}
        with pytest.raises(DurabilityUnknownError):
            await store.commit([append("log", {"n": 1}, "x")])

    # The disk is well again. No number is given twice, in case the old ones are there after all.
    assert await store.commit([put("a", {"n": 3}, expected=1)]) == [3]
    [seq] = await store.commit([append("log", {"n": 2}, "x")])
    assert seq > 1
    await store.close()
    store = await opened(tmp_path)
    assert await content_of(store, "a") == {"n": 3}
    assert [record.body for record in await records_of(store, "log")] == [body({"n": 2})]
    await store.close()


@pytest.mark.parametrize("action", ["fail", "short"])
async def test_a_full_disk_refuses_and_changes_nothing(tmp_path: Path, action: str) -> None:
    store = await opened(tmp_path)
    await store.commit([put("a", {"n": 1}), append("log", {"n": 1})])
    full = Fault(
        at=2 if action == "short" else 1, call="write", error=errno.ENOSPC, persistent=True
    )
    short = Fault(at=1, call="write", action="short")
    with FaultyDisk(*([short, full] if action == "short" else [full])):
        with pytest.raises(StorageFullError) as caught:
            await store.commit([put("a", {"n": 2}), put("b", {"n": 1}), append("log", {"n": 2})])
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.path is not None
        assert await contents(store) == {"a": {"n": 1}}

    assert await store.commit([put("a", {"n": 3}, expected=1)]) == [3]
    await store.close()
    store = await opened(tmp_path)
    assert await contents(store) == {"a": {"n": 3}}
    assert len(await records_of(store, "log")) == 1
    await store.close()


async def test_all_that_wait_on_a_refused_save_are_refused_with_it(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.commit([put("a", {"n": 1})])
    with FaultyDisk(Fault(at=1, call="write", error=errno.ENOSPC)):
        saves = [asyncio.create_task(store.commit([put("a", {"n": n})])) for n in range(2, 6)]
        outcomes = await asyncio.gather(*saves, return_exceptions=True)

    assert all(isinstance(outcome, StorageFullError) for outcome in outcomes)
    assert await content_of(store, "a") == {"n": 1}
    await store.close()


async def test_many_saves_at_once_are_one_write_and_one_sync(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await asyncio.gather(*(store.commit([put(f"{n}", {"n": 0})]) for n in range(100)))
    await store.flush()
    await store.commit([put("warm", {})])
    with FaultyDisk() as disk:
        await asyncio.gather(*(store.commit([put(f"{n}", {"n": 1})]) for n in range(100)))
        assert disk.count("fdatasync") <= 2
    await store.close()


async def test_segments_rotate_and_go_when_all_is_in_its_file(tmp_path: Path) -> None:
    store = await opened(tmp_path, segment_bytes=2000)
    for n in range(60):
        await store.commit([put(f"{n % 7}", {"n": n, "text": "x" * 100}), append("log", {"n": n})])
        if n % 20 == 19:
            await store.flush()
            assert list((tmp_path / JOURNAL).glob("[!.]*")) == []
    await store.close()

    store = await opened(tmp_path)
    assert [record.seq for record in await records_of(store, "log")] == list(range(1, 61))
    assert len(await store.keys("notes")) == 7
    await store.close()


@pytest.mark.parametrize("call", ["fsync", "fsync_directory"])
async def test_a_file_whose_fsync_failed_is_written_anew_before_its_journal_goes(
    tmp_path: Path, call: str
) -> None:
    store = await opened(tmp_path)
    await store.commit([put("a", {"n": 1}), append("log", {"n": 1})])
    await settle(store)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "notes").iterdir()}
    with FaultyDisk(Fault(at=1, call=call, persistent=True)), pytest.raises(StorageError):
        await store.flush()
    assert list((tmp_path / JOURNAL).glob("*.jsonl")) != []

    await store.flush()

    after = {path.name: path.stat().st_ino for path in (tmp_path / "notes").iterdir()}
    if call == "fsync":
        assert any(after[name] != before[name] for name in before)
    assert list((tmp_path / JOURNAL).glob("*.jsonl")) == []
    await store.close()
    store = await opened(tmp_path)
    assert await content_of(store, "a") == {"n": 1}
    assert len(await records_of(store, "log")) == 1
    await store.close()


async def test_a_log_whose_fsync_failed_is_written_anew_too(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.commit([append("log", {"n": 1})])
    await settle(store)
    path = tmp_path / "notes" / "log.jsonl"
    inode = path.stat().st_ino
    with FaultyDisk(Fault(at=1, call="fsync")), pytest.raises(StorageError):
        await store.flush()
    path.write_bytes(b"")  # the kernel has dropped the page

    await store.flush()

    assert path.stat().st_ino != inode
    assert [record.seq for record in await records_of(store, "log")] == [1]
    await store.close()


async def test_a_closed_store_takes_nothing(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.close()

    with pytest.raises(AgentStateError, match="not open"):
        await store.commit([put("a", {"n": 1})])
    with pytest.raises(AgentStateError, match="not open"):
        await store.get("notes", ("a",))


async def test_closing_lets_go_of_the_directory_even_when_the_disk_fails(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.commit([put("a", {"n": 1})])
    with FaultyDisk(Fault(at=1, call="rename", persistent=True)), pytest.raises(StorageError):
        await store.close()

    heir = await opened(tmp_path)
    assert await content_of(heir, "a") == {"n": 1}
    await heir.close()


def test_a_journal_line_is_its_own_proof() -> None:
    line = frame(encode_changes([ResolvedDelete("notes", ("a",), 3)]))[:-1]
    assert decode_record(line).changes == [ResolvedDelete("notes", ("a",), 3)]
    for at in range(len(line)):
        for byte in (line[at] ^ 1, line[at] ^ 0x80, 0, 0xFF):
            damaged = line[:at] + bytes([byte]) + line[at + 1 :]
            if damaged != line:
                with pytest.raises(AgentStateError):
                    decode_record(damaged)
        with pytest.raises(AgentStateError):
            decode_record(line[:at])
