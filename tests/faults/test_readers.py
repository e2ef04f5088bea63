"""Readers take no lock, and never see half of anything, nor what was there before what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from random import Random
from typing import Any

import pytest

from agent_state.errors import StateCorruptedError
from agent_state.manager import StatePersistenceManager
from agent_state.storage import FileStateStore, WALStateStore
from agent_state.storage.readonly_store import ReadOnlyStateStore
from tests.faults.forking import forkserver
from tests.faults.tally import Tally

pytestmark = pytest.mark.long("readers and a writer in several processes for seconds")

DOCUMENTS = 24
FULL_READS = {"script": 440_000, "manager": 60_000}
"""For each of the two stores: a million in all."""
SEEDED_READS, SEEDED_SECONDS = 500, 1.2
CHANGES = 200
"""So often at least must a reader have met something new."""
GIVE_UP_SECONDS = 60.0


@dataclass
class Seen:
    """What one reader saw."""

    reads: int = 0
    changes: int = 0
    """How often something was newer than at the last look; else nobody wrote, or nobody read."""
    torn: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)
    revisions: dict[str, int] = field(default_factory=dict)

    def look(self, key: str, revision: int, body: dict[str, Any]) -> None:
        """Take in a document: its parts belong together, and it is no older than the last."""
        self.reads += 1
        number = body["n"]
        if body["also_n"] != number or body["middle"] != "m" * length_of(number):
            self.torn.append(f"{key}: {number} and {body['also_n']}")
        before = self.revisions.get(key, 0)
        if revision < before:
            self.back.append(f"{key}: {revision} after {before}")
        self.changes += revision > before
        self.revisions[key] = revision


def length_of(number: int) -> int:
    """From nothing to 60 KB, so that a document is one block or many."""
    return (0, 20, 300, 5_000, 60_000)[number % 5]


def body_of(key: str, number: int) -> dict[str, Any]:
    # Sorted by name, so that the two numbers are at both ends.
    return {"agent_id": key, "also_n": number, "middle": "m" * length_of(number), "n": number}


# -- the writer -----------------------------------------------------------------------------------


def write_until(root: Path, exclusive: bool, ready: Event, ended: Event) -> None:
    asyncio.run(_write_until(root, exclusive, ready, ended))


async def _write_until(root: Path, exclusive: bool, ready: Event, ended: Event) -> None:
    """Replace documents as fast as they can be; what a power cut leaves is not the question."""
    async with StatePersistenceManager(
        store=WALStateStore(root, durability="os", segment_bytes=200_000)
        if exclusive
        else FileStateStore(root, durability="os")
    ) as manager:

        async def replace(key: str, random: Random) -> None:
            number = 0
            while not ended.is_set():
                number += random.randrange(1, 4)
                await manager.save("agents", key, body_of(key, number))
                await manager.append("events", key, body_of(key, 5 * number))
                if number > 2:
                    ready.set()
                await asyncio.sleep(0)

        async def settle() -> None:
            while not ended.is_set():
                await manager.flush()
                await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(settle())
            for number in range(DOCUMENTS):
                key = f"agent-{number}"
                tasks.create_task(replace(key, Random(key)))


# -- the readers ----------------------------------------------------------------------------------


def read_as_a_script(root: Path, exclusive: bool, enough: Callable[[Seen], bool]) -> Seen:
    """As a person's script does: open, read, parse."""
    seen, random = Seen(), Random(1)
    paths = [root / "agents" / f"agent-{n}.json" for n in range(DOCUMENTS)]
    while not enough(seen):
        path = random.choice(paths)
        with contextlib.suppress(FileNotFoundError), path.open() as file:  # not settled yet
            text = file.read()
            try:
                body = json.loads(text)
            except ValueError:
                seen.torn.append(f"{path.name}: {text[:40]!r}")
                continue
            seen.look(path.stem, body["_revision"], body)
    return seen


def read_by_the_manager(root: Path, exclusive: bool, enough: Callable[[Seen], bool]) -> Seen:
    return asyncio.run(_read_by_the_manager(root, exclusive, enough))


async def _read_by_the_manager(root: Path, exclusive: bool, enough: Callable[[Seen], bool]) -> Seen:
    """Where one process owns the directory, others read what a restart would bring."""
    seen, random = Seen(), Random(2)
    manager = StatePersistenceManager(
        store=ReadOnlyStateStore(root) if exclusive else FileStateStore(root)
    )
    async with manager:
        while not enough(seen):
            what = random.random()
            key = f"agent-{random.randrange(DOCUMENTS)}"
            try:
                if what < 0.9:
                    await _get(manager, key, seen)
                elif what < 0.97:
                    async for loaded in manager.scan("agents"):
                        seen.look(loaded.key[0], loaded.revision, loaded.state.model_dump())
                else:
                    await _tail(manager, key, seen)
            except StateCorruptedError as error:
                seen.torn.append(str(error))
        seen.torn += [str(incident) for incident in manager.incidents()]
    return seen


async def _get(manager: StatePersistenceManager, key: str, seen: Seen) -> None:
    loaded = await manager.load_with_revision("agents", key)
    if loaded is not None:
        seen.look(key, loaded.revision, loaded.state.model_dump())


async def _tail(manager: StatePersistenceManager, key: str, seen: Seen) -> None:
    """The last records of a log count on without a gap, whatever is being appended."""
    entries = [entry async for entry in manager.read_log("events", key, last=10)]
    numbers = [entry.seq for entry in entries]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers)) if numbers else ()):
        seen.torn.append(f"the log of {key}: {numbers}")
    if entries:
        seen.look(f"log of {key}", numbers[-1], dict(entries[-1].record))


READERS = {"script": read_as_a_script, "manager": read_by_the_manager}


def read(
    who: str, root: Path, exclusive: bool, reads: int, seconds: float, answer: Connection
) -> None:
    """Until so much was read and seen to change, for so long at least."""
    began = time.monotonic()

    def enough(seen: Seen) -> bool:
        took = time.monotonic() - began
        if took > GIVE_UP_SECONDS + reads / 1000 or len(seen.torn + seen.back) > 9:
            return True
        return took > seconds and seen.reads >= reads and seen.changes >= CHANGES

    answer.send(READERS[who](root, exclusive, enough))


@contextlib.contextmanager
def written(root: Path, exclusive: bool) -> Iterator[None]:
    """A directory that another process writes for the time of a ``with`` block."""
    context = forkserver()
    ready, ended = context.Event(), context.Event()
    writer = context.Process(target=write_until, args=(root, exclusive, ready, ended), daemon=True)
    writer.start()
    try:
        assert ready.wait(30), "the writer wrote nothing"
        yield
        assert writer.is_alive(), "the writer ended by itself"
    finally:
        ended.set()
        writer.join(30)
        writer.kill()
    assert writer.exitcode == 0


@pytest.mark.proof("T7", "readers without a lock beside a writer")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
def test_a_reader_sees_the_old_or_the_new_and_never_goes_back(
    tmp_path: Path, tally: Tally, full: bool, exclusive: bool
) -> None:
    root, context = tmp_path / "state", forkserver()
    with written(root, exclusive):
        pipes = {}
        for who in READERS:
            reads, seconds = (FULL_READS[who], 0.0) if full else (SEEDED_READS, SEEDED_SECONDS)
            receiving, sending = context.Pipe(duplex=False)
            context.Process(
                target=read, args=(who, root, exclusive, reads, seconds, sending), daemon=True
            ).start()
            sending.close()
            pipes[who] = receiving
        seen: dict[str, Seen] = {who: pipe.recv() for who, pipe in pipes.items()}
    for found in seen.values():
        tally.points += found.reads
        tally.faults += found.changes
        tally.unreadable += len(found.torn)
        tally.lost += len(found.back)
    for who, found in seen.items():
        assert found.torn == [], f"{who} saw halves"
        assert found.back == [], f"{who} saw time go back"
        assert found.changes >= CHANGES, f"{who} hardly saw anything change"
        assert found.reads >= (FULL_READS[who] if full else SEEDED_READS)
