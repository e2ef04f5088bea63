"""``agent-state record import``, as a person and as a script use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from agent_state_integrations.recorder.commands.imports import import_

SAMPLES = Path(__file__).parents[2] / "examples" / "recordings"


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("import")(import_)
    return app


def test_a_person_sees_what_was_read_and_what_was_left_out(
    app: typer.Typer, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, [str(SAMPLES), "--state", str(tmp_path)])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    total = "131 lines read: 96 messages recorded, 9 there already, 26 lines left out"
    assert total in lines
    assert (
        f"{SAMPLES}/flat.jsonl: recorded, 16 of 16 lines; context_id and content (line 1)" in lines
    )
    assert "  line 34: not JSON" in lines
    assert f"{SAMPLES}/older/recovery/crash_recovery.jsonl: not read: " in result.stdout


def test_a_script_gets_json_alone(app: typer.Typer, tmp_path: Path) -> None:
    command = [str(SAMPLES / "codex"), "--state", str(tmp_path), "--json", "--from", "codex"]
    result = CliRunner().invoke(app, command)
    report = json.loads(result.stdout)
    assert (result.exit_code, report["recorded"], report["ok"]) == (0, 16, True)
    assert [file["shape"] for file in report["files"]] == ["codex", "codex"]


def test_a_dry_run_leaves_no_trace(app: typer.Typer, tmp_path: Path) -> None:
    state = tmp_path / "state"
    result = CliRunner().invoke(app, ["--dry-run", str(SAMPLES), "--state", str(state)])
    assert result.exit_code == 0
    assert "104 messages would be recorded" in result.stdout
    assert not state.exists()


def test_a_file_that_is_no_log_is_an_error(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"x": 1}\n')
    result = CliRunner().invoke(app, [str(path), "--state", str(tmp_path / "state")])
    assert result.exit_code == 1
    assert "no known format" in result.stdout
