"""A block device that fails below ext4: what the kernel then says is not always to be believed.

After a failed fsync ext4 may say yes to the next one, with the data dropped; and it may turn
read-only. Nothing is acknowledged that is not there when all caches are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_state.errors import AgentStateError, StorageError
from agent_state.protocols import Append, Change, Delete, Put, StateStore
from agent_state.storage import syscalls
from tests.faults.faultyblocks import FaultyVolume, faulty_volume
from tests.faults.ledger import STORES, Held, Ledger, put_aside
from tests.faults.mounting import seen
from tests.faults.tally import Tally

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
ROW = ("T11", "a block device with I/O errors below ext4 (nbdkit)")
ROUNDS = 4


class SyncsWatched:
    """Notes each descriptor that was synced again after a sync of it had failed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failed: set[int] = set()
        self.failures = 0
        self.again: list[str] = []
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(syscalls, name, self._watched(name, getattr(syscalls, name)))
        close = syscalls.close

        def closing(fd: int) -> None:
            self.failed.discard(fd)
            close(fd)

        monkeypatch.setattr(syscalls, "close", closing)

    def _watched(self, name: str, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(fd: int) -> None:
            if fd in self.failed:
                self.again.append(f"{name} of {fd}")
            try:
                real(fd)
            except OSError:
                self.failures += 1
                self.failed.add(fd)
                raise

        return call


def changes(number: int) -> list[list[Change]]:
    """What is tried in one round: a change, a new document, a record, a group, a delete."""
    body = b'{"n":%d,"text":"%b"}' % (number, b"x" * 5000)
    return [
        [Put("notes", ("old",), body, "notes/1")],
        [Put("notes", (f"new {number}",), body, "notes/1")],
        [Append("notes", ("log",), body)],
        [Put("notes", ("both",), body, "notes/1"), Append("notes", ("log",), body)],
        [Delete("notes", ("both",))],
    ]


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("heals", [0, 2, 7], ids=["never", "soon", "later"])
def test_what_the_kernel_dropped_is_never_acknowledged(
    kind: str, heals: int, tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes fail from some moment on; the disk heals after so many refusals, or never."""
    ledger = tmp_path / "ledger"
    watched = SyncsWatched(monkeypatch)
    with faulty_volume(tmp_path / "mount") as disk:
        asyncio.run(work(kind, disk, ledger, heals, tally))
        disk.heal()
        disk.restart()  # all caches are gone
        found = asyncio.run(seen(kind, disk.root / "state"))
        assert put_aside(disk.root / "state") == []
    assert watched.failures, "no sync ever failed"
    assert watched.again == []
    tally.faults += watched.failures
    Ledger(ledger).judge(Held(), found, tally, f"{kind}, heals after {heals}")


async def work(kind: str, disk: FaultyVolume, ledger: Path, heals: int, tally: Tally) -> None:
    store = STORES[kind](disk.root / "state")
    refusals = 0
    with ledger.open("ab", buffering=0) as file:
        store.ledger = file.fileno()
        await store.open()
        for number in range(ROUNDS):
            for group in changes(number):
                tally.points += 1
                try:
                    await store.commit(group)
                except StorageError as error:
                    assert error.errno in (errno.EIO, errno.EROFS), error  # noqa: PT017
                    refusals += 1
                    if refusals == heals:
                        disk.heal()
            if number == 0:
                disk.refuse("write")
        with contextlib.suppress(AgentStateError):
            await store.close()
        store.ledger = -1


@pytest.mark.proof(*ROW)
@pytest.mark.parametrize("kind", STORES)
def test_a_disk_that_cannot_be_read_is_no_damaged_document(
    kind: str, tmp_path: Path, tally: Tally
) -> None:
    with faulty_volume(tmp_path / "mount") as disk:
        asyncio.run(write_some(kind, disk.root / "state"))
        disk.restart()
        asyncio.run(read_without_a_disk(kind, disk, tally))
        assert put_aside(disk.root / "state") == []
        found = asyncio.run(seen(kind, disk.root / "state"))
    assert len(found.documents) == 20
    assert not found.unreadable
    tally.acknowledged += 20


async def write_some(kind: str, root: Path) -> None:
    store = STORES[kind](root)
    await store.open()
    for number in range(20):
        body = b'{"text":"%b"}' % (b"x" * 20_000)
        await store.commit([Put("notes", (f"{number}",), body, "notes/1")])
        await store.commit([Append("notes", (f"{number}",), body)])
    await store.close()


async def read_without_a_disk(kind: str, disk: FaultyVolume, tally: Tally) -> None:
    store = STORES[kind](disk.root / "state")
    await store.open()
    disk.refuse("read")
    for number in range(20):
        key = (f"{number}",)
        for read in (store.get("notes", key), records(store, key)):
            tally.points += 1
            try:
                await read
            except StorageError as error:
                assert error.errno == errno.EIO, error  # noqa: PT017
                tally.faults += 1
    assert tally.faults, "everything was read from somewhere"
    with contextlib.suppress(StorageError):
        await store.commit([Put("notes", ("0",), b"{}", "notes/1", expected=7)])
    assert store.incidents() == []
    disk.heal()
    for number in range(20):
        assert await store.get("notes", (f"{number}",)) is not None
    await store.close()


async def records(store: StateStore, key: tuple[str]) -> None:
    async for _ in store.read_log("notes", key):
        pass
