"""The power is really cut: ext4 and xfs are shut down in the middle, and recover when mounted.

At a chosen system call the file system goes down instead of that call, and the process makes no
further one. What the callers were told is in ledgers on another file system.
"""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from pathlib import Path

import pytest

from agent_state.testing import Fault
from agent_state.testing.faults import CHANGING
from tests.faults.attempts import (
    Scene,
    attempt_and_die,
    attempt_with,
    cases_with_encryption,
    judge,
    scene_of,
)
from tests.faults.ledger import ALL_STORES
from tests.faults.mounting import FILE_SYSTEMS, KEEP_LOG, LOSE_LOG, Volume, seen, volume
from tests.faults.operations import OPERATIONS
from tests.faults.tally import Tally

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
ROW = ("T6", "the power is cut under ext4 and xfs, at every sixth system call")


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("system", FILE_SYSTEMS)
@pytest.mark.parametrize(("kind", "name"), cases_with_encryption())
def test_a_power_cut_at_any_call_loses_nothing_acknowledged(
    system: str, kind: str, name: str, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    scene, ledger, told = (
        scene_of(scenes, kind, OPERATIONS[name].scene),
        tmp_path / "ledger",
        tmp_path / "told",
    )
    with volume(tmp_path, system) as disk:
        number, fired = first(system, name), True
        while fired:
            root = disk.root / str(number)
            scene.copy_to(root)
            disk.sync()
            how = LOSE_LOG if number // 4 % 2 else KEEP_LOG
            fault = Fault(number, CHANGING, "crash before")
            cut = partial(end, disk, how, ledger, told)
            if OPERATIONS[name].runtime:  # whose tasks would wait for a call that never ends
                fired = attempt_and_die(kind, name, root, ledger, fault, cut)
            else:
                fired = attempt_with(kind, name, root, ledger, fault, at_crash=cut)[1].fired
            if not fired:  # all is done, and nothing after it has synced anything
                how = LOSE_LOG
                end(disk, how, ledger, told)
            disk.restart()
            about = f"{system}, cut {how} at {number}"
            judge(kind, name, root, told, scene, tally, about)
            shutil.rmtree(root, ignore_errors=True)
            ledger.unlink(missing_ok=True)
            tally.points += 1
            tally.faults += 1
            number += 20 if OPERATIONS[name].runtime else 6


def end(disk: Volume, how: int, ledger: Path, told: Path) -> None:
    """The end of the process and of the power; ``told`` is what its callers knew by then.

    Another thread may be in a call: on xfs a folder's fsync says yes when all is over.
    """
    told.write_bytes(ledger.read_bytes() if ledger.exists() else b"")
    disk.cut(how)


def first(system: str, name: str) -> int:
    """Where to begin: on xfs other calls are cut than on ext4, and with each operation others."""
    return 1 + (2 * list(FILE_SYSTEMS).index(system) + len(name)) % 4


@pytest.mark.proof("T6", "killed, recovered by the next process, and then the power is cut")
@pytest.mark.parametrize("system", FILE_SYSTEMS)
@pytest.mark.parametrize("kind", ALL_STORES)
@pytest.mark.parametrize("name", ["save", "save anew", "group", "append", "delete and make anew"])
def test_what_a_recovery_brought_back_survives_a_power_cut(
    system: str, kind: str, name: str, scenes: dict[str, Scene], tmp_path: Path, tally: Tally
) -> None:
    scene, ledger = scene_of(scenes, kind, OPERATIONS[name].scene), tmp_path / "ledger"
    with volume(tmp_path, system) as disk:
        number, fired = first(system, name), True
        while fired:
            root = disk.root / str(number)
            scene.copy_to(root)
            disk.sync()
            fault = Fault(number, CHANGING, "crash before")
            wrong, calls = attempt_with(kind, name, root, ledger, fault)
            fired = calls.fired
            asyncio.run(seen(kind, root))
            how = LOSE_LOG if number // 4 % 2 else KEEP_LOG
            disk.cut(how)
            disk.restart()
            about = f"{system}, killed at {number}, recovered, and cut {how}: {wrong!r}"
            judge(kind, name, root, ledger, scene, tally, about)
            shutil.rmtree(root, ignore_errors=True)
            ledger.unlink(missing_ok=True)
            tally.points += 1
            tally.faults += 1
            number += 4
