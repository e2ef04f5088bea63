"""``agent-state import legacy``, and ``restore`` in an ancestor's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import Call

FILES: dict[str, Any] = {
    "agents/run_1.json": {"agent_id": "eve", "status": "idle", "_version": "1.0"},
    "tasks/eve_tasks.json": {
        "agent_id": "eve",
        "pending_tasks": [{"id": "t1"}],
        "_version": "1.0",
    },
    "sleep/eve_sleep.json": {
        "agent_id": "eve",
        "is_sleeping": True,
        "sleep_until": "2999-01-01T00:00:00",
        "_version": "1.0",
    },
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    for name, body in FILES.items():
        path = tmp_path / "old" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body))
    return tmp_path / "old"


def files(root: Path) -> dict[str, bytes]:
    found = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_a_directory_is_imported_once(old: Path, tmp_path: Path, call: Call) -> None:
    before = files(old)
    first = call("import", "legacy", old, "--state", tmp_path / "new", "--json")
    second = call("import", "legacy", old, "--state", tmp_path / "new", "--json")

    assert (first.code, second.code) == (0, 0)
    assert first.json()["agents"] == ["eve"]
    assert first.json()["tasks"] == ["eve/t1"]
    assert (second.json()["files"], len(second.json()["known"])) == ([], 3)
    assert files(old) == before
    shown = call("show", "eve", "--state", tmp_path / "new", "--json").json()
    assert ["eve", "t1"] in [task["key"] for task in shown["tasks"]]
    assert shown["sleep"]["state"]["is_sleeping"] is True


def test_a_dry_run_makes_nothing(old: Path, tmp_path: Path, call: Call) -> None:
    before = files(old)
    for state in (tmp_path / "new", old):
        done = call("import", "legacy", old, "--state", state, "--dry-run")
        assert (done.code, "nothing was changed" in done.out) == (0, True)
        assert "1 agent, 1 task, 1 sleeper" in done.out
    assert files(old) == before
    assert not (tmp_path / "new").exists()


def test_what_is_not_brought_over_is_a_problem(old: Path, tmp_path: Path, call: Call) -> None:
    (old / "tasks/bad_tasks.json").write_text('{"agent_id": "bad", "pending_tasks": 7}')
    done = call("import", "legacy", old, "--state", tmp_path / "new")

    assert done.code == 1
    assert "tasks/bad_tasks.json" in done.out


@pytest.mark.parametrize("where", ["nowhere", "old/agents/run_1.json"])
def test_what_is_no_directory_is_refused(old: Path, tmp_path: Path, call: Call, where: str) -> None:
    done = call("import", "legacy", tmp_path / where, "--state", tmp_path / "new")

    assert (done.code, done.err.count("\n")) == (2, 1)


def test_restore_brings_over_what_is_in_the_directory(old: Path, call: Call) -> None:
    before = files(old)
    planned = call("restore", "--state", old, "--dry-run", "--json").json()
    assert len(planned["legacy"]["files"]) == 3
    assert files(old) == before

    done = call("restore", "--state", old, "--json").json()

    assert done["agents"] == done["asleep"] == ["eve"]
    assert (done["tasks_pending"], done["without_agent"]) == (1, [])
    assert sorted(done["legacy"]["files"]) == sorted(FILES)
    assert call("restore", "--state", old, "--json").json()["legacy"]["files"] == []
