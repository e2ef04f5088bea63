"""What is done with a store while the disk takes nothing more, and afterwards.

As a program it does that under a limit of its own process, or in a small memory file system that
only it sees: ``python -m tests.faults.filling tmpfs shared FOLDER``.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from agent_state.errors import StorageError, StorageFullError
from agent_state.protocols import Append, Change, Delete, Put, StateStore
from tests.faults.ledger import leftovers, make_store, put_aside
from tests.faults.tally import Tally

LARGE = b'{"text":"%b"}' % (b"x" * 150_000)
CHANGES: dict[str, list[Change]] = {
    "a large document over a small one": [Put("notes", ("old",), LARGE, "notes/1")],
    "a large new document": [Put("notes", ("new",), LARGE, "notes/1")],
    "a large record": [Append("notes", ("log",), LARGE)],
    "a group": [
        Put("notes", ("old",), b'{"n":2}', "notes/1"),
        Put("notes", ("new",), LARGE, "notes/1"),
        Append("notes", ("log",), b'{"n":2}'),
        Delete("notes", ("gone",)),
    ],
}
OLD = b'{"n":1}'


async def read_all(store: StateStore) -> None:
    """Everything that was stored is there, and nothing else."""
    document = await store.get("notes", ("old",))
    assert document is not None
    assert document.body == OLD
    assert ("old",) in await store.keys("notes")
    assert ("new",) not in await store.keys("notes")
    assert ("old",) in [one.key async for one in store.scan("notes")]
    assert [one.body async for one in store.read_log("notes", ("log",))] == [OLD]


async def refused(
    store: StateStore, numbers: set[int], tally: Tally, *, but: str | None = None
) -> None:
    """Each change is refused with an error that says why and where; nothing has changed."""
    for name, changes in CHANGES.items():
        if name == but:
            continue
        tally.points += 1
        with pytest.raises(StorageError) as refusal:
            await store.commit(changes)
        tally.faults += 1
        error = refusal.value
        assert error.errno in numbers, (name, error)
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        assert isinstance(error, StorageFullError) == full, (name, error)
        assert error.path is not None, (name, error)
        assert error.path in str(error)


async def use(
    kind: str,
    root: Path,
    refuse: Callable[[], object],
    allow: Callable[[], object],
    *,
    numbers: set[int],
    reads: bool = True,
    deletes: bool = True,
    but: str | None = None,
) -> Tally:
    """Fill a store, refuse everything (``but`` one change), and allow it again.

    ``reads``, ``deletes``: whether those still work meanwhile. Where one process owns the
    directory a delete needs room in the journal, and is refused like the rest if there is none.
    """
    tally = Tally()
    store = make_store(kind, root)
    await store.open()
    for key in ("old", "gone", "second"):
        await store.commit([Put("notes", (key,), OLD, "notes/1")])
    await store.commit([Append("notes", ("log",), OLD)])
    await store.flush()
    refuse()
    try:
        await refused(store, numbers, tally, but=but)
        if reads:
            await read_all(store)
        if deletes:
            await delete(store, kind, tally)
    finally:
        allow()
    await read_all(store)
    for changes in CHANGES.values():
        await store.commit(changes)
        tally.acknowledged += len(changes)
    await store.commit([Delete("notes", ("second",))])
    await store.close()
    await check_end(kind, root, tally)
    return tally


async def delete(store: StateStore, kind: str, tally: Tally) -> None:
    try:
        await store.commit([Delete("notes", ("second",))])
    except StorageFullError:
        assert kind.startswith("exclusive"), "files are removed without room"
        assert await store.get("notes", ("second",)) is not None
    else:
        tally.acknowledged += 1
        assert await store.get("notes", ("second",)) is None


async def check_end(kind: str, root: Path, tally: Tally) -> None:
    """Opened again, all of it is there; nothing half written is, and nothing was put aside."""
    tally.leaked += len(leftovers(root))
    store = make_store(kind, root)
    await store.open()
    found = {one.key[0]: one.body async for one in store.scan("notes")}
    tally.unreadable += len(store.incidents()) + len(put_aside(root))
    records = [one.body async for one in store.read_log("notes", ("log",))]
    await store.close()
    tally.lost += found != {"old": b'{"n":2}', "new": LARGE}
    tally.lost += records != [OLD, LARGE, b'{"n":2}']
    assert tally.clean(), (tally, list(found), len(records), leftovers(root), put_aside(root))


class Ballast:
    """A file that takes all the room there is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fill(self) -> None:
        with self._path.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
            os.fsync(file.fileno())

    def free(self) -> None:
        self._path.unlink()


@contextmanager
def descriptors_taken() -> Iterator[list[int]]:
    """All descriptors that the process may have."""
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def under_tmpfs(kind: str, folder: Path) -> Tally:
    """In a file system of 4 MB. Needs a mount namespace of its own: ``unshare -rm``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True)
    ballast = Ballast(folder / "ballast")
    numbers = {errno.ENOSPC}
    return asyncio.run(use(kind, folder / "state", ballast.fill, ballast.free, numbers=numbers))


def under_file_size(kind: str, folder: Path) -> Tally:
    """No file may be longer than 100 KB: a write is short, and the next one fails."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    return asyncio.run(
        use(
            kind,
            folder / "state",
            lambda: limit(100_000),
            lambda: limit(hard),
            numbers={errno.EFBIG},
        )
    )


def under_descriptors(kind: str, folder: Path) -> Tally:
    """No descriptor is left."""
    holder = descriptors_taken()

    return asyncio.run(
        use(
            kind,
            folder / "state",
            holder.__enter__,
            lambda: holder.__exit__(None, None, None),
            numbers={errno.EMFILE},
            reads=False,
            deletes=False,
        )
    )


LIMITS = {
    "tmpfs": under_tmpfs,
    "file size": under_file_size,
    "descriptors": under_descriptors,
}

if __name__ == "__main__":
    limit, kind, folder = sys.argv[1:]
    print(json.dumps(asdict(LIMITS[limit](kind, Path(folder)))))  # noqa: T201  # the answer
