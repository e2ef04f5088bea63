"""The archiver on a bad day: every system call failing, every moment the last one."""

from __future__ import annotations

import contextlib
import errno
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    StorageError,
    StorageFullError,
)
from agent_state.testing import FakeClock, Fault, FaultyDisk
from agent_state.testing.faults import CHANGING, Crash
from agent_state_integrations.recorder.archiver import RetentionPolicy, archive, verify_archives
from agent_state_integrations.recorder.files import Recording
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.writer import RecordWriter
from tests.recorder.segments import lines, live, message, segment

NOW = datetime(2026, 12, 1, tzinfo=UTC)
TOP = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)
"""Each test runs the archiver at every system call: 6 s of processor time, so a busy machine needs
more than the usual 120 s."""
POLICIES = {
    "parquet": RetentionPolicy(parquet_past=0),
    "zst": RetentionPolicy(compress_past=timedelta(0)),
    "retention": RetentionPolicy(parquet_past=0, keep_for=timedelta(days=29)),
}
"""The first segment is of the first of November."""


def made(state: Path) -> Recording:
    recording = Recording(state)
    segment(recording, 1, lines(1, 6), "2026-11-01")
    segment(recording, 7, lines(7, 12), "2026-11-20")
    live(recording, lines(13, 14))
    return recording


def run(state: Path, policy: str) -> None:
    archive(state, POLICIES[policy], clock=FakeClock(NOW))


def check(recording: Recording, policy: str) -> None:
    """Everything is there once, but for a whole archive that retention may have removed."""
    found = list(read_records(recording.state_dir))
    kept = list(range(1, 15))
    if policy == "retention" and found and found[0][0] == 7:
        kept = kept[6:]
    assert found == [(seq, message(seq)) for seq in kept]


def settled(recording: Recording, policy: str) -> None:
    """The next run finishes what was begun."""
    run(recording.state_dir, policy)
    check(recording, policy)
    assert recording.segments() == []
    assert len(recording.archives()) == (1 if policy == "retention" else 2)
    assert not [one for one in recording.archive.iterdir() if one.name.startswith(".")]
    assert verify_archives(recording.state_dir).problems == ()


def calls(tmp_path: Path, policy: str) -> int:
    made(tmp_path / "counted")
    with FaultyDisk(Fault(10**9)) as disk:
        run(tmp_path / "counted", policy)
    return sum(1 for name, _ in disk.calls if name in CHANGING)


@pytest.mark.long("a process for each system call")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("action", ["crash before", "crash after", "crash torn"])
def test_dying_at_any_call_loses_nothing_and_doubles_nothing(
    tmp_path: Path, policy: str, action: str
) -> None:
    for at in range(1, calls(tmp_path, policy) + 1):
        recording = made(tmp_path / f"{at}")
        with FaultyDisk(Fault(at, CHANGING, action)) as disk, contextlib.suppress(Crash):  # type: ignore[arg-type]
            run(recording.state_dir, policy)
        assert disk.fired
        check(recording, policy)
        settled(recording, policy)


@pytest.mark.long("archives again for each system call")
@pytest.mark.parametrize(
    ("policy", "persistent"), [("parquet", False), ("zst", True), ("retention", False)]
)
def test_a_call_that_fails_is_told_and_loses_nothing(
    tmp_path: Path, policy: str, persistent: bool
) -> None:
    told = list[AgentStateError]()
    for at in range(1, calls(tmp_path, policy) + 1):
        recording = made(tmp_path / f"{at}")
        with FaultyDisk(Fault(at, CHANGING, error=errno.EIO, persistent=persistent)) as disk:
            try:
                run(recording.state_dir, policy)
            except AgentStateError as error:
                told.append(error)
        assert disk.fired
        check(recording, policy)
        settled(recording, policy)
    assert len(told) > 10
    assert {type(error) for error in told} <= {StorageError, DurabilityUnknownError}
    assert {error.errno for error in told if isinstance(error, StorageError)} == {errno.EIO}


@pytest.mark.parametrize("policy", ["parquet", "zst"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, policy: str) -> None:
    writes, told = 0, list[StorageFullError]()
    while True:
        recording = made(tmp_path / f"{writes}")
        before = [one.path.read_bytes() for one in recording.segments()]
        with FaultyDisk(Fault(writes + 1, "write", error=errno.ENOSPC, persistent=True)) as disk:
            try:
                run(recording.state_dir, policy)
            except StorageFullError as error:
                told.append(error)
            else:
                assert not disk.fired
                break
        writes += 1
        archived = len(recording.archives())
        left = [one.path.read_bytes() for one in recording.segments()]
        assert left == before[archived:], "a segment is an archive, or as it was"
        assert not [one for one in recording.archive.iterdir() if one.name.startswith(".")]
        check(recording, policy)
    assert writes >= 4
    assert all(error.path for error in told)


PROGRAM = """
import sys
from datetime import timedelta
from agent_state_integrations.recorder.archiver import archive
from agent_state_integrations.recorder.archiver import RetentionPolicy
if sys.argv[2] == "parquet":
    policy = RetentionPolicy(parquet_past=0)
else:
    policy = RetentionPolicy(compress_past=timedelta(0))
print("begun", flush=True)
archive(sys.argv[1], policy)
print("done", flush=True)
"""


@pytest.mark.long("kills processes for many seconds")
@pytest.mark.parametrize("policy", ["parquet", "zst"])
def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path, policy: str) -> None:
    """Real processes: each is killed somewhere, and the next one goes on, until one is done."""
    recording = Recording(tmp_path)
    for first in range(1, 2001, 100):
        segment(recording, first, lines(first, first + 99), "2026-01-01")
    live(recording, lines(2001, 2003))
    expected = [(seq, message(seq)) for seq in range(1, 2004)]
    chance = random.Random(policy)
    killed = 0
    for attempt in range(40):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), policy],
            stdout=subprocess.PIPE,
            text=True,
            cwd=TOP,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.0, 0.02) + attempt * 0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += process.returncode == -signal.SIGKILL
        assert list(read_records(tmp_path)) == expected
        if not recording.segments():
            break
    assert killed > 1
    archive(tmp_path, RetentionPolicy(parquet_past=0))
    assert recording.segments() == []
    assert list(read_records(tmp_path)) == expected
    assert verify_archives(tmp_path).ok
    assert not [one for one in recording.archive.iterdir() if one.name.startswith(".")]


def test_recording_archiving_and_reading_at_once(tmp_path: Path) -> None:
    """Readers see an unbroken run of numbers from the first on, each message once."""
    ended = threading.Event()
    problems: list[str] = []

    def archiving() -> None:
        while not ended.is_set():
            archive(tmp_path, RetentionPolicy(parquet_past=2000))

    def reading() -> None:
        seen = 0
        while not ended.is_set():
            found = [seq for seq, _ in read_records(tmp_path)]
            if found != list(range(1, len(found) + 1)) or len(found) < seen:
                problems.append(f"{len(found)} after {seen}")
            seen = len(found)

    with RecordWriter(tmp_path, rotate_bytes=2000) as writer:
        writer.write([{"message": "the first"}])
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(archiving), pool.submit(reading), pool.submit(reading)]
            try:
                for number in range(150):
                    writer.write([{"sender_id": "ann", "message": f"{number} {n}"} for n in "abc"])
            finally:
                ended.set()
            for one in others:
                one.result()
    assert problems == []
    assert [seq for seq, _ in read_records(tmp_path)] == list(range(1, 452))
    assert Recording(tmp_path).archives()


class Steps:
    """What is done to a recording, step by step, beside what must be in it."""

    def __init__(self, state: Path) -> None:
        self.recording = Recording(state)
        self.seq = 0
        self.first = 1
        live(self.recording, [])

    def append(self, count: int) -> None:
        with self.recording.current.open("ab") as file:
            for new in lines(self.seq + 1, self.seq + count):
                file.write(new)
        self.seq += count

    def rotate(self) -> None:
        if self.seq >= self.first:
            path = self.recording.segment_path("2026-11-01", self.first)
            self.recording.current.rename(path)
            live(self.recording, [])
            self.first = self.seq + 1

    def archive(self, parquet_past: int, days: int) -> None:
        policy = RetentionPolicy(parquet_past=parquet_past, compress_past=timedelta(days=days))
        archive(self.recording.state_dir, policy, clock=FakeClock(NOW))

    def die(self, at: int) -> None:
        with FaultyDisk(Fault(at, CHANGING, "crash after")), contextlib.suppress(Crash):
            self.archive(0, 0)


steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 4)),
    st.tuples(st.just("rotate")),
    st.tuples(st.just("archive"), st.sampled_from([0, 1500, 10**9]), st.sampled_from([0, 60])),
    st.tuples(st.just("die"), st.integers(1, 60)),
)


@settings(max_examples=60)
@given(st.lists(steps, max_size=12))
def test_whatever_is_rotated_and_archived_reading_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, todo: list[tuple[str, int]]
) -> None:
    state = Steps(tmp_path_factory.mktemp("steps"))
    for name, *arguments in todo:
        getattr(state, name)(*arguments)
        found = list(read_records(state.recording.state_dir))
        assert found == [(seq, message(seq)) for seq in range(1, state.seq + 1)]
