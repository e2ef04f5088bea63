"""A recorder beside others: their rotations, their archives, and what is known of all that."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from agent_state.errors import StateCorruptedError, StorageError
from agent_state.testing import FaultyDisk
from agent_state.testing.faults import Fault
from agent_state_integrations.recorder import (
    RecordWriter,
    RetentionPolicy,
    archive,
    import_logs,
    read,
)
from agent_state_integrations.recorder.writer import RawMessage
from tests.recorder.segments import line

AT_ONCE = RetentionPolicy(parquet_past=0)


def say(number: int) -> RawMessage:
    return {"message_id": f"m{number}", "content": f"message {number} says so"}


def numbers(root: Path) -> list[int]:
    return [message.seq for message in read(root)]


def test_a_log_that_has_the_inode_of_an_archived_one_is_another(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as idle, RecordWriter(tmp_path) as busy:
        idle.write([say(1)])
        live = tmp_path / "record/current.jsonl"
        inode, count = live.stat().st_ino, 1
        for _ in range(10):  # file systems give it again soon, but not all of them at once
            busy.rotate()
            archive(tmp_path, AT_ONCE)
            busy.write([say(count + 1)])
            count += 1
            if live.stat().st_ino == inode:
                break
        [last] = idle.write([say(count + 1)])
        assert last.seq == count + 1
        idle.rotate()
    archive(tmp_path, AT_ONCE)
    assert numbers(tmp_path) == list(range(1, count + 2))


@pytest.mark.parametrize("how", ["parquet", "zst"])
def test_what_is_archived_is_known_after_a_restart(tmp_path: Path, how: str) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write([say(1), say(2)])
        writer.rotate()
    policy = AT_ONCE
    if how == "zst":
        [segment] = (tmp_path / "record").glob("2*.jsonl")
        segment.rename(segment.with_name("2020-01-01-000000000001.jsonl"))
        policy = RetentionPolicy()
    archive(tmp_path, policy)
    assert list((tmp_path / "record/archive").glob(f"*.{how}"))
    with RecordWriter(tmp_path) as writer:
        again = writer.write([say(2), say(3)])
    assert [(one.outcome, one.seq) for one in again] == [("duplicate", 2), ("recorded", 3)]


def test_what_others_archived_meanwhile_is_known(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as idle, RecordWriter(tmp_path) as busy:
        idle.write([say(1)])
        busy.write([say(2)])
        busy.rotate()
        archive(tmp_path, AT_ONCE)
        assert [one.seq for one in idle.write([say(1), say(2), say(3)])] == [1, 2, 3]
    assert numbers(tmp_path) == [1, 2, 3]


def test_importing_again_what_was_archived_adds_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"sender_id": "ada", "content": "hi {n}"}}\n' for n in range(5)))
    state = tmp_path / "state"
    for recorded in (5, 0):
        with RecordWriter(state, dedupe_window=1 << 40) as writer:
            assert import_logs([log], writer).recorded == recorded
            writer.rotate()
        archive(state, AT_ONCE)


def test_a_damaged_archive_does_not_stop_the_recorder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write([say(1)])
        writer.rotate()
    archive(tmp_path, AT_ONCE)
    [packed] = (tmp_path / "record/archive").glob("*.parquet")
    packed.write_bytes(b"PAR1 no longer PAR1")
    with caplog.at_level(logging.WARNING), RecordWriter(tmp_path) as writer:
        assert writer.write([say(2)])[0].seq == 2
    assert packed.name in caplog.text


def test_a_failure_makes_nothing_forgotten_and_nothing_known(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, dedupe_content=True) as writer:
        writer.write([say(1)])
        with (
            FaultyDisk(Fault(at=1, call="fdatasync", error=errno.ENOSPC)),
            pytest.raises(StorageError),
        ):
            writer.write([say(2)])
        outcomes = writer.write([say(1), say(2), say(2)])
    assert [(one.outcome, one.seq) for one in outcomes] == [
        ("duplicate", 1),
        ("recorded", 2),
        ("duplicate", 2),
    ]


def test_an_archive_never_goes_for_another_segment_of_its_name(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write([say(1)])
        writer.rotate()
    archive(tmp_path, AT_ONCE)
    [packed] = (tmp_path / "record/archive").glob("*.parquet")
    other = tmp_path / f"record/{packed.stem}.jsonl"
    other.write_bytes(line(1))
    with pytest.raises(StateCorruptedError, match=other.name):
        archive(tmp_path, AT_ONCE)
    other.unlink()
    assert numbers(tmp_path) == [1]


def test_a_damaged_checkpoint_does_not_stop_the_recorder(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for number in (1, 2):
            writer.write([say(number)])
            writer.checkpoint(f"c{number}")
    [damaged] = (tmp_path / "record/checkpoints").glob("*_c2.json")
    damaged.write_text("{torn")
    with RecordWriter(tmp_path) as writer:
        assert writer.write([say(3)])[0].seq == 3
        made = writer.checkpoint("c3")
    assert made is not None
    assert (made.first_seq, made.last_seq) == (2, 3)
    assert made.checkpoint_id > damaged.stem


@pytest.mark.parametrize("window", [1, 2])
def test_numbers_go_on_after_everything_was_removed(tmp_path: Path, window: int) -> None:
    for number in (1, 2, 3):
        with RecordWriter(tmp_path, dedupe_window=window) as writer:
            assert writer.write([say(number)])[0].seq == number
            writer.rotate()
        archive(tmp_path, RetentionPolicy(parquet_past=0, keep_bytes=0))


def test_a_program_may_go_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with RecordWriter("state", rotate_bytes=600) as writer:
        writer.write([say(1)])
        (tmp_path / "else").mkdir()
        monkeypatch.chdir(tmp_path / "else")
        for number in (2, 3):
            writer.write([say(number)])
        writer.checkpoint()
    assert numbers(tmp_path / "state") == [1, 2, 3]
    assert not list(Path.cwd().iterdir())
