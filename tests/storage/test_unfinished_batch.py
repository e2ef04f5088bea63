"""The last batch of a journal after a power cut: any block of it may never have been written.

Until its fdatasync has returned, the blocks of a batch reach the disk in any order, and one that
did not reads as NULs. Nobody was told of a record of that batch; of all before it, everybody was.
"""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path
from zlib import crc32

import orjson
import pytest

from agent_state import FileStateStore, StateCorruptedError, WALStateStore
from agent_state.protocols import Document, LogRecord
from agent_state.storage import wal
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedPut,
    decode_record,
    encode_changes,
    frame,
)
from agent_state.storage.wal import WriteAheadLog
from agent_state.testing.contract_base import records_of
from agent_state.verify import verify

BLOCK = 512
NUMBERS = range(1, 7)
CONFIRMED = 3
"""So many records are in batches that somebody was told of."""


def changes(number: int) -> list[ResolvedChange]:
    """A document and a log record, longer than a block."""
    body = orjson.dumps({"n": number, "text": "x" * 700})
    document = Document("notes", (f"n{number}",), body, 1, "2026-01-01T00:00:00.000000Z", "")
    return [ResolvedPut(document), ResolvedAppend("notes", ("log",), LogRecord(number, b'{"a":1}'))]


@pytest.fixture
async def segment(tmp_path: Path) -> Path:
    """Of an owner that died: two batches that were confirmed, and a third."""
    store = WALStateStore(tmp_path / "origin")
    await store.open()
    await store.close()
    owner = WriteAheadLog(str(tmp_path / "origin" / ".journal"), sync=True)
    owner.append([changes(1)])
    owner.append([changes(2), changes(3)])
    owner.append([changes(number) for number in NUMBERS[CONFIRMED:]])
    owner.close()
    [path] = (tmp_path / "origin" / ".journal").glob("*.jsonl")
    return path


def batch_start(data: bytes) -> int:
    """The offset of the first byte of the last batch."""
    return sum(len(line) + 1 for line in data.split(b"\n")[:CONFIRMED])


def without(data: bytes, blocks: tuple[int, ...], start: int) -> bytes:
    """What is left when these blocks of the file were not written again after ``start``."""
    left = bytearray(data)
    for block in blocks:
        first, end = max(block * BLOCK, start), min((block + 1) * BLOCK, len(data))
        left[first:end] = bytes(end - first)
    return bytes(left)


@pytest.mark.parametrize("heir", [WALStateStore, FileStateStore])
async def test_any_blocks_of_a_batch_nobody_was_told_of_may_be_missing(
    heir: type[FileStateStore], segment: Path, tmp_path: Path
) -> None:
    data = segment.read_bytes()
    start = batch_start(data)
    there = range(start // BLOCK, len(data) // BLOCK + 1)
    for blocks in [*((block,) for block in there), *combinations(there, 2)]:
        root = tmp_path / "copy"
        shutil.copytree(tmp_path / "origin", root)
        left = without(data, blocks, start)
        (root / ".journal" / segment.name).write_bytes(left)

        report = await verify(root)
        assert report.problems == [], blocks
        store = heir(root)
        await store.open()
        kept = [key[0] for key in await store.keys("notes")]
        logged = await records_of(store, "log")
        assert store.incidents() == [], blocks
        await store.close()
        shutil.rmtree(root)

        # What is after the hole may build on what is in it, so it did not happen either.
        hole = next(at for at in range(start, len(data)) if left[at] != data[at])
        whole = data[: hole + (hole == len(data) - 1)].count(b"\n")
        assert kept == [f"n{n}" for n in NUMBERS[:whole]], blocks
        assert len(logged) == len(kept) >= CONFIRMED, blocks


async def test_a_hole_in_what_was_confirmed_is_damage(segment: Path, tmp_path: Path) -> None:
    data = segment.read_bytes()
    start = batch_start(data)
    for block in range(start // BLOCK):
        segment.write_bytes(without(data, (block,), 0))
        found = wal.read_segment(str(segment))
        assert found.damaged, block
        assert found.torn == 0, block


async def test_damage_in_the_last_batch_that_no_lost_block_explains_is_reported(
    segment: Path,
) -> None:
    data = segment.read_bytes()
    start = batch_start(data)
    for at in range(start, len(data) - 1, 13):
        for bad in (b"\xff", b"\0"):
            segment.write_bytes(data[:at] + bad + data[at + 1 :])
            found = wal.read_segment(str(segment))
            at_the_end_of_a_block = bad == b"\0" and (at + 1) % BLOCK == 0 and at == start
            assert bool(found.damaged) != at_the_end_of_a_block, at


async def test_a_segment_of_an_earlier_version_has_no_batches(segment: Path) -> None:
    """Each of its records is a batch of its own: a hole before the last one is damage."""
    data = b"".join(frame(encode_changes(changes(number))) for number in NUMBERS)
    segment.write_bytes(data)
    assert [len(record) for record in wal.read_segment(str(segment)).records] == [2] * 6
    segment.write_bytes(without(data, (2,), 0))
    found = wal.read_segment(str(segment))
    assert (len(found.records), found.damaged, found.torn) == (5, 1, 0)


@pytest.mark.parametrize("batch", [b"-1", b"true", b"1.0", b'"0"', b"null", b"9223372036854775809"])
def test_a_batch_is_an_offset(batch: bytes) -> None:
    line = frame(encode_changes(changes(1)), 0)[9:-1].replace(b'"batch":0', b'"batch":' + batch)
    with pytest.raises(StateCorruptedError, match="not a journal record"):
        decode_record(b"%08x %b" % (crc32(line), line))
