"""Tasks: the queue, results, cancelling and dedupe keys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import date
from itertools import pairwise

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    StateNotFoundError,
    StateValidationError,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.models import Priority
from agent_state.protocols import Change, Notice
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    RecordingStore,
    TroubledStore,
    edit,
    hanging,
    make_runtime,
    puts,
    with_agent,
    working,
)


async def test_a_task_is_done_and_its_result_stored() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        ctx.memory["seen"] = task.payload["n"]
        return {"twice": task.payload["n"] * 2}

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "double", {"n": 21})
    assert await runtime.tasks.result(task) == {"twice": 42}
    stored = await runtime.tasks.get(task)
    assert (stored.status, stored.attempts, stored.lease) == ("completed", 1, None)
    agent = await runtime.manager.load_agent_state("alice")
    assert agent is not None
    assert (agent.context.working_memory, agent.status) == ({"seen": 21}, "idle")
    await runtime.stop()


async def test_while_a_handler_runs_its_task_is_not_written() -> None:
    clock = FakeClock()
    store = RecordingStore(clock)
    runtime = make_runtime(store, clock, lease_seconds=30)
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        await go.wait()

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "wait")
    await until(lambda: runtime.runner.running_handlers)
    written = len(store.commits)
    await clock.advance(300)
    assert store.commits[written:] == []
    assert (await runtime.tasks.get(task)).status == "in_progress"
    go.set()
    await runtime.wait_idle()
    await runtime.stop()


async def test_failures_wait_longer_each_time_and_end_as_a_dead_letter() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=RetryPolicy(base_seconds=10, jitter=0))
    times = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        times.append(ctx.now())
        raise RuntimeError(f"attempt {ctx.attempt}")

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "fail")
    waiting = asyncio.create_task(runtime.tasks.result(task))
    await clock.advance(100)
    with pytest.raises(TaskFailedError, match="RuntimeError: attempt 3") as caught:
        await waiting
    assert caught.value.status == "dead"
    gaps = [(b - a).total_seconds() for a, b in pairwise(times)]
    assert gaps == [10, 20]
    await runtime.stop()


async def test_priority_first_then_age_and_nothing_before_its_time() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    done: list[str] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        done.append(task.name)

    await runtime.start()
    await runtime.agents.create("alice", agent_type="later")
    ranked: list[tuple[str, Priority]] = [
        ("a", "normal"),
        ("b", "low"),
        ("c", "urgent"),
        ("d", "normal"),
    ]
    for name, priority in ranked:
        await runtime.tasks.submit("alice", name, priority=priority)
    await runtime.tasks.submit("alice", "e", priority="urgent", delay_seconds=60)
    runtime.handler("later")(worker)
    await runtime.wait_idle()
    assert done == ["c", "a", "d", "b"]
    await clock.advance(60)
    assert done[-1] == "e"
    await runtime.stop()


async def test_a_task_that_is_due_before_all_others_is_begun_when_it_is_due() -> None:
    clock, ran = FakeClock(), list[str]()
    runtime = make_runtime(clock=clock)
    working(runtime, ran)
    await with_agent(runtime)
    await runtime.tasks.submit("alice", "later", delay_seconds=20)
    await clock.advance(1)
    await runtime.tasks.submit("alice", "soon", delay_seconds=5)
    await clock.advance(6)
    assert ran == ["alice/soon"]
    await runtime.stop()


async def test_a_task_that_takes_too_long_fails() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        await asyncio.Event().wait()

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "hang", timeout_seconds=5, max_attempts=1)
    waiting = asyncio.create_task(runtime.tasks.result(task))
    await until(lambda: runtime.runner.running_handlers)
    await clock.advance(6)
    with pytest.raises(TaskFailedError, match="not done within 5 s"):
        await waiting
    await runtime.stop()


async def test_work_for_nobody_is_refused() -> None:
    async with make_runtime() as runtime:
        with pytest.raises(StateNotFoundError, match="no such agent"):
            await runtime.tasks.submit("nobody", "x")


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


# -- dedupe keys ----------------------------------------------------------------------------------


async def test_a_dedupe_key_gives_one_task() -> None:
    runtime = make_runtime()
    runs = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        runs.append(task.task_id)

    await with_agent(runtime)
    first = await runtime.tasks.submit("alice", "once", dedupe_key="readme")
    await runtime.wait_idle()
    second = await runtime.tasks.submit("alice", "once", dedupe_key="readme")
    await runtime.wait_idle()
    assert first.task_id == second.task_id
    assert second.status == "completed"
    assert len(runs) == 1
    await runtime.stop()


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


# -- cancelling -----------------------------------------------------------------------------------


async def test_cancelling_ends_a_waiting_and_a_running_task() -> None:
    runtime = make_runtime()
    started = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    await with_agent(runtime)
    running = await runtime.tasks.submit("alice", "run")
    queued = await runtime.tasks.submit("alice", "wait")
    await started.wait()
    assert await runtime.tasks.cancel(queued)
    assert await runtime.tasks.cancel(running)
    for task in (running, queued):
        with pytest.raises(TaskFailedError, match="cancelled"):
            await runtime.tasks.result(task)
    assert not await runtime.tasks.cancel(running)
    await runtime.stop()


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
    runtime = make_runtime(grace_seconds=0)

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


async def test_the_tasks_of_an_agent_are_listed_in_the_order_of_its_queue() -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("alice", agent_type="none")
        await runtime.agents.create("bob", agent_type="none")
        for name in ("first", "second"):
            await runtime.tasks.submit("alice", name)
        off = await runtime.tasks.submit("alice", "off")
        urgent = await runtime.tasks.submit("alice", "urgent", priority="urgent")
        await runtime.tasks.submit("bob", "not hers")
        await runtime.tasks.cancel(off)
        listed = [task.name for task in await runtime.tasks.list("alice")]
        assert listed == ["urgent", "first", "second", "off"]
        pending = await runtime.tasks.list("alice", status="pending")
        assert [task.name for task in pending] == ["urgent", "first", "second"]
        assert await runtime.tasks.get(("alice", urgent.task_id)) == urgent
        assert await runtime.tasks.cancel(("alice", urgent.task_id))
        assert await runtime.tasks.list("nobody") == []


# -- results and waiting --------------------------------------------------------------------------


async def test_a_result_is_given_in_the_type_that_is_asked_for() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        return {"2026-01-01": 3}

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "count")
    assert await runtime.tasks.result(task) == {"2026-01-01": 3}
    assert await runtime.tasks.result(task, dict[date, int]) == {date(2026, 1, 1): 3}
    with pytest.raises(StateValidationError, match="result"):
        await runtime.tasks.result(task, list[int])
    await runtime.stop()


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


# -- what happens while a task is stored -----------------------------------------------------


class NoticedStore(MemoryStateStore):
    """Delivers the notice of a stored task, and lets it run, before the commit returns."""

    runtime: AsyncAgentSessionManager | None = None

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        numbers = await super().commit(changes)
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            await runtime.reconciler.notice(Notice("tasks", changes[0].key, 1, outside=True))
            await soon(runtime.wait_idle())
        return numbers


async def test_a_task_whose_submitter_was_cancelled_is_done_once_it_is_stored() -> None:
    store, ran = TroubledStore(), list[str]()
    runtime = make_runtime(store)
    working(runtime, ran)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        store.hold = puts("tasks")
        submitting = asyncio.create_task(runtime.tasks.submit("alice", "x"))
        await store.held.wait()
        submitting.cancel()
        store.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        await until(lambda: ran == ["alice/x"])


async def test_a_task_that_is_noticed_before_its_submission_returns_is_done_once() -> None:
    store, ran = NoticedStore(), list[str]()
    runtime = make_runtime(store)
    working(runtime, ran)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        store.runtime = runtime
        task = await runtime.tasks.submit("alice", "x")
        await soon(runtime.wait_idle())
        assert ran == ["alice/x"]
        assert (await runtime.tasks.get(task)).attempts == 1
        assert runtime.state.agents["alice"].tasks == {}


async def test_a_known_dedupe_key_is_worked_on_even_if_its_task_was_stored_unnoticed() -> None:
    store = MemoryStateStore()
    first, second = make_runtime(store, name="first"), make_runtime(store, name="second")
    working(first)
    async with first, second:
        await first.agents.create("alice", agent_type="worker")
        await second.restore_session_state("alice")
        stored = await second.tasks.submit("alice", "x", dedupe_key="once")
        again = await first.tasks.submit("alice", "x", dedupe_key="once")
        assert again.task_id == stored.task_id
        assert await soon(first.tasks.result(again)) == "alice"


async def test_a_claim_whose_outcome_was_unknown_is_taken_up_again() -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), list[str]()
    runtime = make_runtime(store, clock)
    working(runtime, ran)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        store.unknown = puts("tasks", "in_progress")
        task = await runtime.tasks.submit("alice", "x")
        await until(lambda: clock.sleepers)
        await clock.advance(1)
        assert await soon(runtime.tasks.result(task)) == "alice"
        assert ran == ["alice/x"]


async def test_a_task_that_a_person_wants_cancelled_is_not_begun() -> None:
    clock, ran = FakeClock(), list[str]()
    runtime = make_runtime(clock=clock)
    working(runtime, ran)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", delay_seconds=10)
        await edit(runtime, "tasks", ("alice", task.task_id), cancel_requested=True)
        await clock.advance(20)
        assert ((await runtime.tasks.get(task)).status, ran) == ("cancelled", [])


async def test_a_running_task_that_a_person_wants_cancelled_ends_unnoticed_too() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, lease_seconds=30)
    started = hanging(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x")
        await started.wait()
        body = {**(await runtime.tasks.get(task)).model_dump(), "cancel_requested": True}
        await runtime.manager.save("tasks", ("alice", task.task_id), body)
        await clock.advance(31)  # the periodic check
        with pytest.raises(TaskFailedError, match="cancelled"):
            await soon(runtime.tasks.result(task))


async def test_a_cleaned_up_task_is_found_among_others_in_the_archive() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        tasks = [await runtime.tasks.submit("alice", name) for name in ("a", "b", "c")]
        await soon(runtime.wait_idle())
        await clock.advance(48 * 3600)
        assert len((await runtime.cleanup_old_states()).tasks) == 3
        assert [(await runtime.tasks.get(task)).name for task in tasks] == ["a", "b", "c"]
        assert await runtime.tasks.result(tasks[1]) == "alice"
