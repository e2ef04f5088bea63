"""Memory and store: hand edits, dropped-in files and repairs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StorageFullError,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.protocols import Document, Key, Notice
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    TroubledStore,
    edit,
    make_runtime,
    working,
)


async def test_memory_and_disk_are_compared_and_mended(tmp_path: Path) -> None:
    root = tmp_path / "state"
    runtime = AsyncAgentSessionManager(root)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="nobody")
    await runtime.tasks.submit("alice", "wait")
    await runtime.manager.flush()
    assert await runtime.reconciler.check() == 0
    (root / "agents/alice.json").unlink()
    assert await runtime.reconciler.check() == 1
    [found] = list(runtime.reconciler.drifts)
    assert (found.kind, found.key, found.what) == ("agents", ("alice",), "missing on disk")
    await runtime.manager.flush()
    assert json.loads((root / "agents/alice.json").read_text())["agent_id"] == "alice"
    assert await runtime.reconciler.check() == 0
    await runtime.stop()


async def test_a_hand_edit_of_an_idle_agent_is_taken_over(tmp_path: Path) -> None:
    root = tmp_path / "state"
    runtime = AsyncAgentSessionManager(root)
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.manager.flush()
    path = root / "agents/alice.json"
    body = json.loads(path.read_text())
    body["configuration"] = {"model": "by hand"}
    path.write_text(json.dumps(body))
    await until(lambda: runtime.agents.get("alice").configuration)
    assert runtime.agents.get("alice").configuration == {"model": "by hand"}
    task = await runtime.tasks.submit("alice", "x")
    await runtime.tasks.result(task)
    await runtime.manager.flush()
    assert json.loads(path.read_text())["configuration"] == {"model": "by hand"}
    await runtime.stop()


async def test_a_message_and_a_task_dropped_in_as_files_are_taken_up(tmp_path: Path) -> None:
    root = tmp_path / "state"
    runtime = AsyncAgentSessionManager(root)
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.manager.flush()
    (root / "mail/alice").mkdir(parents=True)
    (root / "mail/alice/note.json").write_text('{"subject": "by hand", "from_agent": "me"}')
    await until(lambda: runtime.mail.inbox("alice"))
    [message] = runtime.mail.inbox("alice")
    assert (message.message_id, message.subject) == ("note", "by hand")
    (root / "tasks/alice").mkdir(parents=True)
    (root / "tasks/alice/extra.json").write_text('{"name": "extra"}')
    extra = Task(task_id="extra", agent_id="alice")
    async with asyncio.timeout(60):
        while (await runtime.tasks.get(extra)).status != "completed":
            await asyncio.sleep(0.01)
    await runtime.stop()


async def test_an_agent_that_is_dropped_in_goes_on_with_what_it_was_doing() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        task = Task(task_id="t", agent_id="alice", name="x", status="in_progress", attempts=1)
        await runtime.manager.save("tasks", ("alice", "t"), task)
        await edit(runtime, "agents", "alice", agent_id="alice", agent_type="worker")
        assert await soon(runtime.tasks.result(task)) == "alice"


async def test_a_task_that_a_checkout_puts_back_in_progress_is_done_again() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x")
        await soon(runtime.tasks.result(task))
        await edit(runtime, "tasks", ("alice", task.task_id), status="in_progress", result=None)
        assert await soon(runtime.tasks.result(task)) == "alice"


async def test_a_hand_edit_that_changes_an_agents_type_changes_who_works_for_it() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await edit(runtime, "agents", "alice", agent_type="nobody")
        task = await runtime.tasks.submit("alice", "x")
        await soon(runtime.wait_idle())
        assert runtime.agents.get("alice").status == "waiting"
        assert (await runtime.tasks.get(task)).status == "pending"
        await edit(runtime, "agents", "alice", agent_type="worker")
        assert await soon(runtime.tasks.result(task)) == "alice"


async def test_a_message_that_a_person_removes_is_gone() -> None:
    runtime = make_runtime()
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        sent = await runtime.mail.send("bob", "alice", subject="hi")
        await runtime.manager.delete("mail", ("alice", sent.message_id))
        gone = Notice("mail", ("alice", sent.message_id), None, outside=True)
        await runtime.reconciler.notice(gone)
        assert runtime.mail.inbox("alice") == []


async def test_one_agent_that_cannot_be_checked_does_not_hide_the_others() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    async with runtime:
        for agent_id in ("alice", "bob"):
            await runtime.agents.create(agent_id, agent_type="none")
            await runtime.manager.delete("agents", agent_id)
        store.full = lambda change: change.key == ("alice",)
        with pytest.raises(StorageFullError):
            await runtime.reconciler.check()
        assert await runtime.manager.load_agent_state("bob") is not None
        store.full = lambda _: False


async def test_waking_leaves_memory_and_disk_agreed() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.sleep("alice", wake_on=["mail_received", "system_event"])
        await runtime.agents.wake("alice")
        assert await runtime.reconciler.check() == 0
        await runtime.agents.sleep("alice", wake_on=["mail_received"])
        await runtime.mail.send("bob", "alice", subject="hi")
        assert await runtime.reconciler.check() == 0
        await runtime.agents.sleep("alice", wake_on=["system_event"])
        await runtime.emit()
        assert await runtime.reconciler.check() == 0
        assert list(runtime.reconciler.drifts) == []


async def test_a_handler_that_comes_later_is_no_disagreement() -> None:
    store = MemoryStateStore(clock=FakeClock())
    async with make_runtime(store) as first:
        await first.agents.create("alice", agent_type="worker")
    second = make_runtime(store)
    working(second)
    async with second:
        assert await second.reconciler.check() == 0


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


async def test_what_a_running_handler_remembers_is_stored_at_its_end_over_a_hand_edit() -> None:
    runtime = make_runtime()
    begun, go = asyncio.Event(), asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        ctx.memory["seen"] = 1
        begun.set()
        await go.wait()

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x")
        await begun.wait()
        assert await runtime.reconciler.check() == 0
        stored = await runtime.manager.load_agent_state("alice")
        assert stored is not None
        assert stored.context.working_memory == {}
        await edit(runtime, "agents", "alice", context={"working_memory": {"seen": "by hand"}})
        go.set()
        await soon(runtime.tasks.result(task))
        assert runtime.agents.get("alice").context.working_memory == {"seen": 1}


class SlowReadStore(MemoryStateStore):
    """The next read of the task ``slow`` is answered, as it was then, once ``gate`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.slow: Key | None = None
        self.reading, self.gate = asyncio.Event(), asyncio.Event()

    async def get(self, kind: str, key: Key) -> Document | None:
        found = await super().get(kind, key)
        if kind == "tasks" and key == self.slow:
            self.slow = None
            self.reading.set()
            await self.gate.wait()
        return found


async def test_a_task_that_ends_while_its_key_is_looked_up_is_not_taken_up_again() -> None:
    store = SlowReadStore()
    runtime = make_runtime(store)
    begun, go = asyncio.Event(), asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        begun.set()
        await go.wait()

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "x", dedupe_key="k")
        await begun.wait()
        del runtime.state.agents["alice"].tasks[task.task_id]  # as after a cancelled submission
        store.slow = ("alice", task.task_id)
        again = asyncio.create_task(runtime.tasks.submit("alice", "x", dedupe_key="k"))
        await store.reading.wait()
        go.set()
        for _ in range(100):
            await asyncio.sleep(0)
        store.gate.set()
        await soon(again)
        await until(lambda: not runtime.runner.running_handlers)
        await until(lambda: not runtime.state.agents["alice"].current)
        assert list(runtime.state.agents["alice"].tasks) == []
        assert (await runtime.tasks.get(task)).status == "completed"
