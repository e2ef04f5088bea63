"""``agent-state record`` as a person types it: where it looks, and what fits into a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state.cli.app import run
from tests.recorder.segments import message, mixed


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("AGENT_STATE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    mixed(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("command", ["query", "conversations"])
def test_a_state_directory_is_named_in_three_ways(
    command: str, state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["record", command, str(state)]) == 0
    expected = capsys.readouterr().out
    assert "agent1" in expected
    assert run(["record", command, "--state", str(state)]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setenv("AGENT_STATE_DIR", str(state))
    assert run(["record", command]) == 0
    assert capsys.readouterr().out == expected
    assert run(["record", command, "--state", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["archive", "--verify"],
        ["checkpoints", "ls"],
        ["checkpoints", "verify"],
        ["checkpoints", "export", "one", "out.json"],
    ],
)
def test_where_nothing_was_recorded_nothing_is_called_fine(
    command: list[str], state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["record", *command, "--state", "elsewhere"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "agent-state: there is no recording here [elsewhere]\n"


@pytest.mark.parametrize(
    "more",
    [["--speaker", "agent1"], ["--count"], ["--out", "a.json"], ["--newest"], ["--sort", "time"]],
)
def test_what_sql_does_not_heed_is_refused(
    more: list[str], state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["record", "query", str(state), "--sql", "SELECT 1", *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--sql knows --limit, --json and --jsonl only" in printed.err


def test_a_narrow_terminal_breaks_no_time_and_leaves_out_what_has_no_room(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run(["record", "query", str(state), "--limit", "1"])
    narrow = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "120")
    run(["record", "query", str(state), "--limit", "1"])
    wide = capsys.readouterr().out

    assert max(map(len, narrow.splitlines())) <= 80
    date, time = message(1)["Timestamp"][:19].split("T")
    assert f" {date} " in narrow
    assert f" {time} " in narrow
    assert "domain" not in narrow
    assert "Message 1 says" in narrow
    assert "domain" in wide
    assert "tier" in wide


def test_an_answer_of_many_columns_is_shown_row_by_row(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ["record", "query", str(state), "--limit", "2", "--sql"]
    monkeypatch.setenv("COLUMNS", "80")
    run([*ask, "SELECT * FROM messages ORDER BY seq"])
    shown = capsys.readouterr().out
    assert "row 1" in shown
    assert "row 2" in shown
    assert "row 3" not in shown
    assert " text           Message 1 says" in shown
    run([*ask, "SELECT seq, text FROM messages ORDER BY seq"])
    assert "row 1" not in capsys.readouterr().out
