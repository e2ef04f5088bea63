"""Sessions on a real Redis: as the store of several processes, and as a mirror of the files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.redis import RedisMirror, RedisStateStore
from agent_state.sessions import SessionManager, SessionNotFoundError, UnknownTokenError
from agent_state_integrations.orchestration import Orchestration
from tests.redis.servers import RedisServer
from tests.sessions.managers import session_manager

SECRET = "a secret that must not stay"


def stored(server: RedisServer) -> StatePersistenceManager:
    return StatePersistenceManager(store=RedisStateStore(server.url))


async def test_sessions_kept_by_redis_alone_are_there_for_the_next_process(
    server: RedisServer,
) -> None:
    async with stored(server) as files:
        sessions = session_manager(files)
        token = (await sessions.create("ann")).session_token
        for number in range(30):
            await sessions.conversations.add("s1", "guide_agent", "user", number)
        await sessions.workflows.track("s1", "w1")
        await sessions.states.save("s1", {"a": 1})
    async with stored(server) as files:
        sessions = session_manager(files)
        session = await sessions.tokens.resolve(token)
        assert list(session.workflow_states) == ["w1"]
        page = await sessions.conversations.page("s1", "guide_agent", limit=10)
        assert [message.content for message in page.messages] == list(range(20, 30))
        back = await sessions.conversations.page(
            "s1", "guide_agent", before=page.next_before, limit=100
        )
        assert [message.content for message in back.messages] == list(range(20))
        assert (await sessions.states.load("s1")).state_data == {"a": 1}


async def test_two_processes_on_one_redis_lose_and_double_nothing(server: RedisServer) -> None:
    async with stored(server) as files, stored(server) as others:
        managers = [session_manager(files), SessionManager(others)]
        await managers[0].create("ann")

        async def work(sessions: SessionManager, number: int) -> None:
            await sessions.conversations.add("s1", "guide_agent", "user", "own")
            await sessions.conversations.add(
                "s1", "guide_agent", "user", "once", dedupe_key=f"key {number}"
            )
            await Orchestration.of(sessions).report_service("s1", "FileParser")

        await asyncio.gather(*(work(each, number) for each in managers for number in range(6)))
        page = await managers[1].conversations.page("s1", "guide_agent")
        said = [message.content for message in page.messages]
        assert (said.count("own"), said.count("once"), page.message_count) == (12, 6, 18)
        context = await Orchestration.of(managers[0]).context("s1")
        assert context.enabling_services["FileParser"].invocations == 12


async def test_a_session_destroyed_on_redis_is_gone_for_everybody(server: RedisServer) -> None:
    async with stored(server) as files, stored(server) as others:
        sessions, other = session_manager(files), SessionManager(others)
        token = (await sessions.create("ann")).session_token
        await other.conversations.add("s1", "guide_agent", "user", SECRET)
        assert await sessions.destroy("s1") is True
        with pytest.raises(SessionNotFoundError):
            await other.conversations.add("s1", "guide_agent", "user", SECRET)
        with pytest.raises(UnknownTokenError):
            await other.tokens.resolve(token)
        for kind in ("sessions", "conversations", "session_tokens", "session_users"):
            assert await others.keys(kind) == []
            assert await others.store.logs(kind) == []


async def test_what_is_destroyed_is_gone_from_the_mirror_too(
    server: RedisServer, tmp_path: Path
) -> None:
    mirror = RedisMirror(server.url)
    async with StatePersistenceManager(tmp_path / "state", exclusive=True, mirror=mirror) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        await sessions.create("bob")
        await sessions.conversations.add("s1", "guide_agent", "user", SECRET)
        await files.flush()
    assert "s1" in server.ask("keys", "*")
    async with StatePersistenceManager(
        tmp_path / "state", exclusive=True, mirror=RedisMirror(server.url)
    ) as files:
        assert await SessionManager(files).destroy("s1") is True
    left = server.ask("keys", "*")
    assert "s1" not in left
    assert "s2" in left
