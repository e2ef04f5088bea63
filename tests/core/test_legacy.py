"""What the ancestors of this library wrote is taken in whole, or refused whole; never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RevisionConflictError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.legacy import import_legacy
from tests.deadlines import soon, until

META = {"_saved_at": "2025-06-06T14:30:00", "_version": "1.0", "_checksum": None}
ANCESTOR: dict[str, Any] = {
    "agents/run_7.json": {
        **META,
        "_session_id": "run_7",
        "agent_id": "eve",
        "agent_name": "Eve",
        "status": "active",
        "configuration": {"model": "m", "provider": "p"},
        "context": {"conversation_history": ["hello"], "working_memory": {"n": 1}},
        "task_queue": {"pending_tasks": [{"task_id": "a"}], "current_task": "b"},
        "metadata": {"error_count": 2},
    },
    "tasks/eve_tasks.json": {
        **META,
        "agent_id": "eve",
        "pending_tasks": [{"task_id": "a", "type": "read"}, {"id": "b", "deep": {"x": [1, None]}}],
        "in_progress_tasks": [{"task_id": "c"}],
        "completed_tasks": [{"task_id": "d", "result": 4}, "an old note"],
        "paused": True,
    },
    "sleep/eve_sleep.json": {
        **META,
        "agent_id": "eve",
        "is_sleeping": True,
        "sleep_until": "2999-01-01T00:00:00",
        "wake_events": ["mail_received"],
    },
}
PLANNED: dict[str, Any] = {
    "agents/eve_session_123.json": {**META, "agent_id": "eve", "status": "idle"},
    "tasks/eve_tasks_123.json": {**META, "pending_tasks": [{"task_id": "a"}]},
    "mail/mailboxes.json": {
        "mailboxes": {
            "eve": [{"message_id": "m1", "from_agent": "bob", "subject": "hi"}],
            "bob": {"messages": [{"message_id": "m2", "to_agent": "bob", "status": "read"}]},
        },
        "_version": "1.0",
    },
    "mail/mail_history.json": [
        {"message_id": "m0", "to_agent": "eve", "subject": "old"},
        {"message_id": "m9", "to_agent": "bob", "status": "replied"},
    ],
    "system/active_sessions.json": {"sessions": ["eve_session_123"]},
}


def write(root: Path, files: dict[str, Any]) -> dict[str, bytes]:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {name: (root / name).read_bytes() for name in files}


async def pending(manager: StatePersistenceManager, agent_id: str) -> list[Any]:
    queue = await manager.load_task_queue_state(agent_id)
    assert queue is not None
    return queue.pending_tasks


# -- whole queues and mailboxes ---------------------------------------------------------------

LISTS: list[list[Any]] = [
    [{"id": "t1", "type": "analysis"}, {"id": "t2"}],
    [{"type": "no id"}, {"type": "no id, too"}],
    ["read the mail", "read the mail"],
    [{"task_id": "x"}, "text", 5, None, ["a", "list"], True],
    [{"inline": "one of ours"}],
    [{"inline": 1, "id": "not one of ours"}],
]


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("items", LISTS, ids=str)
async def test_a_queue_written_as_one_document_keeps_every_item_over_a_save(
    tmp_path: Path, items: list[Any], exclusive: bool
) -> None:
    write(tmp_path, {"tasks/alice.json": {"agent_id": "alice", "pending_tasks": items}})
    expected = [item["inline"] if item == {"inline": "one of ours"} else item for item in items]
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        queue = await manager.load_task_queue_state("alice")
        assert queue is not None
        assert queue.pending_tasks == expected
        await manager.save_task_queue_state("alice", queue)
        assert await pending(manager, "alice") == expected
    async with StatePersistenceManager(tmp_path) as manager:
        assert await pending(manager, "alice") == expected


@pytest.mark.parametrize("field", ["messages", "unread", "mail_history"])
async def test_a_mailbox_written_as_one_document_keeps_every_message(
    tmp_path: Path, field: str
) -> None:
    messages = [{"id": "m1", "body": "hi"}, {"subject": "no id"}, "a note"]
    write(tmp_path, {"mail/alice.json": {"agent_id": "alice", field: messages}})
    async with StatePersistenceManager(tmp_path) as manager:
        for _ in range(2):
            mailbox = await manager.load_mailbox_state("alice")
            assert mailbox is not None
            assert mailbox.model_dump()[field] == messages
            await manager.save_mailbox_state("alice", mailbox)


async def test_references_and_items_in_one_list_are_in_its_order(tmp_path: Path) -> None:
    body = {"agent_id": "alice", "pending_tasks": [{"id": "t2"}, "t1", "t3", {"id": "t4"}]}
    write(tmp_path, {"tasks/alice.json": body, "tasks/alice/t1.json": {"task_id": "t1", "n": 1}})
    async with StatePersistenceManager(tmp_path) as manager:
        expected = [{"id": "t2"}, {"task_id": "t1", "n": 1}, "t3", {"id": "t4"}]
        assert await pending(manager, "alice") == expected


async def test_a_reference_of_ours_to_a_task_that_is_gone_is_no_item(
    manager: StatePersistenceManager,
) -> None:
    await manager.save_task_queue_state(
        "alice", {"agent_id": "alice", "pending_tasks": [{"id": "t1"}, {"id": "t2"}]}
    )
    await manager.delete("tasks", ("alice", "t1"))

    assert await pending(manager, "alice") == [{"id": "t2"}]


async def test_a_start_makes_tasks_of_a_queue_that_a_person_wrote(tmp_path: Path) -> None:
    items = [{"id": "t1", "type": "analysis"}, {"id": "t2"}, "a note"]
    write(
        tmp_path,
        {
            "agents/alice.json": {"agent_id": "alice", "agent_type": "worker"},
            "tasks/alice.json": {"agent_id": "alice", "pending_tasks": items, "mine": 1},
            "mail/alice.json": {"agent_id": "alice", "messages": [{"message_id": "m1"}]},
        },
    )
    done = []
    runtime = AsyncAgentSessionManager(tmp_path)

    @runtime.handler("worker")
    async def worker(ctx: Any, task: Any) -> None:
        done.append((task.task_id, task.model_extra.get("type")))

    async with runtime:
        await soon(runtime.wait_idle())
        assert [mail.message_id for mail in runtime.mail.inbox("alice")] == ["m1"]
        queue = await runtime.manager.load_task_queue_state("alice")
        assert queue is not None
        assert (queue.pending_tasks, queue.model_dump()["mine"]) == (["a note"], 1)
        assert [task["task_id"] for task in queue.completed_tasks] == ["t1", "t2"]
    assert done == [("t1", "analysis"), ("t2", None)]


async def test_a_queue_that_is_dropped_under_a_running_server_is_worked_on(tmp_path: Path) -> None:
    runtime = AsyncAgentSessionManager(tmp_path)
    done = []

    @runtime.handler("worker")
    async def worker(ctx: Any, task: Any) -> None:
        done.append(task.task_id)

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        body = {"agent_id": "alice", "pending_tasks": [{"id": "t1"}, {"id": "t2"}]}
        write(tmp_path, {"tasks/alice.json": body})
        await until(lambda: len(done) == 2)
    assert sorted(done) == ["t1", "t2"]


# -- directories of an ancestor ---------------------------------------------------------------


async def check_eve(manager: StatePersistenceManager) -> None:
    assert await manager.list_persisted_agents() == ["eve"]
    agent = await manager.load_agent_state("eve")
    assert agent is not None
    written = ANCESTOR["agents/run_7.json"]
    assert agent.context.conversation_history == ["hello"]
    assert agent.configuration == written["configuration"]
    assert agent.metadata["error_count"] == 2
    assert agent.metadata["session_id"] == "run_7"
    queue = await manager.load_task_queue_state("eve")
    assert queue is not None
    expected = {name: ANCESTOR["tasks/eve_tasks.json"][name] for name in queue.model_dump()}
    assert queue.model_dump() == expected
    sleep = await manager.load_sleep_state("eve")
    assert sleep is not None
    assert sleep.sleep_until == "2999-01-01T00:00:00"


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_start_in_an_ancestors_directory_brings_everything_over_once(
    tmp_path: Path, exclusive: bool
) -> None:
    written = write(tmp_path, ANCESTOR)
    for number in range(2):
        async with AsyncAgentSessionManager(tmp_path, exclusive=exclusive) as runtime:
            report = runtime.report
            assert report is not None
            assert sorted(report.legacy.files) == ([] if number else sorted(written))
            assert runtime.agents.list() == ["eve"]
            tasks = await runtime.tasks.list("eve")
            assert [task.task_id for task in tasks] == ["a", "b", "c"]
            assert (report.asleep, report.without_agent) == (["eve"], [])
    for name, data in written.items():
        assert not (tmp_path / name).exists()
        assert (tmp_path / ".legacy" / name).read_bytes() == data


@pytest.mark.parametrize("into", ["memory", "shared", "exclusive"])
async def test_an_import_from_another_directory_does_not_change_it(
    tmp_path: Path, into: str
) -> None:
    written = write(tmp_path / "old", ANCESTOR)
    target: dict[str, Any] = {"state_dir": tmp_path / "new", "exclusive": into == "exclusive"}
    if into == "memory":
        target = {"store": MemoryStateStore()}
    async with StatePersistenceManager(**target) as manager:
        report = await import_legacy(manager, tmp_path / "old")
        again = await import_legacy(manager, tmp_path / "old")

        await check_eve(manager)
    assert sorted(report.files) == sorted(written) == sorted(again.known)
    assert (report.kept, again.files, again.tasks) == ({}, [], [])
    assert report.tasks == ["eve/a", "eve/b", "eve/c", "eve/d"]
    assert {name: (tmp_path / "old" / name).read_bytes() for name in written} == written


async def test_a_start_in_the_planned_layout_brings_over_mail_and_sessions(tmp_path: Path) -> None:
    write(tmp_path, PLANNED)
    async with AsyncAgentSessionManager(tmp_path) as runtime:
        manager = runtime.manager
        assert runtime.agents.list() == ["eve"]
        assert [mail.message_id for mail in runtime.mail.inbox("eve")] == ["m1"]
        assert await pending(manager, "eve") == [{"task_id": "a"}]
        eve, bob = [await manager.load_mailbox_state(name) for name in ("eve", "bob")]
        assert eve is not None
        assert bob is not None
        assert eve.messages == PLANNED["mail/mailboxes.json"]["mailboxes"]["eve"]
        assert [mail["message_id"] for mail in eve.model_dump()["mail_history"]] == ["m0"]
        assert [mail["message_id"] for mail in bob.messages] == ["m2"]
        assert [mail["status"] for mail in bob.model_dump()["mail_history"]] == ["replied"]
        assert await manager.load("mail", "mailboxes") is None
        sessions = await manager.load_system_state("active_sessions")
        assert sessions is not None
        assert sessions.model_extra == PLANNED["system/active_sessions.json"]


BROKEN: dict[str, Any] = {
    "tasks/bad_tasks.json": {**META, "agent_id": "bad", "pending_tasks": {"not": "a list"}},
    "tasks/torn_tasks.json": '{"agent_id": "torn", "pending_ta',
    "tasks/nan_tasks.json": '{"_version": "1.0", "agent_id": "nan", "pending_tasks": [{"n": NaN}]}',
    "sleep/odd_sleep.json": {**META, "agent_id": "odd", "is_sleeping": "perhaps"},
    "mail/mail_history.json": [{"message_id": "m1", "to_agent": "eve"}, {"message_id": "m2"}],
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_file_that_cannot_be_brought_over_is_left_whole_and_told(
    tmp_path: Path, name: str
) -> None:
    written = write(tmp_path / "old", {**ANCESTOR, name: BROKEN[name]})
    async with StatePersistenceManager(tmp_path / "new") as manager:
        report = await import_legacy(manager, tmp_path / "old")

        await check_eve(manager)
        assert [*report.kept] == [name]
        assert await manager.keys("mail") == []
    assert sorted(report.files) == sorted(ANCESTOR)
    assert (tmp_path / "old" / name).read_bytes() == written[name]


async def test_what_is_stored_already_is_not_changed(tmp_path: Path) -> None:
    write(tmp_path / "old", ANCESTOR)
    async with StatePersistenceManager(tmp_path / "new") as manager:
        await manager.save_agent_state("eve", {"agent_id": "eve", "status": "mine"})
        await manager.save("tasks", ("eve", "a"), {"task_id": "a", "attempts": 1, "type": "other"})
        await import_legacy(manager, tmp_path / "old")

        agent, older = [await manager.load_agent_state(name) for name in ("eve", "run_7")]
        assert agent is not None
        assert older is not None
        assert (agent.status, older.agent_name) == ("mine", "Eve")
        items = await pending(manager, "eve")
        assert {"task_id": "a", "type": "read"} in items
        assert {"task_id": "a", "attempts": 1, "type": "other"} in items


async def test_a_directory_that_is_none_is_refused(manager: StatePersistenceManager) -> None:
    with pytest.raises(StateValidationError, match="nowhere"):
        await import_legacy(manager, "nowhere")


async def test_an_agent_that_is_called_like_a_queue_is_left_alone(tmp_path: Path) -> None:
    body = {"agent_id": "to_tasks", "pending_tasks": [{"id": "t"}]}
    files = {"agents/to_tasks.json": {"agent_id": "to_tasks"}, "tasks/to_tasks.json": body}
    write(tmp_path, files)
    async with AsyncAgentSessionManager(tmp_path) as runtime:
        assert runtime.agents.list() == ["to_tasks"]
        assert [task.task_id for task in await runtime.tasks.list("to_tasks")] == ["t"]


# -- names with capitals ----------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_file_that_a_person_named_with_capitals_is_taken_and_renamed(
    tmp_path: Path, exclusive: bool
) -> None:
    files = {
        "agents/Eve.json": {"agent_id": "Eve"},
        "tasks/Eve/Task-1.json": {"task_id": "Task-1"},
        "mail/Eve/m.json": {"message_id": "m"},
        "sleep/Eve.json": {"agent_id": "Eve", "sleep_until": "2999-01-01T00:00:00Z"},
        "tasks/Eve_tasks.json": {**META, "agent_id": "Eve", "pending_tasks": [{"id": "T9"}]},
    }
    written = write(tmp_path, files)
    async with AsyncAgentSessionManager(tmp_path, exclusive=exclusive) as runtime:
        report = runtime.report
        assert report is not None
        assert (report.contained, report.asleep) == ([], ["Eve"])
        assert sorted(t.task_id for t in await runtime.tasks.list("Eve")) == ["T9", "Task-1"]
        assert [mail.message_id for mail in runtime.mail.inbox("Eve")] == ["m"]
        write(tmp_path, {"agents/Mallory.json": {"agent_id": "Mallory"}})
        await until(lambda: "Mallory" in runtime.agents.list())
    assert not any((tmp_path / name).exists() for name in written)
    assert (tmp_path / "agents/!eve.json").exists()
    assert not (tmp_path / "tasks/Eve").exists()


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_file_with_capitals_is_found_by_the_first_who_asks_for_it(
    tmp_path: Path, exclusive: bool
) -> None:
    """It had been found by a listing alone: a save before one made a second document."""
    files = {
        "agents/Eve.json": {"agent_id": "Eve", "n": 1},
        "agents/Mallory.json": {"agent_id": "Mallory", "n": 1},
        "tasks/Eve/Task-1.json": {"task_id": "Task-1"},
        "tasks/!eve/Task-2.json": {"task_id": "Task-2"},
        "tasks/Zed.json": {"pending_tasks": [{"id": "T9"}]},
    }
    written = write(tmp_path, files)
    logs = [tmp_path / "notes/Read.jsonl", tmp_path / "notes/Eve/Written.jsonl"]
    for log in logs:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('{"n": 1}\n')
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        eve = await manager.load_agent_state("Eve")
        assert eve is not None
        assert eve.model_dump()["n"] == 1
        with pytest.raises(RevisionConflictError):
            await manager.save("agents", "Mallory", {"agent_id": "Mallory", "n": 2}, expected=0)
        assert await manager.load("tasks", ("Eve", "Task-1")) is not None
        assert await manager.load("tasks", ("Eve", "Task-2")) is not None
        assert await pending(manager, "Zed") == [{"id": "T9"}]
        read = [entry.record async for entry in manager.read_log("notes", "Read")]
        assert await manager.append("notes", ("Eve", "Written"), {"n": 2}) == 2
        assert read == [{"n": 1}]
        assert manager.incidents() == []
    assert not any(path.exists() for path in [*logs, *(tmp_path / name for name in written)])


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_file_with_capitals_replaces_no_other(tmp_path: Path, exclusive: bool) -> None:
    files = {
        "agents/Eve.json": {"agent_id": "Eve", "n": 1},
        "agents/!eve.json": {"agent_id": "Eve"},
    }
    written = write(tmp_path, files)
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        assert await manager.list_persisted_agents() == ["Eve"]
        assert [incident.path for incident in manager.incidents()] == ["agents/Eve.json"]
    assert {name: (tmp_path / name).read_bytes() for name in files} == written
