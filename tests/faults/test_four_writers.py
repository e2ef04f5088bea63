"""Four processes update the same documents, and no acknowledged update is lost."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from agent_state.manager import StatePersistenceManager
from tests.faults.tally import Tally
from tests.faults.updating import Crowd, Done, Updating, prepare, stored, update_together

CROWDS = {
    "edit": Crowd(),
    "edit, separate managers": Crowd(separate=True),
    "edit, cancelled": Crowd(cancel=0.5),
    "compare": Crowd(how="compare"),
    "compare, cancelled": Crowd(how="compare", separate=True, cancel=0.5),
    "sync": Crowd(how="sync"),
}


@pytest.mark.long("four processes of several threads")
@pytest.mark.proof("T8", "read, change, save by tasks x threads x processes")
@pytest.mark.parametrize("name", CROWDS)
@pytest.mark.timeout(300)
def test_updates_by_four_processes_all_count(
    tmp_path: Path, tally: Tally, full: bool, name: str
) -> None:
    """Eight tasks in each of four threads in each of four processes."""
    crowd, root = CROWDS[name], tmp_path / "state"
    crowd = replace(crowd, updates=20, documents=20) if full else crowd
    done = update_together(root, crowd)
    tell(tally, done, asyncio.run(stored(root)))
    assert done.failed == []
    assert done.together == [], "two were inside an edit of one document at once"
    asked = crowd.processes * crowd.threads * crowd.tasks * crowd.updates
    assert done.acknowledged.total() + done.cancelled.total() == asked
    if crowd.cancel:
        assert done.cancelled.total() > asked / 20, "hardly anything was cancelled in time"
    else:
        assert done.cancelled.total() == 0
    if crowd.how == "compare":  # an edit holds the lock, the blocking one too
        assert done.conflicts > 0, "nobody met anybody; the test says nothing"
    assert tally.clean()


def tell(tally: Tally, done: Done, found: dict[str, tuple[int, int]]) -> None:
    """A counter is what was acknowledged, and as much of what was cancelled as was saved."""
    for key, (updates, saves) in found.items():
        acknowledged = done.acknowledged[key]
        tally.points += 1
        tally.acknowledged += acknowledged
        tally.faults += done.cancelled[key]
        tally.lost += max(0, acknowledged - updates)
        assert updates == saves, f"{key}: {saves} saves, and the counter says {updates}"
        most = acknowledged + done.cancelled[key]
        assert acknowledged <= updates <= most, f"{key}: {updates}, not {acknowledged} to {most}"


async def test_those_who_wait_for_a_lock_leave_room_for_those_who_hold_one(tmp_path: Path) -> None:
    """More waiting edits than a store has threads; each store stands for a process."""
    root = tmp_path / "state"
    await prepare(root, 20)
    async with (
        StatePersistenceManager(root) as ours,
        StatePersistenceManager(root) as theirs,
        AsyncExitStack() as held,
    ):
        for number in range(1, 20):
            await held.enter_async_context(theirs.store.lock("agents", (f"agent-{number}",)))
        updating = Updating(ours, root, Crowd(), Done())
        waiting = [
            asyncio.create_task(updating.by_editing(f"agent-{number}", Random(number)))
            for number in range(1, 20)
        ]
        async with asyncio.timeout(60):
            await updating.by_editing("agent-0", Random(0))
        assert not any(task.done() for task in waiting)
        await held.aclose()
        await asyncio.gather(*waiting)
    assert {updates for updates, _ in (await stored(root)).values()} == {1}
