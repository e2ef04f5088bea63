"""Many who update the same documents: tasks in threads in processes, each in one of three ways."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from agent_state import FileStateStore, RevisionConflictError, sync
from agent_state.manager import StatePersistenceManager
from tests.faults.forking import forkserver


@dataclass(frozen=True)
class Crowd:
    """How many there are, and how each updates.

    ``how``: ``edit`` under the lock, ``compare`` with the revision that was read, or ``sync``
    from threads that share one blocking manager. ``separate``: every task has a manager of its
    own; else the tasks of a thread share one. ``cancel``: the share of updates that are
    cancelled at some moment.
    """

    how: str = "edit"
    separate: bool = False
    cancel: float = 0.0
    processes: int = 4
    threads: int = 4
    tasks: int = 8
    updates: int = 3
    documents: int = 30


@dataclass
class Done:
    """What became of the updates, by document."""

    acknowledged: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    """These may have happened, or not."""
    conflicts: int = 0
    together: list[str] = field(default_factory=list)
    """Two that were inside an edit of one document at once."""
    failed: list[str] = field(default_factory=list)

    def add(self, other: Done) -> None:
        self.acknowledged += other.acknowledged
        self.cancelled += other.cancelled
        self.conflicts += other.conflicts
        self.together += other.together
        self.failed += other.failed


def update_together(root: Path, crowd: Crowd) -> Done:
    """Run all the processes; what became of their updates."""
    asyncio.run(prepare(root, crowd.documents))
    context = forkserver()
    running = []
    for number in range(crowd.processes):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=update_in_threads, args=(root, crowd, number, sending), daemon=True
        )
        process.start()
        sending.close()
        running.append((process, receiving))
    done = Done()
    for process, receiving in running:
        done.add(receiving.recv())
        receiving.close()
        process.join()
        process.close()
    return done


async def prepare(root: Path, documents: int) -> None:
    async with StatePersistenceManager(root) as manager, manager.group() as group:
        for number in range(documents):
            key = f"agent-{number}"
            group.save("agents", key, {"agent_id": key, "counters": {"updates": 0}})
    _inside(root).mkdir()


async def stored(root: Path) -> dict[str, tuple[int, int]]:
    """For each document its counter, and how often it was saved since the beginning."""
    async with StatePersistenceManager(root) as manager:
        return {
            loaded.key[0]: (loaded.state.model_dump()["counters"]["updates"], loaded.revision - 1)
            async for loaded in manager.scan("agents")
        }


def update_in_threads(root: Path, crowd: Crowd, process: int, answer: Connection) -> None:
    done = [Done() for _ in range(crowd.threads)]
    with contextlib.ExitStack() as stack:
        blocking = None
        if crowd.how == "sync":
            blocking = stack.enter_context(sync.SyncStatePersistenceManager(root))

        def run(number: int) -> None:
            seed = f"{process}/{number}"
            try:
                if blocking is not None:
                    update_blocking(blocking, root, crowd, Random(seed), done[number])
                else:
                    asyncio.run(update_in_tasks(root, crowd, seed, done[number]))
            except Exception as error:  # noqa: BLE001  # the test shows it
                done[number].failed.append(repr(error))

        threads = [threading.Thread(target=run, args=(n,)) for n in range(crowd.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    total = Done()
    for part in done:
        total.add(part)
    answer.send(total)


async def update_in_tasks(root: Path, crowd: Crowd, seed: str, done: Done) -> None:
    async with AsyncExitStack() as stack:
        # Others hold the lock for as long as the machine is busy; nothing here tests the limit.
        managers = [
            await stack.enter_async_context(
                StatePersistenceManager(store=FileStateStore(root, lock_timeout_seconds=120))
            )
            for _ in range(crowd.tasks if crowd.separate else 1)
        ]

        async def task(number: int) -> None:
            updating = Updating(managers[number % len(managers)], root, crowd, done)
            random = Random(f"{seed}/{number}")
            for _ in range(crowd.updates):
                await updating.once(f"agent-{random.randrange(crowd.documents)}", random)

        await asyncio.gather(*(task(number) for number in range(crowd.tasks)))


class Updating:
    """One task's updates."""

    def __init__(
        self, manager: StatePersistenceManager, root: Path, crowd: Crowd, done: Done
    ) -> None:
        self.manager = manager
        self.root = root
        self.crowd = crowd
        self.done = done

    async def once(self, key: str, random: Random) -> None:
        update = self.by_editing if self.crowd.how == "edit" else self.by_comparing
        if random.random() < self.crowd.cancel:
            if not await cancelled(update(key, random), random.uniform(0.0, 0.03)):
                self.done.acknowledged[key] += 1
            else:
                self.done.cancelled[key] += 1
        else:
            await update(key, random)
            self.done.acknowledged[key] += 1

    async def by_editing(self, key: str, random: Random) -> None:
        """Under the lock: nobody else is inside."""
        async with self.manager.edit("agents", key) as state:
            with inside(self.root, key, self.done):
                state.counters["updates"] += 1
                await asyncio.sleep(random.choice((0.0, 0.0, 0.0, 0.001)))

    async def by_comparing(self, key: str, random: Random) -> None:
        """Without a lock, tried until nobody came between."""
        while True:
            loaded = await self.manager.load_with_revision("agents", key)
            assert loaded is not None
            body = loaded.state.model_dump()
            body["counters"]["updates"] += 1
            try:
                await self.manager.save("agents", key, body, expected=loaded.revision)
            except RevisionConflictError:
                self.done.conflicts += 1
            else:
                return


def update_blocking(
    manager: sync.SyncStatePersistenceManager, root: Path, crowd: Crowd, random: Random, done: Done
) -> None:
    """As a script does; its edit takes no lock, so it is tried until nobody came between."""
    for _ in range(crowd.updates * crowd.tasks):
        key = f"agent-{random.randrange(crowd.documents)}"
        while True:
            try:
                with manager.edit("agents", key) as state:
                    state.counters["updates"] += 1
            except RevisionConflictError:
                done.conflicts += 1
            else:
                break
        done.acknowledged[key] += 1


async def cancelled(work: Coroutine[Any, Any, None], after: float) -> bool:
    """Run the work and cancel it after a while; whether that came before its end."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task}, timeout=after)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


def _inside(root: Path) -> Path:
    return root.parent / f"{root.name}-inside"


@contextlib.contextmanager
def inside(root: Path, key: str, done: Done) -> Iterator[None]:
    """Told by a file of its own that only one can create."""
    mark = _inside(root) / key
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        done.together.append(key)
        yield
        return
    try:
        yield
    finally:
        mark.unlink()
