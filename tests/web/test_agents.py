"""Agents, tasks and mail over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest

from agent_state import AsyncAgentSessionManager, MemoryStateStore, StatePersistenceManager
from agent_state.web import LiveBackend, ReadOnlyBackend
from agent_state.web.app import close
from agent_state.web.operations import MAX_SCANNED
from tests.web.client import Client, answering, working


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[AsyncAgentSessionManager]:
    async with working(AsyncAgentSessionManager(tmp_path / "state")) as runtime:
        yield runtime


@pytest.fixture
async def client(runtime: AsyncAgentSessionManager) -> AsyncIterator[Client]:
    async with answering(LiveBackend(runtime=runtime)) as client:
        yield client


async def _agent(client: Client, agent_id: str = "alice", agent_type: str = "worker") -> None:
    body = {"agent_id": agent_id, "agent_type": agent_type}
    assert (await client.post("/api/agents", json=body)).status_code == 201


async def test_an_agent_that_is_created_twice_is_left_as_it_is(client: Client) -> None:
    first = {"agent_id": "alice", "agent_type": "worker", "metadata": {"team": "red"}}
    made = await client.post("/api/agents", json=first)
    again = await client.post("/api/agents", json={**first, "metadata": {"team": "blue"}})

    assert (made.status_code, again.status_code) == (201, 200)
    assert again.json()["metadata"] == {"team": "red"}
    assert (await client.get("/api/agents/alice")).json()["agent_type"] == "worker"


async def test_an_agent_of_another_type_is_refused(client: Client) -> None:
    await _agent(client)
    refused = await client.post("/api/agents", json={"agent_id": "alice", "agent_type": "other"})

    assert refused.status_code == 422
    assert refused.json()["code"] == "invalid"


async def test_a_task_is_done_and_its_result_waited_for(client: Client) -> None:
    await _agent(client)
    task = {"name": "count", "payload": {"text": "agents must not forget"}}
    done = await client.post("/api/agents/alice/tasks", params={"wait": 20}, json=task)

    assert done.status_code == 201
    assert (done.json()["status"], done.json()["result"]) == ("completed", 4)


async def test_a_task_that_nobody_does_is_given_as_it_is_when_the_wait_is_over(
    client: Client,
) -> None:
    await _agent(client, agent_type="nobody")
    task = await client.post("/api/agents/alice/tasks", params={"wait": 0.05}, json={"name": "x"})
    path = f"/api/agents/alice/tasks/{task.json()['task_id']}"

    assert task.json()["status"] == "pending"
    assert (await client.get(path, params={"wait": 0.05})).json()["status"] == "pending"
    assert (await client.post(f"{path}/cancel")).json() == {"cancelled": True}
    assert (await client.post(f"{path}/cancel")).json() == {"cancelled": False}
    ended = await client.get(path, params={"wait": 20})
    assert ended.json()["status"] == "cancelled"


async def test_a_server_that_ends_lets_nobody_wait_on(client: Client) -> None:
    await _agent(client, agent_type="nobody")
    asked = client.post("/api/agents/alice/tasks", params={"wait": 60}, json={"name": "x"})
    waiting = asyncio.create_task(asked)
    async with asyncio.timeout(60):
        while not (await client.get("/api/agents/alice/tasks")).json()["items"]:
            pass
        await close(client.app)
        answer = await waiting
        ready = await client.get("/ready")

    assert answer.json()["status"] == "pending"
    assert (ready.status_code, ready.json()["code"]) == (503, "stopping")


async def test_a_task_sent_twice_under_one_key_is_one_task(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    await _agent(client, agent_type="nobody")
    key = {"Idempotency-Key": "order-7"}
    answers = await asyncio.gather(
        *(client.post("/api/agents/alice/tasks", json={"name": "x"}, headers=key) for _ in range(8))
    )

    assert len({answer.json()["task_id"] for answer in answers}) == 1
    assert len(await runtime.manager.keys("tasks", "alice")) == 1


async def test_tasks_come_in_pages_and_by_status(client: Client) -> None:
    await _agent(client, agent_type="nobody")
    made = [
        (await client.post("/api/agents/alice/tasks", json={"name": "x"})).json()["task_id"]
        for _ in range(5)
    ]
    await client.post(f"/api/agents/alice/tasks/{made[2]}/cancel")

    found: list[str] = []
    after = None
    for _ in range(3):
        params = {"limit": "2"} if after is None else {"limit": "2", "after": after}
        page = (await client.get("/api/agents/alice/tasks", params=params)).json()
        found += [task["task_id"] for task in page["items"]]
        after = page["next"]
    cancelled = await client.get("/api/agents/alice/tasks", params={"status": "cancelled"})

    assert found == sorted(made)
    assert after is None
    assert [task["task_id"] for task in cancelled.json()["items"]] == [made[2]]


async def test_mail_is_delivered_read_answered_and_archived(client: Client) -> None:
    await _agent(client)
    await _agent(client, "bob", "nobody")
    mail = {"from_agent": "alice", "subject": "how far?", "expects_reply": True}
    key = {"Idempotency-Key": "m-1"}
    sent = await client.post("/api/agents/bob/mail", json=mail, headers=key)
    again = await client.post("/api/agents/bob/mail", json=mail, headers=key)
    message_id = sent.json()["message_id"]
    path = f"/api/agents/bob/mail/{message_id}"

    assert (again.json()["message_id"], again.json()["dedupe_key"]) == (message_id, "m-1")
    assert (await client.get(path)).json()["status"] == "unread"
    assert (await client.post(f"{path}/read")).json()["status"] == "read"
    answer = await client.post(f"{path}/reply", json={"body": {"percent": 80}})
    assert (answer.status_code, answer.json()["to_agent"]) == (201, "alice")
    assert (await client.get(path)).json()["status"] == "replied"
    assert (await client.post(f"{path}/archive")).json()["status"] == "archived"
    inbox = await client.get("/api/agents/alice/mail", params={"status": "unread"})
    assert [one["reply_to"] for one in inbox.json()["items"]] == [message_id]


async def test_two_clients_that_count_from_one_are_told_apart(client: Client) -> None:
    for agent_id in ("alice", "bob", "carol"):
        await _agent(client, agent_id, "nobody")
    key = {"Idempotency-Key": "1"}
    mail = [
        {"from_agent": "bob", "subject": "from bob"},
        {"from_agent": "carol", "subject": "from carol"},
    ]
    path = "/api/agents/alice/mail"
    for message in (*mail, *mail):
        assert (await client.post(path, json=message, headers=key)).status_code == 201
    refused = await client.post(path, json={**mail[0], "subject": "other"}, headers=key)

    stored = (await client.get(path)).json()["items"]
    assert {one["subject"] for one in stored} == {"from bob", "from carol"}
    assert (refused.status_code, refused.json()["code"]) == (422, "key_reused")
    assert "'1' was used before" in refused.json()["detail"]


async def test_a_task_of_another_name_has_another_key_and_one_of_other_content_is_refused(
    client: Client,
) -> None:
    await _agent(client, agent_type="nobody")
    key, path = {"Idempotency-Key": "order-7"}, "/api/agents/alice/tasks"
    bodies = [{"name": name, "payload": {"amount": 5}} for name in ("pay", "refund", "pay")]
    made = [await client.post(path, json=body, headers=key) for body in bodies]
    refused = await client.post(
        path, json={"name": "pay", "payload": {"amount": 6}}, headers=key, params={"wait": 1}
    )
    empty = await client.post(path, json=bodies[0], headers={"Idempotency-Key": ""})

    assert [one.status_code for one in made] == [201, 201, 201]
    assert len({one.json()["task_id"] for one in made}) == 2
    assert (refused.status_code, refused.json()["code"]) == (422, "key_reused")
    assert empty.status_code == 422
    assert len((await client.get(path)).json()["items"]) == 2


async def test_mail_to_an_agent_that_does_not_exist_is_refused(client: Client) -> None:
    answer = await client.post("/api/agents/nobody/mail", json={"from_agent": "alice"})

    assert answer.status_code == 404


async def test_a_sleep_and_an_agent_may_have_any_time_that_there_is(client: Client) -> None:
    await client.post("/api/agents", json={"agent_id": "late", "agent_type": "none"})
    until = {"until": "9999-12-31T23:59:59-05:00"}

    slept = await client.post("/api/agents/late/sleep", json=until)

    assert (slept.status_code, slept.json()["sleep_until"]) == (200, "9999-12-31T23:59:59.999999Z")
    assert (await client.get("/api/agents/late/sleep")).json() == slept.json()


async def test_an_agent_sleeps_and_is_woken(client: Client) -> None:
    await _agent(client)
    nap = {"seconds": 3600, "wake_on": ["mail_received"], "reason": "tired"}
    slept = await client.post("/api/agents/alice/sleep", json=nap)

    assert slept.json()["wake_events"] == ["mail_received"]
    assert (await client.get("/api/agents/alice")).json()["status"] == "sleeping"
    assert (await client.get("/api/agents/alice/sleep")).json()["reason"] == "tired"
    assert (await client.post("/api/agents/alice/wake")).json() == {"woken": True}
    assert (await client.post("/api/agents/alice/wake")).json() == {"woken": False}
    assert (await client.get("/api/agents/alice/sleep")).status_code == 404


async def test_a_stopped_agent_does_nothing_until_it_is_started(client: Client) -> None:
    await _agent(client)
    assert (await client.post("/api/agents/alice/stop")).json()["status"] == "stopped"
    task = await client.post("/api/agents/alice/tasks", params={"wait": 0.05}, json={"name": "x"})
    assert task.json()["status"] == "pending"

    assert (await client.post("/api/agents/alice/start")).json()["status"] != "stopped"
    done = await client.get(
        f"/api/agents/alice/tasks/{task.json()['task_id']}", params={"wait": 20}
    )
    assert done.json()["status"] == "completed"


@pytest.mark.parametrize("agent_id", ["a/b", "../etc", "ä ö", "%2F", "a%b", "?x=1", "CON", "n\n"])
async def test_any_id_can_be_asked_for(client: Client, agent_id: str) -> None:
    await _agent(client, agent_id)

    found = await client.get(f"/api/agents/{quote(agent_id, safe='')}")

    assert (found.status_code, found.json()["agent_id"]) == (200, agent_id)


@pytest.mark.parametrize("wrong", ["%ff", "%ed%a0%80", "a" * 4097])
async def test_what_is_no_id_is_refused(client: Client, wrong: str) -> None:
    assert (await client.get(f"/api/agents/{wrong}")).status_code == 422


async def test_a_damaged_document_is_told_beside_the_others(
    tmp_path: Path,
) -> None:
    async with StatePersistenceManager(tmp_path / "state") as manager:  # no runtime, which mends
        for agent_id in ("alice", "bob"):
            await manager.save_agent_state(agent_id, {"agent_id": agent_id})
        (tmp_path / "state/agents/carol.json").write_text("{")

        async with answering(LiveBackend(manager=manager)) as client:
            page = (await client.get("/api/agents")).json()

    assert [agent["agent_id"] for agent in page["items"]] == ["alice", "bob"]
    assert page["unusable"] == ["carol"]


async def test_a_document_in_a_merge_of_which_no_version_is_known_is_told_beside_the_others(
    tmp_path: Path,
) -> None:
    conflict = '{\n<<<<<<< ours\n"mood": 1\n=======\n"mood": 2\n>>>>>>> theirs\n}\n'
    async with StatePersistenceManager(tmp_path / "state") as manager:
        for agent_id in ("alice", "bob"):
            await manager.save_agent_state(agent_id, {"agent_id": agent_id})
        (tmp_path / "state/agents/carol.json").write_text(conflict)

        async with answering(LiveBackend(manager=manager)) as client:
            page = (await client.get("/api/agents")).json()
            refused = await client.get("/api/agents/carol")

    assert [agent["agent_id"] for agent in page["items"]] == ["alice", "bob"]
    assert page["unusable"] == ["carol"]
    assert (refused.status_code, refused.json()["code"]) == (503, "unmerged")


async def _queue(manager: StatePersistenceManager, count: int, **fields: str) -> None:
    """Queue tasks ``00000`` to ``count`` for alice, and alice."""
    await manager.save_agent_state("alice", {"agent_id": "alice"})
    group = manager.new_group()
    for number in range(count):
        task = {"task_id": f"{number:05}", "agent_id": "alice", "name": "x", **fields}
        group.save("tasks", ("alice", f"{number:05}"), task)
    await manager.commit(group)


async def test_a_filtered_page_ends_after_so_many_documents_and_says_where_to_go_on() -> None:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        await _queue(manager, MAX_SCANNED + 2, status="pending")
        async with answering(LiveBackend(manager=manager)) as client:
            params = {"status": "dead"}
            first = (await client.get("/api/agents/alice/tasks", params=params)).json()
            params["after"] = first["next"]
            second = (await client.get("/api/agents/alice/tasks", params=params)).json()

    assert (first["items"], first["next"]) == ([], f"{MAX_SCANNED - 1:05}")
    assert (second["items"], second["next"]) == ([], None)


async def test_a_page_has_at_most_a_thousand_items() -> None:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        await _queue(manager, 1001)
        async with answering(LiveBackend(manager=manager)) as client:
            page = await client.get("/api/agents/alice/tasks", params={"limit": 1000})
            refused = await client.get("/api/agents/alice/tasks", params={"limit": 1001})

    assert (len(page.json()["items"]), page.json()["next"]) == (1000, "00999")
    assert refused.status_code == 422


async def test_tasks_of_all_agents_are_operated_by_their_ids_alone(client: Client) -> None:
    for agent_id in ("alice", "bob"):
        await _agent(client, agent_id, "unknown")
        for number in range(3):
            task = {"name": f"n{number}", "payload": {"n": number}}
            made = await client.post(f"/api/agents/{agent_id}/tasks", json=task)
            assert made.status_code == 201
    found: list[str] = []
    params = {"limit": 4, "oldest_first": True}
    while True:
        page = (await client.get("/api/tasks", params=params)).json()
        found += [f"{task['agent_id']} {task['name']}" for task in page["items"]]
        if page["next"] is None:
            break
        params["after"] = page["next"]
    assert found == [f"{agent} n{number}" for agent in ("alice", "bob") for number in range(3)]

    cancelled = {"action": "cancel", "filter": {"name": "n1"}, "dry_run": True}
    counted = (await client.post("/api/tasks", json=cancelled)).json()
    assert counted == {"matched": 2, "changed": 0, "refused": {}, "dry_run": True}
    done = (await client.post("/api/tasks", json={**cancelled, "dry_run": False})).json()
    assert (done["matched"], done["changed"]) == (2, 2)
    gone = (await client.get("/api/tasks", params={"status": "cancelled"})).json()["items"]
    assert [task["agent_id"] for task in gone] == ["bob", "alice"]  # the newest first

    one, other = (task["task_id"] for task in gone)
    again = await client.post(f"/api/tasks/{one}/retry")
    assert again.json() == {"retried": True}
    assert (await client.post(f"/api/tasks/{one}/retry")).json() == {"retried": False}
    refused = await client.delete(f"/api/tasks/{one}")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_finished")
    assert (await client.post(f"/api/tasks/{one}/cancel")).json() == {"cancelled": True}
    assert (await client.get(f"/api/tasks/{one}")).json()["status"] == "cancelled"
    assert (await client.delete(f"/api/tasks/{one}")).status_code == 204
    assert (await client.get(f"/api/tasks/{one}")).status_code == 404
    named = {"action": "delete", "tasks": [f"alice/{other}", one]}
    report = (await client.post("/api/tasks", json=named)).json()
    assert (report["changed"], report["refused"]) == (1, {one: "no such task"})
    both = {**named, "filter": {}}
    assert (await client.post("/api/tasks", json=both)).status_code == 422


async def test_a_reader_of_a_directory_finds_tasks_by_their_ids(
    client: Client, runtime: AsyncAgentSessionManager, tmp_path: Path
) -> None:
    await _agent(client)
    body = {"name": "count", "payload": {"text": "two words"}}
    task = (await client.post("/api/agents/alice/tasks", params={"wait": 20}, json=body)).json()
    async with ReadOnlyBackend(tmp_path / "state") as directory, answering(directory) as reader:
        assert (await reader.get(f"/api/tasks/{task['task_id']}")).json()["result"] == 2
        page = (await reader.get("/api/tasks", params={"status": ["dead", "completed"]})).json()
        assert [item["task_id"] for item in page["items"]] == [task["task_id"]]
        assert (await reader.post(f"/api/tasks/{task['task_id']}/retry")).status_code == 409
