"""A checkout beside a server, or between its death and its next start."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, FileStateStore, StatePersistenceManager
from agent_state.testing import Crash, Fault, FaultyDisk
from tests.deadlines import until
from tests.git.repositories import Repository

BOTH = pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])


def read(repository: Repository, path: str) -> Any:
    return json.loads((repository.state / path).read_text())


def kept(repository: Repository, path: str) -> list[Any]:
    """The versions of a document in the quarantine."""
    files = sorted((repository.state / ".quarantine").glob(f"{path}.[0-9]*"))
    return [json.loads(file.read_text()) for file in files if ".reason" not in file.name]


async def save(repository: Repository, **moods: str) -> None:
    """Save agents with their tasks, as groups, and commit."""
    async with StatePersistenceManager(repository.state) as manager:
        for name, mood in moods.items():
            await save_group(manager, name, mood)
    repository.commit(str(moods))


async def save_group(manager: StatePersistenceManager, name: str, mood: str) -> None:
    async with manager.group() as group:
        group.save("agents", name, {"agent_id": name, "mood": mood})
        group.save("tasks", (name, "t"), {"task_id": "t", "agent_id": name, "mood": mood})
        group.append("diary", name, {"mood": mood})


@pytest.fixture
async def branches(repository: Repository) -> Repository:
    """`main` and `other` have different versions of alice, bob and their tasks."""
    await save(repository, alice="base", bob="base", carol="base")
    repository.git("checkout", "-q", "-b", "other")
    await save(repository, alice="other", bob="other")
    repository.git("checkout", "-q", "main")
    await save(repository, alice="main")
    return repository


async def killed(repository: Repository, **moods: str) -> None:
    """A server saves, and is killed before its files follow."""
    manager = StatePersistenceManager(repository.state, exclusive=True)
    await manager.open()
    for name, mood in moods.items():
        await save_group(manager, name, mood)
    journal = repository.state / ".journal"
    aside = repository.root / "aside"
    shutil.copytree(journal, aside)
    await manager.close()
    shutil.rmtree(journal)
    shutil.move(aside, journal)
    repository.git("checkout", "-q", "--", ".")
    repository.git("clean", "-fdq")


async def test_a_dead_servers_saves_are_not_replayed_over_another_branch(
    branches: Repository,
) -> None:
    await killed(branches, alice="late", carol="late")
    branches.git("checkout", "-q", "other")

    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        assert read(branches, "agents/alice.json")["mood"] == "other"
        assert read(branches, "tasks/alice/t.json")["mood"] == "other"
        assert read(branches, "agents/carol.json")["mood"] == "late"  # the same on both branches
        assert any("checkout" in incident.what for incident in manager.incidents())
    assert [each["mood"] for each in kept(branches, "agents/alice.json")] == ["late"]
    assert [each["mood"] for each in kept(branches, "tasks/alice/t.json")] == ["late"]
    changed = branches.git("status", "--porcelain").split()[1::2]
    assert changed == [f"state/{name}" for name in ("agents/carol.json", "diary/carol.jsonl")] + [
        "state/tasks/carol/t.json"
    ]


async def test_a_group_is_decided_as_one(branches: Repository) -> None:
    """Bob differs on the branches, his task was saved together with him, and is the same."""
    manager = StatePersistenceManager(branches.state)
    await manager.open()
    branches.git("checkout", "-q", "other")
    await manager.save("tasks", ("bob", "t"), {"task_id": "t", "agent_id": "bob", "mood": "base"})
    await manager.close()
    (branches.state / "tasks/bob/t.json").write_bytes(
        branches.git("show", "main:state/tasks/bob/t.json").encode()
    )
    branches.commit("the same task on both")
    branches.git("checkout", "-q", "main")

    await killed(branches, bob="late")
    branches.git("checkout", "-q", "other")
    async with StatePersistenceManager(branches.state, exclusive=True):
        assert read(branches, "agents/bob.json")["mood"] == "other"
        assert read(branches, "tasks/bob/t.json")["mood"] == "base"
    assert [each["mood"] for each in kept(branches, "tasks/bob/t.json")] == ["late"]


async def test_on_the_branch_of_the_dead_server_everything_is_replayed(
    branches: Repository,
) -> None:
    await killed(branches, alice="late", bob="late", dave="late")
    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        for name in ("alice", "bob", "dave"):
            assert read(branches, f"agents/{name}.json")["mood"] == "late"
            assert read(branches, f"tasks/{name}/t.json")["mood"] == "late"
        assert manager.incidents() == []


async def test_a_branch_without_the_agent_stays_without(branches: Repository) -> None:
    branches.git("checkout", "-q", "-b", "without", "main")
    branches.git("rm", "-rq", "state/agents/alice.json", "state/tasks/alice", "state/diary")
    branches.commit("without alice")
    branches.git("checkout", "-q", "main")
    await killed(branches, alice="late", bob="late")
    branches.git("checkout", "-q", "without")

    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        assert await manager.list_persisted_agents() == ["bob", "carol"]
    assert not (branches.state / "agents/alice.json").exists()
    assert [each["mood"] for each in kept(branches, "agents/alice.json")] == ["late"]


async def test_a_group_of_the_shared_store_is_not_completed_over_another_branch(
    branches: Repository,
) -> None:
    store = FileStateStore(branches.state)
    dead = StatePersistenceManager(store=store)
    await dead.open()
    with FaultyDisk(Fault(at=3, call="rename", action="crash before")), pytest.raises(Crash):
        await save_group(dead, "alice", "late")
    await store.close()
    assert list((branches.state / ".journal").glob("intent-*"))
    branches.git("checkout", "-q", "--", ".")
    branches.git("checkout", "-q", "other")

    async with StatePersistenceManager(branches.state):
        pass
    assert read(branches, "agents/alice.json")["mood"] == "other"
    assert read(branches, "tasks/alice/t.json")["mood"] == "other"
    assert [each["mood"] for each in kept(branches, "agents/alice.json")] == ["late"]
    assert branches.git("status", "--porcelain") == ""


async def killed_after_appends(repository: Repository, *keys: str) -> None:
    """A server appends to logs alone, and is killed before its files follow."""
    manager = StatePersistenceManager(repository.state, exclusive=True)
    await manager.open()
    for key in keys:
        for mood in ("late", "later"):
            await manager.append("diary", key, {"mood": mood})
    aside = repository.root.with_name("aside")
    shutil.copytree(repository.state / ".journal", aside)
    await manager.close()
    shutil.rmtree(repository.state / ".journal")
    shutil.move(aside, repository.state / ".journal")
    repository.git("checkout", "-q", "--", ".")
    repository.git("clean", "-fdq")


def diary(repository: Repository, name: str) -> list[str]:
    text = (repository.state / f"diary/{name}.jsonl").read_text()
    return [json.loads(line)["mood"] for line in text.splitlines()]


def put_aside(repository: Repository, name: str) -> list[str]:
    """The records of a log in the quarantine."""
    files = (repository.state / ".quarantine/diary").glob(f"{name}.jsonl*")
    texts = [file.read_text() for file in files if ".reason" not in file.name]
    return sorted(json.loads(text)["mood"] for text in texts)


async def test_lines_do_not_go_to_the_log_of_another_branch(branches: Repository) -> None:
    """The log of alice is as long on both branches, and its last line another; carol's is one."""
    await killed_after_appends(branches, "alice", "carol")
    branches.git("checkout", "-q", "other")
    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        assert any("checkout" in incident.what for incident in manager.incidents())
    assert diary(branches, "alice") == ["base", "other"]
    assert put_aside(branches, "alice") == ["late", "later"]
    assert diary(branches, "carol") == ["base", "late", "later"]


async def test_lines_go_to_the_log_that_they_follow(branches: Repository) -> None:
    """Also where it has got a line by hand, or the first record is there already."""
    await killed_after_appends(branches, "alice", "carol", "nobody")
    log = branches.state / "diary/alice.jsonl"
    log.write_text(log.read_text() + '{"mood": "typed"}\n')
    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        assert not any("checkout" in incident.what for incident in manager.incidents())
    assert diary(branches, "alice") == ["base", "main", "late", "later", "typed"]
    assert diary(branches, "nobody") == ["late", "later"]
    assert put_aside(branches, "alice") == []


async def test_each_later_segment_knows_what_its_lines_follow(branches: Repository) -> None:
    manager = StatePersistenceManager(branches.state, exclusive=True)
    async with manager:
        await manager.append("diary", "alice", {"mood": "first"})
        await manager.flush()
        branches.commit("first")
        branches.git("checkout", "-q", "-B", "third")
        await manager.append("diary", "alice", {"mood": "second"})
        aside = branches.root.with_name("aside")
        shutil.copytree(branches.state / ".journal", aside)
    shutil.rmtree(branches.state / ".journal")
    shutil.move(aside, branches.state / ".journal")
    branches.git("checkout", "-q", "--", ".")
    branches.git("checkout", "-q", "other")
    async with StatePersistenceManager(branches.state) as again:
        await again.append("diary", "alice", {"mood": "elsewhere"})
    assert diary(branches, "alice") == ["base", "other", "elsewhere"]


async def test_a_group_of_lines_of_the_shared_store_is_not_completed_over_another_branch(
    branches: Repository,
) -> None:
    store = FileStateStore(branches.state)
    dead = StatePersistenceManager(store=store)
    await dead.open()
    await dead.append("diary", "bob", {"mood": "as long as on the other"})
    branches.commit("longer")
    group = dead.new_group()
    for name in ("alice", "bob"):
        group.append("diary", name, {"mood": "late"})
    with FaultyDisk(Fault(at=1, call="rename", action="crash after")), pytest.raises(Crash):
        await dead.commit(group)
    await store.close()
    assert list((branches.state / ".journal").glob("intent-*"))
    branches.git("checkout", "-q", "--", ".")
    branches.git("checkout", "-q", "other")

    async with StatePersistenceManager(branches.state):
        pass
    assert diary(branches, "alice") == ["base", "other"]
    assert diary(branches, "bob") == ["base", "other"]
    assert put_aside(branches, "alice") == ["late"]
    assert branches.git("status", "--porcelain") == ""


# -- beside a living server --------------------------------------------------------------------


@BOTH
async def test_a_checkout_beside_a_server_is_used(branches: Repository, exclusive: bool) -> None:
    async with StatePersistenceManager(branches.state, exclusive=exclusive) as manager:
        await save_group(manager, "carol", "late")
        await manager.flush()
        branches.commit("late")
        branches.git("checkout", "-q", "other")
        for name, mood in (("alice", "other"), ("bob", "other"), ("carol", "base")):
            loaded = await manager.load_agent_state(name)
            assert loaded is not None
            assert (loaded.model_extra or {})["mood"] == mood
    assert branches.git("status", "--porcelain") == ""


async def test_a_checkout_wins_over_a_save_that_is_in_no_file_yet(branches: Repository) -> None:
    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        await manager.load_agent_state("alice")
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
        branches.git("checkout", "-q", "other")
    assert read(branches, "agents/alice.json")["mood"] == "other"
    assert [each["mood"] for each in kept(branches, "agents/alice.json")] == ["late"]


async def test_lines_that_are_in_no_file_yet_do_not_go_to_the_log_of_another_branch(
    branches: Repository,
) -> None:
    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        for mood in ("late", "later"):  # the log has as many lines on `other`
            await manager.append("diary", "alice", {"mood": mood}, dedupe_key=mood)
        branches.git("checkout", "-q", "other")
        await manager.flush()
        await manager.append("diary", "alice", {"mood": "there"}, dedupe_key="there")
        await manager.flush()
        assert diary(branches, "alice") == ["base", "other", "there"]
        assert put_aside(branches, "alice") == ["late", "later"]
        await manager.append("diary", "alice", {"mood": "back"})
        branches.commit("there")
        branches.git("checkout", "-q", "-f", "main")
        await manager.flush()
        await manager.append("diary", "alice", {"mood": "home"})
    assert diary(branches, "alice") == ["base", "main", "home"]
    assert len(put_aside(branches, "alice")) == 3
    told = [each.what for each in manager.incidents() if each.kind == "diary"]
    assert len(told) == 3
    assert all("another branch's log" in message for message in told)


@BOTH
async def test_a_dedupe_key_of_another_branch_is_none_here(
    branches: Repository, exclusive: bool
) -> None:
    async with StatePersistenceManager(branches.state, exclusive=exclusive) as manager:
        await manager.append("diary", "alice", {"mood": "done"}, dedupe_key="t1")
        await manager.flush()
        branches.commit("done on main")
        branches.git("checkout", "-q", "other")
        for _ in range(2):
            await manager.append("diary", "alice", {"mood": "done here"}, dedupe_key="t1")
        await manager.flush()
        assert diary(branches, "alice") == ["base", "other", "done here"]
        branches.commit("done on other")
        branches.git("checkout", "-q", "main")
        await manager.append("diary", "alice", {"mood": "again"}, dedupe_key="t1")
    assert diary(branches, "alice") == ["base", "main", "done"]


async def test_a_checkout_of_a_branch_without_the_log_keeps_its_lines_out(
    branches: Repository,
) -> None:
    branches.git("checkout", "-q", "-b", "without")
    branches.git("rm", "-q", "state/diary/alice.jsonl")
    branches.commit("without the diary")
    branches.git("checkout", "-q", "main")
    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        await manager.append("diary", "alice", {"mood": "late"})
        branches.git("checkout", "-q", "without")
        await manager.flush()
        assert put_aside(branches, "alice") == ["late"]
        await manager.append("diary", "alice", {"mood": "anew"})
    assert diary(branches, "alice") == ["anew"]
    async with StatePersistenceManager(branches.state, exclusive=True):
        pass
    assert diary(branches, "alice") == ["anew"]


async def test_a_log_that_is_written_all_the_time_goes_on_after_a_checkout(
    branches: Repository,
) -> None:
    acknowledged: list[str] = []

    async def work(manager: StatePersistenceManager) -> None:
        while True:
            mood = f"turn {len(acknowledged)}"
            await manager.append("diary", "alice", {"mood": mood})
            acknowledged.append(mood)

    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        working = [asyncio.create_task(work(manager)) for _ in range(3)]
        await until(lambda: len(acknowledged) > 20)
        branches.git("checkout", "-q", "-f", "other")
        switched = len(acknowledged)
        await until(lambda: len(acknowledged) > switched + 20)
        await manager.flush()
        await until(lambda: len(acknowledged) > switched + 40)
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    there = diary(branches, "alice")
    assert there[:2] == ["base", "other"]
    assert acknowledged[-1] in there  # it does not stay outside for ever
    first = int(there[2].removeprefix("turn "))
    assert set(there[2:]) >= set(acknowledged[first + 10 :])


@BOTH
async def test_a_tracked_deletion_is_a_deletion(branches: Repository, exclusive: bool) -> None:
    branches.git("checkout", "-q", "-b", "without", "main")
    branches.git("rm", "-rq", "state/agents/alice.json", "state/tasks/alice")
    branches.commit("without alice")
    branches.git("checkout", "-q", "main")

    async with AsyncAgentSessionManager(branches.state, exclusive=exclusive) as runtime:
        await runtime.tasks.submit("bob", "wait")
        await runtime.manager.flush()
        assert set(runtime.agents.list()) == {"alice", "bob", "carol"}
        branches.git("checkout", "-q", "without")
        await until(lambda: len(runtime.agents.list()) == 2)
        await runtime.reconciler.check()
    assert not (branches.state / "agents/alice.json").exists()
    assert not (branches.state / "tasks/alice").exists()


async def test_stopping_at_once_does_not_write_it_back(branches: Repository) -> None:
    branches.git("checkout", "-q", "-b", "without", "main")
    branches.git("rm", "-q", "state/agents/alice.json")
    branches.commit("without alice")
    branches.git("checkout", "-q", "main")
    runtime = AsyncAgentSessionManager(branches.state)
    await runtime.start()
    branches.git("checkout", "-q", "without")
    await runtime.stop()
    assert not (branches.state / "agents/alice.json").exists()


async def test_a_save_to_what_git_removed_is_kept(branches: Repository) -> None:
    branches.git("checkout", "-q", "-b", "without", "main")
    branches.git("rm", "-q", "state/agents/alice.json")
    branches.commit("without alice")
    branches.git("checkout", "-q", "main")
    async with StatePersistenceManager(branches.state, exclusive=True) as manager:
        await manager.load_agent_state("alice")
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
        branches.git("checkout", "-q", "without")
        await manager.flush()
        assert not (branches.state / "agents/alice.json").exists()
        assert await manager.load_agent_state("alice") is None
        # Who makes an agent of this name now makes a new one.
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "new"})
    assert read(branches, "agents/alice.json")["mood"] == "new"
    assert [each["mood"] for each in kept(branches, "agents/alice.json")] == ["late"]


async def test_a_file_that_a_person_removes_is_still_saved_again(branches: Repository) -> None:
    async with AsyncAgentSessionManager(branches.state) as runtime:
        (branches.state / "agents/alice.json").unlink()
        await runtime.reconciler.check()
    assert (branches.state / "agents/alice.json").exists()


# -- a slow editor -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9])
async def test_a_half_written_file_rests_before_it_is_judged(
    tmp_path: Path, exclusive: bool, cut: float
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "good"})
        await manager.flush()
        await manager.load_agent_state("alice")
        text = json.dumps({"agent_id": "alice", "mood": "typed"}, indent=2)
        path = tmp_path / "agents/alice.json"
        with path.open("w") as file:
            file.write(text[: int(len(text) * cut)])
            file.flush()
            loaded = await manager.load_agent_state("alice")
            assert loaded is not None
            assert (loaded.model_extra or {})["mood"] == "good"
            file.write(text[int(len(text) * cut) :])
        loaded = await manager.load_agent_state("alice")
        assert loaded is not None
        assert (loaded.model_extra or {})["mood"] == "typed"
        assert manager.incidents() == []


async def test_a_save_meanwhile_waits_for_the_editor(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "good"})
        await manager.flush()
        text = json.dumps({"agent_id": "alice", "mood": "typed", "_revision": 9})
        path = tmp_path / "agents/alice.json"
        with path.open("w") as file:
            file.write(text[:20])
            file.flush()
            await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
            file.write(text[20:])
        await manager.flush()
    assert json.loads(path.read_text())["mood"] == "typed"


async def test_a_file_that_stays_half_is_judged_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_state.storage.document_files.REST_SECONDS", 0.2)
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "good"})
        await manager.flush()
        (tmp_path / "agents/alice.json").write_text('{"agent_id": "al')
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "late"})
        await manager.flush()
    assert json.loads((tmp_path / "agents/alice.json").read_text())["mood"] == "late"


# -- what a snapshot is of ---------------------------------------------------------------------


@BOTH
async def test_a_version_that_comes_back_says_from_when_it_is(
    tmp_path: Path, exclusive: bool
) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        for mood in ("first", "second"):
            await manager.save_agent_state("alice", {"agent_id": "alice", "mood": mood})
    path = tmp_path / "agents/alice.json"
    path.write_text("no JSON at all")
    os.utime(path, (1, 1))
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        loaded = await manager.load_agent_state("alice")
        assert loaded is not None
        assert (loaded.model_extra or {})["mood"] == "first"
        [incident] = manager.incidents()
    before = json.loads(path.read_text())
    assert f"revision {before['_revision']} of {before['_saved_at']} is back" in incident.what


@BOTH
async def test_a_save_that_git_overwrites_unseen_is_kept(
    branches: Repository, exclusive: bool
) -> None:
    """As ``stash`` and ``rebase --autostash`` do: they read, and reset hard a moment later."""
    async with StatePersistenceManager(branches.state, exclusive=exclusive) as manager:
        await save_group(manager, "alice", "stashed")
        await manager.flush()
        branches.git("stash", "create")
        await save_group(manager, "alice", "late")
        await manager.flush()
        branches.git("reset", "-q", "--hard")
        loaded = await manager.load_agent_state("alice")
        assert loaded is not None
        assert (loaded.model_extra or {})["mood"] == "main"
        await manager.load("tasks", ("alice", "t"))
        assert any("which no commit has" in incident.what for incident in manager.incidents())
    assert [each["mood"] for each in kept(branches, "agents/alice.json")] == ["late"]
    assert [each["mood"] for each in kept(branches, "tasks/alice/t.json")] == ["late"]


@BOTH
async def test_a_save_that_git_has_is_kept_by_git_alone(
    branches: Repository, exclusive: bool
) -> None:
    async with StatePersistenceManager(branches.state, exclusive=exclusive) as manager:
        await save_group(manager, "alice", "stashed")
        await manager.flush()
        branches.git("stash", "-q")
        loaded = await manager.load_agent_state("alice")
        assert loaded is not None
        assert (loaded.model_extra or {})["mood"] == "main"
        assert manager.incidents() == []
    assert not (branches.state / ".quarantine/agents").exists()
