"""One operation, attempted while something goes wrong, and the judgement afterwards."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Append, Put
from agent_state.testing import Crash, Fault, FaultyDisk
from tests.faults.keyrings import FOLDER, make_keyring
from tests.faults.ledger import (
    ALL_STORES,
    STORES,
    Held,
    Ledger,
    encrypted,
    is_encrypted,
    leftovers,
    look,
    make_store,
)
from tests.faults.operations import OPERATIONS, make_runtime, perform
from tests.faults.tally import Tally

_DIED = 9
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "pytest", "tests.faults.attempts"])
SAMPLE = {
    *("save, nothing", "group, journal", "group, intent", "append", "erase", "many at once"),
    *("quarantine", "cleanup", "runtime: a task"),
}
"""What encrypted stores do without ``--full``."""
SECONDS = 5.0
"""After which an operation that goes on and on for want of a disk is given up."""


@dataclass(frozen=True)
class Scene:
    """A prepared directory (which may be missing), and what must be found in it."""

    origin: Path
    before: Held

    def copy_to(self, root: Path) -> None:
        if self.origin.exists():
            shutil.copytree(self.origin, root)


async def make_scene(origin: Path, spare: Path, kind: str = "exclusive") -> Scene:
    """``spare`` is where a copy is opened to see what is in it."""
    if origin.exists():
        shutil.copytree(origin, spare)
    store = make_store(kind, spare)
    await store.open()
    before = await look(store)
    await store.close()
    shutil.rmtree(spare)
    return Scene(origin, before)


def attempt(
    kind: str, name: str, root: Path, ledger: Path, *, later: Callable[[], object] | None = None
) -> BaseException | None:
    """Do the operation with a store of that kind; what came of it. Its commits go to the ledger.

    ``later`` is called in the middle, before a runtime has tried again what failed.
    """

    async def main() -> BaseException | None:
        if later is not None:
            asyncio.get_running_loop().call_later(0.05, later)
        store = make_store(kind, root)
        store.ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            async with asyncio.timeout(SECONDS):
                await perform(name, store)
        except (AgentStateError, Crash, TimeoutError) as error:
            return error
        finally:
            os.close(store.ledger)
            store.ledger = -1
        return None

    return asyncio.run(main())


def attempt_with(
    kind: str,
    name: str,
    root: Path,
    ledger: Path,
    *faults: Fault,
    at_crash: Callable[[], object] | None = None,
    heals: bool = False,
) -> tuple[BaseException | None, FaultyDisk]:
    """``attempt`` on a disk with these faults, which end in the middle if the disk ``heals``."""
    with FaultyDisk(*faults, at_crash=at_crash) as disk:
        wrong = attempt(kind, name, root, ledger, later=disk.heal if heals else None)
    return wrong, disk


def attempt_and_die(
    kind: str,
    name: str,
    root: Path,
    ledger: Path,
    fault: Fault,
    last: Callable[[], object] | None = None,
) -> bool:
    """``attempt`` in a process of its own, which ends at the fault; whether it came to that.

    ``last`` is what it does then, in place of the call.
    """
    process = PROCESSES.Process(
        target=_until, args=(os.environ[FOLDER], kind, name, root, ledger, fault, last)
    )
    process.start()
    process.join(60)
    assert process.exitcode in (0, _DIED), f"{kind}: {name}: {fault}: {process.exitcode}"
    died = process.exitcode == _DIED
    process.close()
    return died


def _until(
    keys: str,
    kind: str,
    name: str,
    root: Path,
    ledger: Path,
    fault: Fault,
    last: Callable[[], object] | None,
) -> None:
    def die() -> None:
        if last is not None:
            last()
        os._exit(_DIED)

    os.environ[FOLDER] = keys
    attempt_with(kind, name, root, ledger, fault, at_crash=die)
    os._exit(0)


async def reopen(kind: str, root: Path) -> Held:
    """Open without help; what is there. It works again: one more change goes through."""
    store = make_store(kind, root)
    await store.open()
    try:
        found = await look(store)
        await store.commit(
            [
                Put("notes", ("after",), b'{"n":0}', "notes/1"),
                Append("notes", ("after",), b'{"n":0}'),
            ]
        )
    finally:
        await store.close()
    return found


def judge(
    kind: str, name: str, root: Path, ledger: Path, scene: Scene, tally: Tally, about: object
) -> Held:
    """Open again, in this process and without help, and hold what is there against the ledger."""
    found = asyncio.run(reopen(kind, root))
    Ledger(ledger).judge(scene.before, found, tally, f"{kind}: {name}: {about}")
    left = leftovers(root)
    tally.leaked += len(left)
    assert left == [], f"{kind}: {name}: {about}: left behind"
    return found


async def finish(kind: str, root: Path) -> list[dict[str, Any]]:
    """Start a runtime on what was left, let it finish, and give all tasks of alice and bob."""
    async with asyncio.timeout(10 * SECONDS):
        store = make_store(kind, root)
        async with make_runtime(store) as runtime:
            for agent_id in runtime.agents.list():
                await runtime.agents.start(agent_id)
            await runtime.wait_idle()
        keyring = make_keyring() if is_encrypted(kind) else None
        async with StatePersistenceManager(root, encryption=keyring) as manager:
            return [loaded.state.model_dump() async for loaded in manager.scan("tasks")]


def cases(*, runtime: bool | None = None) -> list[tuple[str, str]]:
    """Every operation (all, or those of a runtime, or all others) with each kind of store."""
    return [
        (kind, name)
        for name, doing in OPERATIONS.items()
        if runtime is None or doing.runtime == runtime
        for kind in STORES
    ]


def cases_with_encryption(*, runtime: bool | None = None) -> list[Any]:
    """``cases``, and with encrypted stores: all with ``--full``, else a sample."""
    found: list[Any] = [*cases(runtime=runtime)]
    for kind, name in cases(runtime=runtime):
        marks = [] if name in SAMPLE else [pytest.mark.full]
        found.append(pytest.param(encrypted(kind), name, marks=marks))
    return found


def stores(*, sample: bool = True) -> list[Any]:
    """Each kind of store; the encrypted ones only with ``--full`` if they are not in the sample."""
    return [
        pytest.param(kind, marks=[pytest.mark.full] if is_encrypted(kind) and not sample else [])
        for kind in ALL_STORES
    ]


def scene_of(scenes: Mapping[str, Scene], kind: str, name: str) -> Scene:
    """The scene of this name for such a store."""
    return scenes[scene_name(kind, name)]


def scene_name(kind: str, name: str) -> str:
    return encrypted(name) if is_encrypted(kind) else name


def alike(kind: str) -> list[str]:
    """The stores that can open what such a store has left, sorted."""
    return sorted(one for one in ALL_STORES if is_encrypted(one) == is_encrypted(kind))
