"""What a start finds, puts back to work, and says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StatePersistenceManager,
    Task,
    TaskContext,
)
from agent_state.runtime.recovery import plan_restore
from agent_state.storage import ReadOnlyStateStore
from agent_state.testing import FakeClock
from tests.runtime.living import die, make_runtime, until


def hanging(runtime: AsyncAgentSessionManager) -> asyncio.Event:
    started = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    return started


def working(runtime: AsyncAgentSessionManager) -> None:
    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        return ctx.attempt


async def test_a_task_whose_process_died_is_queued_again_with_its_attempts() -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store)
    started = hanging(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    running = await runtime.tasks.submit("alice", "run")
    waiting = await runtime.tasks.submit("alice", "wait")
    await started.wait()
    await die(runtime)

    runtime = make_runtime(store)
    working(runtime)
    report = await runtime.start()
    assert report.after_crash
    assert report.agents == ["alice"]
    assert report.tasks_pending == 2
    assert [(t.task_id, t.attempts, t.status) for t in report.requeued] == [
        (running.task_id, 1, "pending")
    ]
    assert await runtime.tasks.result(running) == 2
    assert await runtime.tasks.result(waiting) == 1
    await runtime.stop()


async def test_a_stop_in_good_order_puts_back_what_did_not_finish() -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store, grace_seconds=0.01)
    started = hanging(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    task = await runtime.tasks.submit("alice", "run")
    await started.wait()
    await runtime.stop()

    runtime = make_runtime(store)
    working(runtime)
    report = await runtime.start()
    assert not report.after_crash
    assert report.requeued == []
    assert await runtime.tasks.result(task) == 1
    await runtime.stop()


async def test_a_running_handler_is_given_its_grace() -> None:
    runtime = make_runtime(grace_seconds=30)
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        await go.wait()
        return "finished"

    store = runtime.manager.store
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    task = await runtime.tasks.submit("alice", "run")
    await until(lambda: runtime.runner.running_handlers)
    stopping = asyncio.create_task(runtime.stop())
    await until(lambda: runtime.state.stopping)
    go.set()
    await stopping
    async with StatePersistenceManager(store=store) as manager:
        stored = await manager.load("tasks", ("alice", task.task_id))
        assert isinstance(stored, Task)
        assert (stored.status, stored.result) == ("completed", "finished")


async def test_an_agent_without_a_handler_waits_and_loses_nothing() -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store)
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.agents.sleep("alice")
    task = await runtime.tasks.submit("alice", "x")
    await runtime.stop()

    runtime = make_runtime(store)
    report = await runtime.start()
    assert report.waiting == ["alice"]
    assert "no handler for 1 agent" in " ".join(report.lines())
    await runtime.agents.wake("alice")
    assert runtime.agents.get("alice").status == "waiting"
    assert (await runtime.tasks.get(task)).status == "pending"
    working(runtime)
    assert await runtime.tasks.result(task) == 1
    await runtime.stop()


async def test_one_damaged_file_is_contained_and_the_rest_is_restored(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with AsyncAgentSessionManager(root) as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="worker")
    (root / "agents/alice.json").write_text('{"agent_id": "ali')
    (root / "mail/bob").mkdir(parents=True)
    (root / "mail/bob/m1.json").write_text("[]")

    runtime = AsyncAgentSessionManager(root)
    report = await runtime.start()
    assert "bob" in report.agents
    said = {incident.path: incident for incident in report.contained}
    assert set(said) == {"agents/alice.json", "mail/bob/m1.json"}
    for incident in said.values():
        assert incident.kept is not None
        assert (root / incident.kept).exists()
        reason = json.loads((root / f"{incident.kept}.reason.json").read_text())
        assert reason["was"] == incident.path
    await runtime.stop()


async def test_the_plan_of_a_restore_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "state"
    runtime = AsyncAgentSessionManager(root)
    started = hanging(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.tasks.submit("alice", "run")
    await started.wait()
    await die(runtime)
    await runtime.manager.flush()  # a dead process writes no file, and keeps no snapshot
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    async with StatePersistenceManager(store=ReadOnlyStateStore(root)) as manager:
        planned = await plan_restore(manager, clock=FakeClock())
    assert planned.after_crash
    assert [task.attempts for task in planned.requeued] == [1]
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {p: b for p, b in after.items() if b != before.get(p)} == {}
    await runtime.manager.close()


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
