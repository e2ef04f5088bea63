"""Threads of a graph, and items of its memory, that older versions have kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.types import Command

from agent_state_integrations.langgraph import AgentStateSaver, AgentStateStore
from tests.integrations.langgraph.interrupted_graph import graph_on
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("langgraph", "langgraph-checkpoint", "langchain-core")
THREADS = ("both/ü", "of 1", "of 2")


def config(thread: str, **fields: Any) -> Any:
    return {"configurable": {"thread_id": thread, **fields}}


async def write(directory: Path, turn: int) -> None:
    with AgentStateSaver(directory) as saver:
        graph = graph_on(saver)
        for name in ("both/ü", f"of {turn}"):
            if name == "both/ü" and turn == 2:
                graph.invoke(Command(resume="yes"), config(name))  # the older one's interrupt
            asked = HumanMessage("hello ü", id=f"h{turn}")
            graph.invoke({"messages": [asked], "steps": 0}, config(name), durability="sync")
    with AgentStateStore(directory) as store:
        store.put(("users", "1"), "both", {"b": [1, {"z": turn, "a": 2}], "a": None})
        store.put(("users", f"ü {turn}"), "a/b", {"turn": turn}, ttl=10**6)
        store.put(("left",), str(turn), {"n": turn})


async def read(directory: Path) -> Any:
    found = []
    with AgentStateSaver(directory) as saver:
        graph = graph_on(saver)
        for name in THREADS:
            state = graph.get_state(config(name), subgraphs=True)
            history = [
                [
                    each.metadata["source"],
                    each.metadata["step"],
                    len(each.values.get("messages", ())),
                ]
                for each in graph.get_state_history(config(name))
            ]
            values = {**state.values}
            texts = [[each.type, each.id, each.content] for each in values.pop("messages", ())]
            waiting = [each.value for task in state.tasks for each in task.interrupts]
            found.append([name, values, texts, waiting, [*state.next], history])
    with AgentStateStore(directory) as store:
        items = [[[*item.namespace], item.key, item.value] for item in store.search((), limit=99)]
    return [found, sorted(items, key=str)]


@pytest.mark.parametrize("older", older_states("langgraph"), ids=name_of)
async def test_a_thread_of_an_older_version_goes_on(older: OlderState, tmp_path: Path) -> None:
    await check(older, tmp_path, write, read)


@pytest.mark.parametrize("older", older_states("langgraph"), ids=name_of)
def test_every_checkpoint_of_an_older_version_is_one_to_go_back_to(
    older: OlderState, tmp_path: Path
) -> None:
    older.unpack(tmp_path)
    with AgentStateSaver(tmp_path) as saver:
        graph = graph_on(saver)
        history = [*graph.get_state_history(config("of 1"))]
        assert history
        for each in history[:-1]:  # the first has no input yet
            graph.invoke(None, each.config)
            assert graph.get_state(config("of 1")).tasks[0].interrupts
