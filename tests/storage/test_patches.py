"""Large documents in the journal: what has changed of them, and nothing lost by that."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_state import (
    FileStateStore,
    StateCorruptedError,
    StatePersistenceManager,
    StorageFullError,
    WALStateStore,
)
from agent_state.encryption import Keyring, MasterKeys
from agent_state.protocols import Change, Document, StateStore
from agent_state.storage import patches, wal
from agent_state.storage.changes import (
    BodyPatch,
    Edit,
    Overlay,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    Superseded,
    decode_journal_record,
    decode_record,
    encode_changes,
    frame,
)
from agent_state.storage.patches import PatchEncoder, apply_edits, find_edits
from agent_state.storage.readonly_store import ReadOnlyStateStore
from agent_state.testing import Crash, Fault, FaultyDisk
from agent_state.testing.contract_base import body, content_of, delete, put
from agent_state.verify import verify

JOURNAL = ".journal"
BLOCK = 512
STORES = pytest.mark.parametrize("heir", [WALStateStore, FileStateStore])


def large(number: int, *, items: int = 60, name: str = "a") -> dict[str, Any]:
    """A document of about 100 bytes an item, of which each number changes a little."""
    random = Random(name)
    history = [{"n": n, "text": f"Grüße {random.random()} " * 3} for n in range(items)]
    added = [{"n": n, "text": f"added by {n}"} for n in range(number)]
    return {"history": history + added, "last": number, "name": name, "zzz": {"step": number}}


async def opened(root: Path, segment_bytes: int = wal.SEGMENT_BYTES) -> WALStateStore:
    store = WALStateStore(root, segment_bytes=segment_bytes)
    await store.open()
    return store


async def unsettled(root: Path, *commits: Sequence[Change]) -> Path:
    """A directory whose owner died right after its last commit; its only segment."""
    with FaultyDisk() as disk:
        store = await opened(root)
        for changes in commits:
            await store.commit(changes)
        disk.crash()
        with pytest.raises(Crash):
            await store.close()
    [segment] = (root / JOURNAL).glob("*.jsonl")
    return segment


async def contents(store: StateStore) -> dict[str, Any]:
    return {key[0]: await content_of(store, key) for key in await store.keys("notes")}


def operations(segment: Path) -> list[list[str]]:
    """What the records of a segment do to documents: put, patch or delete."""
    lines = segment.read_bytes().splitlines()
    return [[change["op"] for change in orjson.loads(line[9:])["changes"]] for line in lines]


# -- edits ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)
OBJECTS = st.dictionaries(st.text(), JSON)
PIECES = st.lists(
    st.sampled_from(["ä", "€", "😀", '"', ",", '{"role":"user"}', "x" * 40, "0123456789" * 5])
    | st.text(max_size=5)
)


def makes(old: bytes, new: bytes) -> None:
    """The edits make the new bytes, also after they were written and read."""
    edits = find_edits(old, new, 10**9)
    if edits is None:
        return  # more than there may be
    assert apply_edits(old, edits) == new
    document = Document("notes", ("a",), new, 2, "now", "notes/1")
    patch = BodyPatch(document, {}, "1@then", (1, crc32(old)), crc32(new), edits)
    [read] = decode_journal_record(frame(encode_changes([patch]))[:-1]).changes
    assert isinstance(read, BodyPatch)
    assert apply_edits(old, read.edits) == new
    assert (read.of, read.crc, read.base) == (patch.of, patch.crc, patch.base)


@given(OBJECTS, OBJECTS)
def test_the_edits_between_any_two_documents_make_the_second(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    makes(body(old), body(new))
    makes(body({"a": old, "b": 1, "c": new}), body({"a": old, "b": 2, "c": [new, old]}))


@given(PIECES, PIECES, PIECES, PIECES)
@example(["ä"], [], ["ö"], [])
@example(["x" * 40, "ä"], ["€"], ["€€"], ["ä", "x" * 40])
def test_the_edits_between_texts_with_much_in_common_make_the_second(
    start: list[str], old: list[str], new: list[str], end: list[str]
) -> None:
    first, second = "".join([*start, *old, *end]), "".join([*start, *new, *end])
    makes(first.encode(), second.encode())
    makes((first * 3).encode(), (first + second + first).encode())


@pytest.mark.parametrize("items", [60, 2000])
def test_the_edits_of_a_large_document_are_as_short_as_its_change(items: int) -> None:
    old, new = body(large(1, items=items)), body(large(2, items=items))
    edits = find_edits(old, new, len(new))
    assert edits is not None
    assert sum(len(text) for _, _, text in edits) < 300

    window = large(1, items=items)
    window["history"] = [*window["history"][5:], {"n": "new"}]
    edits = find_edits(old, body(window), len(old))
    assert edits is not None
    assert sum(len(text) for _, _, text in edits) < 300


def test_edits_that_are_as_long_as_the_document_are_none() -> None:
    old, new = body({"a": "x" * 5000}), body({"a": "y" * 5000})
    assert find_edits(old, new, len(new) // 4) is None


@pytest.mark.parametrize(
    "edits",
    [[(3, 9, "")], [(0, 2, "a"), (1, 0, "b")], [(9, 0, "")], [(-1, 0, "")], [(1, -1, "")]],
)
def test_edits_outside_of_the_document_are_refused(edits: list[Edit]) -> None:
    with pytest.raises(StateCorruptedError):
        apply_edits(b"12345", edits)


# -- records -------------------------------------------------------------------------------------


def version(name: str, revision: int, data: bytes, base: str = "") -> ResolvedPut:
    return ResolvedPut(Document("notes", (name,), data, revision, f"t{revision}", ""), {}, base)


@given(st.data())
def test_any_versions_are_read_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Large and small ones, removed ones, in groups: as if each record had them whole."""
    path = tmp_path_factory.mktemp("journal") / "1.jsonl"
    encoder = PatchEncoder()
    revisions: dict[str, int] = {}
    lines: list[bytes] = []
    expected = Overlay()
    for _ in range(data.draw(st.integers(1, 12))):
        group: list[ResolvedChange] = []
        for name in data.draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1)):
            if name in revisions and data.draw(st.integers(0, 7)) == 0:
                group.append(ResolvedDelete("notes", (name,), revisions.pop(name)))
                continue
            revisions[name] = revisions.get(name, 0) + 1
            text = data.draw(
                st.lists(st.sampled_from(["a" * 900, "ä" * 800, "😀" * 500]), max_size=9)
            )
            content = {"text": text, "n": data.draw(st.integers(0, 9))}
            group.append(version(name, revisions[name], body(content)))
        if data.draw(st.integers(0, 9)) == 0:
            encoder.clear()
        lines.append(frame(encoder.encode(group), 0))
        expected.add_record(group)
    path.write_bytes(b"".join(lines))

    segment = wal.read_segment(str(path))
    read = Overlay()
    for record in segment.records:
        read.add_record(record)

    assert segment.damaged == segment.torn == 0
    assert read.documents == expected.documents


def read_back(path: Path, *lines: bytes) -> wal.WalSegment:
    path.write_bytes(b"".join(lines))
    return wal.read_segment(str(path))


def test_a_patch_is_of_one_version_and_makes_one(tmp_path: Path) -> None:
    """Another revision, another body, another result, or no version at all: all are damage."""
    path = tmp_path / "1.jsonl"
    old, new = body(large(1)), body(large(2))
    encoder = PatchEncoder()
    first = frame(encoder.encode([version("a", 1, old)]), 0)
    second = frame(encoder.encode([version("a", 2, new)]), len(first))
    assert len(second) < len(first) / 8

    found = read_back(path, first, second)
    assert (found.damaged, len(found.records)) == (0, 2)
    for was, other in [
        (b'"of":[1,', b'"of":[2,'),
        (b'"crc":', b'"crc":1'),
        (b'"key":["a"]', b'"key":["b"]'),
        (b'"edits":[[', b'"edits":[[1'),
    ]:
        payload = second[9:-1].replace(was, other)
        assert payload != second[9:-1]
        found = read_back(path, first, b"%08x %b\n" % (crc32(payload), payload))
        assert (found.damaged, len(found.records)) == (1, 1), was
    for instead in (
        version("a", 1, body(large(3))),
        version("a", 2, old),
        ResolvedDelete("notes", ("a",), 1),
    ):
        line = frame(encode_changes([instead]), 0)
        assert read_back(path, line, second).damaged == 1, instead
    assert read_back(path, second).damaged == 1


def test_a_patch_that_makes_no_document_is_damage(tmp_path: Path) -> None:
    """Only a forged one does; the version before it stands."""
    old = b'{"a":1}'
    made = [(b'{"a":}', (5, 1, "")), (b'{"_id":1}', (2, 1, "_id")), (b' {"a":1}', (0, 0, " "))]
    for number, (new, edit) in enumerate(made):
        document = Document("notes", ("a",), new, 2, "now", "")
        patch = BodyPatch(document, {}, "", (1, crc32(old)), crc32(new), [edit])
        lines = [encode_changes([version("a", 1, old)]), encode_changes([patch])]
        found = read_back(tmp_path / f"{number}.jsonl", *map(frame, lines))
        assert found.damaged == 1
        [kept] = found.records[0]
        assert isinstance(kept, ResolvedPut)
        assert kept.document.body == old
        assert isinstance(found.records[1][0], Superseded)


def test_a_redo_record_has_no_patch() -> None:
    document = Document("notes", ("a",), b"", 2, "now", "")
    line = frame(encode_changes([BodyPatch(document, {}, "", (1, 0), 0, [])]))
    with pytest.raises(StateCorruptedError, match="stands alone"):
        decode_record(line[:-1])


def test_a_document_is_whole_again_every_so_often() -> None:
    encoder = PatchEncoder()
    same = {"text": "x" * 8000}
    lines = [encoder.encode([version("a", n, body({**same, "n": n}))]) for n in range(1, 300)]
    whole = [number for number, line in enumerate(lines) if b'"op":"put"' in line]
    assert whole == [0, 101, 202]

    encoder = PatchEncoder()
    text = ""
    total = 0
    for number in range(1, 200):
        text += Random(number).randbytes(400).hex()
        total += len(encoder.encode([version("a", number, body({"text": text}))]))
    assert total < 4 * len(text)


def test_many_versions_of_a_large_document_take_little_memory_to_read(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    encoder = PatchEncoder()
    text = "x" * 400_000
    bodies = [body({"n": n, "text": text}) for n in (1, 2)]
    with path.open("wb") as file:
        file.writelines(
            frame(encoder.encode([version("a", n, bodies[n % 2])])) for n in range(1, 90)
        )
    tracemalloc.start()
    try:
        segment = wal.read_segment(str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(segment.records) == 89
    assert peak < 89 * len(text) / 3


def test_a_segment_is_full_when_its_versions_take_long_to_make(tmp_path: Path) -> None:
    log = wal.WriteAheadLog(str(tmp_path), sync=False)
    for number in range(1, 20):
        log.append([[version("a", number, body({"n": number, "text": "x" * 10_000}))]])
        assert log.is_longer(20_000) == (number > 15)
    assert log.size < 20_000
    log.close()
    assert not log.is_longer(0)


# -- stores --------------------------------------------------------------------------------------


@STORES
async def test_a_large_document_costs_its_change_and_is_there_after_a_crash(
    heir: type[FileStateStore], tmp_path: Path
) -> None:
    commits = [[put("a", large(n))] for n in range(30)]
    segment = await unsettled(tmp_path, *commits)
    assert operations(segment) == [["put"], *[["patch"]] * 29]
    size = len(commits[-1][0].body)
    assert segment.stat().st_size < 3 * size

    reader = ReadOnlyStateStore(tmp_path)
    await reader.open()
    assert await contents(reader) == {"a": large(29)}
    await reader.close()
    report = await verify(tmp_path)
    assert report.problems == []
    store = heir(tmp_path)
    await store.open()
    assert await contents(store) == {"a": large(29)}
    assert store.incidents() == []
    found = await store.get("notes", ("a",))
    assert found is not None
    assert (found.revision, found.body) == (30, commits[-1][0].body)
    await store.close()


async def test_groups_deletes_and_small_versions_between_patches(tmp_path: Path) -> None:
    segment = await unsettled(
        tmp_path,
        [put("a", large(1)), put("b", large(1, name="b"))],
        [put("a", large(2)), put("c", {"n": 1}), put("b", large(2, name="b"))],
        [put("a", {"small": True})],
        [put("a", large(3)), delete("b")],
        [put("a", large(4)), put("b", large(3, name="b"))],
        [put("a", large(5)), put("a", large(6))],
    )
    assert operations(segment) == [
        ["put", "put"],
        ["patch", "put", "patch"],
        ["put"],
        ["put", "delete"],
        ["patch", "put"],
        ["patch", "patch"],
    ]
    store = await opened(tmp_path)
    assert await contents(store) == {"a": large(6), "b": large(3, name="b"), "c": {"n": 1}}
    assert store.incidents() == []
    await store.close()


async def test_damage_costs_the_patches_of_its_documents_up_to_the_next_whole_version(
    tmp_path: Path,
) -> None:
    """And is reported; no version is made of another than its own."""
    segment = await unsettled(
        tmp_path / "origin",
        [put("a", large(1)), put("b", large(1, name="b"))],
        [put("a", large(2))],
        [put("a", large(3))],
        [put("b", large(2, name="b"))],
        [put("a", {"small": True}), put("c", {"n": 1})],
        [put("a", large(4))],
    )
    lines = segment.read_bytes().splitlines(keepends=True)
    lost: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1]):
        root = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "origin", root)
        torn = line[:40] + b"\xff" + line[41:]
        changed = b"".join([*lines[:number], torn, *lines[number + 1 :]])
        (root / JOURNAL / segment.name).write_bytes(changed)
        assert (await verify(root)).problems != []
        store = await opened(root)
        lost.append(await contents(store))
        [incident] = store.incidents()
        assert "cannot be read" in incident.what
        await store.close()

    a, b, c = large(4), large(2, name="b"), {"n": 1}
    first_b = large(1, name="b")
    assert lost == [
        {"a": a, "c": c},  # b has had no other whole version
        {"a": a, "b": b, "c": c},
        {"a": a, "b": b, "c": c},
        {"a": a, "b": first_b, "c": c},
        {"a": a, "b": b},
    ]


@STORES
async def test_any_blocks_of_an_unconfirmed_batch_of_patches_may_be_missing(
    heir: type[FileStateStore], tmp_path: Path
) -> None:
    """A power cut: what was acknowledged is there, and of the rest only whole groups."""
    store = WALStateStore(tmp_path / "origin")
    await store.open()
    await store.close()
    log = wal.WriteAheadLog(str(tmp_path / "origin" / JOURNAL), sync=True)

    def group(n: int) -> list[ResolvedChange]:
        return [version(name, n, body(large(n, name=name)), f"{n - 1}@t{n - 1}") for name in "ab"]

    log.append([group(1)])
    log.append([group(2), group(3)])
    start = log.size
    log.append([group(4), group(5), group(6)])
    log.close()
    [segment] = (tmp_path / "origin" / JOURNAL).glob("*.jsonl")
    data = segment.read_bytes()
    for block in range(start // BLOCK, len(data) // BLOCK + 1):
        root = tmp_path / "copy"
        shutil.copytree(tmp_path / "origin", root)
        left = bytearray(data)
        first, end = max(block * BLOCK, start), min((block + 1) * BLOCK, len(data))
        left[first:end] = bytes(end - first)
        (root / JOURNAL / segment.name).write_bytes(left)
        heirs = heir(root)
        await heirs.open()
        found = await contents(heirs)
        assert heirs.incidents() == []
        await heirs.close()
        shutil.rmtree(root)
        whole = bytes(left[: first + (first == len(data) - 1)]).count(b"\n")
        assert whole >= 3
        assert found == {name: large(whole, name=name) for name in "ab"}


async def test_a_hole_before_a_confirmed_patch_is_damage(tmp_path: Path) -> None:
    """A later batch was begun, so what is missing was acknowledged, though its patch fits not."""
    log = wal.WriteAheadLog(str(tmp_path), sync=False)
    sizes = []
    for number in range(1, 5):
        log.append([[version("a", number, body(large(number)))]])
        sizes.append(log.size)
    log.close()
    [path] = tmp_path.glob("*.jsonl")
    data = bytearray(path.read_bytes())
    data[sizes[1] : sizes[2] - 1] = bytes(sizes[2] - 1 - sizes[1])
    block = -(-sizes[1] // BLOCK) * BLOCK
    data[sizes[1] : block] = path.read_bytes()[sizes[1] : block]
    path.write_bytes(data)

    found = wal.read_segment(str(path))

    assert found.damaged == 2  # it, and the one that was made from it
    assert found.torn == 0
    assert len(found.records) == 2


async def test_after_a_failed_fsync_the_new_segment_needs_no_other(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.commit([put("a", large(1)), put("b", large(1, name="b"))])
    await store.commit([put("a", large(2))])
    with FaultyDisk(Fault(at=1, call="fdatasync")) as disk:
        await store.commit([put("a", large(3))])
        await store.commit([put("a", large(4)), put("b", large(2, name="b"))])
        segments = sorted((tmp_path / JOURNAL).glob("*.jsonl"))
        disk.crash()
        with pytest.raises(Crash):
            await store.close()
    assert operations(segments[1]) == [["put"], ["put"], ["patch"], ["patch", "patch"]]
    segments[0].unlink()

    store = await opened(tmp_path)
    assert await contents(store) == {"a": large(4), "b": large(2, name="b")}
    await store.close()


@pytest.mark.parametrize("action", ["fail", "short"])
async def test_after_a_full_disk_a_patch_is_made_of_what_is_there(
    tmp_path: Path, action: str
) -> None:
    full = Fault(
        at=2 if action == "short" else 1, call="write", error=errno.ENOSPC, persistent=True
    )
    short = Fault(at=1, call="write", action="short")
    store = await opened(tmp_path)
    await store.commit([put("a", large(1))])
    faults = [short, full] if action == "short" else [full]
    with FaultyDisk(*faults), pytest.raises(StorageFullError):
        await store.commit([put("a", large(2))])
    with FaultyDisk() as disk:
        await store.commit([put("a", large(3))])
        await store.commit([put("a", large(4))])
        [segment] = (tmp_path / JOURNAL).glob("*.jsonl")
        disk.crash()
        with pytest.raises(Crash):
            await store.close()
    assert operations(segment)[-2:] == [["put"], ["patch"]]

    store = await opened(tmp_path)
    assert await contents(store) == {"a": large(4)}
    assert store.incidents() == []
    await store.close()


async def test_each_segment_has_its_documents_whole(tmp_path: Path) -> None:
    """Rotation: what is in its file goes, and no patch needs it."""
    store = await opened(tmp_path, segment_bytes=20_000)
    for number in range(1, 80):
        await store.commit([put("a", large(number)), put("b", large(number, name="b"))])
        if number % 20 == 0:
            await store.flush()
            assert list((tmp_path / JOURNAL).glob("[!.]*")) == []
        elif number % 20 == 1:
            [segment] = (tmp_path / JOURNAL).glob("*.jsonl")
            assert operations(segment)[0] == ["put", "put"]
    await store.close()
    store = await opened(tmp_path)
    assert await contents(store) == {"a": large(79), "b": large(79, name="b")}
    await store.close()


async def test_many_that_save_large_documents_at_once(tmp_path: Path) -> None:
    names = "abcdefghij"
    with FaultyDisk() as disk:
        store = await opened(tmp_path)

        async def save(name: str) -> None:
            for number in range(12):
                await store.commit([put(name, large(number, name=name))])

        await asyncio.gather(*map(save, names))
        disk.crash()
        with pytest.raises(Crash):
            await store.close()
    store = await opened(tmp_path)
    assert await contents(store) == {name: large(11, name=name) for name in names}
    assert store.incidents() == []
    await store.close()


async def test_an_encrypted_document_is_whole_in_each_record(tmp_path: Path) -> None:
    """Two of its versions have nothing in common that could be seen, and none is looked for."""
    keyring = Keyring(tmp_path / "keys", MasterKeys(lambda: [b"m" * 32]))
    store = WALStateStore(tmp_path / "state")
    with FaultyDisk() as disk:
        manager = StatePersistenceManager(store=store, encryption=keyring)
        await manager.open()
        for number in range(4):
            await manager.save("notes", "a", large(number))
        [segment] = (tmp_path / "state" / JOURNAL).glob("*.jsonl")
        disk.crash()
        with pytest.raises(Crash):
            await manager.close()
    assert operations(segment)[-4:] == [["put"]] * 4
    async with StatePersistenceManager(tmp_path / "state", encryption=keyring) as manager:
        loaded = await manager.load("notes", "a")
    assert loaded is not None
    assert loaded.model_dump()["last"] == 3


def test_a_short_body_is_not_compared() -> None:
    encoder = PatchEncoder()
    text = "x" * (patches.MIN_BODY - 20)
    lines = [encoder.encode([version("a", n, body({"n": n, "t": text}))]) for n in (1, 2)]
    assert b'"op":"put"' in lines[1]
