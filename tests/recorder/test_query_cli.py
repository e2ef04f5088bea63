"""The commands as a person and a script use them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from agent_state.errors import QueryError, StateNotFoundError
from agent_state.testing import FakeClock
from agent_state_integrations.recorder.commands.archive import archive, checkpoints
from agent_state_integrations.recorder.commands.query import conversations, query
from agent_state_integrations.recorder.files import Recording
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.writer import RecordWriter
from tests.recorder.segments import line, lines, live, message, mixed, segment

app = typer.Typer()
app.command()(query)
app.command()(archive)
app.command()(conversations)
app.add_typer(checkpoints, name="checkpoints")


def run(*arguments: object) -> int:
    command = typer.main.get_command(app)
    return command([str(one) for one in arguments], standalone_mode=False) or 0


@pytest.fixture
def state(tmp_path: Path) -> Path:
    mixed(tmp_path / "state")
    return tmp_path / "state"


def test_a_table_for_people(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("query", state, "--speaker", "agent1", "--limit", 2) == 0
    out = capsys.readouterr().out
    assert "Message 1 says: café" in out
    assert "Message 5 says: café" in out
    assert "Message 9" not in out
    run("query", state)
    assert "and more" not in capsys.readouterr().out
    with Recording(state).current.open("ab") as file:
        file.write(line(51))
    run("query", state)
    assert "… and more" in capsys.readouterr().out
    run("query", state, "--text", "nothing like it")
    assert capsys.readouterr().out == "no message\n"


def test_json_and_lines_for_scripts(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [{**message(n), "_seq": n} for n in range(1, 51, 4)]
    run("query", state, "--speaker", "agent1", "--json")
    assert json.loads(capsys.readouterr().out) == expected
    run("query", state, "--speaker", "agent1", "--jsonl")
    assert [json.loads(one) for one in capsys.readouterr().out.splitlines()] == expected
    run("query", state, "--speaker", "nobody", "--json")
    assert json.loads(capsys.readouterr().out) == []
    run("query", state, "--speaker", "nobody", "--jsonl")
    assert capsys.readouterr().out == ""


def test_every_filter_has_an_option(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def count(*options: object) -> int:
        run("query", state, "--count", *options)
        return int(capsys.readouterr().out)

    assert count() == 50
    assert count("--day", "2026-11-01") == 15
    assert count("--since", "2026-11-01T10:00", "--until", "2026-11-01T12:00Z") == 2
    assert count("--role", "Planner") == 10
    assert count("--context", "ctx1") == 25
    assert count("--domain", "ui_ux") == 16
    assert count("--tier", "C") == 17
    assert count("--tag", "Status-Ready") == 25
    assert count("--type", "1") == 25
    assert count("--text", "SAYS: CAFÉ") == 50
    assert count("--rules", "standard", "--domain", "ui_ux") == 16
    assert count("--since", "1h", "--until", "1s") == 0


def test_newest_first_and_by_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(Recording(tmp_path), [line(n, message(hour)) for n, hour in enumerate([5, 1, 3], 1)])

    def order(*options: object) -> list[int]:
        run("query", tmp_path, "--jsonl", *options)
        return [json.loads(one)["_seq"] for one in capsys.readouterr().out.splitlines()]

    assert order() == [1, 2, 3]
    assert order("--newest") == [3, 2, 1]
    assert order("--sort", "time") == [2, 3, 1]
    assert order("--sort", "time", "--newest", "--limit", 2) == [1, 3]


def test_sql(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statement = (
        "SELECT speaker, count(*) AS n, min(timestamp) AS began FROM messages GROUP BY 1 ORDER BY 1"
    )
    run("query", state, "--sql", statement, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found[0] == {"speaker": "agent0", "n": 12, "began": message(4)["Timestamp"]}
    run("query", state, "--sql", statement)
    assert "agent3" in capsys.readouterr().out
    run("query", state, "--sql", "SELECT seq FROM messages ORDER BY seq", "--jsonl", "--limit", 2)
    assert capsys.readouterr().out == '{"seq":1}\n{"seq":2}\n'


def test_what_was_left_out_is_told_on_standard_error(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recording(state).current.open("ab") as file:
        file.write(b"garbage\n")
    for options in (["--count"], ["--json"], ["--sql", "SELECT 1"]):
        run("query", state, *options)
        captured = capsys.readouterr()
        assert "one line was left out" in captured.err
        assert "left out" not in captured.out


def test_an_export(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.parquet"
    run("query", state, "--tier", "A", "--out", target)
    assert "16 messages in" in capsys.readouterr().out
    assert len(list(read_records(target))) == 16


def test_what_cannot_be_meant_is_refused(state: Path) -> None:
    for wrong in (["--since", "soon"], ["--day", "today"], ["--sql", "DROP VIEW messages"]):
        with pytest.raises(QueryError):
            run("query", state, *wrong)
    with pytest.raises(typer.BadParameter):
        run("query", state, "--day", "2026-11-01", "--since", "1h")
    with pytest.raises(typer.BadParameter):
        run("query", state, "--json", "--jsonl")
    with pytest.raises(StateNotFoundError):
        run("query", state / "nowhere")


def test_conversations(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("conversations", state)
    assert "ctx1" in capsys.readouterr().out
    run("conversations", state, "--json", "--messages")
    found = json.loads(capsys.readouterr().out)
    assert [one["thread_id"] for one in found] == ["ctx1", "ctx0"]
    assert found[0]["message_count"] == len(found[0]["messages"]) == 25
    run("conversations", state, "--day", "2026-11-01", "--json")
    assert [one["message_count"] for one in json.loads(capsys.readouterr().out)] == [8, 7]
    run("conversations", state, "--speaker", "nobody")
    assert capsys.readouterr().out.endswith("no conversation\n")


def test_archive_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = Recording(tmp_path)
    segment(recording, 1, lines(1, 50), "2020-01-01")
    live(recording, lines(51, 53))
    run("archive", "--state", tmp_path, "--dry-run")
    assert "would be compressed: 2020-01-01-000000000001" in capsys.readouterr().out
    assert len(recording.segments()) == 1
    run("archive", "--state", tmp_path, "--parquet-past", "1kB", "--json")
    assert json.loads(capsys.readouterr().out)["parquet"] == ["2020-01-01-000000000001"]
    run("archive", "--state", tmp_path)
    assert "nothing to do" in capsys.readouterr().out
    assert run("archive", "--state", tmp_path, "--verify") == 0
    assert "all archives are intact" in capsys.readouterr().out
    [made] = recording.archives()
    made.path.write_bytes(b"PAR1 nothing PAR1")
    assert run("archive", "--state", tmp_path, "--verify", "--json") == 1
    assert made.path.name in json.loads(capsys.readouterr().out)["problems"][0]
    run("archive", "--state", tmp_path, "--keep-days", 30)
    assert "removed: 2020-01-01-000000000001" in capsys.readouterr().out


def test_checkpoints_hold_wherever_their_lines_have_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = FakeClock(datetime(2026, 11, 1, 12, tzinfo=UTC))
    with RecordWriter(tmp_path, clock=clock) as writer:
        for name in ("first", "second"):
            writer.write([{"sender_id": "ann", "message": f"{name} {n}"} for n in range(20)])
            assert writer.checkpoint(name) is not None
            writer.rotate()
        writer.write([{"sender_id": "ann", "message": "last"}])
        assert writer.checkpoint("third") is not None
    run("checkpoints", "ls", "--state", tmp_path, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in found] == ["third", "second", "first"]
    for _ in range(2):
        assert run("checkpoints", "verify", "--state", tmp_path) == 0
        assert "3 of 3 checkpoints are intact" in capsys.readouterr().out
        run("archive", "--state", tmp_path, "--parquet-past", "1")
        capsys.readouterr()
    name = found[1]["checkpoint_id"]
    run("checkpoints", "export", name, tmp_path / "out.json", "--state", tmp_path)
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["checkpoint_id"], document["label"]) == (name, "second")
    assert [one["Message"] for one in document["messages"]] == [f"second {n}" for n in range(20)]
    capsys.readouterr()
    run("archive", "--state", tmp_path, "--keep-size", "0")
    capsys.readouterr()
    assert run("checkpoints", "verify", "--state", tmp_path, "--json") == 1
    assert list(json.loads(capsys.readouterr().out)["problems"]) == [
        found[2]["checkpoint_id"],
        name,
    ]
    with pytest.raises(StateNotFoundError, match="no such checkpoint"):
        run("checkpoints", "verify", "nope", "--state", tmp_path)
