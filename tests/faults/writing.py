"""Lanes: writers that are killed at any moment, and can say afterwards what must be there.

A lane is one task of a process, with keys of its own. Its n-th change by an operation stores the
number n, so that whoever knows the last acknowledged n knows what must be stored: n, or n + 1
when the kill came between the disk and the acknowledgement. Whoever takes a lane over checks
that first, and goes on from what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from agent_state.errors import StateCorruptedError
from agent_state.manager import StatePersistenceManager
from agent_state.storage import WALStateStore
from tests.faults.keyrings import given_keyring

OPERATIONS = ("save", "group", "append", "delete", "edit", "whole")
SHARED = ("counter-0", "counter-1")
BOARD = ("everyone", "board")
"""A task that every lane writes, also in its groups: living writers meet what a dead one left."""
SEGMENT_BYTES = 24_000
"""So small that the kill also meets rotation and the removal of old segments."""
NOTES = ["long enough"] * 400
"""So much that a journal has patches of the document."""
NAMES = 50
"""What is known of a name is kept for a while, also when its file is gone; so they come again."""
LAST = 5
"""How many records of a log are looked at when a lane is taken over; at the end it is all."""

Counts = dict[str, int]


class ViolationError(Exception):
    """A promise was broken: so many acknowledged changes lost, so much that cannot be read."""

    def __init__(self, what: str, *, lost: int = 0, unreadable: int = 0) -> None:
        super().__init__(what)
        self.lost = lost
        self.unreadable = unreadable


def require(holds: object, what: str) -> None:
    """Something that was written together, or counted, must be as it was."""
    if not holds:
        raise ViolationError(what)


def make_manager(root: Path, *, exclusive: bool) -> StatePersistenceManager:
    if exclusive:
        store = WALStateStore(root, segment_bytes=SEGMENT_BYTES)
        return StatePersistenceManager(store=store, encryption=given_keyring())
    return StatePersistenceManager(root, encryption=given_keyring())


async def prepare(root: Path) -> None:
    """What all lanes share must be there before they begin."""
    async with StatePersistenceManager(root, encryption=given_keyring()) as manager:
        for name in SHARED:
            await manager.save("system", name, {"lanes": {}})
        await manager.save("tasks", BOARD, {"task_id": BOARD[-1]})


def new_counts(lanes: Iterable[str]) -> dict[str, Counts]:
    return {lane: dict.fromkeys(OPERATIONS, 0) for lane in lanes}


def refuse_damage(manager: StatePersistenceManager) -> None:
    """The only thing a kill may leave to be put aside is the torn end of a log."""
    for incident in manager.incidents():
        if "torn" not in incident.what:
            raise ViolationError(f"put aside: {incident}", unreadable=1)


@dataclass(frozen=True)
class Habits:
    """How the lanes of a process write.

    ``large``: the share of appended records that have 50 to 400 KB. ``dedupe``: records carry
    an id. ``cancelled``: the share of changes that are cancelled at some moment. ``pause``:
    seconds between two changes, at most.
    """

    large: float = 0.01
    dedupe: bool = True
    cancelled: float = 0.0
    pause: float = 0.0


class Lane:
    """One writer and its own check."""

    def __init__(
        self,
        manager: StatePersistenceManager,
        name: str,
        counts: Mapping[str, int],
        random: Random,
        acks: int = -1,
        habits: Habits = Habits(),
    ) -> None:
        self.manager = manager
        self.name = name
        self.team = f"team-{name}"
        self.counts = dict(counts)
        self.random = random
        self.acks = acks
        self.habits = habits
        self.operations: dict[str, Callable[[int], Awaitable[object]]] = {
            operation: getattr(self, operation) for operation in OPERATIONS
        }

    # -- writing -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Write for ever; each acknowledged change is told."""
        while True:
            operation = self.random.choice(OPERATIONS)
            if self.random.random() < self.habits.cancelled:
                await self.do_and_cancel(operation, self.random.uniform(0.0, 0.01))
            else:
                await self.do(operation)
            if self.random.random() < 0.02:
                await self.manager.flush()
            if self.habits.pause:
                await asyncio.sleep(self.random.uniform(0.0, self.habits.pause))

    async def do(self, operation: str) -> None:
        number = self.counts[operation] + 1
        await self.operations[operation](number)
        self.counts[operation] = number
        if self.acks >= 0:
            os.write(self.acks, f"ack {self.name} {operation} {number}\n".encode())

    async def do_and_cancel(self, operation: str, seconds: float) -> None:
        """Begin a change and cancel it; it may have happened, whole, or not at all."""
        doing = asyncio.ensure_future(self.do(operation))
        await asyncio.wait({doing}, timeout=seconds)
        doing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await doing
        found = await self.found(operation)
        if found == self.counts[operation] + 1 and self.acks >= 0:
            os.write(self.acks, f"ack {self.name} {operation} {found}\n".encode())
        self.counts[operation] = found

    def body(self, number: int, **fields: object) -> dict[str, object]:
        filler = "x" * self.random.choice((0, 50, 2_000, 9_000))
        return {**fields, "n": number, "filler": filler}

    async def save(self, number: int) -> None:
        state = self.body(number, agent_id=self.name, notes=NOTES)
        revision = await self.manager.save("agents", self.name, state)
        require(revision == number, f"{self.name}: revision {revision} for save {number}")

    async def group(self, number: int) -> None:
        async with self.manager.store.lock("tasks", BOARD), self.manager.group() as group:
            board = await self.manager.load("tasks", BOARD)
            assert board is not None
            group.save("tasks", BOARD, {**board.model_dump(), self.name: number})
            group.save("agents", self.team, self.body(number, agent_id=self.team))
            group.save("tasks", (self.team, "task"), self.body(number, task_id="task"))
            mail = f"mail-{number % 3}"
            group.save("mail", (self.team, mail), self.body(number, message_id=mail))
            if number % 2:
                group.save("sleep", self.team, self.body(number, agent_id=self.team))
            else:
                group.delete("sleep", self.team)
            group.append("events", self.team, {"n": number}, dedupe_key=self._dedupe(number))

    async def append(self, number: int) -> None:
        record = self.body(number)
        if self.random.random() < self.habits.large:
            record["filler"] = "y" * self.random.randrange(50_000, 400_000)
        dedupe = self._dedupe(number)
        first = await self.manager.append("events", self.name, record, dedupe_key=dedupe)
        if dedupe and self.random.random() < 0.2:  # a sender that never saw the acknowledgement
            again = await self.manager.append("events", self.name, record, dedupe_key=dedupe)
            require(again == first, f"{self.name}: record {first} was appended again as {again}")

    def _dedupe(self, number: int) -> str | None:
        return str(number) if self.habits.dedupe else None

    async def delete(self, number: int) -> None:
        """There at odd numbers, gone at even ones."""
        if number % 2:
            await self.manager.save("system", self.name, self.body(number))
        else:
            removed = await self.manager.delete("system", self.name)
            require(removed, f"{self.name}: nothing there to delete at {number}")

    async def edit(self, number: int) -> None:
        """Each lane counts for itself in documents that all of them write."""
        async with self.manager.edit("system", SHARED[number % 2]) as state:
            lanes = dict(state.model_extra["lanes"])
            lanes[self.name] = number
            state.lanes = lanes

    async def whole(self, number: int) -> None:
        """A queue as a whole: tasks come, stay and go in one piece."""
        tasks = [{"task_id": f"task-{n % NAMES}", "n": number} for n in range(number, number + 3)]
        queue = f"queue-{self.name}"
        state = {"agent_id": queue, "n": number, "pending_tasks": tasks}
        await self.manager.save_task_queue_state(queue, state)

    # -- checking ----------------------------------------------------------------------------

    async def check(self, *, everything: bool = False) -> None:
        """Compare what is stored with what was acknowledged, and count on from there.

        ``everything`` reads whole logs, and not only their ends. Raises ``ViolationError``.
        """
        for operation in OPERATIONS:
            self.counts[operation] = await self.found(operation, everything=everything)

    async def found(self, operation: str, *, everything: bool = False) -> int:
        known = self.counts[operation]
        try:
            look = getattr(self, f"{operation}_found")
            number: int = await look(None if everything else LAST)
        except StateCorruptedError as error:
            raise ViolationError(f"{self.name} {operation}: {error}", unreadable=1) from error
        if number not in (known, known + 1):
            what = f"{self.name} {operation}: {known} was acknowledged, {number} is stored"
            raise ViolationError(what, lost=max(0, known - number))
        return number

    async def save_found(self, _: int | None) -> int:
        loaded = await self.manager.load_with_revision("agents", self.name)
        if loaded is None:
            return 0
        number = int(loaded.state.model_dump()["n"])
        require(loaded.revision == number, f"{self.name}: save {number} is {loaded.revision}")
        return number

    async def group_found(self, last: int | None) -> int:
        """The number of the group, after making sure that all of it is there."""
        # Under the lock, so that nobody is completing the group at this moment.
        async with self.manager.store.lock("tasks", BOARD):
            parts = {
                "board": await self._number("tasks", BOARD, self.name),
                "agent": await self._number("agents", (self.team,)),
                "task": await self._number("tasks", (self.team, "task")),
                "sleep": await self._number("sleep", (self.team,)),
            }
            mail = [await self._number("mail", (self.team, f"mail-{n}")) for n in range(3)]
            logged = await self._logged(self.team, last)
        number = parts["agent"]
        expected = dict.fromkeys(parts, number) | {"sleep": number if number % 2 else 0}
        require(parts == expected, f"group {number} of {self.name} is not whole: {parts}")
        numbers = range(max(1, number - 2), number + 1)
        latest = [next((n for n in numbers if n % 3 == m), 0) for m in range(3)]
        require(mail == latest, f"group {number} of {self.name} is not whole: mail {mail}")
        require(logged == number, f"group {number} of {self.name}: its log ends at {logged}")
        return number

    async def append_found(self, last: int | None) -> int:
        return await self._logged(self.name, last)

    async def delete_found(self, _: int | None) -> int:
        known = self.counts["delete"]
        number = await self._number("system", (self.name,))
        if not number:
            return known if known % 2 == 0 else known + 1
        return number

    async def edit_found(self, _: int | None) -> int:
        """A lane counts in both documents by turns."""
        stored = []
        for name in SHARED:
            state = await self.manager.load("system", name)
            require(state is not None, f"{name} is gone")
            stored.append(0 if state is None else state.model_dump()["lanes"].get(self.name, 0))
        number = max(stored)
        turns = sorted((number, max(0, number - 1)))
        require(sorted(stored) == turns, f"{self.name}: edits {stored}, and they take turns")
        require(number == 0 or stored[number % 2] == number, f"{self.name}: edits {stored}")
        return number

    async def whole_found(self, _: int | None) -> int:
        queue = f"queue-{self.name}"
        async with self.manager.store.lock("tasks", (queue,)):
            state = await self.manager.load_task_queue_state(queue)
        if state is None:
            return 0
        stored = state.model_dump()
        number = int(stored["n"])
        tasks = [(task["task_id"], task["n"]) for task in stored["pending_tasks"]]
        expected = [(f"task-{n % NAMES}", number) for n in range(number, number + 3)]
        require(tasks == expected, f"queue {number} of {self.name} is not whole: {tasks}")
        return number

    async def _number(self, kind: str, key: tuple[str, ...], field: str = "n") -> int:
        state = await self.manager.load(kind, key)
        return 0 if state is None else int(state.model_dump().get(field, 0))

    async def _logged(self, key: str, last: int | None) -> int:
        """The number of a log's last record; those that are read must count without a gap."""
        entries = [entry async for entry in self.manager.read_log("events", key, last=last)]
        numbers = [int(entry.record["n"]) for entry in entries]
        end = numbers[-1] if numbers else 0
        begin = 1 if last is None else max(1, end - len(numbers) + 1)
        require(numbers == list(range(begin, end + 1)), f"the log of {key} counts {numbers}")
        require(last is None or len(numbers) == min(last, end), f"the log of {key}: {numbers}")
        ids = [self._dedupe(number) for number in numbers]
        require([entry.dedupe_key for entry in entries] == ids, f"the log of {key}: its ids")
        sequence = [entry.seq for entry in entries]
        require(sequence == numbers, f"the log of {key}: {sequence} for {numbers}")
        return end


async def check_all(
    root: Path, counts: Mapping[str, Counts], *, exclusive: bool, habits: Habits = Habits()
) -> dict[str, Counts]:
    """Check every lane of a directory that nobody writes, whole; what each has come to."""
    async with make_manager(root, exclusive=exclusive) as manager:
        found = {}
        for name, known in counts.items():
            lane = Lane(manager, name, known, Random(0), habits=habits)
            await lane.check(everything=True)
            found[name] = lane.counts
        for which, name in enumerate(SHARED):
            loaded = await manager.load_with_revision("system", name)
            require(loaded is not None, f"{name} is gone")
            turns = sum((counted["edit"] + which) // 2 for counted in found.values())
            revision = loaded.revision if loaded is not None else 0
            require(revision == 1 + turns, f"{name}: {turns} edits counted, {revision - 1} made")
        refuse_damage(manager)
    return found
