from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.cli.app import run
from agent_state.cli.output import printable
from tests.cli.calling import Call, Called, assert_one_line_of_error, fill

COMMANDS = {"demo", "ls", "show", "verify", "restore", "cleanup"}


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    return await fill(tmp_path / "state")


@pytest.fixture
def damaged(state: Path) -> Path:
    (state / "agents/alice.json").write_text('{"agent_id": ')
    return state


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def called(*args: object) -> Called:
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return called


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


# -- looking ----------------------------------------------------------------------------------


def test_ls_shows_agents_with_tasks_mail_and_sleep(call: Call, state: Path) -> None:
    called = call("ls", "--state", state)

    assert called.code == 0
    [alice] = [line for line in called.out.splitlines() if line.startswith(" alice")]
    assert "1 completed, 1 in_progress, 1 pending" in alice
    assert "2999-01-01T00:00:00Z" in alice


def test_ls_as_json(call: Call, state: Path) -> None:
    bob, alice = call("ls", "--json", "--state", state).json()["agents"]

    assert (bob["agent_id"], bob["status"]) == ("Bob", "stopped")
    assert alice["tasks"] == {"completed": 1, "in_progress": 1, "pending": 1}
    assert (alice["unread"], alice["asleep"]) == (1, True)


@pytest.mark.parametrize("kind", ["agents", "tasks", "sleep", "mail", "system"])
def test_ls_of_a_kind(call: Call, state: Path, kind: str) -> None:
    found = call("ls", kind, "--json", "--state", state)

    assert found.code == 0
    paths = {row["path"] for row in (*found.json()["documents"], *found.json()["logs"])}
    assert paths == {str(path.relative_to(state)) for path in (state / kind).rglob("*.json*")}
    assert call("ls", kind, "--state", state).code == 0


def test_ls_of_an_unknown_kind_is_misuse(call: Call, state: Path) -> None:
    called = call("ls", "tusks", "--state", state)

    assert called.code == 2
    assert_one_line_of_error(called, "no kind 'tusks'", "agents, tasks, sleep, mail, system")


def test_show_of_an_agent_has_all_that_is_its_own(call: Call, state: Path) -> None:
    called = call("show", "alice", "--state", state)

    assert called.code == 0
    for words in (
        "alice: researcher, idle",
        "asleep until 2999",
        "tasks/alice/t2",
        "mail/alice/m1",
    ):
        assert words in called.out

    found = call("show", "alice", "--json", "--state", state).json()
    assert found["agent"]["state"]["agent_type"] == "researcher"
    assert {task["key"][1] for task in found["tasks"]} == {"t1", "t2", "a/b"}
    assert found["sleep"]["revision"] == 1


@pytest.mark.parametrize(
    "ident", ["tasks/alice/a/b", "tasks/alice/a%2fb.json", "tasks/alice/a%2fb", "agents/Bob"]
)
def test_show_of_a_document_by_its_id_or_its_file(call: Call, state: Path, ident: str) -> None:
    called = call("show", ident, "--json", "--state", state)

    if ident == "tasks/alice/a%2fb":  # an id that nobody has, though a file looks like it
        assert called.code == 2
        return
    assert called.code == 0
    assert called.json()["key"] in (["alice", "a/b"], ["Bob"])
    assert '"' in call("show", ident, "--state", state).out


def test_show_of_a_log_has_its_newest_records(call: Call, state: Path) -> None:
    found = call("show", "system/events", "--last", 3, "--json", "--state", state).json()

    assert [record["seq"] for record in found["records"]] == [28, 29, 30]
    assert "record 30" in call("show", "system/events", "--state", state).out


@pytest.mark.parametrize("ident", ["nobody", "tasks/alice/t9", "", "/", "tusks/alice", "\x1b[31m"])
def test_show_of_what_is_not_there_is_misuse(call: Call, state: Path, ident: str) -> None:
    called = call("show", ident, "--state", state)

    assert called.code == 2
    assert_one_line_of_error(called, "nothing is stored under")
    assert "\x1b" not in called.err


@pytest.mark.parametrize("args", [("ls",), ("ls", "agents"), ("show", "alice")])
def test_what_cannot_be_used_is_told_and_the_rest_is_shown(
    call: Call, damaged: Path, args: tuple[str, ...]
) -> None:
    called = call(*args, "--state", damaged)

    assert called.code == 1
    assert "agents/alice.json: not JSON" in called.out
    assert called.err == ""

    found = call(*args, "--json", "--state", damaged)
    assert found.code == 1
    assert found.json()
    assert "agents/alice.json" in found.err


def test_show_of_a_damaged_document_is_one_line_of_error(call: Call, damaged: Path) -> None:
    called = call("show", "agents/alice", "--state", damaged)

    assert called.code == 1
    assert_one_line_of_error(called, "not JSON")


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


async def _save_hostile_agent(root: Path) -> None:
    hostile = "\x1b]0;owned\x07\u202e[red]"
    async with StatePersistenceManager(root) as manager:
        await manager.save_agent_state(hostile, {"agent_id": hostile, "status": "\x1b[2J"})


@pytest.fixture
async def hostile(tmp_path: Path) -> Path:
    await _save_hostile_agent(tmp_path / "state")
    return tmp_path / "state"


def test_nothing_stored_can_act_upon_the_terminal(call: Call, hostile: Path) -> None:
    printed = (
        call("ls", "--state", hostile).out
        + call("show", "\x1b]0;owned\x07\u202e[red]", "--state", hostile).out
    )

    assert "\\x1b]0;owned" in printed
    assert "[red]" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert printable("plain, ünïcode ✓") == "plain, ünïcode ✓"


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
