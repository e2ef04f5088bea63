"""Agents that come, go and are edited, while other things happen or the disk refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    MemoryStateStore,
    StatePersistenceManager,
    StorageFullError,
    Task,
    attach,
)
from agent_state.protocols import Notice
from agent_state.testing import FakeClock
from tests.runtime.living import WORKER, TroubledStore, edit, make_runtime, puts, soon, working

# -- arrivals ------------------------------------------------------------------------------


async def test_an_agent_created_twice_at_once_lives_once() -> None:
    ran: list[str] = []
    runtime = make_runtime(TroubledStore())
    working(runtime, ran)
    async with runtime:
        made = await asyncio.gather(
            *(runtime.agents.create("alice", agent_type="worker") for _ in range(3))
        )
        assert {state.agent_id for state in made} == {"alice"}
        await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "x")))
        loops = [t for t in asyncio.all_tasks() if t.get_name() == "agent alice"]
        assert (len(loops), ran) == (1, ["alice/x"])


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


async def test_agents_restored_while_the_runtime_runs_are_run() -> None:
    runtime = make_runtime()
    working(runtime)
    async with runtime:
        await runtime.manager.save_agent_state("alice", WORKER)
        await runtime.restore_all_session_states()
        assert await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "x"))) == "alice"


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


# -- shutting down -------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["in_progress", "completed"])
async def test_a_stop_waits_for_what_is_being_stored(word: str) -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    store.hold = puts("tasks", word)
    task = await runtime.tasks.submit("alice", "x")
    await store.held.wait()
    stopping = asyncio.create_task(runtime.stop())
    await asyncio.sleep(0)
    store.gate.set()
    await soon(stopping)
    again = make_runtime(store)
    report = await again.start()
    assert report.requeued == []
    stored = await again.tasks.get(task)
    assert (stored.status, stored.attempts) in {("pending", 0), ("completed", 1)}
    await again.stop()


async def test_a_stop_saves_every_agent_that_can_be_saved() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    await runtime.start()
    for agent_id in ("alice", "bob"):
        await runtime.agents.create(agent_id, agent_type="none")
        runtime.state.agents[agent_id].state.metadata["note"] = "unsaved"
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
            await runtime.agents.create(agent_id, agent_type="none")
            await runtime.manager.delete("agents", agent_id)
        store.full = lambda change: change.key == ("alice",)
        with pytest.raises(StorageFullError):
            await runtime.reconciler.check()
        assert await runtime.manager.load_agent_state("bob") is not None
        store.full = lambda _: False


# -- what the files say --------------------------------------------------------------------


async def test_a_stopped_agent_that_mail_or_an_event_wakes_stays_stopped() -> None:
    runtime = make_runtime()
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        await runtime.agents.stop("alice")
        for event in ("mail_received", "system_event"):
            await runtime.agents.sleep("alice", wake_on=[event])
            await runtime.mail.send("bob", "alice", subject="hi")
            await runtime.emit()
            assert await runtime.manager.load_sleep_state("alice") is None
            stored = await runtime.manager.load_agent_state("alice")
            assert stored is not None
            assert stored.status == "stopped"


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


async def test_replies_to_one_message_sent_to_many_all_arrive() -> None:
    runtime = make_runtime()
    async with runtime:
        for agent_id in ("alice", "bob", "carol"):
            await runtime.agents.create(agent_id, agent_type="none")
        for to in ("alice", "bob"):
            await runtime.mail.send("carol", to, subject="all", dedupe_key="news")
            await runtime.mail.reply(to, "news", f"yes, {to}")
        assert [mail.body for mail in runtime.mail.inbox("carol")] == ["yes, alice", "yes, bob"]


async def test_cleaning_up_one_agents_mail_leaves_another_ones_alone() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    async with runtime:
        await runtime.agents.create("a", agent_type="none")
        await runtime.agents.create("a/b", agent_type="none")
        await runtime.mail.send("x", "a", subject="keep", dedupe_key="b/m")
        await runtime.mail.send("x", "a/b", subject="done", dedupe_key="m")
        await runtime.mail.archive("a/b", "m")
        await clock.advance(3600 * 48)
        await runtime.cleanup_old_states()
        assert [mail.subject for mail in runtime.mail.inbox("a")] == ["keep"]
        assert not runtime.state.agents["a/b"].mail


# -- a session manager that is not ours ----------------------------------------------------


class Notebook:
    """Another manager, whose sessions named ``odd`` cannot be exported."""

    def __init__(self, *sessions: str) -> None:
        self.sessions = set(sessions)
        self.tell: Callable[[str], None] = lambda _: None
        self.exporting = asyncio.Event()
        self.slow: asyncio.Event | None = None

    def list_sessions(self) -> set[str]:
        return self.sessions

    async def export_session(self, session_id: str) -> dict[str, Any] | None:
        self.exporting.set()
        if self.slow is not None:
            await self.slow.wait()
        if session_id == "odd":
            raise KeyError("a fault of theirs")
        return {"agent_id": session_id} if session_id in self.sessions else None

    def import_session(self, session_id: str, state: Mapping[str, Any]) -> None:
        self.sessions.add(session_id)

    def on_change(self, callback: Callable[[str], None]) -> None:
        self.tell = callback


async def test_a_session_that_cannot_be_exported_keeps_no_other_from_being_saved(
    tmp_path: Path,
) -> None:
    book = Notebook("odd")
    with pytest.raises(KeyError, match="theirs"):
        async with attach(book, tmp_path / "state") as attached:
            book.tell("odd")
            await asyncio.sleep(0)
            book.exporting.clear()
            book.sessions.add("alice")
            book.tell("alice")
            await soon(book.exporting.wait())
            await soon(attached.saved())
            assert await attached.manager.list_persisted_agents() == ["alice"]
            book.sessions |= {"bob", "zoe"}  # and says nothing
    async with StatePersistenceManager(tmp_path / "state") as manager:
        assert await manager.list_persisted_agents() == ["alice", "bob", "zoe"]


async def test_a_session_that_is_removed_just_before_the_end_does_not_come_back(
    tmp_path: Path,
) -> None:
    book = Notebook("alice")
    async with attach(book, tmp_path / "state") as attached:
        await attached.save_all_session_states()
        book.exporting.clear()
        book.slow = asyncio.Event()
        book.sessions.remove("alice")
        book.tell("alice")
        await soon(book.exporting.wait())
        book.slow = None  # the export under way never ends, and is cancelled on leaving
    async with StatePersistenceManager(tmp_path / "state") as manager:
        assert await manager.list_persisted_agents() == []
