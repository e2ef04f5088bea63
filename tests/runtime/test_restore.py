"""Restoring: what a start finds, requeues and reports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StatePersistenceManager,
    StorageError,
)
from agent_state.protocols import Document, Key
from agent_state.runtime.recovery import plan_restore
from agent_state.storage import FileStateStore, ReadOnlyStateStore
from agent_state.testing import FakeClock
from tests.deadlines import soon
from tests.runtime.runtimes import (
    WORKER,
    TroubledStore,
    counting,
    edit,
    hanging,
    make_runtime,
    puts,
    with_agent,
    working,
)


async def test_a_task_whose_process_died_is_queued_again_with_its_attempts() -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store)
    started = hanging(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    running = await runtime.tasks.submit("alice", "run")
    waiting = await runtime.tasks.submit("alice", "wait")
    await started.wait()
    await runtime.abort()

    runtime = make_runtime(store)
    counting(runtime)
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


async def test_a_task_whose_process_died_while_it_was_being_cancelled_is_cancelled() -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store)
    started = hanging(runtime)
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "run")
    await started.wait()
    cancelling = {**(await runtime.tasks.get(task)).model_dump(), "cancel_requested": True}
    await runtime.abort()
    await runtime.manager.save("tasks", ("alice", task.task_id), cancelling)

    runtime = make_runtime(store)
    counting(runtime)
    report = await runtime.start()
    assert [(t.task_id, t.status) for t in report.requeued] == [(task.task_id, "cancelled")]
    assert report.tasks_pending == 0
    assert (await runtime.tasks.get(task)).status == "cancelled"
    await runtime.stop()


async def test_an_agent_without_a_handler_waits_and_loses_nothing() -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store)
    counting(runtime)
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
    counting(runtime)
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
    await runtime.abort()
    await runtime.manager.flush()  # a dead process writes no file, and keeps no snapshot
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    async with StatePersistenceManager(store=ReadOnlyStateStore(root)) as manager:
        planned = await plan_restore(manager, clock=FakeClock())
    assert planned.after_crash
    assert [task.attempts for task in planned.requeued] == [1]
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {p: b for p, b in after.items() if b != before.get(p)} == {}
    await runtime.manager.close()


async def test_agents_restored_while_the_runtime_runs_are_run() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.manager.save_agent_state("alice", WORKER)
        await runtime.restore_all_session_states()
        assert await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "x"))) == "alice"


async def test_an_agent_restored_and_created_at_once_lives_once() -> None:
    runtime = make_runtime(TroubledStore())
    working(runtime)
    async with runtime:
        await runtime.manager.save_agent_state("alice", WORKER)
        await asyncio.gather(
            runtime.restore_session_state("alice"),
            runtime.agents.create("alice", agent_type="worker"),
            runtime.restore_session_state("alice"),
            runtime.restore_all_session_states(),
            edit(runtime, "agents", "alice"),
        )
        loops = [t for t in asyncio.all_tasks() if t.get_name() == "agent alice"]
        assert len(loops) == 1


async def test_agents_whose_repair_cannot_be_stored_are_restored_by_the_next_call() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    async with runtime:
        await runtime.manager.save_agent_state("alice", WORKER)
        left = {"task_id": "t", "agent_id": "alice", "status": "in_progress", "attempts": 1}
        await runtime.manager.save("tasks", ("alice", "t"), left)
        store.full = puts("tasks")
        report = await runtime.restore_all_session_states()
        assert report.failed == {"alice": "no space left"}
        assert (await runtime.tasks.get(("alice", "t"))).status == "in_progress"
        store.full = lambda _: False
        report = await runtime.restore_all_session_states()
        assert [task.task_id for task in report.requeued] == ["t"]
        assert await soon(runtime.tasks.result(("alice", "t"))) == "alice"


class BadSectorStore(MemoryStateStore):
    """Documents in ``bad`` cannot be read, as from a disk with a bad sector."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[tuple[str, Key]] = set()

    def _check(self, kind: str, key: Key) -> None:
        if (kind, key) in self.bad:
            raise StorageError("reading a file: input/output error", kind=kind, key=key)

    async def get(self, kind: str, key: Key) -> Document | None:
        self._check(kind, key)
        return await super().get(kind, key)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        async for document in super().scan(kind, prefix):
            self._check(kind, document.key)
            yield document


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("kind", ["agents", "tasks", "mail", "sleep"])
async def test_one_document_that_cannot_be_read_keeps_one_agent_from_running(
    kind: str, exclusive: bool
) -> None:
    store = BadSectorStore()
    manager = make_runtime(store).manager
    for name in ("alice", "bob", "carol"):
        await manager.save_agent_state(name, {"agent_id": name, "agent_type": "worker"})
        await manager.save("tasks", (name, "t"), {"task_id": "t", "agent_id": name})
        await manager.save("mail", (name, "m"), {"message_id": "m", "subject": "hi"})
        await manager.save("sleep", name, {"agent_id": name, "is_sleeping": False})
    bad = ("bob",) if kind in ("agents", "sleep") else ("bob", kind[0])
    store.bad = {(kind, bad)}
    clock = FakeClock()
    ran: list[str] = []
    runtime = make_runtime(store, clock, exclusive=exclusive)
    working(runtime, ran)
    report = await runtime.start()
    assert list(report.failed) == ["bob"]
    assert "input/output error" in report.failed["bob"]
    for name in ("alice", "carol"):
        assert await soon(runtime.tasks.result((name, "t"))) == name
    await clock.advance(31)
    assert sorted(ran) == ["alice/", "carol/"]
    store.bad = set()
    await clock.advance(31)
    assert await soon(runtime.tasks.result(("bob", "t"))) == "bob"
    assert runtime.agents.failed == {}
    assert [message.subject for message in runtime.mail.inbox("bob")] == ["hi"]
    await runtime.stop()


async def test_a_damaged_document_whose_lock_is_held_delays_one_agent(tmp_path: Path) -> None:
    """As when a process that was stopped in the middle of a commit holds it."""
    root = tmp_path / "state"
    clock = FakeClock()
    async with StatePersistenceManager(root, exclusive=False) as manager:
        for name in ("alice", "bob"):
            await manager.save_agent_state(name, {"agent_id": name, "agent_type": "worker"})
            await manager.save("tasks", (name, "t"), {"task_id": "t", "agent_id": name})
        (root / "tasks/bob/t.json").write_bytes(b'{"task')
        async with manager.lock("tasks", ("bob", "t")):
            store = FileStateStore(root, lock_timeout_seconds=0.1)
            runtime = make_runtime(store, clock, exclusive=False)
            working(runtime)
            report = await runtime.start()
            assert list(report.failed) == ["bob"]
            assert await soon(runtime.tasks.result(("alice", "t"))) == "alice"
        while runtime.agents.failed:
            await clock.advance(31)
            await asyncio.sleep(0.01)
        await runtime.stop()
