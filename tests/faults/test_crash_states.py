"""A power cut at any moment: real traces, and every state that a file system may make of them.

Each state is put on a disk for real and opened, by either store in turn: what was acknowledged
before the cut is there, commits are whole, and nothing needs help.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from agent_state.encryption import Keyring
from agent_state.manager import StatePersistenceManager
from tests.faults.attempts import Scene, alike, cases_with_encryption, make_scene, scene_of, stores
from tests.faults.crash_states import crash_states
from tests.faults.keyrings import make_keyring
from tests.faults.ledger import encrypted, is_encrypted
from tests.faults.operations import OPERATIONS
from tests.faults.power_cuts import Run, judge_all, record
from tests.faults.tally import Tally
from tests.faults.tracing import THEN, Forking, memory_folder, needs_strace

pytestmark = [needs_strace, pytest.mark.long("opens hundreds of states of a disk")]

ROW = ("T3", "a power cut at any moment of two operations, every state that may be left")
SINGLE = ("T3b", "the same of every single operation, the runtime's and recovery too")

SHAPES = (
    *("save", "save anew", "delete", "delete and make anew"),
    *("group", "append", "quarantine", "flush"),
)
SEEDED = {
    "shared": ("save then group", "append then delete"),
    "exclusive": ("group then flush", "delete and make anew then append"),
}
PER_PAIR, PER_OPERATION, SEEDED_STATES = 500, 40, 250


async def prepare_small(root: Path, keyring: Keyring | None) -> None:
    async with StatePersistenceManager(root, encryption=keyring) as manager:
        await manager.save("agents", "alice", {"agent_id": "alice"})
        await manager.save("notes", "first", {"n": 1})
        await manager.save("notes", "second", {"n": 2})
        await manager.append("notes", "alice", {"n": 0}, dedupe_key="d0")


@pytest.fixture(scope="module")
def forking() -> Iterator[Forking]:
    with Forking() as process:
        yield process


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def small(memory: Path, _keyring: None) -> dict[str, Scene]:
    async def prepare() -> dict[str, Scene]:
        made = {}
        for name, kind in (("small", "exclusive"), (encrypted("small"), encrypted("exclusive"))):
            await prepare_small(memory / name, make_keyring() if is_encrypted(kind) else None)
            made[name] = await make_scene(memory / name, memory / "spare", kind)
        return made

    return asyncio.run(prepare())


def prove(
    forking: Forking, kind: str, name: str, scene: Scene, memory: Path, limit: int, tally: Tally
) -> None:
    recorder = record(forking, scene, memory, Run(kind, name))
    states = crash_states(recorder, limit, Random(f"{kind} {name}"))
    judge_all(states, scene.before, memory, tally, f"{kind}: {name}", alike(kind))


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", stores())
def test_after_a_power_cut_every_acknowledged_change_is_there(
    kind: str, forking: Forking, small: dict[str, Scene], memory: Path, tally: Tally
) -> None:
    for name in SEEDED[kind.partition(",")[0]]:
        scene = scene_of(small, kind, "small")
        prove(forking, kind, name, scene, memory, SEEDED_STATES, tally)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("first", SHAPES)
@pytest.mark.parametrize("kind", stores())
def test_after_a_power_cut_in_any_two_operations_every_acknowledged_change_is_there(
    kind: str, first: str, forking: Forking, small: dict[str, Scene], memory: Path, tally: Tally
) -> None:
    scene = scene_of(small, kind, "small")
    for second in SHAPES:
        prove(forking, kind, f"{first}{THEN}{second}", scene, memory, PER_PAIR, tally)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.proof(*SINGLE)
@pytest.mark.parametrize(("kind", "name"), cases_with_encryption())
def test_after_a_power_cut_in_any_operation_every_acknowledged_change_is_there(
    kind: str,
    name: str,
    scenes: dict[str, Scene],
    forking: Forking,
    memory: Path,
    tally: Tally,
) -> None:
    scene = scene_of(scenes, kind, OPERATIONS[name].scene)
    prove(forking, kind, name, scene, memory, PER_OPERATION, tally)
