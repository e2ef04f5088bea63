"""What the runtime's tests share: a runtime on a fake clock, and a way for it to die."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StateStore,
    StorageFullError,
    Task,
    TaskContext,
)
from agent_state.protocols import Change, Document, Key, Notice, Put
from agent_state.testing import FakeClock
from tests.deadlines import soon as soon
from tests.deadlines import until as until

Picks = Callable[[Change], bool]


def make_runtime(
    store: StateStore | None = None,
    clock: FakeClock | None = None,
    *,
    name: str = "id",
    **settings: Any,
) -> AsyncAgentSessionManager:
    """A runtime whose time, ids and randomness are the test's."""
    clock = clock or FakeClock()
    numbers = count(1)
    return AsyncAgentSessionManager(
        store=store or MemoryStateStore(clock=clock),
        clock=clock,
        new_id=lambda: f"{name}-{next(numbers):04d}",
        random=random.Random(7),
        **settings,
    )


async def die(runtime: AsyncAgentSessionManager) -> None:
    """End every task of the runtime as a kill would: nothing is put back, nothing saved."""
    await runtime.abort()


class TroubledStore(MemoryStateStore):
    """Holds the commits that ``hold`` picks until ``gate`` opens; the disk is full for ``full``.

    As every store does, it ends a commit that was handed over before its caller is cancelled.
    """

    def __init__(self, clock: FakeClock | None = None) -> None:
        super().__init__(clock=clock or FakeClock())
        self.hold: Picks = lambda _: False
        self.full: Picks = lambda _: False
        self.held, self.gate = asyncio.Event(), asyncio.Event()

    async def get(self, kind: str, key: Key) -> Document | None:
        await asyncio.sleep(0)  # others go on meanwhile, as with a disk
        return await super().get(kind, key)

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if any(map(self.full, changes)):
            raise StorageFullError("no space left")
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


def puts(kind: str, word: str = "") -> Picks:
    """Whether a change stores a document of that kind in which the word occurs."""
    return lambda change: (
        isinstance(change, Put) and change.kind == kind and word.encode() in change.body
    )


def working(runtime: AsyncAgentSessionManager, *seen: list[str]) -> None:
    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        for ran in seen:
            ran.append(f"{ctx.agent_id}/{task.name}")
        return ctx.agent_id


async def edit(runtime: AsyncAgentSessionManager, kind: str, key: Any, **changes: Any) -> None:
    """Change a document behind the runtime's back, and let it notice."""
    key = (key,) if isinstance(key, str) else key
    stored = await runtime.manager.load(kind, key)
    body = stored.model_dump() if stored is not None else {}
    await runtime.manager.save(kind, key, {**body, **changes})
    await runtime.reconciler.notice(Notice(kind, key, 0, outside=True))


WORKER = {"agent_id": "alice", "agent_type": "worker"}
