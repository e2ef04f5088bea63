"""Cleanup archives what is finished and old, and leaves what is still needed."""

from __future__ import annotations

from agent_state import SleepState, StatePersistenceManager, Task
from agent_state.testing import FakeClock


async def test_cleanup_archives_what_is_finished_and_spares_what_is_needed(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> None:
    for status in ("pending", "in_progress", "failed", "completed", "dead", "cancelled"):
        await manager.save("tasks", ("busy", status), Task(task_id=status, status=status))
    for status in ("unread", "read", "replied", "archived"):
        mail = {"message_id": status, "to_agent": "busy", "status": status}
        await manager.save("mail", ("busy", status), mail)
    awaited = {"message_id": "q", "to_agent": "busy", "status": "read", "expects_reply": True}
    await manager.save("mail", ("busy", "awaited"), awaited)
    for name in ("busy", "done", "sleepy"):
        await manager.save_agent_state(name, {"agent_id": name, "status": "stopped"})
    await manager.save_agent_state("idle", {"agent_id": "idle", "status": "idle"})
    await manager.save_sleep_state("sleepy", SleepState(agent_id="sleepy"))
    await manager.save_sleep_state("idle", SleepState(agent_id="idle", is_sleeping=False))
    await fake_clock.advance(25 * 3600)
    await manager.save("tasks", ("busy", "young"), Task(task_id="young", status="completed"))

    report = await manager.cleanup_old_states(max_age_hours=24)

    assert sorted(report.tasks) == ["busy/cancelled", "busy/completed"]
    assert sorted(report.mail) == ["busy/archived", "busy/read", "busy/replied"]
    assert report.sleep == ["idle"]
    assert report.agents == ["done"]
    assert report.total == 7
    assert report.dead_letters == 1
    assert await manager.list_persisted_agents() == ["busy", "idle", "sleepy"]
    assert {key[1] for key in await manager.keys("tasks", "busy")} == {
        "pending",
        "in_progress",
        "failed",
        "dead",
        "young",
    }
    assert {key[1] for key in await manager.keys("mail", "busy")} == {"unread", "awaited"}
    archived = [entry.record async for entry in manager.read_log("tasks", ("busy", "archive"))]
    assert sorted(record["status"] for record in archived) == ["cancelled", "completed"]
    again = await manager.cleanup_old_states(max_age_hours=24)
    assert again.total == 0
    assert again.to_dict()["spared"] == again.spared > 0


async def test_dead_tasks_stay_with_their_agent_until_somebody_says_otherwise(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> None:
    await manager.save_agent_state("busy", {"agent_id": "busy", "status": "stopped"})
    await manager.save("tasks", ("busy", "lost"), {"task_id": "lost", "status": "DEAD"})
    await fake_clock.advance(25 * 3600)

    kept = await manager.cleanup_old_states()
    assert (kept.tasks, kept.agents, kept.dead_letters, kept.spared) == ([], [], 1, 2)

    told = await manager.cleanup_old_states(dead_letters=True)
    assert (told.tasks, told.agents, told.dead_letters) == (["busy/lost"], ["busy"], 0)
    [entry] = [entry async for entry in manager.read_log("tasks", ("busy", "archive"))]
    assert entry.record["task_id"] == "lost"
