"""Times out of range, as the commands meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Call


@pytest.mark.parametrize("command", ["restore", "verify", "ls", "cleanup"])
def test_a_time_out_of_range_is_no_problem_for_a_command(
    tmp_path: Path, call: Call, command: str
) -> None:
    for kind, body in (
        ("agents/alice", {"agent_id": "alice", "status": "sleeping", "created_at": 1733011200}),
        ("sleep/alice", {"agent_id": "alice", "sleep_until": "9999-12-31T23:59:59-05:00"}),
        ("tasks/alice/t", {"task_id": "t", "attempts": 0, "not_before": "0001-01-01T00:00+14:00"}),
    ):
        path = tmp_path / f"{kind}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body))

    called = call(command, "--state", tmp_path, "--json")

    assert (called.code, called.err) == (0, "")
    if command == "restore":
        assert called.json()["asleep"] == ["alice"]


@pytest.mark.parametrize("hours", ["nan", "-1"])
def test_the_command_refuses_hours_that_are_none(tmp_path: Path, call: Call, hours: str) -> None:
    assert call("cleanup", "--state", tmp_path, "--max-age-hours", hours).code == 2
