"""The end of an attempt claims the agent's next task in the same commit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent_state import (
    AgentState,
    AsyncAgentSessionManager,
    MemoryStateStore,
    RateLimit,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.protocols import Check
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    RecordingStore,
    TroubledStore,
    counting,
    make_runtime,
    puts,
    with_agent,
    working,
)


def _what(store: RecordingStore) -> list[list[str]]:
    """The kinds of the documents of each commit, without its checks."""
    return [
        sorted(change.kind for change in changes if not isinstance(change, Check))
        for changes in store.commits
    ]


async def test_a_queue_is_worked_off_with_one_commit_for_each_task_and_one_for_the_first() -> None:
    store = RecordingStore()
    runtime = make_runtime(store)
    seen: list[str] = []
    working(runtime, seen)
    await with_agent(runtime)
    gate = asyncio.Event()

    @runtime.task("wait", agent_type="worker")
    async def wait(ctx: TaskContext) -> None:
        await gate.wait()

    first = await runtime.tasks.submit("alice", "wait")
    tasks = [await runtime.tasks.submit("alice", f"task-{n}") for n in range(4)]
    await until(lambda: runtime.runner.running_handlers == 1)
    store.commits.clear()
    gate.set()
    for task in [first, *tasks]:
        await soon(runtime.tasks.result(task))
    assert seen == [f"alice/task-{n}" for n in range(4)]
    assert _what(store) == [["agents", "tasks", "tasks"]] * 4 + [["agents", "tasks"]]
    stored = [await runtime.tasks.get(task) for task in tasks]
    assert [(task.status, task.attempts, task.lease) for task in stored] == [
        ("completed", 1, None)
    ] * 4
    agent = await runtime.manager.load("agents", "alice")
    assert isinstance(agent, AgentState)
    assert agent.status == "idle"
    await runtime.stop()


async def _with_two(
    store: MemoryStateStore, clock: FakeClock | None = None, *, second_hangs: bool = False
) -> tuple[AsyncAgentSessionManager, Task, Task, list[str]]:
    """A runtime whose agent ends the task ``first``, and has ``second`` to do next."""
    runtime = make_runtime(store, clock)
    seen: list[str] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        seen.append(task.name)
        if task.name == "first":
            await gate.wait()
        elif second_hangs:
            await asyncio.Event().wait()
        return ctx.attempt

    gate = asyncio.Event()
    await with_agent(runtime)
    first = await runtime.tasks.submit("alice", "first")
    second = await runtime.tasks.submit("alice", "second")
    await until(lambda: seen == ["first"])
    gate.set()
    return runtime, first, second, seen


async def test_a_task_that_is_cancelled_while_it_is_claimed_ends() -> None:
    store = TroubledStore()
    store.hold = puts("tasks", '"status":"completed"')
    runtime, first, second, _ = await _with_two(store, second_hangs=True)
    await soon(store.held.wait())
    cancelling = asyncio.create_task(runtime.tasks.cancel(second))
    await asyncio.sleep(0)
    store.gate.set()
    assert await soon(cancelling)
    assert await soon(runtime.tasks.result(first)) == 1
    with pytest.raises(TaskFailedError, match="cancelled"):
        await soon(runtime.tasks.result(second))
    assert (await runtime.tasks.get(second)).status == "cancelled"
    await runtime.stop()


async def test_a_stop_while_it_is_claimed_gives_it_back_uncounted() -> None:
    store = TroubledStore()
    store.hold = puts("tasks", '"status":"completed"')
    runtime, first, second, seen = await _with_two(store)
    await soon(store.held.wait())
    stopping = asyncio.create_task(runtime.stop())
    await asyncio.sleep(0)
    store.gate.set()
    await soon(stopping)
    assert seen == ["first"]
    again = make_runtime(store, name="again")
    counting(again)
    await again.start()
    assert await soon(again.tasks.result(second)) == 1
    assert (await again.tasks.get(first)).status == "completed"
    task = await again.tasks.get(second)
    assert (task.attempts, task.interruptions) == (1, 0)
    await again.stop()


async def test_an_edit_of_the_next_task_does_not_keep_the_end_from_being_stored() -> None:
    store = TroubledStore()
    store.hold = puts("tasks", '"status":"completed"')
    runtime, first, second, _ = await _with_two(store)
    await soon(store.held.wait())
    # A person edits the second task, and the commit that is to claim it is refused.
    stored = await runtime.manager.load("tasks", ("alice", second.task_id))
    assert stored is not None
    edited = {**stored.model_dump(), "payload": {"edited": True}}
    await runtime.manager.save("tasks", ("alice", second.task_id), edited)
    store.gate.set()
    assert await soon(runtime.tasks.result(first)) == 1
    assert await soon(runtime.tasks.result(second)) == 1
    done = await runtime.tasks.get(second)
    assert (done.payload, done.attempts) == ({"edited": True}, 1)
    assert (await runtime.tasks.get(first)).attempts == 1
    await runtime.stop()


async def test_both_go_on_after_a_commit_of_which_nobody_knows_whether_it_was_made() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    store.unknown = puts("tasks", '"status":"completed"')
    runtime, first, second, seen = await _with_two(store, clock)
    while not seen[1:]:
        await clock.advance(1)
    assert await soon(runtime.tasks.result(first)) == 1
    assert await soon(runtime.tasks.result(second)) == 1
    assert seen == ["first", "second"]
    assert (await runtime.tasks.get(second)).attempts == 1
    await runtime.stop()


async def test_a_process_that_dies_after_it_leaves_a_task_that_the_next_one_does() -> None:
    store = RecordingStore()
    runtime, first, second, seen = await _with_two(store, second_hangs=True)
    await until(lambda: "second" in seen)
    assert _what(store)[-1] == ["agents", "tasks", "tasks"]
    await runtime.abort()
    again = make_runtime(store, name="again")
    counting(again)
    await again.start()
    assert (await again.tasks.get(first)).status == "completed"
    assert await soon(again.tasks.result(second)) == 2
    assert (await again.tasks.get(second)).interruptions == 1
    await again.stop()


@pytest.mark.parametrize(
    "limited",
    [{"concurrency": 1}, {"rate_limits": [RateLimit("calls", 1, per_seconds=60)]}],
    ids=["concurrency", "rate"],
)
async def test_a_task_that_may_have_to_wait_is_not_claimed_with_it(limited: Any) -> None:
    store = RecordingStore()
    runtime = make_runtime(store)
    gate = asyncio.Event()

    @runtime.task("first", agent_type="worker")
    async def first(ctx: TaskContext) -> None:
        await gate.wait()

    @runtime.task("second", agent_type="worker", **limited)
    async def second(ctx: TaskContext) -> str:
        return "done"

    await with_agent(runtime)
    await runtime.tasks.submit("alice", "first")
    task = await runtime.tasks.submit("alice", "second")
    await until(lambda: runtime.runner.running_handlers == 1)
    gate.set()
    assert await soon(runtime.tasks.result(task)) == "done"
    assert ["agents", "tasks", "tasks"] not in _what(store)
    await runtime.stop()
