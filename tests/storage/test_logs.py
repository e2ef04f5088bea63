"""Logs on disk: torn anywhere, edited by hand, read from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import FileStateStore, StorageError, WALStateStore
from agent_state.protocols import LogRecord
from agent_state.storage import logs
from agent_state.storage.log_writer import LogWriter
from agent_state.testing import Fault, FaultyDisk
from agent_state.testing.contract_base import append, records_of

KEY = ("log",)


def record(seq: int, **content: Any) -> LogRecord:
    return LogRecord(seq, orjson.dumps(content or {"n": seq}, option=orjson.OPT_SORT_KEYS))


def lines_of(*records: LogRecord) -> bytes:
    return logs.encode_lines(KEY, records)


def log_at(path: Path) -> tuple[LogWriter, list[bytes]]:
    torn: list[bytes] = []
    return LogWriter(str(path), KEY, lambda data, _: torn.append(data)), torn


def numbers_in(path: Path) -> list[int]:
    return [orjson.loads(line)["_seq"] for line in path.read_bytes().split(b"\n")[:-1]]


@given(
    st.integers(1, 2**40),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text() | st.integers()),
    st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_a_line_gives_its_record_back(
    seq: int, content: dict[str, Any], dedupe: str | None
) -> None:
    try:
        body = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        return  # refused by the serialiser, long before
    if logs.RESERVED & content.keys():
        return
    line = logs.encode_lines(KEY, [LogRecord(seq, body, dedupe)])

    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert logs.decode_line(line[:-1], 0) == LogRecord(seq, body, dedupe)


@pytest.mark.parametrize("filler", [b"", b"\0" * 300, b"\xff" * 7, b'{"n":'])
def test_a_tail_torn_at_any_byte_costs_only_the_torn_record(tmp_path: Path, filler: bytes) -> None:
    whole = lines_of(record(1), record(2))
    third = logs.encode_lines(KEY, [record(3)])
    for cut in range(len(third)):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole + third[:cut] + filler)
        log, torn = log_at(path)

        log.append([record(log.tail().seq + 1, after=True)], sync=False)

        complete = cut == len(third) - 1 and not filler  # only its newline was missing
        assert numbers_in(path) == ([1, 2, 3, 4] if complete else [1, 2, 3])
        assert torn == ([] if complete or not cut + len(filler) else [third[:cut] + filler])


def test_the_first_record_may_be_torn_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(logs.encode_lines(KEY, [record(1)])[:9])
    log, torn = log_at(path)

    log.append([record(1)], sync=True)

    assert numbers_in(path) == [1]
    assert len(torn) == 1


def test_an_append_that_fails_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log, _ = log_at(path)
    log.append([record(1)], sync=True)
    before = path.read_bytes()

    for fault in (
        Fault(at=1, call="open"),
        Fault(at=1, call="write"),
        Fault(at=2, call="write"),
        Fault(at=1, call="fdatasync"),
    ):
        short = Fault(at=1, call="write", action="short")
        with FaultyDisk(fault, short), pytest.raises(StorageError):
            log.append([record(2), record(3)], sync=True)
        assert path.read_bytes() == before

    log.append([record(2)], sync=True)
    assert numbers_in(path) == [1, 2]


def test_an_append_reads_nothing_however_long_the_log(tmp_path: Path) -> None:
    log, _ = log_at(tmp_path / "log.jsonl")
    log.append([record(n, text="x" * 500) for n in range(1, 1001)], sync=False)

    with FaultyDisk() as disk:
        log.append([record(1001)], sync=False)

    assert disk.count("pread") == disk.count("read") == 0


@pytest.mark.parametrize("size", [10, 1000, 30_000, 70_000, 200_000])
def test_any_record_is_found_by_halving(tmp_path: Path, size: int) -> None:
    count = 200_000 // size + 40
    path = tmp_path / "log.jsonl"
    text = "x" * size
    path.write_bytes(lines_of(*(record(n, text=text) for n in range(1, count + 1))))

    for after in [0, 1, 2, count // 2, count - 2, count - 1, count, count + 9]:
        offset, previous, end = logs.seek(str(path), after=after)
        data = path.read_bytes()[offset:end]
        seqs = []
        for line in data.split(b"\n")[:-1]:
            previous = logs.decode_line(line, previous).seq
            seqs.append(previous)
        assert [seq for seq in seqs if seq > after] == list(range(after + 1, count + 1))
    assert logs.last_seq(str(path)) == count


def test_lines_a_person_wrote_count_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    by_hand = b'{"n":"by hand"}\n' * 3
    path.write_bytes(lines_of(record(1)) + by_hand + lines_of(record(5)) + by_hand)
    log, _ = log_at(path)

    assert log.tail().seq == 8
    log.append([record(9)], sync=False)
    assert logs.last_seq(str(path)) == 9


@pytest.mark.parametrize("after", [0, 300, 700, 702, 703, 704, 999])
def test_lines_a_person_wrote_into_a_long_log_are_numbered_from_anywhere(
    tmp_path: Path, after: int
) -> None:
    path = tmp_path / "log.jsonl"
    text = "x" * 900
    many = lines_of(*(record(n, text=text) for n in range(1, 701)))
    by_hand = b'{"text":"%b"}\n' % (b"y" * 900) * 3
    rest = lines_of(*(record(n, text=text) for n in range(704, 1001)))
    path.write_bytes(many + by_hand + rest)

    offset, previous, end = logs.seek(str(path), after=after)
    seqs = []
    for line in path.read_bytes()[offset:end].split(b"\n")[:-1]:
        previous = logs.decode_line(line, previous).seq
        seqs.append(previous)

    assert [seq for seq in seqs if seq > after] == list(range(after + 1, 1001))


@pytest.mark.parametrize("kind", [FileStateStore, WALStateStore])
@pytest.mark.parametrize("garbage", [b"garbage\n", b"\0\0\n", b'{"n":\n', b"[1]\n", b"\xff\n"])
async def test_garbage_in_the_middle_is_left_out_and_reported(
    tmp_path: Path, kind: type[FileStateStore], garbage: bytes
) -> None:
    store = kind(tmp_path)
    await store.open()
    for n in range(4):
        await store.commit([append("log", {"n": n})])
    await store.close()
    path = tmp_path / "notes" / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + garbage + b"".join(lines[1:]))

    await store.open()
    assert [each.seq for each in await records_of(store, "log")] == [1, 2, 3, 4]
    assert [each.seq for each in await records_of(store, "log", after=1)] == [2, 3, 4]
    assert await store.commit([append("log", {"n": 5})]) == [5]
    [incident] = store.incidents()
    await store.close()

    assert incident.path == "notes/log.jsonl"
    assert garbage in path.read_bytes()


async def test_a_torn_tail_is_kept_aside_and_reported(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    await store.open()
    await store.commit([append("log", {"n": 1})])
    with (tmp_path / "notes" / "log.jsonl").open("ab") as file:
        file.write(b'{"_seq":2,"n"')

    assert [each.seq for each in await records_of(store, "log")] == [1]
    assert await store.commit([append("log", {"n": 2})]) == [2]

    [incident] = store.incidents()
    assert incident.kept is not None
    assert (tmp_path / incident.kept).read_bytes() == b'{"_seq":2,"n"'
    await store.close()


async def test_a_record_a_person_changed_counts_as_it_is(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path)
    await store.open()
    await store.commit([append("log", {"n": 1}, "id")])
    path = tmp_path / "notes" / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"n":1', b'"n":7'))

    [found] = await records_of(store, "log")

    assert found == LogRecord(1, b'{"n":7}', "id")
    await store.close()


def test_the_ids_of_what_was_appended_here_are_not_read_again(tmp_path: Path) -> None:
    log, _ = log_at(tmp_path / "log.jsonl")
    for seq in range(1, 4):
        log.append([LogRecord(seq, b'{"n":1}', f"id {seq}")], sync=False)
    assert log.find("id 2") == 2
    with FaultyDisk() as disk:
        for seq in range(4, 10):
            log.append([LogRecord(seq, b'{"n":1}', f"id {seq}")], sync=False)
            assert log.find(f"id {seq}") == seq
    assert disk.count("pread") == 0


def test_ids_of_what_was_taken_back_or_replaced_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log, _ = log_at(path)
    log.append([LogRecord(1, b"{}", "one")], sync=False)
    assert log.find("one") == 1
    size = path.stat().st_size
    log.append([LogRecord(2, b"{}", "two")], sync=False)
    log.truncate(size)
    log.append([LogRecord(2, b'{"longer":"than before"}', "other")], sync=False)
    assert [log.find(name) for name in ("one", "two", "other")] == [1, None, 2]
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes().replace(b"one", b"uno"))
    other.rename(path)
    assert [log.find(name) for name in ("one", "uno")] == [None, 1]
