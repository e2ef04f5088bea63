"""Live sessions in a real Redis, for other programs; the files are the truth."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_state.testing import FakeClock
from agent_state_integrations.journey import ConversationStateManager
from agent_state_integrations.journey.redis_cache import RedisConversationCache, key_of
from tests.journey.journeys import DAY, files, journeys, said
from tests.redis.servers import RedisServer

WEEK = 7 * DAY


@asynccontextmanager
async def cached(
    folder: Path, clock: FakeClock, server: RedisServer
) -> AsyncIterator[tuple[ConversationStateManager, RedisConversationCache]]:
    cache = RedisConversationCache(server.url, retry_seconds=0.05)
    async with journeys("exclusive", folder / "state", clock, cache=cache) as sessions:
        yield sessions, cache


def keys(server: RedisServer) -> set[str]:
    return set(server.ask("keys", "*").split("\n")) - {""}


async def test_the_keys_are_those_of_the_layout_and_each_expires(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    async with cached(tmp_path, clock, server) as (sessions, cache):
        sid, conversation_id = await sessions.initialize_session("ann", model_id="m1")
        message_id = ""
        for number in range(130):
            message_id = await sessions.append_message(
                "ann", sid, said(str(number)), {"emotion": "happy"} if number == 7 else None
            )
        for number in range(3):
            await sessions.record_milestone("ann", sid, f"milestone {number}")
        await clock.advance(1)
        await sessions.record_breakthrough("ann", sid, "old", message_id, confidence=0.95)
        await clock.advance(1)
        await sessions.record_breakthrough("ann", sid, "new", message_id, confidence=0.6)
        await sessions.update_context_snapshot("ann", sid, current_theme="work")
        await cache.wait_idle()

        parts = ("metadata", "emotion", "messages", "milestones", "breakthroughs",
                 "context_snapshot")  # fmt: skip
        expected = {f"session:ann:{sid}:{part}" for part in parts}
        assert keys(server) == expected | {"sessions:user:ann:index", "sessions:global:active"}
        kinds = ("hash", "hash", "list", "zset", "zset", "hash")
        for part, kind in zip(parts, kinds, strict=True):
            assert server.ask("type", f"session:ann:{sid}:{part}") == kind
        for key in keys(server):
            assert WEEK - 60 < int(server.ask("ttl", key)) <= WEEK
        assert server.ask("smembers", "sessions:user:ann:index") == sid
        assert server.ask("smembers", "sessions:global:active") == f"ann:{sid}"
        metadata = f"session:ann:{sid}:metadata"
        assert server.ask("hget", metadata, "message_count") == "130"
        assert server.ask("hget", metadata, "conversation_id") == conversation_id
        assert server.ask("hget", metadata, "last_resumed") == ""
        assert server.ask("hget", f"session:ann:{sid}:emotion", "emotion") == "happy"
        for name, value in {
            "current_emotion": "happy",
            "emotion_intensity": "0.5",
            "emotion_confidence": "0.7",
        }.items():
            assert server.ask("hget", f"session:ann:{sid}:emotion", name) == value
        for name in ("last_emotion_change", "emotion_tracking_id"):
            assert server.ask("hget", f"session:ann:{sid}:emotion", name)
        assert server.ask("hget", f"session:ann:{sid}:context_snapshot", "last_summarized")
        assert server.ask("hget", metadata, "session_version") == "1.0"
        listed = server.ask("lrange", f"session:ann:{sid}:messages", "0", "-1").split("\n")
        assert [json.loads(each)["content"] for each in listed] == [
            str(number) for number in range(30, 130)
        ]
        [latest] = server.ask("zrevrange", f"session:ann:{sid}:breakthroughs", "0", "0").split("\n")
        assert json.loads(latest)["insight"] == "new"
        assert server.ask("zcard", f"session:ann:{sid}:milestones") == "3"


async def test_ids_cannot_reach_other_keys(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    async with cached(tmp_path, clock, server) as (sessions, cache):
        own = {}
        for user in ("a", "a:b", "a%3Ab", "a%", "user:a:index", "*", "ä ö"):
            own[user], _ = await sessions.initialize_session(user)
            await sessions.append_message(user, own[user], said(f"I am {user}"))
        await cache.wait_idle()

        for user, sid in own.items():
            [message] = server.ask("lrange", key_of(user, sid, "messages"), "0", "-1").split("\n")
            assert json.loads(message)["content"] == f"I am {user}"
        for key in keys(server):
            assert key.count(":") in {2, 3}
        assert len(keys(server)) == len(own) * 5 + 1  # no milestones, no breakthroughs
        assert server.ask("scard", "sessions:global:active") == str(len(own))


async def test_ended_and_erased_sessions_leave(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    async with cached(tmp_path, clock, server) as (sessions, cache):
        gone, _ = await sessions.initialize_session("ann")
        await sessions.append_message("ann", gone, said("secret"))
        closed, _ = await sessions.initialize_session("bob")
        await cache.wait_idle()

        await sessions.close_session("bob", closed)
        assert await sessions.erase_session("ann", gone)
        # Erasing returned when it was gone here too.
        assert not [key for key in keys(server) if gone in key]
        await cache.wait_idle()
        assert server.ask("exists", "sessions:global:active") == "0"
        assert server.ask("hget", key_of("bob", closed, "metadata"), "status") == "closed"

        await clock.advance(WEEK)
        assert await sessions.cleanup_expired_sessions() == 1
        await cache.wait_idle()
        assert keys(server) == set()


async def test_nothing_off_the_record_gets_there(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    async with cached(tmp_path, clock, server) as (sessions, cache):
        sid, _ = await sessions.initialize_session("ann", off_the_record=True)
        await sessions.append_message("ann", sid, said("between us"))
        await sessions.resume_session("ann", sid)
        await sessions.close_session("ann", sid)
        cache.rewrite_all()
        await cache.wait_idle()
        assert (cache.status().written, cache.status().removed) == (0, 0)
        await sessions.erase_session("ann", sid)

        assert keys(server) == set()


async def test_while_redis_is_away_everything_goes_on_and_then_it_is_brought_there(
    tmp_path: Path, clock: FakeClock, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with cached(tmp_path, clock, server) as (sessions, cache):
        before, _ = await sessions.initialize_session("ann")
        await sessions.record_milestone("ann", before, "kept")
        silent, _ = await sessions.initialize_session("eve")
        await cache.wait_idle()
        server.kill()
        with caplog.at_level(logging.CRITICAL):
            for number in range(50):
                await sessions.append_message("ann", before, said(str(number)))
            later, _ = await sessions.initialize_session("bob")
            await sessions.resume_session("ann", before)
            while cache.status().failures == 0:
                await asyncio.sleep(0.01)
        assert cache.status().last_error
        server.start()  # empty

        await cache.wait_idle()

        assert server.ask("llen", key_of("ann", before, "messages")) == "50"
        assert server.ask("zcard", key_of("ann", before, "milestones")) == "1"
        assert server.ask("exists", key_of("bob", later, "metadata")) == "1"
        assert server.ask("exists", key_of("eve", silent, "metadata")) == "1"


async def test_a_stopped_redis_delays_neither_writing_nor_closing(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    cache = RedisConversationCache(server.url, timeout_seconds=0.2, retry_seconds=0.05)
    async with journeys("exclusive", tmp_path / "state", clock, cache=cache) as sessions:
        sid, _ = await sessions.initialize_session("ann")
        await cache.wait_idle()
        server.stop()
        async with asyncio.timeout(60):
            for number in range(100):
                await sessions.append_message("ann", sid, said(str(number)))
            assert await sessions.erase_session("ann", sid)
        server.go_on()
        await cache.wait_idle()
        assert keys(server) == set()  # what was erased while it did not answer, too
        await sessions.initialize_session("bob")
        server.stop()
        async with asyncio.timeout(60):
            await sessions.close()
        server.go_on()


async def test_what_was_lost_is_rebuilt_at_the_next_write_and_at_the_next_start(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    async with cached(tmp_path, clock, server) as (sessions, cache):
        sid, _ = await sessions.initialize_session("ann")
        for number in range(3):
            await sessions.record_milestone("ann", sid, str(number))
        await cache.wait_idle()
        server.ask("flushall")
        await sessions.record_milestone("ann", sid, "3")
        await cache.wait_idle()
        assert server.ask("zcard", key_of("ann", sid, "milestones")) == "4"
        # One too few in the middle, one too many, and a key of another type.
        milestones = key_of("ann", sid, "milestones")
        server.ask("zpopmin", milestones)
        await sessions.resume_session("ann", sid)
        await cache.wait_idle()
        assert server.ask("zcard", milestones) == "4"
        server.ask("zadd", milestones, "1", "foreign")
        await sessions.resume_session("ann", sid)
        await cache.wait_idle()
        assert server.ask("zscore", milestones, "foreign") == ""
        assert server.ask("zcard", milestones) == "4"
    server.ask("flushall")
    async with cached(tmp_path, clock, server) as (_, cache):
        await cache.wait_idle()
        assert server.ask("zcard", milestones) == "4"


async def test_one_bad_key_stops_no_other_session(
    tmp_path: Path, clock: FakeClock, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with cached(tmp_path, clock, server) as (sessions, cache):
        sid, _ = await sessions.initialize_session("ann")
        await cache.wait_idle()
        server.ask("del", key_of("ann", sid, "metadata"))
        server.ask("set", key_of("ann", sid, "milestones"), "somebody else's")
        with caplog.at_level(logging.CRITICAL):
            await sessions.record_milestone("ann", sid, "x")
            other, _ = await sessions.initialize_session("bob")
            await cache.wait_idle()
        assert server.ask("exists", key_of("bob", other, "metadata")) == "1"
        assert cache.status().failures == 1


async def test_two_writers_share_one_redis(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    caches = [RedisConversationCache(server.url) for _ in range(2)]
    async with files("shared", tmp_path / "state", clock) as one, \
            files("shared", tmp_path / "state", clock) as two:  # fmt: skip
        first = ConversationStateManager(one, cache=caches[0])
        second = ConversationStateManager(two, cache=caches[1])
        async with first, second:
            sid, _ = await first.initialize_session("ann")

            async def write(sessions: ConversationStateManager, name: str) -> None:
                for number in range(70):
                    await sessions.append_message("ann", sid, said(f"{name}{number}"))
                    if number % 10 == 0:
                        await sessions.record_milestone("ann", sid, f"{name}{number}")

            await asyncio.gather(write(first, "a"), write(second, "b"))
            for cache in caches:
                await cache.wait_idle()

            history = [each.content for each in await first.get_message_history("ann", sid, 100)]
            listed = server.ask("lrange", key_of("ann", sid, "messages"), "0", "-1").split("\n")
            assert [json.loads(each)["content"] for each in listed] == history
            assert server.ask("zcard", key_of("ann", sid, "milestones")) == "14"
            assert server.ask("hget", key_of("ann", sid, "metadata"), "message_count") == "140"


async def test_more_changes_than_it_notes_are_brought_all_the_same(
    tmp_path: Path, clock: FakeClock, server: RedisServer
) -> None:
    cache = RedisConversationCache(server.url, max_waiting=3)
    async with journeys("memory", tmp_path, clock, cache=cache) as sessions:
        own = [
            (f"user-{number}", (await sessions.initialize_session(f"user-{number}")).session_id)
            for number in range(20)
        ]
        await cache.wait_idle()
        for user, sid in own:
            assert server.ask("exists", key_of(user, sid, "metadata")) == "1"


def test_without_the_cache_nothing_of_redis_is_imported() -> None:
    program = "import sys, agent_state_integrations.journey; assert 'redis' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
