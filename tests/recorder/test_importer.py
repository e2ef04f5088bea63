"""Logs of other programs are imported whole, once, and with a report of what was left out."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from agent_state.errors import StateNotFoundError, StorageError
from agent_state.protocols import JsonObject
from agent_state.testing import FakeClock
from agent_state_integrations.recorder.importers import FileReport, ImportReport, import_logs
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.writer import (
    DeadLetter,
    RawMessage,
    RecordResult,
    RecordWriter,
)
from tests.unprivileged import as_nobody, reachable_folder

SAMPLES = Path(__file__).parents[2] / "examples" / "recordings"


def import_into(state: Path, *paths: Path, **more: object) -> ImportReport:
    with RecordWriter(state, clock=FakeClock()) as writer:
        return import_logs(paths, writer, **more)  # type: ignore[arg-type]


def records(state: Path) -> dict[str, JsonObject]:
    return {record["Id"]: record for _, record in read_records(state)}


def write(path: Path, *lines: JsonObject | bytes | str, end: bytes = b"\n") -> Path:
    data = [
        line
        if isinstance(line, bytes)
        else line.encode()
        if isinstance(line, str)
        else orjson.dumps(line)
        for line in lines
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(data) + end)
    return path


def only(report: ImportReport) -> FileReport:
    (file,) = report.files
    assert file.lines == file.recorded + file.duplicates + file.skipped
    return file


def test_all_samples_are_read_and_a_second_time_adds_nothing(tmp_path: Path) -> None:
    first = import_into(tmp_path, SAMPLES)
    assert first.ok
    assert (first.lines, first.recorded, first.duplicates, first.skipped) == (131, 96, 9, 26)
    assert {file.shape for file in first.files} == {"recorded", "claude-code", "codex", None}
    assert len(records(tmp_path)) == 96
    again = import_into(tmp_path, SAMPLES)
    assert (again.recorded, again.duplicates, again.skipped) == (0, 105, 26)
    assert len(records(tmp_path)) == 96


def test_no_secret_of_the_samples_is_written(tmp_path: Path) -> None:
    import_into(tmp_path, SAMPLES)
    log = (tmp_path / "record" / "current.jsonl").read_text()
    for secret in ("sk-" + "test-", "not-a-" + "password", "not-a-" + "real-key"):
        assert secret in (SAMPLES / "flat.jsonl").read_text()
        assert secret not in log
    assert log.count("[redacted:openai_key]") == 2


def test_the_flat_sample(tmp_path: Path) -> None:
    file = only(import_into(tmp_path, SAMPLES / "flat.jsonl"))
    assert (file.shape, file.recorded, file.skipped) == ("recorded", 16, 0)
    found = records(tmp_path)
    assert found["planner_000"]["SpeakerRole"] == "architect"
    assert found["camera-agent_001"]["Message"].startswith("I do.")
    assert found["quality-agent_004"]["Content"]["measured"] == {"scans": 3, "jpeg_quality": 90}
    assert found["quality-agent_007"]["Timestamp"] == "2026-03-02T09:11:05.000000Z"
    assert found["quality-agent_007"]["Metadata"]["receiver"] == "planner"


def test_the_wrapped_sample(tmp_path: Path) -> None:
    file = only(import_into(tmp_path, SAMPLES / "wrapped.jsonl"))
    assert (file.recorded, file.skipped) == (13, 1)
    assert file.examples == [(14, "no content: none of content, message or text is there")]
    assert "unknown" not in {record["SpeakerName"] for record in records(tmp_path).values()}


def test_the_older_sample_with_all_its_quirks(tmp_path: Path) -> None:
    report = import_into(tmp_path, SAMPLES / "older")
    live, checkpoint, recovery = report.files
    assert (live.lines, live.recorded, live.duplicates, live.skipped) == (36, 32, 1, 3)
    assert live.examples == [
        (34, "not JSON"),
        (35, "not a JSON object"),
        (36, "the last line is torn"),
    ]
    for copy in (checkpoint, recovery):
        assert (copy.lines, copy.left_out) == (0, "a copy of current_session.jsonl")
    found = records(tmp_path)
    texts = [record["Message"] for record in found.values()]
    assert "{}" not in texts
    assert texts.count("") == 6
    nested = found["camera-agent_0000000000001"]
    assert nested["Message"].startswith("I do.")
    assert nested["Metadata"]["chain_type"] == "photo_capture"
    top = found["planner_0000000000000"]
    assert top["Metadata"]["content_hash"] == "1".zfill(32)
    assert "chain_type" not in top
    assert found["unknown_speaker_1"]["SpeakerName"] == "vendor-bridge"
    assert found["clock_back_1"]["Timestamp"] == "2026-02-27T09:00:00.000000Z"
    assert found["no_time_1"]["Metadata"]["timestamp_given"] == "soon"
    assert found["planner_0000000000030"]["Content"]["cameras"] == ["c3", "c4"]
    assert found["planner_0000000000031"]["Message"] == '{"count":4,"topic":"cameras"}'
    # An id that is used twice for different words: both are kept.
    assert sum("Same id, other words." in text for text in texts) == 1


def test_a_checkpoint_alone_and_then_its_log(tmp_path: Path) -> None:
    checkpoint = SAMPLES / "older" / "checkpoints" / "20260303T090000_auto.json"
    assert only(import_into(tmp_path, checkpoint)).recorded == 12
    live = only(import_into(tmp_path, SAMPLES / "older" / "current_session.jsonl"))
    assert (live.recorded, live.duplicates) == (20, 13)


def test_copies_are_read_where_their_log_is_gone(tmp_path: Path) -> None:
    line = {"Id": "a", "Message": "hi"}
    write(tmp_path / "logs" / "recovery" / "crash_recovery.jsonl", line)
    path = tmp_path / "logs" / "checkpoints" / "one.json"
    write(path, orjson.dumps({"messages": [line, {"Id": "b", "Message": "ho"}]}))
    write(tmp_path / "logs" / "package.json", {"messages": "no log"})
    report = import_into(tmp_path / "state", tmp_path / "logs")
    assert [(file.recorded, file.duplicates) for file in report.files] == [(2, 0), (0, 1)]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = import_logs([SAMPLES], None)
    assert (report.dry_run, report.recorded, report.skipped) == (True, 104, 26)
    assert list(tmp_path.iterdir()) == []


def test_lines_without_an_id_come_once_however_often_they_are_imported(tmp_path: Path) -> None:
    said = {"from": "ada", "text": "ok", "timestamp": "2026-03-02T09:00:00Z"}
    timeless = {"from": "ada", "text": "ok"}
    path = write(tmp_path / "a.jsonl", said, timeless, timeless, said)
    copy = write(tmp_path / "b.jsonl", timeless, said)
    report = import_into(tmp_path / "state", path, copy)
    # Two without a time are two; the same words at the same time are one.
    assert [(file.recorded, file.duplicates) for file in report.files] == [(3, 1), (0, 2)]
    again = import_into(tmp_path / "state", path, copy)
    assert again.recorded == 0


def test_a_line_without_a_time_is_as_late_as_the_one_before(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"id": "1", "text": "x", "timestamp": "2026-03-02T09:00:00Z"},
        {"id": "2", "text": "y"},
    )
    import_into(tmp_path / "state", path)
    assert records(tmp_path / "state")["2"]["Timestamp"] == "2026-03-02T09:00:00.000000Z"


def test_bad_lines_stop_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + orjson.dumps({"id": "bom", "text": "x"}),
        b"",
        b"\xff\xfe garbage",
        b"null",
        {"id": [1], "text": "x"},
        {"id": "huge", "text": "long " * 2_000_000},
        {"id": "later", "text": "x", "timestamp": "2026-03-02T09:00:00Z"},
        {"id": "back", "text": "x", "timestamp": "2020-01-01"},
        {"id": "later", "text": "x", "timestamp": "2026-03-02T09:00:00Z"},
        b'{"deep":' * 400 + b"1" + b"}" * 400,
        '{"id":"torn","te',
        end=b"",
    )
    file = only(import_into(tmp_path / "state", path))
    assert (file.lines, file.recorded, file.duplicates, file.skipped) == (11, 4, 1, 6)
    assert [line for line, _ in file.examples] == [3, 4, 5, 10, 11]
    assert file.reasons["the last line is torn"] == 1
    assert set(records(tmp_path / "state")) == {"bom", "huge", "later", "back"}


def test_the_examples_are_few_and_the_counts_are_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x"}, *(["garbage"] * 500), {"text": "y"})
    file = only(import_into(tmp_path / "state", path))
    assert (len(file.examples), file.reasons["not JSON"]) == (20, 500)
    assert file.to_dict()["skipped"] == 500


def test_many_lines_in_batches(tmp_path: Path) -> None:
    lines = [{"id": str(number), "text": "x"} for number in range(2500)]
    path = write(tmp_path / "a.jsonl", *lines)
    sizes: list[int] = []

    class Counting:
        def __init__(self, writer: RecordWriter) -> None:
            self.writer = writer

        def write(
            self, messages: Sequence[RawMessage | DeadLetter], source: str = ""
        ) -> list[RecordResult]:
            sizes.append(len(messages))
            assert source == str(path)
            return self.writer.write(messages, source)

    done: list[tuple[int, int]] = []
    with RecordWriter(tmp_path / "state") as writer:
        report = import_logs([path], Counting(writer), advance=lambda at, of: done.append((at, of)))
    assert report.recorded == 2500
    assert sizes == [1000, 1000, 500]
    assert done == [(0, 1)]


def test_a_packed_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id":"1","text":"x"}\n'))
    assert only(import_into(tmp_path / "state", path)).recorded == 1


def test_a_damaged_file_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    bad = tmp_path / "logs" / "a.jsonl.gz"
    good = write(tmp_path / "logs" / "b.jsonl", {"id": "1", "text": "x"})
    bad.write_bytes(gzip.compress(b'{"id":"2","text":"x"}\n' * 1000)[:-20])
    report = import_into(tmp_path / "state", tmp_path / "logs")
    assert not report.ok
    assert [file.path for file in report.files] == [str(bad), str(good)]
    assert "damaged" in str(report.files[0].error)
    assert report.files[1].recorded == 1


def test_a_folder_that_is_closed_is_reported() -> None:
    with reachable_folder() as place, as_nobody(place):
        good = write(place / "logs" / "b.jsonl", {"id": "1", "text": "x"})
        closed = place / "logs" / "closed"
        closed.mkdir(mode=0)
        report = import_logs([good.parent], None)
    assert (report.ok, report.recorded) == (False, 1)
    assert "Permission denied" in str(report.files[1].error)


def test_what_is_no_log_is_left_out_of_a_folder_and_an_error_by_name(tmp_path: Path) -> None:
    numbers = write(tmp_path / "logs" / "numbers.jsonl", {"x": 1}, {"x": 2})
    write(tmp_path / "logs" / "empty.jsonl", end=b"")
    write(tmp_path / "logs" / "dead-letter.jsonl", {"raw": "x"})
    write(tmp_path / "logs" / "history.jsonl", {"session_id": "a", "ts": 1, "text": "x"})
    write(tmp_path / "logs" / "notes.txt", "nothing")
    report = import_into(tmp_path / "state", tmp_path / "logs")
    assert not report.ok
    assert [file.left_out for file in report.files] == [
        "it holds dead letters",
        "empty",
        "a list of prompts, which the sessions hold too",
        "no messages in it",
    ]
    assert only(import_into(tmp_path / "state", numbers)).error


def test_a_path_with_nothing_there_raises_before_anything_is_recorded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(StateNotFoundError):
        import_into(tmp_path / "state", path, tmp_path / "missing")
    assert not (tmp_path / "state" / "record" / "current.jsonl").exists()


def test_a_recording_of_ours_is_imported_with_its_segments(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "one") as writer:
        writer.write([{"id": "1", "from": "ada", "content": {"text": "x", "n": 1}}, b"garbage"])
        writer.rotate()
        writer.write([{"id": "2", "text": '{"a": 1}'}])
    report = import_into(tmp_path / "two", tmp_path / "one")
    assert (report.recorded, report.skipped) == (2, 0)
    assert records(tmp_path / "two") == records(tmp_path / "one")
    assert import_into(tmp_path / "two", tmp_path / "two").recorded == 0


def test_what_cannot_be_written_is_raised(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x"})

    class Full:
        def write(self, messages: Sequence[object], source: str = "") -> list[RecordResult]:
            raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        import_logs([path], Full())


def test_the_kind_may_be_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"type": "user", "uuid": "1", "text": "hi"})
    assert only(import_into(tmp_path / "state", path, shape="recorded")).recorded == 1
    assert not import_into(tmp_path / "state", path).ok
