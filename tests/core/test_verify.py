from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_state import StateNotFoundError, StatePersistenceManager
from agent_state.protocols import Document
from agent_state.storage.changes import ResolvedPut, encode_changes, frame
from agent_state.verify import Finding, VerifyReport, verify


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    """A directory as a server leaves it: two agents, three tasks, one log of three records."""
    root = tmp_path / "state"
    async with StatePersistenceManager(root, exclusive=True) as manager:
        for agent_id in ("alice", "Bob"):
            await manager.save_agent_state(agent_id, {"agent_id": agent_id, "status": "idle"})
        for number in range(3):
            task = {"task_id": f"t{number}", "status": "pending"}
            await manager.save("tasks", ("alice", f"t{number}"), task)
        for number in range(3):
            await manager.append("events", "all", {"number": number})
    return root


def faults(findings: list[Finding]) -> list[tuple[str, str | None]]:
    return [(finding.fault, finding.path) for finding in findings]


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


async def test_a_whole_directory_is_ok_and_counted(state: Path) -> None:
    report = await verify(state)

    assert report.ok
    assert report.notices == []
    assert report.documents == {"agents": 2, "tasks": 3}
    assert (report.logs, report.records) == ({"events": 1}, {"events": 3})
    assert report.owner is None


async def test_no_directory_is_an_error_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(StateNotFoundError):
        await verify(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


async def test_verifying_changes_nothing(state: Path) -> None:
    (state / "agents/alice.json").write_text("{")
    log = state / "events/all.jsonl"
    log.write_bytes(log.read_bytes() + b'{"to')
    before = contents(state)

    await verify(state)

    assert contents(state) == before


async def test_a_running_server_is_named_and_its_journal_is_no_problem(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})

        report = await verify(tmp_path)

    assert report.ok
    assert report.owner == os.getpid()
    assert report.documents == {"agents": 1}
    assert report.journal.records == 1


async def test_what_only_the_journal_holds_is_counted_on_a_dead_directory(tmp_path: Path) -> None:
    live, dead = tmp_path / "live", tmp_path / "dead"
    async with StatePersistenceManager(live, exclusive=True) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
        await manager.append("events", "all", {"number": 1})
        shutil.copytree(live, dead, ignore=shutil.ignore_patterns("agents", "events"))

    report = await verify(dead)

    assert report.ok
    assert report.documents == {"agents": 1}
    assert report.logs == {"events": 1}
    assert faults(report.notices) == [("unfinished", ".journal")]


async def test_a_damaged_document_is_told_with_whether_it_can_come_back(state: Path) -> None:
    shutil.rmtree(state / ".snapshots", ignore_errors=True)  # a slow write-back leaves some
    async with StatePersistenceManager(state) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "status": "active"})
    (state / "agents/alice.json").write_text('{"agent_id": "al')
    (state / "tasks/alice/t1.json").write_text("")

    report = await verify(state)

    assert not report.ok
    assert faults(report.problems) == [
        ("damaged", "agents/alice.json"),
        ("damaged", "tasks/alice/t1.json"),
    ]
    assert "revision 1 is kept" in report.problems[0].why
    assert "no earlier version is kept" in report.problems[1].why
    assert report.documents == {"agents": 1, "tasks": 2}


async def test_a_document_cut_off_anywhere_is_never_taken_for_a_whole_one(state: Path) -> None:
    path = state / "agents/alice.json"
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # the last byte is the newline
        path.write_bytes(whole[:length])
        os.utime(path, (1e9, 1e9 + length))  # a fresh file gets a moment to be finished

        report = await verify(state)

        assert faults(report.problems) == [("damaged", "agents/alice.json")], length


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"task_id": 5}', "invalid"),
        ('{"_schema": "tasks/999", "task_id": "t1"}', "newer schema"),
        ('{"_schema": "nonsense", "task_id": "t1"}', "damaged"),
        ('{"task_id": "t1", "task_id": "t2"}', "damaged"),
        ("[]", "damaged"),
    ],
)
async def test_what_can_be_read_and_not_used_is_a_problem(
    state: Path, content: str, fault: str
) -> None:
    (state / "tasks/alice/t1.json").write_text(content)

    report = await verify(state)

    assert faults(report.problems) == [(fault, "tasks/alice/t1.json")]
    assert report.problems[0].key == ("alice", "t1")


async def test_a_hand_edit_is_worth_knowing_and_no_problem(state: Path) -> None:
    path = state / "agents/alice.json"
    path.write_text(path.read_text().replace("idle", "waiting"))
    (state / "mail").mkdir()
    (state / "mail/alice").mkdir()
    (state / "mail/alice/hello.json").write_text('{"subject": "dropped in"}')

    report = await verify(state)

    assert report.ok
    assert faults(report.notices) == [
        ("changed outside", "agents/alice.json"),
        ("changed outside", "mail/alice/hello.json"),
    ]


def _cut_the_tail(lines: list[bytes]) -> bytes:
    return b"".join(lines)[:-7]


def _leave_out_the_newline(lines: list[bytes]) -> bytes:
    return b"".join(lines)[:-1]


def _spoil_the_middle(lines: list[bytes]) -> bytes:
    return lines[0] + b"garbage\n" + lines[2]


def _leave_out_the_middle(lines: list[bytes]) -> bytes:
    return lines[0] + lines[2]


def _give_a_line_twice(lines: list[bytes]) -> bytes:
    return b"".join(lines) + lines[1]


def _edit_a_line(lines: list[bytes]) -> bytes:
    return lines[0] + lines[1].replace(b'"number":1', b'"number":7') + lines[2]


@pytest.mark.parametrize(
    ("change", "fault", "records", "said"),
    [
        (_cut_the_tail, "torn", 2, "never acknowledged"),
        (_leave_out_the_newline, "torn", 3, "lacks its newline"),
        (_spoil_the_middle, "damaged", 2, "1 cannot be read: line 2"),
        (_leave_out_the_middle, "gap", 2, "before line 2"),
        (_give_a_line_twice, "damaged", 4, "line 4"),
        (_edit_a_line, "changed outside", 3, "line 2"),
    ],
)
async def test_every_line_of_a_log_is_looked_at(
    state: Path,
    change: Callable[[list[bytes]], bytes],
    fault: str,
    records: int,
    said: str,
) -> None:
    path = state / "events/all.jsonl"
    path.write_bytes(change(path.read_bytes().splitlines(keepends=True)))

    report = await verify(state)

    assert report.ok is (fault != "damaged")
    [finding] = [*report.problems, *report.notices]
    assert (finding.fault, finding.path) == (fault, "events/all.jsonl")
    assert said in finding.why
    assert report.records == {"events": records}


async def test_damage_in_the_journal_is_a_problem_and_its_torn_end_is_not(state: Path) -> None:
    def record(number: int) -> bytes:
        document = Document("system", (f"s{number}",), b'{"a":1}', 1, "", "system/1")
        return frame(encode_changes([ResolvedPut(document)]))

    journal = state / ".journal/00000009.jsonl"
    journal.write_bytes(record(1) + b"00000000 {}\n" + record(2) + record(3)[:-4])

    report = await verify(state)

    assert faults(report.problems) == [("damaged", ".journal/00000009.jsonl")]
    assert {notice.fault for notice in report.notices} == {"torn", "unfinished"}
    assert report.documents["system"] == 2


async def test_a_group_that_a_dead_writer_left_is_shown_as_it_will_be(state: Path) -> None:
    document = Document("agents", ("carol",), b'{"agent_id":"carol"}', 1, "", "agents/1")
    intents = state / ".journal"
    (intents / "intent-1.jsonl").write_bytes(frame(encode_changes([ResolvedPut(document)])))
    (intents / "intent-2.jsonl").write_bytes(frame(encode_changes([ResolvedPut(document)]))[:-9])

    report = await verify(state)

    assert report.ok
    assert (report.journal.intents, report.journal.torn > 0) == (1, True)
    assert report.documents["agents"] == 3

    (intents / "intent-3.jsonl").write_bytes(b"00000000 {}\n")

    assert faults((await verify(state)).problems) == [("damaged", ".journal/intent-3.jsonl")]


async def test_what_was_put_aside_is_listed_with_its_reason(state: Path) -> None:
    (state / "agents/alice.json").write_text("{")
    async with StatePersistenceManager(state, exclusive=True) as manager:
        assert [loaded.key async for loaded in manager.scan("agents")] == [("Bob",)]

    report = await verify(state)

    assert report.ok
    [kept] = report.quarantine
    assert (kept.path, kept.was) == (".quarantine/agents/alice.json.1", "agents/alice.json")
    assert "not JSON" in kept.reason


async def test_leftovers_of_dead_writers_are_worth_knowing(state: Path) -> None:
    (state / "agents/.tmp-0123456789abcdef").write_text("{}")

    report = await verify(state)

    assert report.ok
    assert faults(report.notices) == [("temporary", "agents/.tmp-0123456789abcdef")]


async def test_a_file_name_that_no_id_has_is_a_problem_since_nobody_reads_it(state: Path) -> None:
    (state / "agents/Carol.json").write_text('{"agent_id": "Carol"}')
    (state / "README.md").write_text("beside the kinds, a person's own")
    (state / "agents/notes.txt").write_text("not a document")

    report = await verify(state)

    assert faults(report.problems) == [("unknown file", "agents/Carol.json")]
    assert "'!carol'" in report.problems[0].why
    assert faults(report.notices) == [("unknown file", "agents/notes.txt")]


@pytest.mark.skipif(sys.platform == "win32", reason="symlinks need a privilege there")
async def test_symlinks_are_not_followed_and_told(state: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (state / "tasks/bob").symlink_to(tmp_path / "elsewhere")
    (state / "agents/alice.json").unlink()
    (state / "agents/alice.json").symlink_to(tmp_path / "elsewhere.json")

    report = await verify(state)

    assert faults(report.problems) == [
        ("damaged", "agents/alice.json"),
        ("unknown file", "tasks/bob"),
    ]


async def test_a_folder_that_is_no_kind_hides_nothing_else(state: Path) -> None:
    (state / "My Notes").mkdir()

    report = await verify(state)

    assert report.ok
    assert faults(report.notices) == [("unknown file", "My Notes")]


async def test_progress_reaches_the_end(state: Path) -> None:
    told: list[tuple[int, int]] = []

    report: VerifyReport = await verify(state, progress=lambda done, of: told.append((done, of)))

    assert told[-1] == (6, 6)
    assert report.to_dict()["ok"] is True
