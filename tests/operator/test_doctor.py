"""``agent-state doctor``: what is wrong with a directory, why, and what to do."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.clock import SystemClock, later, stamp
from tests.cli.commands import Call, owned_by_another_process


def found(call: Call, state: Path, code: int) -> dict[str, dict[str, Any]]:
    called = call("doctor", "--state", state, "--json")
    assert called.code == code, called.err
    report = called.json()
    assert report["ok"] is (code == 0)
    for each in report["findings"]:
        assert each["why"]
        assert each["do"]
    return {each["what"]: each for each in report["findings"]}


@pytest.fixture
async def ill(state: Path) -> Path:
    """Dead and late tasks, a failing mirror, a server that was killed, a request, a broken file."""
    now = SystemClock().now()
    async with StatePersistenceManager(state) as manager:
        for agent, name, status in (
            ("Bob", "late", "pending"),
            ("carol", "old", "pending"),
            ("carol", "dead", "dead"),
        ):
            task = {
                "task_id": name,
                "agent_id": agent,
                "status": status,
                "created_at": stamp(now - timedelta(hours=5)),
            }
            await manager.save("tasks", (agent, name), task)
        mirror = {"mirror": "redis", "state": "away", "waiting": 7, "last_error": "refused"}
        await manager.save("system", ("mirror",), mirror)
        runtime = {"at": stamp(now), "owner": "x", "status": "running"}
        await manager.save("system", ("runtime",), runtime)
        await manager.save("requests", ("tasks-1",), {"action": "retry", "tasks": ["t1"]})
    os.utime(state / "requests/tasks-1.json", (1_000_000_000, 1_000_000_000))
    state.chmod(0o755)
    return state


def test_a_sound_directory_has_no_finding(state: Path, call: Call) -> None:
    called = call("doctor", "--state", state)

    assert (called.code, called.err) == (0, "")
    assert called.out.endswith("0 problems, 0 warnings\n")


def test_everything_that_is_wrong_is_said_with_what_to_do(ill: Path, call: Call) -> None:
    what = found(call, ill, 0)

    assert {name: each["where"] for name, each in what.items()} == {
        "1 task dead": None,
        "a task waits since 5 h": "tasks/Bob",
        "tasks of 1 agent wait, one since 5 h": "tasks/carol",
        "1 request without an answer": "requests",
        "the mirror is away, 7 documents wait": "system/mirror.json",
        "the last server did not stop in good order": None,
        "other users may read or change the directory": ".",
    }
    assert what["a task waits since 5 h"]["do"] == "`agent-state agents start Bob`"
    assert what["the mirror is away, 7 documents wait"]["why"] == "refused"
    assert {each["severity"] for each in what.values()} == {"warning"}


def test_what_it_advises_mends_it(ill: Path, call: Call) -> None:
    for advised in (
        ("tasks", "delete", "--dead"),
        ("agents", "start", "Bob"),
        ("tasks", "cancel", "--older-than", "1h"),
    ):
        assert call(*advised, "--state", ill).code == 0
    ill.chmod(0o700)
    (ill / "requests/tasks-1.json").unlink()

    assert found(call, ill, 0).keys() == {
        "the mirror is away, 7 documents wait",
        "the last server did not stop in good order",
    }


def test_a_damaged_file_is_a_problem_until_it_was_set_aside(damaged: Path, call: Call) -> None:
    broken = found(call, damaged, 1)["damaged file"]
    assert (broken["where"], broken["severity"]) == ("agents/alice.json", "problem")
    assert "not JSON" in broken["why"]
    table = call("doctor", "--state", damaged)
    assert table.code == 1
    assert "problem: damaged file: agents/alice.json" in table.out
    assert table.out.endswith("1 problem, 0 warnings\n")
    assert call("restore", "--state", damaged).code == 1

    aside = found(call, damaged, 0)["a file was set aside"]

    assert aside["where"] == ".quarantine/agents/alice.json.1"
    drop = aside["do"].rpartition("; or ")[2].strip("`").split()
    assert call(*drop[1:], "--state", damaged).code == 0
    assert found(call, damaged, 0) == {}


@pytest.mark.parametrize(
    ("heartbeat_seconds", "left"), [(3600.0, False), (-3600.0, True)], ids=["alive", "dead"]
)
def test_a_directory_that_runtimes_share_is_left_when_no_heartbeat_is_valid(
    ill: Path, call: Call, heartbeat_seconds: float, left: bool
) -> None:
    folder = ill / ".runtime/runtimes"
    folder.mkdir(parents=True)
    until = stamp(later(SystemClock().now(), heartbeat_seconds))
    (folder / "x.json").write_text(f'{{"expires_at": "{until}", "owner": "x"}}')

    assert ("the last server did not stop in good order" in found(call, ill, 0)) is left
    glance = call("--state", ill).out
    assert ("did not stop in good order" in glance) is left


def test_of_an_owned_directory_the_owner_is_named(ill: Path, call: Call) -> None:
    with owned_by_another_process(ill) as pid:
        called = call("doctor", "--state", ill)

    assert called.out.startswith(f"{ill}: owned by process {pid}\n")
    assert "good order" not in called.out
    assert "no server runs here" not in called.out


def test_a_missing_directory_is_not_made(tmp_path: Path, call: Call) -> None:
    called = call("doctor", "--state", tmp_path / "misspelt")

    assert called.code == 2
    assert not (tmp_path / "misspelt").exists()
