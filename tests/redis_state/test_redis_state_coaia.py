"""The coaia transport: what two tools without a time to live have to be made to do."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from agent_state.redis.client import connect
from agent_state.testing import FakeClock
from agent_state_integrations.redis_state import (
    CoaiaTransport,
    RedisSessionManager,
    TransportError,
)
from tests.redis.servers import RedisServer, free_port
from tests.redis_state.coaia import TOMORROW, installed
from tests.redis_state.redis_states import Place, command, session

pytestmark = pytest.mark.long("starts the coaia server as a process")

KEY = "agentic_flywheel:session:s"
INDEX = "agentic_flywheel:index"


@pytest.fixture
async def place(server: RedisServer) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place("coaia", server, stack)


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    async with connect(server.url) as client:
        yield client


def children() -> set[int]:
    """The processes that we started and have not reaped."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


async def test_a_session_expires_by_its_envelope(place: Place, redis: Redis) -> None:
    clock = FakeClock()
    manager = place.manager(clock=clock, sliding=False)
    await manager.save_session(session("s"), ttl_seconds=100)
    await manager.save_session(session("for ever"), ttl_seconds=math.inf)
    assert await redis.pttl(KEY) == -1

    await clock.advance(99.9)
    assert await manager.load_session("s") is not None
    await clock.advance(0.1)

    assert await manager.load_session("s") is None
    assert await manager.list_sessions() == ["for ever"]
    assert not await manager.delete_session("s")
    await clock.advance(1e8)
    assert await manager.list_sessions() == ["for ever"]
    assert await manager.save_session(session("s"))
    assert await manager.list_sessions() == ["for ever", "s"]


async def test_loading_begins_the_time_again_without_writing_the_session(
    place: Place, redis: Redis
) -> None:
    clock = FakeClock()
    manager, other = place.manager(clock=clock), place.manager(clock=clock)
    await manager.save_session(session("s"), ttl_seconds=100)
    written = await redis.get(KEY)

    for _ in range(5):
        await clock.advance(90)
        assert await other.load_session("s") is not None
    assert await redis.get(KEY) == written
    assert await manager.list_sessions() == ["s"]

    await clock.advance(100)
    assert await manager.load_session("s") is None


async def test_a_renewal_is_of_that_version_alone(place: Place) -> None:
    clock = FakeClock()
    manager = place.manager(clock=clock)
    await manager.save_session(session("s"), ttl_seconds=100)
    await clock.advance(50)
    await manager.load_session("s")  # until 150

    await manager.save_session(session("s"), ttl_seconds=10)
    await clock.advance(20)

    assert await manager.load_session("s") is None


async def test_a_deleted_session_leaves_a_tombstone_alone(place: Place, redis: Redis) -> None:
    manager = place.manager()
    await manager.save_session(session("s", context={"much": "x" * 1000}))

    await manager.delete_session("s")

    assert list(json.loads(await redis.get(KEY) or "")) == ["_dropped_at"]


async def test_the_server_can_die_in_the_middle_of_a_call(place: Place, redis: Redis) -> None:
    transport = place.transport(timeout_seconds=60)
    manager = place.manager(transport=transport)
    await manager.save_session(session("s"))
    died = transport.pid
    place.server.stop()
    saving = asyncio.create_task(manager.save_session(session("s", total_queries=1)))
    loading = asyncio.create_task(manager.load_session("s"))
    async with asyncio.timeout(60):
        while len(transport._server._calls) < 2:
            await asyncio.sleep(0)

    os.kill(died, signal.SIGKILL)

    assert not await saving
    assert await loading is None
    assert "has ended" in (manager.last_error or "")
    place.server.go_on()
    assert await manager.save_session(session("s", total_queries=2))
    loaded = await manager.load_session("s")
    assert loaded is not None
    assert loaded.total_queries == 2
    assert died not in children()


async def test_a_server_that_waits_for_redis_is_killed_and_started_again(place: Place) -> None:
    transport = place.transport(timeout_seconds=1, start_timeout_seconds=5, retry_seconds=0.1)
    manager = place.manager(transport=transport)
    assert await manager.save_session(session("s"))
    place.server.stop()

    assert not await manager.save_session(session("s", total_queries=1))
    assert transport.pid is None
    assert not await manager.save_session(session("s", total_queries=1))  # waits at its start

    place.server.go_on()
    await until_saved(manager)


async def until_saved(manager: RedisSessionManager) -> None:
    async with asyncio.timeout(60):
        while not await manager.save_session(session("s")):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("unbuffered", "reason"), [("1", "Redis was away"), ("", "Redis is not available")]
)
async def test_a_redis_that_is_down_at_the_start_is_found_later(
    place: Place, caplog: pytest.LogCaptureFixture, unbuffered: str, reason: str
) -> None:
    place.server.kill()
    # Without it, what the server prints is seen at its end, and its first answer is what tells.
    transport = place.transport(retry_seconds=0.1, environment={"PYTHONUNBUFFERED": unbuffered})
    manager = place.manager(transport=transport)
    before = children()

    assert not await manager.save_session(session("s"))
    assert reason in caplog.text
    assert children() == before

    place.server.start()
    await until_saved(manager)
    assert await manager.list_sessions() == ["s"]


async def test_it_is_not_started_again_all_the_time(place: Place) -> None:
    clock = FakeClock()
    place.server.kill()
    manager = place.manager(clock=clock)
    assert not await manager.save_session(session("s"))
    place.server.start()

    assert not await manager.save_session(session("s"))
    assert "not started again yet" in (manager.last_error or "")

    await clock.advance(1)
    assert await manager.save_session(session("s"))


async def test_closing_ends_the_process_and_a_call_starts_another(place: Place) -> None:
    transport = place.transport()
    manager = place.manager(transport=transport)
    before = children()
    await manager.save_session(session("s"))
    assert children() - before == {transport.pid}

    await transport.close()

    assert children() == before
    assert await manager.list_sessions() == ["s"]


async def test_closing_ends_the_calls_that_are_under_way(place: Place) -> None:
    transport = place.transport(timeout_seconds=60)
    manager = place.manager(transport=transport)
    await manager.save_session(session("s"))
    place.server.stop()
    loading = asyncio.create_task(manager.load_session("s"))
    async with asyncio.timeout(60):
        while not transport._server._calls:
            await asyncio.sleep(0)

    await transport.close()

    assert await loading is None


async def test_a_caller_cancelled_while_the_server_starts_leaves_nothing(place: Place) -> None:
    transport = place.transport()
    manager = place.manager(transport=transport)
    before = children()
    loading = asyncio.create_task(manager.load_session("s"))
    async with asyncio.timeout(60):
        while children() == before:
            await asyncio.sleep(0)

    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading

    assert children() == before
    assert await manager.save_session(session("s"))


async def test_an_answer_nobody_waits_for_is_not_given_to_another(place: Place) -> None:
    transport = place.transport()
    for n in range(20):
        await transport.put(f"k{n}", {"n": n, "text": "x" * 10_000}, math.inf)
    loads = [asyncio.create_task(transport.get(f"k{n}", sliding=False)) for n in range(20)]
    await asyncio.sleep(0.01)
    for load in loads[::2]:
        load.cancel()

    found = await asyncio.gather(*loads, return_exceptions=True)

    assert [each["n"] for each in found[1::2] if isinstance(each, dict)] == list(range(1, 20, 2))


ODD_TOOLS = """
read request
echo '{"id":7,"method":"ping"}'
read pong
echo '{"id":2,"result":{"tools":[null,{"name":[]},{"name":"t","inputSchema":[]}]}}'
read more"""


def answering(line: str) -> str:
    return f"read request; echo '{line}'; read more"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (("no-such-program",), "there is no program"),
        (("false",), "has ended"),
        (("sleep", "60"), "not started in"),
        (("echo", "not JSON"), "has ended"),
        (("head", "-c", "3000000", "/dev/zero"), "too long"),
        (("sh", "-c", answering('{"id":1,"error":{"message":"nothing for you"}}')), "nothing for"),
        (("sh", "-c", answering('{"id":1,"result":[]}')), "no result"),
        (("sh", "-c", answering('{"id":1,"result":{}}') + ODD_TOOLS), "no coaia_tash"),
    ],
)
async def test_a_program_that_is_no_server_is_told(
    place: Place, program: tuple[str, ...], reason: str
) -> None:
    before = children()
    wait = 0.2 if program[0] == "sleep" else 30
    transport = place.transport(command=program, start_timeout_seconds=wait, max_bytes=1000)
    manager = place.manager(transport=transport)

    assert not await manager.save_session(session("s"))

    assert reason in (manager.last_error or "")
    assert children() == before


async def test_errors_that_are_told_as_text_are_errors(place: Place) -> None:
    transport = place.transport()

    for tool, arguments, said in (
        ("coaia_list", {}, "not found"),
        ("coaia_tash", {"key": "k"}, "validation"),
        ("coaia_fetch", {"key": "k", "ttl": "9"}, "unexpected keyword"),
        ("coaia_fetch", {"key": "k"}, "not found in Redis"),
    ):
        with pytest.raises(TransportError, match=said):
            await transport._call(tool, arguments)
    assert await transport.fetch("k") is None


async def test_a_wrong_type_in_redis_is_an_error_and_not_a_miss(place: Place, redis: Redis) -> None:
    await redis.rpush(KEY, "x")
    manager = place.manager()

    assert await manager.load_session("s") is None

    assert "WRONGTYPE" in (manager.last_error or "")


async def test_the_server_sees_little_of_our_environment_and_says_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("UPSTASH_REDIS_REST_URL", "https://elsewhere.example")
    transport = place.transport(environment={"MORE": "yes"})
    await place.manager(transport=transport).save_session(session("s"))

    of_server = Path(f"/proc/{transport.pid}")
    environment = (of_server / "environ").read_text()

    assert "sk-secret" not in environment
    assert "elsewhere" not in environment
    assert "MORE=yes" in environment
    assert (of_server / "fd/2").readlink() == Path("/dev/null")


async def test_another_redis_that_the_server_finds_by_itself_is_not_taken(
    tmp_path: Path, place: Place
) -> None:
    # A socket that is away: the server goes on to REDIS_HOST, or localhost, by itself.
    there = place.server
    transport = CoaiaTransport(
        f"unix://{tmp_path}/away.sock",
        command=command(),
        environment={"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(there.port), "KV_URL": there.url},
    )
    manager = place.manager(transport=transport)

    assert not await manager.save_session(session("s"))

    assert "Redis was away" in (manager.last_error or "")
    await transport.close()


async def test_tools_that_a_server_offers_beyond_are_used(place: Place, redis: Redis) -> None:
    python = str(installed() / "python")
    manager = place.manager(transport=place.transport(command=(python, "-c", TOMORROW)))
    await place.manager().save_session(session("by the other server"))
    for name in ("s", "[t]"):
        await manager.save_session(session(name))
    await redis.delete(INDEX)  # nothing but coaia_list can know now

    assert await manager.list_sessions() == ["[t]", "by the other server", "s"]
    assert await manager.delete_session("s")
    assert not await redis.exists(KEY)
    assert await manager.list_sessions("[[]*") == ["[t]"]


def test_a_command_is_a_list() -> None:
    with pytest.raises(TypeError, match="command"):
        CoaiaTransport(f"redis://localhost:{free_port()}", command="coaiapy-mcp")
