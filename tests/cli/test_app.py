"""The command as such: its help, its arguments and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import Call, assert_one_line_of_error

COMMANDS = {"demo", "ls", "show", "verify", "restore", "cleanup"}


# -- the words ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(call: Call, name: str) -> None:
    called = call(name, "--help")

    assert called.code == 0
    assert "--json" in called.out
    assert "--state" in called.out


def test_no_command_is_misuse_and_prints_the_help(call: Call) -> None:
    called = call()

    assert called.code == 2
    assert "Commands" in called.out
    assert call("--version").out.startswith("agent-state ")


# -- misuse -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ("ls",),
        ("ls", "tasks"),
        ("show", "alice"),
        ("verify",),
        ("restore",),
        ("restore", "--dry-run"),
        ("cleanup",),
        ("cleanup", "--dry-run"),
    ],
)
def test_a_missing_directory_is_misuse_and_is_not_made(
    call: Call, tmp_path: Path, args: tuple[str, ...]
) -> None:
    nothing = tmp_path / "nothing"

    called = call(*args, "--state", nothing)

    assert called.code == 2
    assert_one_line_of_error(called, "no such state directory", str(nothing))
    assert not nothing.exists()


@pytest.mark.parametrize(
    "args",
    [
        ("frobnicate",),
        ("ls", "--frobnicate"),
        ("ls", "a", "b"),
        ("show",),
        ("show", "alice", "--last", "0"),
        ("cleanup", "--max-age-hours", "soon"),
        ("cleanup", "--max-age-hours", "-1"),
        ("demo", "--kills", "1000"),
    ],
)
def test_wrong_arguments_are_misuse_in_one_line(call: Call, args: tuple[str, ...]) -> None:
    called = call(*args)

    assert called.code == 2
    assert_one_line_of_error(called)


def test_the_state_directory_may_come_from_the_environment(
    call: Call, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_STATE_DIR", str(state))

    assert len(call("ls", "--json").json()["agents"]) == 2


# -- as a process -----------------------------------------------------------------------------


def test_the_command_prints_json_alone_on_stdout(state: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent_state", "verify", "--json", "--state", str(state)],
        capture_output=True,
        check=True,
    )

    assert json.loads(done.stdout)["ok"] is True
    assert done.stderr == b""


def test_without_its_extra_the_command_says_how_to_install_it() -> None:
    program = "import sys; sys.modules['typer'] = None\nfrom agent_state.cli import main\nmain()"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'agent-state[cli]'" in done.stderr
