from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent_state.errors import QueryError, StateCorruptedError
from agent_state_integrations.recorder import parquet as columns
from agent_state_integrations.recorder import sql
from agent_state_integrations.recorder.files import Recording
from agent_state_integrations.recorder.lines import SkippedLines
from agent_state_integrations.recorder.reader import read_records
from tests.recorder.segments import BEGAN, line, lines, live, message, mixed, pack, segment


def rows(path: Path, statement: str, *parameters: object) -> list[tuple[object, ...]]:
    with sql.connect(path) as tables:
        return list(tables.select(statement, parameters).rows)


def test_one_view_has_archives_segments_and_the_live_log(tmp_path: Path) -> None:
    mixed(tmp_path)
    assert rows(tmp_path, "SELECT seq FROM messages ORDER BY seq") == [(n,) for n in range(1, 51)]


def test_the_columns_have_types(tmp_path: Path) -> None:
    mixed(tmp_path)
    described = {row[0]: row[1] for row in rows(tmp_path, "DESCRIBE messages")}
    assert tuple(described) == columns.SHOWN
    assert described["timestamp"] == "TIMESTAMP WITH TIME ZONE"
    assert described["shl_tags"] == described["keywords"] == "VARCHAR[]"
    assert described["seq"] == described["word_count"] == "BIGINT"
    assert described["metadata"] == "JSON"


@pytest.mark.parametrize(
    "number", [1, 15, 25, 35, 45], ids=["parquet", "zst", "gz", "plain", "live"]
)
def test_each_format_gives_the_same_columns(tmp_path: Path, number: int) -> None:
    mixed(tmp_path)
    record = message(number)
    meta = record["Metadata"]
    [found] = rows(
        tmp_path,
        "SELECT id, timestamp, speaker, role, type, context, text, chain_type, ace_tier, "
        "shl_tags, keywords, word_count, char_count, content_hash, metadata->>'ace_tier', content "
        "FROM messages WHERE seq = ?",
        number,
    )
    assert found == (
        record["Id"],
        datetime.fromisoformat(record["Timestamp"]),
        record["SpeakerName"],
        record["SpeakerRole"],
        str(record["ConversationType"]),
        record["ContextId"],
        record["Message"],
        meta["chain_type"],
        meta["ace_tier"],
        meta["shl_tags"],
        meta["keywords"],
        meta["word_count"],
        meta["char_count"],
        meta["content_hash"],
        meta["ace_tier"],
        None,
    )


def test_times_are_aware_and_days_are_of_utc(tmp_path: Path) -> None:
    mixed(tmp_path)
    [(day, number), *_] = rows(
        tmp_path,
        "SELECT date_trunc('day', timestamp), count(*) FROM messages GROUP BY 1 ORDER BY 1",
    )
    assert day == datetime(2026, 11, 1, tzinfo=UTC)
    assert number == 15  # from nine in the morning


def test_damaged_lines_break_nothing_and_are_counted(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    pack(recording, segment(recording, 1, [line(1), b"garbage\n", line(2)]), "parquet")
    live(recording, [line(3), b"\x00\x00\n", line(4), line(5)[:-30]])
    skipped = SkippedLines()
    with sql.connect(tmp_path, skipped=skipped) as tables:
        [(number,)] = tables.select("SELECT count(*) FROM messages").rows
    assert number == 4
    assert skipped.lines == 2  # of the live log: what is in an archive is known already


def test_older_forms_are_in_the_same_columns(tmp_path: Path) -> None:
    text = '{"Id":"a","Timestamp":"2026-02-01T09:00:00","Message":"x","chain_type":"ui_ux"}\n'
    path = tmp_path / "current_session.jsonl"
    path.write_text(text)
    found = rows(path, "SELECT id, timestamp FROM messages WHERE chain_type = 'ui_ux'")
    assert found == [("a", datetime(2026, 2, 1, 9, tzinfo=UTC))]


def test_the_view_says_what_reading_says(tmp_path: Path) -> None:
    mixed(tmp_path)
    expected = [(seq, one["Id"], one["Message"]) for seq, one in read_records(tmp_path)]
    assert rows(tmp_path, "SELECT seq, id, text FROM messages ORDER BY seq") == expected


@pytest.mark.parametrize(
    "statement",
    [
        "COPY (SELECT 1) TO 'out.csv'",
        "CREATE TABLE t AS SELECT 1",
        "ATTACH 'other.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "PRAGMA enable_profiling",
        "DROP VIEW messages",
        "SELECT 1; SELECT 2",
        "EXPORT DATABASE 'x'",
        "",
    ],
)
def test_anything_but_one_select_is_refused(tmp_path: Path, statement: str) -> None:
    mixed(tmp_path)
    with pytest.raises(QueryError):
        rows(tmp_path, statement)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM query('COPY (SELECT 1) TO ''{folder}/out.csv''')",
        "SELECT * FROM read_parquet('https://example.com/a.parquet')",
    ],
)
def test_no_other_file_is_reached(tmp_path: Path, statement: str) -> None:
    mixed(tmp_path / "state")
    secret = tmp_path / "secret.csv"
    secret.write_text("secret\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((QueryError, StateCorruptedError)) as raised:
        rows(tmp_path / "state", statement.format(secret=secret, folder=tmp_path))
    assert type(raised.value) is QueryError
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "statement", ["SELEC 1", "SELECT nope FROM messages", "SELECT ?", "SELECT '\udcff'"]
)
def test_a_mistake_is_told(tmp_path: Path, statement: str) -> None:
    mixed(tmp_path)
    with pytest.raises(QueryError, match=r"\w"):
        rows(tmp_path, statement)


def test_a_damaged_or_missing_archive_is_named(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    path = pack(recording, segment(recording, 1, lines(1, 9)), "parquet")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StateCorruptedError, match=path.name):
        rows(tmp_path, "SELECT count(*) FROM messages")
    path.unlink()
    with pytest.raises(StateCorruptedError, match=path.name):
        rows(tmp_path, "SELECT count(*) FROM messages")


def test_an_archive_damaged_inside_is_named(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    path = pack(recording, segment(recording, 1, lines(1, 500)), "parquet")
    data = path.read_bytes()
    middle = len(data) // 4
    path.write_bytes(data[:middle] + b"\xff" * 200 + data[middle + 200 :])
    with pytest.raises(StateCorruptedError, match=path.name):
        rows(tmp_path, "SELECT * FROM messages")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed(tmp_path / "state")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    before = sorted((tmp_path / "state").rglob("*"))
    rows(tmp_path / "state", "SELECT count(*) FROM messages")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert sorted((tmp_path / "state").rglob("*")) == before


def test_values_that_json_lacks_are_text(tmp_path: Path) -> None:
    mixed(tmp_path)
    [found] = rows(
        tmp_path,
        "SELECT min(timestamp), 1.5::DECIMAL(4, 2), 'NaN'::DOUBLE, [1, 2], "
        "{'a': timestamp '2026-01-01'}, NULL FROM messages",
    )
    assert [sql.plain(value) for value in found] == [
        message(1)["Timestamp"],
        "1.50",
        "nan",
        [1, 2],
        {"a": "2026-01-01T00:00:00"},
        None,
    ]
    assert BEGAN.tzinfo is UTC
