"""Files that have not changed since they were imported are not read again."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from agent_state_integrations.recorder.importers import ImportLedger, ImportReport, import_logs
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.writer import RecordWriter
from tests.recorder import transcripts as made


def imported(state: Path, *paths: Path) -> ImportReport:
    with RecordWriter(state) as writer:
        return import_logs(paths, writer, ledger=ImportLedger(state))


@pytest.fixture
def session(tmp_path: Path) -> Path:
    return made.write(tmp_path / "log" / "a.jsonl", made.claude_session())


def test_a_file_that_did_not_change_is_not_read_and_reported_as_before(
    tmp_path: Path, session: Path
) -> None:
    first = imported(tmp_path / "state", session)
    (tmp_path / "state" / "record" / "current.jsonl").write_bytes(b"")  # nothing would be known
    again = imported(tmp_path / "state", session)
    (file,) = again.files
    assert file.unchanged
    assert (again.recorded, again.duplicates, again.lines) == (0, first.recorded, first.lines)
    assert again.reasons == first.reasons
    assert again.ok


def test_a_session_that_went_on_is_read_again(tmp_path: Path, session: Path) -> None:
    imported(tmp_path / "state", session)
    more = made.claude(30, "user", made.person("And later?"))
    made.write(session, [*made.claude_session(), more])
    again = imported(tmp_path / "state", session)
    assert (again.recorded, again.files[0].unchanged) == (1, False)


def test_a_fork_of_an_unchanged_session_still_names_it(tmp_path: Path, session: Path) -> None:
    imported(tmp_path / "state", session.parent)
    made.write(session.with_name("b.jsonl"), made.claude_fork(made.claude_session()))
    imported(tmp_path / "state", session.parent)
    (door,) = (
        record
        for _, record in read_records(tmp_path / "state")
        if record["Message"] == "And the door?"
    )
    assert door["Metadata"]["forked_from"] == "a"


def test_a_database_changes_when_its_write_ahead_log_does(tmp_path: Path) -> None:
    path = made.opencode_base(tmp_path / "log" / "opencode.db")
    imported(tmp_path / "state", path)
    assert imported(tmp_path / "state", path).files[0].unchanged
    with closing(sqlite3.connect(path)) as base:
        base.execute("pragma wal_autocheckpoint = 0")
        base.execute("update part set data = json_set(data, '$.text', 'Off?') where id = 'p_own'")
        base.commit()
        assert not imported(tmp_path / "state", path).files[0].unchanged


def test_a_dry_run_notes_nothing(tmp_path: Path, session: Path) -> None:
    import_logs([session], None, ledger=ImportLedger(tmp_path / "state"))
    assert not (tmp_path / "state").exists()


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl", [{"role": "user", "content": "hello"}])
    for _ in range(2):
        assert not imported(tmp_path / "state", path).ok


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version":1,"files":7}'])
def test_a_damaged_ledger_costs_reading_and_nothing_else(
    tmp_path: Path, session: Path, damage: bytes
) -> None:
    first = imported(tmp_path / "state", session)
    (tmp_path / "state" / "record" / "imports.json").write_bytes(damage)
    again = imported(tmp_path / "state", session)
    assert (again.recorded, again.duplicates) == (0, first.recorded)
    assert not again.files[0].unchanged
