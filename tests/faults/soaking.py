"""A long storm over processes that stay: paused, cancelled, and looked at for what piles up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.faults.forking import in_child
from tests.faults.storm import STUCK_SECONDS, Season, Slot, Weather, write_until_killed
from tests.faults.writing import Counts, Habits, new_counts, prepare

PAUSED_SECONDS = 0.3
HABITS = Habits(large=0.0, dedupe=False, cancelled=0.2, pause=0.01)
"""What a log remembers of its ids grows with the log, and so is no part of what must not grow."""


@dataclass
class Soaked(Weather):
    """What a soak did and saw, and what the processes that stayed held, second by second."""

    pauses: int = 0
    held: dict[str, list[dict[str, int]]] = field(default_factory=dict)


def soak(parent: Path, seconds: float, seed: str) -> Weather:
    """Two directories of each store: in one a process stays, in the other one is killed.

    The shared directory is one and the same: who is killed there is beside who stays.
    """
    shared, ours, killed = (parent / name for name in ("shared", "ours", "killed"))
    return Soak([shared, ours, killed], seed).run_for(seconds)


class Soak(Season):
    """The director of a soak. The slots' first two stay."""

    def __init__(self, roots: list[Path], seed: str) -> None:
        super().__init__(roots, False, seed, writers=4)
        self.soaked = Soaked()
        self.weather = self.soaked
        shared, ours, killed = roots
        self.staying: dict[int, bool] = {}
        self.slots = [
            Slot(root, exclusive, new_counts([f"{n}-a", f"{n}-b"]), habits=HABITS)
            for n, (root, exclusive) in enumerate(
                [(shared, False), (ours, True), (shared, False), (killed, True)]
            )
        ]

    def run_for(self, seconds: float) -> Soaked:
        for root in self.roots:
            in_child(partial(prepare, root))
        until = time.monotonic() + seconds
        try:
            for slot in self.slots:
                self._succeed(slot)
            while time.monotonic() < until and not self.weather.violations:
                self._wait()
                self._act()
        finally:
            for slot in self.slots:
                self._kill(slot)
        if not self.weather.violations:
            for root, exclusive in zip(self.roots, (True, False, True), strict=True):
                self._check(root, exclusive=exclusive)
        return self.soaked

    def _stays(self, slot: Slot) -> bool:
        return slot in self.slots[:2]

    def _strike(self, slot: Slot) -> None:
        if not self._stays(slot) or slot.waiting:
            super()._strike(slot)
            return
        paused = self.staying[slot.pid] = not self.staying.get(slot.pid, False)
        os.kill(slot.pid, signal.SIGSTOP if paused else signal.SIGCONT)
        self.soaked.pauses += paused
        self.weather.tally.faults += paused
        longest = PAUSED_SECONDS if paused else 4 * PAUSED_SECONDS
        slot.when = time.monotonic() + self.random.uniform(0.0, longest)

    def _take_in(self, slot: Slot, words: list[str]) -> None:
        if words[0] == "holds":
            name = "exclusive" if slot.exclusive else "shared"
            counted = dict(zip(words[1::2], map(int, words[2::2]), strict=True))
            self.soaked.held.setdefault(name, []).append(counted)
            return
        super()._take_in(slot, words)
        if words[0] == "begin" and self._stays(slot) and not slot.waiting:
            slot.when, slot.waiting = slot.began + STUCK_SECONDS, True

    def _work(self, slot: Slot, exclusive: bool, seed: str, acks: int) -> None:
        if self._stays(slot):
            asyncio.run(stay(slot.root, slot.exclusive, slot.counts, seed, acks))
        else:
            super()._work(slot, exclusive, seed, acks)


async def stay(
    root: Path, exclusive: bool, counts: Mapping[str, Counts], seed: str, acks: int
) -> None:
    """Write, and say every second what the process holds."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(1.0)
            said = " ".join(f"{name} {number}" for name, number in holds().items())
            os.write(acks, f"holds {said}\n".encode())

    telling = asyncio.ensure_future(tell())
    try:
        await write_until_killed(root, exclusive, counts, seed, acks, HABITS)
    finally:
        telling.cancel()


def holds() -> dict[str, int]:
    """Descriptors, threads, and KiB of memory of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return {
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": int(fields["Threads"]),
        "memory": int(fields["VmRSS"].split()[0]),
    }
