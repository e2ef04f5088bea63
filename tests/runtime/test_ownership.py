"""Several runtimes on one store: each agent runs in the one that owns it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    FileStateStore,
    LeaseLostError,
    MemoryStateStore,
    StatePersistenceManager,
    StorageError,
    StorageFullError,
    Task,
    TaskContext,
)
from agent_state.clock import stamp
from agent_state.protocols import Change, Check, Delete, Document, Key, Notice, Put
from agent_state.runtime import transitions
from agent_state.runtime.task_queue import LiveTask
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    WORKER,
    RecordingStore,
    TroubledStore,
    counting,
    edit,
    hanging,
    make_runtime,
    puts,
    sharing,
)


async def test_an_agent_belongs_to_the_runtime_that_holds_its_lease() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first = sharing(store, clock, "first")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    second = sharing(store, clock, "second")
    report = await second.start()
    assert report.held_elsewhere == ["alice"]
    await second.tasks.submit("alice", "from the second")
    task = await first.tasks.submit("alice", "from the first")
    assert await first.tasks.result(task) == "first"
    await second.stop()
    await first.stop()


async def test_the_agents_of_a_dead_runtime_move_when_their_leases_expire() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    started = asyncio.Event()

    @first.handler("worker")
    async def hang(ctx: TaskContext, task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    await first.start()
    await first.agents.create("alice", agent_type="worker")
    task = await first.tasks.submit("alice", "move me")
    await started.wait()
    second = sharing(store, clock, "second")
    await second.start()
    await first.abort()
    await clock.advance(15)
    assert (await second.tasks.get(task)).status == "in_progress"
    await clock.advance(30)
    await until(lambda: second.state.agents["alice"].leased)
    await second.wait_idle()
    done = await second.tasks.get(task)
    assert (done.status, done.result, done.attempts, done.interruptions) == (
        "completed",
        "second",
        2,
        1,
    )
    await second.stop()


async def test_a_stop_in_good_order_gives_the_agents_away_at_once() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first = sharing(store, clock, "first")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    await first.stop()
    second = sharing(store, clock, "second")
    report = await second.start()
    assert report.held_elsewhere == []
    task = await second.tasks.submit("alice", "x")
    assert await second.tasks.result(task) == "second"
    await second.stop()


async def test_a_runtime_that_has_lost_an_agent_stops_its_handler() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    stopped = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.tasks.submit("alice", "x")
    await until(lambda: runtime.runner.running_handlers)
    await lose_alice(runtime)
    with pytest.raises(LeaseLostError):
        await runtime.save_session_state("alice")
    await soon(stopped.wait())
    assert not runtime.state.agents["alice"].leased
    await runtime.stop()


async def test_a_runtime_whose_task_was_taken_stops_its_handler() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    stopped = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x")
        await until(lambda: runtime.runner.running_handlers)
        theirs = await runtime.tasks.get(task)
        assert theirs.lease is not None
        theirs.lease.owner = "another runtime"
        await runtime.manager.save("tasks", ("alice", task.task_id), theirs)
        await clock.advance(31)  # the periodic check
        await soon(stopped.wait())
        await until(lambda: not runtime.runner.running_handlers)
        assert await runtime.tasks.get(task) == theirs


async def test_two_runtimes_share_real_files(tmp_path: Path) -> None:
    def make(name: str) -> AsyncAgentSessionManager:
        runtime = AsyncAgentSessionManager(tmp_path / "state", exclusive=False)

        @runtime.handler("worker")
        async def worker(ctx: TaskContext, task: Task) -> str:
            return name

        return runtime

    async with make("first") as first, make("second") as second:
        await first.agents.create("alice", agent_type="worker")
        await second.agents.create("bob", agent_type="worker")
        mine = await first.tasks.submit("alice", "x")
        assert await first.tasks.result(mine) == "first"
        async with asyncio.timeout(60):
            while "bob" not in first.agents.list():
                await asyncio.sleep(0.01)
        theirs = await first.tasks.submit("bob", "from the first runtime")
        assert await asyncio.wait_for(first.tasks.result(theirs), 60) == "second"


async def test_who_only_talks_to_an_agent_does_not_write_its_state() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    async with first, second:
        await first.agents.create("alice", agent_type="worker")
        await second.restore_session_state("alice")
        later = await second.tasks.submit("alice", "later", delay_seconds=1000)
        await first.tasks.result(await first.tasks.submit("alice", "learned"))
        await second.tasks.cancel(later)
        await second.agents.sleep("alice", wake_on=["mail_received", "system_event"])
        await second.mail.send("bob", "alice", subject="hi")
        await second.agents.sleep("alice", wake_on=["system_event"])
        await second.emit()
        await second.agents.sleep("alice", seconds=5)
        await clock.advance(6)
        await second.agents.wake("alice")
        await second.agents.stop("alice")
        await second.save_session_state("alice")
        stored = await first.manager.load_agent_state("alice")
        assert stored is not None
        assert stored.context.working_memory == {"learned": "first"}
        assert stored.status == "stopped"


async def test_a_task_that_another_runtime_has_done_is_not_done_again() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock, exclusive=False)
    ran = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        ran.append(task.name)

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", delay_seconds=10)
        body = {**task.model_dump(), "status": "completed", "result": "theirs"}
        await runtime.manager.save("tasks", ("alice", task.task_id), body)  # and no notice of it
        waiting = asyncio.create_task(runtime.tasks.result(task))
        await clock.advance(20)
        assert await soon(waiting) == "theirs"
        assert ran == []
        assert (await runtime.tasks.get(task)).result == "theirs"


async def test_who_lost_an_agent_unnoticed_does_not_overwrite_what_the_next_one_did() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock, exclusive=False)
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        await go.wait()
        return "mine"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x")
        await until(lambda: runtime.runner.running_handlers)
        stored = await runtime.tasks.get(task)
        theirs = {**stored.model_dump(), "status": "completed", "result": "theirs", "lease": None}
        await runtime.manager.save("tasks", ("alice", task.task_id), theirs)
        waiting = asyncio.create_task(runtime.tasks.result(task))
        go.set()
        assert await soon(waiting) == "theirs"
        await soon(runtime.wait_idle())
        assert (await runtime.tasks.get(task)).result == "theirs"


async def test_leases_are_renewed_although_one_agent_could_not_be_taken_over() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    gone = sharing(store, clock, "gone")
    begun = asyncio.Event()

    @gone.handler("slow")
    async def slow(ctx: TaskContext, task: Task) -> None:
        begun.set()
        await asyncio.Event().wait()

    await gone.start()
    await gone.agents.create("bob", agent_type="slow")
    task = await gone.tasks.submit("bob", "x")
    await begun.wait()
    runtime = sharing(store, clock, "here")

    @runtime.handler("slow")
    async def quick(ctx: TaskContext, task: Task) -> str:
        return "here"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await gone.abort()
        store.full = lambda change: change.kind == "tasks"
        await clock.advance(100)
        store.full = lambda _: False
        await clock.advance(100)
        assert runtime.state.agents["alice"].leased
        assert await soon(runtime.tasks.result(task)) == "here"


async def test_work_that_comes_while_an_agent_changes_hands_is_done() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    gone = make_runtime(store, clock, name="gone", exclusive=False, lease_seconds=30)
    here = sharing(store, clock, "here")
    begun = asyncio.Event()

    @gone.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        begun.set()
        await asyncio.Event().wait()

    await gone.start()
    await gone.agents.create("alice", agent_type="worker")
    await gone.tasks.submit("alice", "left")
    await begun.wait()
    await here.start()
    await gone.abort()
    store.hold = puts("tasks", "interruptions")  # read what was left, and not yet lived by it
    taking = asyncio.create_task(clock.advance(95))
    await store.held.wait()
    task = await soon(here.tasks.submit("alice", "meanwhile"))
    store.gate.set()
    await taking
    assert await soon(here.tasks.result(task)) == "here"
    await here.stop()


async def test_what_is_restored_is_what_the_last_holder_left() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    scanned = asyncio.Event()
    read = store.get

    async def slowly(kind: str, key: tuple[str, ...]) -> object:
        if kind == "system" and key == ("owners", "alice") and not scanned.is_set():
            scanned.set()
            await first.tasks.result(await first.tasks.submit("alice", "last words"))
            await first.stop()
        return await read(kind, key)

    store.get = slowly  # type: ignore[method-assign,assignment]
    await second.start()
    assert second.agents.list() == ["alice"]
    memory = second.agents.get("alice").context.working_memory
    assert memory == {"last words": "first"}
    await second.stop()


async def test_creating_an_agent_that_a_dead_runtime_left_at_work_goes_on_with_its_task() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    here = sharing(store, clock, "here")
    async with here:
        await here.manager.save_agent_state("alice", WORKER)
        task = Task(task_id="t", agent_id="alice", name="x", status="in_progress", attempts=1)
        await here.manager.save("tasks", ("alice", "t"), task)
        await here.agents.create("alice", agent_type="worker")
        assert await soon(here.tasks.result(task)) == "here"


async def test_a_runtime_beside_another_one_does_not_start_after_a_crash() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    first = sharing(store, clock, "first")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    second = sharing(store, clock, "second")
    assert not (await second.start()).after_crash
    await second.stop()
    await first.abort()
    clock.jump(60)
    third = sharing(store, clock, "third")
    assert (await third.start()).after_crash
    await third.stop()


async def test_nobody_waits_for_an_agent_that_went_elsewhere() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        raise OSError("again later")

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.submit("alice", "x", max_attempts=100)
        await until(runtime.state.agents["alice"].next_due)
        waiting = asyncio.create_task(runtime.wait_idle())
        await lose_alice(runtime)
        await runtime.reconciler.notice(Notice("system", ("owners", "alice"), 2, outside=True))
        await clock.advance(1)
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


async def lose_alice(runtime: AsyncAgentSessionManager) -> None:
    """Let another live runtime take the agent, without a notice of it."""
    until = runtime.state.clock.now() + timedelta(hours=1)
    heartbeat = {"owner": "another", "expires_at": stamp(until)}
    await runtime.manager.save("system", ("runtimes", "another"), heartbeat)
    theirs = {"agent_id": "alice", "owner": "another", "token": 99}
    await runtime.manager.save("system", ("owners", "alice"), theirs)


async def test_nothing_is_saved_of_an_agent_once_another_runtime_owns_it() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        agent = runtime.state.agents["alice"]
        agent.state.metadata["note"] = "saved"
        await runtime.save_session_state("alice")
        await lose_alice(runtime)
        agent.state.metadata["note"] = "too late"
        with pytest.raises(LeaseLostError):
            await runtime.save_session_state("alice")
        stored = await runtime.manager.load_agent_state("alice")
        assert stored is not None
        assert stored.metadata == {"note": "saved"}


async def test_a_lease_that_changes_hands_has_a_higher_token() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    tokens = []
    for name in ("first", "second"):
        async with sharing(store, clock, name) as runtime:
            await runtime.agents.create("alice", agent_type="worker")
            await clock.advance(60)
            tokens.append((await owner_of(runtime, "alice"))["token"])
    assert tokens == [1, 2]


async def test_the_owner_of_an_agent_queues_a_task_again_that_nobody_else_can_work_on() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    async with sharing(store, clock, "here") as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", delay_seconds=3600)
        lease = {"owner": "another", "expires_at": (clock.now() + timedelta(minutes=1)).isoformat()}
        claimed = {"status": "in_progress", "lease": lease, "attempts": 1, "not_before": None}
        await edit(runtime, "tasks", ("alice", task.task_id), **claimed)
        assert await soon(runtime.tasks.result(task)) == "here"


async def test_a_runtime_that_does_not_hold_a_sleeper_does_not_wake_it() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    async with first, second:
        await first.agents.create("alice", agent_type="worker")
        await first.agents.sleep("alice", wake_on=["mail_received"])
        await second.restore_session_state("alice")
        await second.mail.send("bob", "alice", subject="hi")
        assert await first.manager.load_sleep_state("alice") is not None


async def test_a_result_is_read_where_the_agent_is_not_held() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    async with first, second:
        await first.agents.create("alice", agent_type="worker")
        await second.restore_session_state("alice")
        task = await second.tasks.submit("alice", "x")
        done = {**task.model_dump(), "status": "completed", "result": "theirs"}
        await first.manager.save("tasks", ("alice", task.task_id), done)
        assert await soon(second.tasks.result(task)) == "theirs"


async def owner_of(runtime: AsyncAgentSessionManager, agent_id: str) -> dict[str, object]:
    owner = await runtime.manager.load("system", ("owners", agent_id))
    assert owner is not None
    return owner.model_dump()


async def test_an_agent_that_is_cleaned_up_is_held_no_longer() -> None:
    store, clock = MemoryStateStore(clock=FakeClock()), FakeClock()
    async with sharing(store, clock, "here") as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.stop("alice")
        await clock.advance(72 * 3600)
        report = await runtime.cleanup_old_states()
        assert report.agents == ["alice"]
        assert runtime.agents.list() == []
        assert (await owner_of(runtime, "alice"))["owner"] == ""


async def test_a_result_from_another_runtime_is_given_when_its_agent_moves_here() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    async with second:
        task = await first.tasks.submit("alice", "x", delay_seconds=5)
        waiting = asyncio.create_task(second.tasks.result(task))
        await clock.advance(6)
        await soon(first.tasks.result(task))
        assert not waiting.done()
        await first.stop()
        await clock.advance(31)
        assert await soon(waiting) == "first"


async def test_a_stop_leaves_the_agents_of_others_alone() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    runtime = sharing(store, clock, "here")
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        theirs = {**await owner_of(runtime, "alice"), "owner": "another", "token": 2}
        await runtime.manager.save("system", ("owners", "alice"), theirs)
    assert await owner_of(runtime, "alice") == theirs


async def test_a_start_that_fails_gives_back_what_it_had_taken() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = sharing(store, clock, "here")
    await runtime.manager.save_agent_state("alice", WORKER)
    store.full = lambda change: change.key == ("runtime",)
    with pytest.raises(StorageFullError):
        await runtime.start()
    assert await runtime.manager.keys("system", ("runtimes",)) == []


async def test_a_runtime_writes_one_heartbeat_however_many_agents_and_tasks_it_has() -> None:
    clock = FakeClock()
    store = RecordingStore(clock)
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    hanging(runtime)
    async with runtime:
        for number in range(50):
            await runtime.agents.create(f"w{number}", agent_type="worker")
            await runtime.tasks.submit(f"w{number}", "x")
        await until(lambda: runtime.runner.running_handlers == 50)
        store.commits.clear()
        await clock.advance(300)
        written = [(change.kind, change.key) for [change] in store.commits]
        assert written == [("system", ("runtimes", runtime.state.owner))] * 30
        assert runtime.runner.running_handlers == 50


async def test_a_stop_frees_all_agents_by_one_write() -> None:
    clock = FakeClock()
    store = RecordingStore(clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    await first.start()
    for number in range(50):
        await first.agents.create(f"w{number}", agent_type="worker")
    async with second:
        store.commits.clear()
        await first.stop()
        made = [c for changes in store.commits for c in changes if not isinstance(c, Check)]
        assert [c for c in made if c.key[0] == "owners"] == []
        [heartbeat] = [c for c in made if c.key[0] == "runtimes"]
        assert isinstance(heartbeat, Delete)
        await clock.advance(11)
        await until(lambda: all(agent.leased for agent in second.state.agents.values()))


class DisturbedStore(MemoryStateStore):
    """While ``disturbed``, another process saves ``w7``'s task before each commit of it."""

    disturbed = False

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        for change in changes:
            if self.disturbed and isinstance(change, Put) and change.key == ("w7", "t"):
                body = json.loads(change.body) | {"priority": "high", "note": len(self.notes)}
                self.notes.append(change.key)
                theirs = Put("tasks", ("w7", "t"), json.dumps(body).encode(), change.schema)
                await super().commit([theirs])
        return await super().commit(changes)

    @property
    def notes(self) -> list[tuple[str, ...]]:
        notes: list[tuple[str, ...]] = self.__dict__.setdefault("_notes", [])
        return notes


@pytest.mark.parametrize("exclusive", [True, False])
async def test_of_500_agents_with_one_that_conflicts_499_run(exclusive: bool) -> None:
    clock = FakeClock()
    store = DisturbedStore(clock=clock)
    manager = make_runtime(store, clock).manager
    names = [f"w{number}" for number in range(500)]
    for name in names:
        await manager.save_agent_state(name, {"agent_id": name, "agent_type": "worker"})
        task = Task(task_id="t", agent_id=name, name="x", status="in_progress", attempts=1)
        await manager.save("tasks", (name, "t"), task)
    runtime = make_runtime(store, clock, exclusive=exclusive)
    ran: set[str] = set()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        ran.add(ctx.agent_id)
        return ctx.agent_id

    store.disturbed = True
    report = await runtime.start()
    assert list(report.failed) == ["w7"]
    assert "w7 is not restored yet: expected revision" in "\n".join(report.lines())
    assert len(report.requeued) == 499
    await until(lambda: len(ran) == 499)
    assert "w7" not in ran
    waiting = asyncio.create_task(runtime.wait_idle())
    await clock.advance(100)
    assert not waiting.done(), "w7 still has work, and nobody else does it"
    store.disturbed = False
    await clock.advance(31)
    await soon(waiting)
    assert len(ran) == 500
    assert runtime.agents.failed == {}
    await runtime.stop()


async def test_an_agent_whose_lock_another_process_holds_delays_no_other() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock, lock_timeout_seconds=0.2)
    gone = sharing(store, clock, "gone")
    await gone.start()
    for name in ("alice", "bob", "carol"):
        await gone.agents.create(name, agent_type="worker")
    await gone.abort()
    here = sharing(store, clock, "here")
    release = asyncio.Event()

    async def stand_still() -> None:
        async with gone.manager.lock("system", ("owners", "bob")):
            await release.wait()

    async with here:
        for name in ("alice", "bob", "carol"):
            await here.tasks.submit(name, "x")
        stopped = asyncio.create_task(stand_still())
        await clock.advance(45)
        leased = {name for name, agent in here.state.agents.items() if agent.leased}
        await until(lambda: here.agents.failed)
        assert "bob" in here.agents.failed
        assert leased <= {"alice", "carol"}
        release.set()
        await stopped
        await clock.advance(45)
        await until(lambda: here.state.agents["bob"].leased)
        await soon(here.wait_idle())


async def test_a_runtime_that_stands_still_in_its_renewal_keeps_none_of_its_agents(
    tmp_path: Path,
) -> None:
    clock = FakeClock()

    def store() -> FileStateStore:
        return FileStateStore(tmp_path / "state", clock=clock, lock_timeout_seconds=0.5)

    gone = sharing(store(), clock, "gone")
    names = [f"w{number}" for number in range(40)]
    await gone.start()
    for name in names:
        await gone.agents.create(name, agent_type="worker")
    await gone.abort()
    heartbeat = ("runtimes", gone.state.owner)
    here = sharing(store(), clock, "here")
    async with StatePersistenceManager(store=store()) as still, still.lock("system", heartbeat):
        await clock.advance(45)
        report = await here.start()
        assert sorted(here.state.agents) == sorted(names)
        assert not report.failed
        tasks = [await here.tasks.submit(name, "x") for name in names]
        assert [await soon(here.tasks.result(task)) for task in tasks] == ["here"] * 40
        await here.stop()


async def test_while_the_store_refuses_the_heartbeat_no_agent_is_run_and_none_is_lost() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    attempts: list[int] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return "done"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x")
        await until(lambda: attempts)
        token = runtime.state.agents["alice"].token
        store.full = lambda _: True
        await clock.advance(25)
        assert runtime.runner.running_handlers == 1, "the heartbeat is valid"
        await clock.advance(10)
        await until(lambda: not runtime.runner.running_handlers)
        assert not runtime.state.agents["alice"].leased
        waiting = asyncio.create_task(runtime.wait_idle())
        await clock.advance(100)
        assert not waiting.done(), "nobody else does its work"
        store.full = lambda _: False
        await clock.advance(15)
        assert await soon(runtime.tasks.result(task)) == "done"
        await soon(waiting)
        assert runtime.state.agents["alice"].token == token
        assert attempts == [1, 2]


class StoppedStore(MemoryStateStore):
    """Does not answer while ``gate`` is clear."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.gate = asyncio.Event()
        self.gate.set()

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        await self.gate.wait()
        return await super().commit(changes)


async def test_a_store_that_does_not_answer_stops_the_handlers_when_the_heartbeat_expires() -> None:
    clock = FakeClock()
    store = StoppedStore(clock)
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    begun: list[int] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        begun.append(ctx.attempt)
        if ctx.attempt == 1:
            await asyncio.Event().wait()

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.submit("alice", "x")
        await until(lambda: begun)
        store.gate.clear()
        await clock.advance(29)
        assert runtime.runner.running_handlers == 1
        await clock.advance(3)
        await until(lambda: not runtime.runner.running_handlers)
        store.gate.set()
        await clock.advance(15)
        await soon(runtime.wait_idle())
        assert begun == [1, 2]


async def test_a_runtime_that_slept_past_its_heartbeat_keeps_the_agents_that_nobody_took() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)
    hanging(runtime)
    async with runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="worker")
            await runtime.tasks.submit(name, "x")
        await until(lambda: runtime.runner.running_handlers == 2)
        bob = runtime.state.agents["bob"]
        fence = bob.fence
        clock._passed += 100  # as a process that is stopped: no timer runs meanwhile
        await lose_alice(runtime)
        await clock.advance(1)
        await until(lambda: runtime.runner.running_handlers == 1)
        assert not runtime.state.agents["alice"].leased
        assert runtime.state.agents["alice"].owner in ("another", None)
        assert bob.leased
        assert (bob.fence, bob.current is not None) == (fence, True)


async def test_a_released_agent_is_taken_at_the_notice_of_it() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    await first.start()
    await first.agents.create("alice", agent_type="worker")
    async with second:
        await first.stop()
        gone = Notice("system", ("runtimes", first.state.owner), None, outside=True)
        await second.reconciler.notice(gone)
        await clock.advance(0.5)
        await until(lambda: second.state.agents["alice"].leased)


async def test_a_lease_of_an_older_version_is_respected_and_replaced() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = sharing(store, clock, "here")
    await runtime.manager.save_agent_state("alice", WORKER)
    lease = {"agent_id": "alice", "owner": "older", "token": 7}
    lease["expires_at"] = stamp(clock.now() + timedelta(seconds=60))
    await runtime.manager.save("system", ("leases", "alice"), lease)
    async with runtime:
        assert runtime.report is not None
        assert runtime.report.held_elsewhere == ["alice"]
        await clock.advance(61)
        await clock.advance(20)
        await until(lambda: runtime.state.agents["alice"].leased)
        assert (await owner_of(runtime, "alice"))["token"] == 8
        assert await runtime.manager.load("system", ("leases", "alice")) is None


async def test_the_heartbeats_of_the_dead_are_removed_by_the_next_start() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    dead = sharing(store, clock, "dead")
    await dead.start()
    await dead.agents.create("alice", agent_type="worker")
    await dead.abort()
    clock.jump(60)
    async with sharing(store, clock, "here") as runtime:
        assert runtime.report is not None
        assert runtime.report.after_crash
        found = await runtime.manager.keys("system", ("runtimes",))
        assert found == [("runtimes", runtime.state.owner)]


async def test_rounds_read_the_heartbeat_of_each_other_runtime_once() -> None:
    clock = FakeClock()
    store = ReadingStore(clock=clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    async with first, second:
        for number in range(50):
            await first.agents.create(f"w{number}", agent_type="worker")
            await second.restore_session_state(f"w{number}")
        store.read.clear()
        await clock.advance(10.5)
        heartbeat = ("system", ("runtimes", first.state.owner))
        assert [read for read in store.read if read[0] == "system"] == [heartbeat]


class ReadingStore(MemoryStateStore):
    """Records what is read."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.read: list[tuple[str, Key]] = []

    async def get(self, kind: str, key: Key) -> Document | None:
        self.read.append((kind, key))
        return await super().get(kind, key)


@pytest.mark.parametrize("on_files", [False, True])
async def test_what_a_former_owner_does_for_an_agent_is_refused(
    tmp_path: Path, on_files: bool
) -> None:
    """Its memory, tasks and mail marks; on shared files as in memory."""
    runtime = AsyncAgentSessionManager(
        tmp_path / "state" if on_files else None,
        store=None if on_files else MemoryStateStore(),
        exclusive=False,
        lease_seconds=600,
    )
    begun = asyncio.Event()
    refused: list[LeaseLostError] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            for act in (ctx.checkpoint({"late": True}), ctx.step("late", len, "")):
                try:
                    await act
                except LeaseLostError as error:
                    refused.append(error)

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        sent = await runtime.mail.send("bob", "alice", subject="hi")
        await runtime.tasks.submit("alice", "x")
        await soon(begun.wait())
        await lose_alice(runtime)
        before = await stored_of(runtime)
        with pytest.raises(LeaseLostError):
            await runtime.mail.read("alice", sent.message_id)
        await until(lambda: len(refused) == 2)
        assert await stored_of(runtime) == before
    async with runtime.manager:
        assert await stored_of(runtime) == before


async def stored_of(runtime: AsyncAgentSessionManager) -> dict[object, int]:
    return {
        (kind, loaded.key): loaded.revision
        for kind in ("agents", "tasks", "sleep", "mail")
        async for loaded in runtime.manager.scan(kind)
    }


async def test_an_agent_is_not_taken_because_its_owners_heartbeat_was_read_long_ago() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    async with first, second:
        await first.agents.create("alice", agent_type="worker")
        await second.restore_session_state("alice")
        await first.agents.create("bob", agent_type="worker")
        clock._passed += 29  # both stood still
        for runtime in (first, second):
            assert runtime.ownership is not None
            await runtime.ownership.renew()
        clock._passed += 2
        await second.restore_session_state("bob")
        assert not second.state.agents["bob"].leased
        assert first.state.agents["bob"].leased


async def test_an_agent_is_not_taken_from_an_owner_that_renewed_after_its_heartbeat_was_read() -> (
    None
):
    clock = FakeClock()
    store = TroubledStore(clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    assert first.ownership is not None
    assert second.ownership is not None
    async with first, second:
        await first.agents.create("alice", agent_type="worker")
        clock._passed += 31  # both stood still
        await second.ownership.renew()
        store.hold = puts("system", '"agent_id":"alice"')
        taking = asyncio.create_task(second.restore_session_state("alice"))
        await soon(store.held.wait())
        await first.ownership.renew()
        store.gate.set()
        await soon(taking)
        assert first.state.agents["alice"].leased
        assert not second.state.agents["alice"].leased
        task = await first.tasks.submit("alice", "x")
        assert await soon(first.tasks.result(task)) == "first"


class AwayStore(MemoryStateStore):
    """Answers nothing but errors while it is ``away``."""

    away = False

    async def get(self, kind: str, key: Key) -> Document | None:
        self._look()
        return await super().get(kind, key)

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        self._look()
        return await super().commit(changes)

    def _look(self) -> None:
        if self.away:
            raise StorageError("the store is away")


async def test_while_the_store_is_away_the_work_of_a_dead_owner_is_not_taken_for_done() -> None:
    clock = FakeClock()
    store = AwayStore(clock=clock)
    first, second = sharing(store, clock, "first"), sharing(store, clock, "second")
    go_on = asyncio.Event()

    @first.handler("slow")
    async def slow(ctx: TaskContext, task: Task) -> str:
        await go_on.wait()
        return "first"

    second.handler("slow")(slow)
    async with first, second:
        await first.agents.create("alice", agent_type="slow")
        await second.restore_session_state("alice")
        await clock.advance(10.5)
        assert second.state.agents["alice"].owner == first.state.owner
        task = await second.tasks.submit("alice", "x")
        await soon(second.wait_idle())
        store.away = True
        await clock.advance(40)
        assert second.state.agents["alice"].owner is None
        waiting = asyncio.create_task(second.wait_idle())
        await clock.advance(40)
        assert not waiting.done()
        go_on.set()
        store.away = False
        await clock.advance(40)
        assert await soon(second.tasks.result(task)) == "first"
        await soon(waiting)


async def test_the_heartbeat_is_renewed_while_a_start_takes_longer_than_it_is_valid() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = sharing(store, clock, "here")
    await runtime.manager.save_agent_state("alice", WORKER)
    task = Task(task_id="t", agent_id="alice", name="x", status="in_progress", attempts=1)
    await runtime.manager.save("tasks", ("alice", "t"), task)
    store.hold = puts("tasks")
    starting = asyncio.create_task(runtime.start())
    await store.held.wait()
    await clock.advance(100)
    heartbeat = await runtime.manager.load("system", ("runtimes", runtime.state.owner))
    assert heartbeat is not None
    assert heartbeat.model_dump()["expires_at"] > stamp(clock.now())
    store.gate.set()
    await soon(starting)
    assert await soon(runtime.tasks.result(("alice", "t"))) == "here"
    await runtime.stop()


async def claim(runtime: AsyncAgentSessionManager) -> None:
    await runtime.tasks.submit("alice", "x")


async def save_all(runtime: AsyncAgentSessionManager) -> None:
    runtime.state.agents["alice"].state.metadata["late"] = True
    await runtime.save_all_session_states()


async def compare(runtime: AsyncAgentSessionManager) -> None:
    runtime.state.agents["alice"].state.metadata["late"] = True
    await runtime.reconciler.check()


async def save_task(runtime: AsyncAgentSessionManager) -> None:
    """A task is missing in the store, and is about to be saved again."""
    agent = runtime.state.agents["alice"]
    now = runtime.state.clock.now()
    task = transitions.new_task("t", "alice", "x", {}, now=now, delay_seconds=1000)
    agent.put(LiveTask(task, 0), task, 0)
    await runtime.reconciler.check()


@pytest.mark.parametrize("act", [claim, save_all, compare, save_task])
async def test_what_began_before_an_agent_was_lost_changes_nothing_after(
    act: Callable[[AsyncAgentSessionManager], Coroutine[object, object, None]],
) -> None:
    """The runtime knows by then that it lost the agent, and so has nothing to check."""
    clock = FakeClock()
    runtime = make_runtime(MemoryStateStore(), clock, exclusive=False, lease_seconds=30)
    counting(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.wait_idle()
        agent = runtime.state.agents["alice"]
        async with agent.lock:
            acting = asyncio.create_task(act(runtime))
            await until(lambda: "waiters" in repr(agent.lock))
            await lose_alice(runtime)
            runtime.state.lose(agent, "belongs to another runtime now")
            before = await stored_of(runtime)
        await soon(asyncio.wait({acting}))
        await runtime.save_all_session_states()
        assert await stored_of(runtime) == before
