"""Where two things happen at once, or what is stored refuses: nothing hangs, runs twice or lies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pytest

from agent_state import (
    AgentContext,
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    StorageFullError,
    Task,
    TaskFailedError,
)
from agent_state.protocols import Change, Delete, Notice, Put
from agent_state.testing import FakeClock
from tests.living import make_runtime, until

Picks = Callable[[Change], bool]


class TroubledStore(MemoryStateStore):
    """Holds the commits that ``hold`` picks until ``gate`` opens; the disk is full for ``full``.

    As every store does, it ends a commit that was handed over before its caller is cancelled.
    """

    def __init__(self, clock: FakeClock | None = None) -> None:
        super().__init__(clock=clock or FakeClock())
        self.hold: Picks = lambda _: False
        self.full: Picks = lambda _: False
        self.held, self.gate = asyncio.Event(), asyncio.Event()

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if any(map(self.full, changes)):
            raise StorageFullError("no space left")
        if not any(map(self.hold, changes)):
            return await super().commit(changes)
        self.hold = lambda _: False
        self.held.set()
        handed_over = asyncio.ensure_future(self._later(changes))
        try:
            return await asyncio.shield(handed_over)
        except asyncio.CancelledError:
            await handed_over
            raise

    async def _later(self, changes: Sequence[Change]) -> list[int]:
        await self.gate.wait()
        return await super().commit(changes)


def puts(kind: str, word: str = "") -> Picks:
    """Whether a change stores a document of that kind in which the word occurs."""
    return lambda change: (
        isinstance(change, Put) and change.kind == kind and word.encode() in change.body
    )


def working(runtime: AsyncAgentSessionManager, *seen: list[str]) -> None:
    @runtime.handler("worker")
    async def worker(ctx: AgentContext, task: Task) -> str:
        for ran in seen:
            ran.append(f"{ctx.agent_id}/{task.name}")
        return ctx.agent_id


async def edit(runtime: AsyncAgentSessionManager, kind: str, key: Any, **changes: Any) -> None:
    """Change a document behind the runtime's back, and let it notice."""
    key = (key,) if isinstance(key, str) else key
    stored = await runtime.manager.load(kind, key)
    body = stored.model_dump() if stored is not None else {}
    await runtime.manager.save(kind, key, {**body, **changes})
    await runtime._keeper.notice(Notice(kind, key, 0, outside=True))


async def soon(waiting: Any) -> Any:
    return await asyncio.wait_for(waiting, 5)


# -- tasks ---------------------------------------------------------------------------------


async def test_a_task_cancelled_while_it_is_being_claimed_is_not_done() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    begun = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: AgentContext, task: Task) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        store.hold = puts("tasks", "in_progress")
        task = await runtime.submit("alice", "x")
        await store.held.wait()
        cancelling = asyncio.create_task(runtime.cancel(task))
        await asyncio.sleep(0)
        store.gate.set()
        assert await soon(cancelling)
        with pytest.raises(TaskFailedError, match="cancelled"):
            await soon(runtime.result(task))
        await soon(runtime.wait_idle())
        assert (await runtime.task(task)).status == "cancelled"


async def test_a_task_that_ended_before_its_cancellation_was_not_cancelled() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        store.hold = puts("tasks", "completed")
        task = await runtime.submit("alice", "x")
        await store.held.wait()
        cancelling = asyncio.create_task(runtime.cancel(task))
        await asyncio.sleep(0)
        store.gate.set()
        assert not await soon(cancelling)
        done = await runtime.task(task)
        assert (done.status, done.cancel_requested) == ("completed", False)


async def test_an_agent_at_work_is_active_when_another_of_its_tasks_is_cancelled() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: AgentContext, task: Task) -> None:
        await asyncio.Event().wait()

    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await runtime.submit("alice", "first")
        await until(lambda: runtime._runner.busy)
        await runtime.cancel(await runtime.submit("alice", "second"))
        stored = await runtime.manager.load_agent_state("alice")
        assert stored is not None
        assert stored.status == "active"
        runtime._grace = 0


async def test_one_dedupe_key_of_two_agents_is_two_tasks_with_two_results() -> None:
    runtime = make_runtime()
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: AgentContext, task: Task) -> str:
        if ctx.agent_id == "alice":
            await go.wait()
        await ctx.send_mail("carol", subject="done")
        await ctx.submit("carol", f"after {ctx.agent_id}")
        return ctx.agent_id

    async with runtime:
        for agent_id, agent_type in (("alice", "worker"), ("bob", "worker"), ("carol", "none")):
            await runtime.create_session(agent_id, agent_type=agent_type)
        of_alice = await runtime.submit("alice", "daily", dedupe_key="daily")
        waiting = asyncio.create_task(runtime.result(of_alice))
        await asyncio.sleep(0)
        of_bob = await runtime.submit("bob", "daily", dedupe_key="daily")
        assert await soon(runtime.result(of_bob)) == "bob"
        go.set()
        assert await soon(waiting) == "alice"
        assert {mail.from_agent for mail in runtime.inbox("carol")} == {"alice", "bob"}
        waits = {live.task.name for live in runtime.core.agents["carol"].tasks.values()}
        assert waits == {"after alice", "after bob"}


async def test_a_copied_task_file_is_a_task_of_its_own() -> None:
    ran: list[str] = []
    runtime = make_runtime()
    working(runtime, ran)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await runtime.create_session("bob", agent_type="worker")
        task = await runtime.submit("alice", "x")
        await soon(runtime.result(task))
        copied = {"task_id": task.task_id, "agent_id": "alice", "name": "again"}
        await edit(runtime, "tasks", ("alice", "copy"), **copied)
        await edit(runtime, "tasks", ("bob", "copy"), **copied)
        await soon(runtime.wait_idle())
        assert ran == ["alice/x", "alice/again", "bob/again"]
        for agent_id in ("alice", "bob"):
            copy = await runtime.task(Task(task_id="copy", agent_id=agent_id))
            assert (copy.status, copy.task_id, copy.agent_id) == ("completed", "copy", agent_id)
        assert (await runtime.task(task)).name == "x"


async def test_what_a_handler_leaves_in_memory_and_no_file_can_hold_ends_its_task_alone() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: AgentContext, task: Task) -> str:
        ctx.memory[task.name] = {"a set"} if task.name == "bad" else "good"
        return "done"

    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await runtime.result(await runtime.submit("alice", "first"))
        with pytest.raises(TaskFailedError, match=r"dead.*bad"):
            await soon(runtime.result(await runtime.submit("alice", "bad")))
        assert await soon(runtime.result(await runtime.submit("alice", "last"))) == "done"
        memory = runtime.session("alice").context.working_memory
        assert memory == {"first": "good", "last": "good"}


@pytest.mark.parametrize(
    "wish",
    [{"until": datetime(2030, 1, 1)}, {"seconds": "5"}, {"seconds": 5, "reason": 5}],  # noqa: DTZ001
    ids=["a naive time", "text for seconds", "a number for a reason"],
)
async def test_a_sleep_that_cannot_be_stored_fails_its_task_and_nothing_else(wish: Any) -> None:
    runtime = make_runtime(retry=RetryPolicy(base_seconds=0, jitter=0))

    @runtime.handler("worker")
    async def worker(ctx: AgentContext, task: Task) -> str:
        if task.name == "sleep":
            await ctx.sleep(**wish)
        return "done"

    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        asleep = await runtime.submit("alice", "sleep", max_attempts=1)
        with pytest.raises(TaskFailedError, match="dead"):
            await soon(runtime.result(asleep))
        assert await soon(runtime.result(await runtime.submit("alice", "work"))) == "done"


# -- results and waiting -------------------------------------------------------------------


async def test_a_task_that_a_person_ends_is_over_for_whoever_waits_even_if_nobody_was_told() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        task = await runtime.submit("alice", "x", delay_seconds=100)
        waiting = asyncio.create_task(runtime.result(task))
        await asyncio.sleep(0)
        body = {**task.model_dump(), "status": "cancelled"}
        await runtime.manager.save("tasks", ("alice", task.task_id), body)
        assert await runtime.check() == 1
        with pytest.raises(TaskFailedError, match="cancelled"):
            await soon(waiting)


async def test_who_stops_waiting_for_a_result_leaves_nothing_behind() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        task = await runtime.submit("alice", "x", delay_seconds=100)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(runtime.result(task), 0.001)
        assert not runtime._runner._waiters


async def test_who_waits_when_the_runtime_stops_is_told() -> None:
    runtime = make_runtime()
    working(runtime)
    await runtime.start()
    await runtime.create_session("alice", agent_type="worker")
    task = await runtime.submit("alice", "x", delay_seconds=100)
    waiting = asyncio.create_task(runtime.result(task))
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
        await first.create_session("alice", agent_type="none")
        await second.restore_session_state("alice")
        task = await first.submit("alice", "x")
        waiting = asyncio.create_task(second.result(task))
        await clock.advance(1)
        assert not waiting.done()
        await edit(second, "tasks", ("alice", task.task_id), status="completed", result="r")
        assert await soon(waiting) == "r"


async def test_nobody_waits_for_the_next_attempt_of_an_agent_that_was_stopped() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: AgentContext, task: Task) -> None:
        raise OSError("again later")

    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await runtime.submit("alice", "x")
        await until(lambda: runtime.core.agents["alice"].next_time())
        waiting = asyncio.create_task(runtime.wait_idle())
        await asyncio.sleep(0)
        assert not waiting.done()
        await runtime.stop_session("alice")
        await soon(waiting)


# -- time ----------------------------------------------------------------------------------


async def test_a_stopped_agent_with_a_task_that_is_due_keeps_nobody_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        task = await runtime.submit("alice", "x", delay_seconds=10)
        await runtime.stop_session("alice")
        await clock.advance(20)
        agent = runtime.core.agents["alice"]
        rung = 0
        wake = agent.changed.set

        def count() -> None:
            nonlocal rung
            rung += 1
            wake()

        monkeypatch.setattr(agent.changed, "set", count)
        await clock.advance(1)
        assert rung <= 1
        await runtime.start_session("alice")
        assert await soon(runtime.result(task)) == "alice"


async def test_a_sleeper_that_cannot_be_woken_keeps_nobody_else_asleep() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await runtime.create_session("bob", agent_type="worker")
        await runtime.sleep("alice", seconds=10)
        await runtime.sleep("bob", seconds=11)
        store.full = lambda change: isinstance(change, Delete) and change.key == ("alice",)
        await clock.advance(60)
        assert runtime.core.agents["bob"].sleep is None
        store.full = lambda _: False
        await clock.advance(60)
        assert runtime.core.agents["alice"].sleep is None


async def test_a_far_alarm_and_much_work_take_no_more_room_than_a_far_alarm() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await runtime.submit("alice", "far", delay_seconds=1_000_000)
        for _ in range(20):
            await runtime.result(await runtime.submit("alice", "near"))
            await runtime.cancel(await runtime.submit("alice", "off", delay_seconds=2_000_000))
        agent = runtime.core.agents["alice"]
        assert len(runtime._alarm._times) <= 2
        assert len(agent._delayed) + len(agent._ready) <= 20


# -- arrivals ------------------------------------------------------------------------------


async def test_an_agent_created_twice_at_once_lives_once() -> None:
    ran: list[str] = []
    runtime = make_runtime()
    working(runtime, ran)
    async with runtime:
        made = await asyncio.gather(
            *(runtime.create_session("alice", agent_type="worker") for _ in range(3)),
            runtime.restore_session_state("alice"),
        )
        assert {state.agent_id for state in made[:3]} == {"alice"}
        await soon(runtime.result(await runtime.submit("alice", "x")))
        loops = [t for t in asyncio.all_tasks() if t.get_name() == "agent alice"]
        assert (len(loops), ran) == (1, ["alice/x"])


async def test_an_agent_restored_and_created_at_once_lives_once() -> None:
    store = MemoryStateStore(clock=FakeClock())
    runtime = make_runtime(store)
    working(runtime)
    async with runtime:
        await runtime.manager.save_agent_state("alice", {"agent_id": "alice", "agent_type": "worker"})
        await asyncio.gather(
            runtime.restore_session_state("alice"),
            runtime.create_session("alice", agent_type="worker"),
            runtime.restore_session_state("alice"),
            runtime.restore_all_session_states(),
            edit(runtime, "agents", "alice"),
        )
        loops = [t for t in asyncio.all_tasks() if t.get_name() == "agent alice"]
        assert len(loops) == 1


async def test_agents_restored_while_the_runtime_runs_are_run() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.manager.save_agent_state("alice", {"agent_id": "alice", "agent_type": "worker"})
        await runtime.restore_all_session_states()
        assert await soon(runtime.result(await runtime.submit("alice", "x"))) == "alice"


async def test_an_agent_that_is_dropped_in_goes_on_with_what_it_was_doing() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        task = Task(task_id="t", agent_id="alice", name="x", status="in_progress", attempts=1)
        await runtime.manager.save("tasks", ("alice", "t"), task)
        await edit(runtime, "agents", "alice", agent_id="alice", agent_type="worker")
        assert await soon(runtime.result(task)) == "alice"


async def test_a_task_that_a_checkout_puts_back_in_progress_is_done_again() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        task = await runtime.submit("alice", "x")
        await soon(runtime.result(task))
        await edit(runtime, "tasks", ("alice", task.task_id), status="in_progress", result=None)
        assert await soon(runtime.result(task)) == "alice"


async def test_a_hand_edit_that_changes_an_agents_type_changes_who_works_for_it() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await edit(runtime, "agents", "alice", agent_type="nobody")
        task = await runtime.submit("alice", "x")
        await soon(runtime.wait_idle())
        assert runtime.session("alice").status == "waiting"
        assert (await runtime.task(task)).status == "pending"
        await edit(runtime, "agents", "alice", agent_type="worker")
        assert await soon(runtime.result(task)) == "alice"


async def test_a_message_that_a_person_removes_is_gone() -> None:
    runtime = make_runtime()
    async with runtime:
        await runtime.create_session("alice", agent_type="none")
        sent = await runtime.send_mail("bob", "alice", subject="hi")
        await runtime.manager.delete("mail", ("alice", sent.message_id))
        gone = Notice("mail", ("alice", sent.message_id), None, outside=True)
        await runtime._keeper.notice(gone)
        assert runtime.inbox("alice") == []


# -- shutting down -------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["in_progress", "completed"])
async def test_a_stop_waits_for_what_is_being_stored(word: str) -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    await runtime.start()
    await runtime.create_session("alice", agent_type="worker")
    store.hold = puts("tasks", word)
    task = await runtime.submit("alice", "x")
    await store.held.wait()
    stopping = asyncio.create_task(runtime.stop())
    await asyncio.sleep(0)
    store.gate.set()
    await soon(stopping)
    again = make_runtime(store)
    report = await again.start()
    assert report.requeued == []
    stored = await again.task(task)
    assert (stored.status, stored.attempts) in {("pending", 0), ("completed", 1)}
    await again.stop()


async def test_a_stop_saves_every_agent_that_can_be_saved() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    await runtime.start()
    for agent_id in ("alice", "bob"):
        await runtime.create_session(agent_id, agent_type="none")
        runtime.core.agents[agent_id].state.metadata["note"] = "unsaved"
    store.full = lambda change: change.kind == "agents" and change.key == ("alice",)
    with pytest.raises(StorageFullError):
        await runtime.stop()
    stored = await runtime.manager.load_agent_state("bob")
    assert stored is not None
    assert stored.metadata == {"note": "unsaved"}
    last = await runtime.manager.load_system_state("runtime")
    assert last is not None
    assert last.model_dump()["status"] == "stopped"


async def test_one_agent_that_cannot_be_checked_does_not_hide_the_others() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    async with runtime:
        for agent_id in ("alice", "bob"):
            await runtime.create_session(agent_id, agent_type="none")
            await runtime.manager.delete("agents", agent_id)
        store.full = lambda change: change.key == ("alice",)
        with pytest.raises(StorageFullError):
            await runtime.check()
        assert await runtime.manager.load_agent_state("bob") is not None
        store.full = lambda _: False


# -- what the files say --------------------------------------------------------------------


async def test_a_stopped_agent_that_mail_or_an_event_wakes_stays_stopped() -> None:
    runtime = make_runtime()
    async with runtime:
        await runtime.create_session("alice", agent_type="none")
        await runtime.stop_session("alice")
        for event in ("mail_received", "system_event"):
            await runtime.sleep("alice", wake_on=[event])
            await runtime.send_mail("bob", "alice", subject="hi")
            await runtime.emit()
            assert await runtime.manager.load_sleep_state("alice") is None
            stored = await runtime.manager.load_agent_state("alice")
            assert stored is not None
            assert stored.status == "stopped"


async def test_waking_leaves_memory_and_disk_agreed() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.create_session("alice", agent_type="worker")
        await runtime.sleep("alice", wake_on=["mail_received", "system_event"])
        await runtime.wake("alice")
        assert await runtime.check() == 0
        await runtime.sleep("alice", wake_on=["mail_received"])
        await runtime.send_mail("bob", "alice", subject="hi")
        assert await runtime.check() == 0
        await runtime.sleep("alice", wake_on=["system_event"])
        await runtime.emit()
        assert await runtime.check() == 0
        assert runtime.disagreements == []


async def test_a_handler_that_comes_later_is_no_disagreement() -> None:
    store = MemoryStateStore(clock=FakeClock())
    async with make_runtime(store) as first:
        await first.create_session("alice", agent_type="worker")
    second = make_runtime(store)
    working(second)
    async with second:
        assert await second.check() == 0


async def test_replies_to_one_message_sent_to_many_all_arrive() -> None:
    runtime = make_runtime()
    async with runtime:
        for agent_id in ("alice", "bob", "carol"):
            await runtime.create_session(agent_id, agent_type="none")
        for to in ("alice", "bob"):
            await runtime.send_mail("carol", to, subject="all", message_id="news")
            await runtime.reply(to, "news", f"yes, {to}")
        assert [mail.body for mail in runtime.inbox("carol")] == ["yes, alice", "yes, bob"]


async def test_cleaning_up_one_agents_mail_leaves_another_ones_alone() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    async with runtime:
        await runtime.create_session("a", agent_type="none")
        await runtime.create_session("a/b", agent_type="none")
        await runtime.send_mail("x", "a", subject="keep", message_id="b/m")
        await runtime.send_mail("x", "a/b", subject="done", message_id="m")
        await runtime.archive_mail("a/b", "m")
        await clock.advance(3600 * 48)
        await runtime.cleanup_old_states()
        assert [mail.subject for mail in runtime.inbox("a")] == ["keep"]
        assert not runtime.core.agents["a/b"].mail
