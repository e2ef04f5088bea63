"""``If-Match`` of every operation that changes one document, compared in the commit itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_state import AsyncAgentSessionManager, MemoryStateStore, StatePersistenceManager
from agent_state.errors import Key, PreconditionFailedError, RevisionConflictError
from agent_state.preconditions import required_revision
from agent_state.protocols import Change, Delete, Put
from agent_state.sessions import SessionManager
from agent_state.testing import FakeClock
from agent_state.web import LiveBackend
from agent_state_integrations.journey import ConversationStateManager
from tests.web.client import Client, answering, openapi
from tests.web.test_statuses import Call, World

SEEN_AT = {
    "put_document": "/api/documents/agents?key=alice",
    "update_session": "{session}",
    "touch_session": "{session}",
    "destroy_session": "{session}",
    "rotate_token": "{session}",
    "revoke_token": "{session}",
    "update_conversation_context": "{session}",
    "track_workflow": "{session}/orchestrators/O",
    "report_service": "{session}",
    "put_session_state": "{session}/states/st",
    "resume_journey": "{journey}",
    "close_journey": "{journey}",
    "erase_journey": "{journey}",
    "wake_agent": "/api/agents/alice/sleep",
    "let_sleep": "/api/agents/alice/sleep",
    "start_agent": "/api/agents/alice",
    "stop_agent": "/api/agents/alice",
    "cancel_task": "/api/agents/alice/tasks/{task}",
    "retry_task": "/api/tasks/lost",
    "cancel_any_task": "/api/tasks/{task}",
    "delete_task": "/api/tasks/lost",
    "read_mail": "{mail}",
    "reply_to_mail": "{mail}",
    "archive_mail": "{mail}",
}
"""Where one sees what an operation changes, and its ``ETag``."""


class IntrudedStore(MemoryStateStore):
    """Before the next commit another writer changes all that it is to change."""

    armed = False
    intruded: set[tuple[str, Key]]

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if self.armed:
            self.armed, self.intruded = False, set()
            for change in changes:
                place = (change.kind, change.key)
                found = None
                if isinstance(change, Put | Delete) and place not in self.intruded:
                    found = await self.get(*place)
                if found is not None:
                    body = found.body[:-1] + b',"zz_intruder":true}'
                    await super().commit([Put(*place, body, found.schema)])
                    self.intruded.add(place)
        return await super().commit(changes)


@asynccontextmanager
async def _world() -> AsyncIterator[tuple[Client, World, IntrudedStore]]:
    clock = FakeClock()
    store = IntrudedStore(clock=clock)
    async with AsyncAgentSessionManager(
        store=store, clock=clock, save_interval_seconds=10**6
    ) as runtime:
        sessions = SessionManager(runtime.manager)
        journeys = ConversationStateManager(runtime.manager)
        world = World(runtime, sessions, journeys)
        await world.fill()
        backend = LiveBackend(runtime=runtime, sessions=sessions, services=[journeys])
        async with answering(backend) as client:
            yield client, world, store


def _call(world: World, operation: str) -> tuple[str, Call]:
    """Where its document is seen, and a call that changes it."""
    [call] = [one for one in world.calls() if one.operation == operation]
    if operation == "delete_task":
        call = replace(call, path="/api/tasks/lost")
    if operation == "start_agent":  # of one that is stopped; it is
        assert world.runtime.agents.get("alice").status == "stopped"
    places = {
        "session": f"/api/global/session/{world.session}",
        "journey": f"/api/journeys/ann/{world.journey}",
        "mail": f"/api/agents/alice/mail/{world.mail}",
        "task": world.task,
    }
    return SEEN_AT[operation].format(**places), call


async def _send(client: Client, call: Call, if_match: str) -> httpx.Response:
    headers = {"If-Match": if_match}
    return await client.request(call.method, call.path, json=call.body, headers=headers)


def test_each_operation_that_reads_the_header_is_known() -> None:
    assert {
        operation["operationId"]
        for operations in openapi()["paths"].values()
        for operation in operations.values()
        if any(one["name"] == "if-match" for one in operation.get("parameters", []))
    } == set(SEEN_AT)


@pytest.mark.parametrize("operation", sorted(SEEN_AT))
async def test_what_is_seen_is_what_may_be_changed(operation: str) -> None:
    async with _world() as (client, world, _):
        seen_at, call = _call(world, operation)
        etag = (await client.get(seen_at)).headers["etag"]

        for stale in ('"0"', '"99", W/"98"', "", "nonsense"):
            answer = await _send(client, call, stale)
            assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
        assert (await client.get(seen_at)).headers["etag"] == etag
        done = await _send(client, call, f'"0", {etag}')

        assert done.status_code == call.status, done.text


@pytest.mark.parametrize("operation", sorted({*SEEN_AT} - {"stop_agent"}))  # it is stopped
async def test_another_writer_between_the_look_and_the_commit_is_noticed(operation: str) -> None:
    async with _world() as (client, world, store):
        seen_at, call = _call(world, operation)
        etag = (await client.get(seen_at)).headers["etag"]
        store.armed = True

        answer = await _send(client, call, etag)

        assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
        assert store.intruded
        for kind, key in store.intruded:  # nothing has been changed since
            found = await store.get(kind, key)
            assert found is not None
            assert b"zz_intruder" in found.body


async def test_what_does_not_exist_has_no_version() -> None:
    async with _world() as (client, world, _):
        session = f"/api/global/session/{world.session}"
        await client.post("/api/agents/alice/wake")
        for path, body in (
            ("/api/agents/alice/sleep", {"seconds": 5}),
            ("/api/agents/alice/wake", None),
        ):
            answer = await client.post(path, json=body, headers={"If-Match": "*"})
            assert answer.status_code == 412, path
        made = await client.put(
            f"{session}/states/new", json={"state_data": {}}, headers={"If-Match": "*"}
        )
        nobody = await client.post("/api/agents/nobody/stop", headers={"If-Match": "*"})

        assert (made.status_code, nobody.status_code) == (412, 404)
        assert (await client.get(f"{session}/states/new")).status_code == 404
        assert (await client.get("/api/agents/alice/sleep")).status_code == 404


async def test_any_version_that_there_is_will_do() -> None:
    async with _world() as (client, world, _):
        for operation in ("cancel_task", "update_session", "read_mail"):
            _, call = _call(world, operation)
            assert (await _send(client, call, "*")).status_code == 200


# -- without a server --------------------------------------------------------------------------


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[StatePersistenceManager]:
    async with StatePersistenceManager(tmp_path / "state") as manager:
        await manager.save("notes", "a", {"n": 1})
        yield manager


async def test_a_revision_is_required_of_the_first_change_only(
    manager: StatePersistenceManager,
) -> None:
    with required_revision("notes", ("a",), 1):
        await manager.save("notes", "b", {"n": 1})  # another document
        assert await manager.save("notes", "a", {"n": 2}) == 2
        assert await manager.save("notes", "a", {"n": 3}) == 3
    with required_revision("notes", ("a",), 2):
        with pytest.raises(PreconditionFailedError) as failed:
            await manager.save("notes", "a", {"n": 4})
        with pytest.raises(PreconditionFailedError):
            await manager.delete("notes", "a")
        with pytest.raises(PreconditionFailedError):
            await manager.erase("notes", "a")

    assert failed.value.actual == 3
    stored: Any = await manager.load("notes", "a")
    assert stored.n == 3


async def test_who_has_read_an_older_version_looks_again(manager: StatePersistenceManager) -> None:
    await manager.save("notes", "a", {"n": 2})

    with required_revision("notes", ("a",), 2):
        with pytest.raises(RevisionConflictError):
            await manager.save("notes", "a", {"n": 3}, expected=1)
        await manager.save("notes", "a", {"n": 3}, expected=2)


async def test_what_is_erased_has_the_required_revision(manager: StatePersistenceManager) -> None:
    with required_revision("notes", ("a",), 1):
        assert await manager.erase("notes", "a") == 1

    assert await manager.load("notes", "a") is None
