"""How a URL says where Redis is, and how a key becomes a name there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from agent_state.errors import Key
from agent_state.redis.client import connect, without_password
from agent_state.redis.keys import MirrorKeys, StoreKeys, below, escape_glob, key_of, text_of
from agent_state.testing.contract_base import content_of, put
from tests.redis.servers import SERVER, RedisServer, free_port
from tests.redis.stores import store_on


async def test_a_cluster_is_reached_by_any_of_its_nodes() -> None:
    client = connect("rediss+cluster://me:pw@one:7001,[::1]:7002,three?ssl_ca_certs=/ca")
    assert isinstance(client, RedisCluster)
    places = {(node.host, node.port) for node in client.nodes_manager.startup_nodes.values()}
    assert places == {("one", 7001), ("::1", 7002), ("three", 6379)}
    settings = client.connection_kwargs
    assert (settings["username"], settings["password"]) == ("me", "pw")
    assert settings["ssl_ca_certs"] == "/ca"


async def test_sentinels_are_asked_for_the_master_of_a_service() -> None:
    client = connect("redis+sentinel://me:p%2Fw@one,two:26380/main/3?sentinel_password=other")
    assert isinstance(client, Redis)
    pool = client.connection_pool
    settings = pool.connection_kwargs
    assert pool.service_name == "main"  # type: ignore[attr-defined]
    assert (settings["username"], settings["password"], settings["db"]) == ("me", "p/w", 3)
    sentinels = [
        sentinel.connection_pool.connection_kwargs
        for sentinel in pool.sentinel_manager.sentinels  # type: ignore[attr-defined]
    ]
    assert [(one["host"], one["port"]) for one in sentinels] == [("one", 26379), ("two", 26380)]
    assert {one["password"] for one in sentinels} == {"other"}
    assert all(one["socket_timeout"] == 1.0 for one in sentinels)


@pytest.mark.parametrize(
    ("scheme", "connection"),
    [("redis", SentinelManagedConnection), ("rediss", SentinelManagedSSLConnection)],
)
async def test_a_master_is_reached_as_the_url_says(scheme: str, connection: type) -> None:
    client = connect(
        f"{scheme}+sentinel://[::1]:26380,two/main/?sentinel_username=me&sentinel_password=pw",
        max_connections=7,
    )
    pool: Any = client.connection_pool
    assert (pool.service_name, pool.max_connections) == ("main", 7)
    assert pool.connection_class is connection
    assert "password" not in pool.connection_kwargs
    first, second = (
        sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels
    )
    assert (first["host"], first["port"], second["host"]) == ("::1", 26380, "two")
    assert (first["username"], first["password"]) == ("me", "pw")
    await client.aclose()


async def test_a_cluster_without_a_login_is_reached_by_an_address_of_ipv6() -> None:
    client: Any = connect("redis+cluster://[::1]:7002,two", max_connections=7)
    assert [(node.host, node.port) for node in client.nodes_manager.startup_nodes.values()] == [
        ("::1", 7002),
        ("two", 6379),
    ]
    options = client.get_connection_kwargs()
    assert options["max_connections"] == 7
    assert not options.get("username")
    await client.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "http://x",
        "redis+sentinel://one",
        "redis+cluster://a:b:c",
        "redis+cluster://",
        "redis+x://y",
    ],
)
def test_what_is_no_url_of_ours_is_refused(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # some of the words are redis-py's
        _ = connect(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:pw@h:1/0", "redis://me:***@h:1/0"),
        ("redis://:p@ss@h:1/0", "redis://:***@h:1/0"),
        ("redis+cluster://:pw@h:1,h:2", "redis+cluster://:***@h:1,h:2"),
        (
            "redis+sentinel://h/s?sentinel_password=pw&db=1",
            "redis+sentinel://h/s?sentinel_password=***&db=1",
        ),
        ("redis://h?password=pw", "redis://h?password=***"),
        ("redis://h:1/0", "redis://h:1/0"),
    ],
)
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert without_password(url) == shown


async def test_tls_and_password_through_the_url(tmp_path: Path) -> None:
    if not speaks_tls():
        pytest.skip("this server was built without TLS; Debian's has it")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    server = RedisServer(
        tmp_path / "redis",
        *("--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", "s3cret"),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(certificate)),
    )
    server.start()
    try:
        url = f"rediss://:s3cret@localhost:{port}/0?ssl_ca_certs={certificate}"
        async with store_on(url) as store:
            assert await store.commit([put("a", {"n": 1})]) == [1]
            assert await content_of(store, "a") == {"n": 1}
            await (await store.watch()).aclose()
    finally:
        server.kill()


def speaks_tls() -> bool:
    refused = subprocess.run(
        [SERVER, "--port", "0", "--tls-port", "1"], capture_output=True, check=False, timeout=20
    )
    said = refused.stdout + refused.stderr
    return b"TLS support" not in said and b"Bad directive" not in said


ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8) | st.sampled_from(
    ["a", "a/b", "%2f", "%", "a%", "/", "\0", "~", "0"]
)
keys = st.lists(ids, min_size=1, max_size=3).map(tuple)


@given(keys)
def test_a_key_comes_back_from_its_name(key: Key) -> None:
    assert key_of(text_of("notes", key).encode()) == key


@given(keys, keys)
def test_two_keys_have_two_names(one: Key, other: Key) -> None:
    assert (text_of("notes", one) == text_of("notes", other)) == (one == other)


@given(keys, keys)
def test_a_range_holds_what_is_below_a_prefix_and_nothing_else(key: Key, prefix: Key) -> None:
    low, high = below(prefix)
    for each in (key, (*prefix, *key), prefix):
        name = text_of("notes", each).encode()
        inside = low[1:] <= name < high[1:]
        assert inside == (len(each) > len(prefix) and each[: len(prefix)] == prefix)


def test_everything_is_below_no_prefix() -> None:
    assert below(()) == (b"-", b"+")  # the ends of an index, for ZRANGEBYLEX


@pytest.mark.parametrize("prefix", ["a{", "a}", "{a}"])
@pytest.mark.parametrize("made", [StoreKeys, MirrorKeys])
def test_a_prefix_with_a_brace_is_refused(made: type[StoreKeys | MirrorKeys], prefix: str) -> None:
    with pytest.raises(ValueError, match="braces"):
        made(prefix)


def test_the_keys_of_two_prefixes_differ_and_share_one_slot_each() -> None:
    def names(prefix: str) -> set[str]:
        keys = StoreKeys(prefix)
        named = {keys.notices, keys.kinds, keys.locks, keys.fence, keys.index("k"), keys.logs("k")}
        named |= {keys.document("k", "a"), keys.log("k", "a"), keys.dedupe("k", "a")}
        return named | {
            keys.writer("w"),
            keys.quarantine("k", "a", "i"),
            keys.reason("k", "a", "i"),
        }

    one, other = names("one:"), names("other:")

    assert len(one | other) == 24
    assert all(name.startswith("{one:store}:") for name in one)


@given(st.text())
def test_a_pattern_for_scan_matches_its_own_text_only(text: str) -> None:
    pattern = escape_glob(text)
    assert re.sub(r"\\(.)", r"\1", pattern) == text  # each escaped character stands for itself
    assert not re.search(r"(?<!\\)(?:\\\\)*[*?\[\]^-]", pattern)


@pytest.mark.parametrize("text", [b"", b"/", b"a//b", b"%2F", b"%41", b"a%", b"\xff", b"a\0"])
def test_what_is_no_name_of_ours_is_no_key(text: bytes) -> None:
    assert key_of(text) is None


@given(keys, st.sampled_from(["notes", "note", "notes_2"]))
def test_what_is_put_aside_says_of_which_key_it_is(key: Key, kind: str) -> None:
    names, text = StoreKeys("app:"), text_of("notes", key)
    for name in (
        names.document("notes", text),
        names.quarantine("notes", text, "id:1"),
        names.reason("notes", text, "id:1"),
    ):
        assert names.text_in(name, kind) == (text if kind == "notes" else None)
    assert names.text_in(names.log("notes", text), "notes") is None
