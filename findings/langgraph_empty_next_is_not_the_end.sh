#!/usr/bin/env bash
# langgraph 1.2.24, langgraph-checkpoint-sqlite 3.1.2: after a crash `get_state().next` can be empty though nodes have yet to run.
#
# Guess before looking: `next` names the nodes that have yet to run, so a thread with an empty `next` is finished, and a program that
# starts again may leave it alone.
# Seen: with durability="sync", in a process that dies after a node's results were stored and before the checkpoint that takes them
# in, `next` is (), also in the midst of a graph: here `send` never ran. The values have the node's results already, so the state
# looks like that of a graph that has ended. `invoke(None, config)` goes on: it runs `send`, and `prepare` not again. `tasks` tells the
# two apart: it has the node with its result before the end, and is empty after it.
# Met: a test that kills the process after each write of a graph took such threads for finished.
#
# Output seen:
#                            next         tasks                    values
#   before prepare           ('prepare',) prepare, no result       {'log': ['received']}
#   after its results        ()           prepare, with a result   {'log': ['received', 'prepared']}
#   after invoke(None)       ()                                    {'log': ['received', 'prepared', 'sent']}
#   runs: prepare send
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check langgraph==1.2.24 langgraph-checkpoint-sqlite==3.1.2
cd "$folder"
cat >graph.py <<'PYTHON'
import operator
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, TypedDict

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph

CONFIG = {"configurable": {"thread_id": "order"}}


class Order(TypedDict):
    log: Annotated[list[str], operator.add]


class MortalSaver(SqliteSaver):
    """Its process is killed once the results of a node are stored, before the checkpoint with them."""

    mortal = False

    def put_writes(self, config, writes, task_id, task_path=""):
        super().put_writes(config, writes, task_id, task_path)
        if self.mortal:
            os.kill(os.getpid(), signal.SIGKILL)


def note(name: str) -> None:
    with open("runs.txt", "a") as runs:
        runs.write(f"{name}\n")


def prepare(state: Order) -> dict[str, list[str]]:
    note("prepare")
    return {"log": ["prepared"]}


def send(state: Order) -> dict[str, list[str]]:
    note("send")
    return {"log": ["sent"]}


def show(title, graph):
    state = graph.get_state(CONFIG)
    tasks = ", ".join(f"{task.name}, {'with a' if task.result else 'no'} result" for task in state.tasks)
    print(f"{title:24} {state.next!s:12} {tasks:24} {state.values}")
    return state


with MortalSaver.from_conn_string("state.db") as saver:
    builder = StateGraph(Order)
    builder.add_node("prepare", prepare)
    builder.add_node("send", send)
    builder.add_edge(START, "prepare")
    builder.add_edge("prepare", "send")
    builder.add_edge("send", END)
    if sys.argv[1] == "begin":
        graph = builder.compile(checkpointer=saver, interrupt_before=["prepare"])
        graph.invoke({"log": ["received"]}, CONFIG, durability="sync")
        print(f"{'':24} {'next':12} {'tasks':24} values")
        assert show("before prepare", graph).next == ("prepare",)
        sys.stdout.flush()
        saver.mortal = True
        graph.invoke(None, CONFIG, durability="sync")
    graph = builder.compile(checkpointer=saver)
    state = show("after its results", graph)
    assert state.next == () and state.values == {"log": ["received", "prepared"]}, "next names what has yet to run"
    assert [task.result for task in state.tasks] == [{"log": ["prepared"]}]
    graph.invoke(None, CONFIG, durability="sync")
    state = show("after invoke(None)", graph)
    assert state.next == () and state.tasks == () and state.values == {"log": ["received", "prepared", "sent"]}
    runs = Path("runs.txt").read_text().split()
    print("runs:", *runs)
    assert runs == ["prepare", "send"]
PYTHON
status=0
venv/bin/python -W error graph.py begin || status=$?
[ "$status" -eq 137 ] # killed
venv/bin/python -W error graph.py again
