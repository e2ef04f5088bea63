"""Runtimes on a fake clock, a store that fails on request, and handlers for tests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from types import FrameType
from typing import Any

from agent_state import (
    AsyncAgentSessionManager,
    DurabilityUnknownError,
    MemoryStateStore,
    StateStore,
    StorageFullError,
    Task,
    TaskContext,
)
from agent_state.protocols import Change, Document, Key, Notice, Put
from agent_state.testing import FakeClock

Picks = Callable[[Change], bool]


def make_runtime(
    store: StateStore | None = None,
    clock: FakeClock | None = None,
    *,
    name: str = "id",
    **settings: Any,
) -> AsyncAgentSessionManager:
    """Return a runtime with the test's time, ids and randomness."""
    clock = clock or FakeClock()
    numbers = count(1)
    return AsyncAgentSessionManager(
        store=store or MemoryStateStore(clock=clock),
        clock=clock,
        new_id=lambda: f"{name}-{next(numbers):04d}",
        random=random.Random(7),
        **settings,
    )


class TroubledStore(MemoryStateStore):
    """Holds the first commit that ``hold`` picks until ``gate`` is set; is full for ``full``.

    The first commit that ``unknown`` picks is made, and raises all the same.

    As every store does, it completes a commit that was handed over when its caller is cancelled.
    """

    def __init__(self, clock: FakeClock | None = None) -> None:
        super().__init__(clock=clock or FakeClock())
        self.hold: Picks = lambda _: False
        self.full: Picks = lambda _: False
        self.unknown: Picks = lambda _: False
        self.held, self.gate = asyncio.Event(), asyncio.Event()

    async def get(self, kind: str, key: Key) -> Document | None:
        await asyncio.sleep(0)  # other tasks run, as with a disk
        return await super().get(kind, key)

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if any(map(self.full, changes)):
            raise StorageFullError("no space left")
        if any(map(self.unknown, changes)):
            self.unknown = lambda _: False
            await super().commit(changes)
            raise DurabilityUnknownError("the disk did not answer")
        if not any(map(self.hold, changes)):
            return await super().commit(changes)
        self.hold = lambda _: False
        self.held.set()
        handed_over = asyncio.ensure_future(self._later(changes))
        try:
            return await asyncio.shield(handed_over)
        except asyncio.CancelledError:
            await handed_over
            raise

    async def _later(self, changes: Sequence[Change]) -> list[int]:
        await self.gate.wait()
        return await super().commit(changes)


class RecordingStore(MemoryStateStore):
    """Records the changes of every commit that was made."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        super().__init__(clock=clock or FakeClock())
        self.commits: list[Sequence[Change]] = []

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        numbers = await super().commit(changes)
        self.commits.append(changes)
        return numbers


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count the lines of Python that run in the block: its cost, on any machine.

    Garbage is not collected meanwhile: whoever is called back then (hypothesis) would count.
    """
    found = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal found
        found += event == "line"
        return count

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(count)
    try:
        yield lambda: found
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()


def puts(kind: str, word: str = "") -> Picks:
    """Match the changes that store a document of that kind with the word in it."""
    return lambda change: (
        isinstance(change, Put) and change.kind == kind and word.encode() in change.body
    )


def working(runtime: AsyncAgentSessionManager, *seen: list[str]) -> None:
    """Register a handler that returns the agent's id; ``seen`` gets ``agent/task``."""

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        for ran in seen:
            ran.append(f"{ctx.agent_id}/{task.name}")
        return ctx.agent_id


def counting(runtime: AsyncAgentSessionManager) -> None:
    """Register a handler that returns the number of the attempt."""

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        return ctx.attempt


def hanging(runtime: AsyncAgentSessionManager) -> asyncio.Event:
    """Register a handler that never ends; the event is set once it runs."""
    started = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    return started


def sharing(store: StateStore, clock: FakeClock, name: str) -> AsyncAgentSessionManager:
    """One of several runtimes on a store; its handler returns the runtime's name."""
    runtime = make_runtime(store, clock, name=name, exclusive=False, lease_seconds=30)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        ctx.memory[task.name] = name
        return name

    return runtime


async def with_agent(runtime: AsyncAgentSessionManager) -> None:
    """Start the runtime, and create the agent ``alice``."""
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")


async def edit(runtime: AsyncAgentSessionManager, kind: str, key: Any, **changes: Any) -> None:
    """Change a document as another process would, and deliver the notice of it."""
    key = (key,) if isinstance(key, str) else key
    stored = await runtime.manager.load(kind, key)
    body = stored.model_dump() if stored is not None else {}
    await runtime.manager.save(kind, key, {**body, **changes})
    await runtime.reconciler.notice(Notice(kind, key, 0, outside=True))


WORKER = {"agent_id": "alice", "agent_type": "worker"}
