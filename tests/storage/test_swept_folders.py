"""``git clean -fdX`` and ``rm -rf`` take the folders of a running owner, or the whole directory."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_state import FileStateStore, StateDirectoryInUseError, WALStateStore
from agent_state.protocols import Append, Put
from agent_state.storage import ReadOnlyStateStore
from tests.cli.commands import owned_by_another_process
from tests.deadlines import until

Sweep = Callable[[Path], None]
AnyStore = FileStateStore | WALStateStore


def git_clean(root: Path) -> None:
    run = ["git", "-C", str(root.parent)]
    subprocess.run([*run, "init", "-q"], check=True)
    subprocess.run([*run, "clean", "-fdXq"], check=True)


def remove(*names: str) -> Sweep:
    def sweep(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name, ignore_errors=True)

    return sweep


SWEEPS: dict[str, Sweep] = {
    "git clean -fdX": git_clean,
    "rm -rf .locks": remove(".locks"),
    "rm -rf .journal": remove(".journal"),
    "rm -rf .locks/writers.d": remove(".locks/writers.d"),
    "rm -rf all": remove(".locks", ".journal", ".snapshots", ".quarantine"),
}
ALL = pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
STORES = pytest.mark.parametrize("kind", [FileStateStore, WALStateStore])


def put(key: str, number: int) -> Put:
    return Put("notes", (key,), b'{"n":%d}' % number, "notes/1")


async def opened(kind: type[AnyStore], root: Path) -> AnyStore:
    store = kind(root)
    await store.open()
    return store


async def read_back(root: Path) -> dict[str, int]:
    store = ReadOnlyStateStore(root)
    await store.open()
    found = {each.key[0]: json.loads(each.body)["n"] async for each in store.scan("notes")}
    await store.close()
    return found


@ALL
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (WALStateStore, WALStateStore),
        (WALStateStore, FileStateStore),
        (FileStateStore, WALStateStore),
    ],
)
async def test_a_second_opener_finds_the_first_all_the_same(
    tmp_path: Path, sweep: Sweep, first: type[AnyStore], second: type[AnyStore]
) -> None:
    root = tmp_path / "state"
    store = await opened(first, root)
    await store.commit([put("a", 1)])
    sweep(root)

    for _ in range(3):
        with pytest.raises(StateDirectoryInUseError):
            await opened(second, root)
        await store.commit([put("a", 2)])
        sweep(root)
    await store.close()
    await (await opened(second, root)).close()


@ALL
def test_another_process_that_owns_the_directory_is_found_and_named(
    tmp_path: Path, sweep: Sweep
) -> None:
    root = tmp_path / "state"
    with owned_by_another_process(root) as pid:
        sweep(root)
        for kind in (WALStateStore, FileStateStore):
            with pytest.raises(StateDirectoryInUseError) as refused:
                asyncio.run(opened(kind, root))
            assert refused.value.pid == pid
        reader = ReadOnlyStateStore(root)
        assert reader.owner() == pid


@ALL
@STORES
async def test_what_is_acknowledged_after_a_sweep_is_durable(
    tmp_path: Path, sweep: Sweep, kind: type[AnyStore]
) -> None:
    root = tmp_path / "state"
    store = await opened(kind, root)
    for number in range(4):
        await store.commit([put("a", number)])
        sweep(root)
        await store.commit([put("b", number)])
        await store.commit([put("c", number), put("d", number)])
        await store.commit([Append("notes", ("log",), b'{"n":%d}' % number)])
        assert await read_back(root) == dict.fromkeys("abcd", number)
    await store.flush()
    await store.close()
    assert await read_back(root) == dict.fromkeys("abcd", 3)


KILLED = """
import asyncio, os, signal, sys
from agent_state import WALStateStore
from agent_state.protocols import Put

async def main(root):
    store = WALStateStore(root)
    await store.open()
    async with store._writing().lock:  # nothing reaches the files
        await store.commit([Put("notes", ("a",), b'{"n":1}', "notes/1")])
        print("saved", flush=True)
        sys.stdin.readline()
        await store.commit([Put("notes", ("b",), b'{"n":2}', "notes/1")])
        print("saved", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1]))
"""


@ALL
def test_a_kill_after_a_sweep_loses_nothing_that_was_acknowledged(
    tmp_path: Path, sweep: Sweep
) -> None:
    """Even what was in the removed segment and in no file is written again."""
    root = tmp_path / "state"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"saved\n"
        sweep(root)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"saved\n"
        process.wait(60)
    assert asyncio.run(read_back(root)) == {"a": 1, "b": 2}


@ALL
async def test_an_idle_owner_makes_its_folders_again(tmp_path: Path, sweep: Sweep) -> None:
    root = tmp_path / "state"
    store = await opened(WALStateStore, root)
    await store.commit([put("a", 1)])
    await store.flush()
    sweep(root)
    await until((root / ".locks/owner.lock").exists)
    await store.close()


@pytest.mark.parametrize("kind", [WALStateStore, FileStateStore])
async def test_a_removed_directory_is_made_again(tmp_path: Path, kind: type[AnyStore]) -> None:
    root = tmp_path / "state"
    store = await opened(kind, root)
    await store.commit([put("a", 1)])
    await store.flush()
    shutil.rmtree(root)

    await store.commit([put("b", 2)])
    await store.flush()
    assert (await read_back(root))["b"] == 2
    with pytest.raises(StateDirectoryInUseError):
        await opened(WALStateStore, root)
    await store.close()


@pytest.mark.parametrize("kind", [WALStateStore, FileStateStore])
async def test_an_owner_whose_directory_belongs_to_another_stops(
    tmp_path: Path, kind: type[AnyStore]
) -> None:
    root = tmp_path / "state"
    store = await opened(kind, root)
    await store.commit([put("a", 1)])
    await store.flush()
    root.rename(tmp_path / "moved")
    other = await opened(WALStateStore, root)
    await other.commit([put("a", 7)])

    async def refused() -> bool:
        try:
            await store.commit([put("a", 2)])
        except StateDirectoryInUseError:
            return True
        return False

    while not await refused():  # an owner looks at the path every 50 ms
        await asyncio.sleep(0.005)
    await other.flush()
    assert await read_back(root) == {"a": 7}
    if isinstance(store, WALStateStore):  # what it could not bring there is said
        with pytest.raises(StateDirectoryInUseError):
            await store.close()
    await other.close()
    await store.close()
    assert await read_back(root) == {"a": 7}


@STORES
async def test_group_locks_are_taken_again_after_a_sweep(
    tmp_path: Path, kind: type[AnyStore]
) -> None:
    root = tmp_path / "state"
    store = await opened(kind, root)
    async with store.lock("notes", ("a",)):
        await store.commit([put("a", 1)])
    remove(".locks")(root)
    async with store.lock("notes", ("a",)):
        await store.commit([put("a", 2)])
    await store.close()
    assert await read_back(root) == {"a": 2}
