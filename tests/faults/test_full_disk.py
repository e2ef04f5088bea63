"""Disks that are really full: no bytes, no inodes, read-only, limits of the process.

In each the error is typed and says what could not be done, the old document is there, reading
goes on, and when there is room again everything works without opening anything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from agent_state.errors import StorageError
from agent_state.protocols import Append, Delete, Put
from agent_state.testing import Fault, FaultyDisk
from tests.faults.attempts import stores
from tests.faults.filling import LIMITS, OLD, Ballast, read_all, refused, use
from tests.faults.ledger import Held, Ledger, make_store
from tests.faults.mounting import Volume, run, seen, volume
from tests.faults.tally import Tally

ROW = ("T10", "full disks: no bytes, no inodes, read-only, limits of the process")
TOP = Path(__file__).parents[2]


def own_mounts() -> list[str]:
    """What a command is begun with to have mounts of its own, without being root."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare (util-linux)")
    command = [unshare, "-rm"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to user namespaces (unshare -rm)")
    return command


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", stores())
@pytest.mark.parametrize("limit", LIMITS)
def test_a_process_that_may_write_no_more_says_so_and_goes_on_later(
    limit: str, kind: str, tmp_path: Path, tally: Tally
) -> None:
    namespace = own_mounts() if limit == "tmpfs" else []
    command = [*namespace, sys.executable, "-m", "tests.faults.filling", limit, kind, str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP)

    assert done.returncode == 0, done.stderr
    tally.add(Tally(**json.loads(done.stdout)))


@pytest.mark.proof(*ROW)
@pytest.mark.full
@pytest.mark.parametrize("kind", stores())
def test_a_full_ext4_refuses_and_goes_on_when_there_is_room(
    kind: str, tmp_path: Path, tally: Tally
) -> None:
    with volume(tmp_path, "ext4", megabytes=8) as disk:
        ballast = Ballast(disk.root / "ballast")
        numbers = {errno.ENOSPC}
        root = disk.root / "state"
        tally.add(asyncio.run(use(kind, root, ballast.fill, ballast.free, numbers=numbers)))


@pytest.mark.proof(*ROW)
@pytest.mark.full
@pytest.mark.parametrize("kind", stores())
def test_without_inodes_what_needs_one_is_refused(kind: str, tmp_path: Path, tally: Tally) -> None:
    with volume(tmp_path, "ext4", make=("-N", "128")) as disk:
        folder = disk.root / "ballast"

        def fill() -> None:
            folder.mkdir()
            with contextlib.suppress(OSError):
                for number in range(1000):
                    (folder / str(number)).touch()

        numbers = {errno.ENOSPC}
        tally.add(
            asyncio.run(
                use(
                    kind,
                    disk.root / "state",
                    fill,
                    partial(shutil.rmtree, folder),
                    numbers=numbers,
                    but="a large record" if kind.startswith("shared") else None,
                )
            )
        )


@pytest.mark.proof(*ROW)
@pytest.mark.full
@pytest.mark.parametrize("kind", stores())
def test_a_disk_that_turns_read_only_refuses_and_is_read(
    kind: str, tmp_path: Path, tally: Tally
) -> None:
    with volume(tmp_path, "ext4") as disk:
        asyncio.run(until_read_only(kind, disk, tmp_path / "ledger", tally))
        disk.restart()
        found = asyncio.run(seen(kind, disk.root / "state"))
        Ledger(tmp_path / "ledger").judge(Held(), found, tally, "turned read-only")


async def until_read_only(kind: str, disk: Volume, ledger: Path, tally: Tally) -> None:
    store = make_store(kind, disk.root / "state")
    with ledger.open("ab", buffering=0) as file:
        store.ledger = file.fileno()
        await store.open()
        for name in ("old", "gone"):
            await store.commit([Put("notes", (name,), OLD, "notes/1")])
        await store.commit([Append("notes", ("log",), OLD)])
        await store.flush()
        run("mount", "-o", "remount,abort", disk.root)  # as ext4 does after an error of the disk
        await refused(store, {errno.EROFS, errno.EIO, errno.ESHUTDOWN}, tally)
        with pytest.raises(StorageError):
            await store.commit([Delete("notes", ("gone",))])
        await read_all(store)
        assert store.incidents() == []
        with contextlib.suppress(StorageError):
            await store.close()
        store.ledger = -1


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", stores())
async def test_a_full_disk_keeps_nobody_from_opening_reading_and_deleting(
    kind: str, tmp_path: Path, tally: Tally
) -> None:
    """The shared store is the way out: a file goes without any room."""
    way_out = kind.replace("exclusive", "shared")
    first = make_store(kind, tmp_path / "state")
    await first.open()
    await first.commit([Put("notes", (name,), OLD, "notes/1") for name in ("old", "gone")])
    await first.close()
    with FaultyDisk(Fault(1, "write", error=errno.ENOSPC, persistent=True)) as disk:
        store = make_store(way_out, tmp_path / "state")
        await store.open()
        await store.commit([Delete("notes", ("gone",))])
        found = [one.key async for one in store.scan("notes")]
        await store.close()
    tally.add(Tally(points=1, faults=disk.fired, acknowledged=3))
    assert disk.fired
    assert found == [("old",)]
