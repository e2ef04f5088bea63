"""A merge that git has left unresolved: files are left alone, the last good version is read."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    StatePersistenceManager,
    Task,
    TaskContext,
    UnmergedStateError,
)
from agent_state.storage import barrier
from agent_state.storage.worktree import has_conflict_markers
from agent_state.verify import verify
from tests.deadlines import until
from tests.git.repositories import Repository, agent_state

BOTH = pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])


def edit(repository: Repository, path: str, **fields: Any) -> None:
    """Change a document by hand, and commit it."""
    file = repository.state / path
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}, indent=2) + "\n")
    repository.commit(f"{path} {fields}")


@pytest.fixture
async def forked(repository: Repository) -> Repository:
    """Two branches that change alice differently; bob is the same. `main` is checked out."""
    async with StatePersistenceManager(repository.state) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "good"})
        await manager.save_agent_state("bob", {"agent_id": "bob"})
        await manager.append("notes", "diary", {"n": 1})
    repository.commit("base")
    repository.git("checkout", "-q", "-b", "other")
    edit(repository, "agents/alice.json", mood="theirs")
    repository.git("checkout", "-q", "main")
    edit(repository, "agents/alice.json", mood="ours")
    return repository


@pytest.fixture
async def manager(
    forked: Repository, request: pytest.FixtureRequest
) -> AsyncIterator[StatePersistenceManager]:
    async with StatePersistenceManager(forked.state, exclusive=request.param) as manager:
        yield manager


def unmerged(repository: Repository) -> bool:
    return bool(repository.git("ls-files", "-u"))


async def mood(manager: StatePersistenceManager) -> str:
    loaded = await manager.load_agent_state("alice")
    assert loaded is not None
    return str((loaded.model_extra or {})["mood"])


@pytest.mark.parametrize("style", ["merge", "diff3"])
@pytest.mark.parametrize("size", [7, 15])
@pytest.mark.parametrize("manager", [True, False], indirect=True, ids=["exclusive", "shared"])
async def test_a_conflict_is_left_alone_and_read_only(
    forked: Repository, manager: StatePersistenceManager, style: str, size: int
) -> None:
    assert await mood(manager) == "ours"
    (forked.root / ".git/info/attributes").write_text(f"*.json conflict-marker-size={size}\n")
    assert forked.run("-c", f"merge.conflictStyle={style}", "merge", "other").returncode == 1
    file = forked.state / "agents/alice.json"
    conflict = file.read_bytes()
    assert b"<" * size in conflict

    with pytest.raises(UnmergedStateError, match="a merge has left it unmerged") as caught:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
    assert (caught.value.kind, caught.value.key) == ("agents", ("alice",))
    assert await mood(manager) == "ours"
    await manager.save_agent_state("bob", {"agent_id": "bob", "n": 1})
    await manager.flush()
    assert file.read_bytes() == conflict
    assert unmerged(forked)
    assert any("unmerged" in incident.what for incident in manager.incidents())

    edit(forked, "agents/bob.json", n=2)
    file.write_text('{"agent_id": "alice", "mood": "both"}')
    forked.git("add", "-A")
    assert await mood(manager) == "both"
    await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "after"})
    await manager.flush()
    assert json.loads(file.read_text())["mood"] == "after"


@BOTH
async def test_a_start_after_a_stopped_merge_touches_neither_side(
    forked: Repository, exclusive: bool
) -> None:
    forked.run("merge", "other")
    file = forked.state / "agents/alice.json"
    conflict = file.read_bytes()

    async with StatePersistenceManager(forked.state, exclusive=exclusive) as manager:
        assert await mood(manager) == "ours"  # stage 2 of the index
        assert {loaded.key async for loaded in manager.scan("agents")} >= {("bob",)}
        with pytest.raises(UnmergedStateError):
            await manager.save_agent_state("alice", {"agent_id": "alice"})
        with pytest.raises(UnmergedStateError):
            await manager.delete("agents", "alice")
    assert file.read_bytes() == conflict
    assert not list((forked.state / ".quarantine").glob("[!.]*"))
    assert forked.run("diff", "--check").returncode != 0


@BOTH
@pytest.mark.parametrize("deleted_by", ["us", "them"])
async def test_deleted_against_changed_is_left_alone(
    repository: Repository, exclusive: bool, deleted_by: str
) -> None:
    async with StatePersistenceManager(repository.state) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "good"})
    repository.commit("base")
    for branch, deletes in (("other", deleted_by == "them"), ("main", deleted_by == "us")):
        repository.git("checkout", "-q", *(["-b"] if branch == "other" else []), branch)
        if deletes:
            repository.git("rm", "-q", "state/agents/alice.json")
            repository.commit("gone")
        else:
            edit(repository, "agents/alice.json", mood=branch)
    assert repository.run("merge", "other").returncode == 1
    file = repository.state / "agents/alice.json"
    before = file.read_bytes()

    async with StatePersistenceManager(repository.state, exclusive=exclusive) as manager:
        assert await mood(manager) in {"main", "other"}
        with pytest.raises(UnmergedStateError):
            await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
        assert file.read_bytes() == before
        repository.git("add", "-A")
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "after"})


@BOTH
async def test_a_log_in_conflict_is_left_alone(repository: Repository, exclusive: bool) -> None:
    async def append(**record: object) -> None:
        async with StatePersistenceManager(repository.state) as manager:
            await manager.append("notes", "diary", record)
        repository.commit("log")

    await append(n=1)
    repository.git("checkout", "-q", "-b", "other")
    await append(n="theirs")
    repository.git("checkout", "-q", "main")
    await append(n="ours")
    assert repository.run("merge", "other").returncode == 1
    file = repository.state / "notes/diary.jsonl"
    before = file.read_bytes()

    async with StatePersistenceManager(repository.state, exclusive=exclusive) as manager:
        with pytest.raises(UnmergedStateError):
            await manager.append("notes", "diary", {"n": "late"})
        report = await verify(repository.state)
        assert "unmerged" in {problem.fault for problem in report.problems}
    assert file.read_bytes() == before


async def test_a_save_that_was_on_its_way_is_kept(forked: Repository) -> None:
    """The merge came between the acknowledgement and the file."""
    async with StatePersistenceManager(forked.state, exclusive=True) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
        forked.run("merge", "other")
        conflict = (forked.state / "agents/alice.json").read_bytes()
        await manager.flush()
        assert await mood(manager) == "late"
    assert (forked.state / "agents/alice.json").read_bytes() == conflict
    [kept] = [p for p in (forked.state / ".quarantine/agents").glob("*") if p.suffix != ".json"]
    assert json.loads(kept.read_text())["mood"] == "late"


async def test_a_save_in_the_journal_of_a_dead_server_is_kept(forked: Repository) -> None:
    manager = StatePersistenceManager(forked.state, exclusive=True)
    await manager.open()
    await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
    copy = {path: path.read_bytes() for path in (forked.state / ".journal").glob("*.jsonl")}
    await manager.close()
    forked.git("checkout", "-q", ".")
    forked.run("merge", "other")
    conflict = (forked.state / "agents/alice.json").read_bytes()
    for path, data in copy.items():
        path.write_bytes(data)

    async with StatePersistenceManager(forked.state, exclusive=True) as manager:
        assert (forked.state / "agents/alice.json").read_bytes() == conflict
        assert any("unmerged" in incident.what for incident in manager.incidents())
    [kept] = [p for p in (forked.state / ".quarantine/agents").glob("*") if p.suffix != ".json"]
    assert json.loads(kept.read_text())["mood"] == "late"


@pytest.fixture
async def conflicted(forked: Repository) -> Repository:
    """A stopped merge of alice, of a task of hers, and of a log."""

    async def change(what: str) -> None:
        async with StatePersistenceManager(forked.state) as manager:
            task = {"task_id": "t1", "agent_id": "alice", "name": what}
            await manager.save("tasks", ("alice", "t1"), task)
            await manager.append("notes", "diary", {"n": what})
        forked.commit(what)

    await change("ours")
    forked.git("checkout", "-q", "other")
    await change("theirs")
    forked.git("checkout", "-q", "main")
    assert forked.run("merge", "other").returncode == 1
    return forked


COMMANDS = {
    "ls": {"agents/alice.json", "tasks/alice/t1.json", "notes/diary.jsonl"},
    "": {"agents/alice.json", "tasks/alice/t1.json", "notes/diary.jsonl"},
    "ls agents": {"agents/alice.json"},
    "show alice": {"agents/alice.json", "tasks/alice/t1.json"},
    "show agents/alice": {"agents/alice.json"},
    "tasks ls": {"tasks/alice/t1.json"},
    "tasks show alice/t1": {"tasks/alice/t1.json"},
    "logs ls": {"notes/diary.jsonl"},
    "logs show notes/diary": {"notes/diary.jsonl"},
    "doctor": {"agents/alice.json", "tasks/alice/t1.json", "notes/diary.jsonl"},
    "verify": {"agents/alice.json", "tasks/alice/t1.json", "notes/diary.jsonl"},
}


async def test_commands_name_the_merge(conflicted: Repository) -> None:
    """None calls the files damaged, all show the last good version, and exit with 1."""
    for command, named in COMMANDS.items():
        told = agent_state(conflicted.root, *command.split())
        assert told.returncode == 1, command
        for path in named:
            assert path in told.stdout, command
        assert "a merge has left it unmerged" in told.stdout, command
        assert "damaged" not in told.stdout, command
        assert "cannot be read" not in told.stdout, command
        assert "theirs" not in told.stdout, command
    agents = json.loads(agent_state(conflicted.root, "ls", "--json").stdout)["agents"]
    assert [(agent["agent_id"], agent["tasks"]) for agent in agents] == [
        ("alice", {"pending": 1}),
        ("bob", {}),
    ]
    assert conflicted.run("ls-files", "-u").stdout


async def test_a_valid_file_that_is_unmerged_is_named_too(conflicted: Repository) -> None:
    """As the merge driver leaves it: JSON with our values, and nothing else tells of it."""
    file = conflicted.state / "agents/alice.json"
    file.write_text(conflicted.git("show", ":3:state/agents/alice.json"))
    told = agent_state(conflicted.root, "ls")
    assert told.returncode == 1
    assert "agents/alice.json: a merge has left it unmerged" in told.stdout


async def test_verify_finds_the_merge_and_no_damage(conflicted: Repository) -> None:
    report = await verify(conflicted.state)
    assert {(one.fault, one.path) for one in report.problems} == {
        ("unmerged", "agents/alice.json"),
        ("unmerged", "notes/diary.jsonl"),
        ("unmerged", "tasks/alice/t1.json"),
    }


@BOTH
async def test_of_a_log_in_conflict_our_side_is_read(
    conflicted: Repository, exclusive: bool
) -> None:
    async with StatePersistenceManager(conflicted.state, exclusive=exclusive) as manager:
        assert [entry.record async for entry in manager.read_log("notes", "diary")] == [
            {"n": 1},
            {"n": "ours"},
        ]
        [last] = [record async for record in manager.store.read_log("notes", ("diary",), last=1)]
        assert last.seq == 2
        assert [one.what for one in manager.incidents() if one.kind == "notes"] == [
            "a merge has left it unmerged; resolve it and `git add` it"
        ]
        conflicted.git("checkout", "-q", "--theirs", "state/notes/diary.jsonl")
        conflicted.git("add", "-A")
        assert [entry.record async for entry in manager.read_log("notes", "diary")] == [
            {"n": 1},
            {"n": "theirs"},
        ]


async def test_what_a_person_resolved_is_later_than_a_save_from_before_the_merge(
    forked: Repository,
) -> None:
    path = forked.state / "agents/alice.json"
    async with StatePersistenceManager(forked.state, exclusive=True) as manager:
        assert await manager.load_agent_state("alice") is not None
        with barrier.hold(str(forked.state)):
            late = {"agent_id": "alice", "mood": "late"}
            await manager.save_agent_state("alice", late)  # it is in no file yet
            forked.run("merge", "other")
            with pytest.raises(UnmergedStateError):
                await manager.save_agent_state("alice", late)
            path.write_text('{"agent_id": "alice", "mood": "both"}')
            forked.git("add", "-A")
            await manager.load_agent_state("alice")
        async with asyncio.timeout(60):
            while True:
                found = await manager.load_agent_state("alice")
                assert found is not None
                if found.model_dump()["mood"] == "both":
                    break
                await asyncio.sleep(0.01)
        kept = [incident.kept for incident in manager.incidents() if incident.kept]
    [kept_file] = [forked.state / name for name in kept if name is not None]
    assert json.loads(kept_file.read_text())["mood"] == "late"
    assert json.loads(path.read_text())["mood"] == "both"


async def test_an_agent_in_conflict_does_not_run_until_it_is_resolved(forked: Repository) -> None:
    runtime = AsyncAgentSessionManager(forked.state, save_interval_seconds=0.2)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        return "done"

    edit(forked, "agents/alice.json", agent_type="worker", mood="ours")
    async with runtime:
        task = await runtime.tasks.submit("alice", "work", delay_seconds=0.05)
        forked.run("add", "-A")
        forked.run("commit", "-q", "-m", "a task")
        forked.run("merge", "other")
        conflict = (forked.state / "agents/alice.json").read_bytes()
        await runtime.manager.flush()
        assert (forked.state / "agents/alice.json").read_bytes() == conflict
        (forked.state / "agents/alice.json").write_text(
            '{"agent_id": "alice", "mood": "both", "agent_type": "worker"}'
        )
        forked.git("add", "-A")
        assert await runtime.tasks.result(task) == "done"
        await until(lambda: (runtime.agents.get("alice").model_extra or {}).get("mood") == "both")


@pytest.mark.parametrize(
    ("data", "conflict"),
    [
        (b"{\n<<<<<<< HEAD\n1\n=======\n2\n>>>>>>> x\n}", True),
        (b"{\r\n<<<<<<< HEAD\r\n1\r\n=======\r\n2\r\n>>>>>>> x\r\n}", True),
        (b"{\n<<<< HEAD\n1\n||||\n====\n2\n>>>> x\n}", True),
        (b"{\n< ours\n1\n=\n2\n> theirs\n}", True),
        (b"{\n=======\n}", False),
        (b"{\n<<<<<<<<<<<< a\n%%%%%%%%%%%%\n>>>>>>>>>>>> b\n}", True),
        (b'{"text": "<<<<<<< HEAD"', False),
        (b"{\n<html>\n", False),
        (b"{\n<<\n>>>\n", False),
    ],
)
def test_markers_are_known_by_any_size_and_style(data: bytes, conflict: bool) -> None:
    assert has_conflict_markers(data) is conflict


@BOTH
async def test_markers_outside_of_git_are_left_alone_too(tmp_path: Path, exclusive: bool) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "good"})
        await manager.flush()
        file = tmp_path / "agents/alice.json"
        conflict = '{\n<<<<<<< working copy\n"mood": 1\n=======\n"mood": 2\n>>>>>>> merge rev\n}\n'
        file.write_text(conflict)
        assert await mood(manager) == "good"
        with pytest.raises(UnmergedStateError, match="markers"):
            await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
        await manager.flush()
        assert file.read_text() == conflict
        file.write_text('{"agent_id": "alice", "mood": "both"}')
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "after"})
        await manager.flush()
        assert json.loads(file.read_text())["mood"] == "after"


async def test_without_git_markers_are_known_all_the_same(
    forked: Repository, tmp_path: Path
) -> None:
    forked.run("merge", "other")
    conflict = (forked.state / "agents/alice.json").read_bytes()
    program = """
import asyncio, sys
from agent_state import StatePersistenceManager

async def main():
    async with StatePersistenceManager(sys.argv[1], exclusive=True) as manager:
        await manager.load_agent_state('alice')
        await manager.save_agent_state('alice', {'agent_id': 'alice'})

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(forked.state)],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UnmergedStateError" in done.stderr
    assert (forked.state / "agents/alice.json").read_bytes() == conflict
