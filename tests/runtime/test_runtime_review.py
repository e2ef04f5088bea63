"""Tasks, results and time: nothing hangs, runs twice or lies, however awaits interleave."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import pytest

from agent_state import MemoryStateStore, RetryPolicy, Task, TaskContext, TaskFailedError
from agent_state.protocols import Delete
from agent_state.testing import FakeClock
from tests.runtime.living import TroubledStore, edit, make_runtime, puts, soon, until, working

# -- tasks ---------------------------------------------------------------------------------


async def test_a_task_cancelled_while_it_is_being_claimed_is_not_done() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    begun = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        store.hold = puts("tasks", "in_progress")
        task = await runtime.tasks.submit("alice", "x")
        await store.held.wait()
        cancelling = asyncio.create_task(runtime.tasks.cancel(task))
        await asyncio.sleep(0)
        store.gate.set()
        assert await soon(cancelling)
        with pytest.raises(TaskFailedError, match="cancelled"):
            await soon(runtime.tasks.result(task))
        await soon(runtime.wait_idle())
        assert (await runtime.tasks.get(task)).status == "cancelled"


async def test_a_task_that_ended_before_its_cancellation_was_not_cancelled() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        store.hold = puts("tasks", "completed")
        task = await runtime.tasks.submit("alice", "x")
        await store.held.wait()
        cancelling = asyncio.create_task(runtime.tasks.cancel(task))
        await asyncio.sleep(0)
        store.gate.set()
        assert not await soon(cancelling)
        done = await runtime.tasks.get(task)
        assert (done.status, done.cancel_requested) == ("completed", False)


async def test_an_agent_at_work_is_active_when_another_of_its_tasks_is_cancelled() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        await asyncio.Event().wait()

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.submit("alice", "first")
        await until(lambda: runtime.runner.running_handlers)
        await runtime.tasks.cancel(await runtime.tasks.submit("alice", "second"))
        stored = await runtime.manager.load_agent_state("alice")
        assert stored is not None
        assert stored.status == "active"
        runtime._grace_seconds = 0


async def test_one_dedupe_key_of_two_agents_is_two_tasks_with_two_results() -> None:
    runtime = make_runtime()
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        if ctx.agent_id == "alice":
            await go.wait()
        await ctx.send_mail("carol", subject="done")
        await ctx.submit("carol", f"after {ctx.agent_id}")
        return ctx.agent_id

    async with runtime:
        for agent_id, agent_type in (("alice", "worker"), ("bob", "worker"), ("carol", "none")):
            await runtime.agents.create(agent_id, agent_type=agent_type)
        of_alice = await runtime.tasks.submit("alice", "daily", dedupe_key="daily")
        waiting = asyncio.create_task(runtime.tasks.result(of_alice))
        await asyncio.sleep(0)
        of_bob = await runtime.tasks.submit("bob", "daily", dedupe_key="daily")
        assert await soon(runtime.tasks.result(of_bob)) == "bob"
        go.set()
        assert await soon(waiting) == "alice"
        assert {mail.from_agent for mail in runtime.mail.inbox("carol")} == {"alice", "bob"}
        waits = {live.task.name for live in runtime.state.agents["carol"].tasks.values()}
        assert waits == {"after alice", "after bob"}


async def test_a_copied_task_file_is_a_task_of_its_own() -> None:
    ran: list[str] = []
    runtime = make_runtime()
    working(runtime, ran)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.create("bob", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x")
        await soon(runtime.tasks.result(task))
        copied = {"task_id": task.task_id, "agent_id": "alice", "name": "again"}
        await edit(runtime, "tasks", ("alice", "copy"), **copied)
        await edit(runtime, "tasks", ("bob", "copy"), **copied)
        await soon(runtime.wait_idle())
        assert ran == ["alice/x", "alice/again", "bob/again"]
        for agent_id in ("alice", "bob"):
            copy = await runtime.tasks.get(Task(task_id="copy", agent_id=agent_id))
            assert (copy.status, copy.task_id, copy.agent_id) == ("completed", "copy", agent_id)
        assert (await runtime.tasks.get(task)).name == "x"


async def test_what_a_handler_leaves_in_memory_and_no_file_can_hold_ends_its_task_alone() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        ctx.memory[task.name] = {"a set"} if task.name == "bad" else "good"
        return "done"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.result(await runtime.tasks.submit("alice", "first"))
        with pytest.raises(TaskFailedError, match=r"dead.*bad"):
            await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "bad")))
        assert (
            await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "last"))) == "done"
        )
        memory = runtime.agents.get("alice").context.working_memory
        assert memory == {"first": "good", "last": "good"}


@pytest.mark.parametrize(
    "wish",
    [{"until": datetime(2030, 1, 1)}, {"seconds": "5"}, {"seconds": 5, "reason": 5}],  # noqa: DTZ001
    ids=["a naive time", "text for seconds", "a number for a reason"],
)
async def test_a_sleep_that_cannot_be_stored_fails_its_task_and_nothing_else(wish: Any) -> None:
    runtime = make_runtime(retry=RetryPolicy(base_seconds=0, jitter=0))

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        if task.name == "sleep":
            await ctx.sleep(**wish)
        return "done"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        asleep = await runtime.tasks.submit("alice", "sleep", max_attempts=1)
        with pytest.raises(TaskFailedError, match="dead"):
            await soon(runtime.tasks.result(asleep))
        assert (
            await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "work"))) == "done"
        )


# -- results and waiting -------------------------------------------------------------------


async def test_a_task_that_a_person_ends_is_over_for_who_waits_even_if_nobody_was_told() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", delay_seconds=100)
        waiting = asyncio.create_task(runtime.tasks.result(task))
        await asyncio.sleep(0)
        body = {**task.model_dump(), "status": "cancelled"}
        await runtime.manager.save("tasks", ("alice", task.task_id), body)
        assert await runtime.reconciler.check() == 1
        with pytest.raises(TaskFailedError, match="cancelled"):
            await soon(waiting)


async def test_who_stops_waiting_for_a_result_leaves_nothing_behind() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", delay_seconds=100)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(runtime.tasks.result(task), 0.001)
        assert len(runtime.tasks.waiters) == 0


async def test_who_waits_when_the_runtime_stops_is_told() -> None:
    runtime = make_runtime()
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    task = await runtime.tasks.submit("alice", "x", delay_seconds=100)
    waiting = asyncio.create_task(runtime.tasks.result(task))
    await asyncio.sleep(0)
    await runtime.stop()
    with pytest.raises(TaskFailedError, match="pending"):
        await soon(waiting)


async def test_a_result_that_another_runtime_brings_is_waited_for() -> None:
    store, clock = MemoryStateStore(clock=FakeClock()), FakeClock()
    first, second = (
        make_runtime(store, clock, name=name, exclusive=False) for name in ("first", "second")
    )
    async with first, second:
        await first.agents.create("alice", agent_type="none")
        await second.restore_session_state("alice")
        task = await first.tasks.submit("alice", "x")
        waiting = asyncio.create_task(second.tasks.result(task))
        await clock.advance(1)
        assert not waiting.done()
        await edit(second, "tasks", ("alice", task.task_id), status="completed", result="r")
        assert await soon(waiting) == "r"


async def test_nobody_waits_for_the_next_attempt_of_an_agent_that_was_stopped() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        raise OSError("again later")

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.submit("alice", "x")
        await until(runtime.state.agents["alice"].next_due)
        waiting = asyncio.create_task(runtime.wait_idle())
        await asyncio.sleep(0)
        assert not waiting.done()
        await runtime.agents.stop("alice")
        await soon(waiting)


# -- time ----------------------------------------------------------------------------------


async def test_a_stopped_agent_with_a_task_that_is_due_keeps_nobody_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", delay_seconds=10)
        await runtime.agents.stop("alice")
        await clock.advance(20)
        agent = runtime.state.agents["alice"]
        rung = 0
        wake = agent.changed.set

        def count() -> None:
            nonlocal rung
            rung += 1
            wake()

        monkeypatch.setattr(agent.changed, "set", count)
        await clock.advance(1)
        assert rung <= 1
        await runtime.agents.start("alice")
        assert await soon(runtime.tasks.result(task)) == "alice"


async def test_a_sleeper_that_cannot_be_woken_keeps_nobody_else_asleep() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.create("bob", agent_type="worker")
        await runtime.agents.sleep("alice", seconds=10)
        await runtime.agents.sleep("bob", seconds=11)
        store.full = lambda change: isinstance(change, Delete) and change.key == ("alice",)
        await clock.advance(60)
        assert runtime.state.agents["bob"].sleep is None
        store.full = lambda _: False
        await clock.advance(60)
        assert runtime.state.agents["alice"].sleep is None


async def test_a_far_alarm_and_much_work_take_no_more_room_than_a_far_alarm() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.submit("alice", "far", delay_seconds=1_000_000)
        for _ in range(20):
            await runtime.tasks.result(await runtime.tasks.submit("alice", "near"))
            await runtime.tasks.cancel(
                await runtime.tasks.submit("alice", "off", delay_seconds=2_000_000)
            )
        agent = runtime.state.agents["alice"]
        assert len(runtime.runner.timers) <= 2
        assert agent.queued <= 20
