"""The command as such: its help, its arguments and its exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agent_state.cli.app import app
from tests.cli.commands import Call, assert_one_line_of_error, commands_of

COMMANDS = {"demo", "ls", "show", "verify", "restore", "cleanup"}


# -- the words ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(call: Call, name: str) -> None:
    called = call(name, "--help")

    assert called.code == 0
    assert "--json" in called.out
    assert "--state" in called.out


def test_the_help_of_every_command_has_an_example_that_the_command_takes() -> None:
    for path, command in commands_of(app):
        example = re.search(r"Example: agent-state (.*)", command.help or "")
        assert example is not None, path
        words = shlex.split(example[1])
        assert tuple(words[: len(path)]) == path, example[1]
        options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
        given = {word for word in words[len(path) :] if re.match("--?[a-z]", word)}
        assert given <= options, example[1]


def test_one_word_is_one_option_everywhere() -> None:
    meanings = {"--max", "--most", "--count-of", "--top", "--state-dir", "--dir", "--format", "-s"}
    for path, command in commands_of(app):
        options = {name for each in command.params for name in each.opts}
        assert not options & meanings, path
        assert not {name for name in options if name.startswith("--") and name != name.lower()}
        assert "-n" not in options or "--limit" in options, path
        if path[-1] in ("ls", "list"):
            assert "--json" in options, path
            assert path[-1] == "ls", path


def test_without_a_command_and_a_directory_it_prints_the_help(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    called = call()

    assert called.code == 2
    assert "Commands" in called.out
    assert call("--version").out.startswith("agent-state ")


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["agnets"], "agents"),
        (["verfy"], "verify"),
        (["tasks", "cancl"], "cancel"),
        (["ls", "agnets"], "agents"),
        (["show", "alise"], "alice"),
        (["show", "tasks/alice/t22"], "tasks/alice/t2"),
        (["ls", "--stat", "x"], "--state"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_word_that_is_like_it(
    call: Call, state: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], meant: str
) -> None:
    monkeypatch.setenv("AGENT_STATE_DIR", str(state))

    called = call(*args)

    assert called.code == 2
    assert_one_line_of_error(called, f"; did you mean {meant!r}")
    assert "?;" not in called.err


def test_options_before_the_command_are_refused_and_not_ignored(call: Call, state: Path) -> None:
    called = call("--state", state, "verify")

    assert called.code == 2
    assert_one_line_of_error(called, "behind the command")


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
        ("show", "alice", "--limit", "0"),
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


def test_shell_completion_knows_commands_and_options() -> None:
    def completed(words: str) -> str:
        env = {
            **os.environ,
            "_AGENT_STATE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        done = subprocess.run(
            [Path(sys.executable).parent / "agent-state"],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    assert "quarantine" in completed("agent-state qua")
    assert "retry" in completed("agent-state tasks re")
    assert "--json" in completed("agent-state ls --j")
