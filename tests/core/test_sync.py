"""The blocking manager is the asynchronous one on a thread of its own."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path

import pytest

from agent_state import RevisionConflictError, StateNotFoundError, StateValidationError
from agent_state import StatePersistenceManager as Asynchronous
from agent_state.sync import StatePersistenceManager


def test_states_go_in_and_out(tmp_path: Path) -> None:
    with StatePersistenceManager(tmp_path / "state") as manager:
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
    with StatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
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
    with StatePersistenceManager(tmp_path / "state") as manager:
        with pytest.raises(StateValidationError, match="agent_id"):
            manager.save_agent_state("alice", {})
        with pytest.raises(StateNotFoundError), manager.edit("agents", "nobody"):
            pass
        manager.save_agent_state("alice", {"agent_id": "alice"})
        with pytest.raises(RevisionConflictError), manager.edit("agents", "alice") as state:
            manager.save_agent_state("alice", {"agent_id": "alice", "status": "active"})
            state.status = "waiting"


def test_many_log_records_are_streamed(tmp_path: Path) -> None:
    with StatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
        with manager.group() as group:
            for n in range(1000):
                group.append("notes", "all", {"n": n})
        assert [entry.record["n"] for entry in manager.read_log("notes", "all")] == list(
            range(1000)
        )
        assert next(manager.read_log("notes", "all")).record == {"n": 0}


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    with StatePersistenceManager(tmp_path / "state"):
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_using_it_closed_is_said(tmp_path: Path) -> None:
    manager = StatePersistenceManager(tmp_path / "state")
    with pytest.raises(RuntimeError, match="not open"):
        manager.list_persisted_agents()


def test_every_method_of_the_asynchronous_manager_is_here() -> None:
    here = {name for name, _ in inspect.getmembers(StatePersistenceManager, callable)}
    there = {
        name for name, _ in inspect.getmembers(Asynchronous, callable) if not name.startswith("_")
    }
    # Watching needs a loop to wait on; groups are committed by their own `with`.
    assert there - here == {"watch", "subscribe", "lock", "commit", "new_group"}
