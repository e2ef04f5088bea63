"""Four processes write the same fifty documents, and no acknowledged update is lost."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from agent_state import RevisionConflictError
from agent_state.manager import StatePersistenceManager

WRITERS = 4
DOCUMENTS = 50
TASKS_EACH = 12
UPDATES_EACH = 15
"""By each task: 720 updates in all, and more tasks at once than a store has threads."""

Update = Callable[[StatePersistenceManager, str], Awaitable[int]]


async def by_editing(manager: StatePersistenceManager, key: str) -> int:
    """One update under the lock; the number of conflicts, which is none."""
    async with manager.edit("agents", key) as state:
        state.counters["updates"] += 1
    return 0


async def by_comparing(manager: StatePersistenceManager, key: str) -> int:
    """One update without a lock, tried until nobody came between; the number of conflicts."""
    conflicts = 0
    while True:
        loaded = await manager.read("agents", key)
        assert loaded is not None
        body = loaded.state.model_dump()
        body["counters"]["updates"] += 1
        try:
            await manager.save("agents", key, body, expected=loaded.revision)
        except RevisionConflictError:
            conflicts += 1
        else:
            return conflicts


UPDATES: dict[str, Update] = {"edit": by_editing, "compare": by_comparing}


def write(root: Path, how: str, seed: int, answer: Connection) -> None:
    """Update documents at random, and tell how often each."""

    async def main() -> tuple[Counter[str], int]:
        done: Counter[str] = Counter()
        conflicts = 0

        async def task(random: Random) -> None:
            nonlocal conflicts
            for _ in range(UPDATES_EACH):
                key = f"agent-{random.randrange(DOCUMENTS)}"
                conflicts += await UPDATES[how](manager, key)
                done[key] += 1

        async with StatePersistenceManager(root) as manager:
            await asyncio.gather(*(task(Random(f"{seed}/{n}")) for n in range(TASKS_EACH)))
        return done, conflicts

    answer.send(asyncio.run(main()))


async def prepare(root: Path) -> None:
    async with StatePersistenceManager(root) as manager, manager.group() as group:
        for number in range(DOCUMENTS):
            key = f"agent-{number}"
            group.save("agents", key, {"agent_id": key, "counters": {"updates": 0}})


async def stored(root: Path) -> dict[str, tuple[int, int]]:
    """For each document its counter and its revision."""
    async with StatePersistenceManager(root) as manager:
        return {
            loaded.key[0]: (loaded.state.model_dump()["counters"]["updates"], loaded.revision)
            async for loaded in manager.scan("agents")
        }


def update_together(root: Path, how: str) -> tuple[Counter[str], int]:
    """Run the four writers; the acknowledged updates of each document, and all conflicts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pytest", "tests.faults.test_four_writers"])
    running = []
    for seed in range(WRITERS):
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=write, args=(root, how, seed, writing), daemon=True)
        process.start()
        writing.close()
        running.append((process, reading))
    done: Counter[str] = Counter()
    conflicts = 0
    for process, reading in running:
        acknowledged, met = reading.recv()
        done += acknowledged
        conflicts += met
        reading.close()
        process.join()
        process.close()
    return done, conflicts


def test_edits_by_four_processes_all_count(tmp_path: Path) -> None:
    root = tmp_path / "state"
    asyncio.run(prepare(root))
    done, _ = update_together(root, "edit")
    assert done.total() == WRITERS * TASKS_EACH * UPDATES_EACH
    assert asyncio.run(stored(root)) == {key: (count, count + 1) for key, count in done.items()}


def test_compare_and_set_by_four_processes_loses_no_update(tmp_path: Path) -> None:
    root = tmp_path / "state"
    asyncio.run(prepare(root))
    done, conflicts = update_together(root, "compare")
    assert done.total() == WRITERS * TASKS_EACH * UPDATES_EACH
    assert conflicts > 0, "nobody met anybody; the test says nothing"
    assert asyncio.run(stored(root)) == {key: (count, count + 1) for key, count in done.items()}


async def test_those_who_wait_for_a_lock_leave_room_for_those_who_hold_one(tmp_path: Path) -> None:
    """More waiting edits than a store has threads; each store stands for a process."""
    root = tmp_path / "state"
    await prepare(root)
    async with (
        StatePersistenceManager(root) as ours,
        StatePersistenceManager(root) as theirs,
        AsyncExitStack() as held,
    ):
        for number in range(1, 20):
            await held.enter_async_context(theirs.store.lock("agents", (f"agent-{number}",)))
        waiting = [
            asyncio.create_task(by_editing(ours, f"agent-{number}")) for number in range(1, 20)
        ]
        async with asyncio.timeout(5):
            await by_editing(ours, "agent-0")
        assert not any(task.done() for task in waiting)
        await held.aclose()
        await asyncio.gather(*waiting)
    assert {count for _, (count, _) in (await stored(root)).items()} == {0, 1}
