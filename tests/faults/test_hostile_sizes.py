"""T13: files and directories of any size: refused, or read within bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_state.verify import verify
from tests.faults import damage
from tests.faults.damage import LOG, RECORDS, STATES
from tests.faults.tally import Tally

pytestmark = pytest.mark.proof("T13", "files and directories of any size")
STORES = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])

SPARSE = ("agents/big.json", ".journal/intent-0123456789abcdef.jsonl")
READ_ALL = """
import asyncio, json, re, sys
from pathlib import Path
from agent_state import StatePersistenceManager
from agent_state.verify import verify

status = Path("/proc/self/status")

async def main():
    exclusive = sys.argv[2] == "exclusive"
    report = await verify(sys.argv[1])
    async with StatePersistenceManager(sys.argv[1], exclusive=exclusive, durability="os") as m:
        keys = await m.keys("agents")
        seen = sum([1 async for _ in m.scan("agents")])
        records = [entry.seq async for entry in m.read_log("events", "log")]
        seq = await m.append("events", "log", {"n": 7}, dedupe_key="seven")
        print(json.dumps({
            "keys": len(keys), "seen": seen, "records": records, "seq": seq,
            "incidents": sorted(incident.path or "" for incident in m.incidents()),
            # Not ru_maxrss, which counts from before this program was begun.
            "megabytes": int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) // 1024,
            "verified": sum(report.documents.values()),
        }))

asyncio.run(main())
"""


def grow(path: Path, size: int) -> None:
    """Holes, which take no room on the disk."""
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + size)
    damage.age(path)


@STORES
async def test_a_sparse_document_and_a_sparse_intent_are_refused_unread(
    exclusive: bool, tmp_path: Path, tally: Tally
) -> None:
    await damage.make(tmp_path, exclusive=exclusive)
    for relative in SPARSE:
        grow(tmp_path / relative, 1 << 30)
    report = await verify(tmp_path)
    async with damage.manager_of(tmp_path, exclusive=exclusive) as manager:
        states = {
            place: loaded.state.model_dump()
            for place in STATES
            if (loaded := await manager.load_with_revision(*place)) is not None
        }
        _ = [loaded async for loaded in manager.scan("agents")]
        kept = {incident.path: incident.kept for incident in manager.incidents()}
    assert states == STATES
    assert {problem.path for problem in report.problems} == set(SPARSE)
    assert set(kept) == set(SPARSE)
    assert {(tmp_path / (place or "")).stat().st_size for place in kept.values()} == {1 << 30}
    tally.points += 2
    tally.faults += 2


def read_all(root: Path, *, exclusive: bool) -> dict[str, object]:
    mode = "exclusive" if exclusive else "shared"
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(root), mode],
        check=True,
        capture_output=True,
        timeout=280,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.full
@pytest.mark.timeout(300)
@STORES
@pytest.mark.parametrize("where", ["a segment", "a log's end", "a log's middle"])
async def test_a_sparse_gigabyte_takes_less_memory_than_it_says(
    exclusive: bool, where: str, tmp_path: Path, tally: Tally
) -> None:
    await damage.make(tmp_path, exclusive=exclusive)
    path = tmp_path / {"a segment": ".journal/00000001.jsonl"}.get(where, "events/log.jsonl")
    grow(path, 1 << 30)
    if where == "a log's middle":
        with path.open("ab") as file:
            file.write(b'\n{"_seq":6,"n":6}\n')
    found = read_all(tmp_path, exclusive=exclusive)
    assert found["seen"] == sum(kind == "agents" for kind, _ in STATES)
    more = [6] if where == "a log's middle" else []
    assert found["records"] == [*range(1, len(RECORDS) + 1), *more]
    assert found["seq"] == len(RECORDS) + len(more) + 1
    assert int(str(found["megabytes"])) < 1024, found
    for kept in tmp_path.rglob("log.jsonl.*"):
        kept.unlink()
    tally.points += 1
    tally.faults += 1


@pytest.mark.timeout(300)
@STORES
async def test_a_log_of_lines_that_say_nothing_is_read_in_one_pass(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    """Each line looked for by itself, from the end, would read 64 KiB for three bytes."""
    await damage.make(tmp_path, exclusive=exclusive)
    count = 300_000 if full else 30_000
    path = tmp_path / "events" / "log.jsonl"
    path.write_bytes(b"x\n{}\n" * count)
    async with damage.manager_of(tmp_path, exclusive=exclusive) as manager:
        assert await manager.append(*LOG, {"n": 7}) == count + 1
        last = [entry.seq async for entry in manager.read_log(*LOG, last=2)]
    assert last == [count, count + 1]
    tally.points += 1
    tally.faults += count


@pytest.mark.long("thousands of files")
@pytest.mark.timeout(600)
@STORES
def test_so_many_keys_are_listed_and_scanned_within_bounds(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    count = 100_000 if full else 2_000
    folder = tmp_path / "agents"
    folder.mkdir()
    for n in range(count):
        fd = os.open(f"{folder}/k{n}.json", os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'{"agent_id":"k%d"}' % n)
        os.close(fd)
    try:
        found = read_all(tmp_path, exclusive=exclusive)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert (found["keys"], found["seen"], found["verified"]) == (count, count, count)
    assert int(str(found["megabytes"])) < 150 + count // 250, found
    tally.points += count
