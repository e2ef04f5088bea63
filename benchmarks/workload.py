"""What is saved, where, and how a hundred agents save it at once."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

AGENTS = 100
TICK_SECONDS = 0.001

State = dict[str, Any]
Save = Callable[[int, State], Awaitable[object]]
Contender = Callable[[Path], AbstractAsyncContextManager[Save]]

WORDS = ("state", "agent", "plan", "read", "file", "note", "mail", "wait", "done", "next", "task")

REST_SECONDS = 65


@dataclass(frozen=True, slots=True)
class Setting:
    """How much to measure, and on which file system."""

    directory: Path
    runs: int
    quick: bool

    def scaled(self, count: int) -> int:
        return max(1, count // 5) if self.quick else count

    def rest(self) -> None:
        """Let the file system forget what was deleted.

        After some thousand replaces, making a file takes twice as long for about a minute, in a
        bare loop of system calls too. ext4 without a journal steps over every inode deleted in
        the last minute (``recently_deleted`` in fs/ext4/ialloc.c), which would explain it. Quick
        runs do not wait, and show it.
        """
        if not self.quick:
            time.sleep(REST_SECONDS)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder, gone afterwards."""
        path = Path(tempfile.mkdtemp(prefix="bench-", dir=self.directory))
        try:
            yield path
        finally:
            shutil.rmtree(path)


def agent_state(index: int) -> State:
    """An agent session of 2 KiB as JSON, the same in every run."""
    random = Random(index)  # noqa: S311  # data, not a secret

    def text(words: int) -> str:
        return " ".join(random.choice(WORDS) for _ in range(words))

    return {
        "agent_id": f"agent-{index:05d}",
        "agent_name": f"Agent {index}",
        "agent_type": "reader",
        "status": "active",
        "created_at": "2026-01-01T00:00:00.000000Z",
        "last_active": "2026-01-01T00:00:00.000000Z",
        "configuration": {"model": "none", "temperature": 0.2, "max_steps": 20},
        "context": {
            "system_prompt": text(30),
            "conversation_history": [
                {
                    "role": "user" if turn % 2 == 0 else "agent",
                    "content": text(18),
                    "timestamp": f"2026-01-01T00:00:{turn:02d}.000000Z",
                }
                for turn in range(8)
            ],
            "working_memory": {"topic": text(4), "step": 0, "seen": [text(1) for _ in range(6)]},
            "agent_data": {"score": random.random(), "flags": [True, False, None]},
        },
        "tool_sets": ["files", "mail"],
        "counters": {"saves": 0, "tasks": random.randrange(100)},
        "metadata": {"team": "bench"},
    }


def change(state: State, number: int) -> None:
    """Make the state another one."""
    state["counters"]["saves"] = number
    state["context"]["working_memory"]["step"] = number
    state["last_active"] = f"2026-01-01T00:00:00.{number:06d}Z"


@dataclass(slots=True)
class Load:
    """What came of a load: how many saves, how long, and what each had to wait."""

    saves: int
    seconds: float = 0.0
    processor: float = 0.0
    """The seconds of the processor, in all threads of the process."""
    acks_ms: list[float] = field(default_factory=list)
    stalls_ms: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.saves / self.seconds


async def all_at_once(contender: Contender, folder: Path, each: int) -> Load:
    """A hundred agents, each saving again as soon as its last save is acknowledged."""
    load = Load(AGENTS * each)
    states = [agent_state(index) for index in range(AGENTS)]

    async def agent(save: Save, index: int) -> None:
        state = states[index]
        for number in range(1, each + 1):
            change(state, number)
            began = time.perf_counter()
            await save(index, state)
            load.acks_ms.append((time.perf_counter() - began) * 1e3)

    async with contender(folder) as save:
        for index, state in enumerate(states):
            await save(index, state)
        async with ticking(load.stalls_ms):
            began, processor = time.perf_counter(), time.process_time()
            await asyncio.gather(*(agent(save, index) for index in range(AGENTS)))
            load.seconds = time.perf_counter() - began
            load.processor = time.process_time() - processor
    return load


@asynccontextmanager
async def ticking(
    stalls_ms: list[float], clock: Callable[[], float] = time.perf_counter
) -> AsyncIterator[None]:
    """Measure by how much the event loop is late, a thousand times a second.

    With ``time.thread_time`` as the clock: for how long it works at a stretch, whatever else the
    machine does.
    """
    pause = TICK_SECONDS if clock is time.perf_counter else 0.0

    async def tick() -> None:
        while True:
            began = clock()
            await asyncio.sleep(TICK_SECONDS)
            stalls_ms.append((clock() - began - pause) * 1e3)

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()
        await asyncio.wait([ticker])


def percentile(values: list[float], share: float) -> float:
    """The value below which that share of all values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
