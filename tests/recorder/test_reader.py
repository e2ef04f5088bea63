from __future__ import annotations

import json
import os
from pathlib import Path

import orjson
import pytest

from agent_state.errors import StateCorruptedError, StateNotFoundError
from agent_state.storage.logs import MAX_LINE
from agent_state_integrations.recorder.files import Format, Recording
from agent_state_integrations.recorder.lazy_imports import arrow, arrow_parquet
from agent_state_integrations.recorder.lines import SkippedLines
from agent_state_integrations.recorder.message import RecordedMessage
from agent_state_integrations.recorder.query import Query
from agent_state_integrations.recorder.reader import count, raw_lines, read, read_records
from agent_state_integrations.recorder.rules import Rules
from tests.recorder.segments import (
    FORMATS,
    archive_all,
    line,
    lines,
    live,
    message,
    mixed,
    pack,
    segment,
)

# Some test leaves an open file to the garbage collector; which one is not found yet (LOGBOOK.md).


def test_live_log_segments_and_archives_are_read_as_one_in_order(tmp_path: Path) -> None:
    mixed(tmp_path)
    found = list(read_records(tmp_path))
    assert found == [(seq, message(seq)) for seq in range(1, 51)]


def test_messages_are_the_records_with_their_numbers(tmp_path: Path) -> None:
    mixed(tmp_path)
    assert list(read(tmp_path)) == [
        RecordedMessage.from_record(message(n), n) for n in range(1, 51)
    ]


@pytest.mark.parametrize("place", [".", "record", "record/current.jsonl"])
def test_a_recording_its_folder_or_one_file_of_it_is_read(tmp_path: Path, place: str) -> None:
    mixed(tmp_path)
    numbers = [seq for seq, _ in read_records(tmp_path / place)]
    assert numbers == list(range(41 if "." in place[1:] else 1, 51))


@pytest.mark.parametrize("kind", FORMATS)
def test_one_segment_or_archive_is_read_by_itself(tmp_path: Path, kind: Format) -> None:
    recording = Recording(tmp_path)
    path = pack(recording, segment(recording, 1, lines(1, 7)), kind)
    assert [seq for seq, _ in read_records(path)] == list(range(1, 8))


def test_a_copy_of_the_folder_under_another_name_is_a_recording_too(tmp_path: Path) -> None:
    mixed(tmp_path / "state")
    (tmp_path / "state" / "record").rename(tmp_path / "copy")
    assert len(list(read_records(tmp_path / "copy"))) == 50


@pytest.mark.parametrize("kind", FORMATS)
def test_what_holds_no_message_is_left_out_and_counted(tmp_path: Path, kind: Format) -> None:
    recording = Recording(tmp_path)
    bad = [
        b"garbage\n",
        b"\xff\xfe\x00\n",
        b"\n",
        b"[1, 2]\n",
        b'{"Id": 5, "Message": {"a": [}\n',
        line(3)[:40] + b"\n",
        orjson.dumps({"SpeakerName": "no content"}) + b"\n",
    ]
    content = [line(1), *bad, line(2), line(9)]
    path = segment(recording, 1, content)
    pack(recording, path, kind)
    skipped = SkippedLines()
    assert [seq for seq, _ in read_records(tmp_path, skipped=skipped)] == [1, 2, 9]
    assert skipped.lines == len(bad)
    assert sum(skipped.reasons.values()) == len(bad)
    assert "7 lines were left out" in str(skipped)
    assert count(tmp_path) == 3
    assert b"".join(line + b"\n" for line in raw_lines(tmp_path, 1, 2)) == line(1) + line(2)


def test_a_torn_tail_is_left_out_and_a_missing_newline_is_not(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    live(recording, [line(1), line(2)[:-20]])
    skipped = SkippedLines()
    assert [seq for seq, _ in read_records(tmp_path, skipped=skipped)] == [1]
    assert skipped.lines == 1
    live(recording, [line(1), line(2)[:-1]])
    assert [seq for seq, _ in read_records(tmp_path)] == [1, 2]
    assert [seq for seq, _ in read_records(tmp_path, Query(newest_first=True))] == [2, 1]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_line_of_ten_megabytes_is_a_message_like_any_other(tmp_path: Path, kind: Format) -> None:
    recording = Recording(tmp_path)
    long = message(2, RecordedMessage="long " * 2_000_000)
    path = segment(recording, 1, [line(1), line(2, long), line(3)])
    pack(recording, path, kind)
    assert list(read_records(tmp_path)) == [(1, message(1)), (2, long), (3, message(3))]


def test_a_line_over_the_limit_is_counted_and_takes_no_memory(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    path = live(recording, [line(1)])
    with path.open("ab") as file:
        file.truncate(file.tell() + MAX_LINE + 10)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + line(2))
    skipped = SkippedLines()
    assert [seq for seq, _ in read_records(tmp_path, skipped=skipped)] == [1, 2]
    assert skipped.reasons == {"empty, or too long": 1}


def test_lines_that_a_person_wrote_count_on(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    own = {"speaker": "ann", "timestamp": "2026-11-01T10:00:00", "message": "by hand"}
    live(recording, [line(4), orjson.dumps(own) + b"\n", line(6)])
    found = list(read_records(tmp_path))
    assert [seq for seq, _ in found] == [4, 5, 6]
    assert found[1][1]["SpeakerName"] == "ann"
    assert found[1][1]["Timestamp"] == "2026-11-01T10:00:00.000000Z"


def test_an_edited_line_counts_as_it_is(tmp_path: Path) -> None:
    live(Recording(tmp_path), [line(1).replace(b"caf", b"tea")])
    [(_, record)] = read_records(tmp_path)
    assert "teaé" in record["Message"]


def test_repeated_ids_and_times_that_go_back_stay_as_they_stand(tmp_path: Path) -> None:
    records = [message(5, Id="same"), message(3, Id="same"), message(4)]
    live(Recording(tmp_path), [line(n, record) for n, record in enumerate(records, 1)])
    assert [record for _, record in read_records(tmp_path)] == records


def test_a_segment_beside_its_archive_is_read_once(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    path = segment(recording, 1, lines(1, 5))
    content = path.read_bytes()
    archive_all(tmp_path)
    path.write_bytes(content)
    assert [seq for seq, _ in read_records(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_folder_is_not_searched(tmp_path: Path) -> None:
    """Below it are copies of the same: checkpoints, recovery, reports."""
    for place in ("current_session.jsonl", "checkpoints/a.jsonl", "recovery/b.jsonl"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(line(1))
    assert len(list(read_records(tmp_path))) == 1


def test_foreign_parquet_files_in_a_folder_are_left_alone(tmp_path: Path) -> None:
    table = arrow().table({"thread_id": ["a", "b"]})
    (tmp_path / "log.jsonl").write_bytes(line(1))
    arrow_parquet().write_table(table, tmp_path / "threads.parquet")
    assert len(list(read_records(tmp_path))) == 1
    with pytest.raises(StateCorruptedError, match="holds no recording"):
        list(read_records(tmp_path / "threads.parquet"))


OLD = [
    {
        "Id": "a_1",
        "Timestamp": "2026-02-01T10:00:00.1234567Z",
        "SpeakerName": "unity",
        "SpeakerRole": "Agent",
        "Message": '{"message": "the mesh is complete"}',
        "ConversationType": 0,
        "ContextId": "unknown",
        "Metadata": {"chain_type": "reconstruction", "ace_tier": "E"},
    },
    {
        "Id": "a_2",
        "Timestamp": "2026-02-01T09:00:00",
        "SpeakerName": "web",
        "Message": "export finished",
        "ConversationType": 0,
        "ContextId": "c1",
        "chain_type": "unity_integration",
        "ace_tier": "C",
        "shl_tags": ["@Status-Ready"],
        "Metadata": {},
    },
    {"Id": "a_3", "Timestamp": "2026-02-01T11:00:00Z", "Message": "{}", "Metadata": {}},
]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "conversation_logs"
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in OLD)
    (folder / "current_session.jsonl").write_text(text)
    return folder


def test_logs_in_older_forms_are_read_as_records(old: Path) -> None:
    found = list(read(old))
    assert [one.id for one in found] == ["a_1", "a_2", "a_3"]
    assert [one.timestamp for one in found] == [
        "2026-02-01T10:00:00.123456Z",
        "2026-02-01T09:00:00.000000Z",
        "2026-02-01T11:00:00.000000Z",
    ]
    assert found[0].text == "the mesh is complete"
    assert [one.chain_type for one in found] == ["reconstruction", "unity_integration", None]
    assert [one.seq for one in found] == [0, 0, 0]


def test_enrichment_at_the_top_level_is_found_by_domain_tier_and_tag(old: Path) -> None:
    for query in (
        Query(chain_type="unity_integration"),
        Query(ace_tier="C"),
        Query(tag="Status-Ready"),
    ):
        assert [one.id for one in read(old, query)] == ["a_2"]
        assert count(old, query) == 1


def test_rules_enrich_what_lacks_it_and_leave_the_rest(old: Path) -> None:
    rules = Rules.load("standard")
    found = {one.id: one for one in read(old, rules=rules)}
    assert found["a_2"].chain_type == "unity_integration"
    assert found["a_3"].chain_type is not None
    assert found["a_2"].metadata["word_count"] == 2
    asked = Query(chain_type=found["a_3"].chain_type)
    assert "a_3" in [one.id for one in read(old, asked, rules=rules)]


def test_reading_a_file_twice_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"message": "no id, no time"}\n{"message": "nor here"}\n')
    first = list(read_records(path))
    assert first == list(read_records(path))
    assert len({record["Id"] for _, record in first}) == 2


def test_where_there_is_nothing_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(StateNotFoundError):
        list(read_records(tmp_path / "nowhere"))
    with pytest.raises(StateNotFoundError):
        list(read_records(tmp_path))
    (tmp_path / "record").mkdir()
    assert list(read_records(tmp_path)) == []


@pytest.mark.parametrize("limit", [0, 1, 7, 25, 60, None])
def test_the_newest_first_are_the_others_turned_round(tmp_path: Path, limit: int | None) -> None:
    mixed(tmp_path)
    found = read_records(tmp_path, Query(newest_first=True, limit=limit))
    assert [seq for seq, _ in found] == list(range(50, 0, -1))[:limit]
