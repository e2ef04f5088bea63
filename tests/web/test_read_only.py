"""A server beside the process that owns the directory: it looks, and changes nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_state import AgentStateError, StateNotFoundError, StatePersistenceManager
from agent_state.sessions import SessionManager
from agent_state.web import ReadOnlyBackend
from agent_state_integrations.journey import ConversationStateManager
from tests.cli.commands import OWNER
from tests.web.client import answering


@asynccontextmanager
async def _owner(state: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(state), stdin=-1, stdout=-1
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        assert await owner.stdout.readline() == b"ready\n"
        yield owner
    finally:
        owner.stdin.close()
        await owner.wait()


def _files(state: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in state.rglob("*") if path.is_file()}


async def test_what_another_process_has_acknowledged_is_seen(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with _owner(state), ReadOnlyBackend(state) as directory, answering(directory) as client:
        found = await client.get("/api/agents/carol")
        ready = (await client.get("/ready")).json()

    assert (found.status_code, found.json()["status"]) == (200, "active")
    assert ready == {"status": "ready", "agents_here": 0, "writable": False}


async def test_each_answer_is_as_new_as_the_journal(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with StatePersistenceManager(state, exclusive=True) as owner:
        await owner.save_agent_state("alice", {"agent_id": "alice"})
        async with ReadOnlyBackend(state) as directory, answering(directory) as client:
            for mood in ("good", "bad", "better"):
                await owner.save_agent_state("alice", {"agent_id": "alice", "mood": mood})
                assert (await client.get("/api/agents/alice")).json()["mood"] == mood
            await owner.delete("agents", "alice")
            assert (await client.get("/api/agents/alice")).status_code == 404


async def test_many_at_once_see_what_was_acknowledged_before_they_asked(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with StatePersistenceManager(state, exclusive=True) as owner, answering_of(state) as look:
        for number in range(10):
            await owner.save_agent_state("alice", {"agent_id": "alice", "number": number})
            seen = await asyncio.gather(*(look() for _ in range(10)))
            assert seen == [number] * 10
        saving = asyncio.create_task(_save_on(owner))
        for _ in range(20):
            known = [int(one) for one in await asyncio.gather(*(look() for _ in range(5)))]
            assert min(known) >= 9
        saving.cancel()
        await asyncio.wait([saving])


async def _save_on(owner: StatePersistenceManager) -> None:
    number = 9
    while True:
        number += 1
        await owner.save_agent_state("alice", {"agent_id": "alice", "number": number})


@asynccontextmanager
async def answering_of(state: Path) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Ask which number alice has."""
    async with ReadOnlyBackend(state) as directory, answering(directory) as client:

        async def look() -> int:
            return int((await client.get("/api/agents/alice")).json()["number"])

        yield look


async def test_sessions_are_looked_at_and_every_change_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with StatePersistenceManager(state) as manager:
        sessions, journeys = SessionManager(manager), ConversationStateManager(manager)
        made = await sessions.create("ann")
        ident = made.session.session_id
        await sessions.conversations.add(ident, "guide_agent", "user", "hello")
        journey = (await journeys.initialize_session("ann")).session_id
        await manager.save_agent_state("alice", {"agent_id": "alice"})
    before = _files(state)
    mine = {"Authorization": f"Bearer {made.session_token}"}
    session, agent = f"/api/global/session/{ident}", "/api/agents/alice"
    async with ReadOnlyBackend(state) as directory, answering(directory) as client:
        page = await client.get("/api/global/session", headers=mine)
        said = page.json()["conversations"]["guide_agent"]["messages"]
        assert [message["content"] for message in said] == ["hello"]
        assert (await client.get(f"/api/journeys/ann/{journey}")).status_code == 200
        nothing: dict[str, object] = {}
        for method, path, body in (
            ("POST", "/api/global/session", nothing),
            ("PATCH", session, nothing),
            ("DELETE", session, None),
            ("POST", f"{session}/touch", None),
            ("POST", f"{session}/token", None),
            ("POST", f"{session}/conversations/guide_agent/messages", {"content": "x"}),
            ("POST", "/api/journeys/ann", nothing),
            ("GET", f"/api/journeys/ann/{journey}/export", None),
            ("POST", "/api/agents", {"agent_id": "bob", "agent_type": "x"}),
            ("POST", f"{agent}/stop", None),
            ("POST", f"{agent}/tasks", {"name": "x"}),
            ("POST", f"{agent}/mail", {"from_agent": "bob"}),
        ):
            refused = await client.request(method, path, json=body)
            assert (refused.status_code, refused.json()["code"]) == (409, "read_only"), path
        assert (await client.get("/api/restore-report")).status_code == 404
    assert _files(state) == before


async def test_a_directory_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateNotFoundError):
        async with ReadOnlyBackend(tmp_path / "none"):
            pass
    assert not (tmp_path / "none").exists()


async def test_a_view_is_closed_with_the_last_request_that_uses_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with StatePersistenceManager(state) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
    async with ReadOnlyBackend(state) as backend:
        async with backend.view() as first:
            async with backend.view() as second:
                assert second.manager is not first.manager
            assert await first.manager.load("agents", "alice") is not None
        with pytest.raises(AgentStateError, match="closed"):
            await first.manager.load("agents", "alice")
        assert await second.manager.load("agents", "alice") is not None  # the latest one stays
    with pytest.raises(AgentStateError, match="closed"):
        await second.manager.load("agents", "alice")
