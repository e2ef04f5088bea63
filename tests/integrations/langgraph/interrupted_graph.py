"""A graph with an interrupt and a subgraph, whose process dies after each of its writes.

``python interrupted_graph.py DIRECTORY`` runs it once to the end, and then for each n in a new
directory: a process that is killed with SIGKILL after its n-th write, and another that goes on.
Prints the state at the end of each as JSON.
"""

from __future__ import annotations

import json
import operator
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, interrupt

from agent_state_integrations.langgraph import AgentStateSaver

CONFIG: Any = {"configurable": {"thread_id": "order 66"}}


class OrderState(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    steps: Annotated[int, operator.add]
    answer: str


class MortalSaver(AgentStateSaver):
    """Kills its process after so many writes."""

    lives = -1

    def put(self, *args: Any, **kwargs: Any) -> Any:
        stored = super().put(*args, **kwargs)
        self._die()
        return stored

    def put_writes(self, *args: Any, **kwargs: Any) -> None:
        super().put_writes(*args, **kwargs)
        self._die()

    def _die(self) -> None:
        self.lives -= 1
        if self.lives == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def draft(state: OrderState) -> Any:
    return {"messages": [AIMessage("a draft", id="draft")], "steps": 1}


def ask(state: OrderState) -> Any:
    return {"answer": interrupt("send it?"), "steps": 1}


def collect(state: OrderState) -> Any:
    return {"messages": [AIMessage("collected", id="collected")], "steps": 1}


def send(state: OrderState) -> Any:
    return {"messages": [AIMessage(f"sent: {state['answer']}", id="sent")], "steps": 1}


def graph_on(saver: AgentStateSaver) -> Any:
    review = StateGraph(OrderState)
    review.add_node("draft", draft)
    review.add_node("ask", ask)
    review.add_edge(START, "draft")
    review.add_edge("draft", "ask")
    review.add_edge("ask", END)
    order = StateGraph(OrderState)
    order.add_node("collect", collect)
    order.add_node("review", review.compile())
    order.add_node("send", send)
    order.add_edge(START, "collect")
    order.add_edge("collect", "review")
    order.add_edge("review", "send")
    order.add_edge("send", END)
    return order.compile(checkpointer=saver)


def drive(directory: Path, lives: int) -> dict[str, Any]:
    """Run the graph from where it is to its end."""
    with MortalSaver(directory) as saver:
        saver.lives = lives
        graph = graph_on(saver)
        while True:
            state = graph.get_state(CONFIG)
            values = state.values
            work: Any = None
            if state.created_at is None:
                work = {"messages": [HumanMessage("hello", id="hello")], "steps": 0}
            elif any(task.interrupts for task in state.tasks):
                work = Command(resume="yes")
            elif "sent" in [message.id for message in values.get("messages", ())]:
                texts = [message.content for message in values["messages"]]
                return {"messages": texts, "steps": values["steps"], "answer": values["answer"]}
            # After the writes of a step, and before its checkpoint, `next` is empty too.
            graph.invoke(work, CONFIG, durability="sync")


def child(directory: Path, lives: int, result: Path) -> int:
    """``drive`` in a process of its own; its exit status, negative if it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            result.write_text(json.dumps(drive(directory, lives)))
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(directory: Path) -> None:
    result = directory / "result.json"
    ends, lives = [], 0
    while True:
        where = directory / str(lives)
        status = child(where, lives or -1, result)
        if lives and status == -signal.SIGKILL:
            status = child(where, -1, result)
            ended = False
        else:
            ended = lives > 0  # it needs no more writes than that
        if status:
            sys.exit(f"after {lives} writes: status {status}")
        ends.append(json.loads(result.read_text()))
        if ended:
            break
        lives += 1
    json.dump(ends, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
