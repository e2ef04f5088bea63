"""Other people's states come back field by field, and nothing is added that nobody said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent_state.sessions  # noqa: F401  # its schemas are known once it is imported
from agent_state import AgentState, SleepState, StatePersistenceManager, StateStore
from agent_state.migrations import VERSIONS
from agent_state.models import SCHEMAS, Task
from agent_state.storage import MemoryStateStore

# The shape that other session managers keep: agents with configuration, context and counters,
# queues of three lists, sleep with its wake events, mailboxes.
AGENT: dict[str, Any] = {
    "agent_id": "alice_session_123",
    "agent_name": "Alice",
    "agent_type": "assistant",
    "status": "ACTIVE",
    "created_at": "2025-06-06T13:30:00",
    "last_active": "2025-06-06T14:30:00.123456",
    "configuration": {"model": "small", "temperature": 0.7, "tools": ["search", None]},
    "context": {
        "system_prompt": "You are helpful.",
        "conversation_history": [
            {"role": "user", "content": "hi", "timestamp": "2025-06-06T13:31:00"},
            {"role": "assistant", "content": [{"type": "text", "text": "hello"}]},
            "a plain line",
        ],
        "working_memory": {"topic": "persistence", "scores": [1, 2.5, True]},
        "agent_data": {},
        "mood": "curious",
    },
    "tool_sets": {"files": ["read", "write"]},
    "counters": {"errors": 0, "by_kind": {"timeout": 2}},
    "metadata": {"custom": {"deep": [{"er": "Ünïcode \u2028"}]}},
    "max_concurrent_tasks": 5,
}

TASK_QUEUE: dict[str, Any] = {
    "agent_id": "alice_session_123",
    "pending_tasks": [
        {"task_id": "t1", "name": "summarise", "priority": "high", "args": [1, 2]},
        {"id": "t2", "description": "no name"},
        "just text",
        {"neither": "id"},
    ],
    "in_progress_tasks": [{"task_id": "t3", "status": "running", "started_at": "2025-06-06"}],
    "completed_tasks": [{"task_id": "t4", "result": {"ok": True}}, {"task_id": "t4", "again": 1}],
    "queue_size_limit": 10,
}

SLEEP: dict[str, Any] = {
    "agent_id": "alice_session_123",
    "is_sleeping": True,
    "sleep_started": "2025-06-06T14:00:00",
    "sleep_duration_minutes": 30,
    "wake_events": ["mail_received", "a word of their own"],
}

MAILBOX: dict[str, Any] = {
    "agent_id": "alice_session_123",
    "unread_messages": [{"message_id": "m1", "from": "bob", "body": "hi"}],
    "mail_history": [{"message_id": "m2", "subject": "old", "body": None}],
    "pending_replies": ["m1"],
}

SYSTEM: dict[str, Any] = {"active_sessions": ["alice_session_123"], "version": {"major": 1}}


@pytest.fixture(params=["memory", "shared", "exclusive"])
def make_manager(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    memory = MemoryStateStore()

    def make() -> StatePersistenceManager:
        if request.param == "memory":
            store: StateStore = memory
            return StatePersistenceManager(store=store)
        return StatePersistenceManager(tmp_path, exclusive=request.param == "exclusive")

    return make


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("agent_state", AGENT),
        ("task_queue_state", TASK_QUEUE),
        ("sleep_state", SLEEP),
        ("mailbox_state", MAILBOX),
        ("system_state", SYSTEM),
    ],
)
async def test_other_peoples_states_come_back_field_by_field(
    make_manager: Any, name: str, state: dict[str, Any]
) -> None:
    given_state = copy.deepcopy(state)
    async with make_manager() as manager:
        await getattr(manager, f"save_{name}")("alice_session_123", given_state)
    assert given_state == state

    async with make_manager() as manager:
        loaded = await getattr(manager, f"load_{name}")("alice_session_123")
        assert loaded.model_dump() == state

        # Saving what was loaded changes nothing: no diff.
        await getattr(manager, f"save_{name}")("alice_session_123", loaded)
        again = await getattr(manager, f"load_{name}")("alice_session_123")
        assert again.model_dump() == state


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_save_of_what_was_loaded_leaves_the_file_as_it_was(
    tmp_path: Path, exclusive: bool
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.save_agent_state("alice", AGENT)
        await manager.save_task_queue_state("alice", TASK_QUEUE)
        await manager.save_mailbox_state("alice", MAILBOX)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert len(before) > 6

    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        agent = await manager.load_agent_state("alice")
        queue = await manager.load_task_queue_state("alice")
        mail = await manager.load_mailbox_state("alice")
        assert agent is not None
        assert queue is not None
        assert mail is not None
        await manager.save_agent_state("alice", agent)
        await manager.save_task_queue_state("alice", queue)
        await manager.save_mailbox_state("alice", mail)

    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


async def test_defaults_nobody_set_are_not_written(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        await manager.save_agent_state("alice", AgentState(agent_id="alice"))
    content = json.loads((tmp_path / "agents" / "alice.json").read_bytes())

    assert {name for name in content if not name.startswith("_")} == {"agent_id"}


def test_a_default_that_was_set_or_changed_is_written() -> None:
    state = AgentState(agent_id="a", status="idle")
    assert state.model_dump() == {"agent_id": "a", "status": "idle"}

    state = AgentState(agent_id="a")
    state.context.working_memory["x"] = 1
    state.counters["n"] = 0
    assert state.model_dump() == {
        "agent_id": "a",
        "context": {"working_memory": {"x": 1}},
        "counters": {"n": 0},
    }


def test_two_states_share_no_default() -> None:
    one, other = AgentState(agent_id="a"), AgentState(agent_id="b")
    one.context.working_memory["x"] = 1
    one.configuration["y"] = 2

    assert other.context.working_memory == {}
    assert other.configuration == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
extras = st.dictionaries(st.from_regex(r"x_[a-z]{1,5}", fullmatch=True), json_values, max_size=4)


@given(st.sampled_from(sorted(SCHEMAS)), extras)
def test_unknown_fields_are_kept_by_every_model(name: str, extra: dict[str, Any]) -> None:
    fixture = Path(__file__).parent / "fixtures" / name / f"v{VERSIONS.get(name, 1)}.json"
    stored = json.loads(fixture.read_bytes())
    required = {
        field: stored[field]
        for field, info in SCHEMAS[name].model_fields.items()
        if info.is_required()
    }
    state = {**required, **extra}

    model = SCHEMAS[name].model_validate(state)

    assert model.model_dump() == state
    assert SCHEMAS[name].model_validate(model.model_dump()) == model


def test_a_task_written_in_full_is_read_in_full() -> None:
    task = Task(task_id="t", attempts=2, steps={"a": {"status": "done", "result": [1]}})  # type: ignore[dict-item]

    back = Task.model_validate(json.loads(json.dumps(task.model_dump())))

    assert back == task
    assert back.steps["a"].result == [1]


def test_sleep_without_an_end_is_sleep_until_woken() -> None:
    assert SleepState(agent_id="a").model_dump() == {"agent_id": "a"}
    assert SleepState(agent_id="a").is_sleeping
