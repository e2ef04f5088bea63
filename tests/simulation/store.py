"""The world that runtimes live in: one store that several processes reach, and what befalls them.

``ProcessStore`` is the store as one process sees it. It passes every call on to the real store (in
memory, or shared files) and does there what the history has planned: it is slow, full or away, it
loses a reply, the process stands still before or after a commit, or dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import orjson

from agent_state import (
    AsyncAgentSessionManager,
    DurabilityUnknownError,
    MemoryStateStore,
    RateLimit,
    StateStore,
    StorageError,
    StorageFullError,
)
from agent_state.clock import later, stamp
from agent_state.protocols import (
    Append,
    Change,
    Delete,
    Document,
    Incident,
    Key,
    LogRecord,
    Notice,
    Origin,
    Put,
)
from agent_state.runtime.transitions import RetryPolicy
from agent_state.storage.executor import shielded
from agent_state.storage.watch import Broadcast, Subscription
from tests.simulation.histories import Fault, History
from tests.simulation.laws import Laws
from tests.simulation.loop import LoopClock
from tests.simulation.programs import Interpreter

LEASE_SECONDS = 30.0
LIMIT = RateLimit("attempts", 4, per_seconds=10.0)
CRON = "10,30,50 0-1 0,12 * * *"
"""In the first minutes, and again when nobody looks any more."""


class BrokenStoreError(Exception):
    """The store has failed in a way that nobody foresaw."""


@dataclass(eq=False)
class Process:
    """One process with one runtime."""

    name: str
    world: World
    state: str = "new"
    """``new``, ``up``, ``stopping``, ``down`` or ``dead``."""
    is_later: bool = False
    """Whether it was started while the history goes on."""
    commits: int = 0
    """Commits that it asked for, if it is such a one."""
    running: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while the process stands still."""

    def __post_init__(self) -> None:
        self.running.set()
        self.clock = ProcessClock(self)
        self.store = ProcessStore(self)
        self.runtime = self.new_runtime()

    @property
    def owner(self) -> str:
        """The id of the runtime in owners and leases."""
        return self.runtime.state.owner

    @property
    def alive(self) -> bool:
        return self.state in ("new", "up", "stopping")

    def new_runtime(self) -> AsyncAgentSessionManager:
        world = self.world
        runtime = AsyncAgentSessionManager(
            store=self.store,
            exclusive=not world.history.shared,
            clock=self.clock,
            new_id=world.new_id,
            random=Random(f"{world.history.seed} {self.name}"),
            lease_seconds=LEASE_SECONDS,
            retry=RetryPolicy(factor=1.5, max_seconds=10.0),
        )
        limits = [LIMIT] if world.history.limited else []
        runtime.handler("worker", rate_limits=limits)(Interpreter(world, self).handle)
        if world.history.scheduled:
            agent = world.history.agents[0]
            runtime.schedule("tick", agent_id=agent, cron=CRON, payload={"p": -1})
        return runtime

    async def gate(self) -> None:
        """Return when the process runs; never in a dead one."""
        while not self.running.is_set():
            await self.running.wait()
        if self.world.finished:
            raise asyncio.CancelledError
        if self.state == "dead":
            await self.world.never.wait()


class ProcessClock(LoopClock):
    """The clock of one process: what sleeps, sleeps on while the process stands still."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        await self._process.gate()


class World:
    """The store, the processes, and the plan of what goes wrong."""

    def __init__(self, history: History, inner: Callable[[LoopClock], StateStore]) -> None:
        self.history = history
        self.clock = LoopClock()
        self.laws = Laws(history, self.clock)
        self.processes: list[Process] = []
        self.trace: list[str] = []
        self.tracing = False
        self.armed = False
        """Whether faults happen now; the agents are created, and the history ends, in calm."""
        self.commits = 0
        """Commits that were asked for since ``armed``."""
        self.faults = 0
        """Faults that befell something."""
        self.troubled_at = 0.0
        """When a process came up, or a fault befell a commit, the last time."""
        self._make_inner = inner
        self.inner = inner(self.clock)
        self._faults = {fault.commit: fault for fault in history.faults if not fault.fresh}
        self._fresh_faults = {fault.commit: fault for fault in history.faults if fault.fresh}
        self._random = Random(f"latency {history.seed}")
        self._ids = 0
        self._away_until = 0.0
        self.crashed: list[tuple[Process, float]] = []
        """Processes that died, with the seconds until somebody starts another one."""
        self.over = False
        """Whether the history is over; what stands still then may stay so."""
        self.finished = False
        """Whether nothing is looked at any more."""
        self.enter_loop()

    def enter_loop(self) -> None:
        """Make what is bound to an event loop."""
        self._one_at_a_time = asyncio.Lock()
        self.never = asyncio.Event()
        """What a dead process waits for; it keeps hold of those who wait."""
        self.changed = asyncio.Event()
        """Set when a process has died, and when the history is over."""

    def new_id(self) -> str:
        self._ids += 1
        return f"id-{self._ids:04d}"

    def new_process(self) -> Process:
        process = Process(f"p{len(self.processes) + 1}", self, is_later=self.armed)
        self.processes.append(process)
        return process

    def store_for(self, process: Process) -> StateStore:
        """The real store; of files, each process has its own object."""
        return self._make_inner(self.clock) if self.history.files else self.inner

    def tell(self, text: str) -> None:
        if self.tracing:
            self.trace.append(f"{self.clock.monotonic():9.3f} s  {text}")

    # -- what befalls processes

    def crash(self, process: Process, seconds: float) -> None:
        """The process dies: nothing of it is stored any more."""
        if not process.alive:
            return
        self.tell(f"{process.name} dies")
        process.state = "dead"
        process.running.set()
        process.store.close_streams()
        process.store.release_locks()
        self.crashed.append((process, seconds))
        self.changed.set()

    def pause(self, process: Process, seconds: float) -> None:
        """The process stands still for so long."""
        if process.alive and process.running.is_set():
            self.tell(f"{process.name} stands still for {seconds:g} s")
            process.running.clear()
            asyncio.get_running_loop().call_later(seconds, self.resume, process)

    def resume(self, process: Process) -> None:
        if not process.running.is_set() and not (self.over and self.history.leave_paused):
            self.tell(f"{process.name} goes on")
            process.running.set()
            self.laws.undisturbed_since = self.clock.monotonic()

    def go_away(self, seconds: float) -> None:
        """The store is away, for everybody."""
        self.tell(f"the store is away for {seconds:g} s")
        self._away_until = self.clock.monotonic() + seconds
        self.laws.undisturbed_since = self._away_until

    def calm(self) -> None:
        """Nothing goes wrong from now on."""
        self.armed = False
        self._away_until = 0.0

    def is_away(self) -> bool:
        return self.clock.monotonic() < self._away_until

    def check_reachable(self) -> None:
        if self.is_away():
            raise StorageError("the store is away")

    async def delay(self) -> None:
        """The time that a call takes to reach the store."""
        if not self.history.latency:
            return
        draw = self._random.random()
        if draw < 0.5:
            await asyncio.sleep(0)
        elif draw < 0.6:
            await asyncio.sleep(draw / 20)

    # -- commits

    async def commit(
        self, process: Process, store: StateStore, changes: Sequence[Change]
    ) -> list[int]:
        fault: Fault | None = None
        if self.armed:
            fault = self._faults.get(self.commits)
            self.commits += 1
            if process.is_later:
                fault = self._fresh_faults.get(process.commits, fault)
                process.commits += 1
        await self.delay()
        await process.gate()
        self.check_reachable()
        if not self.armed:
            fault = None  # the process stood still until the history was over
        if fault is not None:
            self.faults += 1
            self.tell(f"{process.name} fault: {fault}")
            self.troubled_at = self.clock.monotonic()
            await self._befall_before(process, fault, changes)
            await process.gate()
        numbers = await self._make(process.name, process.owner, store, changes)
        if fault is not None:
            await self._befall_after(process, fault)
            await process.gate()
        return numbers

    async def _befall_before(
        self, process: Process, fault: Fault, changes: Sequence[Change]
    ) -> None:
        if fault.kind == "full":
            raise StorageFullError("no space left")
        if fault.kind == "broken":
            raise BrokenStoreError("the store fails in a way that nobody foresaw")
        if fault.kind == "edit":
            await self._edit_first(changes)
        elif fault.kind == "steal":
            agents = [change.key[0] for change in changes if change.kind in ("agents", "tasks")]
            if agents and agents[0] in self.history.agents:
                await self.steal(agents[0], fault.seconds)
        elif fault.kind == "crash":
            self.crash(process, fault.seconds)
        elif fault.kind == "pause":
            self.pause(process, fault.seconds)
        elif fault.kind == "slow":
            await asyncio.sleep(fault.seconds)

    async def _befall_after(self, process: Process, fault: Fault) -> None:
        if fault.kind == "lost":
            raise DurabilityUnknownError("the store did not answer")
        if fault.kind == "crash-after":
            self.crash(process, fault.seconds)
        elif fault.kind == "pause-after":
            self.pause(process, fault.seconds)
        elif fault.kind == "late":
            await asyncio.sleep(fault.seconds)

    async def write(self, name: str, changes: Sequence[Change]) -> list[int]:
        """Commit something that is no runtime's, such as a thief's lease."""
        return await self._make(name, None, self.inner, changes)

    async def edit(self, kind: str, key: Key, body: bytes) -> None:
        """Write a document as a person does: the store sees that it is not its own work."""
        before = self.laws.docs.get((kind, key))
        async with self.inner.lock(kind, key):
            if self.laws.docs.get((kind, key)) == before:  # else the person reads it again
                await self._edit(kind, key, body)

    async def _edit(self, kind: str, key: Key, body: bytes) -> None:
        meta = {"_session_id": key[0]} if kind == "agents" else {}
        await self.write("by hand", [Put(kind, key, body, f"{kind}/1", meta=meta)])
        if isinstance(self.inner, MemoryStateStore):
            version = self.inner._documents[kind, key]
            edited = replace(version.document, edited=True)
            self.inner._documents[kind, key] = replace(version, document=edited)

    async def _edit_first(self, changes: Sequence[Change]) -> None:
        """Edit, by hand, the first document that these changes are about to replace."""
        for change in changes:
            body = self.laws.docs.get((change.kind, change.key))
            if body is None or not isinstance(change, Put):
                continue
            if change.kind == "tasks":
                body = {**body, "priority": "high" if body.get("priority") != "high" else "low"}
            elif change.kind == "agents":
                context = body.get("context", {})
                memory = {**context.get("working_memory", {}), "hand": self.clock.monotonic()}
                body = {**body, "context": {**context, "working_memory": memory}}
            else:
                continue
            await self.edit(change.kind, change.key, as_json(body))
            return

    async def steal(self, agent: str, seconds: float) -> None:
        """Another runtime, which does nothing else, takes the agent for a time."""
        until = stamp(later(self.clock.now(), seconds))
        for name in ("owners", "leases"):
            place = ("system", (name, agent))
            known = self.laws.docs.get(place)
            if known is None:
                continue
            body = {**known, "owner": "thief", "token": int(known.get("token", 0)) + 1}
            puts = []
            if name == "leases":
                body["expires_at"] = until
            else:
                beat = {"owner": "thief", "expires_at": until}
                puts.append(Put("system", ("runtimes", "thief"), as_json(beat), "system/1"))
            puts.append(Put(*place, as_json(body), "system/1"))
            self.laws.stolen(agent, body)
            await self.write("thief", puts)
            return

    async def _make(
        self, name: str, owner: str | None, store: StateStore, changes: Sequence[Change]
    ) -> list[int]:
        if not self.history.files:
            return await self._commit(name, owner, store, changes)
        async with self._one_at_a_time:  # so that what is observed first was made first
            return await self._commit(name, owner, store, changes)

    async def _commit(
        self, name: str, owner: str | None, store: StateStore, changes: Sequence[Change]
    ) -> list[int]:
        try:
            numbers = await store.commit(changes)
        except Exception as error:
            self.tell(f"{name} refused: {error}  {_brief(changes)}")
            raise
        self.tell(f"{name} commits {_brief(changes)}")
        self.laws.committed(name, owner, changes, numbers)
        for process in self.processes:
            if process.name != name and process.alive:
                for change, number in zip(changes, numbers, strict=True):
                    if isinstance(change, Put):
                        process.store.hear(Notice(change.kind, change.key, number, outside=True))
                    elif isinstance(change, Delete) and number:
                        process.store.hear(Notice(change.kind, change.key, None, outside=True))
        return numbers


def _brief(changes: Sequence[Change]) -> str:
    parts = []
    for change in changes:
        where = "/".join((change.kind, *change.key))
        if isinstance(change, Put):
            body = change.body.decode()
            expected = "" if change.expected is None else f"@{change.expected}"
            parts.append(f"{where}{expected} {body if len(body) < 700 else body[:700] + '…'}")
        elif isinstance(change, Append):
            parts.append(f"{where} += {change.body.decode()[:60]}")
        else:
            word = "check" if type(change).__name__ == "Check" else "-"
            parts.append(f"{word} {where}@{getattr(change, 'expected', '')}")
    return "\n                 ".join(parts)


class ProcessStore:
    """The store as one process sees it."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self._inner = process.world.store_for(process)
        self._broadcast = Broadcast()
        self._locking: list[asyncio.Task[Any]] = []
        """The tasks that hold a lock, once for each."""
        self.deaf = False
        """Whether the stream of notices fails next."""

    # -- notices of what other processes do

    def hear(self, notice: Notice) -> None:
        delay = 0.01 if self._world.history.latency else 0.0
        asyncio.get_running_loop().call_later(delay, self._broadcast.notify, notice)

    def close_streams(self) -> None:
        self._broadcast.end()

    async def watch(self) -> _Notices:
        return _Notices(self, self._process, self._broadcast.subscribe())

    # -- calls that a fault may befall

    async def open(self) -> None:
        await self._process.gate()
        await self._inner.open()

    async def close(self) -> None:
        self._broadcast.end()
        if self._world.history.files:
            await self._inner.close()

    async def _reach(self) -> None:
        await self._world.delay()
        await self._process.gate()
        self._world.check_reachable()

    async def get(self, kind: str, key: Key) -> Document | None:
        await self._reach()
        found = await self._inner.get(kind, key)
        await self._process.gate()
        return found

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if asyncio.current_task() in self._locking:  # the holder of a lock passes it
            return await self._world.commit(self._process, self._inner, changes)
        # As with every store, what was handed over is done, even if its caller is cancelled.
        return await shielded(self._world.commit(self._process, self._inner, changes))

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        await self._reach()
        return await self._inner.keys(kind, prefix)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        await self._reach()
        async for document in self._inner.scan(kind, prefix):
            yield document

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        await self._reach()
        return await self._inner.logs(kind, prefix)

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        await self._reach()
        async for record in self._inner.read_log(kind, key, after=after, last=last):
            yield record

    # -- calls that are passed on

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        async with self._inner.lock(kind, key):
            me = asyncio.current_task()
            assert me is not None
            self._locking.append(me)
            try:
                yield
            finally:
                self._locking.remove(me)

    def release_locks(self) -> None:
        """Release what the process holds, as the operating system does when it dies."""
        for task in self._locking:
            task.cancel()

    async def flush(self) -> None:
        await self._inner.flush()

    async def erase(self, kind: str, key: Key) -> int:
        await self._reach()
        return await self._inner.erase(kind, key)

    async def quarantine(
        self, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        await self._reach()
        earlier = await self._inner.quarantine(kind, key, reason, version=version)
        self._world.tell(f"{self._process.name} quarantines {kind}/{'/'.join(key)}: {reason}")
        self._world.laws.quarantined(kind, key, earlier)
        return earlier

    async def origin(self) -> Origin:
        return await self._inner.origin()

    def incidents(self) -> list[Incident]:
        return self._inner.incidents()


class _Notices:
    """A stream of notices that can fail once."""

    def __init__(self, store: ProcessStore, process: Process, inner: Subscription) -> None:
        self._store = store
        self._process = process
        self._inner = inner

    def __aiter__(self) -> _Notices:
        return self

    async def __anext__(self) -> Notice:
        notice = await self._inner.__anext__()
        await self._process.gate()
        if self._store.deaf:
            self._store.deaf = False
            raise BrokenStoreError("the watch of the directory has failed")
        return notice

    async def aclose(self) -> None:
        await self._inner.aclose()


def as_json(body: dict[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


def memory_store(clock: LoopClock) -> MemoryStateStore:
    return MemoryStateStore(clock=clock)
