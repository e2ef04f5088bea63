"""Every system call of every operation fails, tears, or is the last one of the process.

After each: old or new and never a mixture, what was acknowledged is there, what was refused is
not, groups are whole, nothing is left lying about, and the directory opens without help.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_state.testing import Fault
from agent_state.testing.faults import CALLS, CHANGING
from tests.faults.attempts import (
    Scene,
    attempt_and_die,
    attempt_with,
    cases_with_encryption,
    finish,
    judge,
    scene_of,
)
from tests.faults.ledger import leftovers
from tests.faults.operations import OPERATIONS
from tests.faults.tally import Tally

ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EROFS)
LOOKING = frozenset(CALLS) - CHANGING - {"close"}
FINISHED = {"completed", "cancelled"}

FAULTS: dict[str, Fault] = {
    **{
        f"{errno.errorcode[number]} {'for good' if persistent else 'once'}": Fault(
            1, CHANGING, error=number, persistent=persistent
        )
        for number in ERRORS
        for persistent in (False, True)
    },
    "EIO on looking": Fault(1, LOOKING),
    "short write": Fault(1, "write", "short"),
    "crash before": Fault(1, CHANGING, "crash before"),
    "crash after": Fault(1, CHANGING, "crash after"),
    "crash torn": Fault(1, "write", "crash torn"),
}
SEEDED = (
    *("EIO once", "ENOSPC for good", "EACCES for good", "EIO on looking"),
    *("crash before", "crash torn"),
)
"""What a run without ``--full`` does, at every 15th call; with it, these come at every third."""


@contextmanager
def closing_what_it_opens(tally: Tally) -> Iterator[None]:
    """A watcher closes its descriptors in a thread of its own, a moment later."""
    before = _descriptors()
    yield
    deadline = time.monotonic() + 5.0
    while (leaked := _descriptors() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    tally.leaked += len(leaked)
    assert not leaked, "descriptors were left open"


def _descriptors() -> set[str]:
    folder = Path("/proc/self/fd")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.mark.timeout(900)
@pytest.mark.proof("T1", "calls of every operation fail, tear or are the last, in process")
@pytest.mark.parametrize(("kind", "name"), cases_with_encryption(runtime=False))
def test_any_call_may_fail_or_be_the_last(
    kind: str, name: str, scenes: dict[str, Scene], tmp_path: Path, tally: Tally, full: bool
) -> None:
    case = Case(kind, name, scene_of(scenes, kind, OPERATIONS[name].scene), tmp_path, tally)
    for title, fault in FAULTS.items():
        if full or title in SEEDED:
            with closing_what_it_opens(tally):
                case.every_call(fault, step=(3 if title in SEEDED else 20) if full else 15)


@pytest.mark.long("starts a runtime for each of hundreds of faults")
@pytest.mark.timeout(900)
@pytest.mark.proof("T1r", "a running server: any call fails once, or for a while")
@pytest.mark.parametrize(("kind", "name"), cases_with_encryption(runtime=True))
def test_a_runtime_goes_on_when_the_disk_does(
    kind: str, name: str, scenes: dict[str, Scene], tmp_path: Path, tally: Tally, full: bool
) -> None:
    case = Case(kind, name, scene_of(scenes, kind, OPERATIONS[name].scene), tmp_path, tally)
    with closing_what_it_opens(tally):
        case.every_call(FAULTS["EIO once"], step=5 if full else 35)
        case.every_call(FAULTS["ENOSPC for good"], step=8 if full else 50, heals=True)


@pytest.mark.long("starts two processes for each of hundreds of faults")
@pytest.mark.timeout(900)
@pytest.mark.proof("T1k", "a running server dies at any call, and another one goes on")
@pytest.mark.parametrize(("kind", "name"), cases_with_encryption(runtime=True))
def test_a_server_may_die_at_any_call(
    kind: str, name: str, scenes: dict[str, Scene], tmp_path: Path, tally: Tally, full: bool
) -> None:
    case = Case(kind, name, scene_of(scenes, kind, OPERATIONS[name].scene), tmp_path, tally)
    for title in ("crash before", "crash torn"):
        number, step = 1, 5 if full else 50
        while case.die(FAULTS[title], number):
            number += step


@dataclass
class Case:
    """One operation with one kind of store, attempted again and again."""

    kind: str
    name: str
    scene: Scene
    folder: Path
    tally: Tally

    def every_call(self, fault: Fault, *, step: int, heals: bool = False) -> None:
        """The fault at the first call, the second, … until none is left for it to meet."""
        number = 1
        while self._attempt(at(fault, number), heals=heals):
            number += step

    def _attempt(self, fault: Fault, *, heals: bool) -> bool:
        """Whether the fault was met."""
        with self._fresh() as (root, ledger):
            wrong, disk = attempt_with(self.kind, self.name, root, ledger, fault, heals=heals)
            self.tally.points += 1
            self.tally.faults += disk.fired
            about = f"{fault.action} at call {fault.at}, {errno.errorcode[fault.error]}: {wrong!r}"
            assert not isinstance(wrong, TimeoutError), about
            for path in leftovers(root):
                os.utime(path, (0, 0))  # the shared store spares those that may be a live writer's
            judge(self.kind, self.name, root, ledger, self.scene, self.tally, about)
            return disk.fired

    def die(self, fault: Fault, number: int) -> bool:
        """Whether the server died before it was done."""
        with self._fresh() as (root, ledger):
            died = attempt_and_die(self.kind, self.name, root, ledger, at(fault, number))
            self.tally.points += 1
            self.tally.faults += died
            about = f"{fault.action} at call {number}"
            judge(self.kind, self.name, root, ledger, self.scene, self.tally, about)
            tasks = asyncio.run(finish(self.kind, root))
            open_ones = [task for task in tasks if task["status"] not in FINISHED]
            assert open_ones == [], f"{about}: not finished by the next server"
            for task in tasks:
                if task["status"] == "completed" and task.get("steps"):
                    assert task["result"] == 42, f"{about}: {task}"
            return died

    @contextmanager
    def _fresh(self) -> Iterator[tuple[Path, Path]]:
        """A copy of the scene, and a ledger."""
        root, ledger = self.folder / "state", self.folder / "ledger"
        self.scene.copy_to(root)
        yield root, ledger
        shutil.rmtree(root, ignore_errors=True)
        ledger.unlink(missing_ok=True)


def at(fault: Fault, number: int) -> Fault:
    return dataclasses.replace(fault, at=number)
