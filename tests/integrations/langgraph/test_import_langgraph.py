"""``agent-state import langgraph``: what a SqliteSaver has stored, in a state directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from agent_state.cli.app import run as main
from agent_state_integrations.langgraph import AgentStateSaver
from tests.integrations.langgraph.interrupted_graph import graph_on

sqlite = pytest.importorskip("langgraph.checkpoint.sqlite", reason="langgraph-checkpoint-sqlite")


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Two threads, each interrupted."""
    path = tmp_path / "old.db"
    with sqlite.SqliteSaver.from_conn_string(str(path)) as old:
        for thread in ("a/b", "two"):
            work = {"messages": [HumanMessage(thread, id=thread)], "steps": 0}
            graph_on(old).invoke(work, config(thread))
    return path


def test_a_graph_goes_on_from_the_imported_database(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    with sqlite.SqliteSaver.from_conn_string(str(database)) as old:
        expected = len([*old.list(None)])
        before = graph_on(old).get_state(config("a/b"))
    content = database.read_bytes()
    command = ["import", "langgraph", str(database), "--state", str(state)]

    assert main([*command, "--dry-run"]) == 0
    assert "of 2 threads would be brought over" in capsys.readouterr().out
    assert not state.exists()
    for _ in range(2):  # the second run changes nothing
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {"threads": 2, "checkpoints": expected, "refused": {}}
    assert database.read_bytes() == content
    with AgentStateSaver(state) as saver:
        assert len([*saver.list(None)]) == expected
        after = graph_on(saver).get_state(config("a/b"))
        assert after.values == before.values
        assert [task.interrupts for task in after.tasks] == [
            task.interrupts for task in before.tasks
        ]


def test_a_file_that_is_no_database_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no database")
    for name in ("text", "missing"):
        assert main(["import", "langgraph", str(tmp_path / name), "--state", str(tmp_path)]) == 2
        assert "no checkpoints can be read" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()
