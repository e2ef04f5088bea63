"""Recovery that is itself interrupted, again and again, and what comes of it in the end.

The same as if nothing had interrupted it, to the byte; and doing it once more changes nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest

from agent_state.storage.directory import JOURNAL
from agent_state.testing import Fault
from agent_state.testing.faults import CHANGING, Action
from tests.faults.attempts import Scene, attempt, attempt_with, reopen
from tests.faults.crash_states import crash_states
from tests.faults.ledger import STORES, Held, leftovers
from tests.faults.power_cuts import Run, judge_all, record
from tests.faults.tally import Tally
from tests.faults.tracing import Forking, memory_folder, needs_strace

ROW = ("T20", "recovery interrupted at each call, up to three times in a row")
KILLED_THEN_CUT = ("T20b", "killed, recovered by the next process, and then a power cut")
RECOVERY = "open and close"
ACTIONS: tuple[Action, ...] = ("crash before", "crash after", "crash torn")
KINDS = sorted(STORES)
BROKEN = ("journal", "intent")
"""Scenes that there is something to recover in."""

# What is killed, and at which calls a run without --full kills it.
KILLS: dict[tuple[str, str], list[tuple[str, int]]] = {
    ("exclusive", "group"): [("fdatasync", 1), ("rename", 3)],
    ("exclusive", "flush"): [("fsync", 9)],
    ("exclusive", "delete and make anew"): [("rename", 1)],
    ("shared", "group"): [("fsync", 10), ("rename", 4)],  # 10: of the intent's folder
    ("shared", "append"): [("fdatasync", 1)],
}
ANYWHERE = [
    *(("fsync", when) for when in range(8, 16)),
    *(("fdatasync", when) for when in (1, 2, 3)),
    *(("rename", when) for when in (1, 2, 3, 4)),
    *(("unlink", when) for when in (1, 2)),
]


@pytest.fixture(scope="module")
def forking() -> Iterator[Forking]:
    with Forking() as process:
        yield process


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def contents(root: Path) -> dict[str, bytes]:
    """Every document and log, to the byte."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.relative_to(root).parts[0].startswith(".")
    }


def recover(kind: str, root: Path) -> None:
    for path in leftovers(root):
        os.utime(path, (0, 0))  # the shared store spares those that may be a live writer's
    wrong = attempt(kind, RECOVERY, root, root.parent / "ledger")
    assert wrong is None, wrong


class Interrupted:
    """Recovers a scene with interruptions, and compares with what it should have become."""

    def __init__(self, scene: Scene, folder: Path, tally: Tally) -> None:
        self._scene, self._tally = scene, tally
        self._root, self._ledger = folder / "state", folder / "ledger"
        scene.copy_to(self._root)
        recover("exclusive", self._root)
        self._due = contents(self._root)
        shutil.rmtree(self._root)

    def attempt(self, faults: Sequence[tuple[str, Fault]], last: str) -> bool:
        """Whether the first of the faults happened."""
        self._scene.copy_to(self._root)
        happened = []
        for kind, fault in faults:
            _, disk = attempt_with(kind, RECOVERY, self._root, self._ledger, fault)
            happened.append(disk.fired)
        recover(last, self._root)
        self._tally.points += 1
        self._tally.faults += sum(happened)
        found = contents(self._root)
        wrong = {path for path in {*found, *self._due} if found.get(path) != self._due.get(path)}
        self._tally.lost += len(wrong)
        assert not wrong, f"{faults}, then {last}: {wrong}"
        left = leftovers(self._root)
        self._tally.leaked += len(left)
        assert not left, f"{faults}, then {last}"
        shutil.rmtree(self._root)
        return happened[0]


@pytest.mark.timeout(600)
@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_recovery_that_is_interrupted_three_times_ends_as_if_nothing_had_been(
    name: str,
    kind: str,
    scenes: dict[str, Scene],
    memory: Path,
    tally: Tally,
    full: bool,
) -> None:
    random = Random(f"{name} {kind}")
    interrupted = Interrupted(scenes[name], memory, tally)
    number = 1
    again = True
    while again:
        for action in ACTIONS if full else ACTIONS[:1]:
            for times in (1, 3) if full else (3,):
                faults = [(kind, Fault(number, CHANGING, action))]
                for _ in range(times - 1):
                    later = Fault(random.randint(1, 60), CHANGING, random.choice(ACTIONS))
                    faults.append((random.choice(KINDS), later))
                again = interrupted.attempt(faults, random.choice(KINDS))
        number += 1 if full else 4


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("name", BROKEN)
def test_recovering_once_more_changes_no_byte(
    name: str, scenes: dict[str, Scene], memory: Path, tally: Tally
) -> None:
    for first in KINDS:
        for second in KINDS:
            root = memory / "state"
            scenes[name].copy_to(root)
            journal = {path.name: path.read_bytes() for path in (root / JOURNAL).glob("[!.]*")}
            assert journal
            recover(first, root)
            due = contents(root)
            recover(second, root)
            assert contents(root) == due
            for journal_name, data in journal.items():  # as if it had never been removed
                (root / JOURNAL / journal_name).write_bytes(data)
            recover(second, root)
            tally.points += 2
            assert contents(root) == due
            shutil.rmtree(root)


@pytest.mark.long("recovers from hundreds of states of a disk")
@needs_strace
@pytest.mark.timeout(600)
@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_power_cut_in_a_recovery_and_interruptions_after_it_lose_nothing(
    name: str,
    kind: str,
    scenes: dict[str, Scene],
    forking: Forking,
    memory: Path,
    tally: Tally,
    full: bool,
) -> None:
    scene, random = scenes[name], Random(f"{name} {kind}")
    recorder = record(forking, scene, memory, Run(kind, f"{RECOVERY}, {name}"))
    for state in crash_states(recorder, 300 if full else 12, random):
        folder = memory / "found"
        folder.mkdir()
        state.put_into(folder)
        root = folder / "state"
        for _ in range(random.randint(1, 3)):
            fault = Fault(random.randint(1, 60), CHANGING, random.choice(ACTIONS))
            _, disk = attempt_with(random.choice(KINDS), RECOVERY, root, memory / "ledger", fault)
            tally.faults += disk.fired
        for path in leftovers(root):
            os.utime(path, (0, 0))
        found: Held = asyncio.run(reopen(random.choice(KINDS), root))
        tally.points += 1
        right = scene.before.covers(found)
        tally.lost += not right
        assert right, f"{state.about}\n{scene.before.difference(found)}"
        shutil.rmtree(folder)


@pytest.mark.long("traces the system calls of several processes")
@needs_strace
@pytest.mark.timeout(600)
@pytest.mark.proof(*KILLED_THEN_CUT)
@pytest.mark.parametrize("next_kind", KINDS)
@pytest.mark.parametrize(("kind", "name"), KILLS)
def test_what_a_killed_process_had_not_synced_its_successor_does(
    kind: str,
    name: str,
    next_kind: str,
    scenes: dict[str, Scene],
    forking: Forking,
    memory: Path,
    tally: Tally,
    full: bool,
) -> None:
    random = Random(f"{kind} {name} {next_kind}")
    for killed_at in ANYWHERE if full else KILLS[kind, name]:
        runs = (Run(kind, name, killed_at), Run(next_kind, RECOVERY))
        recorder = record(forking, scenes["settled"], memory, *runs)
        states = crash_states(recorder, 25 if full else 40, random)
        what = f"{runs[0]}, then {runs[1]}"
        judge_all(states, scenes["settled"].before, memory, tally, what)
