"""``agent-state quarantine``: what was set aside, put back, or removed; and a running server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from agent_state import AgentRuntime
from tests.cli.commands import Call, agent_state, assert_one_line_of_error
from tests.deadlines import until

KEPT = ".quarantine/agents/alice.json.1"


@pytest.fixture
def state(damaged: Path, call: Call) -> Path:
    """A directory in which a hand edit of alice was set aside; there was no earlier version."""
    assert call("restore", "--state", damaged).code == 1
    assert (damaged / KEPT).exists()
    return damaged


def mend(state: Path) -> None:
    (state / KEPT).write_text(json.dumps({"agent_id": "alice", "agent_type": "mended"}))


def test_what_was_set_aside_is_listed_and_shown_with_the_reason(state: Path, call: Call) -> None:
    table = call("quarantine", "ls", "--state", state)
    [listed] = call("quarantine", "ls", "--state", state, "--json").json()["quarantine"]

    assert table.code == 0
    assert "1 file set aside" in table.out
    assert KEPT in table.out
    assert (listed["path"], listed["was"]) == (KEPT, "agents/alice.json")
    assert "not JSON" in listed["reason"]
    for name in (KEPT, "agents/alice.json"):
        shown = call("quarantine", "show", name, "--state", state)
        assert shown.out.startswith(f"{KEPT}: not JSON")
        assert shown.out.endswith('{"agent_id": \n')
        found = call("quarantine", "show", name, "--state", state, "--json").json()
        assert (found["content"], found["was"]) == ('{"agent_id": ', "agents/alice.json")


def test_a_mended_file_is_put_back_as_a_new_revision(state: Path, call: Call) -> None:
    mend(state)

    put_back = call("quarantine", "restore", "agents/alice.json", "--state", state)

    assert (put_back.code, put_back.out) == (0, "1 file put back\n")
    shown = call("show", "agents/alice", "--state", state, "--json").json()
    assert (shown["state"]["agent_type"], shown["changed_outside"]) == ("mended", False)
    assert call("quarantine", "ls", "--state", state, "--json").json()["quarantine"] == []
    assert not list((state / ".quarantine").rglob("*.json*"))
    assert call("verify", "--state", state).code == 0


def test_a_file_that_is_still_not_usable_stays_and_is_said(state: Path, call: Call) -> None:
    called = call("quarantine", "restore", KEPT, "nothing", "--state", state)

    assert (called.code, called.out) == (1, "0 files put back\n")
    unusable, unknown = called.err.splitlines()
    assert unusable.startswith(f"agent-state: not put back: {KEPT}: {KEPT} is still not usable")
    assert unknown.endswith("nothing: nothing was set aside as 'nothing'")
    assert (state / KEPT).read_text() == '{"agent_id": '


def test_the_version_that_was_stored_meanwhile_stays_in_the_snapshots(
    state: Path, call: Call
) -> None:
    (state / "agents/alice.json").write_text('{"agent_id": "alice", "agent_type": "by hand"}')
    mend(state)

    assert call("quarantine", "restore", KEPT, "--state", state).code == 0

    assert json.loads((state / "agents/alice.json").read_text())["agent_type"] == "mended"
    kept = [path.read_text() for path in (state / ".snapshots").rglob("*") if path.is_file()]
    assert any("by hand" in text for text in kept)


def test_a_file_is_removed_for_good_with_its_reason(state: Path, call: Call) -> None:
    dropped = call("quarantine", "drop", "agents/alice.json", "--state", state, "--json")

    assert (dropped.code, dropped.json()["changed"]) == (0, ["agents/alice.json"])
    assert not list((state / ".quarantine").rglob("*.json*"))
    again = call("quarantine", "drop", "agents/alice.json", "--state", state)
    assert (again.code, again.out) == (1, "0 files removed\n")


def test_a_file_that_was_never_set_aside_is_not_touched(state: Path, call: Call) -> None:
    (state / "secret.txt").write_text("mine")

    for name in ("secret.txt", "../state/secret.txt", f"{KEPT}/../../../secret.txt"):
        assert call("quarantine", "drop", name, "--state", state).code == 1
        shown = call("quarantine", "show", name, "--state", state)
        assert_one_line_of_error(shown, "nothing was set aside")

    assert (state / "secret.txt").read_text() == "mine"


async def test_a_running_server_puts_the_file_back_and_goes_on_with_it(tmp_path: Path) -> None:
    async with AgentRuntime(tmp_path / "state") as runtime:
        await runtime.agents.create("alice", agent_type="reader")
        file = tmp_path / "state/agents/alice.json"
        await until(file.exists)
        whole = json.loads(file.read_text())
        file.write_text('{"agent_id": ')
        folder = tmp_path / "state/.quarantine/agents"
        await until(lambda: list(folder.glob("alice.json*.reason.json")))
        [kept] = folder.glob("alice.json*[0-9]")
        own = {name: value for name, value in whole.items() if not name.startswith("_")}
        own["agent_name"] = "Alice the mended"
        kept.write_text(json.dumps(own))

        told = await agent_state(tmp_path, "quarantine", "restore", "agents/alice.json")

        assert told == "1 file put back\n"
        assert runtime.agents.get("alice").agent_name == "Alice the mended"
        assert (
            json.loads(await agent_state(tmp_path, "quarantine", "ls", "--json"))["quarantine"]
            == []
        )
    stored = json.loads(await asyncio.to_thread(file.read_text))
    assert stored["agent_name"] == "Alice the mended"
