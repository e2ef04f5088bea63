"""Lines that a person, another program or git puts into logs are taken in and numbered."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import FileStateStore, StatePersistenceManager, WALStateStore
from agent_state.protocols import Append, LogRecord, StateStore
from agent_state.storage import ReadOnlyStateStore, logs
from agent_state.verify import verify

STORES: dict[str, type[FileStateStore | WALStateStore]] = {
    "shared": FileStateStore,
    "exclusive": WALStateStore,
}
KEY = ("alice", "log")


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StateStore]:
    store = STORES[request.param](tmp_path)
    await store.open()
    yield store
    await store.close()


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "notes/alice/log.jsonl"


async def add(store: StateStore, *names: str) -> list[int]:
    changes = [Append("notes", KEY, orjson.dumps({"i": name}), None) for name in names]
    return [(await store.commit([change]))[0] for change in changes]


async def read(store: StateStore, **bounds: int) -> list[tuple[int, Any]]:
    found = store.read_log("notes", KEY, **bounds)
    return [(record.seq, orjson.loads(record.body).get("i")) async for record in found]


def write_outside(tmp_path: Path, text: str | bytes) -> None:
    with file_of(tmp_path).open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def line(seq: int, name: str) -> bytes:
    return logs.encode_lines(KEY, [LogRecord(seq, orjson.dumps({"i": name}))])


def numbered(*names: str, first: int = 1) -> list[tuple[int, str]]:
    return [*enumerate(names, first)]


async def reopened(store: StateStore, tmp_path: Path) -> list[tuple[int, Any]]:
    """What each kind of store reads after a restart; they agree."""
    await store.close()
    found = []
    for kind in (ReadOnlyStateStore, FileStateStore, WALStateStore):
        again: Any = kind(tmp_path)
        await again.open()
        found.append(await read(again))
        await again.close()
    assert found[0] == found[1] == found[2]
    return found[0]


# -- lines that were added while the store is open ---------------------------------------------


@pytest.mark.parametrize("flushed", [True, False])
async def test_a_line_from_outside_is_taken_in_and_the_next_appends_follow_it(
    store: StateStore, tmp_path: Path, flushed: bool
) -> None:
    assert await add(store, "one") == [1]
    await store.flush()
    write_outside(tmp_path, '{"i":"hand"}\n')

    assert await add(store, "two", "three") == [3, 4]
    if flushed:
        await store.flush()

    everything = numbered("one", "hand", "two", "three")
    assert await read(store) == everything
    assert await read(store, after=1) == everything[1:]
    assert await read(store, last=2) == everything[2:]
    assert await reopened(store, tmp_path) == everything
    assert (await verify(tmp_path)).ok


@pytest.mark.parametrize("outside", ['{"i":"hand"}\n', '\ufeff{"_seq":400,"i":"hand"}'])
async def test_records_with_dedupe_keys_follow_a_line_from_outside(
    store: StateStore, tmp_path: Path, outside: str
) -> None:
    """Looking for the key had read the file, so that the line was not news to the commit."""
    await add(store, "one")
    await store.flush()
    write_outside(tmp_path, outside)

    for name in ("two", "three"):
        await store.commit([Append("notes", KEY, orjson.dumps({"i": name}), name)])

    await store.flush()
    found = await read(store)
    assert [name for _, name in found] == ["one", "hand", "two", "three"]
    assert store.incidents() == []
    assert await reopened(store, tmp_path) == found


async def test_an_empty_line_is_no_damage(store: StateStore, tmp_path: Path) -> None:
    await add(store, "one")
    await store.flush()
    write_outside(tmp_path, '\n\r\n{"i":"hand"}\n \t\n')
    await add(store, "two")
    await store.flush()

    assert await read(store) == numbered("one", "hand", "two")
    assert store.incidents() == []
    found = await verify(tmp_path)
    assert found.ok
    assert "lines 2, 3, 4, 5" in found.notices[0].why


@pytest.mark.parametrize("exclusive", [False, True])
async def test_a_line_under_the_name_for_encrypted_ones_hides_no_other(
    tmp_path: Path, exclusive: bool
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.append("notes", KEY, {"i": "one"})
        await manager.flush()
        write_outside(tmp_path, '{"i":"hand","_sealed":"0.1.x"}\n')
        await manager.append("notes", KEY, {"i": "two"})
        entries = [entry async for entry in manager.read_log("notes", KEY)]
        assert [(entry.seq, entry.record["i"]) for entry in entries] == [(1, "one"), (3, "two")]
        [incident] = manager.incidents()
        assert "record 2" in incident.what


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_any_number_of_lines_costs_no_append(
    store: StateStore, tmp_path: Path, count: int
) -> None:
    await add(store, "one")
    await store.flush()
    hand = [f"hand {number}" for number in range(count)]
    write_outside(tmp_path, "".join(json.dumps({"i": name}) + "\n" for name in hand))

    ours = [f"ours {number}" for number in range(count + 3)]
    await add(store, *ours)

    assert await reopened(store, tmp_path) == numbered("one", *hand, *ours)


async def test_a_line_with_a_high_number_is_counted_on_from(
    store: StateStore, tmp_path: Path
) -> None:
    await add(store, "one")
    await store.flush()
    write_outside(tmp_path, '{"_seq":50,"i":"far"}\n')

    assert await add(store, "two", "three") == [51, 52]
    assert await reopened(store, tmp_path) == [(1, "one"), (50, "far"), (51, "two"), (52, "three")]


@pytest.mark.parametrize("stated", ['"_seq":1,', '"_seq":2,', '"_seq":0,', '"_seq":"x",', ""])
async def test_appends_made_before_the_files_are_written_keep_their_numbers(
    tmp_path: Path, stated: str
) -> None:
    """The line comes between the acknowledgement and the write-back."""
    store = WALStateStore(tmp_path)
    await store.open()
    await add(store, "one")
    await store.flush()
    async with store._writing().lock:  # no write-back meanwhile
        assert await add(store, "two", "three") == [2, 3]
        write_outside(tmp_path, f'{{{stated}"i":"hand"}}\n')
        seen = await read(store)
    assert [name for _, name in seen].count("hand") == 1
    assert {"one", "two", "three"} <= {name for _, name in seen}
    await store.flush()

    after = [(1, "one"), (2, "two"), (3, "three"), (4, "hand")]
    assert await read(store) == after
    assert await add(store, "four") == [5]
    assert await reopened(store, tmp_path) == [*after, (5, "four")]
    assert (await verify(tmp_path)).ok


async def test_a_crash_after_such_a_line_costs_neither_it_nor_what_was_acknowledged(
    tmp_path: Path,
) -> None:
    store = WALStateStore(tmp_path)
    await store.open()
    await add(store, "one")
    await store.flush()
    async with store._writing().lock:
        await add(store, "two", "three")
        write_outside(tmp_path, '{"i":"hand"}\n{"i":"other"}\n')
        store._abandon()  # as a kill does: nothing is written back

        again = ReadOnlyStateStore(tmp_path)
        await again.open()
        before_start = await read(again)
        await again.close()
    later = WALStateStore(tmp_path)
    await later.open()
    everything = numbered("one", "two", "three", "hand", "other")
    assert await read(later) == everything
    assert sorted(name for _, name in before_start) == sorted(name for _, name in everything)
    assert await add(later, "four") == [6]
    await later.close()


async def test_lines_that_come_all_the_time_cost_no_append(
    store: StateStore, tmp_path: Path
) -> None:
    await add(store, "begin")
    await store.flush()
    over = asyncio.Event()

    async def meddle() -> int:
        count = 0
        while not over.is_set():
            await asyncio.to_thread(write_outside, tmp_path, json.dumps({"i": f"h{count}"}) + "\n")
            count += 1
            await asyncio.sleep(0.003)
        return count

    meddling = asyncio.create_task(meddle())
    ours = [f"o{number}" for number in range(300)]
    for start in range(0, 300, 10):
        await asyncio.gather(*(add(store, name) for name in ours[start : start + 10]))
        await asyncio.sleep(0.004)
    over.set()
    count = await meddling

    found = await reopened(store, tmp_path)
    assert sorted(name for _, name in found) == sorted(
        ["begin", *ours, *(f"h{number}" for number in range(count))]
    )
    numbers = [seq for seq, _ in found]
    assert numbers == sorted(set(numbers))


async def test_a_dedupe_key_in_an_outside_line_is_known(store: StateStore, tmp_path: Path) -> None:
    await store.commit([Append("notes", KEY, b'{"i":"one"}', "a")])
    await store.flush()
    write_outside(tmp_path, '{"_dedupe":"b","i":"hand"}\n')

    again = Append("notes", KEY, b'{"i":"twice"}', "b")
    fresh = Append("notes", KEY, b'{"i":"new"}', "c")
    assert await store.commit([again, fresh]) == [2, 3]


async def test_a_group_that_appends_is_whole_beside_an_outside_line(
    store: StateStore, tmp_path: Path
) -> None:
    await add(store, "one")
    await store.flush()
    write_outside(tmp_path, '{"i":"hand"}\n')

    two = [Append("notes", KEY, orjson.dumps({"i": name}), None) for name in ("two", "three")]
    assert await store.commit(two) == [3, 4]
    assert await reopened(store, tmp_path) == numbered("one", "hand", "two", "three")


# -- logs that git has merged ------------------------------------------------------------------

MERGED = [
    [(1, "a"), (2, "b"), (3, "left"), (4, "left 2"), (3, "right"), (4, "right 2")],
    [(1, "a"), (2, "l"), (3, "m"), (4, "n"), (2, "r")],
    [(1, "a"), (1, "b"), (1, "c")],
    [(5, "a"), (6, "b"), (2, "c"), (3, "d"), (9, "e")],
]


@pytest.mark.parametrize("padding", [0, 60_000])
@pytest.mark.parametrize("merged", MERGED)
async def test_repeated_numbers_are_counted_on_and_no_reader_misses_a_record(
    store: StateStore,
    tmp_path: Path,
    merged: list[tuple[int, str]],
    padding: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file_of(tmp_path).parent.mkdir(parents=True)
    body = {"pad": "x" * padding} if padding else {}
    file_of(tmp_path).write_bytes(
        b"".join(
            logs.encode_lines(KEY, [LogRecord(seq, orjson.dumps({"i": name, **body}))])
            for seq, name in merged
        )
    )
    expected = list[tuple[int, str]]()
    for seq, name in merged:
        last = expected[-1][0] if expected else 0
        expected.append((seq if seq > last else last + 1, name))

    assert await read(store) == expected
    for seq, _ in expected:
        assert await read(store, after=seq) == [each for each in expected if each[0] > seq]
    for last in range(1, len(expected) + 1):
        bound = expected[-1][0] - last
        assert await read(store, last=last) == [each for each in expected if each[0] > bound]

    with caplog.at_level(logging.WARNING, "agent_state.storage"):
        assert await add(store, "next", "after") == [expected[-1][0] + 1, expected[-1][0] + 2]
        await store.flush()
    everything = [*expected, (expected[-1][0] + 1, "next"), (expected[-1][0] + 2, "after")]
    assert await read(store) == everything
    told = [each.what for each in store.incidents() if "number" in each.what]
    assert len(told) == 1, told
    assert await reopened(store, tmp_path) == everything
    report = await verify(tmp_path)
    assert report.ok
    assert {each.fault for each in report.notices} <= {"gap"}
    stated = [orjson.loads(each)["_seq"] for each in file_of(tmp_path).read_bytes().splitlines()]
    assert stated == [seq for seq, _ in everything]


@given(st.lists(st.integers(1, 12) | st.none(), min_size=1, max_size=12))
def test_reading_from_anywhere_agrees_with_reading_it_all(stated: Sequence[int | None]) -> None:
    previous, numbers = 0, list[int]()
    for seq in stated:
        number = logs.decode_line(orjson.dumps({"_seq": seq, "i": 1}), previous).seq
        assert number > previous
        assert number == (seq if seq is not None and seq > previous else previous + 1)
        numbers.append(number)
        previous = number
    assert numbers == sorted(set(numbers))


# -- a last line without its newline, and bytes around a record --------------------------------


async def test_a_whole_record_without_its_newline_is_a_record(
    store: StateStore, tmp_path: Path
) -> None:
    await add(store, "one")
    await store.flush()
    write_outside(tmp_path, '{"i":"hand"}')

    assert await read(store) == numbered("one", "hand")
    assert await read(store, last=1) == [(2, "hand")]
    assert await read(store, after=1) == [(2, "hand")]
    report = await verify(tmp_path)
    assert report.records["notes"] == 2
    assert await add(store, "two") == [3]
    assert await reopened(store, tmp_path) == numbered("one", "hand", "two")


async def test_only_a_torn_line_at_the_end_is_no_record(store: StateStore, tmp_path: Path) -> None:
    await add(store, "one")
    await store.flush()
    write_outside(tmp_path, '{"i":"ha')

    assert await read(store) == numbered("one")
    assert await read(store, last=1) == numbered("one")
    assert await add(store, "two") == [2]
    assert await reopened(store, tmp_path) == numbered("one", "two")


@pytest.mark.parametrize(
    "first",
    [
        b'\xef\xbb\xbf{"_seq":1,"i":"one"}\n',
        b'\0\0\0{"_seq":1,"i":"one"}\n',
        b'{"_seq":1,"i":"one"}\0\0\0\n',
        b'\xef\xbb\xbf{"_seq":1,"i":"one"}\r\n',
    ],
)
async def test_a_byte_order_mark_or_nuls_around_a_record_cost_nothing(
    store: StateStore, tmp_path: Path, first: bytes
) -> None:
    file_of(tmp_path).parent.mkdir(parents=True)
    file_of(tmp_path).write_bytes(first + b'\0{"i":"two"}\0\n{"i":"three"}\0\0\n')

    assert await read(store) == numbered("one", "two", "three")
    assert await add(store, "four") == [4]
    assert await reopened(store, tmp_path) == numbered("one", "two", "three", "four")


async def test_half_a_surrogate_pair_in_an_outside_line_is_replaced_and_told(
    store: StateStore, tmp_path: Path
) -> None:
    file_of(tmp_path).parent.mkdir(parents=True)
    file_of(tmp_path).write_bytes(b'{"i":"half \\ud83d"}\n{"i":"whole \\ud83d\\ude00"}\n')

    assert await read(store) == numbered("half �", "whole \U0001f600")
    await add(store, "three")
    assert (await reopened(store, tmp_path))[0] == (1, "half �")
    assert store.incidents() == []
