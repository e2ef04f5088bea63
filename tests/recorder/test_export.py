from __future__ import annotations

import csv
import errno
import gc
import gzip
import io
import json
from pathlib import Path

import pytest

from agent_state.errors import QueryError, StateCorruptedError, StorageError, StorageFullError
from agent_state.testing import Fault, FaultyDisk
from agent_state.testing.faults import CHANGING
from agent_state_integrations.recorder.export import ExportReport, export
from agent_state_integrations.recorder.lazy_imports import arrow, arrow_parquet
from agent_state_integrations.recorder.query import Query
from agent_state_integrations.recorder.reader import count, read_records
from tests.recorder.segments import message, mixed

AT = "2026-11-21T12:00:00.000000Z"


def exported(state: Path, target: Path, query: Query | None = None) -> ExportReport:
    found = read_records(state, query)
    return export(found, target, export_id="20261121_noon", label="noon", timestamp=AT)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    mixed(tmp_path / "state")
    return tmp_path / "state"


def test_json_has_the_shape_of_a_checkpoint(state: Path, tmp_path: Path) -> None:
    done = exported(state, tmp_path / "out.json", Query(speaker="agent1"))
    document = json.loads((tmp_path / "out.json").read_text())
    messages = document.pop("messages")
    assert document == {
        "checkpoint_id": "20261121_noon",
        "label": "noon",
        "timestamp": AT,
        "message_count": done.message_count,
        "size_bytes": done.size_bytes,
    }
    assert messages == [{**message(n), "_seq": n} for n in range(1, 51, 4)]
    assert done.message_count == len(messages)


def test_parquet_has_the_columns(state: Path, tmp_path: Path) -> None:
    exported(state, tmp_path / "out.parquet")
    table = arrow_parquet().read_table(tmp_path / "out.parquet")
    assert table["text"].to_pylist() == [message(n)["Message"] for n in range(1, 51)]


@pytest.mark.parametrize("ending", ["json", "parquet"])
@pytest.mark.parametrize("limit", [0, 1, 50])
def test_an_export_is_read_back_as_it_was(
    state: Path, tmp_path: Path, ending: str, limit: int
) -> None:
    path = tmp_path / f"out.{ending}"
    exported(state, path, Query(limit=limit))
    assert list(read_records(path)) == [(n, message(n)) for n in range(1, limit + 1)]
    found = read_records(path, Query(newest_first=True))
    assert [seq for seq, _ in found] == list(range(limit, 0, -1))
    assert count(path, Query(speaker="agent1")) == len(range(1, limit + 1, 4))


def test_an_export_made_by_others_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "full.json"
    path.write_text(json.dumps({"label": "x", "messages": [message(1), message(2)]}, indent=2))
    assert [record["Id"] for _, record in read_records(path)] == ["m1", "m2"]
    path.write_text(json.dumps([message(3)]))
    assert [record["Id"] for _, record in read_records(path)] == ["m3"]
    for wrong in ("{", "{}", '"text"'):
        path.write_text(wrong)
        with pytest.raises(StateCorruptedError, match=path.name):
            list(read_records(path))


@pytest.mark.parametrize("ending", ["json", "parquet", "csv", "csv.gz", "jsonl.gz", "feather"])
def test_nothing_is_overwritten(state: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out.{ending}"
    path.write_text("mine")
    with pytest.raises(StorageError, match="exists") as raised:
        exported(state, path)
    assert raised.value.errno == errno.EEXIST
    assert path.read_text() == "mine"


def test_what_comes_into_being_meanwhile_is_not_overwritten(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    def slowly() -> object:
        for numbered in read_records(state):
            path.write_text("another's")
            yield numbered

    with pytest.raises(StorageError):
        export(slowly(), path, export_id="a", label="b", timestamp=AT)  # type: ignore[arg-type]
    assert path.read_text() == "another's"
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["out.json"]


def test_another_ending_is_refused(state: Path, tmp_path: Path) -> None:
    for name in ("out.txt", "out.parquet.gz", "out.gz"):
        with pytest.raises(QueryError, match=r"\.json or \.parquet"):
            exported(state, tmp_path / name)


@pytest.mark.parametrize("ending", ["json", "parquet", "csv", "csv.gz", "jsonl.gz", "feather"])
def test_on_a_full_disk_there_is_no_file(state: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out.{ending}"
    with FaultyDisk(Fault(2, "write", error=errno.ENOSPC)), pytest.raises(StorageFullError):
        exported(state, path)
    assert [one for one in tmp_path.iterdir() if one.is_file()] == []
    gc.collect()  # what was left behind does not try again, and prints no error


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_file_is_there_whole_or_not_at_all(state: Path, tmp_path: Path, ending: str) -> None:
    whole = tmp_path / f"whole.{ending}"
    with FaultyDisk(Fault(10**9)) as disk:
        exported(state, whole)
    changing = sum(1 for name, _ in disk.calls if name in CHANGING)
    told = list[StorageError]()
    for at in range(1, changing + 1):
        path = tmp_path / f"{at}.{ending}"
        with FaultyDisk(Fault(at, CHANGING, error=errno.EIO)):
            try:
                exported(state, path)
            except StorageError as error:
                told.append(error)
            else:
                assert path.exists(), "without links it is renamed"
        assert not path.exists() or len(list(read_records(path))) == 50
        assert not list(tmp_path.glob(".tmp-*"))
    assert len(told) >= changing - 1
    assert {error.errno for error in told} == {errno.EIO}


def opened(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_json_lines_answer_the_one_liners_of_other_recorders(
    state: Path, tmp_path: Path, packed: str
) -> None:
    path = tmp_path / f"out.jsonl{packed}"
    exported(state, path)
    rows = [json.loads(line) for line in opened(path).splitlines()]
    assert [row["text"] for row in rows] == [message(n)["Message"] for n in range(1, 51)]
    wanted = message(1)["Metadata"]["chain_type"]
    assert [row for row in rows if row.get("chain_type") == wanted]
    table = arrow().Table.from_pylist(rows)
    arrow_parquet().write_table(table, tmp_path / "theirs.parquet")
    assert arrow_parquet().read_table(tmp_path / "theirs.parquet")["id"].to_pylist()[0] == "m1"


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_csv_has_a_row_for_each_message(state: Path, tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"out.csv{packed}"
    assert exported(state, path).message_count == 50
    rows = list(csv.DictReader(io.StringIO(opened(path), newline="")))
    assert [row["text"] for row in rows] == [message(n)["Message"] for n in range(1, 51)]
    assert json.loads(rows[0]["metadata"]) == message(1)["Metadata"]
    assert isinstance(json.loads(rows[0]["shl_tags"]), list)


def test_an_empty_export_has_its_heads(state: Path, tmp_path: Path) -> None:
    exported(state, tmp_path / "out.csv", Query(limit=0))
    assert opened(tmp_path / "out.csv").startswith("seq,id,timestamp,speaker")
    exported(state, tmp_path / "out.feather", Query(limit=0))


@pytest.mark.parametrize("ending", ["feather", "arrow"])
def test_feather_has_the_typed_columns(state: Path, tmp_path: Path, ending: str) -> None:
    exported(state, tmp_path / f"out.{ending}")
    with arrow().ipc.open_file(tmp_path / f"out.{ending}") as file:
        table = file.read_all()
    assert table["text"].to_pylist() == [message(n)["Message"] for n in range(1, 51)]
    assert str(table.schema.field("timestamp").type) == "timestamp[us, tz=UTC]"
