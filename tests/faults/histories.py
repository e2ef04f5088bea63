"""Random histories of one state directory, beside a model that never touches a disk."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from agent_state import AgentStateError, RevisionConflictError, StatePersistenceManager
from agent_state.codec import Group
from agent_state.errors import DurabilityUnknownError, StorageError
from agent_state.storage import FileStateStore, WALStateStore, checkpoint
from agent_state.testing import Crash, Fault, FaultyDisk
from agent_state.testing.faults import CHANGING
from tests.faults.tally import Tally

T = TypeVar("T")

NAMES = ("one", "two", "Three")
MEMORY = Path("/dev/shm")
"""Where fsync costs nothing, if there is such a place; what is synced is proved elsewhere."""

names = st.sampled_from(NAMES)
calls = st.integers(1, 14)


@dataclass
class World:
    """What may be stored: documents, a log's ids in order, finished tasks, archived ones."""

    docs: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    tasks: set[str] = field(default_factory=set)
    archive: list[str] = field(default_factory=list)

    def put(self, name: str, n: int) -> None:
        self.docs[name] = n

    def append(self, ident: str) -> None:
        if ident not in self.log:
            self.log.append(ident)

    def clean(self) -> None:
        self.archive += sorted(self.tasks)
        self.tasks.clear()


Step = Callable[[World], object]


class Histories(RuleBasedStateMachine):
    """One manager at a time on one directory. ``worlds``: what may be stored, as we know it."""

    tally = Tally()

    def __init__(self) -> None:
        super().__init__()
        where = MEMORY if MEMORY.is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="histories-", dir=where))
        self.runner = asyncio.Runner()
        self.pauses = checkpoint.WRITE_BACK_SECONDS, checkpoint.IDLE_SECONDS
        # Files are settled when a rule says so, and not by the clock.
        checkpoint.WRITE_BACK_SECONDS = checkpoint.IDLE_SECONDS = 3600.0
        self.worlds = [World()]
        self.last = 0
        self.ever: set[int] = set()
        self.revisions: dict[str, int] = {}

    def teardown(self) -> None:
        with contextlib.suppress(AttributeError):
            self.end()
        self.runner.close()
        checkpoint.WRITE_BACK_SECONDS, checkpoint.IDLE_SECONDS = self.pauses
        shutil.rmtree(self.root)

    # -- life ----------------------------------------------------------------------------------

    def run(self, work: Awaitable[T]) -> T:
        async def wait() -> T:
            return await work

        return self.runner.run(wait())

    @initialize(exclusive=st.booleans())
    def begin(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        store = (WALStateStore if exclusive else FileStateStore)(self.root)
        self.manager = StatePersistenceManager(store=store)
        self.disk = FaultyDisk().__enter__()
        self.run(self.manager.open())

    def end(self) -> None:
        """Close, or, after a crash, let go of what a dead process lets go of."""
        crashed = self.disk.crashed
        with contextlib.suppress(Crash, AgentStateError):
            self.run(self.manager.close())
        self.disk.__exit__(None, None, None)
        if not crashed:
            return
        for path in self.root.rglob(".tmp-*"):
            path.touch()  # a living writer's, as far as a clock can tell

    def begin_again(self, exclusive: bool) -> None:
        self.end()
        self.begin(exclusive)
        self.settle_on(self.look())

    @rule(exclusive=st.booleans())
    def restart(self, exclusive: bool) -> None:
        """In good order, perhaps as the other kind of store."""
        self.begin_again(exclusive)

    @rule(exclusive=st.booleans())
    def vanish(self, exclusive: bool) -> None:
        """Between two calls the process is gone."""
        self.tally.faults += 1
        self.disk.crash()
        self.begin_again(exclusive)

    # -- what is there -------------------------------------------------------------------------

    def look(self) -> World:
        return self.run(self._look())

    async def _look(self) -> World:
        world, manager = World(), self.manager
        for name in NAMES:
            loaded = await manager.load_with_revision("notes", name)
            if loaded is not None:
                world.docs[name] = loaded.state.model_dump()["n"]
                self.revisions[name] = loaded.revision
            else:
                self.revisions.pop(name, None)
        assert {key[0] for key in await manager.keys("notes")} == set(world.docs)
        world.log = [entry.record["id"] async for entry in manager.read_log("notes", "log")]
        async for loaded in manager.scan("tasks", "bob"):
            world.tasks.add(loaded.key[1])
        archive = manager.read_log("tasks", ("bob", "archive"))
        world.archive = [entry.record["task_id"] async for entry in archive]
        return world

    def settle_on(self, seen: World) -> None:
        assert seen in self.worlds, f"{seen} is none of {self.worlds}"
        self.worlds = [seen]

    def number(self) -> int:
        self.last += 1
        self.ever.add(self.last)
        return self.last

    # -- what is done --------------------------------------------------------------------------

    def attempt(self, work: Awaitable[Any], change: Step) -> Any:
        """Do it, and let the worlds follow by how it ended."""
        self.tally.points += 1
        after = copy.deepcopy(self.worlds)
        for world in after:
            change(world)
        result = None
        try:
            result = self.run(work)
        except Crash:
            self.tally.faults += 1
            self.worlds += after
            self.begin_again(self.exclusive)
        except DurabilityUnknownError:
            self.tally.faults += 1
            self.disk.heal()
            self.worlds += after
            if not self.exclusive:
                self.settle_on(self.look())
        except StorageError:
            self.tally.faults += 1
            if not self.disk.fired:
                raise
        else:
            self.tally.acknowledged += 1
            self.worlds = after
        self.disk.heal()
        seen = self.look()
        assert seen in self.worlds, f"{seen} is none of {self.worlds}"
        return result

    def arm(self, fault: Fault | None) -> None:
        if fault is not None:
            self.disk._faults, self.disk._counted, self.disk.fired = (fault,), [0], False

    faults = st.none() | st.builds(
        Fault,
        at=calls,
        call=st.just(CHANGING),
        action=st.sampled_from(["fail", "fail", "crash before", "crash torn"]),
        error=st.sampled_from([errno.EIO, errno.ENOSPC]),
        persistent=st.booleans(),
    )

    @rule(name=names, fault=faults)
    def save(self, name: str, fault: Fault | None) -> None:
        n, before = self.number(), self.revisions.get(name, 0)
        self.arm(fault)
        state = {"n": n, "fill": "x" * (n % 5 * 400)}
        revision = self.attempt(self.manager.save("notes", name, state), lambda w: w.put(name, n))
        assert revision is None or revision > before

    @rule(name=names, behind=st.integers(0, 2), fault=faults)
    def compare_and_set(self, name: str, behind: int, fault: Fault | None) -> None:
        n, current = self.number(), self.revisions.get(name, 0)
        if behind and current - behind >= 0:
            stale = self.manager.save("notes", name, {"n": n}, expected=current - behind)
            try:
                self.run(stale)
            except RevisionConflictError:
                return
            raise AssertionError("a stale revision was taken")
        self.arm(fault)
        work = self.manager.save("notes", name, {"n": n}, expected=current)
        self.attempt(work, lambda w: w.put(name, n))

    @precondition(lambda self: self.revisions)
    @rule(data=st.data(), fault=faults)
    def edit(self, data: st.DataObject, fault: Fault | None) -> None:
        name, n = data.draw(st.sampled_from(sorted(self.revisions))), self.number()

        async def work() -> None:
            async with self.manager.edit("notes", name) as state:
                state.n = n

        self.arm(fault)
        self.attempt(work(), lambda w: w.put(name, n))

    @rule(name=names, other=names, ident=st.integers(0, 5), delete=st.booleans(), fault=faults)
    def group(self, name: str, other: str, ident: int, delete: bool, fault: Fault | None) -> None:
        n, ids = self.number(), [f"id {ident}", f"new {self.last}"]

        def change(world: World) -> None:
            world.put(name, n)
            if delete:
                world.docs.pop(other, None)
            else:
                world.put(other, n)
            for each in ids:
                world.append(each)

        group = Group(self.manager._codec)
        group.save("notes", name, {"n": n})
        if delete:
            group.delete("notes", other)
        else:
            group.save("notes", other, {"n": n})
        for each in ids:
            group.append("notes", "log", {"id": each}, dedupe_key=each)
        self.arm(fault)
        self.attempt(self.manager.commit(group), change)

    @rule(ident=st.integers(0, 5), fault=faults)
    def append(self, ident: int, fault: Fault | None) -> None:
        self.arm(fault)
        record = {"id": f"id {ident}"}
        work = self.manager.append("notes", "log", record, dedupe_key=f"id {ident}")
        self.attempt(work, lambda w: w.append(f"id {ident}"))

    @rule(name=names, fault=faults)
    def delete(self, name: str, fault: Fault | None) -> None:
        self.arm(fault)
        self.attempt(self.manager.delete("notes", name), lambda w: w.docs.pop(name, None))

    @rule(fault=faults)
    def flush(self, fault: Fault | None) -> None:
        self.arm(fault)
        self.attempt(self.manager.flush(), id)

    # -- tasks and cleaning up -----------------------------------------------------------------

    @rule(fault=faults)
    def finish(self, fault: Fault | None) -> None:
        task = f"t{self.number()}"
        body = {"task_id": task, "agent_id": "bob", "status": "completed"}
        self.arm(fault)
        work = self.manager.save("tasks", ("bob", task), body)
        self.attempt(work, lambda w: w.tasks.add(task))

    @rule()
    def clean(self) -> None:
        """Which of several is first is the directory's choice, so only their number is compared."""
        self.run(self.manager.cleanup_old_states(max_age_hours=0))
        seen = self.look()
        for world in self.worlds:
            done = set(seen.archive) - set(world.archive)
            if done == world.tasks and not seen.tasks:
                world.archive, world.tasks = list(seen.archive), set()
        assert len(set(seen.archive)) == len(seen.archive)
        assert seen in self.worlds, f"{seen} is none of {self.worlds}"

    # -- what people do ------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        assert isinstance(self.manager.store, FileStateStore | WALStateStore)
        return Path(self.manager.store._directory.tree.path("notes", (name,)))

    @rule(name=names, settled=st.booleans(), bare=st.booleans(), ahead=st.integers(0, 2))
    def write_by_hand(self, name: str, settled: bool, bare: bool, ahead: int) -> None:
        """Edit the file, or drop one in; it is used, or kept in the quarantine."""
        n, path = self.number(), self.path(name)
        if settled:
            self.run(self.manager.flush())
        content = json.loads(path.read_bytes()) if path.exists() and not bare else {}
        if "_revision" in content:
            content["_revision"] += ahead
        content["n"] = n
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_name("4913")
        fresh.write_text(json.dumps(content))
        fresh.replace(path)
        self.run(self.manager.flush())
        self.tally.points += 1
        seen = self.look()
        used = seen.docs.get(name) == n
        if settled:
            assert used, f"{name}: {seen}"
        if used:
            for world in self.worlds:
                world.put(name, n)
        else:
            assert n in self.quarantined(), f"{n} of {name} is nowhere"
        assert seen in self.worlds, f"{seen} is none of {self.worlds}"
        self.worlds = [seen]

    def quarantined(self) -> set[int]:
        kept = [p for p in self.root.glob(".quarantine/notes/*") if p.suffix != ".json"]
        return {json.loads(path.read_bytes())["n"] for path in kept}

    @rule(name=names)
    def quarantine(self, name: str) -> None:
        """What comes back is an earlier version, or nothing; what was there is kept."""
        self.run(self.manager.flush())
        before = self.look()
        self.run(self.manager.store.quarantine("notes", (name,), "no good"))
        seen = self.look()
        if name in before.docs:
            assert before.docs[name] in self.quarantined()
        assert seen.docs.get(name) in {None, *self.ever}
        before.docs.pop(name, None)
        if name in seen.docs:
            before.put(name, seen.docs[name])
        self.worlds = [before]
        self.settle_on(seen)
