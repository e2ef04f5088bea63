"""Queues and mailboxes as views over their members, and what cleanup takes from them."""

from __future__ import annotations

import pytest

from agent_state import (
    MailboxState,
    ModelStateValidator,
    StateCorruptedError,
    StatePersistenceManager,
    StateValidationError,
    Task,
    TaskQueueState,
)


async def test_a_queue_shows_each_task_where_its_status_puts_it(
    manager: StatePersistenceManager,
) -> None:
    tasks = {
        "1": Task(task_id="1", attempts=0, status="pending"),
        "2": Task(task_id="2", attempts=1, status="in_progress"),
        "3": Task(task_id="3", attempts=1, status="completed"),
        "4": Task(task_id="4", attempts=1, status="failed"),
        "5": Task(task_id="5", attempts=3, status="dead"),
    }
    for ident, task in tasks.items():
        await manager.save("tasks", ("alice", ident), task)

    queue = await manager.load_task_queue_state("alice")

    assert queue is not None
    assert [task["task_id"] for task in queue.pending_tasks] == ["1", "4"]
    assert [task["task_id"] for task in queue.in_progress_tasks] == ["2"]
    assert [task["task_id"] for task in queue.completed_tasks] == ["3", "5"]
    # Saved as a whole, it is the same; and a task that moves on later moves on in the view.
    await manager.save_task_queue_state("alice", queue)
    assert await manager.load_task_queue_state("alice") == queue
    tasks["1"].status = "completed"
    await manager.save("tasks", ("alice", "1"), tasks["1"])
    queue = await manager.load_task_queue_state("alice")
    assert queue is not None
    assert [task["task_id"] for task in queue.pending_tasks] == ["4"]
    assert {task["task_id"] for task in queue.completed_tasks} == {"1", "3", "5"}


async def test_a_queue_saved_whole_loses_what_is_not_in_it(
    manager: StatePersistenceManager,
) -> None:
    await manager.save_task_queue_state(
        "alice", {"agent_id": "alice", "pending_tasks": [{"id": "a"}, {"id": "b"}]}
    )
    await manager.save("tasks", ("bob", "c"), Task(task_id="c"))

    await manager.save_task_queue_state(
        "alice", TaskQueueState(agent_id="alice", pending_tasks=[{"id": "b"}])
    )

    assert await manager.keys("tasks") == [("alice",), ("alice", "b"), ("bob", "c")]


async def test_a_mail_delivered_beside_a_saved_mailbox_is_in_it(
    manager: StatePersistenceManager,
) -> None:
    await manager.save_mailbox_state(
        "alice", {"agent_id": "alice", "unread": [{"message_id": "m1", "from": "bob"}]}
    )
    await manager.save("mail", ("alice", "m2"), {"message_id": "m2", "to_agent": "alice"})

    mailbox = await manager.load_mailbox_state("alice")

    assert mailbox is not None
    assert mailbox.model_dump() == {
        "agent_id": "alice",
        "unread": [{"message_id": "m1", "from": "bob"}],
        "messages": [{"message_id": "m2", "to_agent": "alice"}],
    }
    assert await manager.load_mailbox_state("bob") is None
    assert isinstance(mailbox, MailboxState)


async def test_a_whole_whose_list_is_none_is_refused(manager: StatePersistenceManager) -> None:
    with pytest.raises(StateValidationError):
        await manager.save_task_queue_state("a", {"agent_id": "a", "pending_tasks": "all"})
    with pytest.raises(StateValidationError):
        await manager.save_mailbox_state("a", {"agent_id": "a", "mail_history": {"m": 1}})
    assert await manager.keys("tasks") == await manager.keys("mail") == []


async def test_only_a_key_of_two_segments_is_an_item(manager: StatePersistenceManager) -> None:
    note = ("alice", "t", "note")
    await manager.save("tasks", ("alice", "t"), Task(task_id="t"))
    await manager.save("tasks", note, {"task_id": "note"})

    queue = await manager.load_task_queue_state("alice")
    assert queue is not None
    assert queue.pending_tasks == [{"task_id": "t"}]

    await manager.save_task_queue_state("alice", {"agent_id": "alice"})
    assert await manager.keys("tasks", "alice") == [note]


async def test_items_are_in_the_order_of_their_creation_then_of_their_ids(
    manager: StatePersistenceManager,
) -> None:
    times = {"c": "2026-01-02", "a": "2026-01-03", "d": "2026-01-02", "b": "2026-01-01"}
    for task_id, day in times.items():
        task = {"task_id": task_id, "agent_id": "alice", "created_at": f"{day}T00:00:00.000000Z"}
        await manager.save("tasks", ("alice", task_id), task)
    await manager.save("tasks", ("alice", "z"), {"task_id": "z", "agent_id": "alice"})

    queue = await manager.load_task_queue_state("alice")

    assert queue is not None
    assert [task["task_id"] for task in queue.pending_tasks] == ["z", "b", "c", "d", "a"]


async def test_a_queue_that_cannot_be_used_is_named(manager: StatePersistenceManager) -> None:
    class Short(TaskQueueState):
        name: str

    await manager.save_task_queue_state("alice", {"agent_id": "alice"})
    strict = StatePersistenceManager(
        store=manager.store, validator=ModelStateValidator({"task_queues": Short})
    )

    with pytest.raises(StateCorruptedError, match="name") as caught:
        await strict.load_task_queue_state("alice")

    assert (caught.value.kind, caught.value.key) == ("tasks", ("alice",))
