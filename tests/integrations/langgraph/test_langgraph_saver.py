"""LangGraph's checkpoints in a state directory: what its conformance suite leaves out."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.types import INTERRUPT, _DeltaSnapshot
from langgraph.graph import START, StateGraph

from agent_state import StateCorruptedError, StatePersistenceManager
from agent_state_integrations.langgraph import AgentStateSaver, CheckpointConflictError
from tests.integrations.langgraph.savers import STATES, checkpoint_with, config_of, put, saver_on

PROGRAM = Path(__file__).with_name("interrupted_graph.py")
HOSTILE = [
    "",
    "..",
    "a/b",
    "a",
    "A",
    "con",
    "x" * 4000,
    "\u00e9",
    "e\u0301",
    "\0",
    "日本",
    "a.json",
]


@pytest.fixture(params=STATES)
async def saver(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AgentStateSaver]:
    async with saver_on(request.param, tmp_path) as made:
        yield made


@pytest.mark.parametrize("state", STATES)
async def test_it_conforms_with_every_capability(state: str, tmp_path: Path) -> None:
    numbers = iter(range(100))

    @checkpointer_test(name=state)
    async def made() -> AsyncIterator[AgentStateSaver]:
        async with saver_on(state, tmp_path / str(next(numbers))) as one:
            yield one

    report = await validate(made)

    assert {name: each.failures for name, each in report.results.items() if not each.passed} == {}
    assert len(report.results) >= 8
    assert sum(each.tests_passed for each in report.results.values()) >= 81


async def test_every_value_comes_back_as_it_was(saver: AgentStateSaver) -> None:
    values = {
        "json": {"b": [1, {"z": None, "a": 1.5}], "a": "ä"},
        "messages": [HumanMessage("one", id="1"), HumanMessage("two", id="2")],
        "mixed": [1, b"\x00\xff", {"typed": ["json", 1]}, [], {"order": 1}, float("inf")],
        "bytes": b"\x00",
        "none": None,
        "empty": [],
        "set": {1, 2},
        "numbers": {1: "int key"},
    }

    stored = await put(saver, config_of("t"), values, 1, score=1.5)

    found = await saver.aget_tuple(stored)
    assert found is not None
    assert found.checkpoint["channel_values"] == values
    assert [*found.checkpoint["channel_values"]["json"]] == ["b", "a"]
    assert [*found.checkpoint["channel_values"]["json"]["b"][1]] == ["z", "a"]
    assert found.metadata["score"] == 1.5


async def test_changing_what_was_put_or_read_changes_nothing_stored(saver: AgentStateSaver) -> None:
    values: dict[str, Any] = {"list": [{"n": 1}], "dict": {"n": [1]}}
    stored = await put(saver, config_of("t"), values, 1)
    values["list"][0]["n"] = values["dict"]["n"] = "changed"
    read = await saver.aget_tuple(stored)
    assert read is not None
    read.checkpoint["channel_values"]["list"].append("changed")
    read.checkpoint["channel_versions"].clear()

    again = await saver.aget_tuple(stored)

    assert again is not None
    assert again.checkpoint["channel_values"] == {"list": [{"n": 1}], "dict": {"n": [1]}}
    assert again.checkpoint["channel_versions"]


@pytest.mark.parametrize("state", ["directory", "exclusive"])
async def test_every_version_of_a_growing_list_is_kept(state: str, tmp_path: Path) -> None:
    """Branches too: two checkpoints go on from one."""
    expected = {}
    async with saver_on(state, tmp_path) as saver:
        config, messages = config_of("t"), list[Any]()
        for step in range(60):
            messages = [*messages, {"n": step, "text": "x" * 50}]
            config = await put(saver, config, {"messages": messages}, step)
            expected[config["configurable"]["checkpoint_id"]] = messages
            if step == 30:
                branch = await put(saver, config, {"messages": [*messages, "b"]}, 1000)
                expected[branch["configurable"]["checkpoint_id"]] = [*messages, "b"]
        shorter = await put(saver, config, {"messages": messages[:3]}, 2000)
        expected[shorter["configurable"]["checkpoint_id"]] = messages[:3]

    async with AgentStateSaver(tmp_path) as another:
        found = {
            each.checkpoint["id"]: each.checkpoint["channel_values"]["messages"]
            async for each in another.alist(config_of("t"))
        }
    assert found == expected


async def test_a_thread_of_n_steps_takes_space_in_proportion_to_n(tmp_path: Path) -> None:
    async def bytes_of(steps: int) -> int:
        directory = tmp_path / str(steps)
        async with StatePersistenceManager(directory, durability="os") as manager:
            saver, config, messages = AgentStateSaver(manager), config_of("t"), list[Any]()
            for step in range(steps):
                messages = [*messages, HumanMessage(f"message {step}", id=str(step))]
                config = await put(saver, config, {"messages": messages}, step)
        return sum(path.stat().st_size for path in directory.rglob("checkpoints.jsonl"))

    assert await bytes_of(400) < 2.5 * await bytes_of(200)


async def test_what_is_json_is_stored_as_json(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as saver:
        await put(saver, config_of("t"), {"plan": ["read", "write"], "raw": b"\x01"}, 1)

    [line] = (tmp_path / "langgraph_threads" / "t" / "checkpoints.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["values"] == {
        "plan": {"items": ["read", "write"]},
        "raw": {"typed": ["bytes", "AQ=="]},
    }


async def test_a_fork_stores_no_value_again(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as saver:
        stored = await put(saver, config_of("t"), {"plan": "x" * 5000}, 1)
        fork = checkpoint_with({"plan": "x" * 5000}, 1)
        config = await saver.aput(stored, fork, {"source": "fork", "step": 2, "parents": {}}, {})
        found = await saver.aget_tuple(config)

    assert found is not None
    assert found.checkpoint["channel_values"] == {"plan": "x" * 5000}
    log = tmp_path / "langgraph_threads" / "t" / "checkpoints.jsonl"
    assert log.stat().st_size < 8000


async def test_with_a_serializer_of_ones_own_nothing_is_plain(tmp_path: Path) -> None:
    class Reverse:
        def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
            return "reverse", plaintext[::-1]

        def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
            return ciphertext[::-1]

    values = {"secret": "swordfish", "list": ["swordfish"]}
    async with AgentStateSaver(tmp_path, serde=EncryptedSerializer(Reverse())) as saver:
        config = await put(saver, config_of("t"), values, 1, user="swordfish")
        await saver.aput_writes(config, [("list", "swordfish")], "task")
        found = await saver.aget_tuple(config)

    assert found is not None
    assert found.checkpoint["channel_values"] == values
    text = (tmp_path / "langgraph_threads" / "t" / "checkpoints.jsonl").read_text()
    assert "swordfish" not in text


async def test_pending_writes_come_in_the_order_in_which_they_apply(
    saver: AgentStateSaver,
) -> None:
    config = await put(saver, config_of("t"), {}, 1)
    await saver.aput_writes(config, [("ch", "last")], "a task", "~p2")
    await saver.aput_writes(config, [("ch", 1), ("ch", 2)], "z task", "~p1")
    await saver.aput_writes(config, [(INTERRUPT, "first")], "z task", "~p1")
    await saver.aput_writes(config, [(INTERRUPT, "again")], "z task", "~p1")
    await saver.aput_writes(config, [("ch", "ignored")], "z task", "~p1")

    found = await saver.aget_tuple(config)

    assert found is not None
    assert found.pending_writes == [
        ("z task", INTERRUPT, "again"),
        ("z task", "ch", 1),
        ("z task", "ch", 2),
        ("a task", "ch", "last"),
    ]


async def test_every_thread_id_is_a_thread_of_its_own(saver: AgentStateSaver) -> None:
    for number, thread_id in enumerate(HOSTILE):
        await put(saver, config_of(thread_id, "ns|a:b/../c"), {"n": number}, 1)

    for number, thread_id in enumerate(HOSTILE):
        found = await saver.aget_tuple(config_of(thread_id, "ns|a:b/../c"))
        assert found is not None
        assert found.checkpoint["channel_values"] == {"n": number}
    everything = [each async for each in saver.alist(None)]
    assert {each.config["configurable"]["thread_id"] for each in everything} == {*HOSTILE}


async def test_a_thread_id_that_is_a_number_is_text(saver: AgentStateSaver) -> None:
    stored = await put(saver, {"configurable": {"thread_id": 7}}, {}, 1)

    assert set(stored["configurable"]) == {"thread_id", "checkpoint_ns", "checkpoint_id"}
    assert await saver.aget_tuple(config_of("7")) is not None
    await saver.adelete_thread(7)  # type: ignore[arg-type]  # LangGraph passes ids on as they are
    assert await saver.aget_tuple(config_of("7")) is None


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (0, 0), (-1, 0), (2, 2)])
async def test_limits(saver: AgentStateSaver, limit: int | None, count: int) -> None:
    for step in range(3):
        await put(saver, config_of("t"), {}, step)

    found = [each async for each in saver.alist(config_of("t"), before=config_of("t"), limit=limit)]

    assert len(found) == count


async def test_a_checkpoint_of_an_older_version_comes_back(saver: AgentStateSaver) -> None:
    old: Any = checkpoint_with({"ch": "x"}, 1)
    old |= {"v": 1, "pending_sends": [["node", b"\x01"]], "ts": "2024-01-01T00:00:00+00:00"}
    del old["updated_channels"]

    stored = await saver.aput(config_of("t"), old, {}, old["channel_versions"])

    found = await saver.aget_tuple(stored)
    assert found is not None
    assert found.checkpoint == old


# -- several writers --------------------------------------------------------------------------


async def test_of_two_processes_on_one_thread_one_wins(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as one, AgentStateSaver(tmp_path) as other:
        await put(one, config_of("t"), {"n": 1}, 1)
        heads = [await each.aget_tuple(config_of("t")) for each in (one, other)]
        config = heads[0].config  # type: ignore[union-attr]  # it is there
        await one.aput_writes(config, [("n", 2)], "task")
        with pytest.raises(CheckpointConflictError):
            await other.aput_writes(config, [("n", 3), ("m", 3)], "task")
        first = await put(one, config, {"n": 2}, 2)
        refused = checkpoint_with({"n": 3}, 3)
        with pytest.raises(CheckpointConflictError, match="another process has gone on"):
            await other.aput(config, refused, {}, refused["channel_versions"])
        with pytest.raises(CheckpointConflictError):  # nothing grows on what was refused
            await put(other, config_of("t", "", refused["id"]), {"n": 4}, 4)

        for saver in (one, other):
            found = [each async for each in saver.alist(config_of("t"))]
            assert [each.checkpoint["channel_values"]["n"] for each in found] == [2, 1]
            assert found[1].pending_writes == [("task", "n", 2)]
        newest = await other.aget_tuple(config_of("t"))
        assert newest is not None
        assert newest.config == first
        await put(other, newest.config, {"n": 5}, 5)  # having read it again, it goes on


async def test_of_two_graphs_on_one_thread_one_gets_a_typed_error(tmp_path: Path) -> None:
    gate, waiting = asyncio.Event(), asyncio.Event()

    def graph_on(saver: AgentStateSaver, name: str, wait: bool) -> Any:
        async def node(state: Any) -> Any:
            if wait:
                waiting.set()
                await gate.wait()
            return {"log": [*state["log"], name]}

        builder = StateGraph(dict)
        builder.add_node("node", node)
        builder.add_edge(START, "node")
        return builder.compile(checkpointer=saver)

    config: Any = {"configurable": {"thread_id": "t"}}
    async with AgentStateSaver(tmp_path) as one, AgentStateSaver(tmp_path) as other:
        # Its first checkpoint is stored before its node begins.
        slow = asyncio.create_task(
            graph_on(one, "slow", True).ainvoke({"log": []}, config, durability="sync")
        )
        await waiting.wait()
        assert (await graph_on(other, "fast", False).ainvoke({"log": []}, config))["log"] == [
            "fast"
        ]
        gate.set()
        with pytest.raises(CheckpointConflictError):
            await slow

        newest = await one.aget_tuple(config)
    assert newest is not None
    assert newest.checkpoint["channel_values"]["__root__"] == {"log": ["fast"]}


async def test_going_back_to_an_earlier_checkpoint_is_no_conflict(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as one, AgentStateSaver(tmp_path) as other:
        first = await put(one, config_of("t"), {"n": 1}, 1)
        await put(one, first, {"n": 2}, 2)
        assert await other.aget_tuple(first) is not None

        await put(other, first, {"n": 3}, 3)

        assert len([each async for each in one.alist(config_of("t"))]) == 3


def test_eight_processes_write_at_once(tmp_path: Path) -> None:
    program = f"""
import sys
from langgraph.checkpoint.base import empty_checkpoint
from agent_state_integrations.langgraph import AgentStateSaver
me = sys.argv[1]
with AgentStateSaver({str(tmp_path)!r}) as saver:
    shared = {{"configurable": {{"thread_id": "all", "checkpoint_ns": "", "checkpoint_id": "1"}}}}
    for n in range(10):
        saver.put({{"configurable": {{"thread_id": me}}}}, empty_checkpoint(), {{"step": n}}, {{}})
        saver.put_writes(shared, [("ch", n)], f"{{me}}-{{n}}")
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(number)]) for number in range(8)
    ]
    assert [writer.wait() for writer in writers] == [0] * 8

    with AgentStateSaver(tmp_path) as saver:
        checkpoint = {**checkpoint_with({}, 1), "id": "1"}
        saver.put(config_of("all"), checkpoint, {}, {})
        found = saver.get_tuple(config_of("all"))
        assert found is not None
        assert len(found.pending_writes or ()) == 80
        for number in range(8):
            steps = [each.metadata["step"] for each in saver.list(config_of(str(number)))]
            assert steps == [*range(9, -1, -1)]


@pytest.mark.long("a process for each write of a graph")
def test_a_graph_goes_on_after_kill_9_at_every_write(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    ends = json.loads(done.stdout)
    expected = {
        "messages": ["hello", "collected", "a draft", "sent: yes"],
        "answer": "yes",
        "steps": 5,
    }
    assert len(ends) > 10
    assert [end for end in ends if end != expected] == []


async def test_a_cancelled_put_is_whole(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as saver:
        writing = asyncio.create_task(put(saver, config_of("t"), {"n": 1}, 1))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        found = await saver.aget_tuple(config_of("t"))
        assert found is None or found.checkpoint["channel_values"] == {"n": 1}
        await put(saver, config_of("t"), {"n": 2}, 2)

    async with AgentStateSaver(tmp_path) as saver:
        found = await saver.aget_tuple(config_of("t"))
        assert found is not None
        assert found.checkpoint["channel_values"] == {"n": 2}


async def test_a_put_that_fails_stores_nothing(saver: AgentStateSaver) -> None:
    config = await put(saver, config_of("t"), {"n": 1}, 1)
    with pytest.raises(TypeError):
        await put(saver, config, {"n": object()}, 2)

    assert len([each async for each in saver.alist(config_of("t"))]) == 1


async def test_a_damaged_record_is_reported_by_what_needs_it(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as saver:
        config = await put(saver, config_of("t"), {"list": [1], "other": "o"}, 1)
        for step in (2, 3):
            config = await put(saver, config, {"list": [*range(1, step + 1)]}, step)
        last = await put(saver, config, {"list": ["new"]}, 4)
    log = tmp_path / "langgraph_threads" / "t" / "checkpoints.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"{damaged\n", *lines[2:]]))

    async with AgentStateSaver(tmp_path) as saver:
        with pytest.raises(StateCorruptedError, match="list is damaged"):
            await saver.aget_tuple(config)
        found = await saver.aget_tuple(last)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"list": ["new"]}


# -- deleting and pruning -----------------------------------------------------------------------


async def test_pruning_keeps_what_delta_channels_are_rebuilt_from(saver: AgentStateSaver) -> None:
    counted = {"counters_since_delta_snapshot": {"items": [1, 1]}}
    await put(saver, config_of("t"), {"items": _DeltaSnapshot(["old"])}, 1, **counted)
    config = await put(saver, config_of("t"), {"items": _DeltaSnapshot(["a"])}, 2, **counted)
    for step in (3, 4):
        await saver.aput_writes(config, [("items", [step])], f"task {step}")
        config = await put(saver, config, {}, step, **counted)
    before = await saver.aget_delta_channel_history(config=config, channels=["items", "none"])

    await saver.aprune(["t"])

    assert len([each async for each in saver.alist(config_of("t"))]) == 3
    after = await saver.aget_delta_channel_history(config=config, channels=["items", "none"])
    assert after == before
    assert after["items"]["writes"] == [("task 3", "items", [3]), ("task 4", "items", [4])]
    assert after["items"]["seed"].value == ["a"]
    assert after["none"] == {"writes": []}


async def test_a_pruned_thread_goes_on_in_every_process(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as one, AgentStateSaver(tmp_path) as other:
        config = config_of("t")
        for step in range(5):
            config = await put(one, config, {"list": [*range(step)]}, step)
        assert await other.aget_tuple(config_of("t")) is not None
        await one.aprune(["t"])

        config = await put(other, config, {"list": [*range(6)]}, 6)

        for saver in (one, other):
            found = [each async for each in saver.alist(config_of("t"))]
            lists = [each.checkpoint["channel_values"]["list"] for each in found]
            assert lists == [[*range(6)], [*range(4)]]
    logs = [path.name for path in (tmp_path / "langgraph_threads" / "t").iterdir()]
    assert logs == ["checkpoints-1.jsonl"]


async def test_a_deleted_thread_that_a_process_goes_on_with_is_whole(tmp_path: Path) -> None:
    async with AgentStateSaver(tmp_path) as one, AgentStateSaver(tmp_path) as other:
        config = await put(one, config_of("t"), {"list": [1], "big": "x"}, 1)
        await other.adelete_thread("t")
        assert not [*(tmp_path / "langgraph_threads").rglob("*.jsonl")]

        grown = checkpoint_with({"list": [1, 2], "big": "x"}, 2)
        grown["channel_versions"]["big"] = f"{1:032}.1"
        await one.aput(config, grown, {}, {"list": grown["channel_versions"]["list"]})

        for saver in (one, other):
            found = await saver.aget_tuple(config_of("t"))
            assert found is not None
            assert found.checkpoint["channel_values"] == {"list": [1, 2], "big": "x"}


@pytest.mark.long("10,000 checkpoints")
async def test_ten_thousand_checkpoints(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        saver, config = AgentStateSaver(manager), config_of("t")
        for step in range(10_000):
            config = await put(saver, config, {"n": step}, step)
        found = [each async for each in saver.alist(config_of("t"), limit=2)]

    assert [each.checkpoint["channel_values"]["n"] for each in found] == [9_999, 9_998]
    async with AgentStateSaver(tmp_path) as saver:
        newest = await saver.aget_tuple(config_of("t"))
        assert newest is not None
        assert newest.checkpoint["channel_values"]["n"] == 9_999
        assert len([each async for each in saver.alist(config_of("t"), filter={"step": 7})]) == 1
