"""How failures of Redis are classified, and which errors a link raises."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,  # noqa: A004  # redis-py's own
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004  # redis-py's own
)

from agent_state.errors import DurabilityUnknownError, StorageError, StorageFullError
from agent_state.redis.client import (
    FailureKind,
    PipelineBatcher,
    RedisLink,
    Script,
    connect,
    failure_kind,
    redis_error_of,
)
from tests.redis.servers import RedisServer, free_port


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("Connection closed by server."), "away"),
        (TimeoutError("Timeout reading from socket"), "away"),
        (BusyLoadingError("Redis is loading the dataset in memory"), "away"),
        (ResponseError("LOADING Redis is loading"), "away"),
        (ResponseError("CLUSTERDOWN Hash slot not served"), "away"),
        (AuthenticationError("invalid username-password pair"), "refused"),
        (NoPermissionError("this user has no permissions"), "refused"),
        (ResponseError("NOAUTH Authentication required."), "refused"),
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "full"),
        (ResponseError("OOM command not allowed"), "full"),
        (ResponseError("@user_script: 12: -OOM command not allowed"), "full"),
        (ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), "full"),
        (ReadOnlyError("You can't write against a read only replica."), "read-only"),
        (ResponseError("@user_script:3: -READONLY You can't write"), "read-only"),
        (ResponseError("WRONGTYPE Operation against a key"), "wrong-type"),
        (ResponseError("ERR unknown command"), "failing"),
        (ValueError("OOM"), "failing"),
    ],
)
def test_a_failure_has_one_kind(error: Exception, kind: FailureKind) -> None:
    assert failure_kind(error) == kind
    wrapped = StorageError("reading")
    wrapped.__cause__ = error
    assert failure_kind(wrapped) == kind


def test_an_error_of_the_disk_is_no_failure_of_redis() -> None:
    error = StorageError("no such file")
    error.__cause__ = OSError(2, "no such file")
    assert redis_error_of(error) is None
    assert failure_kind(error) == "failing"


async def test_a_refused_connection_leaves_nothing_unknown() -> None:
    link = RedisLink(f"redis://:secret@127.0.0.1:{free_port()}/0", anchor="a")
    with pytest.raises(StorageError, match="saving") as caught:
        await link.run("SET", "a", "1", doing="saving")
    assert type(caught.value) is StorageError
    assert failure_kind(caught.value) == "away"
    assert "secret" not in str(caught.value)
    assert caught.value.path == link.url
    assert caught.value.message.startswith("saving: Error ")
    with pytest.raises(StorageError) as unnamed:
        await link.exchange([("GET", "a")])
    assert unnamed.value.message.startswith("Error ")
    await link.close()


@pytest.mark.parametrize("retries", [0, 1])
async def test_a_lost_reply_is_an_unknown_outcome(server: RedisServer, retries: int) -> None:
    link = RedisLink(server.url, anchor="a", timeout_seconds=1.0, retries=retries)
    await link.run("SET", "a", "1")
    server.stop()
    with pytest.raises(DurabilityUnknownError, match="saving: ") as caught:
        await link.run("SET", "a", "2", doing="saving")
    assert isinstance(redis_error_of(caught.value), RedisError)
    server.go_on()
    await link.close()


async def test_a_full_server_is_a_typed_error(server: RedisServer) -> None:
    link = RedisLink(server.url, anchor="a", timeout_seconds=10)
    await link.run("CONFIG SET", "maxmemory", 1)
    with pytest.raises(StorageFullError):
        await link.run("SET", "a", "1")
    await link.close()


async def test_a_batch_gives_each_caller_its_own_error(server: RedisServer) -> None:
    link = RedisLink(server.url, anchor="a", timeout_seconds=10)
    batcher = PipelineBatcher(link)
    await batcher.run("SET", "a", "text")
    with pytest.raises(StorageError, match="counting: ") as caught:
        await batcher.run("HGET", "a", "field", doing="counting")
    assert failure_kind(caught.value) == "wrong-type"
    assert await batcher.run("GET", "a") == b"text"
    server.kill()
    first, second = batcher.run("GET", "a", doing="one"), batcher.run("GET", "a", doing="two")
    with pytest.raises(StorageError, match=r"^one: "):
        await first
    with pytest.raises(StorageError, match=r"^two: "):
        await second
    await batcher.ended()
    await link.close()


async def test_a_script_runs_where_the_server_does_not_know_it(server: RedisServer) -> None:
    link = RedisLink(server.url, anchor="a", timeout_seconds=10)
    script = Script.load("locks")
    for _ in range(2):
        micros = await link.run(*script.call(["locks"], ["clean"]))
        assert int(micros) > 1_600_000_000_000_000
        await link.run("SCRIPT FLUSH")
    assert not isinstance(await link.exchange([script.call(["locks"], ["clean"])]), Exception)
    await link.close()


async def test_the_text_of_a_script_is_sent_once(server: RedisServer) -> None:
    link = RedisLink(server.url, anchor="a", timeout_seconds=10)
    script = Script.load("locks")
    for _ in range(5):
        await link.run(*script.call(["locks"], ["clean"]))
    assert await link.run("SCRIPT EXISTS", script.sha) in ([1], [True])
    calls = await link.run("INFO", "commandstats")
    assert calls["cmdstat_eval"]["calls"] == 1
    assert calls["cmdstat_evalsha"]["calls"] == 5
    await link.close()


async def test_a_scan_finds_every_key_of_a_pattern_and_type_page_by_page(
    server: RedisServer,
) -> None:
    link = RedisLink(server.url, anchor="a", timeout_seconds=10)
    names = {f"k:{number}".encode() for number in range(2_500)}
    await link.exchange([("SET", name, "1") for name in names] + [("HSET", "k:hash", "f", "1")])

    pages = [page async for page in link.scan("k:*", of_type="STRING")]

    assert {key for page in pages for key in page} == names
    assert len(pages) > 1
    every = [key async for page in link.scan("k:*") for key in page]
    assert set(every) == names | {b"k:hash"}
    server.kill()
    with pytest.raises(StorageError, match="counting: "):
        async for _ in link.scan("k:*", doing="counting"):
            pass
    await link.close()


async def test_several_commands_have_a_reply_or_a_refusal_each(server: RedisServer) -> None:
    link = RedisLink(server.url, anchor="a", timeout_seconds=10)
    script = Script.load("locks")
    commands = [
        ("SET", "a", "1"),
        ("HGET", "a", "field"),
        script.call(["locks"], ["clean"]),
        ("GET", "a"),
    ]
    for _ in range(2):
        done, refused, micros, found = await link.exchange(commands)
        assert (done, found) == (True, b"1")
        assert failure_kind(refused) == "wrong-type"
        assert int(micros) > 1_600_000_000_000_000
    await link.close()


@pytest.mark.parametrize("retries", [0, 1, 2])
async def test_a_connection_that_is_lost_is_tried_again_so_often(retries: int) -> None:
    connections = 0

    async def lose(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    async with await asyncio.start_server(lose, "127.0.0.1", 0) as losing:
        port = losing.sockets[0].getsockname()[1]
        link = RedisLink(f"redis://127.0.0.1:{port}/0", anchor="a", retries=retries)
        with pytest.raises(StorageError):
            await link.run("GET", "a")
        await link.close()
    assert connections == retries + 1


async def test_a_client_has_the_limits_that_were_asked_for() -> None:
    client = connect("redis://localhost/3", timeout_seconds=2.5, max_connections=7)
    pool: Any = client.connection_pool
    assert (pool.max_connections, pool.timeout) == (7, 2.5)
    options = pool.connection_kwargs
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (2.5, 2.5)
    assert options["db"] == 3
    assert options["retry"].get_retries() == 0  # redis-py itself repeats nothing
    await client.aclose()
