"""``agent-state git restore``: beside a server of its own process, and where nobody owns."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.verify import verify
from agent_state_integrations.git import GitRepository, restore
from tests.git.repositories import CLEAN, Repository, agent_state
from tests.git.server import Server


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)


async def begin(repository: Repository) -> str:
    """Alice and bob with a conversation, a task that is not due, and mail; the commit."""
    async with AsyncAgentSessionManager(repository.state) as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="worker")
            await runtime.tasks.submit(name, "later", delay_seconds=10**6)
            await runtime.mail.send("carol", name, subject="hello", body="")
    await change(repository.state, "good")
    return repository.commit("good")


async def change(state: Path, mood: str) -> None:
    """Change everything that alice and bob have."""
    async with StatePersistenceManager(state) as manager:
        for name in ("alice", "bob"):
            async with manager.edit("agents", name) as agent:
                agent.mood = mood
                agent.context.conversation_history = [{"role": "user", "content": mood}]
            for kind in ("tasks", "mail"):
                for key in await manager.keys(kind, name):
                    async with manager.edit(kind, key) as found:
                        found.mood = mood


async def moods(state: Path, agent: str) -> set[str]:
    """What each document of an agent says."""
    found = set()
    async with StatePersistenceManager(state) as manager:
        loaded = await manager.load_agent_state(agent)
        assert loaded is not None
        found.add(loaded.context.conversation_history[0]["content"])
        found.add((loaded.model_extra or {})["mood"])
        for kind in ("tasks", "mail"):
            async for one in manager.scan(kind, agent):
                found.add((one.state.model_extra or {}).get("mood", "made since"))
    return found


async def run(repository: Repository, *args: str) -> dict[str, Any]:
    """The command's report."""
    done = await asyncio.to_thread(agent_state, repository.root, "git", "restore", *args, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("way", ["exclusive", "shared"])
async def test_an_agent_whose_handler_runs_is_loaded_anew(
    repository: Repository, servers: list[Server], way: str
) -> None:
    good = await begin(repository)
    await change(repository.state, "bad")
    server = await Server.begin(repository.state, way)
    servers.append(server)
    await server.submit("alice", "hang")
    assert await server.said() == {"hangs": "alice", "attempts": 1}

    report = await run(repository, good, "alice")
    assert {path.partition("/")[0] for path in report["restored"]} == {"agents", "tasks", "mail"}
    [task] = report["stayed"]  # the one whose handler hangs: it is begun again
    assert task.startswith("tasks/alice/")
    assert await server.said() == {"hangs": "alice", "attempts": 2}
    memory = await server.memory_of("alice")
    assert memory["mood"] == "good"
    assert memory["status"] == "active"
    assert (await server.memory_of("bob"))["mood"] == "bad"

    await server.end()
    assert await moods(repository.state, "alice") == {"good", "made since"}
    assert await moods(repository.state, "bob") == {"bad"}
    assert (await verify(repository.state)).problems == []
    assert list((repository.state / ".quarantine").rglob("*.json*")) == []


@pytest.mark.parametrize("way", ["exclusive", "shared"])
async def test_all_agents_also_those_that_are_gone_and_their_sleep(
    repository: Repository, servers: list[Server], way: str
) -> None:
    await begin(repository)
    async with AsyncAgentSessionManager(repository.state) as runtime:
        await runtime.agents.sleep("bob", seconds=10**6)
    good = repository.commit("bob sleeps")
    async with AsyncAgentSessionManager(repository.state) as runtime:
        await runtime.agents.wake("bob")
        await runtime.agents.sleep("alice", seconds=10**6)
    await change(repository.state, "bad")
    async with StatePersistenceManager(repository.state) as manager:
        await manager.erase("agents", "bob")
        await manager.save("notes", "since", {"n": 1})
    server = await Server.begin(repository.state, way)
    servers.append(server)
    assert server.start["agents"] == ["alice"]

    report = await run(repository, good)
    assert "agents/bob.json" in report["restored"]
    assert "sleep/bob.json" in report["restored"]
    assert report["removed"] == ["sleep/alice.json"]
    assert report["stayed"] == ["notes/since.json"]
    assert (await server.memory_of("bob"))["status"] == "sleeping"
    await server.submit("alice")
    await server.worked("alice")  # she is awake
    await server.end()
    for name in ("alice", "bob"):
        assert "bad" not in await moods(repository.state, name)
    assert (await verify(repository.state)).problems == []


async def test_a_directory_that_nobody_owns_is_opened(repository: Repository) -> None:
    good = await begin(repository)
    await change(repository.state, "bad")
    git = GitRepository(repository.state)
    assert len((await asyncio.to_thread(restore, git, good, "alice")).restored) == 3
    assert await moods(repository.state, "alice") == {"good"}
    assert await moods(repository.state, "bob") == {"bad"}
    again = await asyncio.to_thread(restore, git, good, "alice")
    assert (again.restored, len(again.unchanged)) == ([], 3)

    repository.git("checkout", "-q", "--orphan", "empty")
    repository.git("rm", "-rqf", "state")
    assert len((await asyncio.to_thread(restore, git, good)).restored) == 6
    assert await moods(repository.state, "bob") == {"good"}
    assert (await verify(repository.state)).problems == []


@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])
async def test_an_owner_without_a_runtime_is_named_or_writes_with_us(
    repository: Repository, exclusive: bool
) -> None:
    good = await begin(repository)
    await change(repository.state, "bad")
    # A killed runtime has left that it runs.
    (repository.state / ".runtime/runtime.json").write_text(
        '{"at": "2026-01-01T00:00:00Z", "owner": "x", "status": "running"}'
    )
    asking = ("git", "restore", good, "alice", "--wait", "0.5")
    async with StatePersistenceManager(repository.state, exclusive=exclusive) as manager:
        done = await asyncio.to_thread(agent_state, repository.root, *asking)
        loaded = await manager.load_agent_state("alice")
        assert loaded is not None
        mood = (loaded.model_extra or {})["mood"]
    if exclusive:
        assert done.returncode == 2
        assert "has no runtime, which alone answers: stop it and try again" in done.stderr
        assert done.stderr.count("\n") == 1
        assert [*(repository.state / "requests").iterdir()] == []
        assert mood == "bad"
    else:
        assert done.returncode == 0, done
        assert mood == "good"


async def test_nothing_is_restored_if_one_document_is_invalid(
    repository: Repository, servers: list[Server]
) -> None:
    await begin(repository)
    (repository.state / "agents/dora.json").write_text('{"agent_id": ["no"]}')
    invalid = repository.commit("invalid")
    (repository.state / "agents/dora.json").unlink()
    await change(repository.state, "bad")
    servers.append(await Server.begin(repository.state))
    done = await asyncio.to_thread(agent_state, repository.root, "git", "restore", invalid)
    assert done.returncode == 2
    assert "agent_id" in done.stderr
    await servers[0].end()
    assert await moods(repository.state, "alice") == {"bad"}


async def test_requests_and_what_is_of_one_run_do_not_come_back(repository: Repository) -> None:
    await begin(repository)
    for name in ("requests/old", "system/runtime", "system/settings"):
        path = repository.state / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"action": "stop", "agents": ["alice"]}))
    good = repository.commit("with a request")
    repository.git("rm", "-rq", "state/requests", "state/system")
    report = await run(repository, good)
    assert report["restored"] == ["system/settings.json"]


async def test_during_a_merge_an_agent_is_not_restored(
    repository: Repository, servers: list[Server]
) -> None:
    good = await begin(repository)
    for branch, mood in (("other", "theirs"), ("main", "ours")):
        repository.git("checkout", "-q", "-B", branch, good)
        await change(repository.state, mood)
        repository.commit(mood)
    assert repository.run("merge", "-m", "m", "other").returncode == 1
    servers.append(await Server.begin(repository.state))
    done = await asyncio.to_thread(agent_state, repository.root, "git", "restore", good, "alice")
    assert done.returncode != 0
    assert "merge" in done.stderr
    assert "<<<<<<<" in (repository.state / "agents/alice.json").read_text()
    repository.git("merge", "--abort")
    await run(repository, good, "alice")
    assert (await servers[0].memory_of("alice"))["mood"] == "good"


async def test_an_encrypted_agent_is_restored_with_its_keys(
    repository: Repository, tmp_path: Path
) -> None:
    encryption = pytest.importorskip("agent_state.encryption", reason="needs cryptography")
    masters = tmp_path / "masters"
    masters.write_text(encryption.generate_master_key())
    keys = encryption.Keyring(tmp_path / "keys", encryption.MasterKeys.from_file(masters))
    revisions = []
    for mood in ("good", "bad"):
        async with StatePersistenceManager(repository.state, encryption=keys) as manager:
            await manager.save_agent_state("alice", {"agent_id": "alice", "mood": mood})
        revisions.append(repository.commit(mood))
    command = ("git", "restore", revisions[0], "alice")
    given = ("--keyring", str(tmp_path / "keys"), "--master-keys", str(masters))
    async with AsyncAgentSessionManager(repository.state, encryption=keys) as runtime:
        done = await asyncio.to_thread(agent_state, repository.root, *command)
        assert done.returncode == 2
        assert "give its keyring" in done.stderr
        done = await asyncio.to_thread(agent_state, repository.root, *given, *command)
        assert done.stdout == f"1 document restored from {revisions[0]}\n"
        assert (runtime.agents.get("alice").model_extra or {})["mood"] == "good"
