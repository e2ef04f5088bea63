"""T13: a directory in which somebody has put anything in the place of anything.

Nothing hangs, nothing outside is read into a state or changed, errors are ours, and the rest of
the directory works.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_state import AgentStateError, StateCorruptedError, StatePersistenceManager, StorageError
from agent_state.verify import verify
from tests.faults import damage
from tests.faults.damage import LOG, RECORDS, STATES
from tests.faults.tally import Tally
from tests.unprivileged import as_nobody, reachable_folder

pytestmark = pytest.mark.proof("T13", "anything in the place of anything")
STORES = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])

STOLEN = b'{"agent_id": "alice", "status": "stolen", "task_id": "t1", "n": 666}\n'
HANGS = 30.0
"""Seconds within which everything must have ended; it takes well under one."""


def link_to(target: str) -> Callable[[Path, Path], None]:
    return lambda place, outside: place.symlink_to(outside / target)


def loop(place: Path, outside: Path) -> None:
    place.symlink_to(place.name)


def pipe(place: Path, outside: Path) -> None:
    os.mkfifo(place)


def listening(place: Path, outside: Path) -> None:
    """A socket's path may be no longer than 100 bytes, so it is a relative one."""
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(place.parent):
        server.bind(place.name)
    assert outside.is_dir()


def folder(place: Path, outside: Path) -> None:
    place.mkdir()
    shutil.copy(outside / "alice.json", place / "inside.json")


def file(place: Path, outside: Path) -> None:
    shutil.copy(outside / "alice.json", place)


def device(place: Path, outside: Path) -> None:
    os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero has no end


THINGS: dict[str, Callable[[Path, Path], None]] = {
    "a symlink to a file": link_to("alice.json"),
    "a symlink to a folder": link_to("."),
    "a symlink to nothing": link_to("nothing"),
    "a symlink to itself": loop,
    "a FIFO": pipe,
    "a socket": listening,
    "a folder": folder,
    "a file": file,
    "a device": device,
}
FILES = {
    "a document": "agents/alice.json",
    "a new document": "agents/bob.json",
    "a log": "events/log.jsonl",
    "a new log": "events/new.jsonl",
    "a segment": ".journal/00000001.jsonl",
    "an intent": ".journal/intent-0123456789abcdef.jsonl",
    "a lock": ".locks/agents/alice.lock",
    ".gitignore": ".gitignore",
    "a snapshot": ".snapshots/agents/alice.json",
    "a temporary file": "agents/.tmp-0123456789abcdef",
}
FOLDERS = {
    "a kind": "agents",
    "an agent's tasks": "tasks/alice",
    "a kind of logs": "events",
    "a kind's locks": ".locks/agents",
    "a kind's snapshots": ".snapshots/agents",
    "a kind's quarantine": ".quarantine/agents",
}
OWN = {
    "the journal": ".journal",
    "the locks": ".locks",
    "the writers": ".locks/writers.d",
    "the quarantine": ".quarantine",
    "the snapshots": ".snapshots",
    "the owner's lock": ".locks/owner.lock",
}
"""Without these there is no store: opening it may be refused."""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What is not ours, and looks as if it were."""
    path = tmp_path / "outside"
    (path / "alice").mkdir(parents=True)
    for name in ("alice.json", "t1.json", "bob.json", "log.jsonl", "alice.lock", "alice/t1.json"):
        (path / name).write_bytes(STOLEN)
    (path / "damaged.json").write_bytes(b"not JSON")
    for each in path.rglob("*.json"):
        damage.age(each)
    return path


def picture(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in folder.rglob("*")
    }


def put(root: Path, relative: str, thing: Callable[[Path, Path], None], outside: Path) -> None:
    place = root / relative
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    thing(place, outside)


class Exercise:
    """Every operation once. ``refused`` are those that ended in one of our errors."""

    def __init__(self, manager: StatePersistenceManager) -> None:
        self.manager = manager
        self.refused: list[str] = []
        self.read: list[Any] = []

    async def run(self) -> None:
        manager = self.manager
        for name, key in (("alice", "alice"), ("bob", "bob")):
            await self.attempt(f"load {name}", manager.load("agents", key))
            await self.attempt(f"save {name}", manager.save("agents", key, {"agent_id": name}))
        await self.attempt("load t1", manager.load("tasks", ("alice", "t1")))
        await self.attempt("save t1", manager.save("tasks", ("alice", "t1"), {"task_id": "t1"}))
        for kind in ("agents", "tasks", "mail", "system"):
            await self.attempt(f"scan {kind}", self.scan(kind))
            await self.attempt(f"keys {kind}", manager.keys(kind))
        for log in ("log", "new"):
            await self.attempt(f"read {log}", self.tail(log))
            await self.attempt(f"append {log}", manager.append("events", log, {"n": 7}))
            await self.attempt(f"read {log} again", self.tail(log))
        await self.attempt("group", self.group())
        await self.attempt("delete", manager.delete("agents", "bob"))
        await self.attempt("flush", manager.flush())

    async def attempt(self, name: str, work: Awaitable[Any]) -> None:
        try:
            self.read.append(await work)
        except AgentStateError:
            self.refused.append(name)

    async def scan(self, kind: str) -> list[Any]:
        return [loaded.state.model_dump() async for loaded in self.manager.scan(kind)]

    async def tail(self, log: str) -> list[Any]:
        return [entry.record async for entry in self.manager.read_log("events", log)]

    async def group(self) -> None:
        async with self.manager.group() as group:
            group.save("agents", "carol", {"agent_id": "carol"})
            group.append("events", "log", {"n": 8})


async def unharmed(manager: StatePersistenceManager) -> None:
    for place in (("system", ("runtime",)), ("mail", ("alice", "m1"))):
        state = await manager.load(*place)
        assert state is not None
        assert state.model_dump() == STATES[place]
    assert await manager.save("system", "other", {"n": time.time()}) >= 1
    assert await manager.append("system", "log", {"n": 1}) >= 1


def cases() -> Iterator[tuple[str, str, str]]:
    for places, things in (
        (FILES, [thing for thing in THINGS if thing != "a file"]),
        ({**FOLDERS, **OWN}, [thing for thing in THINGS if thing != "a folder"]),
    ):
        for name, relative in places.items():
            yield from ((name, relative, thing) for thing in things)


@pytest.mark.timeout(400)
@STORES
async def test_something_else_in_any_place(
    exclusive: bool, full: bool, tmp_path: Path, outside: Path, tally: Tally
) -> None:
    await damage.make(tmp_path / "origin", exclusive=exclusive)
    before = picture(outside)
    for number, (name, relative, thing) in enumerate(cases()):
        if thing == "a device" and not (full and os.geteuid() == 0):
            continue
        if not full and number % 2 != exclusive:
            continue
        where = f"{thing} in the place of {name} ({relative})"
        root = damage.copy(tmp_path / "origin", tmp_path / f"state{number}")
        put(root, relative, THINGS[thing], outside)
        try:
            async with asyncio.timeout(HANGS):
                await in_spite_of_it(root, relative, exclusive, where)
        except TimeoutError:
            pytest.fail(f"hangs: {where}")
        assert picture(outside) == before, where
        tally.points += 1
        tally.faults += 1
    assert tally.points > 60


async def in_spite_of_it(root: Path, relative: str, exclusive: bool, where: str) -> None:
    try:
        report = await verify(root)
        assert "stolen" not in f"{report}", where
    except AgentStateError:
        assert relative in OWN.values(), where
    manager = damage.manager_of(root, exclusive=exclusive)
    try:
        await manager.open()
    except AgentStateError:
        assert relative in OWN.values(), f"does not open: {where}"
        return
    exercise = Exercise(manager)
    try:
        await exercise.run()
        await unharmed(manager)
    finally:
        try:
            await manager.close()
        except StorageError:
            assert relative in {**FOLDERS, **OWN}.values(), f"does not close: {where}"
    # A regular file in the place of a document, or of a folder's file, is a document.
    if not where.startswith("a file"):
        assert "stolen" not in f"{exercise.read}", where
    if relative in (FILES["a document"], FILES["a new document"]):
        assert set(exercise.refused) <= {"load alice", "load bob"}, f"{exercise.refused}: {where}"
    if relative in (FILES["a log"], FILES["a new log"]):
        assert set(exercise.refused) <= {"read log", "read new"}, f"{exercise.refused}: {where}"


@pytest.mark.long("starts and kills several processes")
@STORES
@pytest.mark.parametrize("thing", ["a file", "a symlink to a folder", "a FIFO"])
async def test_what_a_killed_process_had_acknowledged_comes_to_its_place_all_the_same(
    exclusive: bool, thing: str, tmp_path: Path, outside: Path, tally: Tally
) -> None:
    """Its folders, and its log, are taken by something else when the journal is replayed."""
    root = tmp_path / "state"
    damage.killed(root, exclusive=True, count=3)
    put(root, "notes", THINGS[thing], outside)
    put(root, "events/log.jsonl", THINGS["a symlink to a file"], outside)
    before = picture(outside)

    async with damage.manager_of(root, exclusive=exclusive) as manager:
        found = await damage.contents(manager, root)

    assert [state["n"] for (kind, _), state in sorted(found.states.items()) if kind == "notes"] == [
        1,
        2,
        3,
    ]
    assert [record["n"] for _, record in found.records] == [1, 2, 3]
    assert found.told == {"notes", "events/log.jsonl"}
    assert picture(outside) == before
    tally.points += 1
    tally.faults += 2
    tally.acknowledged += 6


SWAPPER = """
import os, sys
path, target, spare = sys.argv[1:4]
with open(spare, "wb") as file:
    file.write(sys.argv[4].encode())
n = 0
while True:
    n += 1
    try:
        if n % 2:
            os.symlink(target, spare + "l")
            os.replace(spare + "l", path)
        else:
            os.link(spare, spare + "f")
            os.replace(spare + "f", path)
    except OSError:
        pass
"""


@contextmanager
def swapping(path: Path, target: Path, spare: Path, good: str) -> Iterator[None]:
    arguments = [str(path), str(target), str(spare), good]
    process = subprocess.Popen([sys.executable, "-c", SWAPPER, *arguments])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(200)
@STORES
@pytest.mark.parametrize("relative", ["agents/alice.json", "events/log.jsonl"])
async def test_a_file_that_is_swapped_for_a_symlink_all_the_time_leads_nowhere(
    exclusive: bool, relative: str, full: bool, tmp_path: Path, outside: Path, tally: Tally
) -> None:
    root = tmp_path / "state"
    await damage.make(root, exclusive=exclusive)
    before = picture(outside)
    good = '{"agent_id": "alice", "n": 1}\n'
    victim = outside / "alice.json"
    async with damage.manager_of(root, exclusive=exclusive) as manager:
        with swapping(root / relative, victim, tmp_path / "spare", good):
            until = time.monotonic() + (5 if full else 0.7)
            exercise = Exercise(manager)
            while time.monotonic() < until:
                exercise.read.clear()
                await exercise.run()
                assert "stolen" not in f"{exercise.read}"
                tally.points += 1
        tally.faults += len(exercise.refused)
        await unharmed(manager)
        try:
            await manager.load("agents", "alice")
        except StateCorruptedError:
            tally.faults += 1
    assert picture(outside) == before


@STORES
async def test_names_that_are_not_text_and_folders_without_end(
    exclusive: bool, tmp_path: Path, tally: Tally
) -> None:
    await damage.make(tmp_path, exclusive=exclusive)
    raw = os.fsencode(tmp_path)
    for name in (b"agents/\xff.json", b"events/\xff.jsonl", b".journal/intent-\xff", b"\xfe"):
        Path(os.fsdecode(raw + b"/" + name)).write_bytes(b"\xff")
    (tmp_path / "agents" / "~0123456789abcdef.json").write_bytes(b'{"_id": ""}')
    (tmp_path / "agents" / "~0123456789abcde0.json").write_bytes(b'{"_id": [1]}')
    (tmp_path / "No Kind").mkdir()
    here = os.open(tmp_path / "agents", os.O_DIRECTORY)
    for _ in range(2500):  # deeper than Python may call, and than a path may be long
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    try:
        report = await verify(tmp_path)
        async with damage.manager_of(tmp_path, exclusive=exclusive) as manager:
            watching = await manager.store.watch()
            await watching.aclose()
            found = await damage.contents(manager, tmp_path)
            await unharmed(manager)
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "agents" / "d")], check=True)
    assert found.states == STATES
    assert [record for _, record in found.records] == RECORDS
    named = {finding.path for finding in (*report.problems, *report.notices)}
    assert {"agents/\udcff.json", "events/\udcff.jsonl", "No Kind"} <= named
    assert {"agents/~0123456789abcdef.json", "agents/~0123456789abcde0.json"} <= named
    assert ".journal/intent-\udcff" in found.told
    tally.points += 8
    tally.faults += 8


@pytest.fixture
def reachable() -> Iterator[Path]:
    with reachable_folder() as path:
        yield path


@STORES
async def test_files_that_may_not_be_read(exclusive: bool, reachable: Path, tally: Tally) -> None:
    root = reachable / "state"
    await damage.make(root, exclusive=exclusive)
    await verify(root)  # everything is imported before there is nobody to import it
    with as_nobody(reachable):
        (root / "agents" / "alice.json").chmod(0)
        (root / "events" / "log.jsonl").chmod(0)
        async with damage.manager_of(root, exclusive=exclusive) as manager:
            with pytest.raises(StorageError, match="Permission denied"):
                await manager.load("agents", "alice")
            with pytest.raises(StorageError, match="Permission denied"):
                _ = [entry async for entry in manager.read_log(*LOG)]
            # One file that is closed to us says nothing of the others.
            keys = [loaded.key async for loaded in manager.scan("agents")]
            assert keys == [(damage.LONG,)]
            assert {incident.path for incident in manager.incidents()} == {"agents/alice.json"}
            await unharmed(manager)
        report = await verify(root)
    assert {problem.path for problem in report.problems} == {
        "agents/alice.json",
        "events/log.jsonl",
    }
    tally.points += 2
    tally.faults += 2


@STORES
async def test_folders_that_may_not_be_written(
    exclusive: bool, reachable: Path, tally: Tally
) -> None:
    root = reachable / "state"
    await damage.make(root, exclusive=exclusive)
    with as_nobody(reachable):
        (root / "agents").chmod(0o500)
        manager = damage.manager_of(root, exclusive=exclusive)
        await manager.open()
        with pytest.raises(StorageError, match="Permission denied"):
            await manager.save("agents", "alice", {"agent_id": "alice", "n": 2})
            await manager.flush()
        assert await manager.load("agents", "alice") is not None
        await unharmed(manager)
        (root / "agents").chmod(0o700)
        await manager.close()
        root.chmod(0o500)
        async with damage.manager_of(root, exclusive=exclusive) as manager:
            await unharmed(manager)
            await manager.save("agents", "alice", {"agent_id": "alice", "n": 3})
            with pytest.raises(StorageError, match="Permission denied"):
                await manager.save("fresh", "a", {"n": 1})
                await manager.flush()
            root.chmod(0o700)
            await manager.save("fresh", "a", {"n": 2})
    tally.points += 2
    tally.faults += 2
