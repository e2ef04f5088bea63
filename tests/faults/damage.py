"""A small state directory, every way to damage one of its files, and what must still be there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_state import StatePersistenceManager

Place = tuple[str, tuple[str, ...]]

LONG = "x" * 200
"""An id whose file name cannot carry it."""

STATES: dict[Place, dict[str, Any]] = {
    ("agents", ("alice",)): {"agent_id": "alice", "status": "idle", "counters": {"turns": 3}},
    ("agents", (LONG,)): {"agent_id": LONG},
    ("tasks", ("alice", "t1")): {"task_id": "t1", "attempts": 1, "payload": {"text": "é"}},
    ("mail", ("alice", "m1")): {"message_id": "m1", "from_agent": "bob", "body": [1, None]},
    ("system", ("runtime",)): {"status": "stopped", "n": 1.5},
}
LOG = ("events", ("log",))
RECORDS = [{"n": n, "text": "é" * n} for n in range(1, 6)]


async def make(root: Path, *, exclusive: bool) -> None:
    """Everything above, acknowledged and closed."""
    async with manager_of(root, exclusive=exclusive) as manager:
        for (kind, key), state in STATES.items():
            await manager.save(kind, key, state)
        for record in RECORDS:
            await manager.append(*LOG, record, dedupe_key=f"id{record['n']}")
    for path in root.rglob("*.json"):
        os.utime(path, (1_000_000_000, 1_000_000_000))


def manager_of(root: Path, *, exclusive: bool) -> StatePersistenceManager:
    # What is damaged here was durable long ago.
    return StatePersistenceManager(root, exclusive=exclusive, durability="os")


KILLED = """
import asyncio, os, signal, sys
from agent_state import StatePersistenceManager
from agent_state.storage import syscalls

root, exclusive, count = sys.argv[1], sys.argv[2] == "exclusive", int(sys.argv[3])
rename = syscalls.rename

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def rename_or_die(source, target):
    if "/.journal/" not in target:
        die()  # the intent is recorded, and nothing is in its place yet
    rename(source, target)

async def main():
    manager = StatePersistenceManager(root, exclusive=exclusive)
    await manager.open()
    if not exclusive:
        await manager.save("notes", "d1", {"n": 0})
        syscalls.rename = rename_or_die
    for n in range(1, count + 1):
        async with manager.group() as group:
            group.save("notes", f"d{n}", {"n": n, "text": "\\u00e9" * n})
            group.append("events", "log", {"n": n}, dedupe_key=f"id{n}")
    die()

asyncio.run(main())
"""


def killed(root: Path, *, exclusive: bool, count: int) -> Path:
    """A directory whose writer was killed with ``count`` groups acknowledged and in no file.

    For the shared store: with its first group recorded and not acknowledged. The one file in
    ``.journal/``.
    """
    mode = "exclusive" if exclusive else "shared"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), mode, str(count)], check=False, timeout=60
    )
    assert ended.returncode == -9
    [path] = (root / ".journal").glob("[!.]*")
    return path


@dataclass
class Contents:
    """What a manager finds in a directory, and what it says about it."""

    states: dict[Place, dict[str, Any]] = field(default_factory=dict)
    edited: set[Place] = field(default_factory=set)
    records: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    """The paths that incidents name."""
    kept: dict[str, bytes] = field(default_factory=dict)
    """By path, the bytes in quarantine."""


async def contents(manager: StatePersistenceManager, root: Path) -> Contents:
    found = Contents()
    for kind in ("agents", "tasks", "mail", "sleep", "system", "notes"):
        async for loaded in manager.scan(kind):
            found.states[kind, loaded.key] = loaded.state.model_dump()
            if loaded.edited:
                found.edited.add((kind, loaded.key))
    async for entry in manager.read_log(*LOG):
        found.records.append((entry.seq, entry.record))
    tell(found, manager, root)
    return found


def tell(found: Contents, manager: StatePersistenceManager, root: Path) -> None:
    for incident in manager.incidents():
        if incident.path is not None:
            found.told.add(incident.path)
            if incident.kept is not None and (root / incident.kept).is_file():
                found.kept[incident.path] = (root / incident.kept).read_bytes()
        elif incident.kind is not None and incident.key is not None:
            found.told.add("/".join((incident.kind, *incident.key)))


def copy(origin: Path, root: Path) -> Path:
    shutil.copytree(origin, root, symlinks=True)
    return root


def age(path: Path) -> None:
    """A fresh file is given a moment, as an editor may be at it."""
    os.utime(path, (1_000_000_000, 1_000_000_000), follow_symlinks=False)


def bytewise(data: bytes, step: int) -> Iterator[tuple[str, bytes]]:
    """Cut, and one bit flipped, at every ``step``-th byte; a different bit each time."""
    for at in range(0, len(data), step):
        yield f"cut at {at}", data[:at]
    for at in range(0, len(data), step):
        bit = 7 * at % 8
        flipped = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        yield f"bit {bit} of byte {at}", flipped


def wholesale(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What happens to whole files."""
    yield "empty", b""
    yield "zero-filled", bytes(len(data))
    yield "NUL tail", data + bytes(300)
    yield "NUL half", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    yield "0xff", b"\xff" * len(data)
    yield "0xff tail", data + b"\xff" * 9
    yield "twice", data + data
    yield "BOM", b"\xef\xbb\xbf" + data
    yield "UTF-16", data.decode(errors="replace").encode("utf-16")
    yield "a newline in front", b"\n" + data


def misstated(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A document whose reserved keys are wrong, or given twice."""
    content: dict[str, Any] = json.loads(data)
    wrong: dict[str, tuple[Any, ...]] = {
        "_id": ("somebody else", ["alice", "x"], 7, [], {}),
        "_revision": (0, -1, 2**63, 2**64 - 1, "x", None, 1e30, True),
        "_schema": ("agents/99", "no schema", "sleep/1", 5, "", "nothing_known/1"),
        "_checksum": ("00000000", 5, None),
        "_saved_at": (5, "yesterday"),
        "_session_id": ("somebody else", 5),
    }
    for name, values in wrong.items():
        for value in values:
            yield f"{name} {value!r}", json.dumps({**content, name: value}).encode()
    first = next(iter(content))
    twice = b'{"%b": "first", ' % first.encode()
    yield f"{first} twice", twice + data.lstrip()[1:]
