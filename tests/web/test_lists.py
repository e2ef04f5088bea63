"""The summary, and lists over all agents: filtered, in order, in pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StateCorruptedError,
    StatePersistenceManager,
)
from agent_state.testing import FakeClock
from agent_state.web import LiveBackend, ReadOnlyBackend
from tests.runtime.runtimes import counted
from tests.web.client import Client, answering


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def runtime(tmp_path: Path, clock: FakeClock) -> AsyncIterator[AsyncAgentSessionManager]:
    async with AsyncAgentSessionManager(
        tmp_path / "state", clock=clock, save_interval_seconds=10**6
    ) as runtime:
        for agent_id, agent_type in (("alice", "writer"), ("bob", "writer"), ("carol", "critic")):
            await runtime.agents.create(agent_id, agent_type=agent_type)
        yield runtime


@pytest.fixture
async def client(runtime: AsyncAgentSessionManager) -> AsyncIterator[Client]:
    async with answering(LiveBackend(runtime=runtime)) as client:
        yield client


async def _submit(runtime: AsyncAgentSessionManager, clock: FakeClock, *tasks: str) -> None:
    """Queue tasks, named ``agent/name``, a second apart."""
    for task in tasks:
        agent_id, _, name = task.partition("/")
        await runtime.tasks.submit(agent_id, name)
        await clock.advance(1)


async def _all(client: Client, path: str, **query: Any) -> list[dict[str, Any]]:
    """The items of all pages."""
    found: list[dict[str, Any]] = []
    while True:
        page = (await client.get(path, params=query)).json()
        assert page["unusable"] == []
        found += page["items"]
        if page["next"] is None:
            return found
        query["after"] = page["next"]


async def test_the_summary_counts_what_there_is(
    client: Client, runtime: AsyncAgentSessionManager, clock: FakeClock, tmp_path: Path
) -> None:
    await _submit(runtime, clock, "alice/a", "bob/b", "carol/c")
    await runtime.manager.save("tasks", ("bob", "lost"), {"task_id": "lost", "status": "dead"})
    await runtime.mail.send("alice", "bob", subject="one")
    await runtime.agents.sleep("carol", seconds=100)
    (tmp_path / "state" / "agents" / "bob.json").write_text("{ a person was here")
    summary = (await client.get("/api/summary")).json()

    assert (summary["mode"], summary["writable"]) == ("runtime", True)
    assert summary["directory"] == str(tmp_path / "state")
    assert summary["agents_here"] == 3
    assert summary["tasks_by_status"] == {"dead": 1, "pending": 3}
    assert (summary["tasks"], summary["dead_letters"]) == (4, 1)
    assert (summary["mail"], summary["unread_mail"], summary["sleepers"]) == (1, 1, 1)
    assert summary["queues"] == [
        {"agent_type": "critic", "waiting": 1, "running": 0, "oldest_seconds": 1.0},
        {"agent_type": "writer", "waiting": 2, "running": 0, "oldest_seconds": 3.0},
    ]


async def test_a_task_that_is_to_begin_later_makes_no_queue_old(
    client: Client, runtime: AsyncAgentSessionManager, clock: FakeClock
) -> None:
    await runtime.tasks.submit("alice", "later", delay_seconds=100)
    await clock.advance(10)
    [queue] = (await client.get("/api/summary")).json()["queues"]

    assert queue == {"agent_type": "writer", "waiting": 1, "running": 0, "oldest_seconds": 0.0}


async def test_the_summary_follows_every_change(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    async def counts() -> dict[str, int]:
        found: dict[str, int] = (await client.get("/api/summary")).json()["tasks_by_status"]
        return found

    first = await runtime.tasks.submit("alice", "first")
    assert await counts() == {"pending": 1}
    await runtime.tasks.submit("alice", "second")
    assert await counts() == {"pending": 2}
    await runtime.tasks.cancel(first)
    assert await counts() == {"cancelled": 1, "pending": 1}
    await runtime.manager.delete("tasks", ("alice", first.task_id))
    assert await counts() == {"pending": 1}


async def test_the_summary_costs_the_same_for_any_number_of_waiting_tasks(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    async def add(*names: str) -> None:
        """Queue these tasks."""
        await asyncio.gather(
            *(runtime.manager.save("tasks", ("alice", name), {"task_id": name}) for name in names)
        )

    async def cost() -> int:
        """The lines of Python of a summary in which nothing is new; other tasks may run, too."""
        await runtime.manager.flush()
        await client.get("/api/summary")
        costs = []
        for _ in range(5):
            with counted() as lines:
                summary = (await client.get("/api/summary")).json()
            assert summary["queues"][0]["waiting"] == summary["tasks"]
            costs.append(lines())
        return min(costs)

    await add("first")
    few = await cost()
    await add(*map(str, range(600)))

    assert await cost() < few + 600


async def test_the_summary_of_another_process_s_directory_names_its_owner(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path / "state", exclusive=True) as owner:
        await owner.save_agent_state("alice", {"agent_id": "alice"})
        async with ReadOnlyBackend(tmp_path / "state") as directory, answering(directory) as client:
            summary = (await client.get("/api/summary")).json()

    assert (summary["mode"], summary["writable"], summary["agents"]) == ("read-only", False, 1)
    assert summary["owner_pid"] is not None


async def test_tasks_are_listed_the_newest_first_in_pages(
    client: Client, runtime: AsyncAgentSessionManager, clock: FakeClock
) -> None:
    names = [f"n{number}" for number in range(7)]
    await _submit(
        runtime, clock, *(f"{'alice' if i % 2 else 'bob'}/{n}" for i, n in enumerate(names))
    )

    newest = await _all(client, "/api/tasks", limit=3)
    oldest = await _all(client, "/api/tasks", limit=3, oldest_first=True)

    assert [task["name"] for task in newest] == names[::-1]
    assert [task["name"] for task in oldest] == names


async def test_a_page_goes_on_where_it_ended_whatever_has_changed(
    client: Client, runtime: AsyncAgentSessionManager, clock: FakeClock
) -> None:
    await _submit(runtime, clock, "alice/a", "alice/b", "alice/c", "alice/d")
    first = (await client.get("/api/tasks", params={"limit": 2})).json()
    await runtime.manager.delete("tasks", ("alice", first["items"][1]["task_id"]))
    await _submit(runtime, clock, "alice/e")
    second = (await client.get("/api/tasks", params={"after": first["next"]})).json()

    assert [task["name"] for task in first["items"]] == ["d", "c"]
    assert [task["name"] for task in second["items"]] == ["b", "a"]


async def test_tasks_are_filtered(
    client: Client, runtime: AsyncAgentSessionManager, clock: FakeClock
) -> None:
    await _submit(runtime, clock, "alice/a", "bob/a", "bob/b")
    failed = {"task_id": "f", "name": "c", "status": "Failed", "error": "no such file"}
    await runtime.manager.save("tasks", ("carol", "f"), failed)

    async def names(**query: Any) -> list[str]:
        return sorted(task["name"] for task in await _all(client, "/api/tasks", **query))

    assert await names(agent_id="bob") == ["a", "b"]
    assert await names(name="a") == ["a", "a"]
    assert await names(status="pending", name="a", agent_id="bob") == ["a"]
    assert await names(status=["failed", "dead"]) == ["c"]
    assert await names(error="such") == ["c"]
    assert await names(older_than=2) == ["a", "a"]
    assert await names(newer_than=1.5) == ["b"]
    assert (await client.get("/api/tasks?status=nonsense")).status_code == 422


async def test_agents_are_filtered_and_in_pages(client: Client) -> None:
    async def ids(**query: Any) -> list[str]:
        return [agent["agent_id"] for agent in await _all(client, "/api/agents", **query)]

    assert await ids(limit=1) == ["alice", "bob", "carol"]
    assert await ids(agent_type="writer") == ["alice", "bob"]
    assert await ids(text="aro") == ["carol"]
    assert await ids(status="stopped") == []


async def test_mail_of_all_agents_is_listed_and_filtered(
    client: Client, runtime: AsyncAgentSessionManager, clock: FakeClock
) -> None:
    await runtime.mail.send("alice", "bob", subject="one")
    await clock.advance(1)
    sent = await runtime.mail.send("bob", "alice", subject="two")
    await runtime.mail.read("alice", sent.message_id)

    async def subjects(**query: Any) -> list[str]:
        return [mail["subject"] for mail in await _all(client, "/api/mail", **query)]

    assert await subjects(limit=1) == ["two", "one"]
    assert await subjects(oldest_first=True) == ["one", "two"]
    assert await subjects(status="unread") == ["one"]
    assert await subjects(to_agent="alice") == ["two"]
    assert await subjects(from_agent="alice") == ["one"]
    assert await subjects(text="tw") == ["two"]


async def test_sleepers_are_listed_by_the_end_of_their_sleep(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    await runtime.agents.sleep("alice", reason="no end", wake_on=["system_event"])
    await runtime.agents.sleep("bob", seconds=50, reason="tired")
    await runtime.agents.sleep("carol", seconds=20, reason="very tired")

    async def sleepers(**query: Any) -> list[str]:
        return [one["agent_id"] for one in await _all(client, "/api/sleepers", **query)]

    assert await sleepers(limit=1) == ["carol", "bob", "alice"]
    assert await sleepers(limit=2, latest_first=True) == ["alice", "bob", "carol"]
    assert await sleepers(text="tired") == ["carol", "bob"]
    assert await sleepers(text="ali") == ["alice"]


async def test_the_sleepers_that_match_wake_once_they_were_counted(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    for agent_id, reason in (("alice", "tired"), ("bob", "tired"), ("carol", "waits")):
        await runtime.agents.sleep(agent_id, seconds=100, reason=reason)
    stranger = {"agent_id": "dora", "sleep_until": "2999-01-01T00:00:00Z", "reason": "tired"}
    await runtime.manager.save_sleep_state("dora", stranger)
    asked = {"text": "tired"}
    counted = (await client.post("/api/sleepers", json={**asked, "dry_run": True})).json()
    before = await _all(client, "/api/sleepers")
    done = (await client.post("/api/sleepers", json=asked)).json()

    assert (counted["matched"], counted["changed"], len(before)) == (3, 0, 4)
    assert (done["matched"], done["changed"], [*done["refused"]]) == (3, 2, ["dora"])
    assert {one["agent_id"] for one in await _all(client, "/api/sleepers")} == {"carol", "dora"}


async def test_sessions_are_listed_and_left_out_once_they_have_ended(clock: FakeClock) -> None:
    async with (
        StatePersistenceManager(store=MemoryStateStore(clock=clock), clock=clock) as manager,
        answering(LiveBackend(manager=manager)) as client,
    ):
        for user in ("ann", "ben"):
            made = await client.post("/api/global/session", json={"user_id": user})
            assert made.status_code == 201
            await clock.advance(1)

        async def users(**query: Any) -> list[str]:
            return [one["user_id"] for one in await _all(client, "/api/global/sessions", **query)]

        assert await users(limit=1) == ["ben", "ann"]
        assert await users(limit=1, oldest_first=True) == ["ann", "ben"]
        assert await users(user_id="ann") == ["ann"]
        await clock.advance(8 * 86_400)
        assert await users() == []
        assert (await client.get("/api/summary")).json()["sessions"] == 2  # not cleaned up yet


async def test_files_in_quarantine_are_listed_with_their_reasons(
    client: Client, runtime: AsyncAgentSessionManager, clock: FakeClock, tmp_path: Path
) -> None:
    await runtime.manager.flush()
    for kind, name in (("agents", "dora"), ("sleep", "emil")):
        (tmp_path / "state" / kind).mkdir(exist_ok=True)
        (tmp_path / "state" / kind / f"{name}.json").write_text("{ broken")
        with suppress(StateCorruptedError):  # the runtime may have seen it before
            await runtime.manager.load(kind, name)
        await clock.advance(1)

    async def files(**query: Any) -> list[str]:
        return [str(one["was"]) for one in await _all(client, "/api/quarantine", **query)]

    [found] = await _all(client, "/api/quarantine", kind="agents")
    assert found["was"] == "agents/dora.json"
    assert found["reason"]
    assert await files(oldest_first=True) == ["agents/dora.json", "sleep/emil.json"]
    assert await files(limit=1) == ["sleep/emil.json", "agents/dora.json"]
    assert await files(text="emil") == ["sleep/emil.json"]
    assert await files(text=found["reason"], kind="sleep") == ["sleep/emil.json"]
    assert (await client.get("/api/summary")).json()["quarantined"] == 2


async def test_what_another_process_changes_is_listed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with (
        StatePersistenceManager(state) as other,
        StatePersistenceManager(state) as manager,
        answering(LiveBackend(manager=manager)) as client,
    ):
        assert await _all(client, "/api/agents") == []
        await other.save_agent_state("alice", {"agent_id": "alice"})
        async with asyncio.timeout(30):
            while not (found := await _all(client, "/api/agents")):
                await asyncio.sleep(0.01)

    assert [agent["agent_id"] for agent in found] == ["alice"]


async def test_what_changed_last_is_listed(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    assert (await client.get("/api/changes")).json()["items"] == []
    for mood in ("good", "better"):
        await runtime.manager.save_agent_state("dora", {"agent_id": "dora", "mood": mood})
    async with asyncio.timeout(30):
        while len(found := (await client.get("/api/changes")).json()["items"]) < 2:
            await asyncio.sleep(0.01)

    assert [(one["kind"], one["key"], one["revision"]) for one in found] == [
        ("agents", ["dora"], 2),
        ("agents", ["dora"], 1),
    ]
