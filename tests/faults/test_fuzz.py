"""T13: a fuzzer at every reader of bytes from the disk. Only our own errors may come out.

What is read must also be written and read back as it was. On a failure the test says the seed,
the number of the input and the input itself.
"""

from __future__ import annotations

import asyncio
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import orjson
import pytest

from agent_state import AgentStateError, StatePersistenceManager
from agent_state.cli.inspector import open_inspector
from agent_state.cli.overview import PlainReader, read_agents
from agent_state.codec import Codec
from agent_state.protocols import Document, LogRecord
from agent_state.storage import changes, group_writer, logs, paths, wal
from agent_state.storage.changes import id_of
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document import decode_document, encode_document, key_of
from agent_state.storage.inspection import check_journal, check_log
from agent_state.storage.log_writer import LogWriter
from agent_state.storage.patches import PatchEncoder
from agent_state.verify import verify
from tests.faults.fuzzing import Mutator, batches
from tests.faults.tally import Tally

pytestmark = pytest.mark.proof("T13", "a fuzzer at every reader of bytes from the disk")

SEED = "hostile"
SLOWEST = 5.0
LARGEST = 64 * 1024 * 1024

STATES: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "agents": (
        ("alice",),
        {
            "agent_id": "alice",
            "status": "idle",
            "context": {"conversation_history": [{"role": "user", "content": "é"}]},
            "counters": {"turns": 3},
        },
    ),
    "tasks": (
        ("alice", "t1"),
        {
            "task_id": "t1",
            "agent_id": "alice",
            "attempts": 1,
            "payload": {"n": 1.5},
            "lease": {"owner": "x", "expires_at": "2026-01-01T00:00:00.000000Z"},
            "steps": {"one": {"status": "done", "result": [1, None]}},
            "timeout_seconds": 2.5,
        },
    ),
    "sleep": (("alice",), {"agent_id": "alice", "wake_events": ["mail_received"]}),
    "mail": (
        ("alice", "m1"),
        {"message_id": "m1", "from_agent": "bob", "to_agent": "alice", "body": "hello"},
    ),
    "system": (("runtime",), {"status": "running"}),
}


def documents() -> list[tuple[str, tuple[str, ...], bytes]]:
    codec = Codec()
    found = []
    for kind, (key, state) in STATES.items():
        put = codec.put(kind, key, state, None)
        document = Document(kind, key, put.body, 3, "2026-01-01T00:00:00Z", put.schema)
        found.append((kind, key, encode_document(document, put.meta)))
    return found


def log_lines() -> list[bytes]:
    found = [LogRecord(n, orjson.dumps({"n": n, "text": "é" * n})) for n in range(1, 9)]
    return [logs.encode_lines(("log",), [each]) for each in (*found, LogRecord(9, b"{}", "once"))]


def journal_lines() -> list[bytes]:
    puts: list[changes.ResolvedChange] = [
        changes.ResolvedPut(decode_document(kind, key, data)[0], {"_session_id": "alice"})
        for kind, key, data in documents()
    ]
    append = changes.ResolvedAppend("events", ("log",), LogRecord(4, b'{"n":4}', "four"))
    delete = changes.ResolvedDelete("agents", ("alice",), 3)
    groups: list[list[changes.ResolvedChange]] = [
        [*puts, append],
        [delete, append],
        *([put] for put in puts),
    ]
    return [
        changes.frame(changes.encode_changes(group), 1000 * n or None)
        for n, group in enumerate(groups)
    ]


def segment_lines() -> list[bytes]:
    """``journal_lines``, and a document that is patched."""
    encoder = PatchEncoder()
    puts = [
        changes.ResolvedPut(
            Document("notes", ("n",), orjson.dumps({"n": n, "text": "é" * 5000}), n, "", "")
        )
        for n in range(1, 5)
    ]
    return [*journal_lines(), *(changes.frame(encoder.encode([put]), 0) for put in puts)]


class Targets:
    """Each takes one input as far as a reader of it goes."""

    def __init__(self, folder: Path, mutator: Mutator) -> None:
        self.codec = Codec()
        self.mutator = mutator
        self.path = str(folder / "log.jsonl")
        self.directory = StateDirectory(str(folder / "state"), sync=False, now=lambda: "now")
        self.directory.prepare()
        self.number = 0

    def document(self, data: bytes) -> None:
        kind = kind_of(data, self.mutator.random)
        key, _ = STATES[kind]
        document, meta = decode_document(kind, key, data)
        again, meta_again = decode_document(kind, key, encode_document(document, meta))
        assert (again.body, again.revision, again.saved_at, again.schema, again.edited) == (
            *(document.body, document.revision, document.saved_at, document.schema),
            False,
        )
        assert meta_again == meta
        loaded = self.codec.load(document)
        try:
            put = self.codec.put(kind, key, loaded.state, None, schema=loaded.schema)
        except AgentStateError as error:
            raise AssertionError(f"read, and refused when saved: {error}") from error
        back = self.codec.load(Document(kind, key, put.body, 4, "", put.schema))
        assert back.state == loaded.state

    def key(self, data: bytes) -> None:
        key_of(data)

    def line(self, data: bytes) -> None:
        record = logs.decode_line(data, 41)
        line = logs.encode_lines(("log",), [record])
        assert logs.decode_line(line[:-1], 0) == record

    def record(self, data: bytes) -> None:
        done, batch, checked = changes.decode_record(data.removesuffix(b"\n"))
        again = changes.frame(changes.encode_changes(done, checked), batch)
        assert changes.decode_record(again[:-1]) == (done, batch, checked)
        for change in done:
            kind, key = id_of(change)
            inside = os.path.normpath(self.directory.tree.path(kind, key))
            folder = paths.folder_of(kind, key)
            assert inside.startswith(f"{self.directory.root}/{folder}/")
            if isinstance(change, changes.ResolvedPut):
                encode_document(change.document, change.meta)
            elif isinstance(change, changes.ResolvedAppend):
                logs.encode_lines(key, [change.record])

    def log(self, data: bytes) -> None:
        write(self.path, data)
        check = check_log(self.path)
        random = self.mutator.random
        offset, _, end = logs.seek(self.path, after=random.randrange(12))
        assert 0 <= offset <= end <= len(data)
        logs.seek(self.path, last=random.randrange(4))
        torn: list[bytes] = []
        log = LogWriter(self.path, ("log",), lambda bad, _: torn.append(bad))
        log.ids()
        seq = log.tail().seq + 1
        assert seq == logs.last_seq(self.path) + 1
        log.append([LogRecord(seq, b'{"after":true}')], sync=False)
        now = Path(self.path).read_bytes()
        unended = b"\n" if check.unended else b""
        added = logs.encode_lines(("log",), [LogRecord(seq, b'{"after":true}')])
        whole = data[: len(data) - len(b"".join(torn))]
        assert data == whole + b"".join(torn)
        assert now == whole + unended + added

    def segment(self, data: bytes) -> None:
        write(self.path, data)
        segment = wal.read_segment(self.path)
        for record in segment.records:
            done = [each for each in record if not isinstance(each, changes.Superseded)]
            line = changes.frame(changes.encode_changes(done))
            assert changes.decode_record(line[:-1]).changes == done

    def intent(self, data: bytes) -> None:
        """Looked at by a reader, then completed by a writer. No intent's name comes twice."""
        self.number += 1
        write(f"{self.directory.root}/.journal/intent-{self.number:016x}.jsonl", data)
        check_journal(self.directory)
        for path in group_writer.records_of(self.directory, {("agents", ("alice",)): False}):
            group_writer.complete(self.directory, path)
        group_writer.complete_all(self.directory)
        assert nothing_in(f"{self.directory.root}/.journal")

    def name(self, data: bytes) -> None:
        name = data.decode(errors="surrogatepass")
        for directory in (False, True):
            ident = paths.decode(name, directory=directory)
            if ident is not None:
                assert paths.encode(ident, directory=directory) == name
        try:
            encoded = paths.encode(name)
        except AgentStateError:
            return
        assert "/" not in encoded
        assert encoded not in (".", "..")
        assert len(encoded) <= paths.MAX_NAME_BYTES
        assert paths.decode(encoded) in (name, None if not paths.carries(encoded) else name)


def kind_of(data: bytes, random: Random) -> str:
    """Where an input is dropped: mostly where it was made for."""
    said = [kind for kind in STATES if f'"{kind}/1"'.encode() in data]
    return said[0] if said and random.random() < 0.9 else random.choice(list(STATES))


def write(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


def nothing_in(folder: str) -> bool:
    return next(Path(folder).glob("[!.]*"), None) is None


def surface(name: str) -> tuple[Sequence[bytes], Callable[[Mutator], bytes]]:
    """The good inputs of a target, and how bad ones are made from them."""
    documented = [data for _, _, data in documents()]
    return {
        "document": (documented, Mutator.document),
        "key": (documented, Mutator.document),
        "line": (log_lines(), Mutator.line),
        "record": (journal_lines(), Mutator.record),
        "log": (log_lines(), lambda mutator: mutator.lines(mutator.line)),
        "segment": (segment_lines(), lambda mutator: mutator.lines(mutator.record)),
        "intent": (journal_lines(), Mutator.record),
        "name": (log_lines(), lambda mutator: mutator.name().encode(errors="surrogatepass")),
    }[name]


COUNTS = {
    "document": (9_000, 440_000),
    "key": (2_000, 30_000),
    "line": (6_000, 260_000),
    "record": (5_000, 220_000),
    "log": (1_500, 20_000),
    "segment": (1_500, 20_000),
    "intent": (300, 5_000),
    "name": (5_000, 60_000),
}
"""Inputs in the seeded part, and in all of it."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", COUNTS)
def test_only_our_own_errors_come_out(name: str, full: bool, tmp_path: Path, tally: Tally) -> None:
    seeds, make = surface(name)
    targets = Targets(tmp_path, Mutator(next(batches(SEED, 1))[0], seeds))
    target: Callable[[bytes], None] = getattr(targets, name)
    refused = 0
    for random, size in batches(f"{SEED}/{name}", COUNTS[name][full]):
        targets.mutator = mutator = Mutator(random, seeds)
        for number in range(size):
            data = make(mutator)
            began = time.monotonic()
            try:
                target(data)
            except AgentStateError:
                refused += 1
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is told
                where = f"{name}, input {tally.points} (number {number} of its batch)"
                pytest.fail(f"seed {SEED}, {where}: {error!r:.500}\ninput: {data[:3000]!r}")
            tally.points += 1
            took = time.monotonic() - began
            assert took < SLOWEST, f"{name}: {took:.1f} s for {data[:3000]!r}"
    tally.faults += refused
    # Neither all nor nothing: a fuzzer that never gets past the first check tests nothing.
    assert name in ("log", "segment", "intent", "name") or 0.05 < refused / tally.points < 0.99


@pytest.mark.parametrize("name", ["document", "line", "record", "log", "segment"])
def test_no_input_takes_memory_out_of_proportion(
    name: str, full: bool, tmp_path: Path, tally: Tally
) -> None:
    seeds, make = surface(name)
    mutator = Mutator(next(batches(f"{SEED}/memory/{name}", 1))[0], seeds)
    target: Callable[[bytes], None] = getattr(Targets(tmp_path, mutator), name)
    tracemalloc.start()
    try:
        for _ in range(3_000 if full else 60):
            data = make(mutator)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                target(data)
            except AgentStateError:
                tally.faults += 1
            tally.points += 1
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < LARGEST + 50 * len(data), f"{peak} bytes for {data[:3000]!r}"
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
async def test_documents_dropped_into_a_directory_never_stop_it(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    """Mail, tasks and all other kinds; read by a manager, the CLI's reader and ``verify``."""
    seeds, _ = surface("document")
    for random, size in batches(f"{SEED}/dropped/{exclusive}", 4_000 if full else 200, 100):
        root = tmp_path / f"{tally.points}"
        mutator = Mutator(random, seeds)
        async with StatePersistenceManager(root, durability="os") as manager:
            await manager.save_agent_state("precious", {"agent_id": "precious"})
        dropped: dict[str, bytes] = {}
        for number in range(size):
            data = mutator.document()
            kind = kind_of(data, random)
            owner = f"{kind}/alice" if len(STATES[kind][0]) == 2 else kind
            relative = f"{owner}/d{number}.json" if number % 9 else f"{owner}/~{number:016x}.json"
            dropped[relative] = data
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dropped[relative])
            os.utime(path, (1_000_000_000, 1_000_000_000))
        await verify(root)
        read_agents(PlainReader(root))
        async with open_inspector(root) as reader:
            for kind in STATES:
                await reader.documents(kind, lambda *_: None)
            await reader.agent("alice")
        async with StatePersistenceManager(root, exclusive=exclusive, durability="os") as manager:
            usable = 0
            for kind in STATES:
                async for loaded in manager.scan(kind):
                    assert await manager.save(kind, loaded.key, loaded.state) >= 1
                    usable += loaded.key != ("precious",)
            for load in (manager.load_task_queue_state, manager.load_mailbox_state):
                try:
                    await load("alice")
                except AgentStateError:
                    tally.faults += 1
            assert await manager.load_agent_state("precious") is not None
            for incident in manager.incidents():
                if incident.kept is not None and incident.path in dropped:
                    assert (root / incident.kept).read_bytes() == dropped[incident.path]
                    tally.faults += 1
        tally.points += size
        assert usable > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
def test_a_directory_opens_whatever_is_in_its_journal(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    seeds, _ = surface("segment")

    async def open_it(root: Path) -> None:
        async with StatePersistenceManager(root, exclusive=exclusive, durability="os") as manager:
            for kind in STATES:
                _ = [loaded async for loaded in manager.scan(kind)]
            _ = [entry async for entry in manager.read_log("events", "log")]
            await manager.append("events", "log", {"after": True})

    for random, size in batches(f"{SEED}/journal/{exclusive}", 1_000 if full else 60, 20):
        mutator = Mutator(random, seeds)
        root = tmp_path / f"{tally.points}"
        (root / ".journal").mkdir(parents=True)
        for number in range(size):
            data = mutator.lines(mutator.record)
            write(f"{root}/.journal/{number + 1:08d}.jsonl", data)
            write(f"{root}/.journal/intent-{number:016x}.jsonl", mutator.record())
            try:
                asyncio.run(open_it(root))
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is told
                pytest.fail(f"seed {SEED}, input {tally.points}: {error!r:.500}\n{data!r}")
            tally.points += 1
            assert nothing_in(f"{root}/.journal")


FOUND: list[tuple[str, bytes]] = [
    ("document", b'{"agent_id":"alice","_id":' + b'{"a":' * 1000 + b"0" + b"}" * 1001),
    ("document", b'{"_schema":"tasks/1","task_id":"t1","attempts":"99999999999999999999"}'),
    ("document", b'{"_schema":"tasks/1","task_id":"t1","timeout_seconds":"inf"}'),
    ("log", b'{"_seq":18446744073709551615}\n'),
    ("intent", b"b4a2e0a0 not a record\n"),
]


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_the_fuzzer_once_found_stays_mended(number: int, tmp_path: Path, tally: Tally) -> None:
    name, data = FOUND[number]
    targets = Targets(tmp_path, Mutator(Random(SEED), surface(name)[0]))
    for _ in range(20):  # where it is dropped is drawn
        tally.points += 1
        try:
            getattr(targets, name)(data)
        except AgentStateError:
            tally.faults += 1
