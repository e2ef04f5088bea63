"""The blocking manager is the asynchronous one on a thread of its own."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent_state import (
    AgentState,
    RevisionConflictError,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.models import OpenModel
from agent_state.protocols import Notice
from agent_state.sync import SyncStatePersistenceManager


def test_states_go_in_and_out(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path / "state") as manager:
        assert manager.save_agent_state("alice", {"agent_id": "alice"}) == 1
        manager.save_task_queue_state("alice", {"agent_id": "alice", "pending_tasks": [{"n": 1}]})
        manager.save_mailbox_state("alice", {"agent_id": "alice", "messages": []})
        manager.save_sleep_state("alice", {"agent_id": "alice"})
        manager.save_system_state("s", {"n": 1})
        with manager.edit("agents", "alice") as state:
            state.context.working_memory["topic"] = "x"
        with manager.group() as group:
            group.save("agents", "bob", {"agent_id": "bob"})
            group.append("notes", "all", {"n": 1})
        assert manager.append("notes", "all", {"n": 2}, dedupe_key="d") == 2
        assert [entry.record["n"] for entry in manager.read_log("notes", "all")] == [1, 2]
        assert manager.list_persisted_agents() == ["alice", "bob"]
        assert [loaded.key for loaded in manager.scan("agents")] == [("alice",), ("bob",)]
        manager.flush()
    with SyncStatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
        alice = manager.load_agent_state("alice")
        assert alice is not None
        assert alice.context.working_memory == {"topic": "x"}
        queue = manager.load_task_queue_state("alice")
        assert queue is not None
        assert queue.pending_tasks == [{"n": 1}]
        assert manager.load_mailbox_state("alice") is not None
        assert manager.load_sleep_state("alice") is not None
        assert manager.load_system_state("s") is not None
        assert manager.delete("agents", "bob")
        assert manager.keys("agents") == [("alice",)]
        assert manager.cleanup_old_states().total == 0
        assert manager.incidents() == []


def test_errors_come_through(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path / "state") as manager:
        with pytest.raises(StateValidationError, match="agent_id"):
            manager.save_agent_state("alice", {})
        with pytest.raises(StateNotFoundError), manager.edit("agents", "nobody"):
            pass
        manager.save_agent_state("alice", {"agent_id": "alice"})
        with pytest.raises(RevisionConflictError), manager.edit("agents", "alice") as state:
            manager.save_agent_state("alice", {"agent_id": "alice", "status": "active"})
            state.status = "waiting"
        with pytest.raises(ZeroDivisionError), manager.edit("agents", "alice") as state:
            state.status = "stopped"
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), manager.group() as group:
            group.delete("agents", "alice")
            raise ZeroDivisionError
        assert manager.load("agents", "alice") == AgentState(agent_id="alice", status="active")


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_edit_in_one_thread_keeps_other_threads_out(tmp_path: Path, exclusive: bool) -> None:
    with SyncStatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        manager.save("counters", "a", {"n": 0})

        def increment() -> None:
            for _ in range(10):
                with manager.edit("counters", "a") as state:
                    state.n += 1

        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(increment) for _ in range(3)]:
                done.result()

        assert manager.load("counters", "a") == OpenModel.model_validate({"n": 30})


def test_the_thread_that_holds_a_lock_may_save_and_lock_again(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path) as manager, ThreadPoolExecutor(1) as pool:
        with manager.lock("notes", "a"), manager.lock("notes", ("a",)):
            other = pool.submit(manager.save, "notes", "a", {"n": "theirs"})
            assert manager.save("notes", "a", {"n": "mine"}, expected=0) == 1
            with manager.edit("notes", "a") as state:
                state.n = "edited"
            group = manager.new_group()
            group.append("notes", "a", {"n": 1})
            assert manager.commit(group) == [1]
            assert not other.done()
        assert other.result() == 3


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_lock_may_be_left_in_another_thread(tmp_path: Path, exclusive: bool) -> None:
    with (
        SyncStatePersistenceManager(tmp_path, exclusive=exclusive) as manager,
        ThreadPoolExecutor(1) as pool,
    ):
        for change in (manager.lock("notes", "a"), manager.group()):
            change.__enter__()
            pool.submit(change.__exit__, None, None, None).result()
            assert pool.submit(manager.save, "notes", "a", {}).result()
        manager.save("notes", "a", {"n": 1})
        with manager.edit("notes", "a") as state:  # a lock of this thread's own
            state.n += 1
            other = pool.submit(manager.save, "notes", "a", {"n": "theirs"})
            assert not other.done()
        assert other.result() == 4


def test_a_watch_reports_every_change_after_it_began(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path) as manager:
        notices = manager.watch()
        manager.save("notes", "a", {"n": 1})
        assert next(notices) == Notice("notes", ("a",), 1)


def test_closing_ends_a_watch_in_another_thread(tmp_path: Path) -> None:
    received = threading.Event()

    def follow(notices: Iterator[Notice]) -> int:
        count = 0
        for _ in notices:
            received.set()
            count += 1
        return count

    with SyncStatePersistenceManager(tmp_path) as manager, ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow, manager.watch())
        manager.save("notes", "a", {"n": 1})
        received.wait()
        manager.close()
        assert following.result() == 1


def test_many_log_records_are_streamed(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
        with manager.group() as group:
            for n in range(1000):
                group.append("notes", "all", {"n": n})
        assert [entry.record["n"] for entry in manager.read_log("notes", "all")] == list(
            range(1000)
        )
        assert next(manager.read_log("notes", "all")).record == {"n": 0}


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    with SyncStatePersistenceManager(tmp_path / "state"):
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_using_it_closed_is_said(tmp_path: Path) -> None:
    manager = SyncStatePersistenceManager(tmp_path / "state")
    with pytest.raises(RuntimeError, match="not open"):
        manager.list_persisted_agents()


def test_every_method_of_the_asynchronous_manager_is_here() -> None:
    here = {name for name, _ in inspect.getmembers(SyncStatePersistenceManager, callable)}
    there = {name for name, _ in inspect.getmembers(StatePersistenceManager, callable)}
    public = {name for name in there if not name.startswith("_")}
    assert public - here == {"subscribe"}  # a blocking watch subscribes when it is called
