"""Recordings as other programs leave them: bytes around messages, halves of pairs, merged logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from agent_state_integrations.recorder import reader
from agent_state_integrations.recorder.analytics.analysis import analyse
from agent_state_integrations.recorder.importers import import_logs
from agent_state_integrations.recorder.writer import RecordWriter

HALVES: list[Any] = [
    '{"text":"half \\ud83d","sender":"alice"}',
    b'{"text":"half \\uDE00","sender":"alice"}',
    b'{"text":"half \xed\xa0\xbd","sender":"alice"}',
    {"text": "half \ud83d", "sender": "alice"},
    '{"text":"half \ud83d","sender":"alice"}',
]


def current(state: Path) -> Path:
    return state / "record/current.jsonl"


def write(state: Path, *texts: Any) -> list[int]:
    with RecordWriter(state) as writer:
        messages = [each if isinstance(each, bytes) else {"text": each} for each in texts]
        return [result.seq for result in writer.write(messages)]


def texts(state: Path) -> list[tuple[int, str]]:
    return [(seq, record["Message"]) for seq, record in reader.read_records(state / "record")]


@pytest.mark.parametrize("message", HALVES)
def test_a_message_with_half_a_surrogate_pair_is_recorded_and_says_so(
    tmp_path: Path, message: Any
) -> None:
    with RecordWriter(tmp_path) as writer:
        [result] = writer.write([message])
    assert result.outcome == "recorded"
    record = orjson.loads(current(tmp_path).read_bytes())
    assert set(record["Message"].removeprefix("half ")) == {"�"}
    assert "U+FFFD" in record["Metadata"]["replaced"]


def test_a_half_anywhere_in_a_message_is_replaced_and_a_whole_pair_stays(tmp_path: Path) -> None:
    message = {
        "text": "whole \ud83d\ude00 and \U0001f600",
        "sender": "z\udc00",
        "metadata": {"k\ud800": ["\ud83d\ude00", {"deep": "\ud83d"}]},
    }
    with RecordWriter(tmp_path) as writer:
        assert writer.write([message])[0].outcome == "recorded"
    record = orjson.loads(current(tmp_path).read_bytes())
    assert record["Message"] == "whole \U0001f600 and \U0001f600"
    assert record["SpeakerName"] == "z�"
    assert record["Metadata"]["k�"] == ["\U0001f600", {"deep": "�"}]


@pytest.mark.parametrize("around", [b"\xef\xbb\xbf%b", b"\0\0%b", b"%b\0\0", b"\xef\xbb\xbf%b\r"])
def test_bytes_around_a_message_cost_nothing(tmp_path: Path, around: bytes) -> None:
    """Neither where it is sent, nor at the beginning of a log."""
    assert write(tmp_path, around % b'{"text":"one"}', "two") == [1, 2]
    first, second = current(tmp_path).read_bytes().splitlines()
    current(tmp_path).write_bytes(around % first + b"\n" + second + b"\n")

    assert texts(tmp_path) == [(1, "one"), (2, "two")]
    assert analyse(tmp_path / "record").summary.messages == 2
    assert write(tmp_path, "three") == [3]
    assert [text for _, text in texts(tmp_path)] == ["one", "two", "three"]


def test_a_last_message_without_its_newline_is_read_and_the_next_one_follows(
    tmp_path: Path,
) -> None:
    write(tmp_path, "one", "two")
    current(tmp_path).write_bytes(current(tmp_path).read_bytes()[:-1])

    assert texts(tmp_path) == [(1, "one"), (2, "two")]
    [(_, last)] = reader.records_between(tmp_path / "record", 2, 2)
    assert last["Message"] == "two"
    assert write(tmp_path, "three") == [3]
    assert texts(tmp_path) == [(1, "one"), (2, "two"), (3, "three")]


def test_messages_after_a_merge_of_two_recordings_have_numbers_of_their_own(
    tmp_path: Path,
) -> None:
    for side in ("left", "right"):
        write(tmp_path / side, "base", *(f"{side} {number}" for number in range(3)))
    lines = [current(tmp_path / side).read_bytes().splitlines() for side in ("left", "right")]
    merged = tmp_path / "left"
    current(merged).write_bytes(b"\n".join([*lines[0], *lines[1][1:3]]) + b"\n")

    expected = ["base", "left 0", "left 1", "left 2", "right 0", "right 1"]
    assert texts(merged) == [*enumerate(expected, 1)]
    assert write(merged, "next") == [7]
    assert texts(merged) == [*enumerate([*expected, "next"], 1)]
    stated = [orjson.loads(line)["_seq"] for line in current(merged).read_bytes().splitlines()]
    assert stated == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("half", [b"\\ud83d", b"\xed\xa0\xbd"])
def test_an_imported_message_with_half_a_pair_is_kept_and_counted(
    tmp_path: Path, half: bytes
) -> None:
    log = tmp_path / "log.jsonl"
    line = {"timestamp": "2026-01-01T00:00:00Z", "sender": "alice", "text": "half @"}
    log.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps(line).encode().replace(b"@", half)
        + b'\n\0{"text":"other","sender":"bob"}\0\n'
    )
    with RecordWriter(tmp_path / "state") as writer:
        report = import_logs([log], writer)

    assert report.recorded == 2
    assert report.files[0].replaced == 1
    found = [text for _, text in texts(tmp_path / "state")]
    assert sorted(found)[1] == "other"
    assert set(min(found).removeprefix("half ")) == {"�"}
