"""Checkpoints of LangGraph's own savers, brought into a state directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT

from agent_state import StateValidationError
from agent_state_integrations.langgraph import AgentStateSaver, import_checkpoints
from tests.integrations.langgraph.interrupted_graph import CONFIG, graph_on
from tests.integrations.langgraph.savers import checkpoint_with, config_of


def test_a_graph_goes_on_from_what_was_imported(tmp_path: Path) -> None:
    old = InMemorySaver()
    work = {"messages": [HumanMessage("hello", id="hello")], "steps": 0}
    graph_on(old).invoke(work, CONFIG)
    expected = [*old.list(None)]

    with AgentStateSaver(tmp_path) as saver:
        assert import_checkpoints(old.list(None), saver) == len(expected)
        size = sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))
        assert import_checkpoints(old.list(None), saver) == len(expected)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl")) == size
        assert {each.checkpoint["id"] for each in saver.list(None)} == {
            each.checkpoint["id"] for each in expected
        }
        state, before = graph_on(saver).get_state(CONFIG), graph_on(old).get_state(CONFIG)
        assert state.values == before.values
        assert [task.interrupts for task in state.tasks] == [
            task.interrupts for task in before.tasks
        ]


def test_the_order_of_pending_writes_is_kept(tmp_path: Path) -> None:
    old = InMemorySaver()
    checkpoint = checkpoint_with({"ch": [1]}, 1)
    config = old.put(config_of("t"), checkpoint, {"step": 1}, checkpoint["channel_versions"])
    old.put_writes(config, [("ch", 1), (INTERRUPT, "why"), ("ch", 2)], "z", "~a")
    old.put_writes(config, [(ERROR, "no")], "a", "~b")

    with AgentStateSaver(tmp_path) as saver:
        import_checkpoints(old.list(None), saver)
        found, before = saver.get_tuple(config), old.get_tuple(config)
    assert found is not None
    assert before is not None
    assert found.pending_writes == before.pending_writes


def test_what_does_not_come_back_is_reported(tmp_path: Path) -> None:
    class Odd:
        """Equal to nothing."""

        def __eq__(self, other: object) -> bool:
            return False

        __hash__ = None  # type: ignore[assignment]  # it can be changed

        def model_dump(self) -> Any:
            return {}

    old = InMemorySaver()
    checkpoint = checkpoint_with({"ch": "x"}, 1)
    old.put(config_of("t"), checkpoint, {}, checkpoint["channel_versions"])
    [found] = old.list(None)
    found.checkpoint["channel_values"]["ch"] = Odd()

    with AgentStateSaver(tmp_path) as saver, pytest.raises(StateValidationError, match="thread t"):
        import_checkpoints([found], saver)
