"""Clones and worktrees on one machine: an agent that runs in one does not run in another."""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.storage import worktree
from agent_state.storage.claims import Claims
from agent_state_integrations.git import GitRepository, merge_revision
from agent_state_integrations.git.forks import fork
from tests.deadlines import until
from tests.git.repositories import Repository
from tests.git.server import Server


@pytest.fixture
async def place(repository: Repository) -> Repository:
    """A repository with the state of alice and bob."""
    async with AsyncAgentSessionManager(repository.state) as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="worker")
    repository.commit("base")
    return repository


def clone(repository: Repository, name: str = "clone") -> Path:
    """The state directory of a new clone."""
    root = repository.root.with_name(name)
    repository.git("clone", "-q", str(repository.root), str(root))
    return root / "state"


def linked(repository: Repository) -> Path:
    """The state directory of a new linked worktree."""
    root = repository.root.with_name("linked")
    repository.git("worktree", "add", "-q", "-b", "other", str(root))
    return root / "state"


@pytest.mark.parametrize("copy", [clone, linked])
async def test_a_copy_is_not_run_while_the_first_one_lives(
    place: Repository, servers: list[Server], copy: Any
) -> None:
    """The first is killed, and the second takes the agents within its retry."""
    other = copy(place)
    first = await Server.begin(place.state)
    servers.append(first)
    second = await Server.begin(other)
    servers.append(second)
    assert first.start["elsewhere"] == {}
    where = f"{place.state} (process {first.start['pid']})"
    assert second.start["elsewhere"] == {"alice": where, "bob": where}
    [line] = [line for line in second.start["lines"] if where in line]
    assert "agent-state git fork" in line

    await second.submit("alice")
    await first.submit("alice")
    await first.worked("alice")
    await first.end()
    await second.worked("alice")


async def test_a_server_that_stands_still_keeps_its_agents(
    place: Repository, servers: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    first = await Server.begin(place.state)
    servers.append(first)
    first.process.send_signal(signal.SIGSTOP)
    with caplog.at_level(logging.WARNING, "agent_state"):
        async with AsyncAgentSessionManager(clone(place), save_interval_seconds=0.05) as runtime:
            assert runtime.report is not None
            assert runtime.report.running_elsewhere.keys() == {"alice", "bob"}
            assert runtime.report.failed == {}
            for _ in range(3):
                await runtime.agents.take_free()
            assert all(agent.elsewhere for agent in runtime.state.agents.values())
            first.process.send_signal(signal.SIGCONT)
            await first.submit("bob")
            await first.worked("bob")
            await first.end(signal.SIGTERM)
            await until(lambda: all(agent.leased for agent in runtime.state.agents.values()))
    told = [record.message for record in caplog.records if "and not here" in record.message]
    assert len(told) == 1  # not once for each agent, and not at each retry


async def test_others_than_the_copy_run(place: Repository, servers: list[Server]) -> None:
    """An agent of the same id that was made anew is no copy, and a new one is none either."""
    other = clone(place)
    servers.append(await Server.begin(place.state))
    async with StatePersistenceManager(other) as manager:
        async with manager.edit("agents", "bob") as bob:
            bob.created_at = "2020-01-01T00:00:00Z"
        await manager.save_agent_state("carol", {"agent_id": "carol", "agent_type": "worker"})
    second = await Server.begin(other)
    servers.append(second)
    assert second.start["elsewhere"].keys() == {"alice"}
    for name in ("bob", "carol"):
        await second.submit(name)
        await second.worked(name)


async def test_a_fork_runs_beside_its_origin(place: Repository, servers: list[Server]) -> None:
    fork(GitRepository(place.state), "night", ["alice"])
    other = clone(place)
    Repository(other.parent).git("checkout", "-q", "night")
    first = await Server.begin(place.state)
    servers.append(first)
    second = await Server.begin(other)
    servers.append(second)
    assert second.start["elsewhere"].keys() == {"bob"}  # which was not forked
    await second.submit("alice-night")
    await second.worked("alice-night")
    await first.submit("alice")
    await first.worked("alice")
    await second.end(signal.SIGTERM)
    Repository(other.parent).commit("a night")
    place.git("fetch", "-q", str(other.parent), "night:night")
    await first.end(signal.SIGTERM)
    place.commit("a day")
    report = merge_revision(GitRepository(place.state), "night")
    assert not report.conflicts
    async with StatePersistenceManager(place.state) as manager:
        assert await manager.list_persisted_agents() == ["alice", "alice-night", "bob"]


async def test_git_config_lets_copies_run(place: Repository, servers: list[Server]) -> None:
    other = clone(place)
    Repository(other.parent).git("config", "agent-state.runCopies", "yes")
    servers.append(await Server.begin(place.state))
    second = await Server.begin(other)
    servers.append(second)
    assert second.start["elsewhere"] == {}


async def test_what_git_ignores_is_no_copy(place: Repository, servers: list[Server]) -> None:
    place.git("rm", "-q", "-r", "--cached", "state")
    (place.root / ".gitignore").write_text("/state/\n")
    place.commit("the state is of each deployment")
    other = clone(place)
    shutil.copytree(place.state / "agents", other / "agents")
    servers.append(await Server.begin(place.state))
    second = await Server.begin(other)
    servers.append(second)
    assert second.start["elsewhere"] == {}


async def test_another_repository_is_no_copy(
    place: Repository, servers: list[Server], tmp_path: Path
) -> None:
    """A project that was made from the files of another one, such as a template."""
    other = Repository(tmp_path / "template")
    place.git(f"--work-tree={other.root}", "checkout", "-f", "HEAD", "--", ".")
    other.commit("a project of its own")
    servers.append(await Server.begin(place.state))
    second = await Server.begin(other.state)
    servers.append(second)
    assert second.start["elsewhere"] == {}


async def test_an_agent_that_is_made_later_is_claimed_too(place: Repository) -> None:
    async with AsyncAgentSessionManager(place.state) as first:
        created = await first.agents.create("carol", agent_type="worker")
        await first.manager.flush()
        place.commit("carol")
        async with AsyncAgentSessionManager(clone(place)) as second:
            assert second.report is not None
            assert "carol" in second.report.running_elsewhere
            assert (await second.agents.create("carol", agent_type="worker")) == created
            assert not second.state.agents["carol"].leased


async def test_an_agent_that_a_checkout_removes_is_free(place: Repository) -> None:
    place.git("checkout", "-q", "-b", "without")
    place.git("rm", "-q", "state/agents/alice.json")
    place.commit("no alice")
    place.git("checkout", "-q", "main")
    other = clone(place)
    async with AsyncAgentSessionManager(place.state, save_interval_seconds=0.05) as first:
        await first.manager.flush()
        async with AsyncAgentSessionManager(other, save_interval_seconds=0.05) as second:
            assert not second.state.agents["alice"].leased
            place.git("checkout", "-q", "without")
            await until(lambda: "alice" not in first.state.agents)
            await until(lambda: second.state.agents["alice"].leased)
            assert not second.state.agents["bob"].leased


async def test_alone_no_git_is_asked(place: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("git was asked")

    for name in ("root_commits", "is_ignored", "is_set"):
        monkeypatch.setattr(worktree.Worktree, name, refuse)
    async with AsyncAgentSessionManager(place.state) as runtime:
        assert runtime.report is not None
        assert runtime.report.running_elsewhere == {}


async def test_a_start_without_a_home_is_a_start(
    place: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    async with AsyncAgentSessionManager(place.state) as runtime:
        assert all(agent.leased for agent in runtime.state.agents.values())


def test_a_directory_outside_of_git_claims_nothing(tmp_path: Path) -> None:
    assert Claims.of(str(tmp_path)) is None


def test_claims_that_somebody_cleaned_away_are_made_anew(
    repository: Repository, tmp_path: Path
) -> None:
    other = repository.root.with_name("linked")
    repository.commit("base")
    repository.git("worktree", "add", "-q", "-b", "other", str(other))
    first, second = Claims.of(str(repository.state)), Claims.of(str(other / "state"))
    assert first is not None
    assert second is not None
    assert first.take(["a", "b"]) == {}
    [file] = tmp_path.rglob("*.claim")
    file.unlink()
    assert first.take(["c"]) == {}
    assert second.take(["a", "b", "c", "d"]).keys() == {"a", "b", "c"}
    first.drop(["a"])
    assert second.take(["a", "b"]).keys() == {"b"}
    first.close()
    first.close()
    assert second.take(["b"]) == {}
    second.close()
    assert not [*tmp_path.rglob("*.claim")]
