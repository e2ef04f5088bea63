"""Real processes, killed with SIGKILL at random moments: nothing acknowledged is lost.

The verifier stays outside and knows every acknowledged write.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import time
from collections import Counter
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from random import Random

import pytest

from agent_state.manager import StatePersistenceManager
from agent_state.storage.atomic import TEMPORARY
from agent_state.storage.locks import WRITERS
from tests.faults.writing import (
    BOARD,
    OPERATIONS,
    SHARED,
    Counts,
    make_manager,
    write_until_killed,
)

ROUNDS = 100
"""For each of the two stores."""
LONGEST_SECONDS = 0.12
LANES_EACH = 3


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Children are forked from a server that has imported everything, in a few milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pytest", "tests.faults.writing"])
    return context


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("exclusive", "writers"), [(False, 3), (True, 1)])
def test_kill_9_at_any_moment_loses_nothing_acknowledged(
    tmp_path: Path, processes: ForkServerContext, exclusive: bool, writers: int
) -> None:
    random = Random(20 + writers)
    root = tmp_path / "state"
    verifier = Verifier(root, writers)
    asyncio.run(verifier.prepare())
    for number in range(ROUNDS):
        acks = one_round(processes, verifier, random, exclusive=exclusive, seed=number)
        verifier.take_in(acks)
        # Every third time the other store finds what this one left.
        asyncio.run(verifier.verify(exclusive=exclusive != (number % 3 == 2)))
    for operation in OPERATIONS:
        assert verifier.acknowledged[operation] > ROUNDS, "too little was acknowledged to tell"


def one_round(
    processes: ForkServerContext,
    verifier: Verifier,
    random: Random,
    *,
    exclusive: bool,
    seed: int,
) -> str:
    """Start the writers, kill each at its own moment, and return what they had acknowledged."""
    running: list[tuple[float, ForkServerProcess, int]] = []
    for lanes in verifier.lanes_of_writers():
        reading, writing = processes.Pipe(duplex=False)
        process = processes.Process(
            target=write_until_killed,
            args=(verifier.root, exclusive, lanes, seed, writing),
            daemon=True,
        )
        process.start()
        writing.close()
        moment = time.monotonic() + random.uniform(0.0, LONGEST_SECONDS)
        running.append((moment, process, os.dup(reading.fileno())))
        reading.close()
    acks = []
    for moment, process, fd in sorted(running, key=lambda entry: entry[0]):
        time.sleep(max(0.0, moment - time.monotonic()))
        assert process.is_alive(), "a writer ended by itself"
        process.kill()
        process.join()
        with os.fdopen(fd, "rb") as pipe:
            acks.append(pipe.read().decode())
        process.close()
    return "".join(acks)


class Verifier:
    """What must be on the disk: for each lane and operation, the last number acknowledged."""

    def __init__(self, root: Path, writers: int) -> None:
        self.root = root
        self.writers = [
            [f"writer-{writer}-lane-{lane}" for lane in range(LANES_EACH)]
            for writer in range(writers)
        ]
        self.counts = {
            lane: dict.fromkeys(OPERATIONS, 0) for lane in itertools.chain(*self.writers)
        }
        self.acknowledged: Counter[str] = Counter()

    def lanes_of_writers(self) -> list[dict[str, Counts]]:
        return [{lane: self.counts[lane] for lane in lanes} for lanes in self.writers]

    def take_in(self, acks: str) -> None:
        for line in acks.splitlines():
            lane, operation, number = line.split()
            assert int(number) == self.counts[lane][operation] + 1
            self.counts[lane][operation] = int(number)
            self.acknowledged[operation] += 1

    async def prepare(self) -> None:
        async with StatePersistenceManager(self.root) as manager:
            for name in SHARED:
                await manager.save("system", name, {"lanes": {}})
            await manager.save("tasks", BOARD, {"task_id": BOARD[-1]})

    async def verify(self, *, exclusive: bool) -> None:
        began = time.monotonic()
        async with make_manager(self.root, exclusive=exclusive) as manager:
            assert time.monotonic() - began < 5.0, "something a dead process held was in the way"
            for lane, counts in self.counts.items():
                for operation in ("save", "group", "append", "delete"):
                    found = await getattr(self, f"{operation}_found")(manager, lane, counts)
                    self.learn(lane, operation, found)
            await self.verify_edits(manager)
            for incident in manager.incidents():
                assert "torn" in incident.what, incident
        left = [path for path in self.root.rglob("*") if path.name.startswith(TEMPORARY)]
        left += (self.root / ".journal").iterdir()
        left += (self.root / ".locks" / WRITERS).iterdir()
        assert left == []

    def learn(self, lane: str, operation: str, found: int) -> None:
        known = self.counts[lane][operation]
        assert found in (known, known + 1), (
            f"{lane} {operation}: {known} was acknowledged, {found} is stored"
        )
        self.counts[lane][operation] = found

    async def save_found(self, manager: StatePersistenceManager, lane: str, _: Counts) -> int:
        loaded = await manager.read("agents", lane)
        if loaded is None:
            return 0
        number = int(loaded.state.model_dump()["n"])
        assert loaded.revision == number, "each save is one revision, and none is given twice"
        return number

    async def group_found(self, manager: StatePersistenceManager, lane: str, counts: Counts) -> int:
        """The number of the group, after making sure that all of it is there."""
        owner = f"team-{lane}"
        head = await manager.read("agents", owner)
        board = await manager.load("tasks", BOARD)
        assert board is not None
        events = [entry.record["n"] async for entry in manager.read_log("events", owner)]
        if head is None:
            assert await manager.keys("tasks", owner) == []
            assert await manager.keys("mail", owner) == []
            assert await manager.keys("sleep", owner) == []
            assert events == []
            assert lane not in board.model_dump()
            return 0
        number = int(head.state.model_dump()["n"])
        assert head.revision == number
        assert board.model_dump()[lane] == number, f"group {number} of {lane}: the board"
        for kind, key, expected in (
            ("tasks", (owner, "task"), number),
            ("mail", (owner, f"mail-{number % 3}"), number),
            ("mail", (owner, f"mail-{(number - 1) % 3}"), number - 1 or None),
            ("sleep", (owner,), number if number % 2 else None),
        ):
            part = await manager.load(kind, key)
            stored = part.model_dump()["n"] if part is not None else None
            assert stored == expected, f"group {number} of {lane} is not whole: {kind} {stored}"
        assert events == list(range(1, number + 1)), f"group {number} of {lane}: its log"
        return number

    async def append_found(self, manager: StatePersistenceManager, lane: str, _: Counts) -> int:
        entries = [entry async for entry in manager.read_log("events", lane)]
        numbers = [entry.record["n"] for entry in entries]
        assert numbers == list(range(1, len(numbers) + 1)), "each record once, in order"
        assert [entry.dedupe_id for entry in entries] == [str(number) for number in numbers]
        sequence = [entry.seq for entry in entries]
        assert sequence == sorted(set(sequence))
        return len(numbers)

    async def delete_found(
        self, manager: StatePersistenceManager, lane: str, counts: Counts
    ) -> int:
        known = counts["delete"]
        state = await manager.load("system", lane)
        if state is None:
            return known if known % 2 == 0 else known + 1
        return int(state.model_dump()["n"])

    async def verify_edits(self, manager: StatePersistenceManager) -> None:
        """Every lane's count is there, whoever else wrote the same document."""
        stored: Counts = {}
        for name in SHARED:
            loaded = await manager.read("system", name)
            assert loaded is not None
            lanes = loaded.state.model_dump()["lanes"]
            for lane, number in lanes.items():
                stored[lane] = max(number, stored.get(lane, 0))
            # Lanes count in both documents by turns.
            turns = sum(
                (number + 1) // 2 if number % 2 else number // 2 for number in lanes.values()
            )
            assert loaded.revision == 1 + turns, "an update was lost, or written twice"
        for lane in self.counts:
            self.learn(lane, "edit", stored.get(lane, 0))
