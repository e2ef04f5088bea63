"""Commands of installed packages, and the modules that a command loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import Call, assert_one_line_of_error
from tests.distributions import install
from tests.frameworks import ABSENT

COMMANDS = "agent_state.commands"
GREETINGS = """
import typer

def greet(name: str, loud: bool = False) -> None:
    "Greet a person."
    print(name.upper() if loud else name)

group = typer.Typer(help="Many greetings.", no_args_is_help=True)
group.command()(greet)

@group.command()
def part() -> None:
    "Say good-bye."
    print("good-bye")
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with some commands that work and some that do not."""
    entries = {
        "greet": "greetings:greet",
        "greetings": "greetings:group",
        "no-module": "no_such_module:run",
        "no-name": "greetings:nothing",
        "no-extra": "needs_an_extra:run",
        "broken": "broken_command:run",
        "ls": "greetings:greet",
    }
    modules = {
        "greetings": GREETINGS,
        "broken_command": "1 / 0",
        "needs_an_extra": "from agent_state import MissingExtraError\n"
        "raise MissingExtraError('recorder', 'duckdb')",
    }
    install(tmp_path / "site", COMMANDS, entries, modules)
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_function_and_a_typer_become_commands(call: Call) -> None:
    assert call("greet", "ann", "--loud").out == "ANN\n"
    assert call("greetings", "part").out == "good-bye\n"
    assert "Greet a person." in call("greet", "--help").out
    assert call("greet").code == 2


def test_the_help_lists_added_commands_whether_they_can_be_loaded_or_not(call: Call) -> None:
    called = call("--help")

    assert called.code == 0
    listed = called.out.replace("\n", " ")
    for text in ("Greet a person.", "Many greetings.", "no-module", "no-name", "broken", "ls"):
        assert text in listed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-module", "no_such_module"),
        ("no-name", "nothing"),
        ("no-extra", "pip install 'agent-state[recorder]'"),
        ("broken", "division by zero"),
    ],
)
@pytest.mark.parametrize("args", [(), ("--help",), ("sub", "--option", "5")])
def test_a_command_that_cannot_be_loaded_says_why_in_one_line(
    call: Call, command: str, message: str, args: tuple[str, ...]
) -> None:
    called = call(command, *args)

    assert called.code == 2
    assert_one_line_of_error(called, message)


def test_a_broken_command_does_not_break_the_others(call: Call, state: Path) -> None:
    assert call("broken").code == 2
    assert call("--version").code == 0
    assert call("ls", "--state", state).code == 0


def test_a_command_of_the_core_is_not_replaced(call: Call, state: Path) -> None:
    assert "alice" in call("ls", "--state", state).out
    listed = [line.split() for line in call("--help").out.splitlines()]
    assert sum("ls" in words[:2] for words in listed) == 1


# -- as a process: the modules that are loaded --------------------------------------------------

MODULES = """
import json, sys
{before}
try:
    {run}
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
RUN = "from agent_state.cli import main; sys.argv = ['agent-state', *{args!r}]; main()"


def _process(run: str, before: str = "", **variables: str) -> tuple[str, list[str]]:
    """The output of a program, and the modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", MODULES.format(before=before, run=run)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )
    modules: list[str] = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, modules


def _loaded(modules: list[str], *prefixes: str) -> list[str]:
    return [name for name in modules if name.startswith(prefixes)]


SYSTEMS = ("agent_state_integrations", "duckdb", "pyarrow", "zmq", "fastapi", "redis", "uvicorn")


def test_importing_the_package_loads_no_integration_and_no_extra() -> None:
    _, modules = _process("import agent_state")

    assert _loaded(modules, *SYSTEMS, "agent_state.cli", "typer", "rich") == []


def test_the_version_loads_no_command() -> None:
    out, modules = _process(RUN.format(args=["--version"]))

    assert out.startswith("agent-state ")
    assert _loaded(modules, *SYSTEMS, "rich.console") == []
    assert _loaded(modules, "agent_state", "typer", "orjson") == ["agent_state", "agent_state.cli"]


def test_a_command_loads_no_other_one(state: Path) -> None:
    _, modules = _process(RUN.format(args=["ls", "--state", str(state)]))

    loaded = _loaded(modules, *SYSTEMS, "agent_state.cli.mirror", "agent_state.cli.serve")
    assert loaded == []


def test_the_help_lists_the_systems_of_this_package_without_their_extras() -> None:
    blocked = ("duckdb", "pyarrow", "zmq", "fastapi", "uvicorn", "redis", "jinja2")
    before = "".join(f"sys.modules[{name!r}] = None; " for name in blocked)

    out, _ = _process(RUN.format(args=["--help"]), before, COLUMNS="200")

    assert out.count("Not available") == ("mcp" in ABSENT)
    for name in ("analytics", "demo", "record", "mirror", "serve"):
        [line] = [line for line in out.splitlines() if line.strip("│ ").startswith(f"{name} ")]
        assert len(line.strip("│ ").split()) > 3, line
