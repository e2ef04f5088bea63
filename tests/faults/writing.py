"""A process that writes until it is killed, and tells its parent what was acknowledged.

Each *lane* is one task of the process with keys of its own; its n-th change of a document
stores the number n, so that whoever knows the last acknowledged n can say what must be there:
n, or n + 1 when the kill came between the disk and the acknowledgement.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from agent_state.manager import StatePersistenceManager
from agent_state.storage import JournaledStateStore

OPERATIONS = ("save", "group", "append", "delete", "edit")
SHARED = ("counter-0", "counter-1")
BOARD = ("everyone", "board")
"""A task that every lane writes, also in its groups: living writers meet what a dead one left."""
SEGMENT_BYTES = 24_000
"""So small that the kill also meets rotation and the removal of old segments."""

Counts = dict[str, int]


def make_manager(root: Path, *, exclusive: bool) -> StatePersistenceManager:
    if exclusive:
        store = JournaledStateStore(root, segment_bytes=SEGMENT_BYTES)
        return StatePersistenceManager(root, store=store)
    return StatePersistenceManager(root)


def write_until_killed(
    root: Path, exclusive: bool, lanes: dict[str, Counts], seed: int, acks: Connection
) -> None:
    async def main() -> None:
        async with make_manager(root, exclusive=exclusive) as manager:
            writers = [
                Lane(manager, name, counts, Random(f"{seed}/{name}"), acks.fileno())
                for name, counts in lanes.items()
            ]
            await asyncio.gather(*(writer.run() for writer in writers))

    asyncio.run(main())


class Lane:
    def __init__(
        self,
        manager: StatePersistenceManager,
        name: str,
        counts: Counts,
        random: Random,
        acks: int,
    ) -> None:
        self.manager = manager
        self.name = name
        self.counts = dict(counts)
        self.random = random
        self.acks = acks

    async def run(self) -> None:
        operations: dict[str, Callable[[int], Awaitable[object]]] = {
            operation: getattr(self, operation) for operation in OPERATIONS
        }
        while True:
            operation = self.random.choice(OPERATIONS)
            number = self.counts[operation] + 1
            await operations[operation](number)
            self.counts[operation] = number
            os.write(self.acks, f"{self.name} {operation} {number}\n".encode())
            if self.random.random() < 0.02:
                await self.manager.flush()

    def body(self, number: int, **fields: object) -> dict[str, object]:
        filler = "x" * self.random.choice((0, 50, 2_000, 9_000))
        return {**fields, "n": number, "filler": filler}

    async def save(self, number: int) -> None:
        state = self.body(number, agent_id=self.name)
        revision = await self.manager.save("agents", self.name, state)
        assert revision == number, f"revision {revision} for save {number}"

    async def group(self, number: int) -> None:
        owner = f"team-{self.name}"
        async with self.manager.store.lock("tasks", BOARD), self.manager.group() as group:
            board = await self.manager.load("tasks", BOARD)
            assert board is not None
            group.save("tasks", BOARD, {**board.model_dump(), self.name: number})
            group.save("agents", owner, self.body(number, agent_id=owner))
            group.save("tasks", (owner, "task"), self.body(number, task_id="task"))
            mail = f"mail-{number % 3}"
            group.save("mail", (owner, mail), self.body(number, message_id=mail))
            if number % 2:
                group.save("sleep", owner, self.body(number, agent_id=owner))
            else:
                group.delete("sleep", owner)
            group.append("events", owner, {"n": number}, dedupe_id=str(number))

    async def append(self, number: int) -> None:
        record = self.body(number)
        first = await self.manager.append("events", self.name, record, dedupe_id=str(number))
        if self.random.random() < 0.2:  # a sender that never saw the acknowledgement
            again = await self.manager.append("events", self.name, record, dedupe_id=str(number))
            assert again == first

    async def delete(self, number: int) -> None:
        """There at odd numbers, gone at even ones."""
        if number % 2:
            await self.manager.save("system", self.name, self.body(number))
        else:
            assert await self.manager.delete("system", self.name)

    async def edit(self, number: int) -> None:
        """Each lane counts for itself in documents that all of them write."""
        async with self.manager.edit("system", SHARED[number % 2]) as state:
            lanes = dict(state.model_extra["lanes"])
            lanes[self.name] = number
            state.lanes = lanes
