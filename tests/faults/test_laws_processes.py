"""The laws of the runtime, held by real processes under real faults, in all three stores.

``AGENT_STATE_LAWS_SEED=7`` chooses another run; one that fails names its seed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.tally import Tally
from tests.faults.unrest import SERVERS

TOP = Path(__file__).parents[2]
SEED = int(os.environ.get("AGENT_STATE_LAWS_SEED", "1"))
STRIKES, STRIKES_FULL = 3, 150
ROWS = {
    "exclusive": "laws of the runtime: one server, killed and paused, its disk filled",
    "shared": "laws of the runtime: four servers on one directory, killed and paused, disk filled",
    "redis": "laws of the runtime: three servers on one Redis, killed and paused, Redis too",
}

logger = logging.getLogger(__name__)
"""What was done: `-o log_cli=true --log-cli-level=INFO` shows it."""


def own_mounts() -> list[str]:
    """What a command is begun with to have mounts of its own; nothing where that cannot be."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    command = [unshare, "-rm"]
    possible = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if possible.returncode == 0 else []


def unrest(kind: str, folder: Path, seed: int, strikes: int) -> dict[str, Any]:
    """One run of the director; what came of it."""
    mounts = own_mounts() if kind != "redis" else []
    orders = {
        "kind": kind,
        "folder": str(folder),
        "seed": seed,
        "strikes": strikes,
        "mounts": bool(mounts),
    }
    command = [*mounts, sys.executable, "-m", "tests.faults.unrest", json.dumps(orders)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=TOP)
    assert done.returncode == 0, f"the director of seed {seed} died"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.proof(f"T24{kind[0]}", ROWS[kind])) for kind in SERVERS],
)
@pytest.mark.timeout(1800)
def test_the_laws_hold_whatever_befalls_real_processes(
    kind: str, tmp_path: Path, tally: Tally, full: bool
) -> None:
    """Killed, stopped past their lease, without disk or Redis: nothing is lost, twice or stuck."""
    found = unrest(kind, tmp_path, SEED, STRIKES_FULL if full else STRIKES)
    tally.add(Tally(**found["tally"]))
    logger.info("%s: %s", kind, found)
    assert found["violations"] == [], f"seed {SEED}, {tmp_path}: {found}"
    assert tally.clean()
    assert tally.acknowledged > 50
    assert found["statuses"].get("completed", 0) > sum(found["statuses"].values()) / 2
