#!/usr/bin/env bash
# LangGraph 1.2.24: what a failed attempt of a node did to the state stays in it, and the saver decides whether it is stored.
#
# Guess before looking: `RetryPolicy` gives each attempt the state of the last checkpoint; what a node does not return is
# not in the result; and all savers store the same.
# Seen: all attempts get the same objects. A node that appends to a list, fails twice and then returns an update without that
# list leaves three entries in what `invoke` returns. `SqliteSaver` writes all values of the state and so stores them too.
# `InMemorySaver` writes the channels with a new version, this one got none, and stores the empty list: with it `invoke` and
# `get_state` disagree, and the next run on the thread begins without the entries. So the savers give two results for one graph.
# Met: comparing what a retry of a handler sees with what a restart of it sees.
#
# Output seen:
#   each attempt began with    [] | [1] | [1, 1]
#   InMemorySaver  returned [1, 1, 1]  stored []
#   each attempt began with    [] | [1] | [1, 1]
#   SqliteSaver    returned [1, 1, 1]  stored [1, 1, 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    langgraph==1.2.24 langgraph-checkpoint==4.3.2 langgraph-checkpoint-sqlite==3.1.2
"$folder/venv/bin/python" - <<'PYTHON'
from typing import Any, TypedDict

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import RetryPolicy


class Order(TypedDict):
    charges: list[int]
    status: str


def run(saver: Any) -> tuple[list[list[int]], list[int], list[int]]:
    begun: list[list[int]] = []

    def charge(order: Order) -> dict[str, str]:
        begun.append(list(order["charges"]))
        order["charges"].append(1)
        if len(begun) < 3:
            raise ConnectionError("no answer")
        return {"status": "paid"}

    graph = StateGraph(Order)
    graph.add_node("charge", charge, retry_policy=RetryPolicy(max_attempts=3, initial_interval=0.01))
    graph.add_edge(START, "charge")
    graph.add_edge("charge", END)
    app = graph.compile(checkpointer=saver)
    thread = {"configurable": {"thread_id": "1"}}
    returned = app.invoke({"charges": [], "status": "new"}, thread)
    stored = app.get_state(thread).values
    assert returned["status"] == stored["status"] == "paid"
    first = begun[:3]
    assert app.invoke({"status": "again"}, thread)["charges"] == [*stored["charges"], 1], "the next run began as stored"
    return first, returned["charges"], stored["charges"]


with SqliteSaver.from_conn_string(":memory:") as sqlite:
    for saver, expected in ((InMemorySaver(), []), (sqlite, [1, 1, 1])):
        begun, returned, stored = run(saver)
        print("each attempt began with   ", " | ".join(map(str, begun)))
        print(f"{type(saver).__name__:14} returned {returned}  stored {stored}")
        assert begun == [[], [1], [1, 1]], "version 1.2.24 gave each attempt the list of the one before"
        assert returned == [1, 1, 1], "version 1.2.24 returned the entries of all attempts"
        assert stored == expected, f"version 1.2.24 stored {expected}"
PYTHON
