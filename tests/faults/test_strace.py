"""Real processes that are killed at every system call, or whose system calls fail, by strace.

strace counts the calls of a name on a file, in each thread, and which thread does what is not the
same in every run. So each run tells which call it was killed at. A point is a call by what it is:
its name, its file (whose random part is the same in every run), and which such call of the process
it is. Every point that two undisturbed runs have in common must have been hit, or else a call
beside it, with nothing changed between the two. A runtime, where many tasks work at once, is killed
at some of its calls only.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from agent_state.storage.fileio import TEMPORARY
from tests.faults.attempts import Scene, alike, cases_with_encryption, judge, scene_of
from tests.faults.ledger import STORES
from tests.faults.operations import OPERATIONS
from tests.faults.tally import Tally
from tests.faults.tracing import (
    FAILED,
    LOCKING,
    NAMING,
    SYNCING,
    TRACED,
    WRITING,
    Call,
    Forking,
    memory_folder,
    needs_strace,
    read_trace,
)

pytestmark = [needs_strace, pytest.mark.long("runs processes under strace")]

KILLED = ("T2", "SIGKILL before every system call; of a runtime before some (strace)")
FAILING = ("T12", "system calls that really fail: fsync, rename, open, write (strace)")
SLOW = ("T4", "SIGKILL while a slow sync is under way (strace)")

SEEDED = (("exclusive", "group"), ("shared", "append"))
NOT_SEEDED = [case for case in cases_with_encryption() if case not in SEEDED]
ERRORS = {
    "fsync": "EIO",
    "fdatasync": "EIO",
    "rename": "ENOSPC",
    "openat": "EMFILE",
    "write": "ENOSPC",
    "mkdir": "EROFS",
}
SEEDED_ERRORS = ("fsync", "rename")
ROUNDS = 24
"""How often a point is aimed at that another thread has evaded."""


@dataclass(frozen=True)
class Point:
    """A call by what it is: its name, its file, and which of these it is in the process."""

    call: str
    file: str
    number: int


@dataclass(frozen=True)
class Target:
    """How strace is told to meet a point: the n-th call of that name and file in one thread."""

    call: str
    files: tuple[str, ...]
    when: int

    def options(self, what: str) -> list[str]:
        named = [option for file in self.files for option in ("-P", file)]
        return [*named, "-e", f"inject={self.call}:{what}:when={self.when}"]


@dataclass(frozen=True)
class Step:
    """A call of an undisturbed run. ``matters``: it may change something, or make it durable."""

    point: Point
    target: Target
    matters: bool

    @property
    def changes(self) -> bool:
        """Whether the files look different afterwards."""
        return self.matters and self.point.call not in (*SYNCING, *LOCKING, "close")


@pytest.fixture(scope="module")
def forking() -> Iterator[Forking]:
    with Forking() as process:
        yield process


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


class Strikes:
    """One operation, done again and again by real processes under strace."""

    def __init__(
        self, forking: Forking, kind: str, name: str, scene: Scene, folder: Path, tally: Tally
    ) -> None:
        self._forking = forking
        self._kind, self._name, self._scene, self._tally = kind, name, scene, tally
        self._root, self._ledger = folder / "state", folder / "ledger"
        self._trace = folder / "trace"
        self._judges = 0

    def run(self, *options: str) -> tuple[int, list[Call]]:
        """Do it, under strace with these options; how it ended, and its calls."""
        self._scene.copy_to(self._root)
        with self._forking.traced(self._trace, "-e", f"trace={','.join(TRACED)}", *options):
            status = self._forking.run(self._kind, self._name, self._root, self._ledger)
        return status, read_trace(self._trace)

    def forget(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._ledger.unlink(missing_ok=True)

    def judge(self, about: object) -> None:
        """Open what is there, with the one store and the other by turns."""
        for path in self._root.rglob(f"{TEMPORARY}*"):
            os.utime(path, (0, 0))  # the shared store spares those that may be a live writer's
        kinds = alike(self._kind)
        kind = kinds[self._judges % len(kinds)]
        self._judges += 1
        self._tally.points += 1
        name = f"{self._name} ({self._kind})"
        judge(kind, name, self._root, self._ledger, self._scene, self._tally, about)
        self.forget()

    def undisturbed(self) -> list[Step]:
        status, calls = self.run()
        assert status in (0, FAILED << 8), f"{self._name} ended with {status}"
        self.forget()
        return self.steps(calls)

    def steps(self, calls: Sequence[Call]) -> list[Step]:
        """The calls of a run about the state directory or the ledger, and how to meet each."""
        found = []
        files: Counter[tuple[str, str]] = Counter()
        threads: Counter[tuple[int, str, frozenset[str]]] = Counter()
        for call, matters in self._mattering(calls):
            paths = call.paths
            if not (self._inside(call) or str(self._ledger) in paths):
                continue
            of_thread = [
                earlier
                for earlier in threads
                if earlier[:2] == (call.thread, call.name) and not earlier[2].isdisjoint(paths)
            ]
            when = 1 + sum(threads[earlier] for earlier in of_thread)
            threads[call.thread, call.name, frozenset(paths)] += 1
            files[call.name, paths[-1]] += 1
            point = Point(call.name, paths[-1], files[call.name, paths[-1]])
            target = Target(call.name, tuple(dict.fromkeys(paths)), when)
            found.append(Step(point, target, matters))
        return found

    def struck(self, calls: Sequence[Call], name: str) -> Point | None:
        """Which call it was that the process was killed at."""
        for number, call in enumerate(calls):
            if call.last and call.name == name:
                return self.steps(calls[: number + 1])[-1].point
        return None

    def _mattering(self, calls: Sequence[Call]) -> Iterator[tuple[Call, bool]]:
        """Each call, and whether it may change something, or lets go of what was changed."""
        written: set[int] = set()
        for call in calls:
            matters = call.name in (*WRITING, *SYNCING, *NAMING, *LOCKING)
            if call.name == "openat":
                matters = "O_CREAT" in call.args
                if matters and call.result is not None:
                    written.add(call.result)
                matters = matters and not self._was_there(call.paths[0])
            elif call.name == "close":
                descriptor, _ = call.descriptor
                matters = descriptor in written
                written.discard(descriptor)
            yield call, matters and call.result != -1 and self._inside(call)

    def _was_there(self, path: str) -> bool:
        """Whether opening it makes no new file."""
        return (self._scene.origin / os.path.relpath(path, self._root)).exists()

    def _inside(self, call: Call) -> bool:
        return any(f"{path}/".startswith(f"{self._root}/") for path in call.paths)

    # -- what is done to it ----------------------------------------------------------------------

    def kill_here_and_there(self, most: int) -> int:
        """Kill it at so many of the calls that matter, spread evenly; how many there are.

        Where many tasks work at once no two runs make the same calls in the same order.
        """
        aims = [step.target for step in self.undisturbed() if step.matters]
        for target in aims[:: -(-len(aims) // most)]:
            self._kill(target)
        return len(aims)

    def kill_everywhere(self) -> int:
        """Kill it at every call that matters; how many there are."""
        first, second = self.undisturbed(), self.undisturbed()
        common = {step.point for step in first} & {step.point for step in second}
        aims = {
            step.point: self._aims(first, number)
            for number, step in enumerate(first)
            if step.matters and step.point in common
        }
        hit: set[Point] = set()
        for number in range(ROUNDS):
            missing = [point for point in aims if point not in hit]
            tried: set[Target] = set()
            for point in missing:
                aim = aims[point][number % len(aims[point])]
                if point not in hit and aim.target not in tried:
                    tried.add(aim.target)
                    struck = self._kill(aim.target)
                    beside = {p for p in aims if any(step.point == struck for step in aims[p])}
                    hit |= beside if number else beside & {struck}
        missed = aims.keys() - hit
        for _ in range(3 if missed else 0):  # what is not met in the same way each time is no point
            steady = {(step.point, step.target) for step in self.undisturbed()}
            missed = {point for point in missed if (point, aims[point][0].target) in steady}
        assert not missed, f"{len(missed)} of {len(aims)} calls were never the last: {missed}"
        return len(aims)

    def _aims(self, steps: Sequence[Step], number: int) -> list[Step]:
        """The call, and its neighbours before which the files look just the same.

        Another thread may always be there first with a call of the same name and file.
        """
        found = [steps[number]]
        for earlier in reversed(steps[:number]):
            if earlier.changes:
                break
            found.append(earlier)
        for before, later in pairwise(steps[number:]):
            if before.changes:
                break
            found.append(later)
        return found

    def _kill(self, target: Target) -> Point | None:
        status, calls = self.run(*target.options("signal=KILL"))
        killed = status == signal.SIGKILL
        assert killed or status in (0, FAILED << 8), f"{target}: it ended with {status}"
        self._tally.faults += killed
        struck = self.struck(calls, target.call)
        self.judge(struck or target)
        return struck

    def fail_everywhere(self, name: str, error: str) -> int:
        """Let each call of that name fail in a run of its own; how many did."""
        failed = 0
        targets = {
            step.target: None
            for step in self.undisturbed()
            if step.point.call == name and step.point.file != str(self._ledger)
        }
        for target in targets:
            status, calls = self.run(*target.options(f"error={error}"))
            met = any(c.name == name and c.result == -1 and self._inside(c) for c in calls)
            failed += met
            self._tally.faults += met
            assert status in (0, FAILED << 8), f"{target}: it ended with {status}"
            self.judge(f"{target} {error}")
        return failed

    def kill_while_slow(self, call: str, seconds: float) -> bool:
        """Each such call takes 300 ms; the process is killed after so many seconds, if it lives."""

        def kill() -> None:
            for child in self._forking.children():
                os.kill(child, signal.SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.start()
        status, _ = self.run("-e", f"inject={call}:delay_enter=300000")
        timer.cancel()
        timer.join()
        killed = status == signal.SIGKILL
        self._tally.faults += killed
        self.judge(f"killed {seconds:.3f} s after a slow {call} was to come: {status}")
        return killed


def kills(
    kind: str, name: str, forking: Forking, scenes: dict[str, Scene], memory: Path, tally: Tally
) -> None:
    scene = scene_of(scenes, kind, OPERATIONS[name].scene)
    strikes = Strikes(forking, kind, name, scene, memory, tally)
    if OPERATIONS[name].runtime:
        assert strikes.kill_here_and_there(most=15) > 0
    else:
        assert strikes.kill_everywhere() > 0


@pytest.mark.proof(*KILLED)
@pytest.mark.parametrize(("kind", "name"), SEEDED)
def test_killed_at_any_system_call_it_opens_with_all_that_was_acknowledged(
    kind: str,
    name: str,
    forking: Forking,
    scenes: dict[str, Scene],
    memory: Path,
    tally: Tally,
) -> None:
    kills(kind, name, forking, scenes, memory, tally)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.proof(*KILLED)
@pytest.mark.parametrize(("kind", "name"), NOT_SEEDED)
def test_killed_at_any_system_call_of_any_operation_it_opens_with_all_that_was_acknowledged(
    kind: str,
    name: str,
    forking: Forking,
    scenes: dict[str, Scene],
    memory: Path,
    tally: Tally,
) -> None:
    kills(kind, name, forking, scenes, memory, tally)


@pytest.mark.timeout(600)
@pytest.mark.proof(*FAILING)
@pytest.mark.parametrize("kind", sorted(STORES))
def test_when_a_real_system_call_fails_nothing_acknowledged_is_lost(
    kind: str,
    full: bool,
    forking: Forking,
    scenes: dict[str, Scene],
    memory: Path,
    tally: Tally,
) -> None:
    failed = 0
    for name in ("group", "flush", "quarantine", "save, nothing") if full else ("group",):
        scene = scenes[OPERATIONS[name].scene]
        for call in ERRORS if full else SEEDED_ERRORS:
            strikes = Strikes(forking, kind, name, scene, memory, tally)
            failed += strikes.fail_everywhere(call, ERRORS[call])
    assert failed > 0, "no call failed"


@pytest.mark.proof(*SLOW)
@pytest.mark.parametrize("kind", sorted(STORES))
def test_killed_while_the_disk_is_slow_it_opens_with_all_that_was_acknowledged(
    kind: str,
    full: bool,
    forking: Forking,
    scenes: dict[str, Scene],
    memory: Path,
    tally: Tally,
) -> None:
    random = Random(kind)
    strikes = Strikes(forking, kind, "flush", scenes["settled"], memory, tally)
    for call in ("fdatasync", "fsync") if full else ("fdatasync",):
        killed = 0
        for _ in range(8):
            killed += strikes.kill_while_slow(call, random.uniform(0.05, 0.8))
            if killed and not full:
                break
        assert killed > 0, f"the process ended before every kill, however slow {call} was"
