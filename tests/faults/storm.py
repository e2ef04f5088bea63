"""A storm of kills: processes that write, are killed at random moments, and have successors.

The director knows what was acknowledged; it is a process of one thread, so that it can fork a
successor in a few milliseconds. A successor opens the directory (and may be killed while it
does), checks what its predecessor was told is done, says what it found, and writes on.
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from agent_state.storage.fileio import TEMPORARY
from agent_state.storage.locks import WRITERS
from tests.faults.forking import die_with_parent, fork, forkserver, in_child
from tests.faults.keyrings import ENCRYPTS, FOLDER
from tests.faults.tally import Tally
from tests.faults.writing import (
    OPERATIONS,
    Counts,
    Habits,
    Lane,
    ViolationError,
    check_all,
    make_manager,
    new_counts,
    prepare,
    refuse_damage,
)

STUCK_SECONDS = 20.0
"""No opening and no check takes that long, unless something a dead process held is in the way."""
WHILE_OPENING = 0.5
"""The share of processes that are killed before they have opened the directory and checked."""
OPENING_SECONDS, WRITING_SECONDS = 0.012, 0.02
LONGEST_SECONDS = 0.2
"""On a busy machine a life is short of work; then lives become longer, up to this."""
SEASON = 1000
"""So many kills, then everything is checked as a whole, and a new directory begins."""


@dataclass
class Weather:
    """What a storm did and saw. Sent from the director to the test."""

    tally: Tally = field(default_factory=Tally)
    kills: Counter[str] = field(default_factory=Counter)
    """By what the process was at: ``opening`` or ``writing``."""
    acknowledged: Counter[str] = field(default_factory=Counter)
    """By operation."""
    violations: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """Seconds from the opening until everything was checked: how long anything was in the way."""
    most_left: int = 0
    """Temporary files that dead writers had left in the end, before anybody was alone."""
    most_locks: int = 0
    """Writers' lock files at the end of a season, of living and dead."""

    def add(self, other: Weather) -> None:
        self.tally.add(other.tally)
        self.kills += other.kills
        self.acknowledged += other.acknowledged
        self.violations += other.violations
        self.slowest = max(self.slowest, other.slowest)
        self.most_left = max(self.most_left, other.most_left)
        self.most_locks = max(self.most_locks, other.most_locks)


def weather_of(work: Callable[..., Weather], *args: object) -> Weather:
    """Run a director in a process of its own."""
    context = forkserver()
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_direct, args=(writing, work, args), daemon=True)
    process.start()
    writing.close()
    try:
        found = reading.recv()
    except EOFError:
        raise AssertionError("the director died") from None
    finally:
        process.kill()
        process.join()
        reading.close()
    assert isinstance(found, Weather), found
    return found


def _direct(answer: Connection, work: Callable[..., Weather], args: tuple[object, ...]) -> None:
    die_with_parent()
    gc.freeze()  # what is imported is shared with all that are forked
    try:
        answer.send(work(*args))
    except BaseException:  # noqa: BLE001  # the test shows it
        answer.send(traceback.format_exc())


def storm(parent: Path, exclusive: bool, directories: int, kills: int, seed: str) -> Weather:
    """So many kills over several directories at once, in seasons.

    Four processes write at any time: one in each of four exclusive directories, or all of them
    in one that is shared.
    """
    weather = Weather()
    for season in range(-(-kills // SEASON)):
        goal = min(SEASON, kills - season * SEASON)
        roots = [parent / f"season-{season}-{n}" for n in range(directories)]
        weather.add(Season(roots, exclusive, f"{seed}/{season}").run(goal))
        if weather.violations:
            break
        for root in roots:
            shutil.rmtree(root)
    return weather


def encrypted_storm(
    keys: str, parent: Path, exclusive: bool, directories: int, kills: int, seed: str
) -> Weather:
    """``storm`` over encrypted directories, with one folder of keys for all writers."""
    os.environ.update({FOLDER: keys, ENCRYPTS: "1"})
    return storm(parent, exclusive, directories, kills, seed)


@dataclass
class Slot:
    """Where one process writes, and after it its successor."""

    root: Path
    exclusive: bool
    counts: dict[str, Counts]
    pid: int = 0
    fd: int = -1
    rest: bytes = b""
    when: float = 0.0
    """When it is to be killed, or, ``waiting`` for it to have checked, given up."""
    waiting: bool = True
    stage: str = ""
    began: float = 0.0
    lives: int = 0
    habits: Habits = field(default_factory=Habits)


class Season:
    """One director's work on directories that begin empty."""

    def __init__(self, roots: list[Path], exclusive: bool, seed: str, writers: int = 4) -> None:
        self.exclusive = exclusive
        self.seed = seed
        self.random = Random(seed)
        self.weather = Weather()
        self.roots = roots
        self.slots = [
            Slot(roots[n % len(roots)], exclusive, new_counts([f"{n}-a", f"{n}-b"]))
            for n in range(writers)
        ]
        self.killed = 0
        self.writing = WRITING_SECONDS

    def run(self, kills: int) -> Weather:
        for root in self.roots:
            in_child(partial(prepare, root))
        try:
            for slot in self.slots:
                self._succeed(slot)
            while not self.weather.violations and not self._is_enough(kills):
                self._keep_pace()
                self._wait()
                self._act()
        finally:
            for slot in self.slots:
                self._kill(slot)
        if not self.weather.violations:
            for number, root in enumerate(self.roots):
                self._check(root, exclusive=self.exclusive != bool(number % 2))
        return self.weather

    def _is_enough(self, kills: int) -> bool:
        """Until there was enough of each, and no longer than makes sense."""
        told = self._least_told() > kills / 20
        return self.killed >= kills and (told or self.killed > 5 * kills)

    def _least_told(self) -> int:
        return min(self.weather.acknowledged[operation] for operation in OPERATIONS)

    def _keep_pace(self) -> None:
        """Let processes live longer while too little is acknowledged for so many kills."""
        behind = self._least_told() < self.killed / 18
        pace = self.writing * (1.01 if behind else 0.99)
        self.writing = min(max(pace, WRITING_SECONDS), LONGEST_SECONDS)

    def _act(self) -> None:
        """Do what is due."""
        for slot in self.slots:
            if slot.when <= time.monotonic():
                if slot.waiting:
                    what = f"{slot.root}: {slot.stage} takes {STUCK_SECONDS} s"
                    self.weather.violations.append(what)
                self._strike(slot)

    def _strike(self, slot: Slot) -> None:
        self._kill(slot)
        self._succeed(slot)

    # -- one process after another -----------------------------------------------------------

    def _succeed(self, slot: Slot) -> None:
        """Fork the next process of a slot; where one writes alone, of either kind of store."""
        slot.lives += 1
        seed = f"{self.seed}/{slot.lives}"
        exclusive = slot.exclusive and self.random.random() > 0.2
        reading, writing = os.pipe()
        slot.pid = fork(partial(last_words, partial(self._work, slot, exclusive, seed), writing))
        os.close(writing)
        os.set_blocking(reading, False)
        slot.fd, slot.rest, slot.stage, slot.waiting = reading, b"", "beginning", True
        slot.when = time.monotonic() + STUCK_SECONDS

    def _work(self, slot: Slot, exclusive: bool, seed: str, acks: int) -> None:
        """What the process of a slot does."""
        habits = slot.habits
        asyncio.run(write_until_killed(slot.root, exclusive, slot.counts, seed, acks, habits))

    def _wait(self) -> None:
        """Until something is said, or the next moment to kill has come."""
        poll = select.poll()
        by_fd = {slot.fd: slot for slot in self.slots}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        pause = min(slot.when for slot in self.slots) - time.monotonic()
        for fd, _ in poll.poll(max(0.0, pause * 1000)):
            if not self._hear(by_fd[fd]):
                self.weather.violations.append("a writer ended by itself")

    def _hear(self, slot: Slot) -> bool:
        """Take in what a process has said; False at its end."""
        while True:
            try:
                said = os.read(slot.fd, 1 << 16)
            except BlockingIOError:
                return True
            if not said:
                return False
            *lines, slot.rest = (slot.rest + said).split(b"\n")
            for line in lines:
                self._take_in(slot, line.decode().split(" "))

    def _take_in(self, slot: Slot, words: list[str]) -> None:
        now = time.monotonic()
        if words[0] == "begin":
            slot.stage, slot.began = "opening", now
            if self.random.random() < WHILE_OPENING:
                slot.when = now + self.random.uniform(0.0, OPENING_SECONDS)
                slot.waiting = False
        elif words[0] == "found":
            _, lane, operation, number = words
            slot.counts[lane][operation] = int(number)
        elif words[0] == "checked":
            self.weather.slowest = max(self.weather.slowest, now - slot.began)
            self.weather.tally.points += 1
            slot.stage, slot.waiting = "writing", False
            slot.when = now + self.random.uniform(0.0, self.writing)
        elif words[0] == "ack":
            _, lane, operation, number = words
            if int(number) != slot.counts[lane][operation] + 1:
                self.weather.violations.append(f"{slot.counts[lane]}, then {words}")
            slot.counts[lane][operation] = int(number)
            self.weather.acknowledged[operation] += 1
            self.weather.tally.acknowledged += 1
        else:
            _, lost, unreadable, *what = words
            self.weather.tally.lost += int(lost)
            self.weather.tally.unreadable += int(unreadable)
            self.weather.violations.append(f"{slot.root}: {' '.join(what)}")

    def _kill(self, slot: Slot) -> None:
        """SIGKILL; what was acknowledged before still comes out of the pipe."""
        if not slot.pid:
            return
        os.kill(slot.pid, signal.SIGKILL)
        os.waitpid(slot.pid, 0)
        while self._hear(slot):
            pass
        os.close(slot.fd)
        slot.pid, slot.fd = 0, -1
        if slot.stage in ("opening", "writing"):
            self.killed += 1
            self.weather.kills[slot.stage] += 1
            self.weather.tally.faults += 1

    # -- the whole, when all are dead --------------------------------------------------------

    def _check(self, root: Path, *, exclusive: bool) -> None:
        tally = self.weather.tally
        self.weather.most_left = max(self.weather.most_left, len(leftovers(root)[0]))
        locks = list((root / ".locks" / WRITERS).iterdir())
        self.weather.most_locks = max(self.weather.most_locks, len(locks))
        counts = {
            lane: counted
            for slot in self.slots
            if slot.root == root
            for lane, counted in slot.counts.items()
        }
        try:
            habits = self.slots[0].habits
            in_child(lambda: check_all(root, counts, exclusive=exclusive, habits=habits))
        except ViolationError as violation:
            tally.lost += violation.lost
            tally.unreadable += violation.unreadable
            self.weather.violations.append(f"{root}, at the end: {violation}")
        tally.points += len(counts)
        left = [*leftovers(root)[0], *leftovers(root)[1]]
        tally.leaked += len(left)
        if left:
            self.weather.violations.append(f"{root}, left behind: {left[:5]}")


async def write_until_killed(
    root: Path,
    exclusive: bool,
    counts: Mapping[str, Counts],
    seed: str,
    acks: int,
    habits: Habits,
) -> None:
    os.write(acks, b"begin\n")
    async with make_manager(root, exclusive=exclusive) as manager:
        lanes = [
            Lane(manager, name, known, Random(f"{seed}/{name}"), acks, habits)
            for name, known in counts.items()
        ]
        for lane in lanes:
            await lane.check()
            found = [f"found {lane.name} {what} {n}\n" for what, n in lane.counts.items()]
            os.write(acks, "".join(found).encode())
        refuse_damage(manager)
        os.write(acks, b"checked\n")
        await asyncio.gather(*(lane.run() for lane in lanes))


def last_words(work: Callable[[int], None], acks: int) -> None:
    """Work until killed. What is found to be wrong is the last that is said."""
    try:
        work(acks)
    except ViolationError as violation:
        what = str(violation).replace("\n", "; ")
        os.write(acks, f"wrong {violation.lost} {violation.unreadable} {what}\n".encode())
    except BaseException:  # noqa: BLE001  # the director tells it
        what = traceback.format_exc().replace("\n", "; ")
        os.write(acks, f"wrong 0 0 {what}\n".encode())


def leftovers(root: Path) -> tuple[list[Path], list[Path]]:
    """Temporary files; and journals, intents and writers' locks."""
    temporaries = [path for path in _below(root) if path.name.startswith(TEMPORARY)]
    others = [*(root / ".journal").glob("[!.]*"), *(root / ".locks" / WRITERS).iterdir()]
    return temporaries, others


def _below(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder) / name for name in names)
