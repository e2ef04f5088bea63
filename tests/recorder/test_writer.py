"""Recording as blocking calls: real files, other processes, a disk that says no."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest

from agent_state.errors import InvalidKeyError, StorageError
from agent_state.testing import FakeClock, FaultyDisk
from agent_state.testing.faults import CHANGING, Crash, Fault
from agent_state_integrations.recorder.writer import DeadLetter, RecordWriter

NOON = datetime(2025, 3, 14, 12, tzinfo=UTC)
RawMessage = dict[str, Any]


def say(number: int, text: str | None = None, **more: Any) -> RawMessage:
    return {
        "message_id": f"m{number}",
        "timestamp": "2025-03-14T12:00:00Z",
        "sender_id": "ann",
        "context_id": "c1",
        "content": text or f"message {number}",
        **more,
    }


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON)


@pytest.fixture
def writer(tmp_path: Path, clock: FakeClock) -> Iterator[RecordWriter]:
    with RecordWriter(tmp_path, clock=clock) as writer:
        yield writer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def messages(root: Path) -> list[str]:
    """What all plain files hold, in order."""
    folder = root / "record"
    names = sorted(path for path in folder.glob("2*.jsonl"))
    current = folder / "current.jsonl"
    return [
        line["Message"]
        for path in [*names, *([current] if current.exists() else [])]
        for line in lines(path)
    ]


def test_a_message_becomes_one_line(writer: RecordWriter, tmp_path: Path) -> None:
    [recorded] = writer.write([say(1, "Let us test the storage")])
    assert (recorded.outcome, recorded.id, recorded.seq) == ("recorded", "m1", 1)
    [line] = lines(tmp_path / "record/current.jsonl")
    assert line["_seq"] == 1
    assert line["Id"] == "m1"
    assert line["SpeakerName"] == "ann"
    assert line["Message"] == "Let us test the storage"
    assert line["ContextId"] == "c1"
    assert line["Timestamp"] == "2025-03-14T12:00:00.000000Z"
    assert line["Metadata"]["chain_type"] == "data_management"
    assert line["Metadata"]["content_hash"]
    assert (tmp_path / "record/current.jsonl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "record").stat().st_mode & 0o777 == 0o700


def test_a_batch_is_one_write_and_one_sync(tmp_path: Path, clock: FakeClock) -> None:
    with FaultyDisk() as disk, RecordWriter(tmp_path, clock=clock) as writer:
        writer.write([say(0)])
        before = len(disk.calls)
        writer.write([say(number) for number in range(1, 500)])
        calls = [name for name, _ in disk.calls[before:]]
    assert calls.count("write") == 1
    assert calls.count("fdatasync") == 1


def test_a_repeat_is_told_and_not_written(writer: RecordWriter, tmp_path: Path) -> None:
    writer.write([say(1), say(2)])
    again = writer.write([say(2), say(1), say(3), say(3)])
    assert [each.outcome for each in again] == ["duplicate", "duplicate", "recorded", "duplicate"]
    assert [each.seq for each in again] == [2, 1, 3, 3]
    assert messages(tmp_path) == ["message 1", "message 2", "message 3"]


def test_repeats_are_known_after_a_restart_and_over_rotations(
    tmp_path: Path, clock: FakeClock
) -> None:
    for number in range(5):
        with RecordWriter(tmp_path, clock=clock) as writer:
            writer.write([say(number)])
            writer.rotate()
    with RecordWriter(tmp_path, clock=clock) as writer:
        outcomes = writer.write([say(number) for number in range(6)])
    assert [each.outcome for each in outcomes] == ["duplicate"] * 5 + ["recorded"]
    assert [each.seq for each in outcomes] == [1, 2, 3, 4, 5, 6]


def test_another_message_under_the_same_id_is_not_lost(
    writer: RecordWriter, tmp_path: Path
) -> None:
    writer.write([say(1, "one")])
    [other] = writer.write([say(1, "another")])
    assert other.outcome == "recorded"
    assert other.id is not None
    assert other.id.startswith("m1~")
    [again] = writer.write([say(1, "another")])
    assert (again.outcome, again.seq) == ("duplicate", other.seq)
    [line] = [line for line in lines(tmp_path / "record/current.jsonl") if "~" in line["Id"]]
    assert line["Metadata"]["original_id"] == "m1"


def test_contents_are_compared_only_when_asked(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path / "a", clock=clock) as writer:
        outcomes = writer.write([say(1, "same"), say(2, "same")])
        assert [each.outcome for each in outcomes] == ["recorded", "recorded"]
    with RecordWriter(tmp_path / "b", clock=clock, dedupe_content=True) as writer:
        outcomes = writer.write(
            [
                say(1, "same"),
                say(2, "same"),
                say(3, "same", sender_id="bob"),
                say(4, "same", context_id="c2"),
            ]
        )
        assert [each.outcome for each in outcomes] == [
            "recorded",
            "duplicate",
            "recorded",
            "recorded",
        ]


def test_the_window_bounds_what_is_remembered(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path, clock=clock, dedupe_window=10) as writer:
        for number in range(50):
            writer.write([say(number)])
        recent = writer.write([say(number) for number in range(40, 50)])
        assert {each.outcome for each in recent} == {"duplicate"}
        assert writer.write([say(0)])[0].outcome == "recorded"


def test_what_cannot_be_understood_is_a_dead_letter(writer: RecordWriter, tmp_path: Path) -> None:
    outcomes = writer.write([b"{torn", say(1), b"\xff\xfe", "[1, 2]"], source="pull")
    assert [each.outcome for each in outcomes] == [
        "dead-letter",
        "recorded",
        "dead-letter",
        "dead-letter",
    ]
    letters = lines(tmp_path / "record/dead-letter.jsonl")
    assert [letter["raw"] for letter in letters] == ["{torn", r"\xff\xfe", "[1, 2]"]
    assert all(letter["reason"] and letter["source"] == "pull" for letter in letters)
    assert [each.reason for each in outcomes if each.reason] == [
        letter["reason"] for letter in letters
    ]
    assert messages(tmp_path) == ["message 1"]


def test_secrets_are_in_neither_log(writer: RecordWriter, tmp_path: Path) -> None:
    key = "sk-ant-" + "api03-" + "Ab9" * 20
    writer.write([say(1, f"use {key} for it"), f'{{"torn": "{key}'.encode()])
    for path in (tmp_path / "record").glob("*.jsonl"):
        assert key not in path.read_text()
    assert "[redacted:" in messages(tmp_path)[0]


def test_a_long_dead_letter_is_kept_whole_in_the_quarantine(
    writer: RecordWriter, tmp_path: Path
) -> None:
    raw = b"[" + b"1," * 1_000_000
    writer.write([raw])
    [letter] = lines(tmp_path / "record/dead-letter.jsonl")
    assert len(letter["raw"]) == 1000
    assert (tmp_path / letter["kept"]).read_bytes() == raw


def test_a_message_too_large_is_a_dead_letter(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path, clock=clock, max_bytes=1000) as writer:
        [huge, small] = writer.write([say(1, "x" * 1001), say(2)])
    assert huge.outcome == "dead-letter"
    assert "1000" in (huge.reason or "")
    assert small.outcome == "recorded"
    assert messages(tmp_path) == ["message 2"]


def test_a_message_of_ten_megabytes_is_recorded(writer: RecordWriter, tmp_path: Path) -> None:
    text = "long " * 2_000_000
    assert writer.write([say(1, text)])[0].outcome == "recorded"
    assert messages(tmp_path) == [text]


def test_the_log_is_rotated_by_size(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path, clock=clock, rotate_bytes=2000) as writer:
        for number in range(30):
            writer.write([say(number)])
    names = sorted(path.name for path in (tmp_path / "record").glob("2*.jsonl"))
    assert len(names) == 5
    assert names[0] == "2025-03-14-000000000001.jsonl"
    assert all((tmp_path / "record" / name).stat().st_size <= 2000 for name in names)
    assert messages(tmp_path) == [f"message {number}" for number in range(30)]
    numbers = [
        line["_seq"]
        for path in [*sorted((tmp_path / "record").glob("2*.jsonl"))]
        for line in lines(path)
    ]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_the_log_is_rotated_by_day(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path, clock=clock) as writer:
        writer.write([say(1)])
        await clock.advance(13 * 3600)
        writer.write([say(2)])
        await clock.advance(24 * 3600)
        writer.write([say(3)])
    names = sorted(path.name for path in (tmp_path / "record").glob("2*.jsonl"))
    assert names == ["2025-03-14-000000000001.jsonl", "2025-03-15-000000000002.jsonl"]


def test_a_clock_that_goes_back_rotates_nothing(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, clock=FakeClock(NOON)) as writer:
        writer.write([say(1)])
    with RecordWriter(tmp_path, clock=FakeClock(datetime(2024, 1, 1, tzinfo=UTC))) as writer:
        assert writer.write([say(2)])[0].seq == 2
    assert not list((tmp_path / "record").glob("2*.jsonl"))


def test_a_torn_tail_is_repaired_and_told(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path, clock=clock) as writer:
        writer.write([say(1), say(2)])
    path = tmp_path / "record/current.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with RecordWriter(tmp_path, clock=clock) as writer:
        # The second was torn, and its sender, who has no answer, sends it again.
        assert [each.outcome for each in writer.write([say(1), say(2)])] == [
            "duplicate",
            "recorded",
        ]
        [incident] = writer.incidents()
    assert incident.kept is not None
    assert messages(tmp_path) == ["message 1", "message 2"]


def test_garbage_and_wrong_types_in_the_log_harm_nobody(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path, clock=clock) as writer:
        writer.write([say(1)])
    path = tmp_path / "record/current.jsonl"
    with path.open("ab") as file:
        file.write(b'garbage\n{"Id": 5, "Message": []}\n[1]\n{"Id":"x"}\n')
    with RecordWriter(tmp_path, clock=clock) as writer:
        [recorded] = writer.write([say(2)])
    assert recorded.outcome == "recorded"
    assert orjson.loads(path.read_bytes().split(b"\n")[-2])["Id"] == "m2"


def test_numbers_are_never_given_again(tmp_path: Path, clock: FakeClock) -> None:
    with RecordWriter(tmp_path, clock=clock) as writer:
        writer.write([say(1), say(2)])
        writer.checkpoint("one")
    (tmp_path / "record/current.jsonl").unlink()
    with RecordWriter(tmp_path, clock=clock) as writer:
        assert writer.write([say(3)])[0].seq == 3


def _record(root: str, name: str, count: int) -> None:
    with RecordWriter(root, rotate_bytes=20_000) as writer:
        for number in range(count):
            message = say(number, f"{name} {number}", message_id=f"{name}-{number}")
            shared = say(number, f"both {number}", message_id=f"both-{number}")
            outcomes = writer.write([message, shared])
            assert outcomes[0].outcome == "recorded"
    os._exit(0)


def test_two_processes_record_into_one_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_record, args=(str(tmp_path), name, 150)) for name in ("one", "two")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = messages(tmp_path)
    expected = [f"{name} {number}" for name in ("one", "two", "both") for number in range(150)]
    assert sorted(found) == sorted(expected)
    numbers = [
        line["_seq"]
        for path in [
            *sorted((tmp_path / "record").glob("2*.jsonl")),
            tmp_path / "record/current.jsonl",
        ]
        for line in lines(path)
    ]
    assert numbers == list(range(1, 451))


@pytest.mark.parametrize("call", ["write", "fdatasync", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("action", ["fail", "short"])
def test_an_error_is_told_and_nothing_is_half_recorded(
    tmp_path: Path, clock: FakeClock, call: str, number: int, action: Literal["fail", "short"]
) -> None:
    for at in range(1, 30):
        root = tmp_path / str(at)
        with RecordWriter(root, clock=clock) as writer:
            writer.write([say(0)])
            disk = FaultyDisk(Fault(at=at, call=call, error=number, action=action))
            told = True
            with disk:
                try:
                    writer.write([say(1), "torn", say(2)])
                except StorageError:
                    told = False
            if not told:
                assert messages(root) == ["message 0"]
            outcomes = writer.write([say(1), say(2)])
            assert {each.outcome for each in outcomes} == {"duplicate" if told else "recorded"}
        assert messages(root) == ["message 0", "message 1", "message 2"]
        if not disk.fired:
            break
    else:
        pytest.fail("the fault was always met")


def test_a_crash_at_any_call_loses_and_repeats_nothing(tmp_path: Path) -> None:
    for at in range(1, 200):
        root = tmp_path / str(at)
        acknowledged = set[str]()
        disk = FaultyDisk(Fault(at=at, call=CHANGING, action="crash torn"))
        doomed = RecordWriter(root, clock=FakeClock(NOON), rotate_bytes=900)
        with disk, suppress(Crash), doomed:
            for number in range(4):
                doomed.write([say(number), b"torn"])
                acknowledged.add(f"message {number}")
            doomed.checkpoint("one")
        with RecordWriter(root, clock=FakeClock(NOON), rotate_bytes=900) as writer:
            assert acknowledged <= set(messages(root))
            writer.write([say(number) for number in range(4)])
            writer.checkpoint("two")
        assert messages(root) == [f"message {number}" for number in range(4)]
        if not disk.fired:
            break
    else:
        pytest.fail("the process always died")
    assert at > 20


def test_checkpoints_hold_only_what_is_new(writer: RecordWriter, tmp_path: Path) -> None:
    writer.write([say(1), say(2)])
    first = writer.checkpoint("one")
    assert writer.checkpoint("nothing came") is None
    writer.write([say(3)])
    writer.rotate()
    writer.write([say(4)])
    second = writer.checkpoint("two")
    assert first is not None
    assert second is not None
    assert (first.first_seq, first.last_seq, first.message_count) == (1, 2, 2)
    assert (second.first_seq, second.last_seq, second.message_count) == (3, 4, 2)
    assert second.previous == first.checkpoint_id
    assert second.checkpoint_id > first.checkpoint_id
    names = sorted(path.name for path in (tmp_path / "record/checkpoints").iterdir())
    assert names == [f"{each.checkpoint_id}.json" for each in (first, second)]


@pytest.mark.parametrize("label", ["", "x" * 101])
def test_a_label_that_is_none_is_refused(writer: RecordWriter, label: str) -> None:
    writer.write([say(1)])
    with pytest.raises(InvalidKeyError):
        writer.checkpoint(label)


def test_a_label_is_data_and_no_path(writer: RecordWriter, tmp_path: Path) -> None:
    writer.write([say(1)])
    assert writer.checkpoint("../../Escape: me") is not None
    assert len(list((tmp_path / "record/checkpoints").iterdir())) == 1


def test_what_was_refused_before_can_be_handed_over_as_a_dead_letter(
    writer: RecordWriter, tmp_path: Path
) -> None:
    [recorded] = writer.write([DeadLetter(b"raw", "no such frame")])
    assert recorded.reason == "no such frame"
