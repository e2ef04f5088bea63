from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent_state.errors import (
    QueryError,
    SchemaTooNewError,
    StateCorruptedError,
    StateDirectoryInUseError,
    StateNotFoundError,
    StorageFullError,
)
from agent_state.storage import locks
from agent_state.testing import FakeClock, Fault, FaultyDisk
from agent_state_integrations.recorder import archiver, formats
from agent_state_integrations.recorder.archive_index import known_index, read_index
from agent_state_integrations.recorder.archiver import (
    LOCK,
    RetentionPolicy,
    age_of,
    archive,
    size_of,
    verify_archives,
)
from agent_state_integrations.recorder.files import Format, Recording
from agent_state_integrations.recorder.reader import raw_lines, read_records
from agent_state_integrations.recorder.writer import RecordWriter
from tests.recorder.segments import archive_all, line, lines, live, message, segment

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """Five segments of five days, ten lines each, and a live log."""
    recording = Recording(tmp_path)
    for day in range(5):
        first = day * 10 + 1
        segment(recording, first, lines(first, first + 9), f"2026-11-{day + 1:02d}")
    live(recording, lines(51, 55))
    return recording


def run(recording: Recording, **policy: object) -> dict[str, object]:
    never = {"parquet_past": 10**12, "compress_past": timedelta(days=10**6)}
    clock = FakeClock(NOW)
    made = RetentionPolicy(**{**never, **policy})  # type: ignore[arg-type]  # by name, in a test
    return archive(recording.state_dir, made, clock=clock).to_dict()


def seqs(recording: Recording) -> list[int]:
    return [seq for seq, _ in read_records(recording.state_dir)]


def endings(recording: Recording) -> list[str]:
    return [one.path.name[len(one.stem) :] for one in recording.archives()]


def test_past_the_size_the_oldest_become_parquet_until_the_rest_fits(recording: Recording) -> None:
    sizes = [one.path.stat().st_size for one in recording.segments()]
    done = run(recording, parquet_past=sum(sizes[2:]))
    assert done["parquet"] == ["2026-11-01-000000000001", "2026-11-02-000000000011"]
    assert endings(recording) == [".parquet"] * 2
    assert len(recording.segments()) == 3
    assert seqs(recording) == list(range(1, 56))


def test_up_to_the_size_nothing_is_done(recording: Recording) -> None:
    total = sum(one.path.stat().st_size for one in recording.segments())
    assert run(recording, parquet_past=total)["parquet"] == []
    assert len(recording.segments()) == 5


def test_past_their_age_segments_are_compressed(recording: Recording) -> None:
    done = run(recording, compress_past=timedelta(days=28))
    assert done["compressed"] == ["2026-11-01-000000000001", "2026-11-02-000000000011"]
    assert endings(recording) == [".jsonl.zst"] * 2
    assert seqs(recording) == list(range(1, 56))


def test_the_live_log_is_left_alone(recording: Recording) -> None:
    before = recording.current.read_bytes()
    archive_all(recording.state_dir)
    assert recording.segments() == []
    assert recording.current.read_bytes() == before


def test_a_second_run_finds_nothing_to_do(recording: Recording) -> None:
    archive_all(recording.state_dir)
    before = {path: path.read_bytes() for path in recording.archive.iterdir()}
    done = archive_all(recording.state_dir)
    assert (done.parquet, done.finished, done.freed_bytes) == ([], [], 0)
    assert {path: path.read_bytes() for path in recording.archive.iterdir()} == before


@pytest.mark.parametrize("kind", ["parquet", "zst", "gz"])
def test_what_a_full_disk_left_behind_does_not_try_again(
    tmp_path: Path, kind: Format, capfd: pytest.CaptureFixture[str]
) -> None:
    recording = Recording(tmp_path)
    segment(recording, 1, [line(n, message(n, Message=os.urandom(9_000).hex())) for n in range(9)])
    recording.archive.mkdir()
    [found] = recording.segments()
    for at in (1, 2):
        fault = Fault(at, "write", error=errno.ENOSPC, persistent=True)
        with FaultyDisk(fault), pytest.raises(StorageFullError):
            archiver.pack(recording, found, kind)
        gc.collect()  # an error in Python's destructor fails the test
    assert capfd.readouterr().err == ""  # and Arrow's is printed
    assert list(recording.archive.iterdir()) == []


@pytest.mark.parametrize("kind", ["parquet", "zst", "gz"])
@pytest.mark.parametrize(
    "content",
    [
        b"".join(lines(1, 30)),
        b"",
        b"\n\n\n",
        b"garbage\n" + line(2) + b"\xff\x00\n\n{}\n" + line(3),
        line(1) + line(2)[:-1],
        line(1) + line(2)[:-30],
        b"".join(line(n, message(n, Message="x" * 3_000_000)) for n in (1, 2)),
        line(1).replace(b"\n", b"\r\n"),
    ],
    ids=["lines", "empty", "blank", "damaged", "no newline", "torn", "long", "crlf"],
)
def test_an_archive_gives_back_every_byte(tmp_path: Path, kind: Format, content: bytes) -> None:
    recording = Recording(tmp_path)
    path = segment(recording, 1, [content])
    expected = list(read_records(path))
    recording.archive.mkdir()
    [found] = recording.segments()
    entry = archiver.pack(recording, found, kind)
    archiver.check(recording, entry)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert entry.bytes == len(content)
    assert entry.messages == len(expected)
    [made] = recording.archives()
    assert archiver.describe(made) == entry
    assert list(read_records(made.path)) == expected


def test_the_index_says_what_each_archive_holds(recording: Recording) -> None:
    hours = (7, 2, 9)
    odd = [line(100 + n, message(hour)) for n, hour in enumerate(hours)]
    content = b"".join([*odd, b"garbage\n"])
    segment(recording, 100, [content], "2026-11-06")
    archive_all(recording.state_dir)
    stored = json.loads((recording.archive / "index.json").read_text())
    assert stored["_schema"] == "record_index/1"
    assert stored["last_seq"] == 102
    entry = stored["archives"][-1]
    assert entry | {"size": 0} == {
        "first_seq": 100,
        "last_seq": 102,
        "day": "2026-11-06",
        "format": "parquet",
        "lines": 4,
        "messages": 3,
        "first_timestamp": message(2)["Timestamp"],
        "last_timestamp": message(9)["Timestamp"],
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": 0,
    }
    assert entry["size"] == (recording.archive / "2026-11-06-000000000100.parquet").stat().st_size


def test_nothing_is_removed_unless_asked(recording: Recording) -> None:
    archive(
        recording.state_dir,
        RetentionPolicy(parquet_past=0),
        clock=FakeClock(NOW + timedelta(days=9999)),
    )
    assert seqs(recording) == list(range(1, 56))


def test_retention_by_age_removes_whole_archives_oldest_first(recording: Recording) -> None:
    archive_all(recording.state_dir)
    done = run(recording, keep_for=timedelta(days=28))
    assert done["removed"] == ["2026-11-01-000000000001", "2026-11-02-000000000011"]
    assert seqs(recording) == list(range(21, 56))
    index = read_index(recording.directory())
    assert (len(index.archives), index.removed, index.last_seq) == (3, 2, 50)
    assert verify_archives(recording.state_dir).ok


def test_retention_by_size_removes_until_the_rest_fits(recording: Recording) -> None:
    archive_all(recording.state_dir)
    sizes = [one.path.stat().st_size for one in recording.archives()]
    run(recording, keep_bytes=sum(sizes[3:]))
    assert seqs(recording) == list(range(31, 56))


def test_retention_never_takes_what_is_no_archive(recording: Recording) -> None:
    """What is that old is archived first, and then removed."""
    done = run(recording, keep_for=timedelta(days=27), keep_bytes=None)
    assert done["compressed"] == done["removed"]
    assert [one.day for one in recording.segments()] == ["2026-11-04", "2026-11-05"]
    run(recording, keep_bytes=0)
    assert len(recording.segments()) == 2
    assert seqs(recording) == list(range(31, 56))


def test_the_last_number_is_remembered_when_all_archives_are_gone(recording: Recording) -> None:
    archive_all(recording.state_dir)
    run(recording, keep_bytes=0)
    assert known_index(recording).last_seq == 50
    assert recording.archives() == []


@pytest.mark.parametrize("damage", [b"{", None])
def test_the_last_number_is_known_without_the_index(
    recording: Recording, damage: bytes | None
) -> None:
    archive_all(recording.state_dir)
    assert archiver.last_archived(recording) == 50
    path = recording.archive / "index.json"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    assert archiver.last_archived(recording) == 50


def test_a_dry_run_says_what_a_run_then_does(recording: Recording) -> None:
    before = sorted(recording.state_dir.rglob("*"))
    policy = RetentionPolicy(parquet_past=3000, compress_past=timedelta(days=26))
    clock = FakeClock(NOW)
    planned = archive(recording.state_dir, policy, dry_run=True, clock=clock)
    assert sorted(recording.state_dir.rglob("*")) == before
    done = archive(recording.state_dir, policy, clock=clock)
    assert planned.parquet
    assert (planned.parquet, planned.compressed) == (done.parquet, done.compressed)


def test_a_second_archiver_is_kept_out(recording: Recording) -> None:
    (recording.state_dir / ".locks").mkdir(exist_ok=True)
    with (
        locks.holding(str(recording.state_dir / LOCK), 1),
        pytest.raises(StateDirectoryInUseError, match="another archiver"),
    ):
        archive(recording.state_dir)


def test_without_a_recording_there_is_nothing_to_archive(tmp_path: Path) -> None:
    with pytest.raises(StateNotFoundError):
        archive(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "changed", "unknown"])
def test_verifying_names_what_is_wrong(recording: Recording, damage: str) -> None:
    archive_all(recording.state_dir)
    assert verify_archives(recording.state_dir).to_dict() == {
        "archives": 5,
        "messages": 50,
        "problems": (),
        "ok": True,
    }
    victim = recording.archives()[2].path
    if damage == "missing":
        victim.unlink()
    elif damage == "changed":
        victim.write_bytes(recording.archives()[1].path.read_bytes())
    else:
        (recording.archive / "index.json").unlink()
    found = verify_archives(recording.state_dir)
    assert not found.ok
    assert any(str(victim) in problem for problem in found.problems)


def test_a_lost_or_damaged_index_is_made_anew(recording: Recording) -> None:
    archive_all(recording.state_dir)
    before = read_index(recording.directory())
    path = recording.archive / "index.json"
    for damage in (b"{", None):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
            os.utime(path, (1, 1))
        assert seqs(recording) == list(range(1, 56))
        done = archive(recording.state_dir, clock=FakeClock(NOW))
        assert len(done.finished) == 5
        assert read_index(recording.directory()) == before
    assert list((recording.state_dir / ".quarantine").rglob("*index.json*"))


@pytest.mark.parametrize("kind", ["parquet", "zst"])
def test_an_archive_of_other_bytes_beside_its_segment_is_made_anew(
    recording: Recording, kind: Format
) -> None:
    """Whatever was left there: the segment is what counts."""
    first = recording.segments()[0]
    content = first.path.read_bytes()
    recording.archive.mkdir()
    first.path.write_bytes(content[: content.index(b"\n") + 1])
    archiver.pack(recording, first, kind)
    first.path.write_bytes(content)
    assert seqs(recording) == list(range(1, 56))
    archive_all(recording.state_dir, kind)
    assert seqs(recording) == list(range(1, 56))
    assert verify_archives(recording.state_dir).ok


def test_an_archive_that_does_not_verify_keeps_its_segment(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gives back other bytes than it was given."""
    real = formats.open_file

    def open_file(path: Path) -> object:
        if path.suffix == ".zst":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
        return real(path)

    monkeypatch.setattr("agent_state_integrations.recorder.formats.open_file", open_file)
    with pytest.raises(StateCorruptedError):
        run(recording, compress_past=timedelta(days=1))
    monkeypatch.undo()
    assert len(recording.segments()) == 5
    assert recording.archives() == []
    assert seqs(recording) == list(range(1, 56))


def test_raw_lines_are_the_same_before_and_after(recording: Recording) -> None:
    before = list(raw_lines(recording, 7, 53))
    archive_all(recording.state_dir)
    assert list(raw_lines(recording, 7, 53)) == before


@pytest.mark.parametrize(
    ("text", "size"), [("50MB", 50_000_000), ("1.5GiB", 1610612736), ("7", 7), ("2 kb", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


def test_ages() -> None:
    assert age_of("30d") == age_of("30") == timedelta(days=30)
    for wrong in ("", "a month", "-3d"):
        with pytest.raises(QueryError):
            age_of(wrong)
        with pytest.raises(QueryError):
            size_of(wrong)


def test_an_index_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write([{"content": "hello"}])
        writer.rotate()
        writer.write([{"content": "again"}])
    archive(tmp_path, RetentionPolicy(parquet_past=0))
    path = tmp_path / "record/archive/index.json"
    newer = path.read_bytes().replace(b"record_index/1", b"record_index/2")
    path.write_bytes(newer)
    with pytest.raises(SchemaTooNewError):
        archive(tmp_path, RetentionPolicy(parquet_past=0))
    with pytest.raises(SchemaTooNewError):
        list(read_records(tmp_path))
    assert path.read_bytes() == newer
