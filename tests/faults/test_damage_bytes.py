"""T13 and T14: every byte of a small state directory damaged, one after the other.

Whatever is damaged is found, or makes no difference; its bytes are kept; all the rest is there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from agent_state.storage import logs
from agent_state.storage.paths import RUN
from agent_state.verify import VerifyReport, verify
from tests.faults import damage
from tests.faults.damage import LOG, RECORDS, STATES, Contents, Place
from tests.faults.tally import Tally

damaged = pytest.mark.proof("T13", "every byte of every file damaged")
torn = pytest.mark.proof("T14", "logs torn at every byte, then appended to")
STORES = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
EVENTS = "events/log.jsonl"
GROUPS = 3


def files(root: Path) -> Iterator[tuple[Place, Path]]:
    for path in sorted(root.glob("*/**/*.json")):
        kind, *rest = path.relative_to(root).with_suffix("").parts
        known = damage.LONG if "~" in rest[-1] else rest[-1]
        yield ("system" if kind == RUN else kind, (*rest[:-1], known)), path


def listed(report: VerifyReport) -> set[str]:
    return {finding.path or "" for finding in (*report.problems, *report.notices)}


@pytest.mark.long("opens a directory for each byte")
@damaged
@pytest.mark.timeout(400)
@STORES
def test_a_document_damaged_at_any_byte_is_found_and_kept(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    asyncio.run(damage.make(tmp_path / "origin", exclusive=exclusive))
    for place, path in files(tmp_path / "origin"):
        data = path.read_bytes()
        step = 4 if full else 29
        whole = chain(damage.wholesale(data), damage.misstated(data))
        some = list(whole) if full else list(whole)[len(data) % 3 :: 3]
        for what, bad in chain(damage.bytewise(data, step), some):
            root = damage.copy(tmp_path / "origin", tmp_path / f"{tally.points}")
            relative = str(path.relative_to(tmp_path / "origin"))
            (root / relative).write_bytes(bad)
            damage.age(root / relative)
            asyncio.run(document_is_contained(root, place, relative, bad, exclusive, what, tally))
            tally.points += 1


async def document_is_contained(
    root: Path, place: Place, relative: str, bad: bytes, exclusive: bool, what: str, tally: Tally
) -> None:
    where = f"{relative}, {what}: {bad!r}"
    report = await verify(root)
    async with damage.manager_of(root, exclusive=exclusive) as manager:
        found = await damage.contents(manager, root)
        for other, state in STATES.items():
            if other != place:
                tally.lost += found.states.get(other) != state
        assert found.records == list(enumerate(RECORDS, 1)), where
        # Harmless is what gives the same state as before; the rest must be told.
        if found.states.get(place) != STATES[place] or place in found.edited:
            tally.faults += 1
            assert relative in listed(report), where
            assert place in found.edited or told(found, place, relative), where
        if place not in found.states and (root / relative).exists():
            assert (root / relative).read_bytes() == bad, where  # left alone, and told
        elif place not in found.states:
            assert found.kept[relative] == bad, where
        assert (await manager.save("notes", "after", {"n": 1})) == 1
        tally.acknowledged += 1
    assert not tally.lost, where


def told(found: Contents, place: Place, relative: str) -> bool:
    return relative in found.told or "/".join((place[0], *place[1])) in found.told


@pytest.mark.long("opens a directory for each byte")
@torn
@pytest.mark.timeout(400)
@STORES
def test_a_log_damaged_at_any_byte_keeps_every_other_record(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    asyncio.run(damage.make(tmp_path / "origin", exclusive=exclusive))
    data = (tmp_path / "origin" / EVENTS).read_bytes()
    glued = data[:100] + data
    for what, bad in chain(
        damage.bytewise(data, 1 if full else 13), damage.wholesale(data), [("glued", glued)]
    ):
        root = damage.copy(tmp_path / "origin", tmp_path / f"{tally.points}")
        (root / EVENTS).write_bytes(bad)
        asyncio.run(log_is_contained(root, data, bad, exclusive, what, tally))
        tally.points += 1
    assert tally.clean()


def surviving(data: bytes, bad: bytes) -> list[int]:
    """The numbers of the good lines that are lines still."""
    there = set(bad.split(b"\n"))
    return [n for n, line in enumerate(data.split(b"\n")[:-1], 1) if line in there]


def renumbered(was: bytes, now: bytes) -> bool:
    """Whether a whole log is the same but for its numbers, which count up, and their sums."""
    try:
        before, after = ([json.loads(line) for line in data.splitlines()] for data in (was, now))
    except ValueError:
        return False
    numbers = [record["_seq"] for record in after]
    for record in (*before, *after):
        del record["_seq"], record["_crc"]
    return before == after and numbers == sorted({*numbers})


async def log_is_contained(
    root: Path, data: bytes, bad: bytes, exclusive: bool, what: str, tally: Tally
) -> None:
    where = f"{what}: {bad!r}"
    report = await verify(root)
    must = {n: RECORDS[n - 1] for n in surviving(data, bad)}
    async with damage.manager_of(root, exclusive=exclusive) as manager:
        seq = await manager.append(*LOG, {"n": "after"})
        found = await damage.contents(manager, root)
        tally.acknowledged += 1 + len(must)
        assert found.states == STATES, where
        assert found.records[-1] == (seq, {"n": "after"}), where
        there = {n: record for n, record in found.records if must.get(n) == record}
        tally.lost += len(must.keys() - there.keys())
        assert there == must, where
    now = (root / EVENTS).read_bytes()
    *_, last = now[:-1].rpartition(b"\n")
    before = now[: len(now) - len(last) - 1]
    kept = b"".join(found.kept.get(EVENTS, b"") for _ in (1,))
    # Every byte is where it was, or in quarantine; the newline is what an editor had left out,
    # and a record whose number was there already has one of its own.
    assert before + kept == bad or before == bad + b"\n" or renumbered(bad, before), where
    if [record for record in found.records if record[0] != seq] != list(enumerate(RECORDS, 1)):
        tally.faults += 1
        assert EVENTS in listed(report) or bad == data[: len(bad)], where
    unreadable = [n for n in range(1, 6) if n not in dict(found.records)]
    if unreadable and bad.count(b"\n") >= 5:
        assert EVENTS in found.told or EVENTS in listed(report), where


@torn
@STORES
@pytest.mark.parametrize("size", [300, 60_000, 200_000, 3_000_000])
@pytest.mark.parametrize("tail", ["NULs", "torn", "without its newline", "glued"])
async def test_a_tail_of_any_length_is_kept_whole_or_was_a_record(
    exclusive: bool, size: int, tail: str, tmp_path: Path, tally: Tally
) -> None:
    """As ext4 leaves it after a power cut; and a long record whose newline an editor left out."""
    await damage.make(tmp_path, exclusive=exclusive)
    path = tmp_path / EVENTS
    good = path.read_bytes()
    record = b'{"_seq":6,"text":"%b"}' % (b"x" * size)
    added = {
        "NULs": bytes(size),
        "torn": record[:-1],
        "without its newline": record,
        "glued": record[:-1] + b'{"_seq":7}',
    }[tail]
    path.write_bytes(good + added)
    async with damage.manager_of(tmp_path, exclusive=exclusive) as manager:
        seqs = [await manager.append(*LOG, {"n": n}) for n in (1, 2)]
        entries = [entry async for entry in manager.read_log(*LOG)]
        kept = [incident.kept for incident in manager.incidents()]
    tally.acknowledged += len(RECORDS) + 2
    tally.points += 1
    tally.faults += 1
    assert [entry.record for entry in entries[:5]] == RECORDS
    if tail == "without its newline":
        assert [entry.seq for entry in entries] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert entries[5].record == {"text": "x" * size}
        assert kept == []
    else:
        assert [entry.seq for entry in entries] == [1, 2, 3, 4, 5, *seqs]
        assert seqs == [6, 7]
        [place] = kept  # put aside once, whole
        assert place is not None
        assert (tmp_path / place).read_bytes() == added
    assert path.read_bytes().startswith(good)


@torn
async def test_a_tail_over_the_longest_line_is_kept_in_pieces(
    tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, with the limit brought down to where a test can reach it."""
    monkeypatch.setattr(logs, "MAX_LINE", 100_000)
    await damage.make(tmp_path, exclusive=False)
    path = tmp_path / EVENTS
    good, added = path.read_bytes(), b"\xff" * 250_001
    path.write_bytes(good + added)
    async with damage.manager_of(tmp_path, exclusive=False) as manager:
        await manager.append(*LOG, {"n": "after"})
        kept = [tmp_path / (incident.kept or "") for incident in manager.incidents()]
    assert b"".join(place.read_bytes() for place in kept) == added
    assert len(kept) == 3
    tally.points += 1
    tally.faults += 1


@pytest.mark.long("opens a directory for each byte")
@damaged
@pytest.mark.timeout(400)
@STORES
def test_a_journal_damaged_at_any_byte_loses_only_the_record_it_hit(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    """The segment of an owner that was really killed; opened by either store."""
    name = damage.killed(tmp_path / "origin", exclusive=True, count=GROUPS).name
    data = (tmp_path / "origin" / ".journal" / name).read_bytes()
    for what, bad in chain(
        damage.bytewise(data, 1 if full else 31), damage.wholesale(data), last_newline(data)
    ):
        root = damage.copy(tmp_path / "origin", tmp_path / f"{tally.points}")
        (root / ".journal" / name).write_bytes(bad)
        asyncio.run(journal_is_replayed(root, name, data, bad, exclusive, what, tally))
        tally.points += 1
    assert tally.clean()


def last_newline(data: bytes) -> Iterator[tuple[str, bytes]]:
    for bit in range(8):
        yield f"bit {bit} of the last newline", data[:-1] + bytes([data[-1] ^ (1 << bit)])
    yield "without its last newline", data[:-1]


async def journal_is_replayed(
    root: Path, name: str, data: bytes, bad: bytes, exclusive: bool, what: str, tally: Tally
) -> None:
    where = f"{what}: {bad!r}"
    must = surviving(data, bad)
    if len(bad) <= len(data) and bad[: len(data) - 1] == data[:-1] and GROUPS not in must:
        must.append(GROUPS)  # whole, whatever became of its newline
    relative = f".journal/{name}"
    report = await verify(root)
    async with damage.manager_of(root, exclusive=exclusive) as manager:
        found = await damage.contents(manager, root)
    tally.acknowledged += len(must)
    numbers = [state["n"] for (kind, _), state in sorted(found.states.items()) if kind == "notes"]
    tally.lost += len(set(must) - set(numbers))
    assert numbers == must, where
    assert [record["n"] for _, record in found.records] == must, where
    *whole, rest = bad.split(b"\n")
    hit = [line for line in whole if line not in data.split(b"\n")[:-1]]
    assert (relative in found.told) == bool(hit), where
    if hit:
        tally.faults += 1
        assert found.kept[relative] == bad, where
        assert relative in listed(report), where
    elif rest:
        assert ".journal" in listed(report), where
    assert not list((root / ".journal").glob("[!.]*")), where


@pytest.mark.long("opens a directory for each byte")
@damaged
@pytest.mark.timeout(400)
@STORES
def test_an_intent_damaged_at_any_byte_is_kept_and_its_documents_are_as_they_were(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    """The intent of a writer that was really killed before its first rename."""
    name = damage.killed(tmp_path / "origin", exclusive=False, count=1).name
    data = (tmp_path / "origin" / ".journal" / name).read_bytes()
    for what, bad in chain(
        [("whole", data)], damage.bytewise(data, 1 if full else 13), damage.wholesale(data)
    ):
        root = damage.copy(tmp_path / "origin", tmp_path / f"{tally.points}")
        (root / ".journal" / name).write_bytes(bad)
        asyncio.run(intent_is_completed_or_kept(root, name, data, bad, exclusive, what, tally))
        tally.points += 1
    assert tally.clean()


async def intent_is_completed_or_kept(
    root: Path, name: str, data: bytes, bad: bytes, exclusive: bool, what: str, tally: Tally
) -> None:
    where = f"{what}: {bad!r}"
    relative = f".journal/{name}"
    report = await verify(root)
    async with damage.manager_of(root, exclusive=exclusive) as manager:
        found = await damage.contents(manager, root)
        assert await manager.save("notes", "d1", {"n": 7}) > 1, where
    note = found.states["notes", ("d1",)]
    if bad.removesuffix(b"\n") == data.removesuffix(b"\n"):
        assert note["n"] == 1, where  # only its newline is gone: it is completed
        assert found.told == set(), where
    else:
        tally.faults += 1
        assert note == {"n": 0}, where
        assert found.kept[relative] == bad, where
        assert {relative, ".journal"} & listed(report), where
    assert not list((root / ".journal").glob("[!.]*")), where
    assert not list(root.rglob(".tmp-*")), where
