"""The spool: messages on disk, each until the daemon has it."""

from __future__ import annotations

import errno
from pathlib import Path

import orjson
import pytest

from agent_state.errors import StorageError, StorageFullError
from agent_state.testing.faults import CHANGING, Crash, Fault, FaultyDisk
from agent_state_integrations.recorder.network.spool import BATCH, Spool


def message(number: object) -> bytes:
    return orjson.dumps({"id": f"m-{number}", "content": f"said {number}"})


def delivered(spool: Spool) -> list[str]:
    """What a daemon would get, all of it."""
    ids = []
    lock = spool.begin_delivery()
    assert lock is not None
    while path := spool.oldest():
        ids += [orjson.loads(one)["Id"] for batch in spool.batches(path) for one in batch]
        spool.remove(path)
    lock.release()
    return ids


def test_what_is_appended_is_delivered_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a" / "spool")
    assert not spool.waiting()
    assert not spool.folder.parent.exists()
    spool.append([message(1), message(2)])
    Spool(spool.folder).append([message(3)])
    spool.append([message(4)])
    assert spool.waiting()
    assert delivered(Spool(spool.folder)) == ["m-1", "m-2", "m-3", "m-4"]
    assert not spool.waiting()
    spool.append([message(5)])
    assert delivered(spool) == ["m-5"]


def test_one_process_delivers(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    lock = spool.begin_delivery()
    assert lock is not None
    assert Spool(tmp_path).begin_delivery() is None
    lock.release()
    other = Spool(tmp_path).begin_delivery()
    assert other is not None
    other.release()


def test_large_spools_are_several_files_in_batches(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=100_000)
    for start in range(0, 3000, 100):
        spool.append([message(n) for n in range(start, start + 100)])
    assert len(list(tmp_path.glob("*.jsonl"))) > 3
    path = spool.oldest()
    assert path is not None
    assert max(len(batch) for batch in spool.batches(path)) <= BATCH
    assert delivered(spool) == [f"m-{n}" for n in range(3000)]


def test_what_is_added_during_a_delivery_is_not_removed_with_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([message(1)])
    path = spool.oldest()
    assert path is not None
    spool.append([message(2)])
    spool.remove(path)
    assert delivered(spool) == ["m-2"]


def test_a_file_that_was_not_removed_is_delivered_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([message(1)])
    assert spool.oldest() == spool.oldest()
    spool.append([message(2)])
    assert delivered(Spool(tmp_path)) == ["m-1", "m-2"]


def test_a_torn_tail_is_put_aside(tmp_path: Path) -> None:
    Spool(tmp_path).append([message(1)])
    with (tmp_path / "current.jsonl").open("ab") as file:
        file.write(b'{"_crc":"0","_seq":2,"mess')
    Spool(tmp_path).append([message(2)])
    assert delivered(Spool(tmp_path)) == ["m-1", "m-2"]
    [torn] = tmp_path.glob("*.torn")
    assert torn.read_bytes() == b'{"_crc":"0","_seq":2,"mess'


def test_a_damaged_line_is_delivered_as_it_is(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([message(1)])
    spool.append([b'{"id": "2"}'])  # it says nothing, so the daemon keeps it as a dead letter
    path = spool.oldest()
    assert path is not None
    with Path(path).open("ab") as file:
        file.write(b'garbage\n{"other": 1}\n{"raw": 1}\n')
    [[first, *others]] = spool.batches(path)
    assert orjson.loads(first)["Id"] == "m-1"
    assert others == [b'{"id": "2"}', b"garbage", b'{"other": 1}', b'{"raw": 1}']


@pytest.mark.parametrize("at", range(1, 14))
def test_a_crash_anywhere_loses_nothing_that_was_kept(tmp_path: Path, at: int) -> None:
    kept = ["m-1"]
    Spool(tmp_path).append([message(1)])
    spool = Spool(tmp_path, segment_bytes=10)
    with FaultyDisk(Fault(at, CHANGING, "crash torn")) as disk:
        try:
            for number in (2, 3):
                spool.append([message(number)])
                kept.append(f"m-{number}")
        except Crash:
            pass
    found = delivered(Spool(tmp_path))
    assert found[: len(kept)] == kept
    assert len(found) <= len(kept) + 1
    assert disk.crashed == (len(kept) < 3)


@pytest.mark.parametrize("call", ["open", "write", "fdatasync"])
def test_a_disk_that_refuses_keeps_what_was_there(tmp_path: Path, call: str) -> None:
    spool = Spool(tmp_path)
    spool.append([message(1)])
    number = errno.ENOSPC if call == "write" else errno.EIO
    with (
        FaultyDisk(Fault(1, call, error=number)),
        pytest.raises(StorageFullError if call == "write" else StorageError),
    ):
        spool.append([message(2)])
    spool.append([message(3)])
    assert delivered(spool) == ["m-1", "m-3"]
