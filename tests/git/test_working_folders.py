"""What is of one run alone is in folders that git leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agent_state import AsyncAgentSessionManager, StatePersistenceManager, Task, TaskContext
from agent_state.storage import ReadOnlyStateStore
from tests.core import example_state
from tests.git.repositories import Repository

FOLDERS = (".journal", ".locks", ".quarantine", ".snapshots", ".runtime")


async def live(state: Path, *, exclusive: bool = True) -> None:
    """Start and stop an idle server."""
    async with AsyncAgentSessionManager(state, exclusive=exclusive):
        pass


@pytest.mark.parametrize("exclusive", [True, False])
async def test_starting_and_stopping_an_idle_server_leaves_git_status_clean(
    repository: Repository, exclusive: bool
) -> None:
    await example_state.write(repository.state)
    repository.commit()

    await live(repository.state, exclusive=exclusive)  # carol may wake: her sleep is over
    repository.commit("awake")
    await live(repository.state, exclusive=exclusive)
    assert repository.status == ""


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_first_start_rewrites_nothing_that_has_not_changed(
    repository: Repository, exclusive: bool
) -> None:
    for name in ("ann", "ben"):
        path = repository.state / "agents" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"agent_id": name, "agent_type": "reader"}))
    repository.commit()

    await live(repository.state, exclusive=exclusive)
    assert repository.status == "?? state/.gitignore\n"


async def test_a_run_is_remembered_in_its_working_folder(tmp_path: Path) -> None:
    runtime = AsyncAgentSessionManager(tmp_path)
    await runtime.start()
    await runtime.manager.flush()
    assert (tmp_path / ".runtime/runtime.json").exists()
    assert not (tmp_path / "system").exists()
    await runtime.abort()
    await runtime.manager.close()

    again = AsyncAgentSessionManager(tmp_path)
    report = await again.start()
    assert report.after_crash
    await again.stop()


async def test_the_run_of_an_older_version_is_taken_over_once(repository: Repository) -> None:
    old = repository.state / "system" / "runtime.json"
    old.parent.mkdir()
    old.write_text(json.dumps({"status": "running", "owner": "x", "at": "then"}))
    before = old.read_bytes()
    repository.commit()

    runtime = AsyncAgentSessionManager(repository.state)
    assert (await runtime.start()).after_crash
    await runtime.stop()
    again = AsyncAgentSessionManager(repository.state)
    assert not (await again.start()).after_crash
    await again.stop()
    assert old.read_bytes() == before
    assert repository.status == "?? state/.gitignore\n"


async def test_what_an_older_version_left_is_listed_once(tmp_path: Path) -> None:
    old = tmp_path / "system" / "runtime.json"
    old.parent.mkdir()
    old.write_text("{}")
    async with StatePersistenceManager(tmp_path) as manager:
        await manager.save_system_state("mine", {"a": 1})
        assert await manager.keys("system") == [("mine",), ("runtime",)]
        assert await manager.delete("system", "runtime")
        assert await manager.keys("system") == [("mine",)]
    store = ReadOnlyStateStore(tmp_path)
    await store.open()
    assert await store.keys("system") == [("mine",)]
    await store.close()


async def test_a_run_is_erased_like_any_state(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        await manager.save("system", ("runtimes", "one"), {"a": 1})
        await manager.save("system", ("runtimes", "two"), {"a": 1})
        assert await manager.keys("system", "runtimes") == [
            ("runtimes", "one"),
            ("runtimes", "two"),
        ]
        assert await manager.erase("system", ("runtimes", "one")) == 1
        assert await manager.keys("system") == [("runtimes", "two")]
    assert not (tmp_path / ".runtime/runtimes/one.json").exists()


@pytest.mark.parametrize("exclusive", [True, False])
async def test_git_clean_and_stash_leave_the_working_folders(
    repository: Repository, exclusive: bool
) -> None:
    first = repository.commit("before there was state")
    async with StatePersistenceManager(repository.state, exclusive=exclusive) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
    repository.commit("with state")
    repository.git("checkout", "-q", first)  # which has no .gitignore
    repository.git("clean", "-fdq")
    (repository.state / "other.txt").write_text("mine")
    repository.git("stash", "-u", "-q")
    for folder in FOLDERS:
        assert (repository.state / folder / ".gitignore").read_text() == "*\n", folder


async def test_a_folder_that_lost_its_gitignore_gets_it_at_the_next_start(tmp_path: Path) -> None:
    for _ in range(2):
        async with StatePersistenceManager(tmp_path):
            pass
        for folder in FOLDERS:
            (tmp_path / folder / ".gitignore").unlink()
    async with StatePersistenceManager(tmp_path, exclusive=True):
        assert all((tmp_path / folder / ".gitignore").exists() for folder in FOLDERS)
    shutil.rmtree(tmp_path / ".runtime")
    async with StatePersistenceManager(tmp_path, exclusive=True):
        assert (tmp_path / ".runtime/.gitignore").exists()


async def test_other_runtimes_see_the_working_folder_change(tmp_path: Path) -> None:
    done: list[str] = []

    async def handler(ctx: TaskContext, task: Task) -> None:
        done.append(task.task_id)

    one = AsyncAgentSessionManager(tmp_path, exclusive=False, lease_seconds=1000)
    two = AsyncAgentSessionManager(tmp_path, exclusive=False, lease_seconds=1000)
    one.handler("worker")(handler)
    two.handler("worker")(handler)
    await one.start()
    await one.agents.create("alice", agent_type="worker")
    await two.start()
    task = await two.tasks.submit("alice", "work")
    await one.stop()  # two is told by the heartbeat that is gone, not by the end of a long lease
    await two.tasks.result(task)
    await two.stop()
    assert done == [task.task_id]
