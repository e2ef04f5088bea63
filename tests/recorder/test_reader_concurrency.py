"""What is rotated, archived or damaged while it is read; lines as they stand in the log."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from agent_state.errors import StateCorruptedError
from agent_state_integrations.recorder.files import Format, LogSegment, Recording
from agent_state_integrations.recorder.message import RecordedMessage
from agent_state_integrations.recorder.query import Query
from agent_state_integrations.recorder.reader import number_of, raw_lines, read_records
from tests.recorder.segments import (
    archive_all,
    lines,
    live,
    message,
    mixed,
    pack,
    segment,
)


def test_what_is_rotated_while_it_is_read_is_read_once(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    live(recording, lines(1, 5))
    found = read_records(tmp_path)
    before = list(islice(found, 2))
    recording.current.rename(recording.segment_path("2026-11-01", 1))
    live(recording, lines(6, 8))
    assert [seq for seq, _ in before + list(found)] == [1, 2, 3, 4, 5]
    assert [seq for seq, _ in read_records(tmp_path)] == list(range(1, 9))


def test_what_is_archived_while_it_is_read_is_read_once(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for first in (1, 11, 21):
        segment(recording, first, lines(first, first + 9))
    found = read_records(tmp_path)
    before = list(islice(found, 3))
    archive_all(tmp_path)
    assert recording.segments() == []
    assert [seq for seq, _ in before + list(found)] == list(range(1, 31))


@pytest.mark.parametrize("kind", ["parquet", "zst", "gz"])
@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_a_damaged_or_missing_archive_is_named(tmp_path: Path, kind: Format, damage: str) -> None:
    recording = Recording(tmp_path)
    path = pack(recording, segment(recording, 1, lines(1, 500)), kind)
    live(recording, lines(501, 502))
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:4] + bytes(len(data) - 8) + data[-4:])
    with pytest.raises(StateCorruptedError) as raised:
        list(read_records(tmp_path))
    assert raised.value.path == str(path)


def test_no_byte_of_parquet_changes_unseen(tmp_path: Path) -> None:
    """Its pages have checksums: what is read is what was written, or an error."""
    recording = Recording(tmp_path)
    path = pack(recording, segment(recording, 1, lines(1, 40)), "parquet")
    expected = list(read_records(path))
    data = path.read_bytes()
    refused = 0
    for at in range(4, len(data) - 8, 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            found = list(read_records(path))
        except StateCorruptedError:
            refused += 1
        else:
            assert found == expected
    assert refused > 10


def test_an_archive_that_a_query_cannot_mean_is_not_even_opened(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    path = pack(recording, segment(recording, 1, lines(1, 5)), "parquet")
    live(recording, lines(100, 102))
    path.unlink()
    since = RecordedMessage.from_record(message(50)).timestamp
    from agent_state.clock import instant

    query = Query(since=instant(since))
    assert [seq for seq, _ in read_records(tmp_path, query)] == [100, 101, 102]


def test_lines_are_the_same_bytes_wherever_they_are(tmp_path: Path) -> None:
    recording = mixed(tmp_path)
    for first, last in ((1, 50), (5, 5), (8, 23), (39, 43), (50, 90), (60, 90)):
        found = b"".join(one + b"\n" for one in raw_lines(recording, first, last))
        assert found == b"".join(lines(first, min(last, 50)))


def test_lines_of_a_recording_without_any_are_none(tmp_path: Path) -> None:
    assert list(raw_lines(Recording(tmp_path), 1, 5)) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b'{"a":1,"_seq":17}', 17),
        (b'{"_seq": 18, "a": 1}', 18),
        (b'{"a":{"_seq":5}}', 0),
        (b'{"a":"\\"_seq\\":5}"}', 0),
        (b'{"_seq":"5"}', 0),
        (b"garbage", 0),
    ],
)
def test_the_number_of_a_line_is_what_it_says_itself(text: bytes, number: int) -> None:
    assert number_of(text) == number


def test_plain_logs_are_read_without_any_extra(tmp_path: Path) -> None:
    """Neither Arrow nor DuckDB is imported before a file asks for it; without them it says so."""
    recording = Recording(tmp_path)
    pack(recording, segment(recording, 1, lines(1, 3)), "gz")
    live(recording, lines(4, 5))
    program = """
import sys
sys.modules |= dict.fromkeys(("pyarrow", "duckdb", "zmq"))
from agent_state.errors import MissingExtraError
from agent_state_integrations.recorder import sql
from agent_state_integrations.recorder.archiver import archive
from agent_state_integrations.recorder.archiver import RetentionPolicy
from agent_state_integrations.recorder.reader import count, read
from agent_state_integrations.recorder.files import Recording
state = sys.argv[1]
assert [one.seq for one in read(state)] == [1, 2, 3, 4, 5]
Recording(state).current.rename(Recording(state).segment_path("2026-11-02", 4))
assert archive(state, RetentionPolicy(parquet_past=0)).compressed == ["2026-11-02-000000000004"]
assert {one.format for one in Recording(state).archives()} == {"gz"}
assert count(state) == 5
try:
    sql.connect(state).__enter__()
except MissingExtraError as error:
    assert "agent-state[recorder]" in str(error)
else:
    raise AssertionError("no error")
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_log_rotated_while_the_files_are_looked_for_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(tmp_path)
    live(recording, lines(1, 5))
    look = Recording.segments
    rotated = list[int]()

    def segments(self: Recording) -> list[LogSegment]:
        if not rotated:
            rotated.append(1)
            self.current.rename(self.segment_path("2026-11-01", 1))
            live(self, lines(6, 8))
            archive_all(tmp_path)
        return look(self)

    monkeypatch.setattr(Recording, "segments", segments)
    assert [seq for seq, _ in read_records(tmp_path)] == list(range(1, 9))
    assert rotated == [1]
