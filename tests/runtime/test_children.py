"""Tasks that wait for the results of other tasks."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    Task,
    TaskContext,
    TaskFailedError,
    TaskTimeoutError,
)
from agent_state.protocols import Notice
from agent_state.runtime import transitions
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import TroubledStore, counted, make_runtime, puts, with_agent

AT_ONCE = RetryPolicy(base_seconds=0.0, jitter=0.0)


class Total(BaseModel):
    total: int


def adding(runtime: AsyncAgentSessionManager, ran: list[str] | None = None) -> None:
    """Register a parent that adds up what its children return, and the children."""
    ran = [] if ran is None else ran

    @runtime.task("add", agent_type="worker")
    async def add(ctx: TaskContext, task: Task) -> int:
        ran.append("add")
        children = [
            await ctx.submit(task.payload.get("to", ctx.agent_id), "number", {"n": number})
            for number in task.payload["numbers"]
        ]
        ctx.memory["submitted"] = len(children)
        return sum(await ctx.results(children))

    @runtime.task("number", agent_type="worker")
    async def number(ctx: TaskContext, task: Task) -> int:
        ran.append(f"number {task.payload['n']}")
        return int(task.payload["n"])


async def test_a_parent_waits_for_its_children_of_the_same_agent() -> None:
    runtime = make_runtime()
    ran: list[str] = []
    adding(runtime, ran)
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "add", {"numbers": [1, 2, 3]})
    assert await runtime.tasks.result(task) == 6
    assert ran[0] == ran[-1] == "add"
    assert sorted(ran[1:-1]) == ["number 1", "number 2", "number 3"]
    done = await runtime.tasks.get(task)
    assert (done.attempts, done.waits_for) == (1, [])
    assert len(runtime.tasks.waiters) == 0
    await runtime.stop()


async def test_a_parent_that_waits_occupies_neither_its_agent_nor_the_runtime() -> None:
    runtime = make_runtime()
    gate = asyncio.Event()
    adding(runtime)

    @runtime.task("number", agent_type="slow")
    async def slow(ctx: TaskContext, task: Task) -> int:
        await gate.wait()
        return 5

    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="slow")
    parents = [
        await runtime.tasks.submit("alice", "add", {"numbers": [1], "to": "bob"}) for _ in range(50)
    ]
    quick = await runtime.tasks.submit("alice", "number", {"n": 9})
    assert await runtime.tasks.result(quick) == 9
    for parent in parents:
        stored = await runtime.tasks.get(parent)
        assert (stored.status, stored.attempts, len(stored.waits_for)) == ("pending", 0, 1)
    assert runtime.agents.get("alice").context.working_memory == {"submitted": 1}
    gate.set()
    assert [await runtime.tasks.result(parent) for parent in parents] == [5] * 50
    await runtime.wait_idle()
    await runtime.stop()


async def test_grandchildren_of_the_same_agent_do_not_deadlock() -> None:
    runtime = make_runtime()

    @runtime.task("fib", agent_type="worker")
    async def fib(ctx: TaskContext, task: Task) -> int:
        n = task.payload["n"]
        if n < 2:
            return int(n)
        first = await ctx.submit("alice", "fib", {"n": n - 1})
        second = await ctx.submit("alice", "fib", {"n": n - 2})
        return int(await ctx.result(first)) + int(await ctx.result(second))

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "fib", {"n": 7})
    assert await runtime.tasks.result(task) == 13
    await runtime.stop()


async def test_children_may_be_awaited_side_by_side() -> None:
    runtime = make_runtime()
    adding(runtime)

    @runtime.task("both", agent_type="worker")
    async def both(ctx: TaskContext) -> list[int]:
        children = [await ctx.submit("alice", "number", {"n": n}) for n in (1, 2)]
        return list(await asyncio.gather(*map(ctx.result, children)))

    await with_agent(runtime)
    assert await runtime.tasks.result(await runtime.tasks.submit("alice", "both")) == [1, 2]
    await runtime.stop()


@pytest.mark.parametrize("asked", ["result", "sleep", "result with a time"])
async def test_a_task_group_ends_the_attempt_as_the_handler_itself_does(asked: str) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=AT_ONCE)
    adding(runtime)

    @runtime.task("both", agent_type="worker")
    async def both(ctx: TaskContext) -> list[int]:
        children = [await ctx.submit("alice", "number", {"n": n}) for n in (1, 2)]
        async with asyncio.TaskGroup() as inner, asyncio.TaskGroup() as group:
            if asked == "sleep" and not ctx.memory.setdefault("slept", 0):
                ctx.memory["slept"] += 1
                inner.create_task(ctx.sleep(seconds=60))
            seconds = 1000 if asked == "result with a time" else None
            waits = [
                group.create_task(ctx.result(each, int, timeout_seconds=seconds))
                for each in children
            ]
        return [each.result() for each in waits]

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "both")
    await clock.advance(61)
    assert await soon(runtime.tasks.result(task)) == [1, 2]
    done = await runtime.tasks.get(task)
    assert (done.attempts, done.error) == (1, None)
    await runtime.stop()


async def test_an_error_beside_a_wait_in_a_task_group_fails_the_attempt() -> None:
    runtime = make_runtime(retry=AT_ONCE)
    adding(runtime)

    @runtime.task("both", agent_type="worker", max_attempts=1)
    async def both(ctx: TaskContext) -> None:
        async def clean_up() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ConnectionError("the line is gone")

        child = await ctx.submit("alice", "number", {"n": 1}, delay_seconds=60)
        async with asyncio.TaskGroup() as group:
            group.create_task(clean_up())
            await asyncio.sleep(0)
            group.create_task(ctx.result(child))

    await with_agent(runtime)
    with pytest.raises(TaskFailedError) as raised:
        await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "both")))
    group = raised.value.__cause__
    assert isinstance(group, ExceptionGroup)
    assert [type(error) for error in group.exceptions] == [ConnectionError]
    await runtime.stop()


async def test_the_result_of_a_child_is_of_the_type_of_its_annotation_or_of_the_callers() -> None:
    runtime = make_runtime()
    found: list[Any] = []

    @runtime.task("total", agent_type="worker")
    async def total(ctx: TaskContext) -> Total:
        return Total(total=4)

    @runtime.task("ask", agent_type="worker")
    async def ask(ctx: TaskContext) -> None:
        child = await ctx.submit("alice", "total")
        found.append(await ctx.result(child))
        found.append(await ctx.result(child, dict))
        found.append(await ctx.results([]))

    await with_agent(runtime)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "ask"))
    assert found == [Total(total=4), {"total": 4}, []]
    await runtime.stop()


@pytest.mark.parametrize("ends", ["dead", "cancelled"])
async def test_a_child_that_ends_without_a_result_is_an_error_of_its_parent(ends: str) -> None:
    runtime = make_runtime(retry=AT_ONCE)

    @runtime.task("child", agent_type="worker")
    async def child(ctx: TaskContext) -> None:
        if ends == "cancelled":
            await asyncio.Event().wait()
        raise ConnectionError("gone")

    @runtime.task("parent", agent_type="worker")
    async def parent(ctx: TaskContext) -> str:
        task = await ctx.submit("alice", "child", max_attempts=1)
        try:
            await ctx.result(task)
        except TaskFailedError as error:
            return error.status
        return "completed"

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "parent")
    if ends == "cancelled":
        agent = runtime.state.agents["alice"]
        await until(lambda: agent.current is not None and agent.current.task.name == "child")
        assert agent.current is not None
        await runtime.tasks.cancel(agent.current.task)
    assert await runtime.tasks.result(task) == ends
    await runtime.stop()


async def test_a_task_cannot_wait_for_itself_nor_for_one_that_waits_for_it() -> None:
    runtime = make_runtime(retry=AT_ONCE)

    @runtime.task("self", agent_type="worker", max_attempts=1)
    async def itself(ctx: TaskContext, task: Task) -> None:
        await ctx.result(task)

    @runtime.task("child", agent_type="worker", max_attempts=1)
    async def child(ctx: TaskContext, task: Task) -> None:
        await ctx.result(tuple(task.payload["parent"]))

    @runtime.task("parent", agent_type="worker", max_attempts=1)
    async def parent(ctx: TaskContext, task: Task) -> None:
        await ctx.result(
            await ctx.submit("alice", "child", {"parent": [task.agent_id, task.task_id]})
        )

    await with_agent(runtime)
    for name in ("self", "parent"):
        with pytest.raises(TaskFailedError, match="would wait for itself"):
            await runtime.tasks.result(await runtime.tasks.submit("alice", name))
    await runtime.stop()


async def test_two_tasks_that_begin_to_wait_for_one_another_at_once_both_end() -> None:
    """Neither sees the other's wait before its own is stored."""
    runtime = make_runtime(retry=AT_ONCE)
    both = asyncio.Barrier(2)
    first: dict[str, bool] = {}

    @runtime.task("wait", agent_type="worker", max_attempts=1)
    async def wait(ctx: TaskContext, task: Task) -> None:
        if not first.get(ctx.agent_id):
            first[ctx.agent_id] = True
            await both.wait()
        await ctx.result((task.payload["agent"], task.payload["task"]))

    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="worker")
    for agent in ("alice", "bob"):
        await runtime.agents.stop(agent)
    ids = {"alice": "id-0002", "bob": "id-0003"}
    tasks = [
        await runtime.tasks.submit(agent, "wait", {"agent": other, "task": ids[other]})
        for agent, other in (("alice", "bob"), ("bob", "alice"))
    ]
    assert [task.task_id for task in tasks] == [*ids.values()]
    for agent in ("alice", "bob"):
        await runtime.agents.start(agent)
    for task in tasks:
        with pytest.raises(TaskFailedError):
            await runtime.tasks.result(task)
    await runtime.stop()


@pytest.mark.parametrize("child_ends", ["before the restart", "after the restart"])
async def test_a_parent_goes_on_after_a_restart(child_ends: str) -> None:
    store = MemoryStateStore(clock=FakeClock())
    before = make_runtime(store)
    adding(before)
    await with_agent(before)
    await before.agents.create("bob", agent_type="worker")
    await before.agents.stop("bob")
    task = await before.tasks.submit("alice", "add", {"numbers": [4], "to": "bob"})
    alice = before.state.agents["alice"]
    await until(lambda: alice.tasks[task.task_id].held)
    if child_ends == "before the restart":
        await before.agents.stop("alice")
        await before.agents.start("bob")
        await before.wait_idle()
    await before.abort()

    after = make_runtime(store, name="after")
    ran: list[str] = []
    adding(after, ran)
    await after.start()
    await after.agents.start("alice")
    await after.wait_idle()
    assert ran == (["add"] if child_ends == "before the restart" else [])
    await after.agents.start("bob")
    assert await after.tasks.result(task) == 4
    assert ran.count("add") == 1
    assert (await after.tasks.get(task)).attempts == 1
    await after.stop()


LATE = "late: ('alice', 'first-0001')"


def patient(runtime: AsyncAgentSessionManager, ran: list[object], **limits: float | None) -> None:
    """Register a parent that waits for ``first`` and then ``second``, each with its limit."""

    @runtime.task("parent", agent_type="worker", retry=AT_ONCE)
    async def parent(ctx: TaskContext, task: Task) -> list[object]:
        found = []
        for child in ("first", "second"):
            try:
                result = await ctx.result(f"{child}-0001", timeout_seconds=limits.get(child))
            except TaskTimeoutError as error:
                result = f"late: {error.key}"
            found.append(result)
        ran.append(found)
        return found

    @runtime.task("child", agent_type="worker")
    async def child(ctx: TaskContext, task: Task) -> str:
        return "done"


async def submit_at(runtime: AsyncAgentSessionManager, seconds: float, task_id: str) -> None:
    """Queue a child that ends after so many seconds."""
    with_id = transitions.new_task(
        task_id, "alice", "child", {}, now=runtime.state.clock.now(), delay_seconds=seconds
    )
    await runtime.manager.save("tasks", ("alice", task_id), with_id, expected=0)
    await runtime.reconciler.notice(Notice("tasks", ("alice", task_id), 1, outside=True))


@pytest.mark.parametrize("restart", ["none", "stop", "kill", "long kill"])
async def test_a_wait_for_a_child_ends_in_time_also_over_a_restart(restart: str) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock)
    ran: list[object] = []
    patient(runtime, ran, first=10, second=3600)
    await with_agent(runtime)
    await submit_at(runtime, 25, "first-0001")
    await submit_at(runtime, 60, "second-0001")
    task = await runtime.tasks.submit("alice", "parent")
    await clock.advance(4)
    if restart != "none":
        await (runtime.stop() if restart == "stop" else runtime.abort())
        await clock.advance(4 if restart != "long kill" else 26)
        runtime = make_runtime(store, clock, name="after")
        patient(runtime, ran, first=10, second=3600)
        await runtime.start()
    waited = runtime.state.agents["alice"].tasks[task.task_id]
    await clock.advance(10)  # the first wait has ended, without a result
    await until(lambda: waited.task.waits_for and waited.task.waits_for[0].task_id[0] == "s")
    assert ran == []
    await clock.advance(60)
    # The first child has ended meanwhile. What the handler was told stays as it was told.
    assert await runtime.tasks.result(task) == [LATE, "done"]
    assert ran == [[LATE, "done"]]
    done = await runtime.tasks.get(task)
    assert (done.attempts, done.waits_for) == (1, [])
    await runtime.stop()


async def test_each_wait_for_a_child_has_a_time_of_its_own_and_each_retry_anew() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    timed_out: list[float] = []

    @runtime.task("parent", agent_type="worker", retry=AT_ONCE, max_attempts=2)
    async def parent(ctx: TaskContext, task: Task) -> None:
        for _ in range(2):
            with contextlib.suppress(TaskTimeoutError):
                await ctx.results(["first-0001"], timeout_seconds=10)
        timed_out.append(clock.monotonic())
        await ctx.result("first-0001", timeout_seconds=5)

    began = clock.monotonic()
    await with_agent(runtime)
    await submit_at(runtime, 3600, "first-0001")
    task = await runtime.tasks.submit("alice", "parent")
    for _ in range(60):
        await clock.advance(1)
    with pytest.raises(TaskFailedError, match=r"TaskTimeoutError: not ended within 5 s"):
        await runtime.tasks.result(task)
    assert [moment - began for moment in timed_out] == [20, 25, 45, 50]
    await runtime.stop()


async def test_many_waits_that_end_in_time_leave_nothing_behind() -> None:
    """Deadlines outlive the rebuilding of the queue, and are passed at no cost."""
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    ran: list[object] = []
    patient(runtime, ran, first=1000)
    await with_agent(runtime)
    await submit_at(runtime, 5000, "first-0001")
    await submit_at(runtime, 0, "second-0001")
    parents = [await runtime.tasks.submit("alice", "parent") for _ in range(50)]
    await runtime.wait_idle()
    for _ in range(50):
        await runtime.tasks.cancel(await runtime.tasks.submit("alice", "child", delay_seconds=9e6))
    await clock.advance(999)
    assert ran == []
    await clock.advance(1)
    assert [await runtime.tasks.result(parent) for parent in parents] == [[LATE, "done"]] * 50
    assert runtime.state.agents["alice"].queued < 120
    await runtime.stop()


async def test_a_parent_that_is_cancelled_while_it_waits_ends() -> None:
    runtime = make_runtime()
    adding(runtime)
    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="nobody")
    task = await runtime.tasks.submit("alice", "add", {"numbers": [1], "to": "bob"})
    await runtime.wait_idle()
    assert await runtime.tasks.cancel(task)
    with pytest.raises(TaskFailedError, match="cancelled"):
        await runtime.tasks.result(task)
    await runtime.stop()


async def test_a_parent_is_looked_at_again_when_the_store_refused_to_say() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)
    adding(runtime)
    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="nobody")
    task = await runtime.tasks.submit("alice", "add", {"numbers": [2], "to": "bob"})
    await runtime.wait_idle()
    await runtime.stop()

    again = make_runtime(store, clock, name="again")
    adding(again)

    @again.task("number", agent_type="nobody")
    async def number(ctx: TaskContext) -> int:
        return 2

    real, calls = store.get, 0

    async def refuse(kind: str, key: Any) -> Any:
        nonlocal calls
        if kind == "tasks" and key[0] == "bob":
            calls += 1
            if calls == 1:
                raise OSError("the disk is away")
        return await real(kind, key)

    await again.start()
    store.get = refuse  # type: ignore[method-assign]
    await clock.advance(60)
    assert await again.tasks.result(task) == 2
    await again.stop()


async def test_the_end_of_a_child_whose_reply_was_lost_lets_its_parent_go_on() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    store.unknown = puts("tasks", '"result": 7')
    runtime = make_runtime(store, clock)
    adding(runtime)
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "add", {"numbers": [7]})
    result = asyncio.ensure_future(runtime.tasks.result(task))
    await until(lambda: clock.sleepers > 0)
    await clock.advance(60)
    assert await result == 7
    await runtime.stop()


async def owned_by(second: AsyncAgentSessionManager, first: AsyncAgentSessionManager) -> str:
    """A new agent that the second runtime has; the first may be quicker to take one."""
    for number in range(100):
        name = f"bob-{number}"
        await second.agents.create(name, agent_type="worker")
        await until(partial(first.state.agents.__contains__, name))
        if second.state.agents[name].leased:
            return name
    raise AssertionError("the first runtime takes every agent")


async def test_a_child_that_another_runtime_does_lets_its_parent_go_on(tmp_path: Path) -> None:
    ran: dict[str, list[str]] = {"first": [], "second": []}

    def make(name: str) -> AsyncAgentSessionManager:
        runtime = AsyncAgentSessionManager(tmp_path / "state", exclusive=False)
        adding(runtime, ran[name])
        return runtime

    async with make("first") as first:
        await first.agents.create("alice", agent_type="worker")
        async with make("second") as second:
            bob = await owned_by(second, first)
            task = await first.tasks.submit("alice", "add", {"numbers": [1, 2], "to": bob})
            assert await soon(first.tasks.result(task)) == 3
    assert set(ran["first"]) == {"add"}
    assert sorted(ran["second"]) == ["number 1", "number 2"]


async def test_a_child_among_many_is_noticed_at_the_same_cost() -> None:
    costs = []
    for count in (20, 200):
        runtime = make_runtime()
        adding(runtime)
        await with_agent(runtime)
        await runtime.agents.create("bob", agent_type="nobody")
        await runtime.tasks.submit("alice", "add", {"numbers": [*range(count)], "to": "bob"})
        await runtime.wait_idle()
        [child, *_] = runtime.state.agents["bob"].tasks.values()
        with counted() as cost:
            runtime.tasks.waiters.notify_finished(child.task)
            costs.append(cost())
        await runtime.stop()
    assert costs[1] <= costs[0] + 5
