"""``agent-state`` alone: what there is in a directory, and how it is, at a glance."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from pathlib import Path

import pytest

from agent_state import AgentRuntime, StatePersistenceManager
from agent_state.clock import SystemClock, stamp
from tests.cli.commands import Call, owned_by_another_process


def lines(text: str) -> dict[str, str]:
    """The lines below the table, by their first words."""
    return dict(re.findall(r"^([a-z]+(?: [a-z]+)?) {2,}(.+)$", text, re.MULTILINE))


@pytest.fixture
async def busy(state: Path) -> Path:
    """A directory with tasks that wait, a dead one, and a report of a mirror."""
    now = SystemClock().now()
    async with StatePersistenceManager(state) as manager:
        for name, status, hours in (("old", "pending", 5), ("new", "pending", 1), ("d", "dead", 9)):
            created = stamp(now - timedelta(hours=hours))
            task = {"task_id": name, "agent_id": "Bob", "status": status, "created_at": created}
            await manager.save("tasks", ("Bob", name), task)
        report = {"mirror": "redis", "state": "failing", "waiting": 7, "last_error": "refused"}
        await manager.save("system", ("mirror",), report)
    return state


def test_a_directory_at_a_glance(busy: Path, call: Call) -> None:
    called = call("--state", busy)

    assert (called.code, called.err) == (0, "")
    assert called.out.startswith(f"{busy}: 2 agents, no server owns it\n")
    assert re.search(r"alice +idle +researcher +1 completed, 1 in_progress, 1 pending", called.out)
    told = lines(called.out)
    assert told["tasks"] == (
        "1 completed, 1 dead, 1 in_progress, 3 pending; the oldest waits since 5 h (Bob); "
        "dead ones: agent-state tasks ls --dead"
    )
    assert told["mail"] == "1 unread"
    assert told["asleep"] == "1; the first wakes at 2999-01-01T00:00:00Z"
    assert told["also"] == "system (1 document, 1 log)"
    assert told["mirror"] == "redis: failing, 7 waiting; the last error: refused"
    assert told["last start"] == "no runtime has run here"
    assert (told["journal"], told["set aside"]) == ("empty", "nothing")
    assert re.fullmatch(r"\d+\.\d KiB in \d+ files", told["size"])


def test_the_glance_as_json_has_the_same(busy: Path, call: Call) -> None:
    found = call("--state", busy, "--json").json()

    assert found["state_dir"] == str(busy)
    assert found["owner"] is None
    assert [agent["agent_id"] for agent in found["agents"]] == ["Bob", "alice"]
    assert found["tasks"] == {"pending": 3, "dead": 1, "completed": 1, "in_progress": 1}
    assert found["kinds"] == {"system": {"documents": 1, "logs": 1}}
    assert found["mirror"]["waiting"] == 7
    assert (found["journal"], found["last_start"], found["quarantine"]) == (None, None, [])


def test_the_directory_of_the_environment_is_meant(
    state: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_STATE_DIR", str(state))

    assert call().out == call("--state", state).out


def test_a_missing_directory_is_an_error_and_is_not_made(tmp_path: Path, call: Call) -> None:
    called = call("--state", tmp_path / "misspelt")

    assert (called.code, called.out) == (2, "")
    assert "no such state directory" in called.err
    assert not (tmp_path / "misspelt").exists()


def test_who_owns_the_directory_and_what_its_journal_holds(state: Path, call: Call) -> None:
    with owned_by_another_process(state) as pid:
        called = call("--state", state)

    assert f"3 agents, owned by process {pid}" in called.out
    assert lines(called.out)["journal"] == "1 change not in their files yet"
    assert re.search(r"carol +active", called.out)


def test_what_cannot_be_used_and_what_was_set_aside_is_told(damaged: Path, call: Call) -> None:
    before = call("--state", damaged)
    assert before.code == 1
    assert "1 file could not be used (see agent-state doctor)" in before.out
    assert "agents/alice.json: not JSON" in before.out
    assert call("restore", "--state", damaged).code == 1

    after = call("--state", damaged)

    assert after.code == 0
    assert lines(after.out)["set aside"] == "1 file"
    assert "agents/alice.json, " in after.out


def test_the_last_start_is_told_and_whether_it_stopped_in_good_order(
    tmp_path: Path, call: Call
) -> None:
    async def run() -> None:
        async with AgentRuntime(tmp_path / "state") as runtime:
            await runtime.agents.create("ann", agent_type="reader")

    asyncio.run(run())

    told = lines(call("--state", tmp_path / "state").out)
    assert re.fullmatch(r"it stopped in good order at \d{4}-.*Z", told["last start"])
