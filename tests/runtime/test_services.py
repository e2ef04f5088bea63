"""The services of a runtime: they outlive their errors, and the event loop they began in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StatePersistenceManager,
    Task,
    TaskContext,
)
from agent_state.protocols import Document, Key, Notice
from agent_state.redis import RedisStateStore
from agent_state.storage.watch import Subscription
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.redis.servers import RedisServer
from tests.runtime.runtimes import WORKER, make_runtime, working


class StumblingClock(FakeClock):
    """Its wall clock fails once for each of ``failures``."""

    failures = 0

    def now(self) -> datetime:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the clock cannot be read")
        return super().now()


async def test_timers_that_fail_are_started_again_and_told(caplog: Any) -> None:
    clock = StumblingClock()
    store = MemoryStateStore(clock=FakeClock())
    runtime = make_runtime(store, clock, save_interval_seconds=1e6)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "later", delay_seconds=100)
        await until(lambda: len(runtime.runner.timers))
        await until(lambda: clock.sleepers >= 2)
        clock.failures = 1
        await clock.advance(31)  # the timers look at the time twice a minute
        assert clock.failures == 0
        assert "the service 'timers' failed" in caplog.text
        assert "the clock cannot be read" in caplog.text
        await clock.advance(100)
        assert await soon(runtime.tasks.result(task)) == "alice"


class BreakingStream:
    """A stream of notices that fails when ``broken`` is set."""

    def __init__(self, stream: Subscription) -> None:
        self._stream = stream
        self.broken = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Notice]:
        return self

    async def __anext__(self) -> Notice:
        await self.broken.wait()
        raise OSError("the connection is gone")

    async def aclose(self) -> None:
        await self._stream.aclose()


class BreakingStore(MemoryStateStore):
    """The first stream of notices breaks; later ones report what other processes do."""

    first: BreakingStream | None = None

    async def watch(self) -> Any:
        stream = await super().watch()
        if self.first is None:
            self.first = BreakingStream(stream)
            return self.first
        return stream


async def test_a_watch_that_breaks_subscribes_again_and_looks_at_everything(caplog: Any) -> None:
    clock = FakeClock()
    store = BreakingStore(clock=clock)
    runtime = make_runtime(store, clock)
    working(runtime)
    async with runtime:
        for agent_id in ("alice", "bob"):
            await runtime.agents.create(agent_id, agent_type="worker")
        await runtime.mail.send("bob", "alice", subject="removed by another")
        [removed] = runtime.mail.inbox("alice")
        await runtime.agents.sleep("bob")
        save = runtime.manager.save
        # What another process did, while nobody was told.
        left = {"task_id": "t", "agent_id": "alice", "name": "x", "status": "pending"}
        await save("tasks", ("alice", "t"), left)
        await save("mail", ("alice", "m"), {"message_id": "m", "subject": "hello"})
        await save("agents", "carol", {**WORKER, "agent_id": "carol"})
        await runtime.manager.delete("mail", ("alice", removed.message_id))
        await runtime.manager.delete("sleep", "bob")
        assert store.first is not None
        store.first.broken.set()
        await clock.advance(2)
        assert await soon(runtime.tasks.result(("alice", "t"))) == "alice"
        await until(lambda: runtime.agents.list() == ["alice", "bob", "carol"])
        await until(lambda: [m.subject for m in runtime.mail.inbox("alice")] == ["hello"])
        await until(lambda: runtime.agents.get("bob").status == "idle")
    assert "the service 'watch' failed" in caplog.text
    assert "the connection is gone" in caplog.text


@pytest.mark.parametrize("on_files", [True, False])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("stopped", [True, False])
def test_one_runtime_object_works_in_two_event_loops(
    tmp_path: Path, on_files: bool, exclusive: bool, stopped: bool, caplog: Any
) -> None:
    """Whether the first one stopped it or not; what it did is there in the second one."""
    runtime = AsyncAgentSessionManager(
        tmp_path / "state" if on_files else None,
        store=None if on_files else MemoryStateStore(),
        exclusive=exclusive,
    )

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> list[str]:
        done: list[str] = ctx.memory.setdefault("done", [])
        done.append(task.name)
        return done

    async def life(name: str) -> Any:
        await runtime.start()
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", name, delay_seconds=0.05)
        result = await soon(runtime.tasks.result(task))
        await soon(runtime.wait_idle())
        if stopped:
            await runtime.stop()
        return result

    assert asyncio.run(life("first")) == ["first"]
    assert asyncio.run(life("second")) == ["first", "second"]
    asyncio.run(runtime.stop())
    told = "the event loop of this runtime ended before the runtime was stopped"
    assert (told in caplog.text) != stopped


def test_a_runtime_whose_loop_ended_can_be_stopped_in_another_one() -> None:
    runtime = AsyncAgentSessionManager(store=MemoryStateStore())
    asyncio.run(runtime.start())
    asyncio.run(runtime.stop())
    asyncio.run(runtime.stop())


class CountingStore(MemoryStateStore):
    """Counts what is read."""

    reads = 0

    async def get(self, kind: str, key: Key) -> Document | None:
        self.reads += 1
        return await super().get(kind, key)


async def test_a_periodic_check_of_many_idle_agents_is_bounded_and_reaches_each() -> None:
    clock = FakeClock()
    store = CountingStore(clock=clock)
    for number in range(300):
        agent_id = f"w{number:03}"
        body = {"agent_id": agent_id, "agent_type": "none", "status": "waiting"}
        await make_runtime(store, clock).manager.save_agent_state(agent_id, body)
    runtime = make_runtime(store, clock)
    async with runtime:
        for _ in range(2):
            store.reads = 0
            await clock.advance(30)
            assert 0 < store.reads <= 60
        await runtime.manager.delete("agents", "w123")  # and nobody was told
        await clock.advance(6 * 30)
        assert await runtime.manager.load_agent_state("w123") is not None
        # What was touched is compared in the next round.
        await runtime.tasks.submit("w222", "x")
        await runtime.manager.delete("agents", "w222")
        await clock.advance(30)
        assert await runtime.manager.load_agent_state("w222") is not None


async def test_restoring_again_while_the_runtime_runs_reports_no_crash() -> None:
    for exclusive in (True, False):
        runtime = make_runtime(exclusive=exclusive)
        async with runtime:
            assert not (await runtime.restore_all_session_states()).after_crash


class OddStore(MemoryStateStore):
    """Cannot read the message ``odd``, for a reason that nobody foresaw."""

    async def get(self, kind: str, key: Key) -> Document | None:
        if key[-1] == "odd":
            raise RuntimeError("unforeseen")
        return await super().get(kind, key)


async def test_an_unforeseen_error_in_one_notice_does_not_hide_the_others(caplog: Any) -> None:
    runtime = make_runtime(OddStore())
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        await runtime.manager.save("mail", ("alice", "m"), {"message_id": "m"})
        for message_id in ("odd", "m"):
            notice = Notice("mail", ("alice", message_id), 1, outside=True)
            await runtime.reconciler.notice(notice)
        assert [message.message_id for message in runtime.mail.inbox("alice")] == ["m"]
        assert "unforeseen" in caplog.text


@pytest.mark.parametrize("where", ["exclusive", "shared", "redis"])
def test_in_a_second_event_loop_changes_from_outside_are_noticed(
    where: str, tmp_path: Path, server: RedisServer
) -> None:
    """The whole runtime works there: its timers, its agents, and what watches the store."""

    def store() -> Any:
        return RedisStateStore(server.url, prefix="app:", timeout_seconds=10)

    root = tmp_path / "state"
    runtime = AsyncAgentSessionManager(
        None if where == "redis" else root,
        store=store() if where == "redis" else None,
        exclusive=where == "exclusive",
    )
    working(runtime)

    async def life(message_id: str) -> Any:
        async with runtime:
            await runtime.agents.create("alice", agent_type="worker")
            if where == "redis":
                async with StatePersistenceManager(store=store()) as other:
                    await other.save("mail", ("alice", message_id), {"message_id": message_id})
            else:
                (root / "mail/alice").mkdir(parents=True, exist_ok=True)
                (root / f"mail/alice/{message_id}.json").write_text('{"subject": "by hand"}')
            await until(lambda: message_id in runtime.state.agents["alice"].mail)
            # Many at once, so that what is waited for is bound to this loop.
            tasks = await asyncio.gather(
                *(runtime.tasks.submit("alice", "x", delay_seconds=0.05) for _ in range(20))
            )
            return await asyncio.gather(*(soon(runtime.tasks.result(task)) for task in tasks))

    for message_id in ("first", "second", "third"):
        assert asyncio.run(life(message_id)) == ["alice"] * 20


async def test_a_periodic_check_of_a_long_queue_is_bounded_and_reaches_each_task() -> None:
    clock = FakeClock()
    store = CountingStore(clock=clock)
    runtime = make_runtime(store, clock)
    async with runtime:
        await runtime.agents.create("ann", agent_type="none")
        tasks = [(await runtime.tasks.submit("ann", "x")).task_id for _ in range(300)]
        await clock.advance(30)  # all were touched
        for _ in range(3):
            await runtime.agents.stop("ann")
            await runtime.agents.start("ann")
            store.reads = 0
            await clock.advance(30)
            assert 0 < store.reads <= 60
        await runtime.manager.delete("tasks", ("ann", tasks[7]))  # and nobody was told
        await clock.advance(7 * 30)
        assert await runtime.manager.load("tasks", ("ann", tasks[7])) is not None
        await runtime.tasks.cancel(("ann", tasks[8]))
        await runtime.tasks.retry(("ann", tasks[8]))
        await runtime.manager.delete("tasks", ("ann", tasks[8]))
        await clock.advance(30)
        assert await runtime.manager.load("tasks", ("ann", tasks[8])) is not None


class BlockingStore(MemoryStateStore):
    """Answers for the task ``slow`` when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answer = asyncio.Event(), asyncio.Event()
        self.reads = 0

    async def get(self, kind: str, key: Key) -> Document | None:
        if kind == "tasks" and self.reads == 5:
            self.asked.set()
            await self.answer.wait()
        self.reads += kind == "tasks"
        return await super().get(kind, key)


async def test_whoever_cancels_a_task_waits_for_no_check_of_the_whole_queue() -> None:
    """The check compares one task after the other, and others have their turn in between."""
    store = BlockingStore()
    runtime = make_runtime(store)
    async with runtime:
        await runtime.agents.create("ann", agent_type="none")
        tasks = [(await runtime.tasks.submit("ann", "x")).task_id for _ in range(50)]
        store.reads = 0
        check = asyncio.create_task(runtime.reconciler.check())
        await store.asked.wait()
        cancelled = asyncio.create_task(runtime.tasks.cancel(("ann", tasks[40])))
        await asyncio.sleep(0)
        store.answer.set()
        assert await cancelled
        assert store.reads < 40
        assert await check == 0
