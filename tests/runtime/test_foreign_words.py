"""What a status means that a person, or another program, has written in its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    MailMessage,
    MemoryStateStore,
    StatePersistenceManager,
    Task,
)
from agent_state.models import meaning_of
from agent_state.testing import FakeClock
from tests.deadlines import soon
from tests.runtime.runtimes import make_runtime, working


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("STOPPED", "stopped"),
        (" Stopped\n", "stopped"),
        ("In Progress", "in_progress"),
        ("in-progress", "in_progress"),
        ("UNREAD", "unread"),
        ("ON_BREAK", "ON_BREAK"),
        ("", ""),
    ],
)
def test_a_word_means_ours_however_it_is_written_and_else_what_it_says(
    word: str, meaning: str
) -> None:
    assert meaning_of(word) == meaning


@pytest.mark.parametrize("word", ["stopped", "STOPPED", "Stopped "])
async def test_an_agent_that_cleanup_takes_for_stopped_runs_no_task(
    manager: StatePersistenceManager, fake_clock: FakeClock, word: str
) -> None:
    ran = list[str]()
    runtime = make_runtime(manager.store, fake_clock)
    working(runtime, ran)
    for agent_id in ("busy", "done"):
        state = {"agent_id": agent_id, "agent_type": "worker", "status": word}
        await manager.save_agent_state(agent_id, state)
    await manager.save("tasks", ("busy", "t"), Task(task_id="t", agent_id="busy"))
    await fake_clock.advance(2 * 86_400)
    assert (await manager.cleanup_old_states()).agents == ["done"]
    await runtime.start()
    await soon(runtime.wait_idle())
    assert (ran, runtime.agents.get("busy").status) == ([], "stopped")
    await runtime.agents.start("busy")
    await soon(runtime.wait_idle())
    assert ran == ["busy/"]
    await runtime.stop()


@pytest.mark.parametrize("word", ["Pending", "FAILED", "In Progress"])
async def test_a_task_that_a_person_calls_unfinished_is_done_and_not_cleaned_up(
    manager: StatePersistenceManager, fake_clock: FakeClock, word: str
) -> None:
    ran = list[str]()
    await manager.save_agent_state("alice", {"agent_id": "alice", "agent_type": "worker"})
    await manager.save("tasks", ("alice", "t"), Task(task_id="t", name="x", status=word))
    await fake_clock.advance(2 * 86_400)
    assert (await manager.cleanup_old_states()).tasks == []
    runtime = make_runtime(manager.store, fake_clock)
    working(runtime, ran)
    async with runtime:
        await soon(runtime.wait_idle())
        assert await runtime.reconciler.check() == 0
    assert ran == ["alice/x"]


async def test_a_task_that_a_person_calls_completed_is_given_with_its_result() -> None:
    clock = FakeClock()
    async with make_runtime(MemoryStateStore(clock=clock), clock) as runtime:
        await runtime.agents.create("alice", agent_type="none")
        done = Task(task_id="t", agent_id="alice", status="COMPLETED", result=7)
        await runtime.manager.save("tasks", ("alice", "t"), done)
        [listed] = await runtime.tasks.list("alice", status="completed")
        assert (listed.task_id, listed.status) == ("t", "completed")
        assert await runtime.tasks.list("alice", status="pending") == []
        assert await soon(runtime.tasks.result(done)) == 7
        await clock.advance(2 * 86_400)
        assert (await runtime.cleanup_old_states()).tasks == ["alice/t"]


async def test_mail_that_a_person_calls_unread_is_in_the_inbox_and_stays() -> None:
    clock = FakeClock()
    runtime = make_runtime(MemoryStateStore(clock=clock), clock)
    await runtime.manager.open()
    await runtime.manager.save_agent_state("alice", {"agent_id": "alice"})
    for word in ("Unread", "READ", "Replied"):
        message = MailMessage(message_id=word, status=word, expects_reply=True)
        await runtime.manager.save("mail", ("alice", word), message)
    await clock.advance(2 * 86_400)
    async with runtime:
        assert [m.message_id for m in runtime.mail.inbox("alice")] == ["Unread"]
        assert [m.message_id for m in runtime.mail.pending_replies("alice")] == ["READ", "Unread"]
        assert (await runtime.cleanup_old_states()).mail == ["alice/Replied"]


async def test_files_are_not_rewritten_for_the_sake_of_a_word(tmp_path: Path) -> None:
    """Another manager reads its own words again."""
    folder: Any = tmp_path / "agents"
    folder.mkdir()
    (folder / "d.json").write_text(json.dumps({"agent_id": "d", "status": "STOPPED"}))
    async with StatePersistenceManager(tmp_path) as manager:
        loaded = await manager.load_agent_state("d")
        assert loaded is not None
        assert loaded.status == "STOPPED"
