"""Documents and logs as they are stored: read, edited, and what they were before."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager
from agent_state.testing import FakeClock
from agent_state.web import LiveBackend
from tests.web.client import Client, answering

ALICE = "/api/documents/agents?key=alice"


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[AsyncAgentSessionManager]:
    async with AsyncAgentSessionManager(
        tmp_path / "state", clock=FakeClock(), save_interval_seconds=10**6
    ) as runtime:
        await runtime.agents.create("alice", agent_type="writer")
        yield runtime


@pytest.fixture
async def client(runtime: AsyncAgentSessionManager) -> AsyncIterator[Client]:
    async with answering(LiveBackend(runtime=runtime)) as client:
        yield client


async def _change(runtime: AsyncAgentSessionManager) -> None:
    """Save alice with another mood."""
    found = await runtime.manager.store.get("agents", ("alice",))
    assert found is not None
    await runtime.manager.save("agents", "alice", {**json.loads(found.body), "mood": "new"})


async def test_a_document_is_shown_as_it_is_stored(client: Client) -> None:
    answer = await client.get(ALICE)
    document = answer.json()

    assert document["path"] == "agents/alice.json"
    assert document["schema_name"] == "agents/1"
    assert document["body"]["agent_type"] == "writer"
    assert answer.headers["etag"] == f'"{document["revision"]}"'


async def test_an_edit_reaches_the_file_and_the_running_agent(
    client: Client, runtime: AsyncAgentSessionManager, tmp_path: Path
) -> None:
    found = await client.get(ALICE)
    body = {**found.json()["body"], "mood": "good"}
    saved = await client.put(
        ALICE, json={"body": body}, headers={"If-Match": found.headers["etag"]}
    )
    await runtime.manager.flush()

    assert saved.status_code == 200
    stored = json.loads((tmp_path / "state" / "agents" / "alice.json").read_text())
    assert stored["data"]["mood"] == "good" if "data" in stored else stored["mood"] == "good"
    assert (await client.get("/api/agents/alice")).json()["mood"] == "good"
    assert (runtime.agents.get("alice").model_extra or {})["mood"] == "good"


async def test_an_edit_of_what_has_changed_since_is_refused(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    found = await client.get(ALICE)
    await _change(runtime)
    edit = {"body": {**found.json()["body"], "mood": "old"}}
    stale = await client.put(ALICE, json=edit, headers={"If-Match": found.headers["etag"]})
    without = await client.put(ALICE, json=edit)

    assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")
    assert (without.status_code, without.json()["code"]) == (428, "precondition_required")
    assert (await client.get("/api/agents/alice")).json()["mood"] == "new"


async def test_an_edit_that_is_not_valid_is_refused(client: Client) -> None:
    before = (await client.get(ALICE)).json()
    wrong = {"body": {"agent_id": 5}}
    answer = await client.put(ALICE, json=wrong, headers={"If-Match": "*"})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    assert (await client.get(ALICE)).json() == before


async def test_the_document_of_an_agent_that_works_is_not_edited(
    client: Client, runtime: AsyncAgentSessionManager
) -> None:
    begun, finish = asyncio.Event(), asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: Any, task: Any) -> None:
        begun.set()
        await finish.wait()

    await runtime.agents.create("bob", agent_type="worker")
    task = await runtime.tasks.submit("bob", "long")
    async with asyncio.timeout(60):
        await begun.wait()
    path = "/api/documents/agents?key=bob"
    answer = await client.put(path, json={"body": {"agent_id": "bob"}}, headers={"If-Match": "*"})
    finish.set()
    await runtime.tasks.result(task)

    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


async def test_the_latest_versions_of_a_document_are_known(
    client: Client, runtime: AsyncAgentSessionManager, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    await runtime.manager.flush()
    author = ("-c", "user.name=An\u2028n", "-c", "user.email=ann@example.org")
    for command in (
        ("init", "--quiet"),
        ("add", "."),
        (*author, "commit", "-qm", "the\x85 first\r one"),
    ):
        subprocess.run(["git", *command], cwd=state, check=True, timeout=60)
    await _change(runtime)
    history = (await client.get(ALICE.replace("documents", "history"))).json()["items"]

    assert history[0]["source"] == "current"
    assert history[0]["body"]["mood"] == "new"
    committed = history[-1]
    assert (committed["source"], committed["author"]) == ("git", "An\u2028n")
    assert committed["message"] == "the\x85 first\r one"
    assert "mood" not in committed["body"]


async def test_versions_of_an_agent_have_their_conversations(
    client: Client, runtime: AsyncAgentSessionManager, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    turns = [{"role": "user", "content": f"{number} " + "x" * 400} for number in range(12)]
    talker = {"agent_id": "talker", "context": {"conversation_history": turns[:11]}}
    await runtime.manager.save_agent_state("talker", talker)
    await runtime.manager.flush()
    author = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org")
    for command in (("init", "--quiet"), ("add", "."), (*author, "commit", "-qm", "one")):
        subprocess.run(["git", *command], cwd=state, check=True, timeout=60)
    talker["context"] = {"conversation_history": turns}
    await runtime.manager.save_agent_state("talker", talker)
    await runtime.manager.flush()

    shown = (await client.get("/api/documents/agents?key=talker")).json()
    assert shown["body"]["context"]["conversation_history"] == turns
    versions = (await client.get("/api/history/agents?key=talker")).json()["items"]
    found = {
        version["source"]: version["body"]["context"]["conversation_history"]
        for version in versions
    }
    assert found == {"current": turns, "snapshot": turns[:11], "git": turns[:11]}


async def test_logs_are_listed_and_read(client: Client, runtime: AsyncAgentSessionManager) -> None:
    for number in range(5):
        await runtime.manager.append("notes", ("a", "b"), {"n": number})

    listed = (await client.get("/api/logs", params={"kind": "notes"})).json()["items"]
    lines = (await client.get("/api/logs/notes?key=a&key=b&last=2")).json()["items"]
    above = (await client.get("/api/logs/notes?key=a&key=b&after=4")).json()["items"]

    assert listed == [{"kind": "notes", "key": ["a", "b"], "path": "notes/a/b.jsonl"}]
    assert [(line["seq"], line["record"]["n"]) for line in lines] == [(4, 3), (5, 4)]
    assert [line["seq"] for line in above] == [5]


@pytest.mark.parametrize("key", ["..", "../x", "a/../../b"])
async def test_no_path_leads_out_of_the_directory(client: Client, key: str) -> None:
    for path in ("/api/documents/agents", "/api/history/agents"):
        assert (await client.get(path, params={"key": key})).status_code == 404
    assert (await client.get("/api/documents/..%2F..", params={"key": key})).status_code in {
        404,
        422,
    }
